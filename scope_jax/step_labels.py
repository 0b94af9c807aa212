"""Step labels to train a PRM on, read from the three layouts in which they are published.

Every reader returns records of one form:

    {"problem": str, "steps": [str], "labels": [1 | 0 | None], "source": "file:line"}

1 = correct, 0 = wrong, None = this step has no label: it is context and in no loss.
"""

import hashlib
import re
from typing import Any

from scope_jax.data import read_jsonl
from scope_jax.records import InputError

KINDS = ("trl", "prm800k", "math_shepherd")

_MARK = "ки"  # Math-Shepherd's step tag; its label text has + or - in its place
_FIRST_STEP = re.compile(r"[Ss]tep 1:")


def read_step_labels(path, kind: str) -> list[dict[str, Any]]:
    """Returns the labelled solutions of a .jsonl or .jsonl.gz file.

    Args:
      path: the file.
      kind: its layout.
        "trl": {"prompt", "completions": [step], "labels": [true = correct]}, as TRL's PRMTrainer
          reads it.
        "prm800k": {"question": {"problem"}, "label": {"steps": [{"completions": [{"text",
          "rating"}], "chosen_completion", "human_completion"}]}}, https://arxiv.org/abs/2305.20050.
          Rating -1 is wrong; 1 and 0 are correct: a neutral step makes no progress, but it is no
          error. A null rating is no label. A row gives one record for the chain of chosen
          completions (the human's, correct, where none was chosen), and one for each alternative at
          a step: the chain so far without labels, then the alternative.
        "math_shepherd": {"input": "... Step 1: ... ки\\nStep 2: ... ки", "label": the same text
          with + or - for each ки}, https://arxiv.org/abs/2312.08935. The problem is the text before
          "Step 1:".
    Raises:
      InputError: a row in another layout, an empty text, labels that do not match the steps (file
      and line are named), or a file without any label.
    """
    if kind not in KINDS:
        raise InputError(f"kind of step labels must be one of {', '.join(KINDS)}, got {kind!r}")
    reader = {"trl": _read_trl, "prm800k": _read_prm800k, "math_shepherd": _read_math_shepherd}
    records = []
    for row in read_jsonl(path):
        for problem, steps, labels in reader[kind](row, row["_source"]):
            record = {"problem": problem, "steps": steps, "labels": labels}
            records.append({**record, "source": row["_source"]})
    if not records:
        raise InputError(f"{path} holds no labelled step")
    return records


def class_balance(records) -> dict[str, float]:
    """Returns how many labels there are and how many say "wrong".

    Returns:
      "solutions"; "steps_labelled" (labels that are not None); "share_wrong" of these;
      "share_with_error" (solutions with a step that is labelled wrong). Shares of nothing are 0.
    """
    labels = [label for record in records for label in record["labels"] if label is not None]
    with_error = sum(0 in record["labels"] for record in records)
    return {
        "solutions": len(records),
        "steps_labelled": len(labels),
        "share_wrong": labels.count(0) / len(labels) if labels else 0.0,
        "share_with_error": with_error / len(records) if records else 0.0,
    }


def split(records, held_out_share: float, seed: int) -> tuple[list, list]:
    """Splits records by problem, so that no problem is on both sides.

    Problems that differ in whitespace alone count as one. They are ordered by a hash of the seed
    and their text, so neither the order nor the number of the rows moves a problem's place.

    Args:
      held_out_share: of the problems, in [0, 1); above 0, at least one problem is held out.
    Returns:
      (train records, held-out records), each in the order of `records`.
    Raises:
      InputError: a share outside [0, 1), or one that leaves nothing to train on.
    """
    if not 0 <= held_out_share < 1:  # also NaN
        raise InputError(f"held_out_share must be in [0, 1), got {held_out_share}")
    keys = [" ".join(record["problem"].split()) for record in records]
    problems = sorted(set(keys), key=lambda text: _hash(f"{seed}:{text}"))
    count = max(1, round(held_out_share * len(problems))) if held_out_share > 0 else 0
    if count and count >= len(problems):
        raise InputError(
            f"held_out_share {held_out_share} of {len(problems)} problem(s) leaves none to train "
            "on; give more problems or a smaller share"
        )
    held_out = set(problems[:count])
    sides: tuple[list, list] = ([], [])
    for record, key in zip(records, keys, strict=True):
        sides[key in held_out].append(record)
    return sides


def check_text(value: Any, what: str, source: str) -> str:
    """Returns `value` if it is a text that a tokenizer can take, else raises InputError.

    Args:
      what: names the value in the error; source: "file:line".
    """
    if not isinstance(value, str):
        raise InputError(f"{source}: {what} must be text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{source}: {what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold "\ud800", on which tokenizers crash
        raise InputError(f"{source}: {what} holds half a surrogate pair: not Unicode") from None
    return value


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _list(row: dict, name: str, source: str) -> list:
    if not isinstance(row.get(name), list):
        found = type(row[name]).__name__ if name in row else "nothing"
        raise InputError(f'{source}: "{name}" must be a list, got {found}')
    return row[name]


def _object(value: Any, what: str, source: str) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"{source}: {what} must be an object, got {type(value).__name__}")
    return value


def _read_trl(row: dict, source: str):
    problem = check_text(row.get("prompt"), '"prompt"', source)
    texts, labels = _list(row, "completions", source), _list(row, "labels", source)
    if len(texts) != len(labels):
        raise InputError(f"{source}: {len(texts)} steps but {len(labels)} labels")
    if not texts:
        raise InputError(f'{source}: "completions" is empty: a solution needs at least one step')
    steps = [check_text(text, f"step {k}", source) for k, text in enumerate(texts)]
    for k, label in enumerate(labels):
        if not isinstance(label, bool):
            raise InputError(f"{source}: label {k} must be true or false, got {label!r:.40}")
    return [(problem, steps, [int(label) for label in labels])]


def _read_prm800k(row: dict, source: str):
    question = _object(row.get("question"), '"question"', source)
    problem = check_text(question.get("problem"), '"question.problem"', source)
    label = _object(row.get("label"), '"label"', source)
    chain: list[str] = []
    chain_labels: list[int | None] = []
    records = []
    for k, step in enumerate(_list(label, "steps", source)):
        step = _object(step, f"step {k}", source)
        texts, labels = _rated_completions(step, k, source)
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is None and human is None and len(texts) == 1:
            chosen = 0  # labelling stopped at this step, and it is the solution's own
        if chosen is not None and not (type(chosen) is int and 0 <= chosen < len(texts)):
            raise InputError(
                f"{source}: step {k}: chosen_completion {chosen!r:.40} is not an index of its "
                f"{len(texts)} completions"
            )
        for i, text in enumerate(texts):
            if i != chosen and labels[i] is not None:
                records.append((problem, [*chain, text], [None] * k + [labels[i]]))
        if chosen is None and human is None:
            break  # nothing says on which text the steps that follow were written
        if chosen is None:  # the README's snippet takes the text itself, the files hold an object
            text = human.get("text") if isinstance(human, dict) else human
            texts, labels, chosen = [check_text(text, f"step {k}: human", source)], [1], 0
        chain.append(texts[chosen])
        chain_labels.append(labels[chosen])
    if any(label is not None for label in chain_labels):
        records.insert(0, (problem, chain, chain_labels))
    return records


def _rated_completions(step: dict, k: int, source: str) -> tuple[list[str], list[int | None]]:
    """Returns the texts and labels of a PRM800K step; some steps have "completions": null."""
    if step.get("completions") is None:
        return [], []
    texts, labels = [], []
    for i, completion in enumerate(_list(step, "completions", f"{source}: step {k}")):
        what = f"step {k}, completion {i}"
        completion = _object(completion, what, source)
        texts.append(check_text(completion.get("text"), f"{what}: text", source))
        rating = completion.get("rating")
        if rating is not None and (type(rating) is not int or rating not in (-1, 0, 1)):
            raise InputError(
                f"{source}: {what}: rating must be -1, 0, 1 or null, got {rating!r:.40}"
            )
        labels.append(None if rating is None else int(rating >= 0))
    return texts, labels


def _read_math_shepherd(row: dict, source: str):
    text = check_text(row.get("input"), '"input"', source)
    pieces = text.split(_MARK)
    signs = _signs(pieces, check_text(row.get("label"), '"label"', source), source)
    labels: list[int | None] = [int(sign == "+") for sign in signs]
    if not labels:
        raise InputError(f'{source}: no "{_MARK}" in "input": no step is labelled')
    if pieces[-1].strip():
        labels.append(None)  # text after the last mark
    else:
        pieces.pop()
    problem, pieces, labels = _cut_problem(pieces, labels, source)
    steps = [check_text(piece.strip(), f"step {k}", source) for k, piece in enumerate(pieces)]
    return [(check_text(problem.strip(), "the problem", source), steps, labels)]


def _signs(pieces: list[str], label: str, source: str) -> list[str]:
    """Returns the + and - that stand in `label` between the pieces of the input."""
    signs, start = [], 0
    for k, piece in enumerate(pieces):
        if not label.startswith(piece, start):
            raise InputError(
                f'{source}: "input" and "label" differ before mark {k} of {len(pieces) - 1}'
            )
        start += len(piece)
        if k < len(pieces) - 1:
            if label[start : start + 1] not in ("+", "-"):
                found = label[start : start + 2]
                raise InputError(f'{source}: mark {k} has {found!r} in "label", not + or -')
            signs.append(label[start])
            start += 1
    if label[start:].strip():
        raise InputError(f'{source}: "label" goes on where "input" ends')
    return signs


def _cut_problem(pieces: list[str], labels: list, source: str) -> tuple[str, list[str], list]:
    """Cuts the problem off the first step.

    The published file has rows with a mark inside the problem, whose label is left out, and rows
    without "Step 1:", where the problem ends with its only "?".
    """
    for k, piece in enumerate(pieces):
        if found := _FIRST_STEP.search(piece):
            problem = " ".join([*pieces[:k], piece[: found.start()]])
            return problem, [piece[found.start() :], *pieces[k + 1 :]], labels[k:]
    problem, asked, first = pieces[0].partition("?")
    if not asked or "?" in first or not first.strip():
        raise InputError(f'{source}: no "Step 1:" in "input", so the problem\'s end is unknown')
    return problem + asked, [first, *pieces[1:]], labels
