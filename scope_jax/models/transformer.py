"""One pure forward for the Llama, Mistral, Qwen2 and Qwen3 families.

Parameters are a plain nested dict; the arrays of all layers are stacked on a leading `layers` axis
and the forward scans over it (traces several times faster than a Python loop, and the KV cache
stays in the scan's carry, in place). Every weight is declared once, in `declare`: shape, logical
axes, initializer, and its Hugging Face name follow from that line.

The protocol that the samplers, losses and PRMs ask of any model (this class is one instance of it):

    hidden, cache = model(params, tokens [B, L], positions=[B, L] (-1 on padding), cache=None |
    cache) model.unembed(params) -> [D, V]          logits = hidden @ unembed
    model.init_cache(batch, slots) -> cache  any pytree

and for an update on packed rows (packing.py): model(.., segments=[B, L]) without a cache.
The object itself must be hashable: it is a static argument of jit.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from scope_jax.models.attention import (
    ATTENDED,
    attend,
    attend_context,
    attend_segment,
    context_mask,
    merge_segments,
)
from scope_jax.models.kv_cache import (
    KVCache,
    SharedPrompts,
    init_cache,
    take_in_shards,
    write_tokens,
)
from scope_jax.models.lora import LoRA, adapt, declare_lora, merge, product

Params = dict[str, Any]
PRODUCT = "product"  # name of the linear maps' results that a backward pass may keep

REMAT: dict[str, Any] = {
    "none": None,  # nothing: every activation is stored
    # Layers, from their inputs; but attention's results are stored (splash, "xla").
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    # Norms, SiLU and the like alone: every product's result is stored.
    "products": jax.checkpoint_policies.save_only_these_names(ATTENDED, PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,  # whole layers
}


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretched rotary positions, see `rotary_frequencies`."""

    factor: float  # slow rotations get so many times slower
    low_freq_factor: float  # those that turn fewer times in the original context are slow
    high_freq_factor: float  # those that turn more often stay as they are
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    rope_scaling: Llama3Rope | None = None  # Llama 3.1 and later
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm of every head's query and key, before the rotation
    sliding_window: int | None = None  # Mistral: a token sees so many, itself included
    tie_embeddings: bool = False
    max_position: int = 4096  # longest context that the weights were made for
    dtype: str = "float32"  # of the computation; softmax, norms and rotary angles stay float32
    remat: str = "none"  # what the backward pass computes again: see REMAT
    cache_dtype: str = ""  # of keys and values: "" = the computation's | "int8"
    attention: str = "auto"  # of whole contexts: "xla" | "splash" | "cudnn", "auto" by platform
    lora: LoRA | None = None  # of params that hold "lora"


@dataclasses.dataclass(frozen=True)
class Weight:
    """The one declaration of a weight. A leading `layers` axis: one array for all layers."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axis of each dimension, see sharding.py
    init: str  # "normal" (scaled by fan-in), "ones" or "zeros"
    hf: str  # Hugging Face name; "{i}" is the layer
    in_dims: int = 0  # dims (after `layers`) that a linear map sums over; HF stores [out, in]

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


def declare(c: TransformerConfig) -> dict[str, Any]:
    """Returns the tree of `Weight` declarations; params are the same tree of arrays."""
    n, d, f, v, hd = c.num_layers, c.embed_dim, c.mlp_dim, c.vocab_size, c.head_dim
    h, k = (c.num_heads, "heads"), (c.num_kv_heads, "kv_heads")

    def block(name, shape, axes, init="normal", in_dims=0):
        return Weight((n, *shape), ("layers", *axes), init, "model.layers.{i}." + name, in_dims)

    def qkv(name, heads, axis):
        linear = f"self_attn.{name}_proj"
        weight = {"w": block(f"{linear}.weight", (d, heads, hd), ("embed", axis, None), in_dims=1)}
        if c.qkv_bias:
            weight["b"] = block(f"{linear}.bias", (heads, hd), (axis, None), "zeros")
        if c.qk_norm and name != "v":
            weight["norm"] = block(f"self_attn.{name}_norm.weight", (hd,), (None,), "ones")
        return weight

    layers = {
        "attn_norm": block("input_layernorm.weight", (d,), (None,), "ones"),
        "q": qkv("q", *h),
        "k": qkv("k", *k),
        "v": qkv("v", *k),
        "o": block("self_attn.o_proj.weight", (h[0], hd, d), ("heads", None, "embed"), in_dims=2),
        "mlp_norm": block("post_attention_layernorm.weight", (d,), (None,), "ones"),
        "gate": block("mlp.gate_proj.weight", (d, f), ("embed", "mlp"), in_dims=1),
        "up": block("mlp.up_proj.weight", (d, f), ("embed", "mlp"), in_dims=1),
        "down": block("mlp.down_proj.weight", (f, d), ("mlp", "embed"), in_dims=1),
    }
    tree: dict[str, Any] = {
        "embed": Weight((v, d), ("vocab", "embed"), "normal", "model.embed_tokens.weight"),
        "layers": layers,
        "final_norm": Weight((d,), (None,), "ones", "model.norm.weight"),
    }
    if not c.tie_embeddings:
        tree["unembed"] = Weight((d, v), ("embed", "vocab"), "normal", "lm_head.weight", 1)
    if c.lora is not None:
        tree["lora"] = declare_lora(layers, c.lora)
    return tree


def init_weight(weight: Weight, key: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Returns a fresh array; linear maps have variance 1 / fan-in, embeddings deviation 0.02."""
    if weight.init != "normal":
        return (jnp.ones if weight.init == "ones" else jnp.zeros)(weight.shape, dtype)
    start = int(weight.stacked)
    fan_in = math.prod(weight.shape[start : start + weight.in_dims])
    std = fan_in**-0.5 if weight.in_dims else 0.02
    return (std * jax.random.normal(key, weight.shape)).astype(dtype)


def init_params(declared, key: jax.Array, dtype=jnp.float32) -> Params:
    """Returns random params for a tree of declarations."""
    leaves, treedef = jax.tree.flatten(declared, is_leaf=lambda x: isinstance(x, Weight))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([init_weight(w, k, dtype) for w, k in zip(leaves, keys, strict=True)])


def init_lora(c: TransformerConfig, key: jax.Array) -> Params:
    """Returns params["lora"] of a model that still is its base: A random, B zero, float32."""
    return init_params(declare(c)["lora"], key)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder: RMSNorm, rotary positions, grouped-query attention, gated SiLU MLP."""

    config: TransformerConfig
    blocks: tuple[int, ...] = ()  # layers in each block of weights; () = all in one

    def init(self, key: jax.Array, dtype=jnp.float32) -> Params:
        return init_params(declare(self.config), key, dtype)

    def init_cache(self, batch: int, slots: int) -> KVCache:
        c = self.config
        blocks = self.blocks or (c.num_layers,)
        dtype = jnp.dtype(c.cache_dtype or c.dtype)
        return init_cache(blocks, batch, slots, c.num_kv_heads, c.head_dim, dtype)

    def unembed(self, params: Params) -> jax.Array:
        """Returns [D, V]."""
        tied = self.config.tie_embeddings and not self.blocks
        return params["embed"].T if tied else params["unembed"]

    def turns(self, length: int) -> tuple[jax.Array, jax.Array]:
        """Returns `rotary_turns` of the positions 0 .. length - 1, for `KVCache.turns`."""
        c = self.config
        cos, sin = rotary_turns(jnp.arange(length)[None], c.head_dim, c.rope_theta, c.rope_scaling)
        return cos[0, :, 0], sin[0, :, 0]

    def one_block_per_layer(self, params: Params) -> tuple["Transformer", Params]:
        """Returns the same model with every layer's weights, and the unembedding, in an own array.

        For decoding on a CPU: there a scan over stacked weights copies each layer's before it
        multiplies with them, and a transposed matrix is packed anew for every product.
        """
        count = self.config.num_layers
        if self.blocks == (1,) * count:
            return self, params
        model, params = merge(self, params)
        (stacked,) = blocks_of(params["layers"])
        split = _split_layers(params, stacked, self.unembed(params), count)
        return dataclasses.replace(model, blocks=(1,) * count), split

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        cache: KVCache | None = None,
        context: KVCache | None = None,
        segments: jax.Array | None = None,
    ):
        """Reads tokens and returns the hidden state after each of them.

        Args:
          params: tree of `declare(config)`; without "lora" those of the base alone.
          tokens: [B, L] int32.
          positions: [B, L] int32, -1 on padding. A token sees those of its row at positions 0 ..
            its own.
          cache: tokens read before; the L new ones take its next slots.
          context: without a cache: P rows read before, a filled cache, of which each is what the
            next B / P rows go on from (a group's prompt).
          segments: without both: [B, L] int32, -1 on padding; rows of several texts side by side,
            each with positions from 0. A token sees those of its own segment.
        Returns:
          (hidden [B, L, D] in the computation's dtype, after the final norm; the cache with the new
          tokens, or None).
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if segments is not None and (cache is not None or context is not None):
            raise ValueError("packed rows read nothing but themselves: no cache, no context")
        key_positions = positions
        if context is not None:
            by_row = _for_its_rows(context.positions, len(tokens))
            key_positions = jnp.concatenate([by_row, positions], axis=1)
        if cache is not None:
            key_positions = jax.lax.dynamic_update_slice(
                cache.positions, positions, (0, cache.length)
            )
        # A prefill that fills its cache reads nothing but itself: the cache was empty.
        alone = cache is None or (
            cache.prompts is None and cache.positions.shape[1] == tokens.shape[1]
        )
        mask = None if alone else context_mask(positions, key_positions, c.sliding_window)
        turns = self._turns_at(positions, cache)
        shared = None if cache is None else cache.prompts
        prompt_mask = None if shared is None else self._prompt_mask(shared, positions)

        def layer(carry, scanned):
            x, keys, values = carry
            weights, index, read_before = scanned
            prompt = None if shared is None else (*read_before, prompt_mask, shared)
            before = None if context is None else (*read_before, key_positions)
            x, keys, values = self._layer(
                weights, index, x, keys, values, cache, mask, positions, turns, prompt, before,
                segments,
            )  # fmt: skip
            return (x, keys, values), None

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[c.remat])
        x = params["embed"][tokens].astype(dtype)
        layers = params["layers"]
        if "lora" in params:
            layers = adapt(layers, params["lora"], c.lora)
        blocks = blocks_of(layers)
        empty = (None,) * len(blocks)
        keys, values = (empty, empty) if cache is None else (cache.keys, cache.values)
        others = context if shared is None else shared
        of_others = empty if others is None else zip(others.keys, others.values, strict=True)
        read = []
        for block, block_keys, block_values, kv in zip(
            blocks, keys, values, of_others, strict=True
        ):
            count = jax.tree.leaves(block)[0].shape[0]
            (x, *block_cache), _ = jax.lax.scan(
                layer, (x, block_keys, block_values), (block, jnp.arange(count), kv),
                unroll=count == 1,
            )  # fmt: skip
            read.append(block_cache)
        if cache is not None:
            keys, values = zip(*read, strict=True)
            length = cache.length + tokens.shape[1]
            cache = dataclasses.replace(
                cache, keys=keys, values=values, positions=key_positions, length=length
            )
        return rms_norm(x, params["final_norm"], c.rms_norm_eps), cache

    def _turns_at(self, positions, cache: KVCache | None):
        """Returns `rotary_turns` of the positions, looked up where the cache holds them."""
        c = self.config
        if cache is None or cache.turns is None:
            return rotary_turns(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        rows = jnp.maximum(positions, 0)[:, :, None]
        return tuple(jnp.take(x, rows, axis=0, mode="clip") for x in cache.turns)

    def _prompt_mask(self, shared: SharedPrompts, positions) -> jax.Array:
        """Returns [P, L, N] bool: which prompt tokens the row in each of a prompt's lanes sees."""
        key_positions = shared.positions[:, None, :]
        lanes = shared.lanes.reshape(shared.lanes.shape[0], -1)
        shape = (len(key_positions), shared.lanes.shape[-1], key_positions.shape[-1])
        mask = jnp.broadcast_to(key_positions >= 0, shape)
        if self.config.sliding_window is not None:
            reader = take_in_shards(positions[:, 0], lanes).reshape(shape[:2])
            mask &= key_positions > reader[:, :, None] - self.config.sliding_window
        return mask

    def _layer(
        self, w, index, x, keys, values, cache, mask, positions, turns, prompt=None, before=None,
        segments=None,
    ):  # fmt: skip
        """Mask None: the tokens at `positions` read each other (of their own segment, where there
        are `segments`) and what came `before` (keys, values [P, ..], positions of all keys [B, S]).
        """
        c, dtype = self.config, x.dtype

        def project(name, inputs):  # [B, L, D] -> [B, L, heads, head_dim]
            out = product("bld,dhk->blhk", inputs, w[name]["w"])
            out = out + w[name]["b"].astype(dtype)[None, None] if c.qkv_bias else out
            return rms_norm(out, w[name]["norm"], c.rms_norm_eps) if "norm" in w[name] else out

        normed = rms_norm(x, w["attn_norm"], c.rms_norm_eps)
        q, k = rotate(project("q", normed), turns), rotate(project("k", normed), turns)
        q, k, v = (checkpoint_name(x, PRODUCT) for x in (q, k, project("v", normed)))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, kv_heads, L, head_dim]
        if cache is not None:
            keys = write_tokens(keys, k, index, cache.length)
            values = write_tokens(values, v, index, cache.length)
            if mask is not None:
                of_layer = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)  # noqa: E731
                k, v = jax.tree.map(of_layer, (keys, values))
        if mask is None:
            key_positions = None
            if before is not None:
                old_k, old_v, key_positions = before
                k = jnp.concatenate([_for_its_rows(old_k, len(k)), k], axis=2)
                v = jnp.concatenate([_for_its_rows(old_v, len(v)), v], axis=2)
            attended = attend_context(
                q, k, v, positions, key_positions=key_positions, segments=segments,
                sliding_window=c.sliding_window, backend=c.attention,
            )  # fmt: skip
        elif prompt is None:
            attended = attend(q, k, v, mask)
        else:
            own = attend_segment(q, k, v, mask)
            prompts = attend_prompts(q, *prompt)
            attended = merge_segments(own, prompts).astype(dtype)
        x = checkpoint_name(x + product("blhk,hkd->bld", attended, w["o"]), PRODUCT)
        normed = rms_norm(x, w["mlp_norm"], c.rms_norm_eps)
        gate, up = (
            checkpoint_name(product("bld,df->blf", normed, w[name]), PRODUCT)
            for name in ("gate", "up")
        )
        return x + product("blf,fd->bld", jax.nn.silu(gate) * up, w["down"]), keys, values


def _for_its_rows(x: jax.Array, rows: int) -> jax.Array:
    """Repeats each of P entries for its rows / P rows, [P, ..] -> [rows, ..]."""
    shape = (x.shape[0], rows // x.shape[0], *x.shape[1:])
    return jnp.broadcast_to(x[:, None], shape).reshape(rows, *x.shape[1:])


def blocks_of(layers) -> tuple[Params, ...]:
    """Returns the blocks of consecutive layers: weights are one stacked block, or a tuple of them
    (each scanned by itself: one per layer, or one that is trained and one that is not).
    """
    return (layers,) if isinstance(layers, dict) else tuple(layers)


@functools.partial(jax.jit, static_argnames="count")
def _split_layers(params: Params, stacked: Params, unembed: jax.Array, count: int) -> Params:
    layers = tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], stacked) for i in range(count))
    return {**params, "layers": layers, "unembed": unembed}


def attend_prompts(q, keys, values, mask, shared: SharedPrompts) -> tuple[jax.Array, jax.Array]:
    """Attention of every row's one query over its prompt, as `attend_segment` returns it.

    Args:
      q: [B, 1, heads, head_dim].
      keys, values: [P, kv_heads, N, head_dim] of one layer; mask: [P, L, N].
    """
    lanes = shared.lanes.reshape(shared.lanes.shape[0], -1)
    by_prompt = take_in_shards(q[:, 0], lanes).reshape(*mask.shape[:2], *q.shape[2:])
    out, lse = attend_segment(by_prompt, keys, values, mask)
    by_row = lambda x: take_in_shards(x.reshape(-1, *x.shape[2:]), shared.lane)[:, None]  # noqa: E731
    return by_row(out), by_row(lse)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (https://arxiv.org/abs/1910.07467)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


def rotary_turns(
    positions: jax.Array, head_dim: int, theta: float, scaling: Llama3Rope | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the angles, [B, L, 1, head_dim / 2] float32 each; padding counts
    as position 0.

    Source: https://arxiv.org/abs/2104.09864
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling)
    positions = jnp.maximum(positions, 0).astype(jnp.float32)
    angles = positions[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(head_dim: int, theta: float, scaling: Llama3Rope | None = None) -> jax.Array:
    """Returns [head_dim / 2] float32, radians per position.

    With Llama 3.1's scaling, a pair that turns fewer than `low_freq_factor` times within the
    original context turns `factor` times slower, one that turns more than `high_freq_factor` times
    stays, and between the two the frequency is interpolated linearly in the number of turns
    (https://arxiv.org/abs/2407.21783, section 3.4.2, and the published reference code).
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 0 = slowed down, 1 = as it was
    return (kept + (1 - kept) / scaling.factor) * frequencies


def rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, L, heads, head_dim] by what `rotary_turns` returns; dimension i pairs with i +
    head_dim / 2, as in HF.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = turns
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
