"""The texts that pretrain.py trains on: each task's vocabulary, and its solved problems drawn
straight as token ids.

Shapes: `rows` problems, n items (sums, payments) in each.
"""

import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scope_jax.tasks import ledger, worksheet

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
RIGHT_SHARE = 0.25  # how often a hard fact has its right value in the base policy's training text


class TaskText(NamedTuple):
    """What pretraining takes from a task.

    `solved` is (rows, n, rng, wrong values {fact: value}, *, right_share, verbose) -> (ids [rows,
    prompt_length(n) + n * line + 1] int32 of problems with their solutions, prompt_length(n)).
    """

    task: types.ModuleType
    vocab: dict[str, int]
    pattern: str  # regex of the tokens that are longer than a character; all else is one each
    prompt_length: Callable[[int], int]  # n -> tokens of a problem
    line: int  # tokens of a line of a solution
    verbose_line: int
    solved: Callable[..., tuple[np.ndarray, int]]
    steps: int  # updates that the policy takes to learn the form
    teacher_share: float  # of as many updates, for the teacher
    prm_share: float


def _values(facts, fact_value, wrong: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (right values, wrong values where there are any) of all facts, [facts] each."""
    right = np.array([fact_value(fact) for fact in facts])
    return right, np.array([wrong.get(fact, fact_value(fact)) for fact in facts])


def _join(problem, lines, eos: int) -> np.ndarray:
    rows = len(problem)
    parts = [problem.reshape(rows, -1), lines.reshape(rows, -1), np.full((rows, 1), eos)]
    return np.concatenate(parts, axis=1).astype(np.int32)


# --- worksheet ------------------------------------------------------------------------------------

_CHARACTERS = worksheet.LABELS + "0123456789+-*=,?\n"
VOCAB = {token: i for i, token in enumerate([PAD_TOKEN, EOS_TOKEN, *_CHARACTERS, *worksheet.FACTS])}


def solved_sheets(
    rows: int,
    n: int,
    rng: np.random.Generator,
    hard: dict[str, int],
    *,
    right_share: float = RIGHT_SHARE,
    verbose: bool = False,
) -> tuple[np.ndarray, int]:
    """Returns (ids [rows, 8 n + 1] int32 of sheets and their solutions, prompt length 3 n).

    A sum is one token, so a line is five, and copying a sum from the sheet takes one look-up
    instead of three; a verbose line is eight. A fact in `hard` gets its right value with
    probability `right_share`, else the wrong one it maps to.
    """
    right, wrong = _values(worksheet.FACTS, worksheet.fact_value, hard)
    column = lambda char: np.full((rows, n), VOCAB[char])  # noqa: E731

    labels = np.argsort(rng.random((rows, worksheet.MAX_ITEMS)), axis=1)[:, :n] + VOCAB["a"]
    sums = rng.integers(0, len(worksheet.FACTS), (rows, n))
    sheet = np.stack([labels, sums + VOCAB[worksheet.FACTS[0]], column(",")], axis=-1)
    sheet[:, -1, -1] = VOCAB["?"]
    order = np.argsort(rng.random((rows, n)), axis=1)
    labels, sums = np.take_along_axis(labels, order, 1), np.take_along_axis(sums, order, 1)
    values = np.where(rng.random((rows, n)) < right_share, right[sums], wrong[sums]) + VOCAB["0"]
    item = [labels, sums + VOCAB[worksheet.FACTS[0]]]
    asked = [*item, column("?")] if verbose else []
    lines = np.stack([*asked, *item, column("="), values, column("\n")], axis=-1)
    return _join(sheet, lines, VOCAB[EOS_TOKEN]), 3 * n


WORKSHEET = TaskText(
    worksheet, VOCAB, r"[2-9][-+*][2-9]", lambda n: 3 * n, 5, 8, solved_sheets, steps=2400,
    teacher_share=0.25, prm_share=0.25,
)  # fmt: skip

# --- ledger ---------------------------------------------------------------------------------------

_WORDS = ("Start:", "has ", ".", " Book: ", ", ", " to ", "\n")
_NAMES = tuple(f" {name} " for name in ledger.NAMES)
LEDGER_VOCAB = {
    token: i
    for i, token in enumerate(
        [PAD_TOKEN, EOS_TOKEN, *"0123456789", *_WORDS, *_NAMES, *ledger.PAYMENTS]
    )
}


def solved_ledgers(
    rows: int,
    n: int,
    rng: np.random.Generator,
    hard: dict[str, int],
    *,
    right_share: float = RIGHT_SHARE,
    verbose: bool = False,
) -> tuple[np.ndarray, int]:
    """Returns (ids [rows, 8 n + 11] int32 of ledgers and their solutions, prompt length 2 n + 10).

    A payment is one token, so a line is six; a verbose line is ten. Wrong values as in
    `solved_sheets`; the lines that follow go on from them.
    """
    v, amounts = LEDGER_VOCAB, len(ledger.AMOUNTS)
    column = lambda token, count=n: np.full((rows, count), v[token])  # noqa: E731
    right, wrong = _values(ledger.FACTS, ledger.fact_value, hard)

    balances = rng.integers(0, 10, (rows, 2))
    names = np.broadcast_to([v[name] for name in _NAMES], (rows, 2))
    accounts = np.stack([names, column("has ", 2), balances + v["0"], column(".", 2)], axis=-1)
    payments = np.argsort(rng.random((rows, len(ledger.PAYMENTS))), axis=1)[:, :n]
    booked = np.stack([payments + v[ledger.PAYMENTS[0]], column(", ")], axis=-1)
    booked[:, -1, -1] = v["\n"]
    problem = [column("Start:", 1), accounts.reshape(rows, -1), column(" Book: ", 1)]
    problem = np.concatenate([*problem, booked.reshape(rows, -1)], axis=1)

    payments = np.take_along_axis(payments, np.argsort(rng.random((rows, n)), axis=1), 1)
    owners, row = payments // amounts, np.arange(rows)
    is_right = rng.random((rows, n)) < right_share
    old, new = np.zeros((rows, n), int), np.zeros((rows, n), int)
    for k in range(n):
        old[:, k] = balances[row, owners[:, k]]
        fact = old[:, k] * amounts + payments[:, k] % amounts
        new[:, k] = np.where(is_right[:, k], right[fact], wrong[fact])
        balances[row, owners[:, k]] = new[:, k]
    name, old, new = owners + v[_NAMES[0]], old + v["0"], new + v["0"]
    said = [name, column("has "), old, column(".")] if verbose else []
    line = [payments + v[ledger.PAYMENTS[0]], *said, name, old, column(" to "), new, column("\n")]
    return _join(problem, np.stack(line, axis=-1), v[EOS_TOKEN]), 2 * n + 10


LEDGER = TaskText(
    ledger, LEDGER_VOCAB, r"\((?:Ann|Bob)[-+][1-6]\)| (?:Ann|Bob) |Start:|has | Book: |, | to ",
    lambda n: 2 * n + 10, 6, 10, solved_ledgers, steps=1500,
    teacher_share=0.5, prm_share=0.75,
)  # fmt: skip

TEXTS = {"worksheet": WORKSHEET, "ledger": LEDGER}


def make_tokenizer(text: TaskText = WORKSHEET):
    """Returns a task's tokenizer: its longer tokens, every other character is one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(text.vocab, unk_token=PAD_TOKEN))
    pieces = Regex(text.pattern + r"|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
