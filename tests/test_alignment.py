"""Tests of where an expert's written solution goes on: by its results, by similarity, or not."""

import gzip
import json
import random

import numpy as np
import pytest

from scope_jax import alignment
from scope_jax.alignment import align_trace, read_trace, similarity, split_text, stated_results

# --- By results -----------------------------------------------------------------------------------

CLIPS = "In May 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"
FIRST, SECOND, ANSWER = "In May 48/2 = 24 clips.\n", "In all 48+24 = 72 clips.\n", "#### 72"


@pytest.mark.parametrize(
    ("prefix", "steps"),
    [
        ("", [FIRST, SECOND, ANSWER]),
        ("  \n", [FIRST, SECOND, ANSWER]),
        ("Let us see.\n", [FIRST, SECOND, ANSWER]),  # no result of its own yet
        ("She sold 24 clips in May.\n", [SECOND, ANSWER]),
        ("In May: 24.", [SECOND, ANSWER]),  # the full stop is no decimal point
        ("In May: 24, I think", [SECOND, ANSWER]),
        ("May: $24\nAll: 48+24=72\n", [ANSWER]),
        ("May: 24. All: 72.\n", [ANSWER]),
        ("Half of 48 is 24. In all 24 + 48 = 72, so 72.\n", [ANSWER]),  # says 72 twice
        ("May: 24. All: 72. #### 72", []),  # nothing is left
        ("All: 72\n", [ANSWER]),  # a later result without the first: FIRST is not said again
        ("All: 72\nMay: 24\n", None),  # in another order
        ("In May 48/2 = 12 clips.\n", None),  # another way
    ],
)
def test_solution_goes_on_after_the_results_that_the_prefix_has(prefix, steps):
    problem = "She sold clips to 48 friends in April, and half as many in May."
    assert align_trace(CLIPS, prefix, problem=problem) == steps


@pytest.mark.parametrize(
    ("result", "prefix", "reached"),
    [
        ("24", "24", True),
        ("24", "240", False),
        ("24", "124", False),
        ("24", "24.5", False),
        ("24", "0.24", False),
        ("24", "x=24.", True),
        ("24", "24,000", False),
        ("500", "1,500", False),
        ("1,500", "1500 pens", True),
        ("1500", "1,500 pens", True),
        ("1,500", "1,500,000", False),
        ("1,500", "1", False),
        ("0.2", "0.2 per minute", True),
        ("0.2", "10.2", False),
        ("0.2", "0.25", False),
        ("0.5", "0.50", True),
        ("0.5", ".5", True),
        ("-5", "-5", True),
        ("5", "-5", False),
        ("5", "10-5=5", True),
    ],
)
def test_result_is_reached_only_as_a_whole_number(result, prefix, reached):
    solution = f"It is {result}\n#### 3"
    assert align_trace(solution, f"So: {prefix}\n") == (["#### 3"] if reached else None)


def test_an_operand_is_no_result():
    solution = "It is 5\n#### 5"
    for prefix in ("So: 10-5\n", "So: 10 - 5\n", "So: 10 / 5\n", "So: 2×5\n", "x=5+1\n"):
        assert align_trace(solution, prefix) == ["It is 5\n", "#### 5"]  # from its beginning


def test_numbers_of_the_problem_are_results_only_behind_an_equals_sign():
    solution = "She has 16-7 = <<16-7=9>>9 eggs.\n9*2 = <<9*2=18>>18\n#### 18"
    problem = "9 hens lay 16 eggs; she eats 7."
    assert len(align_trace(solution, "There are 9 hens.\n", problem=problem)) == 3
    assert len(align_trace(solution, "16 - 7 = 9 are left.\n", problem=problem)) == 2
    assert stated_results("x = 16/2 = 8, and 3 more", problem) == [8.0, 3.0]


def test_equal_results_must_stand_as_often_as_the_solution_has_them():
    solution = "a = 5\nb = 5\nc = 6\n#### 6"
    assert align_trace(solution, "a is 5.\n") == ["b = 5\n", "c = 6\n", "#### 6"]
    assert align_trace(solution, "a is 5, b is 5.\n") == ["c = 6\n", "#### 6"]


def test_lines_without_a_result_go_with_the_result_behind_them():
    solution = "Let us see.\na = 5\nNow b.\nb = 6\n#### 6"
    assert align_trace(solution, "a is 5.\n") == ["Now b.\n", "b = 6\n", "#### 6"]
    assert align_trace(solution, "a is 5, b 6.\n") == ["#### 6"]


def test_a_note_says_a_line_s_result_else_its_last_number_does():
    solution = "12/2 = <<12/2=6>>6 of the 8 bags\n#### 6"
    assert align_trace(solution, "12/2 = 6 bags\n") == ["#### 6"]
    assert align_trace(solution, "There are 8 bags\n") is None
    solution = "3 bags of 4 make 12 pens\nhalf of 12 is 6\n#### 6"
    assert align_trace(solution, "12 pens\n") == ["half of 12 is 6\n", "#### 6"]


def counted(rng, steps):
    """A problem, its trace with notes, and a line of the policy's own words for each step."""
    values = rng.permutation(np.arange(100, 900))[: steps + 1]  # distinct, none is in the words
    trace, own = [], []
    for old, new in zip(values[:-1], values[1:], strict=True):
        move = f"{old}{new - old:+d}"
        trace.append(f"Then it is {move} = <<{move}={new}>>{new} pens.\n")
        own.append(rng.choice([f"So {old} {new - old:+d} = {new}.\n", f"We get {new} of them.\n"]))
    return f"Start with {values[0]} pens.", "".join(trace) + f"#### {values[-1]}", own


def test_what_follows_is_an_end_of_the_trace_from_a_step_on_and_repeats_nothing():
    rng = np.random.default_rng(0)
    for _ in range(100):
        problem, trace, own = counted(rng, int(rng.integers(1, 7)))
        plain = align_trace(trace, "")
        starts = []
        for kept in range(len(own) + 1):
            rest = align_trace(trace, "".join(own[:kept]), problem=problem)
            assert rest == plain[kept:]
            starts.append(len(plain) - len(rest))
            said = set(stated_results("".join(own[:kept]), problem))
            assert not said & set(stated_results("".join(rest[:-1]), problem))
        assert starts == sorted(starts)


def test_another_problem_s_trace_and_a_shuffled_one_are_not_continued():
    rng = np.random.default_rng(1)
    for _ in range(100):
        problem, trace, own = counted(rng, 5)
        kept = int(rng.integers(1, 6))
        other = "".join(f"Then it is 1{n} = <<1{n}=10{n}>>10{n} pens.\n" for n in range(5))
        assert align_trace(other + "#### 104", "".join(own[:kept]), problem=problem) is None
        *lines, answer = split_text(trace, "\n")
        order = rng.permutation(5)
        shuffled = "".join([*(lines[i] for i in order), answer])
        places = [int(np.flatnonzero(order == i)[0]) for i in range(kept)]
        rest = align_trace(shuffled, "".join(own[:kept]), problem=problem)
        if places != sorted(places) or places[-1] + 1 > 2 * kept:  # or it would be a leap
            assert rest is None
        else:  # as far as the prefix goes this is the trace's order
            assert len(rest) == 6 - (places[-1] + 1)


def test_a_heading_is_no_answer_line():
    trace = "#### Part 1\nx = 12\n\n#### Part 2\ny = 34\n\nz = 56"
    assert align_trace(trace, "#### Part 1\nx = 12\n\n") == ["#### Part 2\ny = 34\n\n", "z = 56"]


# --- By similarity --------------------------------------------------------------------------------

WORDS = "take the sum of both sides then square it and see which root is real here now".split()


def derived(rng, steps):
    """A trace of paragraphs with formulas; no two of them are alike."""
    letters = rng.permutation(list("bcdefgh"))[:steps]
    formulas = [
        f"{x} = {rng.integers(10, 99)}{n}^2 + {n}\\sqrt{{{n}}}" for n, x in enumerate(letters)
    ]
    return [f"{' '.join(rng.choice(WORDS, 3))}: {formula}\n\n" for formula in formulas]


def reworded(rng, step):
    """The same formula in other words."""
    formula = step[step.index(":") :]
    return " ".join(rng.choice(WORDS, 2)) + formula


def test_similarity_is_weighted_overlap():
    # shared: 4 at weight 5; all: (1 + 5) + (1 + 1 + 5)
    assert similarity("is 4", "so it 4") == pytest.approx(2 * 5 / (6 + 7))
    assert similarity("a b b", "b b c") == pytest.approx(2 * 10 / (11 + 15))  # "a" is a word
    assert similarity("2 + 3", "2 - 3") == pytest.approx(2 * 10 / (11 + 11))
    assert similarity("1,500 = x", "x = 1500") == 1.0
    assert similarity("", "x") == similarity("", "") == similarity("x", "y") == 0.0
    assert similarity(r"\frac{1}{2}", r"\FRAC{1}{2}") == 1.0
    rng = np.random.default_rng(2)
    for _ in range(50):
        one, other = ("".join(rng.choice(list("ab12+ \\x"), 12)) for _ in "12")
        assert similarity(one, other) == similarity(other, one) and 0 <= similarity(one, other) <= 1
        assert similarity(one, one) in (0.0, 1.0)


def test_a_reworded_prefix_is_continued_behind_its_last_step():
    rng = np.random.default_rng(3)
    for _ in range(50):
        steps = derived(rng, int(rng.integers(2, 7)))
        trace = "".join(steps)
        whole = [*steps[:-1], steps[-1].strip()]
        for kept in range(len(steps) + 1):
            prefix = "".join(reworded(rng, step) for step in steps[:kept])
            assert align_trace(trace, prefix) == whole[kept:]  # [] when nothing is left
            if 0 < kept:
                assert align_trace(trace, prefix + "I wonder what comes next.\n\n") is None
        two = "".join(reworded(rng, steps[i]) for i in (1, 0))
        assert align_trace(trace, two) is None
        assert align_trace("".join(derived(rng, 6)), "Draw a circle.\n\n") is None


def test_min_similarity_is_the_threshold():
    trace = "so it 4\n\nthen 5 = y\n\n"  # "is 4" is 10 / 13 the same as its first step
    assert align_trace(trace, "is 4\n\n", min_similarity=10 / 13) == ["then 5 = y"]
    assert align_trace(trace, "is 4\n\n", min_similarity=10 / 13 + 1e-9) is None


def test_steps_are_cut_as_the_policy_cuts_them_or_by_line():
    steps = ["Step 1: x = 5\n", "Step 2: y = 7\nand more\n", "Step 3: z = 9"]
    assert align_trace("".join(steps), "Step 1: x = 5\n", splitter="Step k") == steps[1:]
    # A trace without the policy's separator has lines for steps.
    lines = ["x = 5\n", "y = 7\n", "z = 9"]
    assert align_trace("".join(lines), "x = 5\n\n", splitter="\n\n") == lines[1:]
    assert align_trace("x = 5", "x = 5\n\n") == []
    assert align_trace("", "x = 5\n\n") is None and align_trace("", "") == []


def test_hostile_traces_are_cut_and_not_continued():
    for text in (
        "\0",
        "\ud800",
        "é" * 1000,
        "<<" * 1000,
        "=" * 5000,
        "1" * 400,
        "\n" * 1000,
        "<<>>",
    ):
        for prefix in ("x = 5\n\n", text, ""):
            rest = align_trace(text, prefix)
            assert rest is None or text.strip().endswith("".join(rest)) or "<<>>" in text
    assert align_trace("a = 1\n#### " + "9" * 400, "9" * 400) in (None, [])


def test_formulas_weigh_more_because_that_places_more_of_gsm8k_rightly(shared):
    """Steps of models' right solutions in the data set's: results say where they are."""
    path = shared / "data" / "gsm8k_example_model_solutions.jsonl.gz"
    rows = [json.loads(line) for line in gzip.open(path)]
    random.Random(0).shuffle(rows)
    placed, right, others = 0, 0, 0
    for row in rows[:100]:
        plain = alignment._NOTE.sub("", row["ground_truth"])
        for model in ("6b_verification", "175b_verification"):
            steps = split_text(row[model]["solution"], "\n") if row[model]["is_correct"] else []
            for kept in range(1, len(steps)):
                prefix, problem = "".join(steps[:kept]), row["question"]
                known = align_trace(row["ground_truth"], prefix, problem=problem)
                found = align_trace(plain, prefix, splitter="\n")
                others += known is not None and found is None
                placed += known is not None and found is not None
                right += known is not None and found is not None and len(known) == len(found)
    assert placed > 1.5 * others and right / placed > 0.96


# --- R1's form ------------------------------------------------------------------------------------


def test_a_thought_is_read_by_a_policy_that_thinks():
    solution = "<think>\nTry 3.\n\nNo, 4.\n</think>\n\nIt is 4."
    assert read_trace(solution, thinking=True) == "Try 3.\n\nNo, 4.\n</think>\n\nIt is 4."
    assert read_trace(solution, thinking=False) == "It is 4."
    assert (
        read_trace("It is 4.", thinking=True)
        == read_trace("It is 4.", thinking=False)
        == "It is 4."
    )
    for cut in ("<think>\nTry 3.", "<think>"):
        assert read_trace(cut, thinking=True) == read_trace(cut, thinking=False) == ""
    assert read_trace("Try 3.\n</think>\n4", thinking=True) == "Try 3.\n</think>\n4"
