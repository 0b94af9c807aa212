"""The records that flow between the stages, and the glossary of their shapes.

B   rollouts of a training step, row-major by prompt: B = P * G (more slots with insert="append")
P   prompts of a training step
G   rollouts sampled per prompt (`group_size`)
N   prompt tokens, LEFT-padded to a bucket
T   completion tokens, right-padded, the end-of-sequence token kept
U   tokens of a teacher's continuation
S   reasoning steps of a completion
V   vocabulary entries
D   embedding width
R   packed rows of L = N + T tokens

Masks are bool, True on real entries. Where a mask is False ids are `pad_id`, log-probs and step
ends are 0.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

# Who wrote a token of a completion (`token_source`, int8).
PAD, POLICY, TEACHER = 0, 1, 2

Array = jax.Array | np.ndarray


class InputError(ValueError):
    """The user's config, file or argument is wrong; commands print its one line and exit with 2."""


@struct.dataclass
class Prompts:
    """A batch of tokenised problems. Lives on the host."""

    ids: Array  # [P, N] int32
    mask: Array  # [P, N] bool
    records: tuple[dict[str, Any], ...] = struct.field(pytree_node=False)  # P rows of the data set


@struct.dataclass
class Rollouts:
    """Sampled completions beside their prompts, one row each."""

    prompt_ids: Array  # [B, N] int32
    prompt_mask: Array  # [B, N] bool
    completion_ids: Array  # [B, T] int32
    completion_mask: Array  # [B, T] bool
    token_source: Array  # [B, T] int8
    logps: Array  # [B, T] float32, full vocabulary, temperature-scaled: the pi_old of every ratio
    sampling_logps: Array  # [B, T] float32, of the distribution drawn from; never in a ratio
    finished: Array  # [B] bool, an end token or stop string came within the budget


@struct.dataclass
class StepScores:
    """A process reward model's verdict on each reasoning step."""

    scores: Array  # [B, S] float32, probability that the step is correct
    mask: Array  # [B, S] bool; False throughout a row that could not be scored


@struct.dataclass
class ScoreRequests:
    """Rollouts cut into reasoning steps, on the host."""

    prompt_ids: Array  # [B, N] int32
    prompt_mask: Array  # [B, N] bool
    completion_ids: Array  # [B, T] int32
    completion_mask: Array  # [B, T] bool
    finished: Array  # [B] bool
    step_ends: Array  # [B, S] int32, exclusive token offsets of the steps' ends
    step_mask: Array  # [B, S] bool
    records: tuple[dict[str, Any], ...] = struct.field(pytree_node=False)  # B rows of the data set


@struct.dataclass
class CorrectionRequests:
    """Rollouts cut before their first wrong step; some of the C rows are filling."""

    prompt_ids: Array  # [C, N] int32
    prompt_mask: Array  # [C, N] bool
    prefix_ids: Array  # [C, T] int32
    prefix_length: Array  # [C] int32; so many of them are the policy's own and are kept
    budgets: Array  # [C] int32, tokens the teacher may write; 0 on filling rows
    records: tuple[dict[str, Any], ...] = struct.field(pytree_node=False)  # C rows of the data set


@struct.dataclass
class Continuations:
    """What a teacher wrote, closed with the policy's own end token where it stopped by itself."""

    ids: Array  # [C, U] int32
    mask: Array  # [C, U] bool
    logps: Array  # [C, U] float32, the teacher's own; 0 where it has none
    stopped: Array  # [C] bool
    # [C] bool, no exact text between policy and teacher tokenizer; None where they have the same
    unaligned: Array | None = None
    # metrics of the call, the same names every time; None where there are none
    counts: dict[str, int] | None = struct.field(pytree_node=False, default=None)
    source: Array | None = None  # [C, U] int8, who wrote each token; None = the teacher all of them

    def teacher_tokens(self) -> int:
        """Returns how many tokens the teacher wrote."""
        return int((self.mask if self.source is None else self.source == TEACHER).sum())


@struct.dataclass
class TrainBatch:
    """What the update sees: completions, who wrote each token, and how good each row was."""

    prompt_ids: Array  # [B, N] int32
    prompt_mask: Array  # [B, N] bool
    completion_ids: Array  # [B, T] int32
    token_source: Array  # [B, T] int8, PAD where the token is in no loss
    completion_mask: Array  # [B, T] bool, real tokens (context, even where they are in no loss)
    old_logps: Array  # [B, T] float32
    advantages: Array  # [B, T] float32
    ref_logps: Array | None = None  # [B, T] float32, only with kl_coef > 0


@struct.dataclass
class PackedBatch:
    """A `TrainBatch` without most of its padding: several rollouts in a row, each a segment of its
    prompt and completion; see packing.py. What describes a token stands beside it: the hidden state
    at t - 1 predicts the token at t. A segment's first token is a prompt's, and so in no loss.
    """

    ids: Array  # [R, L] int32
    positions: Array  # [R, L] int32, from 0 in every segment, -1 on padding
    segments: Array  # [R, L] int32, number of the rollout in its row, -1 on padding
    token_source: Array  # [R, L] int8, PAD where the token is in no loss
    old_logps: Array  # [R, L] float32
    advantages: Array  # [R, L] float32
    share: Array  # [R, L] float32, 1 / (tokens in the loss of its rollout), 0 where in no loss
    ref_logps: Array | None = None  # [R, L] float32, only with kl_coef > 0


@struct.dataclass
class TrainState:
    """All that the optimizer moves."""

    params: Any
    opt_state: Any
    step: Array  # [] int32, finished training steps
