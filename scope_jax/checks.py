"""What must hold of a training step, checked on the host's arrays; what to keep where it does not.

`rows` is train.py's dict of arrays: ids [B, T] int32, mask [B, T] bool, source [B, T] int8, logps
[B, T] float32, rewards [B] float32 and others.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scope_jax.records import POLICY, InputError

SPIKE_WINDOW = 50  # steps
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


def dump_batch(path: pathlib.Path, rows: dict[str, np.ndarray], reason: Any) -> None:
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


def keep_skipped(workdir: pathlib.Path, step: int, measured: dict, rows: dict) -> None:
    """Keeps a process's batch of a step with a skipped update, in WORKDIR/non_finite."""
    if measured["skipped"]:
        path = workdir / "non_finite" / f"step_{step:06d}_{jax.process_index()}"
        dump_batch(path, rows, find_non_finite(rows) or "the update")


def gradient_spike(
    measured: dict, recent: Sequence[dict], *, spike_factor: float = 10.0, **_
) -> int:
    """Returns 1 where a step's "grad_norm" is a spike among those of recent steps, else 0."""
    norm, earlier = measured.get("grad_norm", 0.0), [row.get("grad_norm") for row in recent]
    known = [x for x in earlier if x is not None]
    return int(spike_factor > 0 and is_spike(norm, known, factor=spike_factor, window=SPIKE_WINDOW))


def stop_if_broken(
    measured: dict,
    recent: Sequence[dict],
    *,
    max_skipped: int = 0,
    max_logp_gap: float = 0.0,
    max_recompiles: int = 0,
    **_,
) -> None:
    """Ends a run of which a check says that it trains no longer what it should.

    Args:
      measured: a step's metrics: "skipped", "logp_gap", "recompiles".
      recent: {"step", "skipped"} of the last steps, this one included.
      max_skipped: steps in a row with an update that was skipped; 0 = any number, as below.
      max_logp_gap: largest |difference| of a token's log-prob between sampler and trainer.
      max_recompiles: XLA compilations after the first step.
    Raises:
      InputError: one of them is passed.
    """
    in_a_row = 0
    for row in reversed(recent):
        if not row.get("skipped"):
            break
        in_a_row += 1
    if 0 < max_skipped <= in_a_row:
        raise InputError(
            f"the updates of {in_a_row} steps in a row were not finite (the last: step "
            f"{recent[-1]['step']}; their batches are in the workdir's non_finite/): lower the "
            "learning rate, or go on from an earlier checkpoint (checks.max_skipped)"
        )
    if 0 < max_logp_gap < measured.get("logp_gap", 0.0):
        raise InputError(
            f"sampler and trainer differ by {measured['logp_gap']:.3g} in a token's log-prob; "
            f"checks.max_logp_gap is {max_logp_gap}"
        )
    if 0 < max_recompiles < measured["recompiles"]:
        raise InputError(
            f"{measured['recompiles']} programs were compiled after the first step; "
            f"checks.max_recompiles is {max_recompiles}"
        )


def check_weights(version: int, step: int) -> None:
    """Raises BrokenPromise where a step would sample with other weights than the last one left.

    Args:
      version: steps that the sampler's weights have seen; step: the one that begins, from 1.
    """
    if version != step - 1:
        raise BrokenPromise(f"step {step} was to sample with the weights of step {version}")
