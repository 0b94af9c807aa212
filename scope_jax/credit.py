"""What a rollout is worth, from its reward to the advantage of each of its tokens.

    reward -> token_returns (a PRM's word on its steps, its length) -> group_advantages -> tokens

Shapes as in records.py. The first stage is numpy on the host, for scores are there; the others run
in one program.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from scope_jax.records import PAD, POLICY, TEACHER, InputError

RETURNS = ("outcome", "prm_blend", "prm_returns", "vppo")


def token_returns(
    rewards, mask, step_ends: Any = None, step_scores: Any = None, step_mask: Any = None, *,
    kind="outcome", prm_weight=0.5, prefix_reward=0.5, tau=0.5, solved_at=1.0, overlong_share=0.0,
):  # fmt: skip
    """Returns what each rollout is worth, and what it is worth from each of its tokens on.

    With r the reward, s_1 .. s_K the step scores, w = prm_weight; a token of step k is worth

      "outcome"      r
      "prm_blend"    w mean(s_1 .. s_K) + (1 - w) r: the PRM as a dense reward
      "prm_returns"  w mean(s_k .. s_K) + (1 - w) r: a step answers for what follows it
      "vppo"         of a wrong rollout `prefix_reward` before its first step below tau and 0 from
                     there on (https://arxiv.org/abs/2601.18984), else r

    and a rollout its first token's worth, with "vppo" the mean of its tokens'. One without a scored
    step is worth r, and so is a wrong one without a step below tau: no score is no score of 0.

    Args:
      rewards: [B] float; mask: [B, T] bool, right-padded completions.
      step_ends: [B, S] int, exclusive; step_scores: [B, S] float; step_mask: [B, S] bool; "outcome"
        does not read them.
      solved_at: a reward below it is wrong.
      overlong_share: DAPO's soft punishment (https://arxiv.org/abs/2503.14476, eq. 13): a rollout
        loses from 0 to 1 as its length goes through the last `overlong_share` of T; 0 = none.
    Returns:
      {"values": [B] float32} and, where it is not the same at all tokens, {"returns": [B, T]
      float32}.
    """
    if kind not in RETURNS:
        raise InputError(f"returns.kind must be one of {', '.join(RETURNS)}, got {kind!r}")
    values, length = np.asarray(rewards, np.float32), np.asarray(mask).sum(1)
    returns = None
    if kind in ("prm_blend", "prm_returns"):
        tails = _mean_from_each_step(step_scores, step_mask)
        by_step = prm_weight * tails + (1 - prm_weight) * values[:, None]
        by_step = np.where(step_mask.any(1, keepdims=True), by_step, values[:, None])
        values = by_step[:, 0]
        if kind == "prm_returns":
            returns = np.take_along_axis(
                by_step, _step_of_token(step_ends, step_mask, mask), axis=1
            )
    elif kind == "vppo":
        low = (step_scores < tau) & step_mask
        split = low.any(1) & (values < solved_at)
        before = _step_of_token(step_ends, step_mask, mask) < low.argmax(1)[:, None]
        returns = np.where(split[:, None], prefix_reward * before, values[:, None])
        share = (before & mask).sum(1) / np.maximum(length, 1)
        values = np.where(split, prefix_reward * share, values)
    if overlong_share:
        room = overlong_share * mask.shape[1]
        lost = np.clip((length - mask.shape[1] + room) / room, 0.0, 1.0)
        values = values - lost
        returns = None if returns is None else returns - lost[:, None]
    found = {"values": values.astype(np.float32)}
    return found if returns is None else found | {"returns": returns.astype(np.float32)}


def _mean_from_each_step(scores, step_mask):
    """Returns [B, S] float32: the mean of a row's scores from each step on."""
    scores = np.where(step_mask, scores, 0.0).astype(np.float32)
    left = step_mask[:, ::-1].cumsum(1)[:, ::-1]
    return scores[:, ::-1].cumsum(1)[:, ::-1] / np.maximum(left, 1)


def _step_of_token(step_ends, step_mask, mask):
    """Returns [B, T] int: which step a token is in; the last one on padding."""
    ends = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int32)  # steps that end at a token
    np.add.at(ends, (np.nonzero(step_mask)[0], step_ends[step_mask]), 1)
    last = np.maximum(step_mask.sum(1, keepdims=True) - 1, 0)
    return np.minimum(ends[:, :-1].cumsum(1), last)


def group_advantages(
    rewards, group_size, *, scale="none", baseline="group", on_policy=None, row_mask=None
):
    """Returns the advantage of each rollout within its group.

    "group" and scale "none" are Dr.GRPO (https://arxiv.org/abs/2503.20783), "std" is GRPO
    (https://arxiv.org/abs/2402.03300). All-wrong group of 8 with one row repaired: +0.875 and 7
    times -0.125.

    Args:
      rewards: [B] float, row-major by prompt.
      group_size: slots of a group (B is a multiple of it), empty ones included.
      scale: "none", or "std": divided by (the sample deviation of all rows that count, ddof 1, +
        1e-6).
      baseline: "group" mean; "on_policy" mean of the rows with on_policy True (a group without one
        falls back to "group"); "leave_one_out" mean of the other rows.
      on_policy: [B] bool, rows sampled by the policy alone; needed by baseline="on_policy".
      row_mask: [B] bool, False on empty slots: they are left out of means and deviations and get 0.
    Returns:
      [B] float32. A group of one row gets 0.
    """
    if baseline not in ("group", "on_policy", "leave_one_out"):
        raise InputError(
            f'baseline must be "group", "on_policy" or "leave_one_out", got {baseline!r}'
        )
    if scale not in ("none", "std"):
        raise InputError(f'scale must be "none" or "std", got {scale!r}')
    chex.assert_rank(rewards, 1)
    if rewards.shape[0] % group_size:
        raise InputError(f"{rewards.shape[0]} rewards do not divide into groups of {group_size}")
    by_group = lambda x: jnp.asarray(x).reshape(-1, group_size)  # noqa: E731  [B] -> [P, G]
    rewards = by_group(rewards).astype(jnp.float32)
    counts = jnp.ones_like(rewards, bool) if row_mask is None else by_group(row_mask)
    rewards = jnp.where(counts, rewards, 0.0)
    size, total = counts.sum(-1, keepdims=True), rewards.sum(-1, keepdims=True)  # [P, 1]

    def over_mean(total, size):  # rewards - total / size, exactly 0 where all are equal
        return (size * rewards - total) / jnp.maximum(size, 1)

    advantages = from_group = over_mean(total, size)
    if baseline == "leave_one_out":
        advantages = over_mean(total - rewards, size - 1)
    elif baseline == "on_policy":
        if on_policy is None:
            raise InputError(
                'baseline="on_policy" needs on_policy, the mask of rows sampled by the policy alone'
            )
        own = counts & by_group(on_policy)
        own_size = own.sum(-1, keepdims=True)
        own_total = jnp.where(own, rewards, 0.0).sum(-1, keepdims=True)
        advantages = jnp.where(own_size > 0, over_mean(own_total, own_size), from_group)
    if scale == "std":
        squares = jnp.where(counts, from_group**2, 0.0).sum(-1, keepdims=True)
        advantages = advantages / (jnp.sqrt(squares / jnp.maximum(size - 1, 1)) + 1e-6)
    return jnp.where(counts & (size > 1), advantages, 0.0).reshape(-1)


def token_advantages(
    advantages,
    token_source,
    *,
    w_policy=1.0,
    w_prefix=1.0,
    w_correction=1.0,
    salvage_only=False,
):
    """Spreads row advantages over tokens, weighted by who wrote them.

    Args:
      advantages: [B] or [B, T] float32.
      token_source: [B, T] int8. Rows that hold a TEACHER token are repaired rows.
      w_policy: factor on the rows that the policy wrote alone; 0 leaves the teacher's to be learnt.
      w_prefix: factor on the policy's own tokens of repaired rows.
      w_correction: factor on TEACHER tokens.
      salvage_only: policy tokens of repaired rows use max(advantage, 0), so that a kept prefix is
        never punished.
    Returns:
      [B, T] float32.
    """
    teacher = token_source == TEACHER
    prefix = (token_source == POLICY) & teacher.any(-1, keepdims=True)
    spread = advantages if advantages.ndim == 2 else advantages[:, None]
    spread = jnp.broadcast_to(spread, token_source.shape).astype(jnp.float32)
    own = jnp.maximum(spread, 0.0) if salvage_only else spread
    on_policy = jnp.where(prefix, w_prefix * own, w_policy * spread)
    return jnp.where(teacher, w_correction * spread, on_policy)


@functools.partial(
    jax.jit,
    static_argnames=(
        "group_size", "scale", "baseline", "prefix_in_loss", "w_policy", "w_prefix", "w_correction",
        "salvage_only",
    ),
)  # fmt: skip
def assign_credit(
    values, token_source, row_mask, returns=None, *, group_size, scale, baseline,
    prefix_in_loss=True, w_policy=1.0, w_prefix=1.0, w_correction=1.0, salvage_only=False,
):  # fmt: skip
    """Spreads advantages over the tokens that are in the loss, in one program.

    Args:
      values: [B] float32, what a rollout is worth: its reward, or `token_returns`'.
      token_source: [B, T] int8; row_mask: [B] bool, False on empty slots.
      returns: [B, T] float32, what a rollout is worth from each token on; None: `values` at all of
        them. A token's advantage is its return less the same baseline. With scale="none" only.
      group_size, scale, baseline: `group_advantages`'; repaired rows are not on policy.
      prefix_in_loss: False takes the policy's tokens of repaired rows out of every sum and
        denominator.
      w_policy, w_prefix, w_correction, salvage_only: `token_advantages`'.
    Returns:
      (advantages [B, T] float32, token_source [B, T] int8 with PAD where a token is in no loss,
      advantages [B]).
    """
    token_source = jnp.where(row_mask[:, None], token_source, PAD).astype(jnp.int8)
    repaired = (token_source == TEACHER).any(-1)
    by_row = group_advantages(
        values, group_size, scale=scale, baseline=baseline, on_policy=~repaired, row_mask=row_mask
    )
    by_token = by_row
    if returns is not None:
        if scale != "none":
            raise InputError(f'returns by token need advantages.scale="none", got {scale!r}')
        by_token = by_row[:, None] + jnp.where(row_mask[:, None], returns - values[:, None], 0.0)
    by_token = token_advantages(
        by_token, token_source, w_policy=w_policy, w_prefix=w_prefix, w_correction=w_correction,
        salvage_only=salvage_only,
    )  # fmt: skip
    if not prefix_in_loss:
        left_out = (token_source == POLICY) & repaired[:, None]
        token_source = jnp.where(left_out, PAD, token_source).astype(jnp.int8)
    return by_token, token_source, by_row
