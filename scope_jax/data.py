"""Prompts: problems from files or tasks through Grain, tokenised into a LEFT-padded bucket.

The iterator's state (`get_state`) goes into the checkpoint, so a resumed run continues with the
next problem.
"""

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


def read_jsonl(path) -> list[dict[str, Any]]:
    """Returns the objects of a .jsonl or .jsonl.gz file.

    Raises:
      InputError: no such file, a damaged one, or a line that is not a JSON object (file and line
      number are named).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"data file {path} does not exist")
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}:{number}: a JSON object per line expected, got {type(row).__name__}"
                )
            rows.append({**row, "_source": f"{path}:{number}"})
    if not rows:
        raise InputError(f"{path} holds no rows")
    return rows


def _lines(file, path) -> Iterator[bytes]:
    try:
        yield from file
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


def render_prompt(tokenizer, problem: str, *, template: str, chat: bool, system: str = "") -> str:
    """Returns the text of a prompt.

    Args:
      tokenizer: a transformers tokenizer; its chat template is used if `chat`.
      problem: goes where `template` says {problem}.
      template: of the user's text.
      chat: wrap it in the chat template, with `system` (if any) before it, up to the assistant's
        turn.
      system: the system message.
    """
    text = template.replace("{problem}", problem)  # not str.format: problems contain braces
    if not chat:
        return system + text
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


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
