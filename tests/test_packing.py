"""Tests of packing: the rows, attention within segments, and updates equal to the unpacked ones."""

import dataclasses
import functools
import json
import logging
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_jax.configlib import load_config
from scope_jax.losses import (
    LOSS_AGGREGATIONS,
    aggregate,
    count_tokens,
    token_share,
    token_weights,
)
from scope_jax.models import attention
from scope_jax.models.attention import attend_by_blocks, attend_context, attend_splash
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.packing import first_fit, pack
from scope_jax.records import PAD, POLICY, TEACHER, InputError, TrainBatch
from scope_jax.sharding import make_mesh, put_batch, shardings
from scope_jax.train import train
from scope_jax.update import (
    completion_logps,
    fill_logps,
    init_state,
    packed_logps,
    put_minis,
    train_step,
    update_policy,
)

B, N, T, VOCAB = 16, 4, 9, 24
SGD = optax.sgd(1.0)  # parameters move by minus the gradient
LOSS = {"temperature": 0.7, "max_length": T + 2, "chunk_size": 32}
BONUS = {"entropy_coef": 0.3, "kl_coef": 0.2}
MODEL = Transformer(
    TransformerConfig(
        vocab_size=VOCAB, embed_dim=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        mlp_dim=16,
    )
)  # fmt: skip
PARAMS = jax.tree.map(
    lambda weight: np.random.default_rng(0).normal(0, 0.5, weight.shape).astype(np.float32),
    declare(MODEL.config),
    is_leaf=lambda x: hasattr(x, "hf"),
)


def random_batch(seed, *, longest=T, empty=(3, 4)):
    """Rows of uneven length, of both writers; `empty` ones have no completion, row 7's is in no
    loss, the others have context that is in no loss.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, B)
    lengths[list(empty)] = 0
    mask = np.arange(T)[None, :] < lengths[:, None]
    prompt_mask = np.arange(N)[None, :] >= rng.integers(0, N, B)[:, None]  # LEFT-padded
    source = rng.choice([PAD, POLICY, POLICY, TEACHER], (B, T))
    source = np.where(mask & (np.arange(B)[:, None] != 7), source, PAD).astype(np.int8)
    unread = lambda x: np.where(source == PAD, np.nan, x).astype(np.float32)  # noqa: E731
    return TrainBatch(
        prompt_ids=np.where(prompt_mask, rng.integers(1, VOCAB, (B, N)), 0).astype(np.int32),
        prompt_mask=prompt_mask,
        completion_ids=np.where(mask, rng.integers(1, VOCAB, (B, T)), 0).astype(np.int32),
        token_source=source,
        completion_mask=mask,
        old_logps=unread(-rng.exponential(2.0, (B, T))),
        advantages=np.where(source == PAD, 7, rng.normal(size=(B, T))).astype(np.float32),
        ref_logps=unread(-rng.exponential(2.0, (B, T))),
    )


def packed(batch, parts=4):
    return pack(batch, rows_per_part=B // parts, parts=parts)


# --- First fit ------------------------------------------------------------------------------------


def plain_first_fit(lengths, capacity):
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= capacity:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def test_first_fit_by_hand():
    # 7 | 6 + 2 | 5 + 3 + 1 + 1: the ones fit the first row with room for them
    assert first_fit([1, 6, 3, 7, 5, 2, 1], 9) == [[3, 5], [1, 2], [4, 0, 6]]
    assert first_fit([2, 2, 2], 4) == [[0, 1], [2]]
    assert first_fit([], 4) == []


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_first_fit_loses_nothing_and_takes_few_rows(lengths, capacity):
    rows = first_fit(lengths, capacity)
    assert rows == plain_first_fit(lengths, capacity) == first_fit(np.array(lengths), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    # In the order of decreasing length next-fit never takes fewer, and two rows hold more than one.
    next_fit, room = 0, 0
    for length in sorted(lengths, reverse=True):
        if length > room:
            next_fit, room = next_fit + 1, capacity
        room -= length
    assert len(rows) <= next_fit
    assert all(a + b > capacity for a, b in zip(filled, filled[1:], strict=False))
    assert len(rows) <= 11 / 9 * fewest_rows(lengths, capacity) + 6 / 9


def fewest_rows(lengths, capacity):
    """Of up to six rollouts: by trying."""
    if len(lengths) > 6:
        return math.inf
    room = [capacity] * len(lengths)

    def place(i, used):
        if i == len(lengths):
            return used
        found = math.inf
        for row in range(min(used + 1, len(lengths))):
            if room[row] >= lengths[i]:
                room[row] -= lengths[i]
                found = min(found, place(i + 1, max(used, row + 1)))
                room[row] += lengths[i]
        return found

    return place(0, 0)


def test_rollout_longer_than_a_row_is_an_error():
    with pytest.raises(InputError, match="a rollout of 9 tokens does not fit a row of 8"):
        first_fit([3, 9], 8)


# --- The rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_packed_rows_hold_every_rollout_with_a_token_in_the_loss(parts):
    batch = random_batch(0)
    rows = packed(batch, parts)
    assert rows.ids.shape == (B, N + T)
    dtypes = [x.dtype for x in jax.tree.leaves(rows)]
    assert dtypes == [np.int32] * 3 + [np.int8] + [np.float32] * 4
    found = []
    for r in range(B):
        used = rows.segments[r] >= 0
        assert not np.diff(used.astype(int)).any() or used.argmin() == used.sum()  # contiguous
        assert (np.diff(rows.segments[r][used]) >= 0).all()
        assert (rows.positions[r][~used] == -1).all() and not rows.ids[r][~used].any()
        assert not rows.share[r][~used].any() and not rows.token_source[r][~used].any()
        for number in range(rows.segments[r].max() + 1):
            where = rows.segments[r] == number
            assert rows.positions[r][where].tolist() == list(range(where.sum()))
            names = ("ids", "token_source", "old_logps", "advantages", "ref_logps", "share")
            found.append([getattr(rows, name)[r][where].tolist() for name in names])
    want = []
    for i in range(B):
        in_loss = batch.token_source[i] != PAD
        if not in_loss.any():
            continue
        mask = batch.completion_mask[i]
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]].tolist()
        zeros = [0] * len(prompt)
        of_loss = [batch.old_logps, batch.advantages, batch.ref_logps]
        of_loss = [np.where(in_loss, x[i], 0)[mask].tolist() for x in of_loss]
        share = (in_loss / np.float32(in_loss.sum())).astype(np.float32)[mask].tolist()
        columns = [batch.token_source[i][mask].tolist(), *of_loss, share]
        ids = prompt + batch.completion_ids[i][mask].tolist()
        want.append([ids, *(zeros + x for x in columns)])
    assert sorted(found) == sorted(want) and len(want) == B - 3
    np.testing.assert_allclose(rows.share.sum(), len(want), rtol=1e-6)


def test_parts_are_filled_one_after_the_other_and_interleaved():
    batch, parts = random_batch(0, longest=2), 4
    rows = packed(batch, parts)
    used = (rows.segments >= 0).any(1)
    by_part = np.stack([used[part::parts] for part in range(parts)])  # what `train_step` reads
    count = used.sum()
    assert 0 < count < B // 2
    np.testing.assert_array_equal(by_part.reshape(-1), np.arange(B) < count)


def test_too_few_rows_and_a_rollout_without_a_prompt_are_errors():
    batch = random_batch(0)
    with pytest.raises(InputError, match="rows of rollouts do not fit 1 x 2 rows"):
        pack(batch, rows_per_part=2, parts=1)
    batch.prompt_mask[0] = False
    with pytest.raises(InputError, match="a rollout without a prompt token"):
        packed(batch)


# --- Attention ------------------------------------------------------------------------------------

HEADS, KV_HEADS = 4, 2
LENGTHS = [[50, 1, 30], [40, 52], [120], []]


def packed_places(length, scale=1):
    """[4, length]: positions and segments of rows with segments of these lengths, or padding."""
    places = np.full((2, len(LENGTHS), length), -1, np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, size in enumerate(lengths):
            span = slice(start, start + size * scale)
            places[:, row, span] = np.arange(size * scale), np.full(size * scale, number)
            start += size * scale
    return places


def attention_inputs(length, head_dim):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, weight = draw(4, length, HEADS, head_dim), draw(4, length, HEADS, head_dim)
    return q, *(draw(4, KV_HEADS, length, head_dim) for _ in "kv"), weight


def assert_each_segment_is_alone(fn, length, head_dim, window, scale=1, atol=2e-5):
    """Outputs and gradients of packed rows against those of each segment by itself."""
    (positions, segments), inputs = packed_places(length, scale), attention_inputs(length, head_dim)
    *qkv, weight = inputs
    weight *= (segments >= 0)[:, :, None, None]  # the output's gradient; padding is read by nobody

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: fn(*x, positions, segments, sliding_window=window), q, k, v)
        return out, *pull(jnp.asarray(weight))

    out, *found = jax.device_get(run(*qkv))
    want = [np.zeros_like(x) for x in qkv]
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            where = np.flatnonzero(segments[row] == number)
            at = (slice(row, row + 1), where), (slice(row, row + 1), slice(None), where)
            alone = [x[at[min(i, 1)]] for i, x in enumerate(qkv)]
            places = np.arange(len(where), dtype=np.int32)[None]
            want_out, pull = jax.vjp(
                lambda *x, p=places: attend_by_blocks(*x, p, p, None, window, 10**6), *alone
            )
            np.testing.assert_allclose(out[at[0]], want_out, rtol=0, atol=atol)
            for i, gradient in enumerate(pull(jnp.asarray(weight[at[0]]))):
                want[i][at[min(i, 1)]] = gradient
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    assert np.abs(want[1]).mean() > 0.01


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("block", [200, 32])  # all queries at once; four blocks
def test_xla_reads_each_segment_alone(block, window):
    def run(q, k, v, positions, segments, sliding_window):
        return attend_by_blocks(
            q, k, v, positions, positions, segments, sliding_window=sliding_window, block=block
        )

    assert_each_segment_is_alone(run, 125, 8, window)


@pytest.mark.parametrize("window", [None, 20])
def test_splash_reads_each_segment_alone(window, monkeypatch):
    monkeypatch.setattr(attention, "SPLASH_BLOCK", 128)
    run = functools.partial(attend_splash, interpret=True)
    assert_each_segment_is_alone(run, 250, 64, window, scale=2)  # two blocks


@pytest.mark.parametrize("backend", ["auto", "xla", "splash"])
def test_a_long_context_goes_through_with_its_segments(backend, monkeypatch):
    monkeypatch.setattr(
        attention, "attend_splash", functools.partial(attend_splash, interpret=True)
    )

    def run(q, k, v, positions, segments, sliding_window):
        return attend_context(
            q, k, v, positions, segments=segments, sliding_window=sliding_window, backend=backend
        )

    assert_each_segment_is_alone(run, 600, 64, None, scale=5)  # more than two blocks of queries


def test_cudnn_has_no_segments(monkeypatch):
    q, k, v, _ = attention_inputs(250, 64)
    positions, segments = packed_places(250)
    with pytest.raises(ValueError, match="cuDNN's has no segments"):
        attend_context(q, k, v, positions, segments=segments, backend="cudnn")
    monkeypatch.setattr(attention, "cudnn_fits", lambda _: True)
    text = str(
        jax.make_jaxpr(functools.partial(attend_context, segments=segments))(q, k, v, segments)
    )
    assert "cuda" not in text and "cudnn" not in text


def test_auto_takes_the_tpu_kernel_for_packed_rows():
    q, k, v, _ = attention_inputs(attention.SPLASH_MIN_LENGTH, 64)
    positions, segments = packed_places(attention.SPLASH_MIN_LENGTH)
    run = jax.jit(lambda *x: attend_context(*x, segments=segments))
    for platform, kernel in (("tpu", True), ("cpu", False)):
        lowered = run.trace(q, k, v, positions).lower(lowering_platforms=(platform,))
        assert ("tpu_custom_call" in lowered.as_text()) is kernel


def test_segments_go_with_no_cache():
    cache = MODEL.init_cache(1, 4)
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="no cache, no context"):
        MODEL(PARAMS, ids, positions=ids, segments=ids, cache=cache)


# --- Losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_weights_of_tokens_add_up_to_the_aggregation(loss_agg):
    source = random_batch(0).token_source
    values = np.random.default_rng(0).normal(size=source.shape).astype(np.float32)
    share = token_share(source != PAD)
    weights = token_weights(share, count_tokens(source), loss_agg, 11)
    want = aggregate(values, source != PAD, loss_agg, 11)
    np.testing.assert_allclose((weights * values).sum(), want, rtol=1e-5)
    chex.assert_trees_all_close(count_tokens(source), count_tokens(source, share))


def test_packed_log_probs_are_those_of_the_completions():
    batch = random_batch(1)
    rows = packed(batch)
    want, got = (
        functools.partial(jax.jit(fn, static_argnums=0), MODEL, PARAMS)(x)
        for fn, x in ((completion_logps, batch), (packed_logps, rows))
    )
    for x, y in zip(got, want, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        of_rows = [x[rows.token_source != PAD], rows.advantages[rows.token_source != PAD]]
        in_loss = batch.token_source != PAD
        of_batch = [y[in_loss], batch.advantages[in_loss]]
        order, other = np.argsort(of_rows[1]), np.argsort(of_batch[1])
        np.testing.assert_allclose(of_rows[0][order], of_batch[0][other], rtol=0, atol=1e-5)


# --- Updates --------------------------------------------------------------------------------------


def step(batch, params=PARAMS, model=MODEL, **options):
    """Returns (params after one `train_step`, diagnostics), on the host."""
    state = init_state(SGD, jax.tree.map(jnp.array, params))
    state, info = train_step(model, SGD, state, batch, **LOSS, **options)
    return jax.device_get((state.params, info))


def assert_same_updates(found, want):
    chex.assert_trees_all_close(found[0], want[0], rtol=0, atol=1e-5)
    skip = {"update/padding"}
    assert found[1].keys() == want[1].keys()
    for name in want[1].keys() - skip:
        np.testing.assert_allclose(
            found[1][name], want[1][name], rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_packed_update_is_the_unpacked_one(loss_agg):
    options = {"loss_agg": loss_agg, **BONUS}
    for seed, batch_options in enumerate([{}, {"longest": 3}, {"empty": range(1, B)}]):
        batch = random_batch(seed, **batch_options)
        want = step(batch, **options)
        for parts in (1, 4):
            assert_same_updates(step(packed(batch, parts), micro_batches=parts, **options), want)
        assert_same_updates(step(batch, micro_batches=4, **options), want)
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), want[0], PARAMS)
        assert max(jax.tree.leaves(moved)) > 0.01


@pytest.mark.parametrize("off_policy", ["teacher_prob", "sft"])
def test_packed_update_treats_teacher_tokens_alike(off_policy):
    batch = random_batch(3)
    want = step(batch, off_policy=off_policy, clip_high=None)
    found = step(packed(batch), micro_batches=4, off_policy=off_policy, clip_high=None)
    assert_same_updates(found, want)


def test_packed_update_of_no_token_moves_nothing():
    batch = random_batch(0, empty=range(B))
    params, info = step(packed(batch), micro_batches=4)
    chex.assert_trees_all_equal(params, jax.tree.map(np.asarray, PARAMS))
    assert info["loss"] == 0 and info["grad_norm"] == 0 and info["update/padding"] == 0


@pytest.mark.parametrize("parts", [1, 4])
def test_packed_update_that_is_not_finite_is_skipped(parts):
    batch = random_batch(0)
    row, at = np.argwhere(batch.token_source == POLICY)[-1]
    advantages = batch.advantages.copy()
    advantages[row, at] = np.nan
    bad = packed(dataclasses.replace(batch, advantages=advantages), parts)
    params, info = step(bad, micro_batches=parts)
    chex.assert_trees_all_equal(params, PARAMS)
    assert info["skipped"] == 1 and np.isnan(info["grad_norm"])
    params, info = step(packed(batch, parts), micro_batches=parts)
    assert info["skipped"] == 0 and np.isfinite(info["grad_norm"])
    assert np.any(params["embed"] != PARAMS["embed"])


def test_packed_update_with_a_sliding_window_is_the_unpacked_one():
    model = Transformer(dataclasses.replace(MODEL.config, sliding_window=3, remat="full"))
    batch = random_batch(0)
    found = step(packed(batch), model=model, micro_batches=4)
    assert_same_updates(found, step(batch, model=model))


def test_packed_rows_need_the_longest_length_and_no_groups():
    rows = packed(random_batch(0))
    state = init_state(SGD, jax.tree.map(jnp.array, PARAMS))
    with pytest.raises(InputError, match="packed rows need max_length"):
        train_step(MODEL, SGD, state, rows)
    with pytest.raises(InputError, match="group_size must be 1, got 2"):
        train_step(MODEL, SGD, state, rows, group_size=2)


@pytest.mark.parametrize(
    "options", [{}, {"old_logps": "recompute"}, {"old_logps": "recompute", "is_weights": True}]
)
def test_packed_policy_updates_recompute_weigh_and_compare_alike(options):
    batches = [random_batch(seed) for seed in (0, 1)]
    for batch in batches:  # of two rows, which the unpacked update reads once
        for prompts in (batch.prompt_ids, batch.prompt_mask):
            prompts[1::2] = prompts[::2]
    other = jax.tree.map(lambda x: 0.9 * x, PARAMS)
    options |= {"ref_params": other, "micro_batches": 4, **BONUS, **LOSS}
    results = []
    for minis in (batches, [packed(batch) for batch in batches]):
        state = init_state(SGD, jax.tree.map(jnp.array, PARAMS))
        state, infos = update_policy(MODEL, SGD, state, minis, group_size=2, **options)
        results.append(jax.device_get((state.params, infos)))
    for of_packed, of_rows in zip(results[1][1], results[0][1], strict=True):
        assert_same_updates((results[1][0], of_packed), (results[0][0], of_rows))


def test_packed_update_on_eight_devices_is_the_unpacked_one_of_one():
    batch = random_batch(0, longest=5)
    want = step(batch, **BONUS)
    mesh = make_mesh(data=2, fsdp=2, model=2)
    placed = jax.device_put(PARAMS, shardings(declare(MODEL.config), mesh))
    for parts in (2, 4):
        (mini,) = put_minis(batch, 1, mesh, packing=True, micro_batches=parts)
        found = step(mini, params=placed, micro_batches=parts, **BONUS)
        assert_same_updates(found, want)
        by_shard = [shard.data for shard in mini.segments.addressable_shards]
        assert all(len(x) == B // 4 for x in by_shard)
    # Two processes, each with half of the rollouts and half of every part.
    halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], batch) for i in range(2)]
    halves = [pack(half, rows_per_part=B // 4 // 2, parts=4) for half in halves]
    mini = put_batch(jax.tree.map(lambda *x: np.concatenate(x), *halves), mesh)
    assert_same_updates(step(mini, params=placed, micro_batches=4, **BONUS), want)


# --- What is computed -----------------------------------------------------------------------------

FORWARDS = []


@dataclasses.dataclass(frozen=True)
class Counted:
    """The model, which says when it runs."""

    model: Transformer

    def __call__(self, params, tokens, **places):
        jax.debug.callback(lambda rows: FORWARDS.append(int(rows)), len(tokens))
        return self.model(params, tokens, **places)

    def unembed(self, params):
        return self.model.unembed(params)


@pytest.mark.parametrize("longest", [1, 3, 9])
def test_parts_without_a_token_are_not_computed(longest):
    rows = packed(random_batch(0, longest=longest), parts=4)
    used = (rows.segments >= 0).any(1).sum()
    turns = -(-used // 4)
    assert 0 < turns < 4
    FORWARDS.clear()
    _, info = step(rows, model=Counted(MODEL), micro_batches=4)
    jax.effects_barrier()
    assert FORWARDS == [4] * turns
    tokens = (rows.positions >= 0).sum()
    np.testing.assert_allclose(
        info["update/padding"], 1 - tokens / (turns * 4 * (N + T)), rtol=1e-5
    )


def test_recomputed_log_probs_skip_parts_without_a_token():
    rows = packed(random_batch(0, longest=1), parts=8)
    turns = -(-(rows.segments >= 0).any(1).sum() // 2)
    assert turns < 4
    FORWARDS.clear()
    state = init_state(SGD, jax.tree.map(jnp.array, PARAMS))
    update_policy(
        Counted(MODEL), SGD, state, [rows], old_logps="recompute", micro_batches=8, **LOSS
    )
    jax.effects_barrier()
    assert len(FORWARDS) == 2 * turns


def test_log_probs_filled_in_parts_are_those_of_the_whole():
    batch = random_batch(0)
    for prompts in (batch.prompt_ids, batch.prompt_mask):
        prompts[1::2] = prompts[::2]
    options = {"temperature": 0.7, "chunk_size": 32, "field": "old_logps"}
    for rows, group_size in ((batch, 2), (packed(batch), 1)):
        want, found = (
            fill_logps(MODEL, PARAMS, rows, parts=parts, group_size=group_size, **options)
            for parts in (1, 4)
        )
        policy = rows.token_source == POLICY
        got = np.asarray(found.old_logps)[policy]
        np.testing.assert_allclose(got, np.asarray(want.old_logps)[policy], rtol=0, atol=1e-5)


def test_other_lengths_compile_nothing(caplog):
    optimizer = optax.sgd(0.1)  # its own, so that nothing is compiled before
    state = init_state(optimizer, jax.tree.map(jnp.array, PARAMS))
    batches = [
        packed(random_batch(seed, longest=longest)) for seed, longest in enumerate((9, 1, 4))
    ]
    assert len({(rows.segments >= 0).any(1).sum() for rows in batches}) > 1
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        for rows in batches:
            state, _ = train_step(MODEL, optimizer, state, rows, micro_batches=4, **LOSS)
    lines = [record.getMessage() for record in caplog.records]
    compiled = "Finished XLA compilation of jit(_train_step)"
    assert sum(line.startswith(compiled) for line in lines) == 1


def test_padding_of_unpacked_rows_is_reported():
    batch = random_batch(0)
    real = batch.prompt_mask.sum() + batch.completion_mask.sum()
    _, info = step(batch)
    np.testing.assert_allclose(info["update/padding"], 1 - real / (B * (N + T)), rtol=1e-5)


# --- In the loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--config.correct.insert=append",)])
def test_packed_run_has_the_losses_of_an_unpacked_one(tmp_path, options):
    options = ["--config.learn.micro_batches=2", "--config.learn.mini_batches=1", *options]
    if "--config.correct.insert=append" in options:
        options += ["--config.correct.n_correct=4", "--config.locate.locator=oracle"]
    steps = []
    for packing in (False, True):
        workdir = tmp_path / str(packing)
        config = load_config(
            "worksheet:n=3,runlocal", [*options, f"--config.learn.packing={packing}"]
        )
        train(config, workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        steps.append([row for row in map(json.loads, lines) if "loss" in row])
    for of_rows, of_packed in zip(*steps, strict=True):
        for name in (
            "loss",
            "policy_loss",
            "grad_norm",
            "entropy",
            "teacher_token_share",
            "reward",
        ):
            np.testing.assert_allclose(of_packed[name], of_rows[name], rtol=0, atol=1e-5)
        assert of_packed["recompiles"] == 0
        assert 0 < of_packed["update/padding"] < 1 and 0 < of_rows["update/padding"] < 1
    assert steps[0][0]["policy_tokens"] > 0 and len(steps[0]) == 2
