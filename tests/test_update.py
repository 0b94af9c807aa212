"""Tests of the update: micro-batches and meshes, schedules, log-probs of the sampler."""

import dataclasses
import functools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.losses import LOSS_AGGREGATIONS
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.records import PAD, POLICY, TEACHER, InputError, TrainBatch, TrainState
from scope_jax.sampling import generate
from scope_jax.sharding import make_mesh, put_batch, replicate, shardings, split_rows
from scope_jax.update import (
    batch_loss,
    completion_logps,
    init_state,
    make_optimizer,
    make_schedule,
    train_step,
    update_policy,
)

B, N, T, VOCAB, WIDTH = 8, 3, 5, 12, 4
L_MAX, TEMPERATURE = 7, 0.7
SGD = optax.sgd(1.0)  # parameters move by minus the gradient
SLOW_SGD = optax.sgd(0.1)
LOSS = {"temperature": TEMPERATURE, "max_length": L_MAX, "chunk_size": 1024}
score = jax.jit(completion_logps, static_argnums=0, static_argnames=("temperature", "chunk_size"))


@dataclasses.dataclass(frozen=True)
class Bigram:
    """The smallest model of the protocol: a token is predicted from the one before it."""

    def __call__(self, params, tokens, *, positions, cache=None):
        chex.assert_equal_shape([tokens, positions])
        return params["embed"][tokens], cache

    def unembed(self, params):
        return params["unembed"]


TRANSFORMER = Transformer(
    TransformerConfig(
        vocab_size=VOCAB, embed_dim=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
        mlp_dim=16,
    )
)  # fmt: skip


def transformer_params():
    """Random weights by numpy, biases and norms too: JAX would compile an initializer for each."""
    rng, declared = np.random.default_rng(0), declare(TRANSFORMER.config)
    draw = lambda weight: rng.normal(0, 0.5, weight.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, declared, is_leaf=lambda x: hasattr(x, "shape"))


def bigram_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "unembed": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
    }


def random_batch(seed, empty_rows=(2,), teacher=True):
    """Rows of uneven length; `empty_rows` have no completion, row 4 has one that is in no loss."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    lengths[list(empty_rows)] = 0
    completion_mask = np.arange(T)[None, :] < lengths[:, None]
    prompt_mask = np.arange(N)[None, :] >= rng.integers(0, N, B)[:, None]  # LEFT-padded
    source = rng.integers(POLICY, (TEACHER if teacher else POLICY) + 1, (B, T))
    source = np.where(completion_mask & (np.arange(B)[:, None] != 4), source, PAD)
    batch = TrainBatch(
        prompt_ids=np.where(prompt_mask, rng.integers(1, VOCAB, (B, N)), 0),
        prompt_mask=prompt_mask,
        completion_ids=np.where(completion_mask, rng.integers(1, VOCAB, (B, T)), 0),
        token_source=source.astype(np.int8),
        completion_mask=completion_mask,
        old_logps=-rng.exponential(2.0, (B, T)),
        advantages=rng.normal(size=(B, T)),
        ref_logps=-rng.exponential(2.0, (B, T)),
    )
    narrow = {np.dtype("int64"): np.int32, np.dtype("float64"): np.float32}
    return jax.tree.map(lambda x: x.astype(narrow.get(x.dtype, x.dtype)), batch)


def new_state(params, optimizer=SGD):
    params = jax.tree.map(jnp.array, params)  # a copy: the state is donated
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def gradient(model, params, batch, **options):
    """Returns (gradient, diagnostics) of one `train_step`, on the host."""
    state, info = train_step(model, SGD, new_state(params), batch, **LOSS, **options)
    moved = jax.device_get(state.params)
    return jax.tree.map(lambda old, new: old - new, jax.device_get(params), moved), info


# --- A group's prompt is read once ---------------------------------------------------------------


def grouped_batch(group_size, seed=0):
    """Neighbouring rows with one prompt, of 2, 3, 1, 2 tokens."""
    batch = random_batch(seed)
    lengths = np.repeat([2, 3, 1, 2][: B // group_size], group_size)
    mask = np.arange(N)[None, :] >= N - lengths[:, None]
    ids = np.repeat(np.random.default_rng(seed).integers(1, VOCAB, (4, N)), group_size, axis=0)[:B]
    ids = np.where(mask, ids, 0).astype(np.int32)
    return dataclasses.replace(batch, prompt_ids=ids, prompt_mask=mask)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("group_size", "micro_batches"), [(4, 1), (2, 1), (2, 2), (8, 1)])
def test_prompt_read_once_gives_the_gradients_of_a_prompt_a_row(group_size, micro_batches, window):
    model = Transformer(dataclasses.replace(TRANSFORMER.config, sliding_window=window))
    params, batch = transformer_params(), grouped_batch(group_size)
    want, info = gradient(model, params, batch)
    got, of_groups = gradient(
        model, params, batch, group_size=group_size, micro_batches=micro_batches
    )
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(of_groups["loss"], info["loss"], rtol=1e-5)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 0.01


def test_prompt_read_once_gives_the_log_probs_of_a_prompt_a_row():
    params, batch = transformer_params(), grouped_batch(4)
    want, got = (
        completion_logps(TRANSFORMER, params, batch, group_size=size, temperature=0.7)
        for size in (1, 4)
    )
    mask = batch.completion_mask
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x[mask], y[mask], rtol=0, atol=1e-5)
    # A prompt is read once: other prompts in the group's other rows are not looked at.
    other = dataclasses.replace(batch, prompt_ids=batch.prompt_ids.copy())
    other.prompt_ids[1::4] = 1
    again, _ = completion_logps(TRANSFORMER, params, other, group_size=4, temperature=0.7)
    np.testing.assert_array_equal(again, got[0])


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_prompts_keys_are_not_stored_once_for_every_layer(remat):
    # They pass through the scan over layers: stored at each of its steps, memory would grow with
    # the square of the layers.
    layers = 7
    config = dataclasses.replace(TRANSFORMER.config, num_layers=layers, remat=remat)
    model, batch = Transformer(config), grouped_batch(4)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    loss = lambda params: completion_logps(model, params, batch, group_size=4)[0].sum()  # noqa: E731
    traced = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert f"f32[{layers},2,2," in traced  # the cache: layers, prompts, kv heads
    assert f"[{layers},{layers}," not in traced


def test_completions_of_one_token_after_a_prompt_read_once():
    params, batch = transformer_params(), grouped_batch(4)
    short = lambda x: x[:, :1]  # noqa: E731
    batch = dataclasses.replace(
        batch, completion_ids=short(batch.completion_ids),
        completion_mask=short(batch.completion_mask),
    )  # fmt: skip
    want, got = (completion_logps(TRANSFORMER, params, batch, group_size=n)[0] for n in (1, 4))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_model_of_a_user_reads_every_row():
    params, batch = bigram_params(), grouped_batch(4)
    want, got = (completion_logps(Bigram(), params, batch, group_size=size) for size in (1, 4))
    np.testing.assert_array_equal(got, want)


def test_micro_batches_that_would_cut_a_group_read_every_row_or_are_refused():
    params, batch = transformer_params(), grouped_batch(8)
    with pytest.raises(InputError, match="8 rows do not divide into 2 micro-batches of groups of"):
        gradient(TRANSFORMER, params, batch, group_size=8, micro_batches=2)
    states = [
        update_policy(
            TRANSFORMER, SGD, new_state(params), [batch], group_size=size, micro_batches=2, **LOSS
        )[0]
        for size in (1, 8)
    ]
    chex.assert_trees_all_equal(states[0].params, states[1].params)


def test_second_update_is_not_compiled_again(caplog):
    params, batch = jax.tree.map(jnp.array, bigram_params()), random_batch(3)  # not committed
    state = init_state(SLOW_SGD, params)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        for _ in range(2):
            state, _ = train_step(Bigram(), SLOW_SGD, state, batch, **LOSS)
    lines = [record.getMessage() for record in caplog.records]
    compiled = "Finished XLA compilation of jit(_train_step)"
    assert sum(line.startswith(compiled) for line in lines) == 1


# --- Schedules and optimizer ------------------------------------------------------------------


def rates(kind, steps, **options):
    options = {
        "learning_rate": 0.4,
        "warmup_steps": 0,
        "total_steps": 8,
        "end_factor": 0.1,
    } | options
    schedule = make_schedule(kind, **options)
    return np.array([float(schedule(step)) for step in steps])


def test_constant_schedule_stays():
    np.testing.assert_allclose(rates("constant", [0, 3, 100]), [0.4] * 3, rtol=1e-6)


def test_linear_schedule_falls_to_its_end_factor_and_stays_there():
    want = [0.4, 0.4 + (0.04 - 0.4) * 2 / 8, 0.4 + (0.04 - 0.4) * 6 / 8, 0.04, 0.04]
    np.testing.assert_allclose(rates("linear", [0, 2, 6, 8, 20]), want, rtol=1e-6)


def test_cosine_schedule_falls_along_half_a_wave():
    def wave(share):
        return 0.4 * ((1 - 0.1) * (1 + np.cos(np.pi * share)) / 2 + 0.1)

    want = [0.4, wave(2 / 8), 0.4 * (0.9 / 2 + 0.1), wave(6 / 8), 0.04, 0.04]
    np.testing.assert_allclose(rates("cosine", [0, 2, 4, 6, 8, 20]), want, rtol=1e-6)


def test_warmup_rises_in_equal_steps_that_do_not_start_at_zero():
    want = [0.4 * 1 / 4, 0.4 * 2 / 4, 0.4 * 3 / 4, 0.4, 0.4]
    np.testing.assert_allclose(rates("constant", range(5), warmup_steps=3), want, rtol=1e-6)


def test_decay_takes_the_steps_that_the_warmup_leaves():
    want = [0.4 * 2 / 3, 0.4, 0.4 + (0.04 - 0.4) * 3 / 6, 0.04]
    np.testing.assert_allclose(rates("linear", [1, 2, 5, 8], warmup_steps=2), want, rtol=1e-6)


def test_unknown_schedule_is_an_error_that_lists_the_known_ones():
    with pytest.raises(InputError, match="constant, linear, cosine, got 'step'"):
        rates("step", [0])


def test_first_adamw_update_is_sign_of_the_clipped_gradient_plus_decay():
    options = {"learning_rate": 0.5, "weight_decay": 0.1, "eps": 0.01, "max_grad_norm": 1.0}
    optimizer, params = make_optimizer(10, **options), {"w": jnp.array([2.0, -1.0])}
    grads = np.array([30.0, -40.0])  # norm 50, clipped to 1
    updates, _ = optimizer.update({"w": jnp.asarray(grads)}, optimizer.init(params), params)
    clipped = grads / 50
    want = -0.5 * (clipped / (np.abs(clipped) + 0.01) + 0.1 * np.array([2.0, -1.0]))
    np.testing.assert_allclose(updates["w"], want, rtol=1e-5)


# --- Log-probs of completions -----------------------------------------------------------------


def test_completion_logps_predict_each_token_from_the_one_before_it():
    params, batch = bigram_params(), random_batch(0)
    logps, entropy = score(Bigram(), params, batch, temperature=TEMPERATURE, chunk_size=7)
    before = np.concatenate([batch.prompt_ids[:, -1:], batch.completion_ids[:, :-1]], axis=1)
    logits = params["embed"].astype(float)[before] @ params["unembed"].astype(float) / TEMPERATURE
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(probs, batch.completion_ids[:, :, None], axis=2)[:, :, 0]
    np.testing.assert_allclose(logps, np.log(picked), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy, -(probs * np.log(probs)).sum(-1), rtol=1e-4, atol=1e-5)


def test_completion_logps_are_the_samplers():
    params = transformer_params()
    prompt_ids = np.array([[0, 0, 5, 7], [3, 4, 5, 6]], np.int32)
    prompt_mask = np.array([[False, False, True, True], [True] * 4])
    rollouts = generate(
        TRANSFORMER, params, prompt_ids, prompt_mask, jax.random.key(1), group_size=4,
        max_new_tokens=6, eos_ids=(1, 2), temperature=TEMPERATURE,
    )  # fmt: skip
    mask, ends = np.asarray(rollouts.completion_mask), np.asarray(rollouts.completion_ids)
    lengths = mask.sum(1)
    assert len(set(lengths)) > 2 and lengths.max() == 6  # some rows ended early, some did not
    assert np.isin(ends[mask], (1, 2)).any()  # end tokens are scored like any other

    logps = np.asarray(score(TRANSFORMER, params, rollouts, temperature=TEMPERATURE)[0])[mask]
    np.testing.assert_allclose(logps, np.asarray(rollouts.logps)[mask], rtol=0, atol=1e-4)
    assert np.ptp(logps) > 1

    # What stands in the padding is not read.
    noisy = dataclasses.replace(
        rollouts,
        prompt_ids=np.where(rollouts.prompt_mask, rollouts.prompt_ids, 9),
        completion_ids=np.where(rollouts.completion_mask, rollouts.completion_ids, 9),
    )
    again = np.asarray(score(TRANSFORMER, params, noisy, temperature=TEMPERATURE)[0])[mask]
    np.testing.assert_array_equal(again, logps)


# --- Micro-batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [3, 0])
def test_micro_batches_that_do_not_divide_the_rows_are_an_error(parts):
    with pytest.raises(InputError, match=f"{B} rows do not divide into {parts} micro-batches"):
        gradient(Bigram(), bigram_params(), random_batch(0), micro_batches=parts)


BONUS = {"entropy_coef": 0.3, "kl_coef": 0.2}


@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_micro_batches_give_the_full_batchs_gradient(loss_agg):
    params = bigram_params()
    batches = [
        random_batch(0),
        random_batch(1, empty_rows=(0, 1, 2, 3, 5)),
        random_batch(2, empty_rows=(1, 5)),  # one of four parts (rows 1 and 5) holds no token
        random_batch(3, empty_rows=range(B)),
    ]
    for batch in batches:
        run = functools.partial(gradient, Bigram(), params, batch, loss_agg=loss_agg, **BONUS)
        want, want_info = run()
        for micro_batches in (2, 4):
            found, info = run(micro_batches=micro_batches)
            chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(info["loss"], want_info["loss"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(info["grad_norm"], want_info["grad_norm"], rtol=1e-4)
            largest = "log_ratio_max"  # a maximum over the parts, not their mean
            np.testing.assert_allclose(info[largest], want_info[largest], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(want))  # no token, no gradient


def slow_aggregate(values, mask, loss_agg):
    rows = [[float(v) for v in values[i][mask[i]]] for i in range(B) if mask[i].any()]
    if loss_agg == "token-mean":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if loss_agg == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) / L_MAX for row in rows) / len(rows)


@pytest.mark.parametrize("loss_agg", LOSS_AGGREGATIONS)
def test_entropy_and_kl_enter_with_the_aggregation_of_the_loss(loss_agg):
    params, batch = bigram_params(), random_batch(0)
    _, info = gradient(Bigram(), params, batch, loss_agg=loss_agg, **BONUS)
    logps, entropy = score(Bigram(), params, batch, temperature=TEMPERATURE, chunk_size=7)
    in_loss = batch.token_source != PAD
    gap = np.where(batch.token_source == POLICY, batch.ref_logps - np.asarray(logps, float), 0.0)
    k3 = np.exp(gap) - 1 - gap  # on POLICY tokens, over the count of all tokens in the loss
    bonus = slow_aggregate(np.asarray(entropy), in_loss, loss_agg)
    penalty = slow_aggregate(k3, in_loss, loss_agg)
    assert bonus > 0.1 and penalty > 0.1
    want = info["policy_loss"] - 0.3 * bonus + 0.2 * penalty
    np.testing.assert_allclose(info["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(info["entropy"], np.asarray(entropy)[in_loss].mean(), rtol=1e-5)


def test_kl_without_reference_is_an_error():
    batch = dataclasses.replace(random_batch(0), ref_logps=None)
    with pytest.raises(InputError, match="kl_coef > 0 needs ref_logps"):
        gradient(Bigram(), bigram_params(), batch, kl_coef=0.2)


# --- Identities -------------------------------------------------------------------------------


def test_without_teacher_tokens_the_update_does_not_depend_on_their_treatment():
    params, batch = bigram_params(), random_batch(0, teacher=False)
    found = [gradient(Bigram(), params, batch, **x) for x in ({}, {"off_policy": "sft"})]
    chex.assert_trees_all_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1]["loss"], found[1][1]["loss"])


def test_tokens_out_of_the_loss_have_no_gradient_of_their_own():
    params, batch = bigram_params(), random_batch(0)
    other = dataclasses.replace(
        batch,
        advantages=np.where(batch.token_source == PAD, 7, batch.advantages).astype(np.float32),
        old_logps=np.where(batch.token_source == PAD, np.nan, batch.old_logps).astype(np.float32),
    )
    found = [gradient(Bigram(), params, x)[0] for x in (batch, other)]
    chex.assert_trees_all_equal(*found)
    chex.assert_tree_all_finite(found[1])


# --- Meshes -----------------------------------------------------------------------------------


SPLITS = [(8, 1, 1), (1, 8, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2)]


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "x".join(map(str, split)))
def test_any_split_of_eight_devices_gives_one_devices_update(split, group_size):
    """Of micro-batches too, where the mesh leaves enough rows for two."""
    params = transformer_params()
    batch = random_batch(0) if group_size == 1 else grouped_batch(group_size)
    want, want_info = gradient(TRANSFORMER, params, batch)

    data, fsdp, model = split
    parts = 2 if len(batch.advantages) % (2 * data * fsdp * group_size) == 0 else 1
    mesh = make_mesh(data=data, fsdp=fsdp, model=model)
    places = shardings(declare(TRANSFORMER.config), mesh)
    placed = jax.device_put(params, places)
    state = TrainState(placed, SGD.init(placed), replicate(np.int32(0), mesh))
    state, info = train_step(
        TRANSFORMER, SGD, state, put_batch(batch, mesh), micro_batches=parts,
        group_size=group_size, **LOSS,
    )  # fmt: skip
    moved = jax.tree.map(lambda old, new: old - np.asarray(new), params, state.params)
    chex.assert_trees_all_close(moved, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(info["loss"], want_info["loss"], rtol=1e-5, atol=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 1e-2
    assert jax.tree.map(lambda x: x.sharding, state.params) == places  # they stay where they were


def test_moments_of_a_new_state_lie_where_their_weights_lie():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    places = {"embed": NamedSharding(mesh, PartitionSpec("model", "fsdp"))}
    params = jax.device_put({"embed": bigram_params()["embed"]}, places)
    optimizer = make_optimizer(10)
    state = init_state(optimizer, params, step=3)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 2]
    assert len(moments) == 2 and not any(np.any(x) for x in moments)  # AdamW's two, zero
    assert all(x.sharding == places["embed"] for x in moments)
    scalars = [state.step, *(x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0)]
    assert all(x.sharding.is_fully_replicated for x in scalars) and int(state.step) == 3
    chex.assert_trees_all_equal_structs(state.opt_state, optimizer.init(params))


# --- Policy updates ---------------------------------------------------------------------------


def updates(minis, **options):
    """Returns (params, diagnostics) after one update per mini-batch."""
    state, infos = update_policy(
        Bigram(), SGD, new_state(bigram_params()), minis, **LOSS, **options
    )
    return jax.device_get((state.params, infos))


def test_recomputed_old_logps_replace_the_policys_and_leave_the_teachers():
    batch, options = random_batch(0), {"off_policy": "teacher_prob"}
    own, _ = score(Bigram(), bigram_params(), batch, temperature=TEMPERATURE, chunk_size=7)
    is_policy = batch.token_source == POLICY

    def with_old(policy, teacher):
        old = np.where(is_policy, policy, np.where(batch.token_source == TEACHER, teacher, 0.0))
        return [dataclasses.replace(batch, old_logps=old.astype(np.float32))]

    want, want_info = updates(with_old(own, batch.old_logps), **options)
    found, info = updates(with_old(np.nan, batch.old_logps), old_logps="recompute", **options)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info[0]["loss"], want_info[0]["loss"], rtol=1e-5)
    assert info[0]["log_ratio_max"] < 1e-5
    other, _ = updates(with_old(np.nan, batch.old_logps - 0.3), old_logps="recompute", **options)
    assert np.abs(other["embed"] - want["embed"]).max() > 1e-4  # the teacher's were read


def test_old_logps_are_recomputed_once_before_the_first_update():
    minis = [random_batch(0, teacher=False), random_batch(1, teacher=False)]
    params, infos = updates(minis, old_logps="recompute")
    filled = []
    for mini in minis:
        own, _ = score(Bigram(), bigram_params(), mini, temperature=TEMPERATURE)
        filled.append(dataclasses.replace(mini, old_logps=np.asarray(own)))
    want, want_infos = updates(filled)
    chex.assert_trees_all_close(params, want, rtol=1e-5, atol=1e-6)
    assert infos[0]["log_ratio_max"] < 1e-5  # nothing has moved yet
    assert infos[1]["log_ratio_max"] > 0.1  # measured against the weights before both updates
    np.testing.assert_allclose(infos[1]["log_ratio_max"], want_infos[1]["log_ratio_max"], rtol=1e-4)


def test_advantages_are_weighed_by_recomputed_over_the_samplers_probability():
    batch, options = random_batch(0), {"old_logps": "recompute"}
    own, _ = score(Bigram(), bigram_params(), batch, temperature=TEMPERATURE, chunk_size=7)
    is_policy = batch.token_source == POLICY
    shift = np.random.default_rng(5).normal(scale=1.0, size=own.shape)  # some beyond log 2
    assert (shift[is_policy] > np.log(2)).any()
    sampled = np.where(is_policy, own - shift, batch.old_logps).astype(np.float32)
    sampled = dataclasses.replace(batch, old_logps=sampled)
    weights = np.where(is_policy, np.minimum(np.exp(shift), 2), 1).astype(np.float32)
    weighed = dataclasses.replace(batch, advantages=batch.advantages * weights)
    want, want_info = updates([weighed], **options)
    found, info = updates([sampled], is_weights=True, **options)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info[0]["loss"], want_info[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(info[0]["logp_gap"], np.abs(shift[is_policy]).max(), rtol=1e-4)
    np.testing.assert_allclose(info[0]["is_weight"], weights[is_policy].mean(), rtol=1e-4)
    other, _ = updates([sampled], **options)
    assert np.abs(other["embed"] - found["embed"]).max() > 1e-4
    with pytest.raises(InputError, match='is_weights needs old_logps="recompute"'):
        updates([sampled], is_weights=True)


def test_reference_log_probs_are_those_of_the_reference():
    params, minis = bigram_params(), [random_batch(0)]
    options = {"kl_coef": 0.2}
    _, infos = updates(minis, ref_params=jax.tree.map(jnp.array, params), **options)
    assert abs(infos[0]["kl"]) < 1e-6  # the reference is the policy
    _, infos = updates(minis, ref_params=jax.tree.map(jnp.array, bigram_params(1)), **options)
    assert infos[0]["kl"] > 0.1


def test_unknown_source_of_old_logps_is_an_error():
    with pytest.raises(InputError, match='"sampler" or "recompute", got \'guess\''):
        updates([random_batch(0)], old_logps="guess")


def test_mini_batches_are_neighbouring_rows():
    batch = random_batch(0)
    parts = split_rows(batch, 2)
    assert [part.advantages.shape[0] for part in parts] == [B // 2, B // 2]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    chex.assert_trees_all_equal(joined, batch)


@pytest.mark.parametrize("source", [POLICY, TEACHER])
def test_rewarded_tokens_become_likelier_and_the_loss_falls(source):
    batch = random_batch(0)
    logps, _ = score(Bigram(), bigram_params(), batch, temperature=TEMPERATURE)
    batch = dataclasses.replace(
        batch,
        token_source=np.where(batch.token_source == PAD, PAD, source).astype(np.int8),
        advantages=np.ones((B, T), np.float32),
        old_logps=np.asarray(logps),
    )
    state, losses = new_state(bigram_params(), SLOW_SGD), []
    for _ in range(6):
        state, info = train_step(
            Bigram(), SLOW_SGD, state, batch, **LOSS, clip_low=None, clip_high=None
        )
        losses.append(float(info["loss"]))
    assert (np.diff(losses) < 0).all()
    after, _ = score(Bigram(), state.params, batch, temperature=TEMPERATURE)
    in_loss = batch.token_source != PAD
    assert (np.asarray(after) - np.asarray(logps))[in_loss].mean() > 0.01


# --- Updates that are not finite ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cracked(Bigram):
    """Where `crack` is 0 its gradient, and nothing else, is NaN: 0 * d sqrt(0)."""

    def unembed(self, params):
        return params["unembed"] + 0 * jnp.sqrt(params["crack"])


MOMENTS = [
    {},
    {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16", "b2": 0.9, "schedule": "linear"},
    {"warmup_steps": 3, "schedule": "cosine"},
]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def spoilt(batch, row, value):
    """The batch with one token's advantage changed; row 1's lies in the second of two parts."""
    at = np.flatnonzero(batch.token_source[row] == POLICY)[0]
    advantages = batch.advantages.copy()
    advantages[row, at] = value
    return dataclasses.replace(batch, advantages=advantages)


def check_skipped(model, optimizer, params, batch, healthy, **options):
    """Takes a good, a bad and a good update: the bad one leaves no trace."""
    first = init_state(optimizer, jax.tree.map(jnp.array, params))
    first, info = train_step(model, optimizer, first, healthy, **LOSS, **options)
    assert int(info["skipped"]) == 0
    before = bits((first.params, first.opt_state))
    second, bad = train_step(model, optimizer, first, batch, **LOSS, **options)
    assert bits((second.params, second.opt_state)) == before
    assert bad["skipped"].dtype == jnp.int32 and int(bad["skipped"]) == 1
    assert not np.isfinite(bad["grad_norm"])
    third, info = train_step(model, optimizer, second, healthy, **LOSS, **options)
    assert int(info["skipped"]) == 0
    assert bits((third.params, third.opt_state)) != before
    return bad, third


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_update_whose_loss_is_not_finite_is_skipped(moments, micro_batches):
    optimizer = make_optimizer(10, learning_rate=0.1, **moments)
    params, healthy = bigram_params(), random_batch(0)
    params["unembed"][0, 0] = -0.0  # keeps its sign too
    for value in (np.nan, np.inf):
        bad, last = check_skipped(
            Bigram(), optimizer, params, spoilt(healthy, 1, value), healthy,
            micro_batches=micro_batches,
        )  # fmt: skip
        assert not np.isfinite(bad["loss"])
        counts = [x for x in jax.tree.leaves(last.opt_state) if x.dtype == jnp.int32]
        assert counts and all(int(x) == 2 for x in counts)  # of three updates


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_update_with_one_leaf_of_the_gradient_not_finite_is_skipped(micro_batches):
    optimizer, batch = make_optimizer(10, learning_rate=0.1), random_batch(0)
    params = jax.tree.map(jnp.array, {**bigram_params(), "crack": np.zeros((), np.float32)})
    state = init_state(optimizer, params)
    before = bits((state.params, state.opt_state))
    state, info = train_step(
        Cracked(), optimizer, state, batch, micro_batches=micro_batches, **LOSS
    )
    assert bits((state.params, state.opt_state)) == before
    assert np.isfinite(info["loss"]) and np.isnan(info["grad_norm"])
    assert int(info["skipped"]) == 1


@pytest.mark.parametrize("moments", MOMENTS)
def test_finite_update_is_optaxs_own_bit_for_bit(moments):
    optimizer, batch = make_optimizer(10, learning_rate=0.1, **moments), random_batch(0)

    @jax.jit
    def by_hand(params, opt_state):
        loss = functools.partial(batch_loss, model=Bigram(), batch=batch, **LOSS)
        (_, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = init_state(optimizer, jax.tree.map(jnp.array, bigram_params()))
    want = by_hand(jax.device_put(bigram_params()), state.opt_state)
    state, info = train_step(Bigram(), optimizer, state, batch, **LOSS)
    assert bits((state.params, state.opt_state)) == bits(want)
    assert int(info["skipped"]) == 0


def test_skipped_updates_of_a_steps_mini_batches_add_up():
    good, bad = random_batch(0), spoilt(random_batch(0), 1, np.nan)
    want, _ = updates([good, good])
    found, infos = updates([bad, good, bad, good])
    assert sum(info["skipped"] for info in infos) == 2
    chex.assert_trees_all_equal(found, want)
