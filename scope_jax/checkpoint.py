"""Orbax checkpoints of everything that matters: params, optimizer, step, and where the data stood.

The config lies beside them in the workdir (config.json); randomness needs no state (a function of
seed and step). A checkpoint in the making has another name until it is whole, so a killed process
leaves none that looks finished. A finished one says what its arrays sum to: what was changed or
lost since then is found, set aside and named, and the one before it is taken.

Paths go through Orbax and etils' `epath`, gs:// too; only local files are tested.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from scope_jax.hosts import all_hosts, on_first_host
from scope_jax.records import InputError, TrainState
from scope_jax.sharding import fetch


def open_checkpoints(
    workdir, *, keep: int = 2, keep_every: int = 0, clear: bool = False
) -> ocp.CheckpointManager:
    """Returns the manager of WORKDIR/checkpoints; saves are asynchronous.

    Args:
      keep: so many of the newest stay.
      keep_every: those of steps that it divides stay, too; 0 = none.
      clear: deletes what a killed process left unfinished. For the run that writes there alone: it
        would delete a save in progress of another one. All processes must call it.
    """
    folder = epath.Path(workdir) / "checkpoints"
    folder = folder if "://" in str(workdir) else folder.absolute()
    _quieten()
    if clear:  # not by Orbax's option, which may delete in the background what is being saved
        if str(folder) in _writing:  # a run that was interrupted in this process, say in a notebook
            with contextlib.suppress(Exception):
                _writing.pop(str(folder)).close()  # waits for its last save
        on_first_host(_clear, folder)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=keep_every or None, create=True
    )
    manager = ocp.CheckpointManager(folder, options=options)
    if clear:
        _writing[str(folder)] = manager
    return manager


_writing: dict[str, ocp.CheckpointManager] = {}  # by folder


def _quieten() -> None:
    """Leaves it to us to say what went wrong with a checkpoint: once.

    Orbax logs an exception with its traceback in each thread that it passes before it raises it.
    Of the arrays that it then no longer waits for, each one says so when it is let go of.
    """
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_is_news)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    said = traceback.format_exception(*record.exc_info) if record.exc_info else ()
    return "orbax" not in "".join(said)


@dataclasses.dataclass
class _Unraisable:
    """A `sys.unraisablehook` for all but Orbax's abandoned arrays."""

    other: Callable

    def __call__(self, what) -> None:
        abandoned = "orbax" in str(getattr(what.object, "cr_code", ""))  # a coroutine of a read
        late = what.object is None and str(what.exc_value) == "Event loop is closed"  # of a write
        if not (abandoned or late):
            self.other(what)


def _clear(folder: epath.Path) -> None:
    for unfinished in folder.glob("*.orbax-checkpoint-tmp*") if folder.is_dir() else ():
        unfinished.rmtree()


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, data_state: dict[str, Any]
) -> None:
    """Saves the state after `step` training steps; returns as soon as the arrays are copied to the
    host.

    Raises:
      InputError: it cannot be written, or the one before could not.
    """
    note = {"data": data_state, "sums": bit_sums(state)}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(note | {"digest": _digest(note)})
    )
    with _told(manager):
        manager.save(step, args=items, force=True)


def settle(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is whole.

    Raises:
      InputError: it could not be written (disk full, say); earlier ones are as they were.
    """
    with _told(manager):
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager,
    state: TrainState,
    step: int | None = None,
    say: Callable[[str], None] = print,
):
    """Returns (state, data_state) of a checkpoint, or None if there is none.

    A damaged one (a file missing or changed) is moved to WORKDIR/damaged_checkpoints and named, and
    the one before it is read. Several processes take the same one.

    Args:
      manager: from `open_checkpoints`.
      state: gives shapes, dtypes and shardings; its values are not read.
      step: which checkpoint (default: the newest that is whole).
      say: gets a line about each damaged one.
    Raises:
      InputError: there are checkpoints, and none of them can be read.
    """
    steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
    damaged: dict[int, str] = {}
    for number in steps:
        found, reason = None, None
        try:
            found = _read(manager, state, number)
        except Exception as error:  # whatever Orbax, TensorStore or JSON make of damaged files
            reason = _line(error)
        if reason := next(filter(None, all_hosts(reason)), None):
            damaged[number] = reason
            continue
        for bad, why in damaged.items():
            on_first_host(_set_aside, manager, bad)
            line = f"checkpoint {manager.directory / str(bad)} is damaged: {why}; it is set aside"
            on_first_host(say, line)
        if damaged:
            manager.reload()
            on_first_host(say, f"going on from the checkpoint of step {number}")
        return found
    if damaged:
        reasons = "; ".join(f"step {number}: {why}" for number, why in damaged.items())
        raise InputError(f"no checkpoint in {manager.directory} can be read: {reasons}")
    return None


def go_on(manager: ocp.CheckpointManager, state: TrainState, data) -> tuple[TrainState, int]:
    """Returns (the state to go on from, the steps that it has seen): that of the newest checkpoint
    that is whole, to whose place the data iterator is set, or what is given. See `restore`.
    """
    found = restore(manager, state)
    if found is None:
        return state, 0
    data.set_state(found[1])
    return found[0], int(found[0].step)


def restore_params(workdir, params, step: int | None = None):
    """Returns the params of a workdir's checkpoint, without its optimizer state.

    Args:
      workdir: of a training run.
      params: gives the tree, shapes, dtypes and shardings.
      step: which checkpoint (default: the newest).
    Raises:
      InputError: the workdir holds no checkpoint, or not this one, or it is damaged.
    """
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no checkpoints/")
    manager = open_checkpoints(workdir)
    steps = sorted(manager.all_steps())
    if not steps:
        raise InputError(f"{folder} holds no finished checkpoint")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(f"{folder} holds no step {step}; it holds {', '.join(map(str, steps))}")
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
    args = ocp.args.PyTreeRestore(
        item={"params": shapes},
        restore_args=ocp.checkpoint_utils.construct_restore_args({"params": shapes}),
        partial_restore=True,
    )
    try:
        sums = _note(manager, step)["sums"]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(manager.directory / str(step) / "state", args=args)
        _compare(sums, found["params"], ".params")
    except Exception as error:
        reason = _line(error)
        others = ", ".join(str(s) for s in steps if s != step)
        raise InputError(
            f"checkpoint {folder / str(step)} is damaged: {reason}"
            + (f"; others are of steps {others}" if others else "")
        ) from None
    finally:
        manager.close()
    return found["params"]


def find_damage(workdir, *, max_bytes: float = float("inf")) -> dict[int, str]:
    """Returns {step: what is wrong with it, "" = whole} of a workdir's checkpoints, from the newest
    to the first that is whole. Changes nothing, and needs neither the run's model nor its devices.

    Args:
      workdir: of a training run, a local folder.
      max_bytes: of a larger checkpoint only what it says of itself is read, not its arrays.
    """
    folder = epath.Path(workdir).absolute() / "checkpoints"
    _quieten()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    found: dict[int, str] = {}
    with ocp.CheckpointManager(folder, options=options) as manager:
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                sums = _note(manager, step)["sums"]
                if folder_bytes(folder / str(step)) <= max_bytes:
                    _compare_all(sums, folder / str(step) / "state")
                found[step] = ""
                break
            except Exception as error:  # whatever Orbax, TensorStore or JSON make of damaged files
                found[step] = _line(error)
    return found


def folder_bytes(folder) -> int:
    """Returns how many bytes the files below a local folder have."""
    return sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())


def _compare_all(expected: dict[str, list], folder) -> None:
    """As `_compare`, of all arrays in a checkpoint's folder, whatever tree they were in."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = reader.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    if sorted(bit_sums(tree).values()) != sorted(map(list, expected.values())):
        raise ValueError("the values of its arrays are not those that were saved")


def _read(manager: ocp.CheckpointManager, state: TrainState, step: int):
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    note = _note(manager, step)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
    found = manager.restore(step, args=items)["state"]
    _compare(note["sums"], found)
    return found, note["data"]


def _note(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Returns what a checkpoint says of itself: {"data", "sums"}."""
    items = ocp.args.Composite(data=ocp.args.JsonRestore())
    note = dict(manager.restore(step, args=items)["data"])
    if note.pop("digest", None) != _digest(note):
        raise ValueError("what it says about its data and arrays was changed")
    return note


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    folder = manager.directory.parent / "damaged_checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    taken = len(list(folder.iterdir()))
    (manager.directory / str(step)).rename(folder / f"{step}_{taken}")


def _line(error: Exception) -> str:
    """Returns an error in one line; of a long one what it was about and, at its end, its cause."""
    text = str(error).split("[tensorstore_spec=")[0]  # pages of options
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:160]} .. {text[-200:]}"


@contextlib.contextmanager
def _told(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Makes one line of what can go wrong while a checkpoint is written."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # another process is gone: no fault of the disk's
        raise
    except Exception as error:  # TensorStore's own, OSError, Orbax's: all mean that it is not there
        reason = _line(error)
        manager.reload()
        good = max(manager.all_steps(), default=None)
        left = f"the last good one is of step {good}" if good else "there is none before it"
        raise InputError(
            f"a checkpoint could not be written to {manager.directory}: {reason}; {left}: make "
            "room (or the folder writable) and run the same command again"
        ) from None


# ------------------------------------------------------------------------------ what arrays sum to


def bit_sums(tree, prefix: str = "") -> dict[str, list]:
    """Returns [dtype, sum over the bits of its elements and where they stand] of a tree's arrays.

    One changed element changes it for certain, several but for once in 2**32. Integers: so it does
    not depend on the order of summation, hence not on how the array is spread over devices.

    Args:
      tree: of arrays of at most 32 bits an element.
      prefix: of the names.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    # One at a time: programs that wait for all devices and not for each other can take all threads
    # of a CPU's virtual devices, each with half of its partners, and XLA ends the process.
    sums = [fetch(_bit_sum(x)) for _, x in named]
    names = [prefix + jax.tree_util.keystr(path) for path, _ in named]
    dtypes = [str(x.dtype) for _, x in named]
    return {name: [d, int(x)] for name, d, x in zip(names, dtypes, sums, strict=True)}


@jax.jit
def _bit_sum(x):
    """Returns a sum of hashes [] uint32: MurmurHash3's finalizer of an element's bits and index."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    stride, index = 1, jnp.zeros(x.shape, jnp.uint32)
    for axis in reversed(range(x.ndim)):
        index += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        stride *= x.shape[axis]
    h = bits ^ (index * jnp.uint32(0x9E3779B9))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)).sum(dtype=jnp.uint32)


def _compare(expected: dict[str, list], tree, prefix: str = "") -> None:
    found = bit_sums(tree, prefix)
    # Read in another dtype, values are not those that were summed: Orbax's word is taken.
    same = [name for name in found if found[name][0] == expected[name][0]]
    wrong = [name for name in same if found[name] != expected[name]]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"the values of {wrong[0]}{more} are not those that were saved")
