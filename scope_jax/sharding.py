"""Meshes, and which dimension of which array lies along which mesh axis.

Mesh axes: `data` (replicas of the weights), `fsdp` (weights split, gathered layer by layer),
`model` (tensor parallel). Arrays name their dimensions by LOGICAL axes (`embed`, `heads`, ...); a
`Rules` maps those to mesh axes.

Each process (of several: hosts.py) has its own rows of a batch on its host, the neighbouring ones
that its own devices hold. One process has them all.

    put_batch       this process's rows, numpy   ->  one array [B, ..] on the mesh
    own_rows        an array [B, ..]             ->  this process's rows, numpy
    replicate       what all processes have      ->  an array on every device
    fetch           any array                    ->  all of it, numpy, in every process
"""

import dataclasses
import functools
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
      devices: others than these, those of a TPU topology say (`jax.experimental.topologies`), to
        compile for.
    Raises:
      InputError: the sizes do not multiply to the number of devices, or part a batch shard's
      devices between hosts.
    """
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    on, devices = devices, len(devices or jax.devices())
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) == 1 and known > 0 and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if math.prod(sizes.values()) != devices or min(sizes.values()) < 1:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        near, left = {}, devices
        for axis in ("model", "fsdp"):
            near[axis] = math.gcd(max(sizes[axis], 1), left)
            left //= near[axis]
        raise InputError(
            f"mesh {text} does not match {devices} devices; one axis may be -1 (what is left), and "
            f"data={left}, fsdp={near['fsdp']}, model={near['model']} would"
        )
    # Auto axes: under Explicit ones (the default) gather and top_k on a sharded vocabulary raise.
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=on)
    return mesh if on or jax.process_count() == 1 else _in_order_of_hosts(mesh)


def _in_order_of_hosts(mesh: Mesh) -> Mesh:
    """Returns the mesh, with its devices in another order where a process's batch shards would not
    be neighbours: JAX follows the wires of a TPU slice, not the hosts.
    """
    if not jax.distributed.is_initialized():
        raise InputError(
            f"this is one of {jax.process_count()} hosts: set SCOPE_JAX_COORDINATOR=auto on each"
        )
    local, (_, fsdp, model) = jax.local_device_count(), mesh.devices.shape
    if local % model:
        model = max(m for m in range(1, model) if local % m == 0)
        fsdp = math.gcd(fsdp, mesh.size // model)
        raise InputError(
            f"mesh {dict(mesh.shape)} parts the model axis between hosts of {local} devices; "
            f"the nearest that does not: data={mesh.size // fsdp // model}, {fsdp=}, {model=}"
        )
    hosts = np.array([device.process_index for device in mesh.devices.flat]).reshape(-1, local)
    if (hosts == hosts[:, :1]).all():
        return mesh
    devices = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    devices = np.array(devices).reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def host_part(mesh: Mesh) -> tuple[int, int]:
    """Returns (k, n): this process has part k of the n equal parts of a batch's rows."""
    hosts = [device.process_index for device in mesh.devices.flat]
    own = hosts.count(jax.process_index())
    return hosts.index(jax.process_index()) // own, mesh.size // own


def make_meshes(*, decode_model: int = 0, devices=None, **sizes: int) -> tuple[Mesh, Mesh]:
    """Returns (`make_mesh`, its `decoding_mesh`) of a config's `mesh`."""
    mesh = make_mesh(**sizes, devices=devices)
    return mesh, decoding_mesh(mesh, decode_model)


def decoding_mesh(mesh: Mesh, model: int) -> Mesh:
    """Returns a mesh of the same devices for decoding, with `model` of them to a replica.

    An update is fastest with whole weights gathered layer by layer (`fsdp`); a decode step is too
    short for that and wants each device to hold its part of every layer (`model`). Arrays may go
    from one mesh to the other: the devices keep their order.

    Args:
      model: 0 returns the mesh as it is.
    Raises:
      InputError: the mesh's fsdp * model is no multiple, or hosts' devices are not.
    """
    if model == 0:
        return mesh
    weights = mesh.shape["fsdp"] * mesh.shape["model"]
    if weights % model:
        near = max(n for n in range(1, min(model, weights) + 1) if weights % n == 0)
        raise InputError(
            f"mesh.decode_model={model} does not divide the mesh's fsdp x model = {weights}; "
            f"{near} would"
        )
    local = mesh.size // len({device.process_index for device in mesh.devices.flat})
    if jax.process_count() > 1 and local % model:
        raise InputError(
            f"mesh.decode_model={model} would be parted between hosts of {local} devices; "
            f"{math.gcd(model, local)} would not"
        )
    shape = (mesh.shape["data"], weights // model, model)
    return Mesh(mesh.devices.reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)


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


def batch_shards(x) -> int:
    """Returns over how many devices the rows of an array (or a shape with a sharding) are split."""
    sharding = getattr(x, "sharding", None)
    return x.shape[0] // sharding.shard_shape(x.shape)[0] if sharding is not None else 1


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
                    f"{weight.axes} of shape {weight.shape}: {size} does not divide over "
                    f"{axis}={parts}; {axis}={math.gcd(size, parts)} would"
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map(one, declared, is_leaf=lambda x: hasattr(x, "axes"))


def put_batch(tree, mesh: Mesh, rules: Rules = TRAINING):
    """Copies this process's rows of host arrays [B / processes, ...] to the mesh, as one array
    [B, ...], its rows split over the batch axes.

    Raises:
      InputError: rows that the mesh does not divide.
    """
    place = _batch_place(mesh, rules)
    parts, processes = math.prod(mesh.shape[a] for a in _batch_axes(rules)), jax.process_count()

    def put(x):
        rows = x.shape[0] * processes
        if rows % parts:
            raise InputError(
                f"{rows} rows do not divide over the {parts} batch shards of the mesh "
                f"{dict(mesh.shape)}"
            )
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(place, x, (rows, *x.shape[1:]))

    with jax.transfer_guard_host_to_device("allow"):  # these copies are meant
        return jax.tree.map(put, tree)


def put_parts(tree, parts: int, mesh: Mesh, rules: Rules = TRAINING) -> list:
    """Cuts a batch into parts of neighbouring rows and copies each to the mesh, see `put_batch`.

    The parts are the same whatever the number of processes: rows then change hosts.

    Args:
      tree: host arrays [B / processes, ...].
    """
    if jax.process_count() == 1:
        return [put_batch(part, mesh, rules) for part in split_rows(tree, parts)]
    return _laid_out(_batch_place(mesh, rules), parts)(put_batch(tree, mesh, rules))


def split_rows(tree, parts: int) -> list:
    """Cuts arrays [B, ...] into parts of neighbouring rows."""
    size = jax.tree.leaves(tree)[0].shape[0] // parts
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], tree) for i in range(parts)]


def own_rows(tree, mesh: Mesh, rules: Rules = TRAINING):
    """Returns this process's rows of arrays [B, ...], as numpy [B / processes, ...]."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def own(x):  # each index once: devices of the model axis hold copies
        shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate(jax.device_get([shards[start] for start in sorted(shards)]))

    return jax.tree.map(own, _laid_out(_batch_place(mesh, rules))(tree))


def replicate(tree, mesh: Mesh):
    """Copies a tree to every device of the mesh; all processes have the same one."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def put(x):  # `device_put` would let the processes compare their values first
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x if x.sharding == everywhere else _laid_out(everywhere)(x)
        x = np.asarray(jax.device_get(x))
        return jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index])

    with jax.transfer_guard_host_to_device("allow"):  # these copies are meant
        return jax.tree.map(put, tree)


def fetch(tree):
    """Returns whole arrays as numpy, in every process; all must call it."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return _laid_out(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)

    return jax.device_get(jax.tree.map(whole, tree))


@functools.cache
def _laid_out(place: NamedSharding, parts: int = 0):
    """Returns a program that copies arrays, or their parts, to other places of their mesh."""
    return jax.jit(lambda tree: split_rows(tree, parts) if parts else tree, out_shardings=place)


def _batch_axes(rules: Rules) -> tuple[str, ...]:
    return (rules.batch,) if isinstance(rules.batch, str) else rules.batch or ()


def _batch_place(mesh: Mesh, rules: Rules) -> NamedSharding:
    return NamedSharding(mesh, spec(("batch",), rules))
