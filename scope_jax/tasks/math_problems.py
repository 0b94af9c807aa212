"""Word problems with a worked solution, from JSONL files in GSM8K's layout.

    {"question": "...", "answer": "48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}

or {"problem", "answer", "solution" (optional)} with the bare answer. The reward is
`scope_jax.rewards.verify`.
"""

import functools
import math
from typing import Any

from scope_jax.data import describe_bad_lines, read_jsonl
from scope_jax.records import InputError
from scope_jax.rewards import read_gold


class Problems(list):
    """Problems of a file, and the lines of it that were left out: {"file", "line", "reason"}."""

    skipped: list[dict[str, Any]]


def problems(
    split: str,
    *,
    train_file: str = "",
    test_file: str = "",
    ood_file: str = "",
    bad_lines: str = "strict",
) -> Problems:
    """Returns the problems of a split ("train", "test" or "ood") as {"id", "problem", "gold",
    "solution"}.

    Args:
      bad_lines: "strict": a bad line is an error; "skip": it is left out, and stands in `skipped`
        of what is returned.
    Raises:
      InputError: the split has no file, none of its lines is good, or, if strict, one is bad (file
      and line are named): it is no JSON object, has no problem or no answer, repeats an id.
    """
    files = {"train": train_file, "test": test_file, "ood": ood_file}
    if not files.get(split):
        raise InputError(
            f"no data file for the {split} split: set --config.task.{split}_file=FILE.jsonl[.gz]"
        )
    return read_problems(files[split], bad_lines)


def read_problems(path, bad_lines: str = "strict") -> Problems:
    """Returns the problems of one file, as `problems` does."""
    if bad_lines not in ("strict", "skip"):
        raise InputError(f'task.bad_lines must be "strict" or "skip", got {bad_lines!r}')
    skipped: list[dict[str, Any]] = []
    found = Problems(read_jsonl(path, functools.partial(_problem, lines={}), skipped=skipped))
    found.skipped = skipped
    if skipped and bad_lines == "strict":
        raise InputError(
            f"{describe_bad_lines(skipped)}; correct or delete them, or leave bad lines out with "
            "--config.task.bad_lines=skip"
        )
    return found


def _problem(row: dict, lines: dict[str | int, str]) -> dict:
    """Returns the problem of a row; `lines` holds where each explicit id was seen."""
    text = _text(row.get("problem", row.get("question")), 'no "problem" (or "question") text')
    answer = row.get("answer")
    if type(answer) is int or (isinstance(answer, float) and math.isfinite(answer)):
        answer = str(answer)
    answer = _text(answer, 'no "answer"')
    solution = row.get("solution")
    if solution is not None and not isinstance(solution, str):
        raise InputError('"solution" is not text')
    solution = _text(solution, "") if solution and solution.strip() else ""
    if "####" in answer:
        solution, answer = answer, answer.rsplit("####", 1)[1].strip()
        if not answer:
            raise InputError('no answer after "####"')
    elif "question" in row:
        raise InputError('GSM8K\'s answer ends in "#### gold", this one does not')
    if not read_gold(answer):
        raise InputError(f'"answer" holds nothing to compare with: {answer!r:.60}')
    identity = row.get("id")
    if identity is not None:
        if type(identity) not in (str, int):
            raise InputError(f'"id" must be a text or a number, got {type(identity).__name__}')
        if identity in lines:
            raise InputError(f'"id" {identity!r:.60} is that of {lines[identity]}, too')
        lines[identity] = row["_source"]
    return {"id": row["_source"], "problem": text, "gold": answer, "solution": solution}


def _text(value: Any, missing: str) -> str:
    """Returns `value` if it is a text that a tokenizer can take."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(missing)
    if "\x00" in value:
        raise InputError(f"a NUL character in {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold "\ud800", on which tokenizers crash
        raise InputError(f"half a surrogate pair, which is not Unicode, in {value!r:.60}") from None
    return value
