r"""Tests of scope_jax/rewards.py: extraction, the fast path, and the worker pool under attack."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import scope_jax.answers as answers
import scope_jax.rewards as rewards
from scope_jax.rewards import (
    extract_answer,
    score_completions,
    verifier_stats,
    verify,
    verify_batch,
    verify_choice,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def as_they_stand(gold, answer):
    """In place of `compare`: leaves every pair to math-verify."""
    return answers.normalise(gold), answers.normalise(answer)


def read_rows(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    with gzip.open(DATA / name, "rt") as file:
        return [json.loads(line) for line in file]


def run_script(code, *args, env=None):
    """Runs `code`, which finds the module as `rewards`, as an unguarded script of a new process.

    The package's own __init__, which imports jax, is left out.
    """
    load = (
        "import sys, types\n"
        "package = sys.modules['scope_jax'] = types.ModuleType('scope_jax')\n"
        f"package.__path__ = [{os.path.dirname(rewards.__file__)!r}]\n"
        "from scope_jax import answer_worker, rewards\n"
    )
    environment = {**os.environ, **(env or {})}
    command = [sys.executable, *(args or ("-c", load + code))]
    source = load + code if args else None
    return subprocess.run(command, input=source, env=environment, capture_output=True, text=True)


# ---- extraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),  # an escaped brace closes nothing
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} stray \boxed{5} {", "5"),
        (r"\boxed{5}, no: \boxed{\frac{1}{", "5"),  # cut off inside the second box
        (r"\boxed{}", ""),
        ("#### 72", "72"),
        ("#### 1\nthen\n#### 2 \nbye", "2"),
        ("####", ""),
        ("the answer is 5", None),
        (r"\boxed{5", None),
        ("", None),
    ],
)
def test_extracts_the_last_closed_box_or_the_line_after_the_hashes(text, answer):
    assert extract_answer(text) == answer


def test_a_box_goes_before_hashes_wherever_they_stand():
    assert extract_answer(r"\boxed{5} #### 6") == "5"
    assert extract_answer(r"#### 6 \boxed{5}") == "5"
    assert extract_answer(r"#### 6 \boxed{5") == r"6 \boxed{5"  # no closed box


def test_only_the_last_box_counts():
    assert not verify("5", boxed(5) + boxed(7))
    assert verify("7", boxed(5) + boxed(7))


# ---- the fast path -------------------------------------------------------------------------------

EQUAL = [
    ("72", "72"),
    ("72", "72."),
    ("72", "+72"),
    ("72", "72.0"),
    ("72", "**72**"),
    ("1234", "1,234"),
    ("1,234,567.5", r"1{,}234{,}567.50"),
    ("10080", r"10,\!080"),
    ("18", r"\$18"),
    ("18", "$18$"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"-\frac{3}{4}", "-0.75"),
    ("3/4", "6/8"),
    ("-5", "− 5"),
    (r"10\%", "10%"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"( 3, \frac{\pi}{2} )"),
    ("x + 1", "x+1"),
]
DIFFERENT = [
    ("72", "73"),
    ("72", "-72"),
    ("72", "7.2"),
    ("1,234", "234"),
    ("3/4", "4/3"),
    (r"\frac{1}{2}", "0.51"),
    ("12345678901234567890", "12345678901234567891"),
    ("72", ""),
]
UNDECIDED = [  # for each of them a rash rule would be wrong, or math-verify might disagree
    ("10", r"10\%"),
    ("1/3", "0.333333"),
    ("1,234", "1, 234"),
    ("12", "1 2"),
    ("1", "1/0"),
    ("1", "1e0"),
    ("1", "1" * 50),
    ("0.5", r"\frac12"),
    ("Evelyn", "evelyn"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_clearly_equal_answers_need_no_worker(gold, answer):
    before = verifier_stats()
    assert verify(gold, boxed(answer)) and verify(answer, boxed(gold))
    assert verifier_stats() == before


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_plain_numbers_need_no_worker(gold, answer):
    before = verifier_stats()
    assert verify(gold, boxed(answer)) is False
    assert verifier_stats() == before


@pytest.mark.parametrize(("gold", "answer"), UNDECIDED)
def test_the_fast_path_leaves_doubtful_pairs_to_math_verify(gold, answer):
    gold, answer = answers.normalise(gold), answers.normalise(answer)
    assert answers.fast_verdict(gold, answer) is None


def test_the_fast_path_agrees_with_math_verify(monkeypatch):
    pairs = EQUAL + DIFFERENT[:-1]
    monkeypatch.setattr(rewards, "compare", as_they_stand)
    verdicts = verify_batch([g for g, _ in pairs], [boxed(a) for _, a in pairs])
    assert verdicts == [True] * len(EQUAL) + [False] * (len(DIFFERENT) - 1)


def test_random_word_problem_answers_agree_with_fractions():
    rng = random.Random(0)
    writings = [
        "{n}",
        "{n:,}",
        "{n}.0",
        "${n}",
        "\\${n:,}.00",
        "{n}.",
        "{m}/2",
        "\\frac{{{m}}}{{2}}",
    ]
    golds, completions, expected = [], [], []
    for _ in range(300):
        gold, guess = rng.randint(0, 20_000), rng.randint(0, 20_000)
        guess = rng.choice([gold, gold, -gold, gold + 1, gold * 10, guess])
        golds.append(f"She has <<{gold}={gold}>>{gold:,} of them.\n#### {gold:,}")
        answer = rng.choice(writings).format(n=guess, m=2 * guess)
        completions.append(rng.choice(["So 3 + 4 = 7.\n#### {}", "\\boxed{{{}}}"]).format(answer))
        expected.append(Fraction(guess) == Fraction(gold))
    assert 50 < sum(expected) < 250
    before = verifier_stats()
    assert verify_batch(golds, completions) == expected
    assert verifier_stats() == before  # all without a worker


def test_real_model_solutions_are_judged_as_their_labels_say():
    rows = read_rows("gsm8k_example_model_solutions.jsonl.gz")
    solutions = [(r, r[k]) for r in rows for k in r if k.endswith(("finetuning", "verification"))]
    golds = [row["ground_truth"].replace("A: ", "#### ") for row, _ in solutions]
    completions = [solution["solution"].replace("A: ", "#### ") for _, solution in solutions]
    labels = [solution["is_correct"] for _, solution in solutions]
    assert len(labels) == 1319 * 4 and 1000 < sum(labels) < 4000
    assert verify_batch(golds, completions) == labels


# ---- golds and edges -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold",
    ["72", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", r"Hence $\boxed{72}$, not 7"],
)
def test_a_gold_may_be_bare_a_gsm8k_solution_or_boxed(gold):
    assert verify(gold, "#### 72")
    assert not verify(gold, "#### 48")


@pytest.mark.parametrize("gold", ["", "  ", "$$", "Some steps.\n#### ", r"\boxed{}"])
def test_an_empty_gold_is_an_error_of_the_data(gold):
    with pytest.raises(ValueError, match="gold 1 has no answer"):
        verify_batch(["5", gold], ["#### 5", "#### 5"])


@pytest.mark.parametrize("completion", ["", " \n", r"5 \boxed{}", "5\n####", r"\boxed{\text{}}"])
def test_an_empty_answer_is_wrong(completion):
    assert verify("5", completion) is False


def test_lengths_must_match():
    with pytest.raises(ValueError, match="2 golds for 1 completions"):
        verify_batch(["1", "2"], ["1"])


def test_an_empty_batch_has_no_verdicts():
    assert verify_batch([], []) == []


# ---- math-verify in the workers ------------------------------------------------------------------


def test_equivalent_formulas_are_equal_and_others_are_not():
    cases = [
        (r"\frac{1}{2}", boxed(r"\frac12"), True),
        ("0.5", boxed(r"\frac12"), True),
        ("(x+1)^2", boxed("x^2+2x+1"), True),
        ("(x+1)^2", boxed("x^2+x+1"), False),
        (r"2\sqrt{2}", boxed(r"\sqrt{8}"), True),
        (r"2\sqrt{2}", boxed(r"\sqrt{9}"), False),
        (r"2\sqrt{2}", r"\sqrt{8}", True),  # neither box nor words: the completion is the answer
        ("5", boxed("x = 5"), True),
        (r"\{1, 2\}", boxed("2, 1"), True),
        ("(1, 2)", boxed("(2, 1)"), False),
        ("1/3", boxed("0.333333"), True),
        ("1/3", boxed("0.333"), False),
        ("7", boxed("5 or 7"), False),  # one guess only
        ("7", boxed("5, 7"), False),
        ("72", "#### 72 clips", True),
        ("72", "#### 73 clips", False),
        ("18 dollars", r"#### \$18", True),
        ("5", "#### 5 million", False),
        ("5", "#### 5 xy", False),
        ("72", "I add them up, so the answer is 72.", True),
        ("72", "I add 72 and 1, so the answer is 73.", False),
        (r"\frac{3}{4}", r"First $x = 2$. The final answer is $\frac{6}{8}$.", True),
    ]
    golds, completions, expected = map(list, zip(*cases, strict=True))
    assert verify_batch(golds, completions) == expected


def test_an_unmarked_completion_is_read_from_its_end():
    assert verify("72", "word " * 20_000 + "and the answer is 72.")
    assert not verify("72", "The answer is 72. " + "word " * 20_000)  # 100,000 characters ago


def test_an_answer_longer_than_the_limit_is_wrong_whatever_its_end():
    assert not verify("72", "\\boxed{" + "1" * 20_000 + " = 72}")
    assert not verify("72", "#### " + "1 + " * 10_000 + " 72")


def test_math500_golds_equal_themselves(monkeypatch):
    golds = [row["answer"] for row in read_rows("math500.jsonl.gz")]
    assert all(verify_batch(golds, [boxed(gold) for gold in golds]))
    monkeypatch.setattr(rewards, "compare", as_they_stand)
    sample = golds[::5]
    checks = verify_batch(sample, [boxed(gold) for gold in sample])
    assert [gold for gold, equal in zip(sample, checks, strict=True) if not equal] == []


def test_fast_parsing_gives_the_trees_of_the_full_one():
    code = (
        "import json, math_verify\n"
        "from latex2sympy2_extended import latex2sympy2\n"
        "def trees(texts):\n"
        "    for text in texts:\n"
        "        try: yield repr(latex2sympy2.latex2sympy(text))\n"
        "        except Exception as error: yield type(error).__name__\n"
        "texts = json.loads(sys.argv[1])\n"
        "full, parse = list(trees(texts)), latex2sympy2._Latex2Sympy\n"
        "answer_worker.parse_in_two_stages()\n"
        "assert latex2sympy2._Latex2Sympy is not parse\n"
        "print(json.dumps([full, list(trees(texts))]))\n"
    )
    # The first three are syntax errors to the fast prediction alone, the next ones to both.
    texts = ["5r^5", "x^5-x^4+x^3", r"15\mbox{ cm}^2", r"\frac{1", "1 + ", r"2, \{3\}", "(1, 2]"]
    texts += [row["answer"] for row in read_rows("math500.jsonl.gz")][::10]
    done = run_script(code, "-", json.dumps(texts))
    full, fast = json.loads(done.stdout)
    assert fast == full and len(full) == len(texts)
    assert full[:2] == ["5*r**5", "x**5 - x**4 + x**3"] and full[3] == "Exception"


def test_equal_pairs_are_checked_once():
    before = verifier_stats().checked
    verdicts = verify_batch([r"\sqrt{12}"] * 9, [boxed(r"2\sqrt{3}")] * 8 + [boxed(r"3\sqrt{2}")])
    assert verdicts == [True] * 8 + [False]
    assert verifier_stats().checked - before == 2


# ---- hostile text and dying workers --------------------------------------------------------------

HOSTILE = [
    r"\boxed{9^{9^9}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{1000000!}",
    "9**9**9**9",
    "1e999999999",
    r"\boxed{1e999999999}",
    "\\boxed{" + "(" * 200 + "1" + ")" * 200 + "}",
    "7" * 1_000_000,
    "\\boxed{" + "7" * 1_000_000 + "}",
    "#### " + "7" * 1_000_000,
    "1" * 100 + "/" + "3" * 100,
    "\\boxed{\x00 5}\x00",
    "\ud800 \\boxed{\udfff}",
    "\udfff" * 100,
    r"\boxed{\frac{1}{2",
    "}}}{{{ \\frac{1}{2}} $",
    "\\boxed{" * 1000,
    "\\boxed{" + "{" * 100_000,
    "\\" * 20_001,
    "$" * 20_001,
    " [" * 10_000,
    "\\boxed{x" + " " * 15_000 + "\n" * 4_000 + "y}",
]


def test_hostile_text_is_wrong_soon_and_the_pool_works_on():
    before, start = verifier_stats(), time.monotonic()
    verdicts = verify_batch([r"\frac{\pi}{3}"] * len(HOSTILE), HOSTILE, timeout=2.0)
    seconds = time.monotonic() - start
    assert verdicts == [False] * len(HOSTILE)
    assert verifier_stats().timeouts > before.timeouts
    assert seconds < 2.0 * len(HOSTILE) / 2  # two workers, and most items need no time at all
    assert verify(r"2\sqrt{5}", boxed(r"\sqrt{20}"))


def test_hostile_text_is_not_executed(tmp_path):
    code = f"__import__('os').mkdir({str(tmp_path / 'owned')!r})"
    texts = [code, f"\\boxed{{{code}}}", f"#### {code}", f"The answer is ${code}$."]
    assert verify_batch(["7"] * 4, texts) == [False] * 4
    verify_batch([f"{code}{i}" for i in range(4)], texts)
    assert not (tmp_path / "owned").exists()


def test_a_hanging_worker_is_killed_and_replaced():
    assert verify(r"\sqrt{3}", boxed(r"3/\sqrt{3}"))  # there is a worker now
    before = verifier_stats().timeouts
    stopped = [worker.process for worker in rewards._POOL]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    assert verify_batch([r"\sqrt{3}"], [boxed(r"3/\sqrt{3}")], num_workers=1, timeout=0.3) == [
        False
    ]
    assert verifier_stats().timeouts - before == 1
    assert stopped[0].poll() == -signal.SIGKILL
    for process in stopped[1:]:
        process.send_signal(signal.SIGCONT)
    assert verify(r"\sqrt{3}", boxed(r"3/\sqrt{3}"))


def break_on_send(monkeypatch, times):
    """Lets the worker of a batch's pair 0 die when it gets it, the first `times` times."""
    send, deaths = rewards._Worker.send, []

    def deadly_send(worker, job, request, timeout):
        if job == 0 and len(deaths) < times:
            deaths.append(worker.process.pid)
            worker.process.kill()
            worker.process.wait()
        send(worker, job, request, timeout)

    monkeypatch.setattr(rewards._Worker, "send", deadly_send)
    return deaths


def test_a_pair_whose_worker_died_is_tried_again(monkeypatch):
    before, deaths = verifier_stats(), break_on_send(monkeypatch, times=1)
    assert verify_batch(["(x+2)^2"], [boxed("x^2+4x+4")]) == [True]
    assert len(deaths) == verifier_stats().crashes - before.crashes == 1
    assert verifier_stats().failed == before.failed


def test_a_pair_that_kills_two_workers_is_wrong_and_hurts_no_other(monkeypatch):
    before, deaths = verifier_stats(), break_on_send(monkeypatch, times=99)
    answers = ["x^2+6x+9", "x^2+8x+16", "x^2+10x+25"]
    verdicts = verify_batch(["(x+3)^2", "(x+4)^2", "(x+5)^2"], [boxed(a) for a in answers])
    assert verdicts == [False, True, True]
    assert len(set(deaths)) == verifier_stats().crashes - before.crashes == 2
    assert verifier_stats().failed - before.failed == 1


def test_workers_killed_between_two_calls_are_replaced():
    assert verify_batch(["(x+6)^2", "(x+7)^2"], [boxed("x^2+12x+36"), boxed("x^2+14x+49")])[0]
    dead = [worker.process for worker in rewards._POOL]
    for process in dead:
        process.kill()
        process.wait()
    before = verifier_stats().crashes
    assert verify("(x+8)^2", boxed("x^2+16x+64"))
    assert verifier_stats().crashes - before == len(dead) > 0


def test_worn_workers_are_replaced_while_they_work(monkeypatch):
    assert verify(r"\sqrt{7}", boxed(r"7/\sqrt{7}"))  # there is a worker now
    old, before = {worker.process.pid for worker in rewards._POOL[:2]}, verifier_stats()
    monkeypatch.setattr(rewards, "WORKER_CHECKS", 10)
    end = time.monotonic() + 120
    for n in range(40, 100_000, 20):  # until replacements have started, which takes a while
        golds = [f"(x+{k})^2" for k in range(n, n + 20)]
        answers = [boxed(f"x^2+{2 * k + k % 2}x+{k * k}") for k in range(n, n + 20)]
        assert verify_batch(golds, answers) == [True, False] * 10
        if old.isdisjoint(w.process.pid for w in rewards._POOL[:2]) or time.monotonic() > end:
            break
    after = verifier_stats()
    assert old.isdisjoint(worker.process.pid for worker in rewards._POOL[:2])
    assert after.recycled - before.recycled >= len(old)
    assert (after.crashes, after.timeouts) == (before.crashes, before.timeouts)
    assert len(rewards._POOL) <= 3  # two that work and one that starts


def test_no_reply_survives_an_interrupted_batch(monkeypatch):
    assert verify(
        "(x+9)^2", boxed("x^2+18x+81")
    )  # there is a ready worker: the pair is sent at once

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rewards, "wait", interrupt)
        verify("(x-1)^2", boxed("x^2-2x+1"))
    assert all(worker.job is None for worker in rewards._POOL)  # the busy one is gone
    assert verify("(x-1)^2", boxed("x^2-3x+1")) is False


# ---- in other people's processes -----------------------------------------------------------------


@pytest.mark.parametrize("args", [("-c",), ("-",)])
def test_works_in_a_script_without_a_guard_and_imports_no_jax_there(args):
    code = (
        r"print(rewards.verify('\\sqrt{8}', '\\boxed{2\\sqrt2}'))" + "\n"
        "print([m for m in ('jax', 'sympy', 'math_verify') if m in sys.modules])\n"
        "print(rewards._POOL[0].process.pid)\n"
    )
    done = run_script(code, *([] if args == ("-c",) else args))
    assert (done.returncode, done.stderr) == (0, "")
    verdict, heavy, pid = done.stdout.split("\n")[:3]
    assert (verdict, heavy) == ("True", "[]")
    with pytest.raises(ProcessLookupError):  # the worker went with its caller
        os.kill(int(pid), 0)


def test_a_forked_child_uses_workers_of_its_own():
    code = (
        "import os\n"
        r"print(rewards.verify('\\sqrt{8}', '\\boxed{2\\sqrt{2}}'), flush=True)" + "\n"
        "parents = [w.process.pid for w in rewards._POOL]\n"
        "child = os.fork()\n"
        r"verdict = rewards.verify('\\sqrt{18}', '\\boxed{3\\sqrt{2}}')" + "\n"
        "same = parents == [w.process.pid for w in rewards._POOL]\n"
        "print('child' if child == 0 else os.wait()[1], verdict, same, flush=True)\n"
    )
    done = run_script(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["True", "child True False", "0 True True", ""]


def test_a_missing_math_verify_is_named(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    code = r"print(rewards.verify('5', '#### 6')); rewards.verify('2', '\\boxed{\\sqrt4}')"
    done = run_script(code, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == "False\n" and done.returncode == 1  # numbers need no math-verify
    last_line = done.stderr.strip().split("\n")[-1]
    assert last_line.startswith("ImportError: ") and "pip install math-verify" in last_line


def test_what_the_checker_prints_is_not_taken_for_its_verdict(tmp_path):
    package = tmp_path / "math_verify"
    package.mkdir()
    (package / "errors.py").write_text("class TimeoutException(BaseException): pass")
    (package / "__init__.py").write_text(
        "import os\n"
        "def parse(text, parsing_timeout=5):\n"
        "    print('true', flush=True); os.write(1, b'true\\n')\n"
        "    return [text]\n"
        "def verify(gold, answers, timeout_seconds=5):\n"
        "    return 'yes' in answers[0]\n"
    )
    code = "print(rewards.verify_batch(['a', 'a'], ['#### x+no', '#### x+yes'], num_workers=1))"
    done = run_script(code, env={"PYTHONPATH": str(tmp_path)})
    assert (done.stdout, done.stderr) == ("[False, True]\n", "")


# ---- multiple choice, and the text after a mark --------------------------------------------------

SPELLINGS = [
    r"\boxed{C}",
    r"\boxed{c}",
    r"\boxed{(C)}",
    r"\boxed{(c)}",
    r"\boxed{[C]}",
    r"\boxed{C.}",
    r"\boxed{C)}",
    r"\boxed{ C }",
    r"\boxed{\text{C}}",
    r"\boxed{\text{(C)}}",
    r"\boxed{\text{ (C) }}",
    r"\boxed{\mathrm{C}}",
    r"\boxed{\textbf{(C)}}",
    r"\boxed{\textbf{(C) } 12}",
    r"\boxed{\textbf{(C)}\ 12 \text{ m}}",
    r"\boxed{\text{C. } 12\text{ m}}",
    r"\boxed{C) 12 m}",
    r"\boxed{c) 12 m}",
    r"\boxed{(C)12 m}",
    r"\boxed{C. 12 m}",
    r"\boxed{C: the moon}",
    r"\boxed{C:the moon}",
    r"\boxed{\text{Option C}}",
    r"\boxed{\text{Answer: C}}",
    r"\boxed{$C$}",
    r"\boxed{**C**}",
    r"\boxed{C. A dog and a cat}",
    r"\boxed{(C) A and not B}",
    r"First \boxed{A}, no: \boxed{C}",
    "#### C",
    "C",
    "(C).",
    "I think.\n\n**C**\n",
    "The answer is C",
    "The answer is (C).",
    "Not A.\nSo the correct answer is **(C)**.",
    "Answer: C",
    "ANSWER: C) 12 m",
    "Final answer: $\\textbf{(C)}$ 12 m",
    "Therefore the correct option is C.",
    "The correct choice is: (C) because it floats.",
]
NO_C = [
    r"\boxed{B}",
    r"\boxed{C}, no: \boxed{B}",
    r"\boxed{C} or rather \boxed{12}",
    r"\boxed{A, C}",
    r"\boxed{C, D}",
    r"\boxed{C and D}",
    r"\boxed{(C), (D)}",
    r"\boxed{(C) and (D)}",
    r"\boxed{(C) or D}",
    r"\boxed{(C)(D)}",
    r"\boxed{C/D}",
    r"\boxed{c:d}",
    r"\boxed{C = 3}",
    r"\boxed{C+1}",
    r"\boxed{CD}",
    r"\boxed{Cat}",
    r"\boxed{cold water}",
    r"\boxed{\text{cat}}",
    r"\boxed{3C}",
    r"\boxed{C_2}",
    r"\boxed{K}",
    r"\boxed{}",
    r"\boxed{C",
    "",
    "c",
    "The answer is c: it is cold.",
    "The answer is not C.",
    "The answer is either (C) or (D).",
    "The answer is (C) or (D).",
    "The answer is Carbon.",
    "The answer is C-14.",
    "The answer is C.\nNo, I cannot say.",
    "C is too warm, D is too cold.",
    "Option C is tempting.",
    "Is the answer (C)?",
]


@pytest.mark.parametrize("completion", SPELLINGS)
def test_a_choice_is_its_letter_however_it_is_spelled(completion):
    assert verify_choice("C", completion)
    assert not verify_choice("B", completion) and not verify_choice("A", completion)


@pytest.mark.parametrize("completion", NO_C)
def test_what_does_not_clearly_choose_c_is_wrong(completion):
    assert not verify_choice("C", completion)


def test_every_letter_from_a_to_j_is_an_option_in_every_spelling_of_the_gold():
    for letter in "ABCDEFGHIJ":
        for gold in (letter, f"({letter})", f"\\boxed{{\\text{{{letter}}}}}", f"{letter}."):
            for other in "ABCDEFGHIJ":
                assert verify_choice(gold, f"\\boxed{{({other})}}") is (other == letter)


@pytest.mark.parametrize("gold", ["", "K", "12", "AB", "A or B", "cold"])
def test_a_gold_that_is_no_letter_is_an_error_of_the_data(gold):
    with pytest.raises(ValueError, match="no letter A to J"):
        verify_choice(gold, r"\boxed{A}")


def test_only_the_text_behind_the_last_mark_is_checked():
    completions = [
        r"\boxed{7}</think>\boxed{5}",
        r"\boxed{5}</think>\boxed{7}",
        r"\boxed{5}",  # never stopped thinking
        r"</think>\boxed{7} and</think> so \boxed{5}",
        r"\boxed{5}</think>",
        "",
    ]
    golds = ["5"] * 6
    for fn in (verify, lambda gold, text: verify(gold, text)):
        assert score_completions(fn, golds, completions, after="</think>") == [1, 0, 0, 1, 0, 0]
        assert score_completions(fn, golds, completions) == [1, 0, 1, 1, 1, 0]


def test_a_completion_without_the_mark_is_not_checked_at_all():
    seen = []

    def reward(gold, text):
        seen.append((gold, text))
        return 0.5

    assert score_completions(reward, ["a", "b"], ["x", "y|z"], after="|") == [0.0, 0.5]
    assert seen == [("b", "z")]
    with pytest.raises(ValueError, match="2 golds for 1 completions"):
        score_completions(reward, ["a", "b"], ["x"], after="|")


def test_the_texts_behind_the_mark_are_one_batch(monkeypatch):
    batches = []
    monkeypatch.setattr(
        rewards, "verify_batch", lambda *args: batches.append(args) or [True, False]
    )
    assert score_completions(verify, ["1", "2", "3"], ["a|b", "c", "d|e"], after="|") == [1, 0, 0]
    assert batches == [(["1", "3"], ["b", "e"])]
