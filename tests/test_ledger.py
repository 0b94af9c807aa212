"""The second task: booked balances, exact step labels, its tokenizer and its shipped models."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from scope_jax import load_hf, load_prm
from scope_jax.configlib import load_config
from scope_jax.models.hf import load_tokenizer
from scope_jax.pretrain import first_error_accuracy, label_rollouts, main, solve_rate, train_text
from scope_jax.pretrain_texts import LEDGER, LEDGER_VOCAB, TEXTS, make_tokenizer
from scope_jax.records import InputError
from scope_jax.tasks import ledger, worksheet
from tests import hostile

MODELS = "scope_jax/tasks/ledger_models"
GOLD = "Start: Ann has 4. Bob has 7. Book: (Ann-2), (Bob+5), (Ann+6)\n"
RIGHT = ["(Ann+6) Ann 4 to 0\n", "(Bob+5) Bob 7 to 2\n", "(Ann-2) Ann 0 to 8\n"]
TASKS = {"worksheet": worksheet, "ledger": ledger}
both = pytest.mark.parametrize("name", TASKS)


def slow_labels(gold: str, lines: list[str]) -> list[bool]:
    """A twin of check_steps for finished solutions in the plain style, without regexes."""
    words = gold.split()
    balance = {words[1]: int(words[3][0]), words[4]: int(words[6][0])}
    open_payments, labels = [word.rstrip(",") for word in words[8:]], []
    for line in lines:
        payment, name, old, to, new = line.removesuffix("\n").split(" ")
        known = payment in open_payments and name == payment[1:4] and to == "to"
        want = (int(old) + int(payment[4:6])) % 10 if known else None
        labels.append(known and balance[name] == int(old) and want == int(new))
        if known:
            open_payments.remove(payment)
            balance[name] = int(new)
    if open_payments:
        labels[-1] = False
    return labels


def test_a_line_goes_on_from_the_solutions_own_balance():
    assert ledger.check_steps(GOLD, RIGHT) == [True, True, True]
    carried_on = ["(Ann+6) Ann 4 to 1\n", "(Bob+5) Bob 7 to 2\n", "(Ann-2) Ann 1 to 9\n"]
    assert ledger.check_steps(GOLD, carried_on) == [False, True, True]
    started_anew = [RIGHT[0], RIGHT[1], "(Ann-2) Ann 4 to 2\n"]
    assert ledger.check_steps(GOLD, started_anew) == [True, True, False]


def test_the_order_is_free_and_decides_which_balances_are_right():
    text = "(Ann-2) Ann 4 to 2\n(Ann+6) Ann 2 to 8\n(Bob+5) Bob 7 to 2\n"
    assert ledger.verify(GOLD, text) and ledger.verify(GOLD, "".join(RIGHT))
    assert ledger.valid_order(GOLD, text) == "(Ann-2) (Ann+6) (Bob+5)"
    swapped = "(Ann-2) Ann 0 to 8\n(Ann+6) Ann 4 to 0\n(Bob+5) Bob 7 to 2\n"
    assert not ledger.verify(GOLD, swapped) and ledger.valid_order(GOLD, swapped) == ""


@pytest.mark.parametrize(
    "line",
    [
        "(Ann+6) Ann 4 to 1\n",
        "(Ann+6) Ann 4 to 00\n",
        "(Ann+6) Bob 7 to 3\n",  # another's account
        "(Ann+5) Ann 4 to 9\n",  # a payment that is not there
        "(Ann+6) Ann has 3. Ann 4 to 0\n",  # restates what is not so
        "(Ann+6) Bob has 7. Ann 4 to 0\n",
        "(Ann+6)  Ann 4 to 0\n",
        "(Ann+6) Ann 4 to 0 (Bob+5) Bob 7 to 2\n",
        "(ann+6) Ann 4 to 0\n",
    ],
)
def test_any_other_line_is_wrong(line):
    assert ledger.check_steps(GOLD, [line], finished=False) == [False]
    assert not ledger.verify(GOLD, "".join([line, *RIGHT[1:]]))


@both
def test_a_generated_solution_is_right_and_a_changed_value_is_not(name):
    task, rng = TASKS[name], np.random.default_rng(0)
    for i in range(60):
        record = task.problems("train", n=4)[i]
        gold, lines = record["gold"], record["solution"].splitlines(keepends=True)
        assert task.verify(gold, record["solution"]) and all(task.check_steps(gold, lines))
        wrong = int(rng.integers(len(lines)))
        others = [digit for digit in "0123456789" if digit != lines[wrong][-2]]
        lines[wrong] = f"{lines[wrong][:-2]}{rng.choice(others)}\n"
        assert not task.verify(gold, "".join(lines))
        assert task.check_steps(gold, lines).index(False) == wrong


def test_step_labels_agree_with_a_plain_twin_on_mutated_solutions():
    rng, first_errors = np.random.default_rng(1), set()
    for i in range(300):
        record = ledger.problems("train", n=4)[i]
        lines = record["solution"].splitlines(keepends=True)
        for _ in range(int(rng.integers(0, 3))):
            k, at = rng.integers(len(lines)), int(rng.choice([-2, 5, 12]))
            lines[k] = f"{lines[k][:at]}{rng.integers(1, 10)}{lines[k][at + 1 or None :]}"
        lines = [lines[k] for k in rng.permutation(len(lines))] if i % 3 == 0 else lines
        lines = lines[: rng.integers(1, 5)] if i % 5 == 0 else lines
        labels = ledger.check_steps(record["gold"], lines)
        assert labels == slow_labels(record["gold"], lines)
        assert all(labels) == ledger.verify(record["gold"], "".join(lines))
        first_errors.add(labels.index(False) if False in labels else -1)
    assert first_errors == {-1, 0, 1, 2, 3}


@both
def test_a_wrong_finished_solution_always_has_a_wrong_step(name):
    task = TASKS[name]
    for i in range(50):
        record = task.problems("train", n=3)[i]
        lines = record["solution"].splitlines(keepends=True)
        for kept in (lines[:-1], [*lines, lines[0]], [lines[0], *lines], [*lines, "x\n"]):
            assert not task.verify(record["gold"], "".join(kept))
            assert not all(task.check_steps(record["gold"], kept))
            assert task.valid_order(record["gold"], "".join(kept)) == ""


@both
def test_orders_tell_right_solutions_apart_and_styles_do_not(name):
    text = TEXTS[name]
    tokenizer = make_tokenizer(text)
    gold = text.task.problems("train", n=3)[0]["gold"]
    found = {
        text.task.valid_order(gold, text.task.solution(gold, np.random.default_rng(seed)))
        for seed in range(60)
    }
    assert len(found) == 6 == len(list(itertools.permutations(range(3)))) and "" not in found

    ids, start = text.solved(30, 4, np.random.default_rng(0), {}, verbose=True)
    for row in ids:
        gold, answer = tokenizer.decode(row[:start]), tokenizer.decode(row[start:-1])
        restated = "?" if name == "worksheet" else "has "
        assert answer.count(restated) == 4 and text.task.verify(gold, answer)
        plain = [
            line.split("?")[-1]
            if name == "worksheet"
            else line.split(" ")[0] + " " + line.split(". ")[-1]
            for line in answer.splitlines()
        ]
        order = text.task.valid_order(gold, answer)
        assert order and order == text.task.valid_order(gold, "\n".join(plain))
        assert all(text.task.check_steps(gold, answer.splitlines(keepends=True)))


@both
def test_hostile_texts_are_wrong_and_neither_crash_nor_hang(name):
    task = TASKS[name]
    gold = task.problems("train", n=3)[0]["gold"]
    texts = [*hostile.NUMBERS, *hostile.BROKEN, *hostile.CODE, *hostile.PROTOCOL, *hostile.UNSEEN]
    texts += [piece * 100_000 for piece in (*hostile.PIECES[:12], "(", "(Ann", "Ann has ", "a2+2?")]
    for text in texts:
        assert not task.verify(gold, text) and not task.verify(text, text)
        assert task.valid_order(gold, text) == task.valid_order(text, text) == ""
        assert task.check_steps(gold, [text, text])[-1] is False


@both
def test_problems_are_functions_of_seed_split_and_index(name):
    task = TASKS[name]
    splits = [task.problems(s, n=5, ood_n=5, seed=3) for s in ("train", "test", "ood", "valid")]
    assert len({split[0]["problem"] for split in splits}) == 4
    again = task.problems("valid", n=5, seed=3)
    assert [splits[3][i] for i in range(4)] == [again[i] for i in range(4)]
    with pytest.raises(InputError, match="unknown split 'val'"):
        task.problems("val")
    with pytest.raises(InputError, match="got 0"):
        task.problems("train", n=0)


@both
def test_tokenizers_read_back_what_they_write(name):
    text = TEXTS[name]
    tokenizer = make_tokenizer(text)
    for i in range(20):
        record = text.task.problems("train", n=5)[i]
        ids = tokenizer.encode(record["problem"]), tokenizer.encode(record["solution"])
        assert [tokenizer.decode(x) for x in ids] == [record["problem"], record["solution"]]
        assert len(ids[0]) == text.prompt_length(5) and len(ids[1]) == 5 * text.line
        assert tokenizer.pad_token_id not in ids[0] + ids[1]  # also stands for unknown tokens
    drawn, start = text.solved(4, 5, np.random.default_rng(0), {}, verbose=True)
    for row in drawn:
        answer = tokenizer.decode(row[start:-1])
        assert tokenizer.encode(answer) == row[start:-1].tolist()
        assert len(row) - start - 1 == 5 * text.verbose_line


def test_wrong_values_are_written_for_hard_facts_only_and_carried_on():
    hard = ledger.hard_facts(0)
    assert len(hard) == 60 == len(ledger.FACTS) // 2 and ledger.hard_facts(1) != hard
    assert all(ledger.fact_value(fact) != wrong for fact, wrong in hard.items())
    tokenizer, right = make_tokenizer(LEDGER), {True: [], False: []}
    ids, start = LEDGER.solved(1000, 4, np.random.default_rng(0), hard)
    for row in ids:
        gold = tokenizer.decode(row[:start])
        lines = tokenizer.decode(row[start:-1]).splitlines(keepends=True)
        labels = ledger.check_steps(gold, lines)
        for line, label in zip(lines, labels, strict=True):
            right[line[12] + line[4:6] in hard].append(label)
    assert all(right[False])
    assert abs(np.mean(right[True]) - 0.25) < 0.04  # 2,000 draws: a standard error of 0.01


@both
def test_configs_take_models_and_teacher(name):
    config = load_config(f"{name}:n=4,models=/m,teacher=imperfect", [])
    assert config.model.path == "/m/policy" and config.prm.path == "/m/prm"
    assert config.teacher.path == "/m/teacher_imperfect" and config.task.n == 4
    plain, verbose = load_config(name, []), load_config(f"{name}:teacher=verbose", [])
    assert plain.teacher.path == f"scope_jax/tasks/{name}_models/teacher"
    assert verbose.sample.max_new_tokens > plain.sample.max_new_tokens
    with pytest.raises(InputError, match="teacher='other' is none of own, verbose, imperfect"):
        load_config(f"{name}:teacher=other", [])


def test_the_shipped_tokenizer_is_the_one_pretrain_makes():
    for name in ("policy", "teacher", "prm"):
        tokenizer, ends = load_tokenizer(f"{MODELS}/{name}")
        assert tokenizer.get_vocab() == LEDGER_VOCAB and ends == (LEDGER_VOCAB["<eos>"],)


def test_the_shipped_models_do_what_the_config_needs_of_them():
    tokenizer, _ = load_tokenizer(f"{MODELS}/policy")
    policy = load_hf(f"{MODELS}/policy", dtype="float32")
    assert 0.01 < solve_rate(*policy, tokenizer, 5, text=LEDGER) < 0.15
    teacher = load_hf(f"{MODELS}/teacher", dtype="float32")
    as_the_config_samples = load_config("ledger", []).teacher.temperature
    rate = solve_rate(*teacher, tokenizer, 5, text=LEDGER, temperature=as_the_config_samples)
    assert rate > 0.95
    data = label_rollouts(*policy, tokenizer, count=384, seed=321, text=LEDGER)
    prm, params = load_prm(f"{MODELS}/prm", dtype="float32")
    assert first_error_accuracy(prm, params, data)["f1"] > 0.75


@both
def test_two_updates_on_verbose_text_move_the_policy(name):
    text = TEXTS[name]
    model, params = load_hf(f"scope_jax/tasks/{name}_models/policy", dtype="float32")
    before = np.asarray(params["embed"])
    params = train_text(
        model, params, text=text, rows=8, wrong=text.task.hard_facts(1), verbose=True, seed=0,
        steps=2, peak=1e-3, name=name,
    )  # fmt: skip
    after = np.asarray(params["embed"])
    assert np.isfinite(after).all() and not np.array_equal(before, after)


@pytest.mark.slow
@both
def test_pretrain_makes_every_teacher(name, tmp_path):
    options = ["--task", name, "--steps", "8", "--rows", "8", "--teachers", "verbose", "imperfect"]
    assert main(["--out", str(tmp_path), *options]) == 0
    made = {path.name for path in pathlib.Path(tmp_path).iterdir()}
    kinds = {"teacher", "teacher_verbose", "teacher_imperfect"}
    assert made == {"policy", "prm", "pretrain.json"} | kinds
    assert json.loads((tmp_path / "pretrain.json").read_text())["task"] == name
