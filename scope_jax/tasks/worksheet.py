"""The worksheet: n small sums on a sheet, one line of the solution for each, in any order.

    prompt       c5*2,a3+9,f8-4?
    completion   a3+9=2
                 c5*2=0
                 f8-4=4

A sum is two digits from 2..9 and an operator; its value counts modulo 10, so there are 8 * 8 * 3 =
192 facts to know. The reward is 1 only if every line is right, so there are no lucky answers; every
line can be checked alone; and n lines can come in n! orders, so there is diversity to measure. `n`
is the difficulty; the out-of-distribution split is the same task with more sums.

A line may repeat its sum as a question first, "a3+9?a3+9=2": the verbose style. It is one line, so
one step, all the same.

The base policy has to have something to learn: a seeded half of the facts is HARD, and the text it
was trained on has a fixed wrong value there three times out of four (`pretrain.py`).
"""

import re

import numpy as np

from scope_jax.records import InputError

LABELS = "abcdefghijkl"
DIGITS = "23456789"
OPERATORS = "+-*"
FACTS = tuple(f"{x}{op}{y}" for x in DIGITS for op in OPERATORS for y in DIGITS)  # all 192
MAX_ITEMS = len(LABELS)
_LINE = re.compile(r"(?:([a-l][2-9][-+*][2-9])\?)?([a-l][2-9][-+*][2-9])=([0-9])")
_SPLITS = {"train": 0, "test": 1, "ood": 2, "pretrain": 3, "prm": 4, "valid": 5}


def value(x: int, operator: str, y: int) -> int:
    """Returns the last digit of a sum.

    >>> value(3, "+", 9), value(5, "*", 2), value(4, "-", 8)
    (2, 0, 6)
    """
    return {"+": x + y, "-": x - y, "*": x * y}[operator] % 10


def hard_facts(seed: int) -> dict[str, int]:
    """Returns {"3*7": a fixed WRONG value} for the seeded half of the facts that the base policy
    mostly gets wrong.
    """
    rng = np.random.default_rng((seed, 192))
    hard = rng.choice(len(FACTS), len(FACTS) // 2, replace=False)
    shifts = rng.integers(1, 10, len(hard))
    return {
        FACTS[i]: (fact_value(FACTS[i]) + int(shift)) % 10
        for i, shift in zip(hard, shifts, strict=True)
    }


def fact_value(fact: str) -> int:
    return value(int(fact[0]), fact[1], int(fact[2]))


def make_sheet(n: int, rng: np.random.Generator) -> str:
    """Returns a prompt of `n` sums under distinct labels, such as "c5*2,a3+9?"."""
    labels = rng.choice(list(LABELS), n, replace=False)
    return (
        ",".join(
            label + FACTS[i]
            for label, i in zip(labels, rng.integers(0, len(FACTS), n), strict=True)
        )
        + "?"
    )


def solution(sheet: str, rng: np.random.Generator) -> str:
    """Returns a right solution in a random order of lines."""
    items = sheet.rstrip("?").split(",")
    return "".join(f"{items[i]}={fact_value(items[i][1:])}\n" for i in rng.permutation(len(items)))


class problems:  # lower case: the loop calls problems(split, ...), a function in other tasks
    """A random-access source of sheets; item i of a split is a function of (seed, split, i) alone.

    Args:
      split: "train", "test" (held-out draws), "ood" (more sums), "valid" (held-out draws to choose
        learning rates on) or one of pretrain.py's.
      n: sums on a sheet.
      ood_n: sums on a sheet of the "ood" split.
      size: number of sheets in the split.
      seed: of the draws.
    """

    def __init__(
        self, split: str, *, n: int = 5, ood_n: int = 7, size: int = 1 << 20, seed: int = 0
    ):
        if split not in _SPLITS:
            raise InputError(f"unknown split {split!r}: one of {', '.join(_SPLITS)}")
        self.n = ood_n if split == "ood" else n
        if not 1 <= self.n <= MAX_ITEMS:
            raise InputError(f"a worksheet has 1 to {MAX_ITEMS} sums, got {self.n}")
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index) -> dict:
        rng = np.random.default_rng((self.seed, _SPLITS[self.split], int(index)))
        sheet = make_sheet(self.n, rng)
        return {
            "id": f"{self.split}-{index}",
            "problem": sheet,
            "gold": sheet,
            "solution": solution(sheet, rng),
        }


def check_steps(gold: str, steps: list[str], finished: bool = True) -> list[bool]:
    """Returns for each step whether it is right: sums that are on the sheet, not solved before,
    with the right value.

    A last step that ends the solution (`finished`) while sums are still open is wrong too: so a
    wrong finished solution always has a first wrong step.

    >>> check_steps("c5*2,a3+9?", ["a3+9=2\\n", "c5*2=1\\n"])
    [True, False]
    """
    open_items = set(gold.rstrip("?").split(","))
    verdicts = []
    for step in steps:
        right = True
        for line in step.split("\n"):
            match = _LINE.fullmatch(line)
            right &= not line.strip() or (match is not None and _solves(match, open_items))
        verdicts.append(bool(right))
    if finished and verdicts and open_items:
        verdicts[-1] = False
    return verdicts


def _solves(line: re.Match, open_items: set[str]) -> bool:
    asked, item, written = line.groups()
    if item not in open_items:
        return False
    open_items.discard(
        item
    )  # a wrong value still uses the sum up: the next step is judged on its own
    return asked in (None, item) and int(written) == fact_value(item[1:])


def verify(gold: str, completion: str) -> bool:
    """Returns whether every sum of the sheet is solved by exactly one right line, and nothing else
    is there.
    """
    lines = [line for line in completion.split("\n") if line.strip()]
    return bool(lines) and all(check_steps(gold, lines))


def continue_solution(record: dict, prefix: str) -> str | None:
    """Returns the lines that a sheet's solution lacks, in the order of record["solution"]; None
    behind a wrong or unfinished line, where nothing makes the solution right.

    >>> continue_solution({"problem": "c5*2,a3+9?", "solution": "c5*2=0\\na3+9=2\\n"}, "c5*2=0\\n")
    'a3+9=2\\n'
    """
    open_items = set(record["problem"].rstrip("?").split(","))
    *lines, last = prefix.split("\n")
    right = [(match := _LINE.fullmatch(line)) and _solves(match, open_items) for line in lines]
    if last or not all(right):
        return None
    order = record["solution"].split("\n")[:-1]
    return "".join(f"{line}\n" for line in order if line.partition("=")[0] in open_items)


def valid_order(gold: str, completion: str) -> str:
    """Returns the labels of a right solution in its order of lines, "acf"; "" for a wrong one.

    Two right solutions of a sheet are the same, up to their style, if their orders are.

    >>> valid_order("c5*2,a3+9?", "a3+9=2\\nc5*2=0\\n")
    'ac'
    """
    if not verify(gold, completion):
        return ""
    return "".join(line[0] for line in completion.split("\n") if line.strip())
