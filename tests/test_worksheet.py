import itertools

import numpy as np
import pytest

from scope_jax.records import InputError
from scope_jax.tasks import worksheet

SHEET = "c5*2,a3+9,f8-4?"


def slow_verify(sheet: str, completion: str) -> bool:
    """A solution is right if its lines, as a set, are the sheet's sums with their values."""
    want = []
    for item in sheet.rstrip("?").split(","):
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[item[2]]
        want.append(f"{item}={value(int(item[1]), int(item[3])) % 10}")
    return sorted(want) == sorted(line for line in completion.split("\n") if line.strip())


def test_every_order_of_right_lines_is_right():
    lines = ["c5*2=0\n", "a3+9=2\n", "f8-4=4\n"]
    for order in itertools.permutations(lines):
        assert worksheet.verify(SHEET, "".join(order))


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "\n",
        "c5*2=0\na3+9=2\n",  # a sum is missing
        "c5*2=0\na3+9=2\nf8-4=5\n",  # a wrong value
        "c5*2=0\na3+9=2\nf8-4=4\nf8-4=4\n",  # solved twice
        "c5*2=0\na3+9=2\nf8-4=4\ng8-4=4\n",  # a sum that is not there
        "c5*2=0a3+9=2\nf8-4=4\n",
        "c5*2=00\na3+9=2\nf8-4=4\n",
        "C5*2=0\na3+9=2\nf8-4=4\n",
    ],
)
def test_anything_else_is_wrong(completion):
    assert not worksheet.verify(SHEET, completion)


def test_verify_agrees_with_a_plain_twin_on_mutated_solutions():
    rng = np.random.default_rng(0)
    source, verdicts = worksheet.problems("train", n=4), []
    for i in range(400):
        record = source[i]
        text = list(record["solution"])
        for _ in range(int(rng.integers(0, 2))):
            text[rng.integers(len(text))] = str(rng.choice(list("0123456789abc+-*=\n")))
        completion = "".join(text)
        verdicts.append(worksheet.verify(record["gold"], completion))
        assert verdicts[-1] == slow_verify(record["gold"], completion)
    assert 0.3 < np.mean(verdicts) < 0.9  # both kinds were tried


def test_step_labels_mark_the_wrong_line_and_an_early_end():
    assert worksheet.check_steps(SHEET, ["c5*2=0\n", "a3+9=3\n", "f8-4=4\n"]) == [True, False, True]
    assert worksheet.check_steps(SHEET, ["c5*2=0\n", "a3+9=2\n"]) == [True, False]
    assert worksheet.check_steps(SHEET, ["c5*2=0\n", "a3+9=2\n"], finished=False) == [True, True]
    assert worksheet.check_steps(SHEET, ["c5*2=0\n", "c5*2=0\n"], finished=False) == [True, False]
    assert worksheet.check_steps(SHEET, []) == []


def test_a_wrong_finished_solution_always_has_a_wrong_step():
    source = worksheet.problems("train", n=3)
    for i in range(100):
        record = source[i]
        lines = record["solution"].splitlines(keepends=True)
        for kept in (lines[:-1], [*lines, lines[0]], [lines[0], *lines]):
            if kept:
                assert not worksheet.verify(record["gold"], "".join(kept))
                assert not all(worksheet.check_steps(record["gold"], kept))


def test_sheets_are_functions_of_seed_split_and_index():
    first, again = (
        worksheet.problems("train", n=5, seed=3),
        worksheet.problems("train", n=5, seed=3),
    )
    assert [first[i] for i in range(5)] == [again[i] for i in range(5)]
    others = [worksheet.problems("test", n=5, seed=3), worksheet.problems("train", n=5, seed=4)]
    assert all(first[0]["problem"] != other[0]["problem"] for other in others)
    assert worksheet.problems("ood", n=5, ood_n=7)[0]["problem"].count(",") == 6
    labels = [item[0] for item in first[0]["problem"].rstrip("?").split(",")]
    assert len(set(labels)) == 5


def test_half_of_the_facts_are_hard_and_their_usual_value_is_wrong():
    hard = worksheet.hard_facts(0)
    assert len(hard) == 96 == len(worksheet.FACTS) // 2
    assert all(worksheet.fact_value(fact) != wrong for fact, wrong in hard.items())
    assert worksheet.hard_facts(1) != hard


def test_impossible_sheets_are_refused():
    with pytest.raises(InputError, match="1 to 12 sums, got 13"):
        worksheet.problems("train", n=13)
    with pytest.raises(InputError, match="unknown split 'val'"):
        worksheet.problems("val")
