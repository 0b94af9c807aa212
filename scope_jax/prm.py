"""Process reward models: a probability that each reasoning step is correct.

A PRM here is any hashable callable

    prm(params, ids [B, L], positions [B, L], score_positions [B, S]) -> [B, S] float32 in [0, 1]

`PRM` is the one for language-model backbones: one forward over prompt + completion, a small head
read at one token of each step. Its checkpoint is the backbone's Hugging Face directory plus the
head's tensors, and config.json names the head under "scope_jax_prm_head".
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from scope_jax.models.hf import (
    Tensors,
    config_from_hf,
    config_to_hf,
    load_tree,
    read_config,
    resolve,
    to_hf_tensors,
    write_checkpoint,
)
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import Transformer, Weight, declare, init_params
from scope_jax.records import InputError, StepScores


def declare_head(head: str, embed_dim: int) -> dict[str, Weight]:
    """Returns the declarations of a head's weights.

    "linear2_at_sep": TRL's PRMTrainer, a two-way linear classifier; label 1 is "correct".
    """
    if head != "linear2_at_sep":
        raise InputError(f'PRM head {head!r} is not known; known: "linear2_at_sep"')
    return {
        "weight": Weight((embed_dim, 2), (None, None), "normal", "score.weight", 1),
        "bias": Weight((2,), (None,), "zeros", "score.bias"),
    }


@dataclasses.dataclass(frozen=True)
class PRM:
    """A head on a language model. Params: {"backbone": ..., "head": ...}."""

    backbone: Transformer
    head: str = "linear2_at_sep"

    def declare(self):
        config = dataclasses.replace(self.backbone.config, tie_embeddings=True)  # no LM head
        return {"backbone": declare(config), "head": declare_head(self.head, config.embed_dim)}

    def init_head(self, key: jax.Array):
        return init_params(declare_head(self.head, self.backbone.config.embed_dim), key)

    def logits(self, params, ids, positions, score_positions):
        """Returns [B, S, 2] float32 logits of (wrong, correct)."""
        hidden, _ = self.backbone(params["backbone"], ids, positions=positions)
        read = jnp.take_along_axis(hidden, score_positions[:, :, None], axis=1)  # [B, S, D]
        head = jax.tree.map(lambda x: x.astype(jnp.float32), params["head"])
        return read.astype(jnp.float32) @ head["weight"] + head["bias"][None, None]

    def __call__(self, params, ids, positions, score_positions):
        return jax.nn.softmax(self.logits(params, ids, positions, score_positions), axis=-1)[..., 1]

    @property
    def max_position(self) -> int:
        return self.backbone.config.max_position


@functools.partial(jax.jit, static_argnames=("prm",))
def score_steps(prm, params, ids, mask, score_positions, step_mask) -> StepScores:
    """Scores every reasoning step of every row in one forward.

    Args:
      prm, params: see the module's docstring.
      ids, mask: [B, L] prompt and completion tokens; padding may stand anywhere.
      score_positions: [B, S] int32, column (of L) of the token at which each step is read.
      step_mask: [B, S] bool.
    Returns:
      StepScores. A row longer than the PRM's context, or with a score that is not finite, has mask
      False throughout: no score is not "no error", so such a row is never a candidate for repair.
    """
    scores = prm(params, ids, positions_from_mask(mask), jnp.where(step_mask, score_positions, 0))
    fits = mask.sum(-1) <= getattr(prm, "max_position", mask.shape[1])
    readable = fits & jnp.where(step_mask, jnp.isfinite(scores), True).all(-1)  # [B]
    step_mask = step_mask & readable[:, None]
    return StepScores(scores=jnp.where(step_mask, scores, 0.0).astype(jnp.float32), mask=step_mask)


def load_prm(path, *, mesh=None, rules=None, dtype=None):
    """Loads a PRM directory: a backbone's checkpoint with the head's tensors.

    Returns:
      (PRM, params).
    Raises:
      InputError: as `load_hf`, or a directory that holds no known head.
    """
    directory = resolve(path)
    hf_config = read_config(directory)
    if "scope_jax_prm_head" not in hf_config:
        raise InputError(
            f'{directory}/config.json has no "scope_jax_prm_head": not a PRM that `save_prm` wrote'
        )
    config = config_from_hf(hf_config, directory)
    prm = PRM(Transformer(config), hf_config["scope_jax_prm_head"])
    params = load_tree(prm.declare(), Tensors(directory), mesh=mesh, rules=rules, dtype=dtype)
    config = dataclasses.replace(config, dtype=str(params["backbone"]["embed"].dtype))
    return PRM(Transformer(config), prm.head), params


def save_prm(path, prm: PRM, params, tokenizer=None) -> None:
    """Writes a directory that `load_prm` loads."""
    tensors = to_hf_tensors(prm.declare(), params)
    config = {**config_to_hf(prm.backbone.config), "scope_jax_prm_head": prm.head}
    write_checkpoint(path, tensors, config, tokenizer)
