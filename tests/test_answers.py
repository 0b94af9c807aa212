"""Answer checking against hand-made labels, MATH-500's golds in every dress, GSM8K's labels."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import pytest
from answer_pairs import PAIRS

from scope_jax.answer_forms import compare
from scope_jax.answers import normalise
from scope_jax.data import read_jsonl
from scope_jax.rewards import verify, verify_batch
from scope_jax.units import split_unit

ROOT = pathlib.Path(__file__).parents[1]


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


# ---- the hand-labelled pairs ---------------------------------------------------------------------


def test_there_are_enough_pairs_and_enough_that_differ():
    assert len({pair[:2] for pair in PAIRS}) == len(PAIRS) >= 300
    assert sum(not equal for _, _, equal, _ in PAIRS) >= len(PAIRS) / 3


def test_every_pair_is_judged_as_it_is_labelled():
    verdicts = verify_batch([pair[0] for pair in PAIRS], [boxed(pair[1]) for pair in PAIRS])
    wrong = [pair for pair, found in zip(PAIRS, verdicts, strict=True) if found is not pair[2]]
    assert wrong == []


def test_equality_is_symmetric():
    # But for a gold that is an option's letter: only completions add the option's text.
    pairs = [pair for pair in PAIRS if not (pair[0].startswith(r"\text{(") and "12" in pair[1])]
    verdicts = verify_batch([pair[1] for pair in pairs], [boxed(pair[0]) for pair in pairs])
    assert [pair for pair, found in zip(pairs, verdicts, strict=True) if found is not pair[2]] == []


MATH_VERIFY_ALONE = r"""
import json, logging, sys
import math_verify
sys.path.append(sys.argv[1])
import answer_worker
answer_worker.parse_in_two_stages()  # same trees, sooner
logging.disable(logging.CRITICAL)
for gold, answer in json.load(sys.stdin):
    gold, answer = math_verify.parse(f"${gold}$"), math_verify.parse(answer)
    print(json.dumps(bool(math_verify.verify(gold, answer))))
"""


def test_math_verify_alone_errs_on_many_of_the_pairs():
    pairs = [(gold, boxed(answer)) for gold, answer, _, _ in PAIRS]
    command = [sys.executable, "-c", MATH_VERIFY_ALONE, str(ROOT / "scope_jax")]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True)
    verdicts = [json.loads(line) for line in done.stdout.split()]
    assert len(verdicts) == len(PAIRS), done.stderr
    wrong = [pair for pair, found in zip(PAIRS, verdicts, strict=True) if found is not pair[2]]
    missed = sum(equal for _, _, equal, _ in wrong)
    print(f"math-verify alone: {len(wrong)} of {len(PAIRS)} pairs wrong, {missed} of them equal")
    if importlib.metadata.version("math-verify") == "0.9.0":
        assert (len(wrong), missed) == (78, 55)
    assert len(wrong) > 0  # once it is right on all, our rules in `compare` can go


# ---- MATH-500's golds in the ways in which models write them -------------------------------------

PLAIN = re.compile(r"-?[0-9]+")
FRAC = re.compile(r"\\d?frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))")
DEGREES = re.compile(r"\^\\circ|\\text\{ degrees\}")
UNIT = re.compile(r" ?\\(?:mbox|text)\{ ?(?:cents|cm|inches|degrees)\}(?:\^2)?")
MATRIX = "pmatrix"


def dfrac(gold):
    return re.sub(r"\\d?frac", r"\\dfrac", gold)


def tfrac(gold):
    return re.sub(r"\\d?frac", r"\\tfrac", gold)


def braced_frac(gold):
    return FRAC.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", gold)


def slashed(gold):
    return FRAC.sub(r"(\1\2/\3\4)", gold) if not re.search(r"[0-9]\\d?frac", gold) else gold


def left_right(gold):
    gold = gold.replace("\\left", "").replace("\\right", "")
    opened = re.sub(r"(?<!\\)([(\[]|\\\{)", r"\\left\1", gold)
    return re.sub(r"(?<!\\)([)\]]|\\\})", r"\\right\1", opened)


def no_left_right(gold):
    return gold.replace("\\left", "").replace("\\right", "")


def spaced(gold):
    return re.sub(r"(?<![\\{^])([-+=,<>])(?!\\!)", r" \1 ", gold) if not thousands(gold) else gold


def unspaced(gold):
    return re.sub(r"(?<![A-Za-z!\\]) +| +(?![A-Za-z])", "", gold)


def thin_spaces(gold):
    return re.sub(r"(?<=[-+=]) ", r"\\,", gold)


def dollars(gold):
    return f"${gold}$"


def parentheses(gold):
    return rf"\({gold}\)"


def displaystyle(gold):
    return rf"\displaystyle {gold}"


def full_stop(gold):
    return f"{gold}."


def stars(gold):
    return f"**{gold}**"


def padded(gold):
    return f"  {gold}\\, \n"


def without_text(gold):
    return re.sub(r"\\text\{\(?([A-Za-z]+)\)?\}", r"\1", gold)


def bold_text(gold):
    return re.sub(r"\\text(?=\{[(A-Za-z])", r"\\textbf", gold)


def capitals(gold):
    return re.sub(r"(?<=\\text\{)[a-z]+(?=\}$)", lambda m: m[0].upper(), gold)


def without_unit(gold):
    return DEGREES.sub("", UNIT.sub("", gold)).replace("\\$", "")


def spelled_unit(gold):
    gold = DEGREES.sub(" degrees", gold).replace(r"\mbox{ cm}^2", r"\text{ square centimeters}")
    return gold.replace(r"\mbox{ inches}^2", " square inches").replace(r"\text{ cents}", " cents")


def with_unit(gold):
    return rf"{gold}\text{{ cm}}" if PLAIN.fullmatch(gold) else gold


def with_things(gold):
    return f"{gold} apples" if PLAIN.fullmatch(gold) else gold


def degree_sign(gold):
    return gold.replace(r"^\circ", "°")


def braced_degrees(gold):
    return gold.replace(r"^\circ", r"^{\circ}")


def named(gold):
    mark = re.search(r"[=,]|\\in|\\pm|\\text|_|\\cup", gold.replace(r",\!", ""))
    return gold if mark else f"A = {gold}"


def unnamed(gold):
    return re.sub(r"^[xy] ?(?:=|\\in) ?", "", gold)


def thousands(gold):
    return bool(re.fullmatch(r"(?:\\\$)?-?[0-9]{1,3}(?:,(?:\\! ?)?[0-9]{3})+", gold))


def without_commas(gold):
    return re.sub(r",(?:\\! ?)?", "", gold) if thousands(gold) else gold


def with_commas(gold):
    return f"{int(gold):,}" if PLAIN.fullmatch(gold) else gold


def braced_commas(gold):
    return f"{int(gold):,}".replace(",", "{,}") if PLAIN.fullmatch(gold) else gold


def decimal_point(gold):
    return f"{gold}.0" if PLAIN.fullmatch(gold) else gold


def doubled_fraction(gold):
    return rf"\frac{{{2 * int(gold)}}}{{2}}" if PLAIN.fullmatch(gold) else gold


def plus_sign(gold):
    return f"+{gold}" if re.match(r"[0-9]", gold) and "_" not in gold else gold


def leading_zero(gold):
    return re.sub(r"^\.", "0.", gold)


def no_leading_zero(gold):
    return re.sub(r"^0\.", ".", gold)


def listed(gold):
    return "," in gold and not re.match(r"[(\[x]|\\[^{]", gold) and not thousands(gold)


def reversed_list(gold):
    if not listed(gold):
        return gold
    opened, closed = (r"\{", r"\}") if gold.startswith(r"\{") else ("", "")
    items = gold.removeprefix(r"\{").removesuffix(r"\}").split(",")
    return opened + ", ".join(item.strip() for item in reversed(items)) + closed


def as_set(gold):
    return rf"\{{{gold}\}}" if listed(gold) and gold[0] != "\\" else gold


def square_brackets(gold):
    return gold.replace(MATRIX, "bmatrix")


def as_tuple(gold):
    column = re.fullmatch(rf"\\begin{{{MATRIX}}}([^&]*)\\end{{{MATRIX}}}", gold)
    return f"({column[1].replace(chr(92) * 2, ',')})" if column else gold


def inequality(gold):
    interval = re.fullmatch(r"(?:x \\in )?(\(|\[)(.*),(.*)(\)|\])", no_left_right(gold))
    if not interval or not ("]" in gold or "[" in gold or "infty" in gold) or r"\cup" in gold:
        return gold
    opened, low, high, closed = interval.groups()
    low = "" if "infty" in low else low + (r" \le " if opened == "[" else " < ")
    high = "" if "infty" in high else (r" \le " if closed == "]" else " < ") + high
    return f"{low}x{high}"


def braced_base(gold):
    return re.sub(r"^([0-9]+)_\{?([0-9])\}?$", r"\1_{\2}", gold)


def without_base(gold):
    return re.sub(r"^([0-9]+)_\{?([0-9])\}?$", r"\1", gold)


def times_dot(gold):
    return re.sub(r"(?<=[0-9]) ?(?=\\(?:pi|sqrt))", r" \\cdot ", gold)


def either_sign(gold):
    if r"\pm" not in gold or "{" in gold.split(r"\pm")[0]:
        return gold
    return f"{gold.replace(chr(92) + 'pm', '+')}, {gold.replace(chr(92) + 'pm', '-')}"


REWRITINGS = [
    dfrac, tfrac, braced_frac, slashed, left_right, no_left_right, spaced, unspaced, thin_spaces,
    dollars, parentheses, displaystyle, full_stop, stars, padded, without_text, bold_text, capitals,
    without_unit, spelled_unit, with_unit, with_things, degree_sign, braced_degrees, named, unnamed,
    without_commas, with_commas, braced_commas, decimal_point, doubled_fraction, plus_sign,
    leading_zero, no_leading_zero, reversed_list, as_set, square_brackets, as_tuple, inequality,
    braced_base, without_base, times_dot, either_sign,
]  # fmt: skip


@pytest.fixture(scope="module")
def golds(shared):
    return [row["answer"] for row in read_jsonl(shared / "data" / "math500.jsonl.gz")]


def test_every_gold_of_math500_equals_its_usual_rewritings(golds):
    assert len(golds) == 500
    pairs, rewritten = {(gold, gold): "itself" for gold in golds}, {}
    for rewriting in REWRITINGS:
        changed = {(gold, rewriting(gold)) for gold in golds if rewriting(gold) != gold}
        rewritten[rewriting.__name__] = len(changed)
        pairs |= dict.fromkeys(changed, rewriting.__name__)
    print(f"{len(pairs)} pairs of {len(set(golds))} golds: {rewritten}")
    assert min(rewritten.values()) >= 1 and len(pairs) > 3500
    verdicts = verify_batch([gold for gold, _ in pairs], [boxed(text) for _, text in pairs])
    items = zip(pairs.items(), verdicts, strict=True)
    assert [(name, pair) for (pair, name), equal in items if not equal] == []


def test_different_golds_of_math500_are_different(golds):
    distinct = sorted({normalise(gold) for gold in golds})
    pairs = [
        (gold, distinct[(i + far) % len(distinct)])
        for i, gold in enumerate(distinct)
        for far in (1, 2)
    ]
    verdicts = verify_batch([gold for gold, _ in pairs], [boxed(text) for _, text in pairs])
    equal = [pair for pair, same in zip(pairs, verdicts, strict=True) if same]
    # The same number, in one or the other with its unit.
    assert equal == [
        ("10,080", "10080"), ("120", r"120^\circ"), ("15", r"15\mbox{cm}^2"), ("30", r"30^\circ"),
        ("36", r"36^\circ"), ("90", r"90^\circ"),
    ]  # fmt: skip


# ---- what is decided without math-verify ---------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "value", "kinds"),
    [
        ("5 cm", "5", {"length": 1}),
        (r"5\text{cm}^2", "5", {"length": 2}),
        ("5 square feet", "5", {"length": 2}),
        ("5 m/s", "5 m/s", {}),  # five times m over s, unless the other answer is a speed
        (r"5\text{m/s}^2", "5", {"length": 1, "time": -2}),
        (r"5\text{m}\cdot\text{s}", "5", {"length": 1, "time": 1}),
        ("5 meters per second", "5", {"length": 1, "time": -1}),
        (r"30^\circ", "30", {"angle": 1}),
        (r"\sin 30^\circ", r"\sin 30^\circ", {}),
        ("72 clips", "72", {}),
        ("72 xy", "72 xy", {}),
        (r"3\pi", r"3\pi", {}),
        ("5 percent", "5 percent", {}),
        ("x+5 cm", "x+5", {"length": 1}),
        ("+ cm", "+ cm", {}),
    ],
)
def test_units_are_split_from_numbers_and_variables_are_not(answer, value, kinds):
    quantity = split_unit(answer)
    assert (quantity.value, quantity.kinds) == (value, kinds)


def test_units_words_and_bases_need_no_worker():
    for gold, answer, equal in [
        (r"5\text{ m}", "500 cm", True),
        (r"5\text{ cm}", "5 kg", False),
        (r"\text{east}", "seat", False),
        ("52_8", "52_9", False),
        (r"10\%", "0.1", True),
        (r"1\frac{4}{5}", "1.8", True),
        (r"1\frac{4}{5}", "2.8", False),  # 14/5
        (r"\{1,2\}", "(1,2)", False),
    ]:
        assert compare(gold, answer) is equal


def test_an_unmarked_short_answer_is_checked_like_a_boxed_one():
    assert not verify(r"5\text{ cm}", "5 m") and verify(r"5\text{ cm}", "5 cm.")
    assert not verify(r"\text{east}", "seat") and verify(r"\text{east}", "East")
    # A known limit: math-verify's reading of a sentence ignores units.
    assert verify(r"5\text{ cm}", "I measured it, and so the answer is $5$ m.")
