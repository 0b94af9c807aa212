"""safetensors files, read in bounded pieces and written tensor by tensor.

A file is an 8-byte little-endian header length, a JSON header {name: {"dtype", "shape",
"data_offsets"}}, and the bytes of the tensors without gaps
(https://github.com/huggingface/safetensors). Files are read with `pread`, not mapped: mapped pages
would count as memory of this process for as long as the file is open.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from scope_jax.records import InputError

CHUNK_BYTES = 4 * 2**20  # read at a time; larger pieces transpose slower, they leave the CPU cache
INDEX = "model.safetensors.index.json"

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
# Of every other format that a file may hold: bytes per number, to check its offsets.
_OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
_OTHER_SIZES |= {"U64": 8, "I64": 8, "C64": 8}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class _Entry(NamedTuple):
    file: pathlib.Path
    format: str
    shape: tuple[int, ...]
    start: int  # byte in the file


class Tensors:
    """Random access by name to the tensors of the safetensors files of a directory.

    Only headers are read here. Read are the shards that model.safetensors.index.json names, else
    model.safetensors, else every *.safetensors file.

    Raises:
      InputError: no such file, or one that is not whole, or an index that does not fit its files.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = pathlib.Path(directory)
        self._entries: dict[str, _Entry] = {}
        index = self.directory / INDEX
        single = self.directory / "model.safetensors"
        if index.exists():
            self._read_index(index)
            return
        files = [single] if single.exists() else sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise InputError(_no_weights(self.directory))
        for file in files:
            entries = _read_header(file)
            if twice := sorted(set(entries) & set(self._entries)):
                other = self._entries[twice[0]].file.name
                raise InputError(f"{file} and {other} both hold {twice[0]}: remove one of them")
            self._entries |= entries

    def _read_index(self, index: pathlib.Path) -> None:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
            if not shards or any(pathlib.Path(shard).name != shard for shard in shards):
                raise ValueError("weight_map must map tensors to file names of this directory")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # or not UTF-8
            raise InputError(f"{index} is damaged: {error!r}") from None
        held = {}
        for shard in shards:
            if not (self.directory / shard).exists():
                raise InputError(f"{index} names {shard}, which is missing")
            held[shard] = _read_header(self.directory / shard)
            self._entries |= held[shard]
        absent = sorted(name for name, shard in weight_map.items() if name not in held[shard])
        if absent:
            places = ", ".join(f"{name} in {weight_map[name]}" for name in absent)
            raise InputError(f"{index} names tensors that their files lack: {places}")
        self._entries |= {name: held[shard][name] for name, shard in weight_map.items()}

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def format(self, name: str) -> str:
        """Returns the number format as the file spells it, "BF16" for example."""
        return self._entries[name].format

    def dtype(self, name: str) -> np.dtype:
        """Returns the stored dtype.

        Raises:
          InputError: the tensor holds no floating-point numbers.
        """
        stored = self.format(name)
        if stored not in FLOATS:
            raise InputError(
                f"{self.directory}: {name} is stored as {stored}; {', '.join(FLOATS)} are read"
            )
        return FLOATS[stored]

    def chunks(
        self, name: str, start: int, stop: int, row_size: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, [n, row_size] array) pieces of rows start .. stop of a tensor.

        A piece has at most CHUNK_BYTES, or is one row. It is overwritten by the next one.

        Args:
          name: of the tensor.
          start, stop: rows, counted in `row_size` numbers from the tensor's beginning.
          row_size: numbers in a row.
        Raises:
          InputError: the file got shorter since its header was read.
        """
        entry, dtype = self._entries[name], self.dtype(name)
        row_bytes = row_size * dtype.itemsize
        step = max(1, min(CHUNK_BYTES // row_bytes, stop - start))
        buffer = np.empty(step * row_bytes, np.uint8)
        with open(entry.file, "rb", buffering=0) as file:
            for row in range(start, stop, step):
                count = min(step, stop - row)
                view = buffer.data[: count * row_bytes]
                done = 0
                while done < len(view):  # one call reads at most 2 GiB, and may read less
                    at = entry.start + row * row_bytes + done
                    read = os.preadv(file.fileno(), [view[done:]], at)
                    if read == 0:
                        raise InputError(f"{entry.file} is not a whole safetensors file: it shrank")
                    done += read
                yield row, buffer[: count * row_bytes].view(dtype).reshape(count, row_size)


def _no_weights(directory: pathlib.Path) -> str:
    text = f"{directory} holds no *.safetensors file (pickled checkpoints are refused)"
    pickled = [f.name for p in ("*.bin", "*.pt", "*.pth") for f in sorted(directory.glob(p))]
    if not pickled:
        return text
    return (
        f"{text}; convert {pickled[0]} where you trust it: "
        "transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )


def _read_header(file: pathlib.Path) -> dict[str, _Entry]:
    """Returns the tensors of a file; checks that its header describes every byte of it."""
    try:
        return _parse_header(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"damaged header, {error!r}"
        raise InputError(f"{file} is not a whole safetensors file: {reason}") from None


def _parse_header(file: pathlib.Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{size} bytes cannot hold a header of {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise ValueError("its header is not JSON") from None
    header.pop("__metadata__", None)
    data, entries, spans = 8 + length, {}, []
    for name, info in header.items():
        shape, (start, end) = info["shape"], info["data_offsets"]
        numbers = [*shape, start, end]
        if any(type(n) is not int or n < 0 for n in numbers) or start > end:
            raise ValueError(f"{name} has shape {shape} and offsets {[start, end]}")
        stored = info["dtype"]
        width = FLOATS[stored].itemsize if stored in FLOATS else _OTHER_SIZES.get(stored)
        if width is not None and math.prod(shape) * width != end - start:
            raise ValueError(f"{name} of shape {shape} as {stored} does not take {end - start} B")
        spans.append((start, end, name))
        entries[name] = _Entry(file, stored, tuple(shape), data + start)
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise ValueError(f"{name} starts at byte {start} of the data instead of {at}")
        at = end
    if data + at != size:
        raise ValueError(f"its header describes {data + at} bytes, it has {size}")
    return entries


class Output(NamedTuple):
    """A tensor to write: its bytes come piece by piece, in order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_files(directory: pathlib.Path, outputs: list[Output], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered shards and their index, and replaces those of before.

    The weights get their names when all are written, and the index comes last: a directory never
    holds a half-written file under the name of a whole one.

    Raises:
      InputError: a number format that safetensors files do not know, or a size below one byte.
    """
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    shards: list[list[Output]] = [[]]
    for output in outputs:
        held = sum(o.num_bytes for o in shards[-1])
        if shards[-1] and held + output.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(output)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    partials = [directory / f"{name}.partial" for name in names]
    for file in directory.glob("model*.safetensors.partial"):
        file.unlink()  # of a save that was killed
    try:
        for partial, shard in zip(partials, shards, strict=True):
            write_file(partial, shard)
        for old in [INDEX, "model.safetensors", "model-?????-of-?????.safetensors"]:
            for file in directory.glob(old):
                # A single file of before is replaced by the rename; an index goes first, so that
                # it never names a mixture.
                if file.name not in names:
                    file.unlink()
        for partial, name in zip(partials, names, strict=True):
            partial.rename(directory / name)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    if count > 1:
        weight_map = {o.name: n for n, s in zip(names, shards, strict=True) for o in s}
        total = sum(output.num_bytes for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        partial = directory / f"{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=2) + "\n")
        partial.rename(directory / INDEX)


def write_file(file: pathlib.Path, outputs: list[Output]) -> None:
    """Writes one safetensors file, piece by piece."""
    formats = {dtype: name for name, dtype in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    # Wider numbers first keeps every tensor aligned to its own width.
    outputs = sorted(outputs, key=lambda o: (-o.dtype.itemsize, o.name))
    for output in outputs:
        if output.dtype not in formats:
            raise InputError(f"{output.name}: {output.dtype} cannot be stored; {', '.join(FLOATS)}")
        end = at + output.num_bytes
        header[output.name] = {
            "dtype": formats[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            for piece in output.pieces():
                stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())  # the rename must not survive a crash that the bytes do not
