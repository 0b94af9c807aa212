"""Keys and values of the tokens already read.

A row's slots carry the POSITION of their token, -1 where nothing (or padding) was written. A query
sees exactly the slots with 0 <= slot position <= its own position, so one rule covers left-padded
prompts, right-padded completions and rows that stopped early:

    slot       0    1    2    3 |  4    5    6         prompt bucket N = 4, then completion slots
    row 0     -1   -1    0    1 |  2    3   -1         "-1": padding on the left, a row that ended
    on the right row 1      0    1    2    3 |  4    5    6
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    keys: jax.Array  # [layers, B, slots, kv_heads, head_dim]
    values: jax.Array  # [layers, B, slots, kv_heads, head_dim]
    positions: jax.Array  # [B, slots] int32, -1 = empty
    length: jax.Array  # [] int32, slots written so far = the next slot to write


def init_cache(num_layers, batch, slots, num_kv_heads, head_dim, dtype) -> KVCache:
    """Returns an empty cache; made inside the jitted program, it costs no donated copy."""
    shape = (num_layers, batch, slots, num_kv_heads, head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def repeat_rows(cache, repeats: int):
    """Returns the cache with every row repeated `repeats` times in place (row-major by prompt).

    Works on any cache whose arrays carry the batch on axis 1 (rank 5, as here), on axis 0 (rank 1
    to 4), or not at all (scalars), so a user's own model can bring its own cache.
    """

    def repeat(x):
        if x.ndim == 0:
            return x
        return jnp.repeat(x, repeats, axis=1 if x.ndim == 5 else 0)

    return jax.tree.map(repeat, cache)


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Returns [B, L] int32 positions of a [B, L] bool mask: 0, 1, .. on real tokens, -1 on padding.

    >>> import jax.numpy as jnp
    >>> positions_from_mask(jnp.array([[False, True, True]])).tolist()
    [[-1, 0, 1]]
    """
    return jnp.where(mask, jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, -1)
