"""Attention over one or several segments of keys.

Shapes: queries [B, L, heads, head_dim]; keys and values [B, kv_heads, S, head_dim]; query head h
reads kv head h // (heads / kv_heads); mask [B, L, S] bool. Scores and softmax are float32. A query
that sees nothing (padding) gets a finite value that nobody reads. A cache's keys and values may be
`Int8`, their scales [B, kv_heads, 1, S].

Decoding reads a cache (`attend`, `attend_segment`). A whole context that reads itself (training,
scoring, prefill) is `attend_context`, for which there are three back ends:

    xla      everywhere; long contexts go by blocks of queries, so that memory is linear in L
    splash   TPU: Pallas' block-sparse kernel, https://github.com/jax-ml/jax (splash_attention)
    cudnn    NVIDIA: cuDNN's fused kernel, bfloat16 and float16 only
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType, PartitionSpec

from scope_jax.models.int8 import Int8
from scope_jax.sharding import TRAINING, axis_for

BACKENDS = ("auto", "xla", "splash", "cudnn")
QUERY_BLOCK = 256  # queries whose scores exist at once, where "xla" goes by blocks
SPLASH_MIN_LENGTH = 256  # "auto" leaves shorter contexts to "xla"
SPLASH_BLOCK = 512  # largest; a multiple of the 128 lanes
LANES = 128
BATCH_AXES = ("data", "fsdp")  # as TRAINING.batch has them


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns [B, L, heads, head_dim] in the values' dtype (the queries', of `Int8` values)."""
    return _mix(jax.nn.softmax(_scores(q, k, mask), axis=-1), v, q.dtype)


# --- A whole context that reads itself ------------------------------------------------------------


def attend_context(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Causal attention of whole rows over themselves.

    Args:
      q: [B, L, heads, head_dim]; k, v: [B, kv_heads, L, head_dim].
      positions: [B, L] int32, -1 on padding; those of a row's real tokens increase from left to
        right. Padding may stand anywhere, on both sides and between.
      sliding_window: a token sees those at the last so many positions, itself included; back ends
        other than "xla" count real tokens, which is the same where positions have no gaps.
      backend: "auto" takes "splash" where the program is lowered for a TPU, "cudnn" on an NVIDIA
        GPU, and "xla" elsewhere or where those do not fit (`splash_fits`, `cudnn_fits`). A name
        takes that one wherever the program runs.
    Returns:
      [B, L, heads, head_dim] in the values' dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {backend!r}")
    run = {
        "xla": functools.partial(attend_by_blocks, sliding_window=sliding_window),
        "splash": functools.partial(attend_splash, sliding_window=sliding_window),
        "cudnn": functools.partial(attend_cudnn, sliding_window=sliding_window),
    }
    if backend != "auto":
        return run[backend](q, k, v, positions)
    fitting = {}
    if splash_fits(q):
        fitting["tpu"] = run["splash"]
    if cudnn_fits(q):
        fitting["cuda"] = run["cudnn"]
    if not fitting:
        return run["xla"](q, k, v, positions)
    return jax.lax.platform_dependent(q, k, v, positions, default=run["xla"], **fitting)


def context_mask(queries: jax.Array, keys: jax.Array, sliding_window: int | None) -> jax.Array:
    """Returns [B, L, S] bool: which keys' positions [B, S] each query's position [B, L] sees."""
    queries, keys = queries[:, :, None], keys[:, None, :]
    mask = (keys >= 0) & (keys <= queries)
    return mask if sliding_window is None else mask & (keys > queries - sliding_window)


def attend_by_blocks(q, k, v, positions, *, sliding_window=None, block=QUERY_BLOCK) -> jax.Array:
    """`attend`, from 2 * block queries on by blocks of them.

    The gradient computes a block's scores again, so neither pass holds [B, heads, L, L].
    """
    batch, length = positions.shape
    if length <= 2 * block:
        return attend(q, k, v, context_mask(positions, positions, sliding_window))
    padding = -length % block

    def split(x, fill):  # [B, L, ..] -> [blocks, B, block, ..]
        widths = [(0, padding if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(batch, -1, block, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def attend_block(of_block):
        q, queries = of_block
        return attend(q, k, v, context_mask(queries, positions, sliding_window))

    out = jax.lax.map(attend_block, (split(q, 0), split(positions, -1)))
    return out.swapaxes(0, 1).reshape(batch, length + padding, *q.shape[2:])[:, :length]


def splash_fits(q: jax.Array) -> bool:
    """Whether "auto" takes the TPU kernel.

    Not for contexts so short that padding would rule, nor for heads that are no multiple of half
    the 128 lanes: 64 is compiled for v5e (experiments/LOG.md), 80 and the like are not tried.
    """
    return q.shape[1] >= SPLASH_MIN_LENGTH and q.shape[3] % 64 == 0


def attend_splash(q, k, v, positions, *, sliding_window=None, interpret=False) -> jax.Array:
    """The TPU kernel on every device's rows and heads.

    A Pallas call cannot be partitioned by the compiler, so it runs under `shard_map` over the mesh
    that the arrays carry in their type: rows and heads lie as `sharding.TRAINING` has them. A mesh
    axis that does not divide them does not split them.

    Args:
      interpret: run the kernel's steps as plain JAX operations, on any platform, for tests.
    """
    body = functools.partial(_splash, sliding_window=sliding_window, interpret=interpret)
    mesh = jax.typeof(q).sharding.mesh
    auto = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not auto:
        return body(q, k, v, positions)

    rows, parts = (), 1
    for axis in BATCH_AXES:
        if axis in auto and q.shape[0] % (parts * auto[axis]) == 0:
            rows, parts = (*rows, axis), parts * auto[axis]
    heads = axis_for(k.shape[1], TRAINING.kv_heads, mesh)  # of every kv head all query heads
    by_row, by_head = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(by_row, by_head, by_head, PartitionSpec(rows)),
        out_specs=by_row,
        axis_names=set(auto),
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )(q, k, v, positions)


def _splash(q, k, v, positions, *, sliding_window, interpret) -> jax.Array:
    length, heads, head_dim = q.shape[1:]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    order = None
    if sliding_window is not None:  # the kernel's window counts columns
        order = _real_first(positions)
        q, k, v = _take(q, order, 1), _take(k, order, 2), _take(v, order, 2)
        positions = _take(positions, order, 1)
    blocks = -(-length // SPLASH_BLOCK)
    block = -(-length // (blocks * LANES)) * LANES
    padded = blocks * block
    pad = lambda x, axis: jnp.pad(  # noqa: E731
        x, [(0, padded - length if i == axis else 0) for i in range(x.ndim)]
    )
    # Padding is a segment of its own: it reads padding, so no query reads nothing (0 / 0).
    segment = pad((positions >= 0).astype(jnp.int32), 1)
    shape = (padded, padded)
    if sliding_window is not None:
        mask = splash_mask.LocalMask(shape, (sliding_window - 1, 0), offset=0)
    else:
        mask = splash_mask.CausalMask(shape)
    kernel = splash_kernel.make_splash_mha_single_device(
        mask=splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        interpret=interpret,
    )  # fmt: skip
    scaled = (q * head_dim**-0.5).astype(k.dtype).swapaxes(1, 2)  # [B, heads, L, head_dim]
    segments = splash_kernel.SegmentIds(q=segment, kv=segment)
    out: Any = jax.vmap(kernel)(pad(scaled, 2), pad(k, 2), pad(v, 2), segments)
    out = out[:, :, :length].swapaxes(1, 2)
    return out if order is None else _take(out, jnp.argsort(order, axis=1), 1)


def cudnn_fits(q: jax.Array) -> bool:
    """Whether "auto" takes cuDNN: it is there, and has kernels for this dtype and head size."""
    head_dim = q.shape[3]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # Tracing cuDNN's attention asks cuDNN for its version: no program for a GPU comes from a host
    # without one.
    return half and head_dim % 8 == 0 and head_dim <= 128 and jax.default_backend() == "gpu"


def attend_cudnn(
    q, k, v, positions, *, sliding_window=None, implementation: Any = "cudnn"
) -> jax.Array:
    """cuDNN's kernel; rows are moved so that their real tokens come first.

    Then the causal mask alone keeps padding out, and no [B, L, L] mask goes to the kernel, which
    would return a gradient of the same size for it.

    Args:
      implementation: "xla" runs the same call without a GPU, for tests.
    """
    order = _real_first(positions)
    q, k, v = (_take(x, order, 1) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation=implementation,
    )
    return _take(out, jnp.argsort(order, axis=1), 1)


def _real_first(positions: jax.Array) -> jax.Array:
    """Returns [B, L] int32: every row's columns, those of real tokens first, each in order."""
    return jnp.argsort(positions < 0, axis=1, stable=True)


def _take(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    """Returns x with its columns, on `axis`, in each row's order [B, L], a permutation."""

    def take(x: jax.Array, order: jax.Array) -> jax.Array:
        where: Any = (slice(None),) * (axis - 1) + (order,)
        return x.at[where].get(mode="promise_in_bounds", unique_indices=True)

    return jax.vmap(take)(x, order)


# --- Segments of a cache --------------------------------------------------------------------------


def attend_segment(q, k, v, mask) -> tuple[jax.Array, jax.Array]:
    """Attention over one segment of a query's keys, to be joined with others by `merge_segments`.

    Returns:
      ([B, L, heads, head_dim] float32, what `attend` gives for these keys alone; [B, L, heads]
      float32 log of the sum of exponentiated scores, the segment's weight).
    """
    scores = _scores(q, k, mask)  # [B, kv_heads, group, L, S]
    largest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    by_query = lambda x: x[..., 0].transpose(0, 3, 1, 2).reshape(q.shape[:3])  # noqa: E731
    total = by_query(weights.sum(-1, keepdims=True))
    # Divided after the product, which has fewer numbers; its sums are float32, for they could leave
    # the range of float16.
    out = _mix(weights, v, q.dtype, jnp.float32) / total[..., None]
    return out, by_query(largest) + jnp.log(total)


def merge_segments(first, second) -> jax.Array:
    """Joins two results of `attend_segment` into attention over all keys of both, float32."""
    (out1, lse1), (out2, lse2) = first, second
    share = jax.nn.sigmoid(lse1 - lse2)[..., None]  # exp(lse1) / (exp(lse1) + exp(lse2))
    return share * out1 + (1 - share) * out2


def _scores(q, k, mask) -> jax.Array:
    """Returns masked [B, kv_heads, group, L, S] float32."""
    batch, length, heads, head_dim = q.shape
    k, scale = _integers(k, q.dtype)
    q = q.reshape(batch, length, k.shape[1], heads // k.shape[1], head_dim)
    scores = jnp.einsum("blngk,bnsk->bngls", q, k, preferred_element_type=jnp.float32)
    return _masked(scores * (scale * head_dim**-0.5), mask)


def _integers(x, dtype):
    """Returns (keys or values, if `Int8` their integers in `dtype`, and the factor [B, kv_heads, 1,
    1, S] of scores or probabilities, 1 where there is none).
    """
    if not isinstance(x, Int8):
        return x, 1.0
    return x.values.astype(dtype), x.scale[:, :, None]


def _masked(scores, mask) -> jax.Array:
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _mix(probs, v, dtype, out_dtype=None) -> jax.Array:
    """Returns [B, L, heads, head_dim] in `out_dtype` (None: the values', or `dtype` if `Int8`)."""
    v, scale = _integers(v, dtype)
    # Probabilities first, in the order that the product has: asked for [B, L, ..] at once, einsum
    # would multiply transposed values by them, which takes a CPU up to four times as long.
    probs = (probs * scale).astype(v.dtype)
    out = jnp.einsum("bngls,bnsk->bnglk", probs, v, preferred_element_type=out_dtype)
    batch, kv_heads, group, length, head_dim = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head_dim)
