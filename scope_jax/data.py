"""Prompts: problems from files or tasks through Grain, tokenised into a LEFT-padded bucket.

The iterator's state (`get_state`) goes into the checkpoint, so a resumed run continues with the
next problem.
"""

import functools
import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from scope_jax.records import InputError, Prompts

MAX_LINE = 4 << 20  # bytes; a longer line is no row, and is never held whole
PARQUET_ROWS = 256  # of a Parquet file read at a time


def read_rows(
    path,
    parse: Callable[[dict[str, Any]], Any] | None = None,
    *,
    skipped: list[dict[str, Any]] | None = None,
) -> list[Any]:
    """Returns the rows of a .jsonl, .jsonl.gz or .parquet file as dicts, each with where it stands
    as "_source": "file:line", of Parquet "file:row 3" (the first is 1).

    Args:
      path: of the file; blank lines in it do not count. What does not end in .parquet is JSONL.
      parse: makes of a row what is returned in its place; its InputError is the reason why the row
        is bad.
      skipped: bad rows are left out and added here as {"file", "line", "reason"}. If None, the
        first of them is an error that also says how many more there are.
    Raises:
      InputError: no such file, a damaged one, a bad row (file and number are named) or no good one;
      pyarrow, which reads Parquet, is not installed. Bad is what is no JSON object by the standard
      (NaN is not) in UTF-8, what is longer than MAX_LINE, and what `parse` refuses.
    """
    rows, bad = [], []
    for number, row in stream_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            rows.append(row if parse is None else parse(row))
        except InputError as error:
            bad.append({"file": str(path), "line": number, "reason": str(error)})
    if bad and not rows:
        raise InputError(f"{describe_bad_lines(bad)}" + "; none is good" * (len(bad) > 1))
    if bad and skipped is None:
        raise InputError(describe_bad_lines(bad))
    if not rows:
        raise InputError(f"{path} holds no rows")
    if skipped is not None:
        skipped += bad
    return rows


read_jsonl = read_rows  # the older name


def stream_rows(path) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yields each row's number and the row as `read_rows` makes it, or why it is bad; no more of
    the file is held than one line, or PARQUET_ROWS rows.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"data file {path} does not exist")
    for number, read in (_parquet_rows if _is_parquet(path) else _json_rows)(path):
        try:
            yield number, {**read(), "_source": _place(path, number)}
        except InputError as error:
            yield number, error


def describe_bad_lines(bad: list[dict[str, Any]]) -> str:
    """Returns the first of some bad lines, its reason, and how many more there are."""
    kind = "row" if _is_parquet(bad[0]["file"]) else "line"
    more = f" (and {len(bad) - 1} more bad {kind}{'s' * (len(bad) > 2)})" if len(bad) > 1 else ""
    return f"{_place(bad[0]['file'], bad[0]['line'])}: {bad[0]['reason']}{more}"


def _is_parquet(path) -> bool:
    return str(path).endswith(".parquet")


def _place(path, number: int) -> str:
    return f"{path}:row {number}" if _is_parquet(path) else f"{path}:{number}"


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                yield number, functools.partial(_json_object, line)


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"reading {path} needs pyarrow: pip install pyarrow (or scope_jax[eval])"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                for row in range(batch.num_rows):
                    number += 1
                    yield number, functools.partial(_parquet_row, batch.slice(row, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        # Arrow's messages go on with its own C++ stack or with what it found in the file
        reason = " ".join(f"{error!s:.200}".split()) or type(error).__name__
        raise InputError(f"{path} is damaged: {reason}") from None


def _parquet_row(batch) -> dict[str, Any]:
    if batch.nbytes > MAX_LINE:
        raise InputError(f"longer than {MAX_LINE:,} bytes")
    try:
        return batch.to_pylist()[0]
    except (ValueError, OverflowError) as error:  # of bytes that are not UTF-8; of a year 10,000
        raise InputError(f"not readable: {error}") from None


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise InputError(f"longer than {MAX_LINE:,} bytes")
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # ValueError: also of bad UTF-8, of 5,000 digits
        raise InputError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"a JSON object per line expected, got {type(row).__name__}")
    return row


def _no_number(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _lines(file, path) -> Iterator[bytes]:
    """Yields lines; of one that is too long no more than shows that it is."""
    try:
        while line := file.readline(MAX_LINE + 1):
            yield line
            while len(line) > MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1) or b"\n"
    except (OSError, EOFError, zlib.error) as error:  # gzip's three ways to say it
        raise InputError(f"{path} is damaged: {error}") from None


def prompt_iterator(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    part: tuple[int, int] = (0, 1),
):
    """Returns an endless, checkpointable Grain iterator over batches (lists) of records.

    The order is a function of the seed and changes every epoch.

    Args:
      source: random access to the records.
      batch_size: records of all parts together.
      part: (k, n): of each batch the k-th of n equal parts, neighbouring records (n divides
        batch_size). The state counts batches, so another number of parts goes on from it.
    Raises:
      InputError: fewer records than one batch.
    """
    if len(source) < batch_size:
        raise InputError(f"{len(source)} problems do not fill one batch of {batch_size} prompts")
    dataset = grain.MapDataset.source(source)
    dataset = dataset.shuffle(seed=seed) if shuffle else dataset
    dataset = dataset.repeat().batch(batch_size // part[1], batch_fn=list)[part[0] :: part[1]]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def render_prompt(
    tokenizer, problem: str, *, template: str, chat: bool, system: str = "", assistant: str = ""
) -> str:
    """Returns the text of a prompt.

    Args:
      tokenizer: a transformers tokenizer; its chat template is used if `chat`.
      problem: goes where `template` says {problem}.
      template: of the user's text.
      chat: wrap it in the chat template, with `system` (if any) before it, up to the assistant's
        turn.
      system: the system message.
      assistant: opens the assistant's turn ("<think>", say); left out where the chat template ends
        in it already.
    """
    text = template.replace("{problem}", problem)  # not str.format: problems contain braces
    if not chat:
        return system + text + assistant
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text if text.endswith(assistant) else text + assistant


def tokenize_prompts(
    records: Sequence[dict],
    *,
    tokenizer,
    render: Callable[[str], str],
    max_prompt_length: int,
    pad_id: int,
) -> Prompts:
    """Returns the records' prompts in one LEFT-padded bucket [P, max_prompt_length].

    Raises:
      InputError: a prompt that is empty or longer than the bucket, named by its id.
    """
    ids = np.full((len(records), max_prompt_length), pad_id, np.int32)
    mask = np.zeros((len(records), max_prompt_length), bool)
    for row, record in enumerate(records):
        tokens = tokenizer.encode(render(record["problem"]), add_special_tokens=False)
        if not 0 < len(tokens) <= max_prompt_length:
            raise InputError(
                f"problem {record['id']} has {len(tokens)} prompt tokens; "
                f"data.max_prompt_length is {max_prompt_length}"
            )
        ids[row, -len(tokens) :] = tokens
        mask[row, -len(tokens) :] = True
    return Prompts(ids=ids, mask=mask, records=tuple(records))


def decode_completions(tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """Returns the text of each right-padded row, special tokens left out."""
    return [
        tokenizer.decode(row[keep].tolist(), skip_special_tokens=True)
        for row, keep in zip(ids, mask, strict=True)
    ]


def decode_steps(
    tokenizer, ids: np.ndarray, step_ends: np.ndarray, step_mask: np.ndarray
) -> list[list[str]]:
    """Returns the texts of each row's reasoning steps, special tokens left out.

    Args:
      ids: [B, T]; step_ends, step_mask: [B, S] from `segment_steps`.
    """
    texts = []
    for row, ends, real in zip(ids, step_ends, step_mask, strict=True):
        pieces = itertools.pairwise([0, *ends[real].tolist()])
        texts.append(
            [tokenizer.decode(row[a:b].tolist(), skip_special_tokens=True) for a, b in pieces]
        )
    return texts
