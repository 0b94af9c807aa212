"""Orbax checkpoints of everything that matters: params, optimizer, step, and where the data stood.

The config lies beside them in the workdir (config.json); randomness needs no state (a function of
seed and step).
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from scope_jax.records import InputError, TrainState


def open_checkpoints(workdir, *, keep: int = 2) -> ocp.CheckpointManager:
    """Returns the manager of WORKDIR/checkpoints; the newest `keep` stay, saves are async."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(
        (pathlib.Path(workdir) / "checkpoints").absolute(), options=options
    )


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, data_state: dict[str, Any]
) -> None:
    """Saves the state after `step` training steps; returns as soon as the arrays are copied to the
    host.
    """
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
    )
    manager.save(step, args=items, force=True)


def restore(manager: ocp.CheckpointManager, state: TrainState, step: int | None = None):
    """Returns (state, data_state) of a checkpoint, or None if there is none.

    Args:
      manager: from `open_checkpoints`.
      state: gives shapes, dtypes and shardings; its values are not read.
      step: which checkpoint (default: the newest).
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
    found = manager.restore(step, args=items)
    return found["state"], found["data"]


def restore_params(workdir, params, step: int | None = None):
    """Returns the params of a workdir's checkpoint, without its optimizer state.

    Args:
      workdir: of a training run.
      params: gives the tree, shapes, dtypes and shardings.
      step: which checkpoint (default: the newest).
    Raises:
      InputError: the workdir holds no checkpoint, or not this one.
    """
    folder = pathlib.Path(workdir) / "checkpoints"
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
    manager.close()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(manager.directory / str(step) / "state", args=args)["params"]
