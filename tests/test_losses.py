"""Tests of token log-probs and the policy loss: arithmetic, twins, extreme values."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.credit import group_advantages
from scope_jax.losses import (
    LOSS_AGGREGATIONS,
    OFF_POLICY,
    aggregate,
    kl_penalty,
    loss_denominator,
    policy_loss,
    shape_off_policy,
    token_logps,
    token_losses,
)
from scope_jax.records import PAD, POLICY, TEACHER, InputError

SEEDS = range(4)
B, T, L_MAX = 6, 5, 7
SUM_NORM, SEQ_MEAN, TOKEN_MEAN = LOSS_AGGREGATIONS

# Eager at one shape: a jitted program for each of the options would take minutes to compile.
value_and_grad = jax.value_and_grad(policy_loss, has_aux=True)
jit_value_and_grad = jax.jit(
    value_and_grad, static_argnames=("off_policy", "loss_agg", "max_length")
)


def random_batch(seed, teacher=True):
    """Rows of tokens of mixed origin (one without any), ratios inside and outside the clip."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    lengths[seed % B] = 0
    source = rng.integers(POLICY, (TEACHER if teacher else POLICY) + 1, (B, T))
    source = np.where(np.arange(T)[None, :] < lengths[:, None], source, PAD).astype(np.int8)
    logps = -rng.exponential(1.0, (B, T)).astype(np.float32)
    old_logps = (logps + rng.normal(0, 0.4, (B, T))).astype(np.float32)
    advantages = rng.choice([-1.5, -0.125, 0.0, 0.875], (B, T)).astype(np.float32)
    return logps, old_logps, advantages, source


def corner(values, dtype=np.float32):
    """Puts one short row into a batch of padding, so that tests share their compiled programs."""
    out = np.zeros((B, T), dtype)
    out[0, : len(values)] = values
    return out


def slow_policy_loss(
    logps, old_logps, advantages, token_source, *, clip_low=0.2, clip_high=0.2,
    off_policy="shaped", gamma=0.1, loss_agg=SUM_NORM, max_length=None,
):  # fmt: skip
    """The loss and its gradient on logps, one token at a time in float64, derived by hand."""
    tokens = [(i, t) for i in range(B) for t in range(T) if token_source[i, t] != PAD]
    counts = {i: sum(row == i for row, _ in tokens) for i, _ in tokens}
    total, grad = 0.0, np.zeros((B, T))
    for i, t in tokens:
        a, logp = float(advantages[i, t]), float(logps[i, t])
        p = math.exp(logp)
        if token_source[i, t] == TEACHER and off_policy == "shaped":
            term, slope = -p / (p + gamma) * a, -gamma * p / (p + gamma) ** 2 * a
        elif token_source[i, t] == TEACHER and off_policy == "linear":
            term, slope = -p * a, -p * a
        elif token_source[i, t] == TEACHER and off_policy == "sft":
            term, slope = -logp, -1.0
        elif token_source[i, t] == TEACHER:
            ratio = math.exp(logp - float(old_logps[i, t]))
            term, slope = -min(ratio, 2.0) * a, -ratio * a if ratio < 2 else 0.0
        else:
            ratio = math.exp(logp - float(old_logps[i, t]))
            low = -math.inf if clip_low is None else 1 - clip_low
            high = math.inf if clip_high is None else 1 + clip_high
            clipped = min(max(ratio, low), high)
            term = -min(ratio * a, clipped * a)
            slope = -ratio * a if ratio * a <= clipped * a else 0.0
        weight = {
            SUM_NORM: 1 / (len(counts) * (max_length or T)),
            SEQ_MEAN: 1 / (len(counts) * counts[i]),
            TOKEN_MEAN: 1 / len(tokens),
        }[loss_agg]
        total, grad[i, t] = total + weight * term, weight * slope
    return total, grad


def assert_agrees_with_twin(batch, **options):
    want_loss, want_grad = slow_policy_loss(*batch, **options)
    (loss, _), grad = value_and_grad(*batch, **options)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-7)


# --- Aggregation ------------------------------------------------------------------------------


def test_aggregations_by_hand():
    values = np.array([[0.1, 0.2, 9.0], [0.4, 0.5, 0.6], [9.0, 9.0, 9.0]])
    mask = np.array([[True, True, False], [True, True, True], [False, False, False]])
    found = [aggregate(values, mask, agg, 10) for agg in (SUM_NORM, SEQ_MEAN, TOKEN_MEAN)]
    want = [
        ((0.1 + 0.2) / 10 + (0.4 + 0.5 + 0.6) / 10) / 2,  # the empty row is no row
        ((0.1 + 0.2) / 2 + (0.4 + 0.5 + 0.6) / 3) / 2,
        (0.1 + 0.2 + 0.4 + 0.5 + 0.6) / 5,
    ]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert [float(loss_denominator(mask, agg)) for agg in LOSS_AGGREGATIONS] == [2.0, 2.0, 5.0]


def slow_gspo(logps, old_logps, advantages, token_source, clip_low, clip_high):
    """GSPO's objective, negated: mean over rows of -min(s A, clip(s) A), one A a row."""
    terms = []
    for i in range(B):
        own = [t for t in range(T) if token_source[i, t] == POLICY]
        if not own:
            continue
        s = math.exp(math.fsum(float(logps[i, t]) - float(old_logps[i, t]) for t in own) / len(own))
        a = float(advantages[i])
        terms.append(-min(s * a, min(max(s, 1 - clip_low), 1 + clip_high) * a))
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("seed", SEEDS)
def test_sequence_ratio_is_gspos(seed):
    logps, old_logps, advantages, source = random_batch(seed, teacher=False)
    old_logps = logps + (old_logps - logps) * 0.1  # within the clip, on both sides and beyond
    options = {"clip_low": 0.03, "clip_high": 0.05}
    batch = (old_logps, advantages[:, 0], source)
    (loss, info), grad = value_and_grad(
        logps, *batch, ratio="sequence", loss_agg=SEQ_MEAN, **options
    )
    np.testing.assert_allclose(loss, slow_gspo(logps, *batch, *options.values()), rtol=1e-5)
    gap = np.abs(logps - old_logps)[source == POLICY].max()  # of tokens: what a sampler's error is
    np.testing.assert_allclose(info["log_ratio_max"], gap, rtol=1e-6)
    wide, step = logps.astype(np.float64), 1e-5
    for i, t in itertools.product(range(B), range(T)):
        sides = []
        for sign in (1, -1):
            moved = wide.copy()
            moved[i, t] += sign * step
            sides.append(slow_gspo(moved, *batch, *options.values()))
        np.testing.assert_allclose(grad[i, t], (sides[0] - sides[1]) / (2 * step), atol=1e-5)


def test_sequence_ratio_of_packed_rows_is_that_of_their_rollouts():
    logps, old_logps, advantages, source = random_batch(1)
    options = {"clip_low": 0.1, "clip_high": 0.1, "off_policy": "shaped", "gamma": 0.1}
    apart, _ = token_losses(logps, old_logps, advantages, source, ratio="sequence", **options)
    side_by_side = lambda x: np.concatenate([x[0::2], x[1::2]], axis=1)  # noqa: E731
    number = np.broadcast_to(np.arange(B)[:, None] % 2, (B, T))
    segments = np.where(source == PAD, -1, number).astype(np.int32)
    batch = [side_by_side(x) for x in (logps, old_logps, advantages, source)]
    packed, _ = token_losses(*batch, ratio="sequence", segments=side_by_side(segments), **options)
    real = side_by_side(source) != PAD
    np.testing.assert_allclose(packed[real], side_by_side(np.asarray(apart))[real], rtol=1e-6)


def test_unknown_aggregation_or_treatment_is_an_error():
    batch = random_batch(0)
    with pytest.raises(InputError, match=r"loss_agg must be one of .* got 'sum'"):
        policy_loss(*batch, loss_agg="sum")
    with pytest.raises(InputError, match=r"off_policy must be one of .* got 'ppo'"):
        policy_loss(*batch, off_policy="ppo")


# --- Policy loss ------------------------------------------------------------------------------


def test_shaping_is_luffys():
    np.testing.assert_allclose(shape_off_policy(np.array([0.0, 0.1, 1.0])), [0, 0.5, 1 / 1.1])
    np.testing.assert_allclose(shape_off_policy(0.3, gamma=0.2), 0.3 / (0.3 + 0.2))


def test_gradient_weight_on_a_teacher_token_is_gamma_p_over_p_plus_gamma_squared():
    logps, source = corner(np.log([0.1, 1.0, 0.01])), corner([TEACHER] * 3, np.int8)
    (_, _), grad = value_and_grad(logps, logps, np.ones_like(logps), source, max_length=L_MAX)
    want = [0.1 * 0.1 / (0.1 + 0.1) ** 2, 0.1 * 1 / (1 + 0.1) ** 2, 0.1 * 0.01 / (0.01 + 0.1) ** 2]
    np.testing.assert_allclose(want, [0.25, 0.0826446, 0.0826446], rtol=0, atol=1e-7)
    np.testing.assert_allclose(-L_MAX * grad[0, :3], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
@pytest.mark.parametrize("off_policy", OFF_POLICY)
def test_loss_and_gradient_agree_with_a_float64_twin(off_policy, loss_agg):
    options = {"off_policy": off_policy, "loss_agg": loss_agg}
    for seed in SEEDS:
        assert_agrees_with_twin(random_batch(seed), max_length=L_MAX, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_low": None, "clip_high": None},
        {"clip_low": None},
        {"clip_high": None},
        {"clip_low": 0.1, "clip_high": 0.28, "gamma": 0.3},
    ],
    ids=str,
)
def test_clip_and_gamma_agree_with_a_float64_twin(options):
    for seed in SEEDS:
        assert_agrees_with_twin(random_batch(seed), max_length=L_MAX, **options)


def ratio_losses(**options):
    """Loss and gradient of one POLICY token of ratio 1.5 or 0.5 and advantage +1 or -1."""
    found = []
    for advantage, ratio in itertools.product((1.0, -1.0), (1.5, 0.5)):
        columns = [corner([x]) for x in (math.log(ratio) - 3, -3.0, advantage)]
        source = corner([POLICY], np.int8)
        (loss, _), grad = value_and_grad(*columns, source, max_length=L_MAX, **options)
        found.append((L_MAX * float(loss), L_MAX * float(grad[0, 0])))
    return np.array(found).T


def test_each_side_is_clipped_only_where_it_limits_the_gain():
    loss, grad = ratio_losses()
    np.testing.assert_allclose(loss, [-1.2, -0.5, 1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(grad, [0.0, -0.5, 1.5, 0.0], rtol=1e-6)


def test_a_side_that_is_none_is_not_clipped():
    loss, grad = ratio_losses(clip_high=None)
    np.testing.assert_allclose(loss, [-1.5, -0.5, 1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(grad, [-1.5, -0.5, 1.5, 0.0], rtol=1e-6)
    loss, grad = ratio_losses(clip_low=None)
    np.testing.assert_allclose(loss, [-1.2, -0.5, 1.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(grad, [0.0, -0.5, 1.5, 0.5], rtol=1e-6)
    loss, grad = ratio_losses(clip_low=None, clip_high=None)
    np.testing.assert_allclose(loss, [-1.5, -0.5, 1.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(grad, [-1.5, -0.5, 1.5, 0.5], rtol=1e-6)


def test_teacher_ratio_is_clamped_to_two():
    ratios = np.array([0.5, 1.9, 2.5, 1e4])
    logps, old = corner(np.log(ratios) - 10), corner([-10.0] * 4)
    (loss, _), grad = value_and_grad(
        logps, old, np.full((B, T), 3, np.float32), corner([TEACHER] * 4, np.int8),
        off_policy="teacher_prob", max_length=L_MAX,
    )  # fmt: skip
    np.testing.assert_allclose(L_MAX * loss, -3 * (0.5 + 1.9 + 2 + 2), rtol=1e-6)
    np.testing.assert_allclose(L_MAX * grad[0], [-3 * 0.5, -3 * 1.9, 0, 0, 0], rtol=1e-5)


def test_sft_ignores_the_advantage_of_teacher_tokens():
    logps, old, _, source = random_batch(1)
    source = np.where(source == PAD, PAD, TEACHER).astype(np.int8)
    losses = [
        value_and_grad(
            logps, old, np.full((B, T), a, np.float32), source, off_policy="sft", max_length=L_MAX
        )[0][0]
        for a in (-1.0, 0.0, 2.0)
    ]
    assert losses[0] == losses[1] == losses[2] > 0


@pytest.mark.parametrize("off_policy", OFF_POLICY)
def test_extreme_old_logps_that_are_not_read_change_neither_loss_nor_gradient(off_policy):
    for seed in SEEDS:
        logps, old, advantages, source = random_batch(seed)
        unread = (source == PAD) if off_policy == "teacher_prob" else (source != POLICY)
        assert unread.any()
        results = [
            value_and_grad(
                logps, np.where(unread, value, old).astype(np.float32), advantages, source,
                off_policy=off_policy, max_length=L_MAX,
            )
            for value in (0.0, np.nan, np.inf, -np.inf, 1e30, -1e30)
        ]  # fmt: skip
        for result in results[1:]:
            chex.assert_trees_all_equal(results[0], result)
        chex.assert_tree_all_finite(results[0])


@pytest.mark.parametrize("off_policy", OFF_POLICY)
def test_extreme_logps_and_advantages_at_padding_change_neither_loss_nor_gradient(off_policy):
    logps, old, advantages, source = random_batch(2)
    poison = lambda x, value: np.where(source == PAD, value, x).astype(np.float32)  # noqa: E731
    results = [
        value_and_grad(
            poison(logps, value), old, poison(advantages, value), source, off_policy=off_policy,
            max_length=L_MAX,
        )
        for value in (0.0, np.nan, np.inf, -np.inf, 1e30)
    ]  # fmt: skip
    for result in results[1:]:
        chex.assert_trees_all_equal(results[0], result)
    chex.assert_tree_all_finite(results[0])


@pytest.mark.parametrize("old_value", [-np.inf, -1e30, -200.0, np.inf, 1e30])
def test_extreme_old_logps_that_are_read_give_no_nan(old_value):
    # A teacher's unlikely token, and a policy token that sampler and trainer disagree about.
    for source, advantage in itertools.product((POLICY, TEACHER), (1.0, 0.0)):
        rows = np.full((B, T), source, np.int8), np.full((B, T), advantage, np.float32)
        logps, old = np.full((B, T), -1.0, np.float32), np.full((B, T), old_value, np.float32)
        (loss, _), grad = value_and_grad(
            logps, old, rows[1], rows[0], off_policy="teacher_prob", max_length=L_MAX
        )
        assert np.isfinite(loss) and not np.asarray(grad).any()
        limit = 2.0 if source == TEACHER else 1.2
        want = -limit * advantage * T / L_MAX if old_value < 0 else 0.0
        np.testing.assert_allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("off_policy", ["shaped", "linear", "teacher_prob"])
def test_token_that_the_policy_finds_impossible_has_no_gradient_not_nan(off_policy):
    _, old, advantages, source = random_batch(3)
    source = np.where(source == PAD, PAD, TEACHER).astype(np.int8)
    for value in (-np.inf, -1e30, -1e4):
        logps = np.full((B, T), value, np.float32)
        result = value_and_grad(
            logps, old, advantages, source, off_policy=off_policy, max_length=L_MAX
        )
        assert result[0][0] == 0 and not np.asarray(result[1]).any()


def test_rows_without_tokens_count_in_no_mean():
    zeros, advantages = np.zeros((B, T), np.float32), np.ones((B, T), np.float32)
    source = corner([POLICY, POLICY])  # two tokens of ratio 1 in one row, nothing in the others
    wants = {SUM_NORM: -2 / L_MAX / 1, SEQ_MEAN: -2 / 2 / 1, TOKEN_MEAN: -2 / 2}
    for loss_agg, want in wants.items():
        options = {"loss_agg": loss_agg, "max_length": L_MAX}
        (loss, _), grad = value_and_grad(zeros, zeros, advantages, source, **options)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        np.testing.assert_allclose(grad, corner([want / 2] * 2), rtol=1e-6)


@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_batch_without_tokens_has_loss_and_gradient_zero(loss_agg):
    logps, old, advantages, source = random_batch(0)
    result = value_and_grad(logps, old, advantages, 0 * source, loss_agg=loss_agg, max_length=L_MAX)
    for leaf in jax.tree.leaves(result):
        assert not np.asarray(leaf).any()


def test_row_advantages_are_token_advantages_repeated():
    for seed in SEEDS:
        logps, old, advantages, source = random_batch(seed)
        by_row = advantages[:, 0]
        by_token = np.tile(by_row[:, None], (1, T))
        chex.assert_trees_all_equal(
            value_and_grad(logps, old, by_row, source, max_length=L_MAX),
            value_and_grad(logps, old, by_token, source, max_length=L_MAX),
        )


def test_max_length_defaults_to_the_width():
    batch = random_batch(0)
    chex.assert_trees_all_equal(value_and_grad(*batch), value_and_grad(*batch, max_length=T))
    (wide, _), _ = value_and_grad(*batch, max_length=2 * T)
    np.testing.assert_allclose(2 * wide, value_and_grad(*batch)[0][0], rtol=1e-6)


def test_diagnostics_by_hand():
    ratios = np.array([1.5, 0.6, 0.5])
    old = corner([-2.0, -1.0, -3.0, 50.0, 50.0])
    logps = corner([*(old[0, :3] + np.log(ratios)), *np.log([0.25, 0.5])])
    source = corner([POLICY, POLICY, POLICY, TEACHER, TEACHER], np.int8)
    advantages = corner([1.0, 1.0, -1.0, 1.0, 1.0])  # clips 1.5 (A > 0) and 0.5 (A < 0), not 0.6
    _, info = policy_loss(logps, old, advantages, source)
    log_ratios = [math.log(1.5), math.log(0.6), math.log(0.5)]
    want = {
        "ratio_mean": (1.5 + 0.6 + 0.5) / 3,
        "log_ratio_max": math.log(2),
        "clip_fraction": 2 / 3,
        "approx_kl": (1.5 + 0.6 + 0.5 - 3 - sum(log_ratios)) / 3,
        "teacher_prob_mean": (0.25 + 0.5) / 2,
        "teacher_token_share": 2 / 5,
    }
    assert set(info) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(info[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("off_policy", ["shaped", "teacher_prob"])
def test_loss_and_gradient_are_the_same_eager_and_jitted(off_policy):
    for seed in SEEDS:
        options = {"off_policy": off_policy, "max_length": L_MAX}
        eager = value_and_grad(*random_batch(seed), **options)
        jitted = jit_value_and_grad(*random_batch(seed), **options)
        chex.assert_trees_all_close(eager, jitted, rtol=1e-5, atol=1e-7)


# --- Identities -------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.2, None])
def test_whole_teacher_traces_and_no_clip_is_luffys_loss(clip):
    rng = np.random.default_rng(0)
    logps = -rng.exponential(1.0, (B, T)).astype(np.float32)
    old = logps + rng.normal(0, 0.5, (B, T)).astype(np.float32)
    lengths, is_trace = [5, 1, 4, 3, 2, 5], [False, False, True, False, False, True]
    advantages = np.asarray(group_advantages(np.array([0.0, 1, 1, 0, 0, 1], np.float32), 3))
    source = np.array(
        [
            [(TEACHER if trace else POLICY) if t < n else PAD for t in range(T)]
            for n, trace in zip(lengths, is_trace, strict=True)
        ],
        np.int8,
    )
    # LUFFY: pi / pi_old * A on the policy's rows, f(pi) * A on the teacher's, f(p) = p / (p + 0.1).
    want, want_grad = 0.0, np.zeros((B, T))
    for i, n in enumerate(lengths):
        for t in range(n):
            p, a = math.exp(logps[i, t]), float(advantages[i])
            ratio = p / math.exp(old[i, t])
            want -= (p / (p + 0.1) if is_trace[i] else ratio) * a / L_MAX / B
            slope = 0.1 * p / (p + 0.1) ** 2 if is_trace[i] else ratio
            want_grad[i, t] = -slope * a / L_MAX / B
    options = {"clip_low": clip, "clip_high": clip, "max_length": L_MAX}
    (loss, _), grad = value_and_grad(logps, old, advantages, source, **options)
    if clip is None:
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-8)
    else:  # the clip is what makes the difference, on the policy's own rows only
        assert abs(loss - want) > 1e-3
        np.testing.assert_allclose(grad[2::3], want_grad[2::3], rtol=1e-5, atol=1e-8)


def test_batch_without_teacher_tokens_is_dr_grpo():
    def dr_grpo(logps, old_logps, advantages, mask):
        ratio = jnp.exp(jnp.where(mask, logps - old_logps, 0.0))
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        per_row = jnp.where(mask, gain, 0.0).sum(-1) / L_MAX
        return -per_row.sum() / mask.any(-1).sum()

    plain = jax.jit(jax.value_and_grad(dr_grpo))
    for seed in SEEDS:
        logps, old, advantages, source = random_batch(seed, teacher=False)
        want, want_grad = plain(logps, old, advantages, source != PAD)
        (loss, _), grad = jit_value_and_grad(logps, old, advantages, source, max_length=L_MAX)
        np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-8)


def test_without_teacher_tokens_every_off_policy_setting_is_bit_identical():
    for seed in SEEDS:
        batch = random_batch(seed, teacher=False)
        run = functools.partial(jit_value_and_grad, *batch, max_length=L_MAX)
        results = [run(off_policy=name) for name in OFF_POLICY]
        for result in results[1:]:
            chex.assert_trees_all_equal(results[0], result)


# --- KL ---------------------------------------------------------------------------------------


def test_k3_agrees_with_a_float64_twin_and_reads_policy_tokens_only():
    for seed in SEEDS:
        logps, ref, _, source = random_batch(seed)
        logps, ref = (np.where(source == POLICY, x, np.nan) for x in (logps, ref))
        found = np.asarray(jax.jit(kl_penalty)(logps, ref, source))
        gap = np.where(source == POLICY, ref.astype(np.float64) - logps, 0.0)
        np.testing.assert_allclose(found, np.exp(gap) - 1 - gap, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found, kl_penalty(logps, ref, source), rtol=1e-5, atol=1e-9)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    gap = np.random.default_rng(0).normal(0, 1e-3, (1, 20000)).astype(np.float32)
    found = np.asarray(jax.jit(kl_penalty)(-gap, 0 * gap, np.ones_like(gap, np.int8)))
    assert (found >= 0).all()
    large = np.abs(gap) > 1e-4
    np.testing.assert_allclose(found[large], gap[large].astype(float) ** 2 / 2, rtol=5e-3)


def test_gradient_of_k3_is_one_minus_ref_over_policy_and_zero_elsewhere():
    logps, ref, _, source = random_batch(0)
    ref = np.where(source == POLICY, ref, np.inf)
    grad = jax.jit(jax.grad(lambda x: kl_penalty(x, ref, source).sum()))(logps)
    want = np.where(source == POLICY, 1 - np.exp(np.where(source == POLICY, ref - logps, 0)), 0)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


# --- Token log-probs --------------------------------------------------------------------------

ROWS, LENGTH, WIDTH, VOCAB = 3, 4, 6, 11
jit_token_logps = jax.jit(token_logps, static_argnames=("temperature", "chunk_size"))


def random_hidden(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    unembed = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    return hidden, unembed, rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)


def full_token_logps(hidden, unembed, targets, *, temperature=1.0):
    """The same from all logits at once."""
    logps = jax.nn.log_softmax(hidden @ unembed / temperature, axis=-1)  # [B, T, V]
    entropy = -(jax.nn.softmax(hidden @ unembed / temperature, axis=-1) * logps).sum(-1)
    return jnp.take_along_axis(logps, targets[:, :, None], axis=-1)[:, :, 0], entropy


def weighted(token_logps_fn, hidden, unembed, targets, **options):
    """A scalar that every log-prob and every entropy enters with another weight."""
    logps, entropy = token_logps_fn(hidden, unembed, targets, **options)
    weights = jnp.arange(1.0, 1 + logps.size).reshape(logps.shape)
    return (weights * logps).sum() + (jnp.cos(weights) * entropy).sum(), (logps, entropy)


weighted_and_grads = jax.jit(
    jax.value_and_grad(weighted, argnums=(1, 2), has_aux=True),
    static_argnums=0,
    static_argnames=("temperature", "chunk_size"),
)


@pytest.mark.parametrize(
    "chunk_size, temperature",  # of 12 positions: 1 and 4 divide them, 5 and 100 do not
    [(1, 0.7), (4, 0.7), (5, 1.0), (5, 0.7), (100, 0.7)],
)
def test_token_logps_are_log_softmax_of_the_full_logits_with_gradients(chunk_size, temperature):
    inputs, options = random_hidden(), {"temperature": temperature}
    want, want_grads = weighted_and_grads(full_token_logps, *inputs, **options)
    found, grads = weighted_and_grads(token_logps, *inputs, chunk_size=chunk_size, **options)
    chex.assert_trees_all_close(found[1], want[1], rtol=0, atol=1e-5)
    chex.assert_trees_all_close(grads, want_grads, rtol=1e-5, atol=1e-5)


def test_token_logps_agree_with_a_float64_twin():
    for seed in SEEDS:
        hidden, unembed, targets = random_hidden(seed)
        logps, entropy = jit_token_logps(hidden, unembed, targets, temperature=0.7, chunk_size=5)
        for i, t in itertools.product(range(ROWS), range(LENGTH)):
            logits = [float(hidden[i, t].astype(float) @ unembed[:, v]) / 0.7 for v in range(VOCAB)]
            total = math.log(sum(math.exp(x) for x in logits))
            own = [x - total for x in logits]
            np.testing.assert_allclose(logps[i, t], own[targets[i, t]], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                entropy[i, t], -sum(math.exp(x) * x for x in own), rtol=1e-5, atol=1e-6
            )


def test_uniform_logits_have_log_vocab_entropy():
    _, unembed, targets = random_hidden()
    hidden = np.zeros((ROWS, LENGTH, WIDTH), np.float32)
    logps, entropy = jit_token_logps(hidden, unembed, targets, temperature=0.7, chunk_size=5)
    np.testing.assert_allclose(logps, np.full((ROWS, LENGTH), -math.log(VOCAB)), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.full((ROWS, LENGTH), math.log(VOCAB)), rtol=1e-6)


def test_token_logps_are_float32_of_bfloat16_weights():
    hidden, unembed, targets = random_hidden()
    half = hidden.astype(jnp.bfloat16), unembed.astype(jnp.bfloat16)
    logps, entropy = jit_token_logps(*half, targets, chunk_size=5)
    assert logps.dtype == entropy.dtype == np.float32
    want = full_token_logps(hidden, unembed, targets)
    chex.assert_trees_all_close((logps, entropy), want, rtol=0, atol=0.1)


def test_extreme_logits_give_finite_log_probs_entropy_and_gradients():
    hidden, unembed, targets = random_hidden()
    for scale in np.float32([1e4, 1e30]):
        found = weighted_and_grads(
            token_logps, scale * hidden, unembed, targets, temperature=1.0, chunk_size=5
        )
        chex.assert_tree_all_finite(found)
        np.testing.assert_allclose(found[0][1][1], np.zeros((ROWS, LENGTH)), atol=1e-6)


def all_avals(jaxpr):
    """Every array type of a program, loops and checkpoints included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        yield from (v.aval for v in eqn.invars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_avals(inner)


def largest_array(chunk_size):
    rows, length, width, vocab = 4, 6, 2, 50  # 24 positions
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((rows, length, width), np.float32),
            ((width, vocab), np.float32),
            ((rows, length), np.int32),
        )
    ]
    step = jax.value_and_grad(
        lambda *x: weighted(token_logps, *x, chunk_size=chunk_size), argnums=(0, 1), has_aux=True
    )
    program = jax.make_jaxpr(step)(*arguments)
    return max(math.prod(aval.shape) for aval in all_avals(program.jaxpr)) / vocab


@pytest.mark.parametrize("chunk_size", [4, 5])
def test_no_array_of_all_logits_exists_forward_or_backward(chunk_size):
    assert largest_array(chunk_size) == chunk_size  # positions whose logits exist at once
    assert largest_array(24) == 24
