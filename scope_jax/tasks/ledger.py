"""The ledger: payments booked on two accounts, each from the balance that the one before left.

    prompt       Start: Ann has 4. Bob has 7. Book: (Ann-2), (Bob+5), (Ann+6)
    completion   (Ann+6) Ann 4 to 0
                 (Bob+5) Bob 7 to 2
                 (Ann-2) Ann 0 to 8

A line books one payment: it goes on from the balance that the SOLUTION has for the account, and
writes the new one, of which only the last digit counts. So a step depends on earlier ones, and an
error is carried on. There are 10 * 2 * 6 = 120 facts to know. Payments can be booked in any of n!
orders, and the order decides which facts are needed. The reward is 1 only if every payment is
booked once and every line is right. `n` is the number of payments; the out-of-distribution split
has more of them.

A line may restate the balance first, "(Ann+6) Ann has 4. Ann 4 to 0": the verbose style. It is one
line, so one step, all the same; what it restates must be true.

As on the worksheet a seeded half of the facts is HARD for the base policy (`pretrain.py`).
"""

import re
from typing import NamedTuple

import numpy as np

from scope_jax.records import InputError

NAMES = ("Ann", "Bob")
AMOUNTS = tuple(f"{op}{y}" for op in "+-" for y in range(1, 7))
PAYMENTS = tuple(f"({name}{amount})" for name in NAMES for amount in AMOUNTS)  # all 24
FACTS = tuple(f"{x}{amount}" for x in range(10) for amount in AMOUNTS)  # all 120
_ACCOUNT = re.compile(r" (Ann|Bob) has ([0-9])\.")
_PAYMENT = re.compile(r"\((?:Ann|Bob)[-+][1-6]\)")
_LINE = re.compile(
    r"(\((Ann|Bob)([-+][1-6])\)) (?:(Ann|Bob) has ([0-9])\. )?(Ann|Bob) ([0-9]) to ([0-9])"
)
_SPLITS = {"train": 0, "test": 1, "ood": 2, "pretrain": 3, "prm": 4, "valid": 5}


class Ledger(NamedTuple):
    balances: dict[str, str]  # of each account, at first
    payments: list[str]  # such as "(Ann-2)", no two of them equal


def fact_value(fact: str) -> int:
    """Returns the new balance.

    >>> fact_value("4+6"), fact_value("3-5")
    (0, 8)
    """
    return (int(fact[0]) + int(fact[1:])) % 10


def hard_facts(seed: int) -> dict[str, int]:
    """Returns {"4+6": a fixed WRONG value} for the seeded half of the facts that the base policy
    mostly gets wrong, in random order.
    """
    rng = np.random.default_rng((seed, len(FACTS)))
    hard = rng.choice(len(FACTS), len(FACTS) // 2, replace=False)
    shifts = rng.integers(1, 10, len(hard))
    return {
        FACTS[i]: (fact_value(FACTS[i]) + int(shift)) % 10
        for i, shift in zip(hard, shifts, strict=True)
    }


def make_ledger(n: int, rng: np.random.Generator) -> str:
    """Returns a prompt of `n` distinct payments."""
    accounts = "".join(f" {name} has {rng.integers(10)}." for name in NAMES)
    payments = ", ".join(PAYMENTS[i] for i in rng.choice(len(PAYMENTS), n, replace=False))
    return f"Start:{accounts} Book: {payments}\n"


def read_ledger(text: str) -> Ledger:
    """Returns what a prompt says; of any other text the parts that read like one."""
    return Ledger(dict(_ACCOUNT.findall(text)), _PAYMENT.findall(text))


def solution(prompt: str, rng: np.random.Generator) -> str:
    """Returns a right solution in a random order of lines."""
    (balances, payments), lines = read_ledger(prompt), []
    for i in rng.permutation(len(payments)):
        name, amount = payments[i][1:4], payments[i][4:6]
        old, balances[name] = balances[name], str(fact_value(balances[name] + amount))
        lines.append(f"{payments[i]} {name} {old} to {balances[name]}\n")
    return "".join(lines)


class problems:  # lower case: the loop calls problems(split, ...), a function in other tasks
    """A random-access source of ledgers; item i of a split is a function of (seed, split, i) alone.

    Args:
      split: "train", "test" (held-out draws), "ood" (more payments), "valid" (held-out draws to
        choose learning rates on) or one of pretrain.py's.
      n: payments on a ledger.
      ood_n: payments on a ledger of the "ood" split.
      size: number of ledgers in the split.
      seed: of the draws.
    """

    def __init__(
        self, split: str, *, n: int = 5, ood_n: int = 7, size: int = 1 << 20, seed: int = 0
    ):
        if split not in _SPLITS:
            raise InputError(f"unknown split {split!r}: one of {', '.join(_SPLITS)}")
        self.n = ood_n if split == "ood" else n
        if not 1 <= self.n <= len(PAYMENTS):
            raise InputError(f"a ledger has 1 to {len(PAYMENTS)} payments, got {self.n}")
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index) -> dict:
        rng = np.random.default_rng((self.seed, _SPLITS[self.split], int(index)))
        ledger = make_ledger(self.n, rng)
        return {
            "id": f"{self.split}-{index}",
            "problem": ledger,
            "gold": ledger,
            "solution": solution(ledger, rng),
        }


def check_steps(gold: str, steps: list[str], finished: bool = True) -> list[bool]:
    """Returns for each step whether it is right: payments of the ledger, not booked before, from
    the account's balance BY THE STEPS BEFORE, with the right new balance.

    So a step after a wrong one is judged on its own. A last step that ends the solution
    (`finished`) while payments are still open is wrong too: so a wrong finished solution always has
    a first wrong step.

    >>> check_steps("Start: Ann has 4. Bob has 7. Book: (Ann-2), (Ann+6)\\n",
    ...             ["(Ann+6) Ann 4 to 1\\n", "(Ann-2) Ann 1 to 9\\n"])
    [False, True]
    """
    ledger, verdicts = read_ledger(gold), []
    balances, payments = ledger.balances, set(ledger.payments)
    for step in steps:
        right = True
        for line in step.split("\n"):
            match = _LINE.fullmatch(line)
            right &= not line.strip() or (match is not None and _books(match, balances, payments))
        verdicts.append(bool(right))
    if finished and verdicts and payments:
        verdicts[-1] = False
    return verdicts


def _books(line: re.Match, balances: dict[str, str], payments: set[str]) -> bool:
    """Returns whether a line is right, and books it: right or wrong, the next goes on from it."""
    payment, owner, amount, said_name, said_balance, name, old, new = line.groups()
    if payment not in payments or name != owner:
        return False
    payments.discard(payment)
    start, balances[name] = balances.get(name), new
    restated = said_name is None or (said_name, said_balance) == (name, old)
    return restated and old == start and int(new) == fact_value(old + amount)


def verify(gold: str, completion: str) -> bool:
    """Returns whether every payment is booked by exactly one right line, and nothing else is there.

    >>> verify("Start: Ann has 4. Bob has 7. Book: (Ann-2)\\n", "(Ann-2) Ann 4 to 2\\n")
    True
    """
    lines = [line for line in completion.split("\n") if line.strip()]
    return bool(lines) and all(check_steps(gold, lines))


def continue_solution(record: dict, prefix: str) -> str | None:
    """Returns the lines that a ledger's solution lacks, from the balances that the prefix left, in
    the order of record["solution"]; None behind a wrong or unfinished line.

    >>> record = {"problem": "Start: Ann has 4. Bob has 7. Book: (Ann-2), (Ann+6)\\n",
    ...           "solution": "(Ann-2) Ann 4 to 2\\n(Ann+6) Ann 2 to 8\\n"}
    >>> continue_solution(record, "(Ann+6) Ann 4 to 0\\n")
    '(Ann-2) Ann 0 to 8\\n'
    """
    ledger = read_ledger(record["problem"])
    balances, payments = ledger.balances, set(ledger.payments)
    *lines, last = prefix.split("\n")
    right = [
        (match := _LINE.fullmatch(line)) and _books(match, balances, payments) for line in lines
    ]
    if last or not all(right):
        return None
    written = []
    for payment in _PAYMENT.findall(record["solution"]):
        if payment in payments:
            name, amount = payment[1:4], payment[4:6]
            old, balances[name] = balances[name], str(fact_value(balances[name] + amount))
            written.append(f"{payment} {name} {old} to {balances[name]}\n")
    return "".join(written)


def valid_order(gold: str, completion: str) -> str:
    """Returns the order in which a right solution books the payments, "(Ann+6) (Ann-2)"; "" for a
    wrong one.

    Two right solutions of a ledger are the same, up to their style, if their orders are.
    """
    if not verify(gold, completion):
        return ""
    return " ".join(line.split(" ")[0] for line in completion.split("\n") if line.strip())
