"""Keys and values of the tokens already read.

A row's slots carry the POSITION of their token, -1 where nothing (or padding) was written. A query
sees exactly the slots with 0 <= slot position <= its own position, so one rule covers left-padded
prompts, right-padded completions, rows that stopped early and rows that began late:

    slot       0    1    2    3 |  4    5    6         prompt bucket N = 4, then completion slots
    row 0     -1   -1    0    1 |  2    3   -1         "-1": padding on the left, a row that ended
    row 1      0    1    2    3 |  4    5    6

While decoding, the prompts are kept apart (`SharedPrompts`), once for all rows of a group, and the
slots hold completions only. Slot `length` is the next one of EVERY row; a row that takes the place
of an ended one starts there, and what the old row left is hidden behind position -1:

    slot       0    1    2    3    4    5    6
    row 0      4    5    6    7    8   -1   -1         its prompt had 4 tokens
    row 1     -1   -1   -1    6    7   -1   -1         a new row since slot 3; length = 5
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from scope_jax.models.int8 import Int8, over_slots, quantise_cache

Arrays = tuple[jax.Array | Int8, ...]  # one per block of layers, see transformer.py


@struct.dataclass
class SharedPrompts:
    """Keys and values of P prompts, each read by all the rows that complete it.

    `lanes` lists the rows of each prompt (the number of rows = none), `lane` is where in the
    flattened `lanes` each row stands: queries are gathered by prompt, so that no key is copied.
    A batch shard of a mesh holds its rows' prompts, and D of them count each for itself (numbers
    start at 0 in every shard): so nothing is gathered from another device.
    """

    keys: Arrays  # [block, P, kv_heads, N, head_dim]
    values: Arrays  # [block, P, kv_heads, N, head_dim]
    positions: jax.Array  # [P, N] int32, -1 = padding
    lanes: jax.Array  # [D, P / D, L] int32
    lane: jax.Array  # [D, B / D] int32


@struct.dataclass
class KVCache:
    keys: Arrays  # [block, B, kv_heads, slots, head_dim]
    values: Arrays  # [block, B, kv_heads, slots, head_dim]
    positions: jax.Array  # [B, slots] int32, -1 = empty
    length: jax.Array  # [] int32, slots written so far = the next slot to write
    prompts: SharedPrompts | None = None
    # [positions, head_dim / 2] float32 each, `Transformer.turns`: a decode loop looks cosines and
    # sines up, where XLA would compute them again for every head of every layer. None = computed.
    turns: tuple[jax.Array, jax.Array] | None = None


def init_cache(blocks, batch, slots, num_kv_heads, head_dim, dtype) -> KVCache:
    """Returns an empty cache; made inside the jitted program, it costs no donated copy.

    Args:
      blocks: layers in each block of the model's weights.
    """

    def zeros(layers):
        x = jnp.zeros((layers, batch, num_kv_heads, slots, head_dim), dtype)
        return x if dtype != jnp.int8 else Int8(x, jnp.zeros((*x.shape[:3], 1, slots)))

    return KVCache(
        keys=tuple(zeros(layers) for layers in blocks),
        values=tuple(zeros(layers) for layers in blocks),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def in_row_major_order(x: jax.Array) -> jax.Array:
    """Keeps the order of a cache in memory as its shape says.

    XLA would choose another for the loop, after the one column that it writes (the batch next to
    last: 64 rows in place of one), and then copy the cache into the loop and out of it, and each
    layer's part at each step, for the attention reads it in this order.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def write_tokens(cache, new: jax.Array, layer: jax.Array, slot: jax.Array):
    """Returns a block's keys or values with a layer's new ones [B, kv_heads, L, head_dim] from
    `slot` on, quantised where the cache is.
    """

    def write(x, new, axis):
        at = [jnp.int32(0)] * x.ndim
        at[0], at[axis] = layer, slot
        return in_row_major_order(jax.lax.dynamic_update_slice(x, new[None], at))

    return over_slots(write, cache, quantise_cache(new) if isinstance(cache, Int8) else new)


def move_rows(cache: KVCache, rows: jax.Array, first: jax.Array, slots: int) -> KVCache:
    """Returns the cache of some rows with another number of slots, of which slot 0 was `first`.

    Args:
      rows: [D, B' / D] int32, see `take_in_shards`.
      first: [] int32; older slots are dropped (no row may need them).
      slots: more or fewer than now; cache.length - first of them are taken.
    """

    def move(x, slot_axis, axis=1, fill=0):  # the batch axis is `axis`
        x = take_in_shards(x, rows, axis=axis)
        x = jnp.roll(x, -first, axis=slot_axis)
        have = x.shape[slot_axis]
        if slots <= have:
            return jax.lax.slice_in_dim(x, 0, slots, axis=slot_axis)
        padding = [(0, slots - have if i == slot_axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, padding, constant_values=fill)

    length = cache.length - first
    positions = move(cache.positions, 1, axis=0, fill=-1)
    positions = jnp.where(jnp.arange(slots)[None, :] < length, positions, -1)
    return dataclasses.replace(
        cache,
        keys=tuple(over_slots(move, x) for x in cache.keys),
        values=tuple(over_slots(move, x) for x in cache.values),
        positions=positions,
        length=length,
    )


def take_in_shards(x: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """Takes entries of an axis that consists of D shards, each from its own shard.

    On a mesh nothing leaves its device, where `jnp.take` would gather x from all of them.

    Args:
      rows: [D, n] int32, numbers within the shard, clipped.
    Returns:
      x with D * n entries on that axis.
    """
    count = rows.shape[0]
    if count == 1:
        return jnp.take(x, rows[0], axis=axis, mode="clip")
    parts = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    take = functools.partial(jnp.take, axis=axis, mode="clip")
    taken = jax.vmap(take, in_axes=(axis, 0), out_axes=axis)(parts, rows)
    return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def put_in_shards(x: jax.Array, new: jax.Array, rows: jax.Array, axis: int = 0) -> jax.Array:
    """Puts entries where `take_in_shards` would take them; a number beyond the shard puts nothing.

    Args:
      new: like x, with D * n entries on that axis.
      rows: [D, n] int32, numbers within the shard.
    """
    shape, cut = x.shape, lambda x: x.reshape(*x.shape[:axis], len(rows), -1, *x.shape[axis + 1 :])

    def put(part, new, rows):  # the shards' axis is gone: `axis` is that of the entries
        return part.at[(slice(None),) * axis + (rows,)].set(new, mode="drop")

    put = jax.vmap(put, in_axes=(axis, axis, 0), out_axes=axis)
    return put(cut(x), cut(new), rows).reshape(shape)


def take_rows(cache, rows: jax.Array):
    """Returns some rows of any cache whose arrays carry the batch on axis 1 (rank 5), on axis 0
    (rank 1 to 4), or not at all (scalars), so that a user's own model can bring its own cache.
    """

    def take(x):
        return x if x.ndim == 0 else jnp.take(x, rows, axis=1 if x.ndim == 5 else 0)

    return jax.tree.map(take, cache)


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Returns [B, L] int32 positions of a [B, L] bool mask: 0, 1, .. on real tokens, -1 on padding.

    >>> import jax.numpy as jnp
    >>> positions_from_mask(jnp.array([[False, True, True]])).tolist()
    [[-1, 0, 1]]
    """
    return jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, -1)
