"""Eight bits for what decoding reads from memory: weights, and the keys and values of the cache.

x is held as values * scale with values in -127 .. 127 and scale = max |x| / 127 over the axes that
a product sums over. So the scale leaves the product: it multiplies its result (weights), the scores
(keys) or the probabilities (values), and the integers themselves, exact in bfloat16, are all that
the product reads. Nothing here is differentiable: training keeps its own weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Int8:
    """An array in eight bits, with one scale for each slice that a product sums over."""

    values: jax.Array  # int8, the array's own shape
    scale: jax.Array  # float32; weights: size 1 on the summed axes; the cache: see `quantise_cache`

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantise(x: jax.Array, axes: tuple[int, ...]) -> Int8:
    """Rounds to the nearest of 255 multiples of max |x| / 127 over `axes` (0 where all are 0)."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=axes, keepdims=True) / 127.0
    values = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return Int8(values.astype(jnp.int8), scale)


def quantise_weights(layers, others, declared):
    """Returns stacked layers whose linear maps are `Int8`.

    Embedding and unembedding are not among the layers: the draw feels their rounding most.

    Args:
      others: like `layers`; what is no linear map (norms, biases) is taken from here.
      declared: the tree of `transformer.Weight` that `layers` has the shapes of.
    """

    def one(weight, x, other):  # axis 0 is that of the layers
        return quantise(x, tuple(range(1, 1 + weight.in_dims))) if weight.in_dims else other

    return jax.tree.map(one, declared, layers, others, is_leaf=lambda x: hasattr(x, "in_dims"))


def product(equation: str, x: jax.Array, weight: jax.Array | Int8) -> jax.Array:
    """Returns einsum(equation, x, weight) in x's dtype; the weight's outputs come last in it."""
    if not isinstance(weight, Int8):
        return jnp.einsum(equation, x, weight.astype(x.dtype))
    out = jnp.einsum(equation, x, weight.values.astype(x.dtype))
    scale = jnp.expand_dims(weight.scale, range(out.ndim - weight.scale.ndim))
    return (out * scale).astype(x.dtype)


def quantise_cache(x: jax.Array) -> Int8:
    """Quantises keys or values [.., S, head_dim]: a scale [.., 1, S] for every token and head.

    The tokens lie on the scale's last axis, along a TPU's lanes: on the one before, with a last
    axis of size 1, every scale would take the room of 128.
    """
    whole = quantise(x, (-1,))
    return dataclasses.replace(whole, scale=whole.scale.swapaxes(-1, -2))


def over_slots(fn, x: jax.Array | Int8, *more):
    """Applies fn(array, .., axis of the tokens) to an array of a cache and to what belongs to it.

    Args:
      x, more: [.., S, head_dim], or the `Int8` of such arrays, all alike.
    """
    if not isinstance(x, Int8):
        return fn(x, *more, x.ndim - 2)
    values = fn(x.values, *(y.values for y in more), x.values.ndim - 2)
    return Int8(values, fn(x.scale, *(y.scale for y in more), x.scale.ndim - 1))
