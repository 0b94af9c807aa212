"""Meshes, and which dimension of which array lies along which mesh axis.

Mesh axes: `data` (replicas of the weights), `fsdp` (weights split, gathered layer by layer),
`model` (tensor parallel). Arrays name their dimensions by LOGICAL axes (`embed`, `heads`, ...); a
`Rules` maps those to mesh axes.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from scope_jax.records import InputError


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis (None: replicated)."""

    batch: tuple[str, ...] | str | None = ("data", "fsdp")
    embed: str | None = "fsdp"
    heads: str | None = "model"
    kv_heads: str | None = "model"
    mlp: str | None = "model"
    vocab: str | None = "model"
    layers: str | None = None


TRAINING = Rules()
# Weights stay where they are multiplied: a step reads every weight once, for few tokens, and to
# gather them from `fsdp` would take longer than to read them.
DECODING = Rules(embed=None)


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, *, devices=None) -> Mesh:
    """Returns a mesh over all devices; -1 takes the devices that the other axes leave.

    Args:
      devices: others than this process's, those of a TPU topology say (`jax.experimental
        .topologies`), to compile for.
    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    on, devices = devices, len(devices or jax.devices())
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) == 1 and known > 0 and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if math.prod(sizes.values()) != devices or min(sizes.values()) < 1:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"mesh {text} does not match {devices} devices; one axis may be -1 (what is left)"
        )
    # Auto axes: under Explicit ones (the default) gather and top_k on a sharded vocabulary raise.
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=on)


def axis_for(size: int, axis: str | None, mesh: Mesh | AbstractMesh) -> str | None:
    """Returns the mesh axis if there is one that divides `size`, else None (replicated)."""
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def batch_axes(x: jax.Array) -> tuple[AbstractMesh, tuple[str, ...]]:
    """Returns the mesh that an array carries in its type, and the axes that may split its rows: the
    batch axes of training as far as their sizes divide x.shape[0]. No mesh, no axes.
    """
    mesh, rows, parts = jax.typeof(x).sharding.mesh, (), 1
    auto = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]
    for axis in TRAINING.batch or ():
        if axis in auto and x.shape[0] % (parts * mesh.shape[axis]) == 0:
            rows, parts = (*rows, axis), parts * mesh.shape[axis]
    return mesh, rows


def spec(axes: tuple[str | None, ...], rules: Rules = TRAINING) -> PartitionSpec:
    """Returns the partition of an array with these logical axes.

    >>> tuple(spec(("embed", "heads", None)))
    ('fsdp', 'model', None)

    Raises:
      InputError: an unknown logical axis, or two dimensions that would lie on one mesh axis.
    """
    known = {field.name for field in dataclasses.fields(rules)}
    if unknown := [a for a in axes if a is not None and a not in known]:
        raise InputError(f"unknown logical axes {unknown}: known are {sorted(known)}")
    mapped = [None if a is None else getattr(rules, a) for a in axes]
    flat = [
        m
        for entry in mapped
        for m in (entry if isinstance(entry, tuple) else (entry,))
        if m is not None
    ]
    if len(flat) != len(set(flat)):
        raise InputError(f"logical axes {axes} collide: they map to mesh axes {mapped}")
    return PartitionSpec(*mapped)


def shardings(declared, mesh: Mesh, rules: Rules = TRAINING):
    """Returns the tree of shardings for a tree of weights, anything with `shape` and `axes`.

    Raises:
      InputError: a dimension that its mesh axis does not divide.
    """

    def one(weight):
        partition = spec(weight.axes, rules)
        for size, axis in zip(weight.shape, partition, strict=True):
            parts = mesh.shape[axis] if isinstance(axis, str) else 1
            if size % parts:
                raise InputError(
                    f"{weight.axes} of shape {weight.shape}: "
                    f"{size} does not divide over {axis}={parts}"
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map(one, declared, is_leaf=lambda x: hasattr(x, "axes"))


def put_batch(tree, mesh: Mesh, rules: Rules = TRAINING):
    """Copies host arrays [B, ...] to the mesh, their rows split over its batch axes.

    Raises:
      InputError: rows that the mesh does not divide.
    """
    partition = spec(("batch",), rules)
    axes = (rules.batch,) if isinstance(rules.batch, str) else rules.batch or ()
    parts = math.prod(mesh.shape[axis] for axis in axes)

    def put(x):
        if x.shape[0] % parts:
            raise InputError(
                f"{x.shape[0]} rows do not divide over the {parts} batch shards of the mesh "
                f"{dict(mesh.shape)}"
            )
        return jax.device_put(np.asarray(x), NamedSharding(mesh, partition))

    return jax.tree.map(put, tree)


def replicate(tree, mesh: Mesh):
    """Copies a tree to every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
