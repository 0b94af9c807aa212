"""LoRA: a frozen weight W gets a trainable term, W + (alpha / rank) A B, with A and B thin.

Params of a LoRA model hold A and B beside the layers, stacked like them:

    params["lora"][target] = {"a": [layers, in.., rank], "b": [layers, rank, out..]}      float32

A starts at random and B at zero, so the model starts as its base. Training multiplies by the thin
matrices and never forms A B; whatever samples or exports merges them into the weights first.

Source: https://arxiv.org/abs/2106.09685
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from scope_jax.models import int8
from scope_jax.records import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # the linear maps of a layer


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which linear maps of a `Transformer` are adapted, and how.

    Raises:
      InputError: a rank below 1, an alpha that is not positive, no target or an unknown one.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        known = f"known are {', '.join(TARGETS)}"
        if self.rank < 1:
            raise InputError(
                f"LoRA's rank must be at least 1 (model.lora_rank=0: no LoRA), got {self.rank}"
            )
        if not self.alpha > 0:
            raise InputError(f"LoRA's alpha (model.lora_alpha) must be positive, got {self.alpha}")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise InputError(f"LoRA's targets (model.lora_targets) hold {unknown}: {known}")
        if not self.targets:
            raise InputError(f"LoRA's targets (model.lora_targets) name no linear map: {known}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def make_lora(
    lora_rank: int, lora_alpha: float = 16.0, lora_targets: Iterable[str] = TARGETS
) -> LoRA | None:
    """Returns what the options of a config's `model` ask for; None where the rank is 0."""
    return LoRA(lora_rank, lora_alpha, tuple(lora_targets)) if lora_rank else None


# ------------------------------------------------------------------------------ forward


@struct.dataclass
class Adapted:
    """A linear map with its thin matrices; `product` multiplies by all three."""

    weight: Any  # [.., in.., out..], an array or `Int8`
    a: jax.Array  # [.., in.., rank]
    b: jax.Array  # [.., rank, out..]
    scale: float = struct.field(pytree_node=False)


def product(equation: str, x: jax.Array, weight) -> jax.Array:
    """Returns `int8.product` of x and a weight, plus scale * (x A) B where it is `Adapted`."""
    if not isinstance(weight, Adapted):
        return int8.product(equation, x, weight)
    of_x, of_weight, of_out = equation.replace("->", ",").split(",")
    summed = [axis for axis in of_weight if axis not in of_out]
    kept = "".join(axis for axis in of_x if axis not in summed)
    inside, outside = "".join(summed), "".join(axis for axis in of_weight if axis in of_out)
    thin = int8.product(f"{of_x},{inside}r->{kept}r", x, weight.a)
    added = int8.product(f"{kept}r,r{outside}->{of_out}", weight.scale * thin, weight.b)
    return int8.product(equation, x, weight.weight) + added


def adapt(layers, adapters, lora: LoRA | None):
    """Returns stacked layers whose targets are `Adapted`, to be scanned over as before.

    Args:
      layers: a `Transformer`'s, stacked in one block.
      adapters: params["lora"].
      lora: of the model's config.
    """
    if lora is None or not isinstance(layers, dict):
        raise InputError(
            'params hold "lora", but the model has no config.lora, or its layers are cut into '
            "blocks: merge(model, params) first"
        )
    adapted = dict(layers)
    for name, thin in adapters.items():
        if isinstance(old := layers[name], dict):  # queries, keys and values: biases and norms too
            adapted[name] = {**old, "w": Adapted(old["w"], **thin, scale=lora.scale)}
        else:
            adapted[name] = Adapted(old, **thin, scale=lora.scale)
    return adapted


# ------------------------------------------------------------------------------ declare, train


def declare_lora(layers, lora: LoRA) -> dict[str, Any]:
    """Returns the declarations of params["lora"], with the logical axes of the base's weights.

    The rank lies on no mesh axis. The Hugging Face names are those of PEFT's adapter files.

    Args:
      layers: declarations of the layers, see `transformer.declare`.
    """
    tree = {}
    for name in lora.targets:
        base = layers[name]["w"] if isinstance(layers[name], dict) else layers[name]
        split = 1 + base.in_dims  # behind the layers and what is summed over
        hf = f"base_model.model.{base.hf.removesuffix('.weight')}"
        tree[name] = {
            "a": dataclasses.replace(
                base, shape=(*base.shape[:split], lora.rank), axes=(*base.axes[:split], None),
                hf=f"{hf}.lora_A.weight",
            ),
            "b": dataclasses.replace(
                base, shape=(base.shape[0], lora.rank, *base.shape[split:]),
                axes=("layers", None, *base.axes[split:]), init="zeros", in_dims=1,
                hf=f"{hf}.lora_B.weight",
            ),
        }  # fmt: skip
    return tree


def split_frozen(params) -> tuple[Any, dict[str, Any]]:
    """Returns (what an update trains, what it leaves): of LoRA params A and B, and the base; of all
    others everything, and nothing.
    """
    if not (isinstance(params, dict) and "lora" in params):
        return params, {}
    return {"lora": params["lora"]}, {name: x for name, x in params.items() if name != "lora"}


def join_frozen(trained, frozen: dict[str, Any]):
    """Returns the params that `split_frozen` has split."""
    return {**frozen, **trained} if frozen else trained


# ------------------------------------------------------------------------------ merge


def base_of(model, params):
    """Returns the frozen base's (model, params), the same arrays; without LoRA what was given."""
    if model.config.lora is not None:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, lora=None))
    return model, split_frozen(params)[1] or params


def merge(model, params, dtype: str | None = None):
    """Returns the (model, params) without LoRA that compute the same.

    Args:
      model: a `Transformer`.
      params: its params; without "lora" they are returned as they are.
      dtype: of the merged weights (default: each its base's). The sum is rounded to it once, from
        float32.
    """
    base, weights = base_of(model, params)
    if weights is params:
        return base, params
    layers = jax.tree.map(
        lambda x: _merged(x, dtype) if isinstance(x, Adapted) else x,
        adapt(params["layers"], params["lora"], model.config.lora),
        is_leaf=lambda x: isinstance(x, Adapted),
    )
    return base, {**weights, "layers": layers}


@functools.partial(jax.jit, static_argnames="dtype")
def _merged(weight: Adapted, dtype: str | None) -> jax.Array:
    def one(layer: Adapted):
        wide = lambda x: x.astype(jnp.float32)  # noqa: E731
        # Else a TPU would round the factors to bfloat16.
        exact = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        merged = wide(layer.weight) + layer.scale * exact(wide(layer.a), wide(layer.b))
        return merged.astype(dtype or layer.weight.dtype)

    return jax.lax.map(one, weight)  # by layers: no float32 copy of all of them exists at once
