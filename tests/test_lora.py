"""Tests of LoRA: forward, merging, gradients, updates on a mesh, sampling, and what is exported."""

import dataclasses
import functools
import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from scope_jax import checkpoint, load_hf, save_hf
from scope_jax.export import main as export_main
from scope_jax.methods import default_config
from scope_jax.models.lora import (
    TARGETS,
    Adapted,
    LoRA,
    base_of,
    make_lora,
    merge,
    product,
    split_frozen,
)
from scope_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    Weight,
    declare,
    init_lora,
)
from scope_jax.prm import PRM
from scope_jax.records import PAD, POLICY, TEACHER, InputError, TrainBatch
from scope_jax.sampling import continue_from, decoding_layout, generate
from scope_jax.sharding import make_mesh, put_batch, shardings
from scope_jax.update import (
    _compiled_step,
    batch_loss,
    init_state,
    make_optimizer,
    reference,
    train_step,
    update_policy,
)

SIZES = {
    "vocab_size": 12, "embed_dim": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 4, "mlp_dim": 16,
}  # fmt: skip
ALL = LoRA(rank=3, alpha=4.5)
QWEN2 = TransformerConfig(**SIZES, qkv_bias=True, lora=ALL)
QWEN3 = TransformerConfig(**SIZES, qk_norm=True, tie_embeddings=True, lora=ALL)
MODEL = Transformer(QWEN2)
SGD = optax.sgd(1.0)
LOSS = {"temperature": 0.7, "max_length": 7, "chunk_size": 8, "entropy_coef": 0.1}


def random_params(config, seed=0):
    """Every weight random, B too."""
    rng = np.random.default_rng(seed)
    draw = lambda weight: rng.normal(0, 0.4, weight.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, declare(config), is_leaf=lambda x: isinstance(x, Weight))


PARAMS = random_params(QWEN2)


def plain_merge(params, lora):
    """W + alpha / rank A B, written out; differentiable."""
    layers = dict(params["layers"])
    for name in lora.targets:
        a, b = params["lora"][name]["a"], params["lora"][name]["b"]
        ins, outs = "xy"[: a.ndim - 2], "hk"[: b.ndim - 2]
        delta = lora.alpha / lora.rank * jnp.einsum(f"n{ins}r,nr{outs}->n{ins}{outs}", a, b)
        old = layers[name]
        layers[name] = {**old, "w": old["w"] + delta} if isinstance(old, dict) else old + delta
    return {**{k: v for k, v in params.items() if k != "lora"}, "layers": layers}


def base(config):
    return Transformer(dataclasses.replace(config, lora=None))


def tokens_and_positions(seed=1):
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (3, 6)).astype(np.int32)
    positions = np.stack([np.arange(6) - padding for padding in (0, 2, 5)]).astype(np.int32)
    return tokens, np.maximum(positions, -1)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    tokens, positions = tokens_and_positions()
    hidden, _ = model(params, tokens, positions=positions)
    return jnp.where((positions >= 0)[..., None], hidden @ model.unembed(params), 0.0)


def random_batch(seed=0, rows=8):
    rng, (n, t) = np.random.default_rng(seed), (3, 5)
    lengths = rng.integers(1, t + 1, rows)
    mask = np.arange(t)[None, :] < lengths[:, None]
    prompt_mask = np.arange(n)[None, :] >= rng.integers(0, n, rows)[:, None]
    ids = lambda shape: rng.integers(1, SIZES["vocab_size"], shape)  # noqa: E731
    return TrainBatch(
        prompt_ids=np.where(prompt_mask, ids((rows, n)), 0).astype(np.int32),
        prompt_mask=prompt_mask,
        completion_ids=np.where(mask, ids((rows, t)), 0).astype(np.int32),
        completion_mask=mask,
        token_source=np.where(mask, rng.integers(POLICY, TEACHER + 1, (rows, t)), PAD).astype(
            np.int8
        ),
        old_logps=-rng.exponential(2.0, (rows, t)).astype(np.float32),
        advantages=rng.normal(size=(rows, t)).astype(np.float32),
    )


def new_state(optimizer=SGD, params=PARAMS):
    return init_state(optimizer, jax.tree.map(jnp.array, params))


# --- Options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "rank must be at least 1 (model.lora_rank=0: no LoRA), got -1"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "must be positive, got 0.0"),
        (
            {"lora_rank": 4, "lora_targets": ["q", "w1"]},
            "hold ['w1']: known are q, k, v, o, gate, up, down",
        ),
        ({"lora_rank": 4, "lora_targets": ()}, "name no linear map: known are q, k,"),
    ],
)
def test_bad_options_are_one_line_that_names_the_known(options, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        make_lora(**options)
    assert "\n" not in str(error.value)


def test_rank_zero_is_no_lora_and_the_configs_default_is_every_target():
    assert make_lora(0) is None
    assert default_config().model.lora_rank == 0
    assert default_config().model.lora_targets == TARGETS
    assert make_lora(4, lora_targets=["q", "v"]) == LoRA(4, 16.0, ("q", "v"))
    hash(make_lora(4, lora_targets=["q", "v"]))


def test_a_and_b_are_declared_on_their_bases_axes():
    declared = declare(QWEN2)["lora"]
    assert set(declared) == set(TARGETS)
    assert declared["q"]["a"].shape == (2, 8, 3) and declared["q"]["b"].shape == (2, 3, 4, 4)
    assert declared["q"]["b"].axes == ("layers", None, "heads", None)
    assert declared["o"]["a"].shape == (2, 4, 4, 3) and declared["o"]["b"].shape == (2, 3, 8)
    assert declared["o"]["a"].axes == ("layers", "heads", None, None)
    assert declared["down"]["a"].axes == ("layers", "mlp", None)
    assert declared["down"]["b"].axes == ("layers", None, "embed")
    some = declare(dataclasses.replace(QWEN2, lora=LoRA(3, targets=("v", "up"))))
    assert set(some["lora"]) == {"v", "up"}
    assert "lora" not in declare(dataclasses.replace(QWEN2, lora=None))


def test_a_is_random_with_variance_one_over_its_fan_in_and_b_is_zero():
    wide = dataclasses.replace(QWEN2, embed_dim=64, mlp_dim=256, lora=LoRA(rank=64))
    new = init_lora(wide, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype("float32")}
    assert not any(np.any(pair["b"]) for pair in new.values())
    for name, fan_in in {"q": 64, "o": 4 * 4, "gate": 64, "down": 256}.items():
        np.testing.assert_allclose(np.std(new[name]["a"]), fan_in**-0.5, rtol=0.05)


# --- Forward and merging ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_a_new_lora_model_is_its_base_bit_for_bit(config):
    params = random_params(config)
    params["lora"] = init_lora(config, jax.random.key(0))
    _, weights = base_of(Transformer(config), params)
    want = logits(base(config), weights)
    np.testing.assert_array_equal(logits(Transformer(config), params), want)
    np.testing.assert_array_equal(logits(Transformer(config), weights), want)  # A, B left away
    _, merged = merge(Transformer(config), params)
    chex.assert_trees_all_equal(merged, weights)
    assert np.ptp(want) > 1


@pytest.mark.parametrize("lora", [ALL, LoRA(1, 2.0, ("k", "o")), LoRA(2, 1.0, ("up", "q"))])
@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_forward_is_that_of_the_merged_weights(config, lora):
    config = dataclasses.replace(config, lora=lora)
    params, model = random_params(config), Transformer(config)
    bare, merged = merge(model, params)
    assert bare == base(config) and set(merged) == set(declare(bare.config))
    chex.assert_trees_all_close(merged, plain_merge(params, lora), rtol=0, atol=1e-6)
    got = logits(model, params)
    np.testing.assert_allclose(got, logits(bare, merged), rtol=0, atol=1e-5)
    assert np.abs(got - logits(bare, base_of(model, params)[1])).max() > 0.1


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_recomputed_layers_have_the_same_gradients(remat):
    def gradient(model):
        loss = lambda lora: jnp.square(logits(model, {**PARAMS, "lora": lora})).sum()  # noqa: E731
        return jax.grad(loss)(PARAMS["lora"])

    other = Transformer(dataclasses.replace(QWEN2, remat=remat))
    chex.assert_trees_all_close(gradient(other), gradient(MODEL), rtol=1e-4, atol=1e-4)


def test_products_are_two_thin_ones_never_of_the_merged_weight():
    def run(x, w, a, b):
        return product("bld,dhk->blhk", x, Adapted(w, a, b, scale=0.5))

    shapes = [(2, 5, 8), (8, 4, 4), (8, 3), (3, 4, 4)]
    traced = str(jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(s, np.float32) for s in shapes)))
    dots = re.findall(r"f32\[([\d,]+)\] = dot_general", traced)
    assert sorted(dots) == sorted(["2,5,4,4", "2,5,3", "2,5,4,4"])


def test_merging_rounds_once_to_the_dtype_that_is_asked_for():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base_of(MODEL, PARAMS)[1])
    params = {**half, "lora": PARAMS["lora"]}
    exact = plain_merge(jax.tree.map(lambda x: x.astype(jnp.float32), params), ALL)["layers"]
    _, merged = merge(MODEL, params)
    for name, want in (("up", exact["up"]), ("q", exact["q"]["w"])):
        found = merged["layers"][name]
        found = found["w"] if isinstance(found, dict) else found
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, want.astype(jnp.bfloat16))
    assert merge(MODEL, params, "float32")[1]["layers"]["up"].dtype == np.float32


def test_params_with_lora_need_a_model_that_says_how():
    with pytest.raises(InputError, match="the model has no config.lora"):
        logits(base(QWEN2), PARAMS)


def test_saved_model_is_the_merged_one(tmp_path):
    save_hf(tmp_path, MODEL, PARAMS)
    model, params = load_hf(tmp_path)
    assert model.config.lora is None
    np.testing.assert_allclose(logits(model, params), logits(MODEL, PARAMS), rtol=0, atol=1e-5)


# --- Updates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"group_size": 2}])
def test_gradients_are_those_of_merged_weights_and_the_base_has_none(options):
    batch = random_batch()
    if "group_size" in options:
        same = np.repeat(np.arange(0, 8, 2), 2)
        batch = dataclasses.replace(
            batch, prompt_ids=batch.prompt_ids[same], prompt_mask=batch.prompt_mask[same]
        )
    state = new_state()
    before = state.params
    after, info = train_step(MODEL, SGD, state, batch, **LOSS, **options)

    def loss(lora):
        merged = plain_merge({**jax.tree.map(jnp.asarray, PARAMS), "lora": lora}, ALL)
        return batch_loss(merged, base(QWEN2), batch, **LOSS)[0]

    value, want = jax.jit(jax.value_and_grad(loss))(PARAMS["lora"])
    moved = jax.tree.map(lambda old, new: old - new, PARAMS["lora"], after.params["lora"])
    chex.assert_trees_all_close(moved, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(info["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(info["grad_norm"], optax.tree.norm(want), rtol=1e-4)
    np.testing.assert_allclose(info["update_norm"], optax.tree.norm(want), rtol=1e-4)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 3e-4
    # The base is not copied: these are the arrays that went in.
    trained, frozen = split_frozen(after.params)
    assert set(trained) == {"lora"}
    jax.tree.map(lambda x, y: pytest.fail("copied") if x is not y else None, frozen,
                 {name: before[name] for name in frozen})  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_gradient_of_the_base_is_computed(micro_batches):
    # Sizes that no other array has: whatever is computed in a weight's shape is its gradient.
    config = dataclasses.replace(QWEN2, vocab_size=46, embed_dim=26, mlp_dim=38, remat="full")
    arithmetic = re.compile(r" = f32\[(?:2,)?(26,46|46,26|26,38|38,26)\]\S* (dot|add|scatter)\(")

    def computed(config):
        state = init_state(make_optimizer(10), Transformer(config).init(jax.random.key(0)))
        trained, frozen = split_frozen(state.params)
        leaves, tree = jax.tree.flatten(dataclasses.replace(state, params=trained))
        step = _compiled_step(tuple(x.sharding for x in leaves), tree)
        lowered = step.lower(
            Transformer(config), make_optimizer(10), tree.unflatten(leaves), frozen, random_batch(),
            micro_batches=micro_batches, **LOSS,
        )  # fmt: skip
        return {shape for shape, _ in arithmetic.findall(lowered.compile().as_text())}

    assert not computed(config)
    assert computed(dataclasses.replace(config, lora=None)) == {"26,46", "46,26", "26,38", "38,26"}


def test_only_a_and_b_have_moments_that_lie_as_they_do():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    params = jax.device_put(PARAMS, shardings(declare(QWEN2), mesh))
    optimizer = make_optimizer(10, mu_dtype="bfloat16", nu_dtype="float32")
    state = init_state(optimizer, params)
    adam = state.opt_state[1][0]
    for moment, dtype in ((adam.mu, jnp.bfloat16), (adam.nu, np.float32)):
        chex.assert_trees_all_equal_shapes(moment, {"lora": params["lora"]})
        assert {x.dtype for x in jax.tree.leaves(moment)} == {np.dtype(dtype)}
        same = jax.tree.map(lambda m, p: m.sharding == p.sharding, moment["lora"], params["lora"])
        assert all(jax.tree.leaves(same))
    assert sum(x.size for x in jax.tree.leaves(adam)) == 1 + 2 * sum(
        x.size for x in jax.tree.leaves(PARAMS["lora"])
    )


def test_update_on_a_mesh_is_that_of_one_device():
    batch = random_batch(1)
    want, want_info = train_step(MODEL, SGD, new_state(), batch, **LOSS)
    mesh = make_mesh(data=2, fsdp=2, model=2)
    places = shardings(declare(QWEN2), mesh)
    state = init_state(SGD, jax.device_put(PARAMS, places))
    got, info = train_step(MODEL, SGD, state, put_batch(batch, mesh), micro_batches=2, **LOSS)
    chex.assert_trees_all_close(
        jax.device_get(got.params), jax.device_get(want.params), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(info["loss"], want_info["loss"], rtol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, got.params) == places
    merged = merge(MODEL, got.params)[1]
    chex.assert_trees_all_close(
        jax.device_get(merged), plain_merge(jax.device_get(want.params), ALL), rtol=0, atol=1e-5
    )


def test_base_in_bfloat16_leaves_a_and_b_and_their_moments_in_float32():
    weights = base_of(MODEL, jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS))[1]
    params = {**weights, "lora": jax.tree.map(jnp.asarray, PARAMS["lora"])}
    model = Transformer(dataclasses.replace(QWEN2, dtype="bfloat16"))
    optimizer = make_optimizer(10, learning_rate=1e-3)
    state, info = train_step(
        model, optimizer, init_state(optimizer, params), random_batch(), **LOSS
    )
    adam = state.opt_state[1][0]
    for tree in (state.params["lora"], adam.mu, adam.nu):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {np.dtype("float32")}
    assert state.params["embed"].dtype == jnp.bfloat16 and np.isfinite(info["loss"])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params["lora"], PARAMS["lora"])
    assert min(jax.tree.leaves(moved)) > 5e-4  # not lost to rounding
    sampled(*decoding_layout(model, state.params))


def test_reference_of_a_run_is_its_base_without_a_copy():
    state, batch = new_state(), random_batch()
    ref = reference(state.params)
    assert all(
        x is y for x, y in zip(
            jax.tree.leaves(ref["layers"]), jax.tree.leaves(state.params["layers"]), strict=True
        )
    )  # fmt: skip
    options = {"kl_coef": 0.1, "temperature": 0.7}
    other = jax.tree.map(jnp.copy, ref)
    want = update_policy(MODEL, SGD, new_state(), [batch] * 2, ref_params=other, **options)
    found = update_policy(MODEL, SGD, state, [batch] * 2, ref_params=ref, **options)
    chex.assert_trees_all_equal(found, want)  # an update leaves it alive and as it was
    assert found[1][0]["kl"] > 0.01
    chex.assert_trees_all_equal(ref, base_of(MODEL, PARAMS)[1])


def test_reference_of_other_runs_is_a_copy_that_an_update_does_not_donate():
    params = {"w": jnp.ones(3)}
    ref = reference(params)
    chex.assert_trees_all_equal(ref, params)
    assert ref["w"] is not params["w"]


def test_lora_update_that_is_not_finite_is_skipped():
    optimizer = make_optimizer(10, learning_rate=1e-2, mu_dtype="bfloat16")
    batch, model = random_batch(), Transformer(QWEN2)
    row, at = np.argwhere(batch.token_source == POLICY)[0]
    advantages = batch.advantages.copy()
    advantages[row, at] = np.inf
    state = new_state(optimizer)
    before = jax.device_get((state.params, state.opt_state))
    base_of = lambda params: {k: v for k, v in params.items() if k != "lora"}  # noqa: E731
    held = jax.tree.leaves(base_of(state.params))
    bad = dataclasses.replace(batch, advantages=advantages)
    state, info = train_step(model, optimizer, state, bad)
    chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)
    assert info["skipped"] == 1
    state, info = train_step(model, optimizer, state, batch)
    assert info["skipped"] == 0 and not np.array_equal(
        state.params["lora"]["q"]["b"], before[0]["lora"]["q"]["b"]
    )
    after = jax.tree.leaves(base_of(state.params))
    assert all(x is y for x, y in zip(after, held, strict=True))  # not even copied


@pytest.mark.parametrize("dtypes", [("bfloat16", ""), ("", "bfloat16"), ("bfloat16", "bfloat16")])
def test_moments_in_bfloat16_stay_near_those_in_float32(dtypes):
    options = {"learning_rate": 1e-2, "b2": 0.95}
    exact = make_optimizer(10, **options)
    rounded = make_optimizer(10, mu_dtype=dtypes[0], nu_dtype=dtypes[1], **options)
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((16, 8))}
    states = [exact.init(params), rounded.init(params)]
    steps = [jax.jit(exact.update), jax.jit(rounded.update)]
    for _ in range(20):
        grads = {"w": jnp.asarray(rng.normal(0.02, 0.01, (16, 8)), jnp.float32)}
        results = [f(grads, s, params) for f, s in zip(steps, states, strict=True)]
        (want, found), states = [r[0]["w"] for r in results], [r[1] for r in results]
        np.testing.assert_allclose(found, want, rtol=0, atol=0.05 * 1e-2)  # of the rate
    adam = states[1][1][0]
    assert adam.mu["w"].dtype == (dtypes[0] or "float32")
    assert adam.nu["w"].dtype == (dtypes[1] or "float32")
    assert found.dtype == np.float32 and np.any(found != want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu_dtype": "half"}, "mu_dtype must be float32, bfloat16 or empty (that of the params)"),
        ({"nu_dtype": "int8"}, "nu_dtype must be float32, bfloat16 or empty"),
        ({"nu_dtype": "bfloat16"}, "nu_dtype=bfloat16 rounds away a decay of b2=0.999"),
    ],
)
def test_moments_dtypes_that_are_unknown_or_too_narrow_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_optimizer(10, **options)


def test_a_second_moment_in_bfloat16_would_never_fall_under_the_usual_b2():
    """Why `make_optimizer` refuses it."""
    held = jnp.bfloat16(1.0)
    assert (0.999 * held.astype(jnp.float32)).astype(jnp.bfloat16) == held
    assert (0.99 * held.astype(jnp.float32)).astype(jnp.bfloat16) < held


# --- Sampling -----------------------------------------------------------------------------------


PROMPTS = np.array([[0, 0, 5, 7], [3, 4, 5, 6]], np.int32)
PROMPT_MASK = np.array([[False, False, True, True], [True] * 4])
SAMPLING = {"max_new_tokens": 6, "eos_ids": (1,), "temperature": 0.7}


def sampled(model, params):
    return generate(
        model, params, PROMPTS, PROMPT_MASK, jax.random.key(1), group_size=3, **SAMPLING
    )


@pytest.mark.parametrize("int8", [(), ("weights", "cache")])
def test_layout_for_decoding_is_that_of_the_merged_weights(int8):
    bare, merged = merge(MODEL, PARAMS)
    want_model, want = decoding_layout(bare, merged, int8=int8)
    model, found = decoding_layout(MODEL, PARAMS, int8=int8)
    assert model == want_model and model.config.lora is None and "lora" not in found
    chex.assert_trees_all_equal_structs(found, want)
    chex.assert_trees_all_close(found, want, rtol=0, atol=1 if int8 else 1e-6)


def test_samples_are_those_of_the_merged_weights():
    want = sampled(*merge(MODEL, PARAMS))
    for model, params in ((MODEL, PARAMS), decoding_layout(MODEL, PARAMS),
                          MODEL.one_block_per_layer(PARAMS)):  # fmt: skip
        found = sampled(model, params)
        np.testing.assert_array_equal(found.completion_ids, want.completion_ids)
        np.testing.assert_allclose(found.logps, want.logps, rtol=0, atol=1e-5)
    _, weights = base_of(MODEL, PARAMS)
    other = sampled(base(QWEN2), weights)
    assert np.any(other.completion_ids != want.completion_ids)


def test_continuations_are_those_of_the_merged_weights():
    prefixes, lengths = np.full((2, 3), 4, np.int32), np.array([3, 1], np.int32)
    want, found = (
        continue_from(
            model, params, PROMPTS, PROMPT_MASK, prefixes, lengths, jax.random.key(2), **SAMPLING
        )
        for model, params in (merge(MODEL, PARAMS), (MODEL, PARAMS))
    )
    np.testing.assert_array_equal(found.completion_ids, want.completion_ids)


def test_layout_for_decoding_on_a_mesh_lies_as_the_merged_weights_do():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    params = jax.device_put(PARAMS, shardings(declare(QWEN2), mesh))
    bare, merged = merge(MODEL, PARAMS)
    merged = jax.device_put(merged, shardings(declare(bare.config), mesh))
    want_model, want = decoding_layout(bare, merged, mesh)
    model, found = decoding_layout(MODEL, params, mesh)
    assert model == want_model
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, want)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(want), rtol=0, atol=1e-6)


def test_base_of_a_lora_model_can_be_the_backbone_of_a_prm():
    model, _ = base_of(MODEL, PARAMS)
    assert "lora" not in PRM(model).declare()["backbone"]


# --- Checkpoints and exports --------------------------------------------------------------------


def test_a_checkpoint_restores_base_thin_matrices_and_moments(tmp_path):
    optimizer = make_optimizer(10, learning_rate=1e-2, mu_dtype="bfloat16")
    state, _ = train_step(MODEL, optimizer, new_state(optimizer), random_batch(), **LOSS)
    manager = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save(manager, 1, state, {"next_index": 1})
    manager.close()
    restored, _ = checkpoint.restore(
        checkpoint.open_checkpoints(tmp_path), new_state(optimizer, random_params(QWEN2, 5))
    )
    chex.assert_trees_all_equal(restored, state)
    want, _ = train_step(MODEL, optimizer, state, random_batch(2), **LOSS)
    found, _ = train_step(MODEL, optimizer, restored, random_batch(2), **LOSS)
    chex.assert_trees_all_equal(found, want)


SOURCE = pathlib.Path(__file__).parents[1] / "scope_jax" / "tasks" / "worksheet_models" / "policy"
MESH = {"data": 2, "fsdp": 4, "model": 1}


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """Workdir of a run with LoRA on four targets, and the (model, params) of its checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    options = {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": ["q", "o", "gate", "down"]}
    config = {"model": {"path": str(SOURCE), "dtype": "float32", **options}, "mesh": MESH}
    (folder / "config.json").write_text(json.dumps(config))
    model, params = load_hf(SOURCE, mesh=make_mesh(**MESH), dtype="float32")
    config = dataclasses.replace(model.config, lora=make_lora(**options))
    rng = np.random.default_rng(0)
    thin = jax.tree.map(
        lambda weight: rng.normal(0, 0.1, weight.shape).astype(np.float32),
        declare(config)["lora"],
        is_leaf=lambda x: isinstance(x, Weight),
    )
    places = shardings(declare(config)["lora"], make_mesh(**MESH))
    params = {**params, "lora": jax.device_put(thin, places)}
    manager = checkpoint.open_checkpoints(folder)
    checkpoint.save(manager, 4, init_state(optax.adamw(1e-3), params, step=4), {"next_index": 0})
    manager.close()
    return folder, Transformer(config), params


def export(workdir, out, *more):
    return export_main(["--workdir", str(workdir), "--out", str(out), *more])


def test_exported_model_is_the_merged_one(lora_run, tmp_path):
    workdir, model, params = lora_run
    assert export(workdir, tmp_path / "out") == 0
    loaded, found = load_hf(tmp_path / "out")
    assert loaded.config == dataclasses.replace(model.config, lora=None)
    want = logits(model, params)
    np.testing.assert_allclose(logits(loaded, found), want, rtol=0, atol=1e-5)
    assert np.abs(want - logits(*base_of(model, params))).max() > 0.1
    assert export(workdir, tmp_path / "half", "--dtype", "bfloat16") == 0
    stored = load_hf(tmp_path / "half")[1]
    exact = plain_merge(jax.device_get(params), model.config.lora)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: np.asarray(x, np.float32), stored),
        jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), exact),
        rtol=2**-7,  # sums on either side of a rounding point
    )


def test_exported_adapter_holds_the_difference_from_the_base(lora_run, tmp_path, capsys):
    workdir, model, params = lora_run
    assert export(workdir, tmp_path / "out", "--adapter") == 0
    assert f"an adapter of {SOURCE}" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(SOURCE)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    c, prefix = model.config, "base_model.model.model.layers"
    assert len(stored) == 2 * 4 * c.num_layers
    assert stored[f"{prefix}.0.self_attn.q_proj.lora_A.weight"].shape == (2, c.embed_dim)
    width = c.num_heads * c.head_dim
    assert stored[f"{prefix}.1.self_attn.q_proj.lora_B.weight"].shape == (width, 2)
    # Applied as PEFT does, W + alpha / r B A on [out, in], to the base's own file.
    before, rounded = load_hf(SOURCE, dtype="float32")[1], {}
    save_hf(tmp_path / "base", load_hf(SOURCE)[0], before)
    save_hf(tmp_path / "merged", *merge(model, jax.device_get(params)))
    base_file, merged_file = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged")
    )
    for name, weight in base_file.items():
        a = stored.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        b = stored.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        delta = 0.0 if a is None else config["lora_alpha"] / config["r"] * (b @ a)
        np.testing.assert_allclose(weight + delta, merged_file[name], rtol=0, atol=1e-6)
        rounded[name] = a is not None
    assert sum(rounded.values()) == 4 * c.num_layers


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_adapter_loads_in_peft(lora_run, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    workdir, model, params = lora_run
    assert export(workdir, tmp_path / "out", "--adapter") == 0
    theirs = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    tokens = np.arange(2, 14, dtype=np.int32).reshape(2, 6)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    hidden, _ = model(params, tokens, positions=positions)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        want = theirs(ids).logits.numpy()
        with theirs.disable_adapter():
            of_base = theirs(ids).logits.numpy()
    np.testing.assert_allclose(hidden @ model.unembed(params), want, rtol=0, atol=1e-4)
    assert np.abs(want - of_base).max() > 0.1


def test_adapters_are_only_written_over_adapters(lora_run, tmp_path, capsys):
    workdir, _, _ = lora_run
    assert export(workdir, tmp_path / "a", "--adapter") == 0
    assert export(workdir, tmp_path / "a", "--adapter", "--dtype", "bfloat16") == 0
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(jnp.bfloat16)}
    assert export(workdir, tmp_path / "m") == 0
    capsys.readouterr()
    assert export(workdir, tmp_path / "m", "--adapter") == 2
    assert "is not empty and no adapter's directory" in capsys.readouterr().err
    assert export(workdir, tmp_path / "a") == 2
    assert "is not empty and no model directory" in capsys.readouterr().err


def test_a_run_without_lora_has_no_adapter(lora_run, tmp_path, capsys):
    config = json.loads((lora_run[0] / "config.json").read_text())
    for options in ({"lora_rank": 0}, {}):  # and one from before there was LoRA
        model = {"path": str(SOURCE), "dtype": "float32", **options}
        (tmp_path / "config.json").write_text(json.dumps({**config, "model": model}))
        assert export(tmp_path, tmp_path / "out", "--adapter") == 2
        error = capsys.readouterr().err
        assert "is a run without LoRA" in error and error.count("\n") == 1
