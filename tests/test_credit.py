"""Tests of what a rollout is worth and of what its tokens get: arithmetic, twins, properties."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.credit import assign_credit, group_advantages, token_advantages, token_returns
from scope_jax.losses import policy_loss
from scope_jax.records import PAD, InputError

SEEDS = range(4)
SEQ_MEAN, TOKEN_MEAN = "seq-mean-token-mean", "token-mean"
jit_advantages = jax.jit(group_advantages, static_argnames=("group_size", "scale", "baseline"))


# --- Advantages -------------------------------------------------------------------------------


def test_one_repaired_row_of_an_all_wrong_group_of_eight():
    advantages = jit_advantages(np.eye(8)[2], 8)
    np.testing.assert_allclose(advantages[2], 1 - 1 / 8, rtol=0, atol=1e-7)  # +0.875
    np.testing.assert_allclose(np.delete(advantages, 2), [-1 / 8] * 7, rtol=0, atol=1e-7)
    assert advantages.dtype == np.float32


def test_appended_repair_counts_in_the_mean_and_an_empty_slot_does_not():
    # Groups of 8 + 1 slots: a repair appended; no repair; no repair and four right rows.
    rewards = np.array([[0.0] * 8 + [1.0], [0.0] * 8 + [1.0], [1.0] * 4 + [0.0] * 4 + [1.0]])
    mask = np.array([[True] * 9, [True] * 8 + [False], [True] * 8 + [False]])
    advantages = jit_advantages(rewards.reshape(-1), 9, row_mask=mask.reshape(-1)).reshape(3, 9)
    np.testing.assert_allclose(advantages[0], [-1 / 9] * 8 + [8 / 9], rtol=0, atol=1e-7)
    np.testing.assert_allclose(advantages[1], [0.0] * 9, rtol=0, atol=0)
    np.testing.assert_allclose(
        advantages[2], [1 - 4 / 8] * 4 + [-4 / 8] * 4 + [0.0], rtol=0, atol=1e-7
    )


def test_std_divides_by_the_sample_deviation():
    deviation = (((1 - 1 / 4) ** 2 + 3 * (1 / 4) ** 2) / (4 - 1)) ** 0.5
    advantages = jit_advantages(np.array([0.0, 1.0, 0.0, 0.0]), 4, scale="std")
    want = np.array([-1 / 4, 3 / 4, -1 / 4, -1 / 4]) / (deviation + 1e-6)
    np.testing.assert_allclose(advantages, want, rtol=1e-6)


def test_std_of_equal_rewards_gives_zero_not_nan():
    advantages = jit_advantages(np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), 4, scale="std")
    assert advantages.tolist() == [0.0] * 8


def test_on_policy_baseline_is_the_mean_of_the_policys_own_rows():
    rewards = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    own = np.array(
        [True, True, True, False] + [False] * 4
    )  # the second group falls back to its mean
    advantages = jit_advantages(rewards, 4, baseline="on_policy", on_policy=own)
    first, second = (0 + 1 + 0) / 3, (0 + 0 + 0 + 1) / 4
    want = [-first, 1 - first, -first, 1 - first, -second, -second, -second, 1 - second]
    np.testing.assert_allclose(advantages, want, rtol=0, atol=1e-7)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    advantages = jit_advantages(np.array([1.0, 0.0, 0.0, 0.5]), 4, baseline="leave_one_out")
    want = [1 - 0.5 / 3, 0 - 1.5 / 3, 0 - 1.5 / 3, 0.5 - 1 / 3]
    np.testing.assert_allclose(advantages, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("baseline", ["group", "on_policy", "leave_one_out"])
def test_group_of_one_gets_zero(baseline):
    rewards, mask = np.array([1.0, 0.5]), np.array([True, False])  # a row and an empty slot
    options = {"baseline": baseline, "scale": "std", "on_policy": mask}
    assert jit_advantages(rewards, 2, row_mask=mask, **options).tolist() == [0.0, 0.0]
    assert jit_advantages(rewards, 1, baseline=baseline, on_policy=mask).tolist() == [0.0, 0.0]


def test_what_stands_in_an_empty_slot_does_not_matter():
    mask = np.array([True, True, False, True])
    rewards = np.array([[1.0, 0.0, reward, 0.0] for reward in (0.0, 1e30, np.nan, -np.inf)])
    found = [jit_advantages(row, 4, row_mask=mask, scale="std").tolist() for row in rewards]
    assert found[0] == found[1] == found[2] == found[3]
    assert np.isfinite(found[0]).all() and found[0][2] == 0.0


def slow_advantages(rewards, group_size, scale, baseline, on_policy, row_mask):
    out = []
    for start in range(0, len(rewards), group_size):
        rows = range(start, start + group_size)
        real = [i for i in rows if row_mask[i]]
        for i in rows:
            if not row_mask[i] or len(real) < 2:
                out.append(0.0)
                continue
            base = {
                "group": real,
                "on_policy": [j for j in real if on_policy[j]] or real,
                "leave_one_out": [j for j in real if j != i],
            }[baseline]
            advantage = float(rewards[i]) - statistics.fmean(float(rewards[j]) for j in base)
            if scale == "std":
                advantage /= statistics.stdev(float(rewards[j]) for j in real) + 1e-6
            out.append(advantage)
    return out


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("baseline", ["group", "on_policy", "leave_one_out"])
def test_advantages_agree_with_a_slow_twin_eager_and_jitted(baseline, scale):
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        rewards = rng.choice([0.0, 0.25, 1.0], 20).astype(np.float32)
        options = {
            "scale": scale, "baseline": baseline, "on_policy": rng.random(20) < 0.5,
            "row_mask": rng.random(20) < 0.7,
        }  # fmt: skip
        want = slow_advantages(rewards, 5, **options)
        for advantages_fn in (group_advantages, jit_advantages):
            found = advantages_fn(jnp.asarray(rewards), 5, **options)
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_rewards_that_do_not_divide_and_unknown_options_are_errors():
    with pytest.raises(InputError, match="7 rewards do not divide into groups of 4"):
        group_advantages(np.zeros(7), 4)
    with pytest.raises(InputError, match=r"baseline must be .* got 'median'"):
        group_advantages(np.zeros(4), 4, baseline="median")
    with pytest.raises(InputError, match=r"scale must be .* got 'range'"):
        group_advantages(np.zeros(4), 4, scale="range")
    with pytest.raises(InputError, match="needs on_policy"):
        group_advantages(np.zeros(4), 4, baseline="on_policy")


# --- Credit -----------------------------------------------------------------------------------

# A repaired row (prefix of two, correction of two), a plain one, a whole trace, an empty row.
SOURCE = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0]], np.int8)
ROW_ADVANTAGES = np.array([-2.0, -1.0, 3.0, 5.0], np.float32)


def test_token_advantages_repeat_the_rows_by_default():
    spread = token_advantages(ROW_ADVANTAGES, SOURCE)
    np.testing.assert_array_equal(spread, np.tile(ROW_ADVANTAGES[:, None], (1, 4)))
    assert spread.dtype == np.float32


def test_token_advantages_weigh_prefix_and_correction_of_repaired_rows_only():
    spread = np.asarray(token_advantages(ROW_ADVANTAGES, SOURCE, w_prefix=0.5, w_correction=0.25))
    assert spread[0].tolist() == [-2 * 0.5, -2 * 0.5, -2 * 0.25, -2 * 0.25]
    assert spread[1, :3].tolist() == [-1.0] * 3  # not repaired: its own tokens keep their weight
    assert spread[2, :2].tolist() == [3 * 0.25] * 2


def test_salvage_never_punishes_a_kept_prefix():
    spread = np.asarray(token_advantages(ROW_ADVANTAGES, SOURCE, salvage_only=True))
    assert spread[0].tolist() == [0.0, 0.0, -2.0, -2.0]
    assert spread[1, :3].tolist() == [-1.0] * 3
    kept = np.asarray(token_advantages(-ROW_ADVANTAGES, SOURCE, salvage_only=True))
    assert kept[0].tolist() == [2.0] * 4


CREDIT = {"group_size": 4, "scale": "none", "baseline": "group"}


def test_credit_is_group_advantage_spread_over_tokens():
    rewards, every = np.array([1.0, 0.0, 1.0, 0.0]), np.ones(4, bool)
    per_token, source, by_row = assign_credit(rewards, SOURCE, every, **CREDIT)
    assert by_row.tolist() == [0.5, -0.5, 0.5, -0.5]
    np.testing.assert_array_equal(per_token, np.tile(by_row[:, None], (1, 4)))
    np.testing.assert_array_equal(source, SOURCE)
    assert source.dtype == np.int8


def test_credit_of_an_empty_slot_is_zero_and_its_tokens_are_in_no_loss():
    rewards, mask = np.array([1.0, 0.0, 0.0, 1.0]), np.array([True, True, False, True])
    per_token, source, by_row = assign_credit(rewards, SOURCE, mask, **CREDIT)
    np.testing.assert_allclose(by_row, [1 - 2 / 3, -2 / 3, 0.0, 1 - 2 / 3], rtol=0, atol=1e-7)
    assert (np.asarray(source)[2] == PAD).all() and (np.asarray(per_token)[2] == 0).all()


def test_repaired_rows_are_not_on_policy():
    rewards, every = np.array([1.0, 0.0, 1.0, 0.5]), np.ones(4, bool)
    _, _, by_row = assign_credit(rewards, SOURCE, every, **CREDIT | {"baseline": "on_policy"})
    own = (0.0 + 0.5) / 2  # rows 1 and 3: no token of a teacher
    np.testing.assert_allclose(by_row, rewards - own, rtol=0, atol=1e-7)


def test_prefix_out_of_the_loss_leaves_sums_and_denominators():
    every = np.ones(4, bool)
    _, full, _ = assign_credit(np.zeros(4), SOURCE, every, **CREDIT)
    _, cut, _ = assign_credit(np.zeros(4), SOURCE, every, **CREDIT, prefix_in_loss=False)
    np.testing.assert_array_equal(cut, [[0, 0, 2, 2], [1, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    logps = np.zeros((4, 4), np.float32)  # ratio 1, p 1
    advantages, f = np.array([1.0, 2.0, 4.0, 8.0], np.float32), 1 / 1.1
    loss = functools.partial(policy_loss, logps, logps, advantages)
    np.testing.assert_allclose(
        [loss(source, loss_agg=TOKEN_MEAN)[0] for source in (full, cut)],
        [-(2 + 2 * f + 3 * 2 + 2 * 4 * f) / 9, -(2 * f + 3 * 2 + 2 * 4 * f) / 7],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        [loss(source, loss_agg=SEQ_MEAN)[0] for source in (full, cut)],
        [-((2 + 2 * f) / 4 + 2 + 4 * f) / 3, -(2 * f / 2 + 2 + 4 * f) / 3],
        rtol=1e-6,
    )


def test_prefix_weight_zero_stays_in_the_denominators():
    rewards, every = np.array([1.0, 0.0, 1.0, 0.0]), np.ones(4, bool)
    per_token, source, _ = assign_credit(rewards, SOURCE, every, **CREDIT, w_prefix=0.0)
    zeros = np.zeros((4, 4), np.float32)
    loss, _ = policy_loss(zeros, zeros, per_token, source, loss_agg=TOKEN_MEAN)
    want = -(0 * 2 + 0.5 / 1.1 * 2 - 0.5 * 3 + 0.5 / 1.1 * 2) / 9
    np.testing.assert_allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("scale", ["none", "std"])
@pytest.mark.parametrize("size", [3, 7, 41, 47, 55])
def test_an_all_equal_group_gets_exactly_zero_under_jit_too(size, scale):
    advantages = jax.jit(lambda r: group_advantages(r, size, scale=scale))
    np.testing.assert_array_equal(advantages(np.full(size, 1.0, np.float32)), np.zeros(size))


# --- Returns ----------------------------------------------------------------------------------

# Steps of 2, 1 and 2 tokens; of 3 tokens; none.
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
ENDS = np.array([[2, 3, 5], [3, 0, 0], [0, 0, 0]])
STEPS = np.array([[True, True, True], [True, False, False], [False] * 3])
SCORES = np.array([[0.9, 0.3, 0.6], [0.2, 0.0, 0.0], [0.0] * 3], np.float32)
REWARDS = np.array([0.0, 1.0, 0.0], np.float32)


def returns_of(kind, rewards=REWARDS, **options):
    return token_returns(rewards, MASK, ENDS, SCORES, STEPS, kind=kind, **options)


def test_outcome_is_the_reward_itself():
    found = token_returns(REWARDS, MASK)
    assert list(found) == ["values"]
    np.testing.assert_array_equal(found["values"], REWARDS)


def test_blend_weighs_the_mean_score_against_the_reward():
    found = returns_of("prm_blend", prm_weight=0.25)
    assert list(found) == ["values"]
    want = [0.25 * 0.6 + 0.75 * 0, 0.25 * 0.2 + 0.75 * 1, 0.0]  # no step: its reward alone
    np.testing.assert_allclose(found["values"], want, atol=1e-6)


def test_step_returns_average_what_follows():
    found = returns_of("prm_returns", prm_weight=0.5)
    first = [0.5 * x for x in (0.6, 0.6, 0.45, 0.6, 0.6)]  # means of (.9 .3 .6), (.3 .6), (.6)
    np.testing.assert_allclose(found["returns"][0], first, atol=1e-6)
    np.testing.assert_allclose(found["returns"][1, :3], 0.5 * 0.2 + 0.5, atol=1e-6)
    np.testing.assert_allclose(found["values"], [0.3, 0.6, 0.0], atol=1e-6)


def test_vppo_rewards_the_prefix_of_a_wrong_rollout_only():
    found = returns_of("vppo", prefix_reward=0.5)
    assert found["returns"][0].tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert found["returns"][1, :3].tolist() == [1.0] * 3  # right, whatever the PRM says
    np.testing.assert_allclose(found["values"], [0.5 * 2 / 5, 1.0, 0.0])
    nothing_low = returns_of("vppo", tau=0.1)
    assert nothing_low["values"].tolist() == REWARDS.tolist()
    assert (nothing_low["returns"] == REWARDS[:, None]).all()


def test_vppos_advantages_by_hand():
    """A right rollout and a wrong one of five tokens, three of them in its right prefix."""
    mask, steps = np.ones((2, 5), bool), np.ones((2, 2), bool)
    scores = np.array([[1.0, 1.0], [1.0, 0.0]])
    rewards, ends = np.array([1.0, 0.0]), np.array([[3, 5], [3, 5]])
    found = token_returns(rewards, mask, ends, scores, steps, kind="vppo", prefix_reward=0.5)
    source, real = np.ones((2, 5), np.int8), np.ones(2, bool)
    options = {"group_size": 2, "scale": "none", "baseline": "group"}
    by_token, _, _ = assign_credit(found["values"], source, real, found["returns"], **options)
    baseline = (1 + 0.5 * 3 / 5) / 2
    want = [[1 - baseline] * 5, [0.5 - baseline] * 3 + [-baseline] * 2]
    np.testing.assert_allclose(by_token, want, atol=1e-6)


def test_overlong_rollouts_lose_up_to_one():
    found = token_returns(REWARDS, MASK, overlong_share=0.8)  # the last 4 tokens of 5
    np.testing.assert_allclose(found["values"], [0 - 1.0, 1 - 0.5, 0.0])
    dense = returns_of("prm_returns", overlong_share=0.8)
    plain = returns_of("prm_returns")
    np.testing.assert_allclose(
        dense["returns"][:2], plain["returns"][:2] - [[1.0], [0.5]], atol=1e-6
    )


def slow_returns(kind, reward, length, ends, scores, *, prm_weight, prefix_reward, tau):
    """Token by token, in plain Python: (value, returns of the first `length` tokens)."""
    if not scores:
        return reward, [reward] * length
    step = [sum(end <= t for end in ends) for t in range(length)]
    if kind == "vppo":
        low = [k for k, s in enumerate(scores) if s < tau]
        if reward >= 1 or not low:
            return reward, [reward] * length
        returns = [prefix_reward if k < low[0] else 0.0 for k in step]
        return sum(returns) / length, returns
    mean = lambda k: statistics.fmean(scores[k:])  # noqa: E731
    blend = lambda k: prm_weight * mean(k) + (1 - prm_weight) * reward  # noqa: E731
    return blend(0), [blend(k if kind == "prm_returns" else 0) for k in step]


@pytest.mark.parametrize("kind", ["prm_blend", "prm_returns", "vppo"])
def test_returns_agree_with_a_slow_twin(kind):
    rng = np.random.default_rng(0)
    rows, width, most = 40, 30, 6
    mask, ends = np.zeros((rows, width), bool), np.zeros((rows, most), np.int32)
    steps, scores = np.zeros((rows, most), bool), rng.random((rows, most)).astype(np.float32)
    rewards = rng.integers(0, 2, rows).astype(np.float32)
    for row in range(rows):
        count, length = rng.integers(0, most + 1), rng.integers(most, width + 1)
        mask[row, :length], steps[row, :count] = True, True
        cuts = np.sort(rng.choice(length - 1, max(count - 1, 0), replace=False)) + 1
        ends[row, :count] = [*cuts, length][:count] if count else []
    options = {"prm_weight": 0.3, "prefix_reward": 0.4, "tau": 0.5}
    found = token_returns(rewards, mask, ends, scores, steps, kind=kind, **options)
    for row in range(rows):
        real = steps[row]
        value, returns = slow_returns(
            kind, float(rewards[row]), int(mask[row].sum()), ends[row][real].tolist(),
            scores[row][real].tolist(), **options,
        )  # fmt: skip
        np.testing.assert_allclose(found["values"][row], value, atol=1e-5)
        if "returns" in found:
            np.testing.assert_allclose(found["returns"][row][mask[row]], returns, atol=1e-5)


def test_returns_of_an_empty_slot_and_of_a_scaled_group():
    values, real = np.array([1.0, 0.0], np.float32), np.array([True, False])
    source, returns = np.ones((2, 3), np.int8), np.full((2, 3), 7.0, np.float32)
    options = {"group_size": 2, "baseline": "group"}
    by_token, _, _ = assign_credit(values, source, real, returns, scale="none", **options)
    assert (np.asarray(by_token)[1] == 0).all()
    with pytest.raises(InputError, match='need advantages.scale="none"'):
        assign_credit(values, source, real, returns, scale="std", **options)


def test_returns_equal_to_the_values_change_no_bit():
    values, every = np.array([1.0, 0.0, 1.0, 0.3], np.float32), np.ones(4, bool)
    returns = np.repeat(values[:, None], 4, axis=1)
    plain, with_returns = (
        assign_credit(values, SOURCE, every, r, **CREDIT)[0] for r in (None, returns)
    )
    np.testing.assert_array_equal(plain, with_returns)


def test_policy_rows_without_weight_leave_the_teachers():
    values, every = np.array([1.0, 0.0, 1.0, 0.0]), np.ones(4, bool)
    by_token, _, by_row = assign_credit(values, SOURCE, every, **CREDIT, w_policy=0.0)
    assert (np.asarray(by_token)[[1, 3]] == 0).all()
    assert np.asarray(by_token)[0].tolist() == [by_row[0]] * 4
    assert np.asarray(by_token)[2, :2].tolist() == [by_row[2]] * 2


def test_unknown_kind_of_returns_is_an_error():
    with pytest.raises(InputError, match="returns.kind must be one of outcome, prm_blend"):
        token_returns(REWARDS, MASK, kind="dense")
