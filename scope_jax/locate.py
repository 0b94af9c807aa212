"""Where a rollout first goes wrong, and which rollouts are worth a repair.

`first_error_step` is the method's locator; the others are its ablations. All return -1 where no
step is marked.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from scope_jax.records import InputError

SELECT = ("wrong", "wrong_or_low_prm", "any")
TRIGGERS = ("always", "acc_below", "all_wrong", "mixed_only")
LOCATORS = ("prm", "oracle", "monte_carlo", "random", "random_correct", "zero")


def first_error_step(step_scores, step_mask, threshold):
    """Returns the first step that the PRM scores below `threshold`; -1 where there is none.

    The -1 convention is ProcessBench's (https://arxiv.org/abs/2412.06559). Padded steps are never
    reported.

    Args:
      step_scores: [B, S] float, probability that each step is correct.
      step_mask: [B, S] bool, True on real steps.
      threshold: scores below it count as wrong.
    Returns:
      [B] int32.
    """
    chex.assert_rank([step_scores, step_mask], 2)
    chex.assert_equal_shape([step_scores, step_mask])
    wrong = (step_scores < threshold) & step_mask  # [B, S]
    return jnp.where(wrong.any(-1), wrong.argmax(-1), -1).astype(jnp.int32)


def locate(step_scores, step_mask, key, *, locator="prm", tau=0.5, on_no_error="skip"):
    """Returns the step to cut before, by the method's locator or one of its ablations.

    Args:
      step_scores: [B, S] float; the exact checker's 0 / 1 verdicts with locator="oracle".
      step_mask: [B, S] bool; a row that is False throughout could not be scored and gets -1.
      key: typed key, read by the random locators only.
      locator: "prm", "oracle" and "monte_carlo" are `first_error_step`; "random" is uniform over
        steps 1 .. K - 1; "random_correct" uniform over 1 .. the first error; "zero" always the
        first step.
      tau: threshold of the scores.
      on_no_error: "skip" leaves a rollout without a low step alone; "argmin" cuts before its lowest
        one.
    Returns:
      [B] int32, -1 = none.
    """
    if locator not in LOCATORS:
        raise InputError(f"locator must be one of {', '.join(LOCATORS)}, got {locator!r}")
    if on_no_error not in ("skip", "argmin"):
        raise InputError(f'on_no_error must be "skip" or "argmin", got {on_no_error!r}')
    scored = step_mask.any(-1)
    num_steps = step_mask.sum(-1).astype(jnp.int32)
    first = first_error_step(step_scores, step_mask, tau)
    if on_no_error == "argmin":
        lowest = jnp.where(step_mask, step_scores, jnp.inf).argmin(-1).astype(jnp.int32)
        first = jnp.where(scored & (first < 0), lowest, first)
    if locator == "zero":
        return jnp.where(scored, 0, -1).astype(jnp.int32)
    if locator in ("random", "random_correct"):
        last = num_steps - 1 if locator == "random" else first
        drawn = jax.random.randint(key, first.shape, 1, jnp.maximum(last, 1) + 1)
        return jnp.where(scored & (last >= 1), drawn, -1).astype(jnp.int32)
    return first


def prefix_length(first_error, step_ends, step_mask):
    """Returns how many tokens stand before the wrong step.

    Args:
      first_error: [B] int32; 0 gives 0, -1 gives the end of the last real step.
      step_ends: [B, S] int32, exclusive token offset of each step's end.
      step_mask: [B, S] bool.
    Returns:
      [B] int32.
    """
    chex.assert_rank([first_error, step_ends, step_mask], [1, 2, 2])
    ends = jnp.where(step_mask, step_ends, 0)
    before = jnp.take_along_axis(ends, jnp.maximum(first_error - 1, 0)[:, None], axis=-1)[:, 0]
    length = jnp.where(first_error == 0, 0, before)
    return jnp.where(first_error < 0, ends.max(-1), length).astype(jnp.int32)


def select_candidates(
    rewards,
    finished,
    first_error,
    step_scores,
    step_mask,
    *,
    group_size,
    select="wrong",
    require_finished=True,
    trigger="always",
    trigger_accuracy=0.5,
    min_prefix_steps=1,
    min_prefix_ratio=0.0,
    tau=0.5,
    solved_at=1.0,
):
    """Returns which rollouts may be repaired.

    Args:
      rewards: [B] float; a reward below `solved_at` is wrong.
      finished: [B] bool, ended by an end token or stop string.
      first_error: [B] int32 from `locate`.
      step_scores, step_mask: [B, S].
      group_size: G.
      select: "wrong"; "wrong_or_low_prm" also takes right rollouts with a step below tau (lucky
        answers); "any".
      require_finished: leave out rollouts that ran out of budget.
      trigger: which groups are repaired: "always", "acc_below" (solve rate below
        `trigger_accuracy`), "all_wrong", "mixed_only" (some right, some wrong).
      min_prefix_steps, min_prefix_ratio: fewest steps, and smallest share of the steps, that a
        repair must keep.
    Returns:
      [B] bool.
    """
    if select not in SELECT or trigger not in TRIGGERS:
        raise InputError(
            f"select must be one of {SELECT} and trigger of {TRIGGERS}, got {select!r}, {trigger!r}"
        )
    wrong = rewards < solved_at
    low = first_error_step(step_scores, step_mask, tau) >= 0
    chosen = {"wrong": wrong, "wrong_or_low_prm": wrong | low, "any": jnp.ones_like(wrong)}[select]
    right = (~wrong).reshape(-1, group_size).sum(-1, keepdims=True)  # [P, 1]
    open_groups = {
        "always": jnp.ones_like(right, bool),
        "acc_below": right < trigger_accuracy * group_size,
        "all_wrong": right == 0,
        "mixed_only": (right > 0) & (right < group_size),
    }[trigger]
    chosen &= jnp.broadcast_to(open_groups, (open_groups.shape[0], group_size)).reshape(-1)
    num_steps = step_mask.sum(-1)
    chosen &= (
        (first_error >= min_prefix_steps)
        & (first_error >= min_prefix_ratio * num_steps)
        & (num_steps > 0)
    )
    return chosen & finished if require_finished else chosen


def rank_candidates(
    candidates, first_error, step_scores, step_mask, *, group_size, n_correct, limit=None
):
    """Returns each group's candidates with the largest share of right steps.

    Ties go to the higher mean score of the kept prefix, then to the earlier row.

    Args:
      candidates: [B] bool.
      first_error: [B] int32, >= 0 on candidates.
      step_scores, step_mask: [B, S].
      group_size: G.
      n_correct: repairs per group; -1 = every candidate.
      limit: [P] int32, at most so many in each group (what `n_correct` cannot say: it is static).
    Returns:
      (rows [P * n] int32 row indices into B, grouped by prompt; is_real [P * n] bool, False on
      filling), n = n_correct or G.
    """
    chex.assert_rank([candidates, first_error, step_scores], [1, 1, 2])
    take = group_size if n_correct < 0 else min(n_correct, group_size)
    kept = step_mask & (jnp.arange(step_mask.shape[1])[None, :] < first_error[:, None])
    correct_share = first_error / jnp.maximum(step_mask.sum(-1), 1)
    prefix_score = jnp.where(kept, step_scores, 0.0).sum(-1) / jnp.maximum(kept.sum(-1), 1)
    columns = [x.reshape(-1, group_size) for x in (-prefix_score, -correct_share, ~candidates)]
    order = jnp.lexsort(columns, axis=-1)[:, :take]  # the LAST column is the primary key
    rows = order + group_size * jnp.arange(order.shape[0])[:, None]
    is_real = candidates[rows]
    if limit is not None:
        is_real &= jnp.arange(take)[None, :] < limit[:, None]
    return rows.reshape(-1).astype(jnp.int32), is_real.reshape(-1)


def random_wrong_rows(rewards, key, *, group_size, count, solved_at=1.0):
    """Returns [P * count] int32 distinct random rows of each group, wrong ones first."""
    wrong = (rewards < solved_at).reshape(-1, group_size)
    scores = jax.random.uniform(key, wrong.shape) + jnp.where(wrong, 0.0, 1.0)
    order = jnp.argsort(scores, axis=-1)[:, :count]
    return (order + group_size * jnp.arange(order.shape[0])[:, None]).reshape(-1).astype(jnp.int32)


@functools.partial(
    jax.jit,
    static_argnames=(
        "group_size", "solved_at", "n_correct", "spare_last_wrong", "replace_random", "locator",
        "tau", "on_no_error", "select", "require_finished", "trigger", "trigger_accuracy",
        "min_prefix_steps", "min_prefix_ratio",
    ),
)  # fmt: skip
def plan_corrections(
    rewards, finished, step_scores, step_ends, step_mask, keys, *, group_size, solved_at, n_correct,
    spare_last_wrong, replace_random, locator, tau, on_no_error, **select_options,
):  # fmt: skip
    """Decides which rollouts are cut where: all of the above in one program.

    Args:
      keys: (of the locator, of random replacement).
      n_correct: repairs per group, -1 = all; C = P * n_correct (or P * G) rows come back, some of
        them filling.
      spare_last_wrong: leave each group one wrong row, for an all-right group has no advantage.
      replace_random: a correction replaces a random wrong row instead of its source.
      locator, tau, on_no_error: `locate`'s; select_options: `select_candidates`'.
    Returns:
      (first_error [B], rows [C] int32 sources of the corrections, is_real [C] bool, prefix_length
      [C] int32 tokens kept, targets [C] int32 rows that are replaced).
    """
    first_error = locate(
        step_scores, step_mask, keys[0], locator=locator, tau=tau, on_no_error=on_no_error
    )
    candidates = select_candidates(
        rewards, finished, first_error, step_scores, step_mask,
        group_size=group_size, tau=tau, solved_at=solved_at, **select_options,
    )  # fmt: skip
    limit = (rewards < solved_at).reshape(-1, group_size).sum(-1) - 1 if spare_last_wrong else None
    rows, is_real = rank_candidates(
        candidates,
        first_error,
        step_scores,
        step_mask,
        group_size=group_size,
        n_correct=n_correct,
        limit=limit,
    )
    kept = jnp.where(is_real, prefix_length(first_error, step_ends, step_mask)[rows], 0)
    targets = rows
    if replace_random:
        count = rows.shape[0] * group_size // rewards.shape[0]
        targets = random_wrong_rows(
            rewards, keys[1], group_size=group_size, count=count, solved_at=solved_at
        )
    return first_error, rows, is_real, kept, targets


def teacher_share(step: int, *, share: float, share_end: float, over_steps: int) -> float:
    """Returns the share of a step's groups that may be repaired; steps count from 1.

    >>> [teacher_share(n, share=1.0, share_end=0.5, over_steps=5) for n in (1, 3, 6, 9)]
    [1.0, 0.8, 0.5, 0.5]
    """
    done = min(1.0, (step - 1) / over_steps) if over_steps else 0.0
    return share + (share_end - share) * done


def within_share(count: int, groups: int, share: float) -> np.ndarray:
    """Returns which of `count` corrections, equally many of each group, belong to the first `share`
    of the groups (rounded): [count] bool. Problems are shuffled, so these are no special ones.
    """
    return np.arange(count) // (count // groups) < round(share * groups)


def unrepaired(rewards, accepted, allowed, *, solved_at, spare_last_wrong, group_size):
    """Returns where a whole trace may stand in for repairs that failed (numpy, on the host).

    A group gets one if none of its corrections was accepted and it has a wrong rollout.

    Args:
      rewards: [B]; a reward below solved_at is wrong.
      accepted, allowed: [C] bool, equally many of each group: done, not ruled out by a budget.
      spare_last_wrong: a group's last wrong rollout is left to it.
    Returns:
      (slots [C] bool, at most the first of each group; rows [slots.sum()] int, their groups' first
      wrong rollouts).
    """
    wrong = (np.asarray(rewards) < solved_at).reshape(-1, group_size)
    done, open_ = (np.asarray(x).reshape(len(wrong), -1) for x in (accepted, allowed))
    slots = np.zeros(done.shape, bool)
    slots[:, 0] = ~done.any(1) & open_[:, 0] & (wrong.sum(1) > int(spare_last_wrong))
    groups = np.flatnonzero(slots[:, 0])
    return slots.reshape(-1), groups * group_size + wrong.argmax(1)[groups]
