"""Attention over one or several segments of keys.

Shapes: queries [B, L, heads, head_dim]; keys and values [B, kv_heads, S, head_dim]; query head h
reads kv head h // (heads / kv_heads); mask [B, L, S] bool. Scores and softmax are float32. A query
that sees nothing (padding) gets a finite value that nobody reads. A cache's keys and values may be
`Int8`, their scales [B, kv_heads, 1, S].

Decoding reads a cache (`attend`, `attend_segment`). A whole context that reads itself (training,
scoring, prefill) is `attend_context`, for which there are three back ends:

    xla      everywhere; no scores are stored for the gradient, and long contexts go by blocks of
             queries, so that memory is linear in L
    splash   TPU: Pallas' block-sparse kernel, https://github.com/jax-ml/jax (splash_attention)
    cudnn    NVIDIA: cuDNN's fused kernel, bfloat16 and float16 only
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType, PartitionSpec

from scope_jax.models.int8 import Int8
from scope_jax.sharding import TRAINING, axis_for, batch_axes

BACKENDS = ("auto", "xla", "splash", "cudnn")
QUERY_BLOCK = 256  # queries whose scores exist at once, where "xla" goes by blocks
SPLASH_MIN_LENGTH = 256  # "auto" leaves shorter contexts to "xla"
SPLASH_BLOCK = 512  # largest; a multiple of the 128 lanes
LANES = 128
ATTENDED = "attended"  # name of what the gradient of attention needs beside queries, keys, values


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
    key_positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Causal attention of whole rows, or of their last L tokens, over the rows.

    Args:
      q: [B, L, heads, head_dim]; k, v: [B, kv_heads, S, head_dim], of which the last L are the
        queries' own.
      positions: [B, L] int32, -1 on padding; those of a row's real tokens increase from left to
        right. Padding may stand anywhere, on both sides and between.
      key_positions: [B, S] int32; None where S = L.
      segments: [B, L] int32, where S = L: tokens see those of their own segment. A segment's real
        tokens stand side by side; positions increase within it, padding is in segment -1. "cudnn"
        has none.
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
    if segments is not None and (backend == "cudnn" or key_positions is not None):
        raise ValueError(
            'packed rows need attention "auto", "xla" or "splash": cuDNN\'s has no segments'
            if backend == "cudnn"
            else "segments are of rows that read nothing but themselves: key_positions must be None"
        )
    if key_positions is None:
        key_positions = positions
    earlier = k.shape[2] - q.shape[1]

    def square(kernel):  # of as many queries as keys: those of the earlier keys are made up
        def run(q, k, v, positions, key_positions, *segments):
            del positions
            q = jnp.pad(q, ((0, 0), (earlier, 0), (0, 0), (0, 0)))
            out = kernel(q, k, v, key_positions, *segments, sliding_window=sliding_window)
            return out[:, earlier:]

        return run

    run = {
        "xla": functools.partial(attend_by_blocks, sliding_window=sliding_window),
        "splash": square(attend_splash),
        "cudnn": square(attend_cudnn),
    }
    inputs = (q, k, v, positions, key_positions) + (() if segments is None else (segments,))
    if backend != "auto":
        return run[backend](*inputs)
    fitting = {}
    if splash_fits(q):
        fitting["tpu"] = run["splash"]
    if segments is None and cudnn_fits(q):
        fitting["cuda"] = run["cudnn"]
    if not fitting:
        return run["xla"](*inputs)
    return jax.lax.platform_dependent(*inputs, default=run["xla"], **fitting)


def context_mask(
    queries: jax.Array,
    keys: jax.Array,
    sliding_window: int | None,
    of_queries: Any = None,
    of_keys: Any = None,
) -> jax.Array:
    """Returns [B, L, S] bool: which keys' positions [B, S] each query's position [B, L] sees; with
    the segments of both, [B, L] and [B, S], those of its own only.
    """
    queries, keys = queries[:, :, None], keys[:, None, :]
    mask = (keys >= 0) & (keys <= queries)
    if of_queries is not None:
        mask &= of_queries[:, :, None] == of_keys[:, None, :]
    return mask if sliding_window is None else mask & (keys > queries - sliding_window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_by_blocks(
    q, k, v, positions, key_positions, segments=None, sliding_window=None, block=QUERY_BLOCK
) -> jax.Array:
    """`attend` that saves no scores: the gradient computes them again.

    From 2 * block queries on it goes by blocks of them, and neither pass holds [B, heads, L, S].
    """
    return _forward(q, k, v, positions, key_positions, segments, sliding_window, block)[0]


def _forward(q, k, v, positions, key_positions, segments, sliding_window, block):
    def attend_block(q, queries, of_queries):
        mask = context_mask(queries, key_positions, sliding_window, of_queries, segments)
        scores = _scores_by_head(_by_head(q, k.shape[1]), k, mask)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = _f32("bnls,bnsd->bnld", weights.astype(v.dtype), v) / total
        return _by_query(out, q.shape[1]).astype(v.dtype), (largest + jnp.log(total))[..., 0]

    blocks = _split(q, block), *_split_places(positions, segments, block)
    if len(blocks[0]) == 1:
        alone = jax.tree.map(lambda x: x[0], blocks)
        out, log_total = jax.tree.map(lambda x: x[None], attend_block(*alone))
    else:
        out, log_total = jax.lax.map(lambda x: attend_block(*x), blocks)
    # A layer that is computed again in the backward pass may keep these two, see transformer.py.
    out = checkpoint_name(_joined(out, q.shape[1]), ATTENDED)
    log_total = checkpoint_name(log_total, ATTENDED)  # [blocks, B, kv_heads, group * block]
    return out, (q, k, v, positions, key_positions, segments, out, log_total)


def _backward(sliding_window, block, saved, of_out):
    """FlashAttention's gradient (https://arxiv.org/abs/2205.14135, algorithm 4), query blocks."""
    q, k, v, positions, key_positions, segments, out, log_total = saved
    split = functools.partial(_split, block=block)

    def one_block(of_k_and_v, x):
        q, queries, of_queries, out, log_total, of_out = x
        q, length = _by_head(q, k.shape[1]), q.shape[1]
        mask = context_mask(queries, key_positions, sliding_window, of_queries, segments)
        probs = jnp.exp(_scores_by_head(q, k, mask) - log_total[..., None])
        out, of_out = _by_head(out, k.shape[1]), _by_head(of_out, k.shape[1])
        along = (out.astype(jnp.float32) * of_out.astype(jnp.float32)).sum(-1, keepdims=True)
        of_scores = probs * (_f32("bnld,bnsd->bnls", of_out, v) - along)
        of_scores = jnp.where(_for_heads(mask, q), of_scores * q.shape[-1] ** -0.5, 0.0)
        of_scores = of_scores.astype(q.dtype)
        of_k, of_v = of_k_and_v
        of_k += _f32("bnls,bnld->bnsd", of_scores, q)
        of_v += _f32("bnls,bnld->bnsd", probs.astype(v.dtype), of_out)
        of_q = _by_query(_f32("bnls,bnsd->bnld", of_scores, k), length)
        return (of_k, of_v), of_q.astype(q.dtype)

    places = _split_places(positions, segments, block)
    x = (split(q), *places, split(out), log_total, split(of_out))
    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (of_k, of_v), of_q = jax.lax.scan(one_block, start, x, unroll=len(log_total) == 1)
    gradients = _joined(of_q, q.shape[1]), of_k.astype(k.dtype), of_v.astype(v.dtype)
    return *gradients, None, None, None


attend_by_blocks.defvjp(_forward, _backward)


def _split_places(positions, segments, block: int):
    """Returns the queries' positions and their segments, if any, as `_split` does."""
    split = functools.partial(_split, block=block, fill=-1)
    return split(positions), None if segments is None else split(segments)


def _split(x, block: int, fill=0):
    """[B, L, ..] -> [blocks, B, block, ..]; one block of L where it has less than two."""
    length = x.shape[1]
    if length <= 2 * block:
        return x[None]
    widths = [(0, -length % block if axis == 1 else 0) for axis in range(x.ndim)]
    x = jnp.pad(x, widths, constant_values=fill)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)


def _joined(x, length: int):
    """[blocks, B, block, ..] -> [B, L, ..]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _by_head(q, kv_heads: int):
    """[B, L, heads, head_dim] -> [B, kv_heads, group * L, head_dim]: a product of matrices."""
    batch, length, _, head_dim = q.shape
    q = q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, kv_heads, -1, head_dim)


def _by_query(x, length: int):
    """[B, kv_heads, group * L, head_dim] -> [B, L, heads, head_dim]."""
    batch, kv_heads, _, head_dim = x.shape
    x = x.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, -1, head_dim)


def _for_heads(mask, q):
    """[B, L, S] -> [B, 1, group * L, S]."""
    return jnp.tile(mask, (1, q.shape[2] // mask.shape[1], 1))[:, None]


def _scores_by_head(q, k, mask):
    """Returns masked [B, kv_heads, group * L, S] float32."""
    scores = _f32("bnld,bnsd->bnls", q, k) * q.shape[-1] ** -0.5
    return jnp.where(_for_heads(mask, q), scores, jnp.finfo(jnp.float32).min)


def _f32(equation: str, *x):
    return jnp.einsum(equation, *x, preferred_element_type=jnp.float32)


def splash_fits(q: jax.Array) -> bool:
    """Whether "auto" takes the TPU kernel.

    Not for contexts so short that padding would rule, nor for heads that are no multiple of half
    the 128 lanes: 64 is compiled for v5e (experiments/LOG.md), 80 and the like are not tried.
    """
    return q.shape[1] >= SPLASH_MIN_LENGTH and q.shape[3] % 64 == 0


def attend_splash(
    q, k, v, positions, segments=None, *, sliding_window=None, interpret=False
) -> jax.Array:
    """The TPU kernel on every device's rows and heads.

    A Pallas call cannot be partitioned by the compiler, so it runs under `shard_map` over the mesh
    that the arrays carry in their type: rows and heads lie as `sharding.TRAINING` has them. A mesh
    axis that does not divide them does not split them.

    Args:
      interpret: run the kernel's steps as plain JAX operations, on any platform, for tests.
    """
    if segments is None:  # all real tokens in one
        segments = jnp.where(positions >= 0, 0, -1)
    body = functools.partial(_splash, sliding_window=sliding_window, interpret=interpret)
    mesh, rows = batch_axes(q)
    auto = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not auto:
        return body(q, k, v, segments)

    heads = axis_for(k.shape[1], TRAINING.kv_heads, mesh)  # of every kv head all query heads
    by_row, by_head = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(by_row, by_head, by_head, PartitionSpec(rows)),
        out_specs=by_row,
        axis_names=auto,
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )(q, k, v, segments)


def _splash(q, k, v, segments, *, sliding_window, interpret) -> jax.Array:
    length, heads, head_dim = q.shape[1:]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    order = None
    if sliding_window is not None:  # the kernel's window counts columns
        order = _real_first(segments)
        q, k, v = _take(q, order, 1), _take(k, order, 2), _take(v, order, 2)
        segments = _take(segments, order, 1)
    blocks = -(-length // SPLASH_BLOCK)
    block = -(-length // (blocks * LANES)) * LANES
    padded = blocks * block
    pad = lambda x, axis: jnp.pad(  # noqa: E731
        x, [(0, padded - length if i == axis else 0) for i in range(x.ndim)]
    )
    # Padding is a segment of its own: it reads padding, so no query reads nothing (0 / 0).
    segment = pad(segments + 1, 1)
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
        residual_checkpoint_name=ATTENDED,
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


def _real_first(places: jax.Array) -> jax.Array:
    """Returns [B, L] int32: every row's columns, those of real tokens first, each in order; of the
    positions, or segments, of tokens.
    """
    return jnp.argsort(places < 0, axis=1, stable=True)


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
