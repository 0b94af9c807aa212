"""RL post-training of reasoning language models in JAX, where failed rollouts are repaired at their
first wrong step.

Every stage is a pure function that can be imported alone; `scope_jax.train` is the loop that joins
them.

A name's module is loaded when the name is first asked for, so that a command loads what it needs
and `python -m scope_jax.doctor` can say what is missing where something is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOLDS = {  # module: what is imported from it, as above
    "credit": "group_advantages",
    "diversity": "distinct_n equation_diversity pass_at_k self_bleu textual_diversity",
    "locate": "first_error_step prefix_length",
    "losses": "policy_loss shape_off_policy token_logps",
    "models.hf": "load_hf save_hf",
    "models.transformer": "Transformer TransformerConfig",
    "prm": "load_prm save_prm score_steps",
    "records": "PAD POLICY TEACHER InputError Rollouts StepScores",
    "rewards": "verify",
    "sampling": "continue_from decoding_layout generate",
    "splicing": "splice",
    "steps": "segment_steps",
}
_HOMES = {name: module for module, names in _HOLDS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in {module.partition(".")[0] for module in _HOLDS}:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
