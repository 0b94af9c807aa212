"""RL post-training of reasoning language models in JAX, where failed rollouts are repaired at their
first wrong step.

Every stage is a pure function that can be imported alone; `scope_jax.train` is the loop that joins
them.
"""

from scope_jax.credit import group_advantages
from scope_jax.diversity import (
    distinct_n,
    equation_diversity,
    pass_at_k,
    self_bleu,
    textual_diversity,
)
from scope_jax.locate import first_error_step, prefix_length
from scope_jax.losses import policy_loss, shape_off_policy, token_logps
from scope_jax.models.hf import load_hf, save_hf
from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.prm import load_prm, save_prm, score_steps
from scope_jax.records import PAD, POLICY, TEACHER, InputError, Rollouts, StepScores
from scope_jax.rewards import verify
from scope_jax.sampling import continue_from, decoding_layout, generate
from scope_jax.splicing import splice
from scope_jax.steps import segment_steps

__version__ = "0.1.0"

__all__ = [
    "PAD", "POLICY", "TEACHER", "InputError", "Rollouts", "StepScores", "Transformer",
    "TransformerConfig", "continue_from", "decoding_layout", "distinct_n", "equation_diversity",
    "first_error_step", "generate", "group_advantages", "load_hf", "load_prm", "pass_at_k",
    "policy_loss", "prefix_length", "save_hf", "save_prm", "score_steps", "segment_steps",
    "self_bleu", "shape_off_policy", "splice", "textual_diversity", "token_logps", "verify",
]  # fmt: skip
