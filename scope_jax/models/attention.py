"""Attention over one or several segments of keys.

Shapes: queries [B, L, heads, head_dim]; keys and values [B, kv_heads, S, head_dim]; query head h
reads kv head h // (heads / kv_heads); mask [B, L, S] bool. Scores and softmax are float32. A query
that sees nothing (padding) gets a finite value that nobody reads.
"""

import jax
import jax.numpy as jnp


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [B, L, heads, head_dim] in the values' dtype."""
    probs = jax.nn.softmax(_scores(q, k, mask), axis=-1).astype(v.dtype)
    return _mix(probs, v)


def attend_segment(q, k, v, mask, *, as_loops: bool = False) -> tuple[jax.Array, jax.Array]:
    """Attention over one segment of a query's keys, to be joined with others by `merge_segments`.

    Args:
      as_loops: multiply and sum instead of matrix products: three times faster on a CPU where a
        few queries read each key, for there is nothing to reuse and much to call and pack.
    Returns:
      ([B, L, heads, head_dim] float32, what `attend` gives for these keys alone; [B, L, heads]
      float32 log of the sum of exponentiated scores, the segment's weight).
    """
    batch, length, heads, head_dim = q.shape
    if as_loops:
        q = q.reshape(batch, length, k.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
        scores = (q[:, :, :, :, None] * k[:, :, None, None]).astype(jnp.float32).sum(-1)
        scores = _masked(scores * head_dim**-0.5, mask)
    else:
        scores = _scores(q, k, mask)
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)  # [B, kv_heads, group, L, S]
    total = weights.sum(-1, keepdims=True)
    if as_loops:
        mixed = (weights[..., None] * v[:, :, None, None].astype(jnp.float32)).sum(-2) / total
        out = mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)
    else:
        out = _mix((weights / total).astype(v.dtype), v).astype(jnp.float32)
    lse = (largest + jnp.log(total))[..., 0]  # [B, kv_heads, group, L]
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, length, heads)


def merge_segments(first, second) -> jax.Array:
    """Joins two results of `attend_segment` into attention over all keys of both, float32."""
    (out1, lse1), (out2, lse2) = first, second
    share = jax.nn.sigmoid(lse1 - lse2)[..., None]  # exp(lse1) / (exp(lse1) + exp(lse2))
    return share * out1 + (1 - share) * out2


def _scores(q, k, mask) -> jax.Array:
    """Returns masked [B, kv_heads, group, L, S] float32."""
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, k.shape[1], heads // k.shape[1], head_dim)
    scores = jnp.einsum("blngk,bnsk->bngls", q, k, preferred_element_type=jnp.float32)
    return _masked(scores * head_dim**-0.5, mask)


def _masked(scores, mask) -> jax.Array:
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _mix(probs, v) -> jax.Array:
    out = jnp.einsum("bngls,bnsk->blngk", probs, v)
    batch, length, kv_heads, group, head_dim = out.shape
    return out.reshape(batch, length, kv_heads * group, head_dim)
