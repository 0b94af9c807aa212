"""What must hold of a training step, checked on the host's arrays; what to keep where it does not.

`rows` is train.py's dict of arrays: ids [B, T] int32, mask [B, T] bool, source [B, T] int8, logps
[B, T] float32, rewards [B] float32 and others.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from scope_jax.records import POLICY

BY_TOKEN = ("logps", "old_logps", "ref_logps", "advantages")  # they count where `mask` is True


class BrokenPromise(RuntimeError):
    """The program did what it says that it never does; one line says what."""


def is_spike(value: float, earlier: Sequence[float], *, factor: float, window: int) -> bool:
    """Returns whether a value is beyond `factor` times the median of the last ones before it.

    Args:
      value: of this step; not finite: no spike, but an error of its own.
      earlier: of the steps before, oldest first; those that are not finite are passed over.
      window: so many of the last finite ones count; with fewer than half as many: False.
    """
    last = [x for x in earlier if np.isfinite(x)][-window:]
    if len(last) < max(window // 2, 1) or not np.isfinite(value):
        return False
    return bool(value > factor * np.median(last))


def find_non_finite(rows: dict[str, np.ndarray]) -> list[str]:
    """Returns the names of arrays that hold NaN or an infinity where they count, in rows' order.

    Args:
      rows: arrays [B, ..]; those of BY_TOKEN count where `mask` [B, T] is True.
    """
    found = []
    for name, value in rows.items():
        value = np.asarray(value)
        if not np.issubdtype(value.dtype, np.inexact):
            continue
        by_token = name in BY_TOKEN and value.ndim == 2 and "mask" in rows
        if not np.isfinite(value[rows["mask"]] if by_token else value).all():
            found.append(name)
    return found


def check_splices(
    rows: dict[str, np.ndarray],
    fixed: dict[str, np.ndarray],
    chosen: np.ndarray,
    kept: np.ndarray,
    accepted: np.ndarray,
) -> None:
    """Checks that a repaired rollout begins with its source's kept tokens, unchanged.

    Args:
      rows: arrays [B, ..] as sampled.
      fixed: arrays [C, ..] as spliced.
      chosen: [C] int32, the source of each.
      kept: [C] int32, how many of its tokens stay.
      accepted: [C] bool; the others are not looked at.
    Raises:
      BrokenPromise: ids, masks, log-probs or writers differ there.
    """
    for i in np.flatnonzero(accepted):
        row, length = int(chosen[i]), int(kept[i])
        for name in ("ids", "mask", "logps"):
            if not np.array_equal(fixed[name][i, :length], rows[name][row, :length]):
                raise BrokenPromise(
                    f"repaired rollout {i} does not begin with the {length} kept tokens of its "
                    f"source, rollout {row}: {name} differ"
                )
        if not (fixed["mask"][i, :length].all() and (fixed["source"][i, :length] == POLICY).all()):
            raise BrokenPromise(
                f"repaired rollout {i} keeps {length} tokens of rollout {row}, not all of which "
                "are the policy's"
            )


def check_groups(before: np.ndarray, after: np.ndarray, solved_at: float, group_size: int) -> None:
    """Checks that repair alone made no group all right, where `correct.keep_last_wrong` holds.

    Args:
      before, after: [B] float32, rewards as sampled and with the repairs in place.
      solved_at: from which reward on a rollout is right.
    Raises:
      BrokenPromise: a group has lost its last wrong rollout, and with it all signal.
    """
    was, now = ((x.reshape(-1, group_size) >= solved_at).all(1) for x in (before, after))
    for group in np.flatnonzero(now & ~was):
        raise BrokenPromise(f"repair left no wrong rollout in group {group}: it has no signal")


def dump_batch(path: pathlib.Path, rows: dict[str, np.ndarray], reason: dict | str) -> None:
    """Writes arrays to `path` (.npz) and the reason beside it (.json), each whole or not at all.

    Args:
      path: its folder is made; a file there is replaced.
      rows: host arrays of any shape, none of Python objects: nothing is pickled.
      reason: anything that JSON can hold; written first, so that an .npz has its reason.
    Raises:
      TypeError: an array of objects; nothing is written.
    """
    arrays = {name: np.asarray(value) for name, value in rows.items()}
    objects = [name for name, value in arrays.items() if value.dtype.hasobject]
    if objects:
        raise TypeError(f"cannot dump arrays of objects: {', '.join(objects)}")
    path = pathlib.Path(path).with_suffix(".npz")
    text = json.dumps(reason, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    note, arrays_file = path.with_suffix(".json"), path
    for file in (note, arrays_file):
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as output:
                if file is note:
                    output.write(text.encode())
                else:
                    np.savez(output, allow_pickle=False, **arrays)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
