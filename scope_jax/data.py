"""Prompts: problems from files or tasks through Grain, tokenised into a LEFT-padded bucket.

The iterator's state (`get_state`) goes into the checkpoint, so a resumed run continues with the
next problem.
"""

import bisect
import concurrent.futures
import functools
import gzip
import itertools
import json
import math
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from scope_jax.records import InputError, Prompts

MANIFEST = "manifest.json"  # of a prepared directory
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
        raise InputError(f"{path} is damaged: {_one_line(error)}") from None


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


class Prepared(Sequence):
    """The records that `scope_jax.prepare_data` wrote to a directory, each read when it is asked
    for.

    Args:
      directory: holds MANIFEST and the ArrayRecord shards that it names.
      rows: which records, of which order (default: all of them as they stand).
    Raises:
      InputError: no manifest or a broken one, a shard that is missing or damaged, or holds another
      number of records. A record that is damaged raises it when it is read.
    """

    def __init__(self, directory, rows: Sequence[int] | None = None):
        self.directory = pathlib.Path(directory)
        self.manifest = _read_manifest(self.directory)
        self._shards = [
            _open_shard(self.directory / name, count) for name, count in self.manifest["shards"]
        ]
        self._starts = [0, *itertools.accumulate(len(shard) for shard in self._shards)]
        self._rows = range(self._starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        number = bisect.bisect_right(self._starts, row) - 1
        place = f"{self.directory / self.manifest['shards'][number][0]}"
        try:
            record = json.loads(self._shards[number][row - self._starts[number]])
            if not all(isinstance(text, str) for text in record.values()):
                raise ValueError("a record of more than texts")
            if missing := {"id", "problem", "gold", "solution"} - record.keys():
                raise ValueError(f"a record without {', '.join(sorted(missing))}")
            return record
        except (RuntimeError, ValueError, AttributeError) as error:  # by the last: no object
            raise InputError(
                f"{place} is damaged at record {row - self._starts[number] + 1}: "
                f"{_one_line(error)}; make {self.directory} again"
            ) from None

    def only(self, rows: Sequence[int]) -> "Prepared":
        """Returns some of the records."""
        return Prepared(self.directory, [self._rows[i] for i in rows])


def is_prepared(path) -> bool:
    """Returns whether a path is a directory, as `prepare_data` writes one."""
    return pathlib.Path(path).is_dir()


def _read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        shards = [(shard["file"], shard["records"]) for shard in manifest["shards"]]
        if not all(type(n) is int and pathlib.PurePath(name).name == name for name, n in shards):
            raise ValueError("a shard's name or number of records is none")
        return {**manifest, "shards": shards}
    except FileNotFoundError:
        raise InputError(
            f"{file} is missing: a directory of problems is made by python -m "
            "scope_jax.prepare_data"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {_one_line(error)}") from None


def _open_shard(file: pathlib.Path, records: int) -> Any:
    if not file.is_file():
        raise InputError(f"shard {file} is missing: {file.parent / MANIFEST} names it")
    try:
        shard: Any = grain.sources.ArrayRecordDataSource([str(file)])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{file} is damaged: {_one_line(error)}") from None
    if len(shard) != records:
        raise InputError(f"{file} holds {len(shard)} records, {MANIFEST} says {records}")
    return shard


def _one_line(error: Exception) -> str:
    """Returns the start of a library's message, which may have many lines."""
    return " ".join(f"{error!s:.200}".split()) or type(error).__name__


class Mixture(Sequence):
    """The problems of several sources, one source after the other; `prompt_iterator` draws of each
    source by its weight.

    Args:
      sources: random access to records; weights: how often each is drawn, > 0, of any sum.
    """

    def __init__(self, sources: Sequence[Sequence[dict]], weights: Sequence[float]):
        if len(sources) != len(weights) or not sources:
            raise ValueError(f"{len(sources)} sources, {len(weights)} weights")
        for weight in weights:
            if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
                raise InputError(f"the weight of a source must be a number > 0, got {weight!r}")
        self.sources, self.weights = tuple(sources), tuple(weights)
        self._starts = [0, *itertools.accumulate(len(source) for source in sources)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index) -> Any:
        row = range(len(self))[index]
        if isinstance(row, range):
            return [self[i] for i in row]
        number = bisect.bisect_right(self._starts, row) - 1
        return self.sources[number][row - self._starts[number]]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The lines of all sources that were left out."""
        return [line for source in self.sources for line in getattr(source, "skipped", ())]


def prompt_iterator(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    part: tuple[int, int] = (0, 1),
):
    """Returns an endless, checkpointable Grain iterator over batches (lists) of records.

    The order is a function of the seed and changes every epoch. Of a Mixture each source has its
    own order and epochs, and every stretch of the whole order has its share of each source: of the
    first n records the i-th has n w_i / sum(w), but for less than a record for each source and but
    for Grain's rounding of the weights to 1 / 100 of the smallest.

    Args:
      source: random access to the records.
      batch_size: records of all parts together.
      part: (k, n): of each batch the k-th of n equal parts, neighbouring records (n divides
        batch_size). The state counts batches, so another number of parts goes on from it.
    Raises:
      InputError: fewer records than one batch; a source of a Mixture with fewer than its share.
    """
    if len(source) < batch_size:
        raise InputError(f"{len(source)} problems do not fill one batch of {batch_size} prompts")
    if isinstance(source, Mixture):
        shares = [weight / sum(source.weights) * batch_size for weight in source.weights]
        for number, (one, share) in enumerate(zip(source.sources, shares, strict=True), start=1):
            if len(one) < share:
                raise InputError(
                    f"source {number} of the mixture has {len(one)} problems, and its weight asks "
                    f"for {share:.1f} in each batch of {batch_size} prompts: lower it"
                )
        seeds = np.random.SeedSequence(seed).generate_state(len(source.sources)).tolist()
        parts = [_epochs(*one, shuffle) for one in zip(source.sources, seeds, strict=True)]
        dataset = grain.MapDataset.mix(parts, source.weights)
    else:
        dataset = _epochs(source, seed, shuffle)
    dataset = dataset.batch(batch_size // part[1], batch_fn=list)[part[0] :: part[1]]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def _epochs(source: Sequence[dict], seed: int, shuffle: bool) -> grain.MapDataset:
    dataset = grain.MapDataset.source(source)
    return (dataset.shuffle(seed=seed) if shuffle else dataset).repeat()


class Ahead:
    """Prepares the next batch while this one is used: an iterator over (records, Prompts) whose
    `next` starts a thread for the batch after it.

    One thread at a time, for one batch; there is none before the first `next`, and it ends with its
    batch. What goes wrong in it is raised by the `next` that would have returned its batch, and by
    each one after it: such a batch counts as not handed out.

    Args:
      iterator: as `prompt_iterator` returns it; not to be used beside this.
      tokenize: records -> Prompts. It runs beside the caller, so it must share nothing with it that
        changes; a tokenizer's encode and decode change nothing.
    """

    def __init__(self, iterator, tokenize: Callable[[Sequence[dict]], Prompts]):
        self._iterator, self._tokenize = iterator, tokenize
        self._state = iterator.get_state()
        self._pending: concurrent.futures.Future | None = None

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> tuple[list[dict], Prompts]:
        pending = self._pending = self._pending or _in_thread(self._prepare)
        concurrent.futures.wait([pending])  # interrupted here, it is still pending
        self._pending = None
        if error := pending.exception():
            self._iterator.set_state(self._state)
            raise error
        batch, self._state = pending.result()
        self._pending = _in_thread(self._prepare)
        return batch

    def _prepare(self):
        records = next(self._iterator)
        return (records, self._tokenize(records)), self._iterator.get_state()

    def get_state(self):
        """Returns the state after the last batch that `next` returned."""
        return self._state

    def set_state(self, state) -> None:
        """Goes on from a state; what was prepared is dropped."""
        if self._pending:
            concurrent.futures.wait([self._pending])
            self._pending = None
        self._iterator.set_state(state)
        self._state = state


def _in_thread(function: Callable[[], Any]) -> concurrent.futures.Future:
    """Runs `function` in a thread that the end of the process does not wait for."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:  # whatever it is, it is the waiting caller's
            future.set_exception(error)

    threading.Thread(target=run, name="next-batch", daemon=True).start()
    return future


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
      system: the system message; `tokenize_prompts` puts a record's own "system" in its place.
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


def render_record(render: Callable[..., str], record: dict) -> str:
    """Returns render(problem) of a record, with the record's own system message if it has one."""
    system = record.get("system")
    return render(record["problem"], system=system) if system else render(record["problem"])


def tokenize_prompts(
    records: Sequence[dict],
    *,
    tokenizer,
    render: Callable[..., str],
    max_prompt_length: int,
    pad_id: int,
) -> Prompts:
    """Returns the records' prompts in one LEFT-padded bucket [P, max_prompt_length].

    Args:
      records: {"id", "problem"} and perhaps "system": the record's own system message (`Prepared`
        data may have some), which takes the place of the one that `render` has.
      render: (problem) or (problem, system=...) -> text, such as `render_prompt` with its options.
    Raises:
      InputError: a prompt that is empty or longer than the bucket, named by its id.
    """
    ids = np.full((len(records), max_prompt_length), pad_id, np.int32)
    mask = np.zeros((len(records), max_prompt_length), bool)
    for row, record in enumerate(records):
        text = render_record(render, record)
        tokens = tokenizer.encode(text, add_special_tokens=False)
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
