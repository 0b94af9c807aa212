"""Tests of eight-bit weights and caches: rounding by hand, products and attention against the
dequantised arrays, rollouts against the same model in float32, and the weights that correct them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.models.attention import attend, attend_segment
from scope_jax.models.int8 import Int8, product, quantise, quantise_cache
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.records import InputError, TrainBatch
from scope_jax.sampling import continue_from, decoding_layout, generate
from scope_jax.sharding import make_mesh, put_batch, shardings
from scope_jax.update import completion_logps, correct_for_sampler

CONFIG = TransformerConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=48,
    qkv_bias=True, max_position=64,
)  # fmt: skip
MODEL = Transformer(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
PROMPTS = np.array([[0, 0, 5, 9], [3, 7, 4, 8], [0, 2, 6, 1], [9, 9, 9, 2]], np.int32)
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)


def dequantised(x, *, of_cache=False):
    scale = x.scale.swapaxes(-1, -2) if of_cache else x.scale
    return x.values.astype(jnp.float32) * scale


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- Rounding -------------------------------------------------------------------------------------


def test_rounding_by_hand():
    x = np.array([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0], [-2.54, 0.019, 1.27]], np.float32)
    found = quantise(x, (1,))
    assert found.values.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 1, 64]]
    np.testing.assert_allclose(found.scale, [[1.0], [0.0], [0.02]], rtol=1e-6)
    assert found.values.dtype == jnp.int8 and found.shape == (3, 3)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (-1,)])
def test_error_is_half_a_step_at_most(axes):
    x = normal(3, 8, 5) * np.exp(3 * normal(3, 1, 1, seed=1))
    found = quantise(x, axes)
    error = np.abs(dequantised(found) - x)
    assert (error <= np.broadcast_to(found.scale, x.shape) * 0.5001).all()
    assert error.max() > 0 and np.abs(found.values).max() == 127


@pytest.mark.parametrize(
    ("equation", "shape", "in_dims"),
    [
        ("bld,dhk->blhk", (32, 4, 16), 1),
        ("blhk,hkd->bld", (4, 16, 32), 2),
        ("bld,df->blf", (32, 48), 1),
    ],
)
def test_product_is_that_with_the_dequantised_weight(equation, shape, in_dims):
    x, weight = normal(2, 3, *shape[:in_dims]), normal(*shape, seed=1)
    in_eight = quantise(weight, tuple(range(in_dims)))
    want = product(equation, x, dequantised(in_eight))
    np.testing.assert_allclose(product(equation, x, in_eight), want, rtol=0, atol=2e-5)
    assert np.abs(want - product(equation, x, weight)).max() > 1e-3


# --- Attention over a cache -----------------------------------------------------------------------


def test_attention_is_that_over_the_dequantised_cache():
    q, mask = normal(3, 2, 4, 16), np.random.default_rng(2).random((3, 2, 7)) < 0.8
    k, v = (quantise_cache(normal(3, 2, 7, 16, seed=seed)) for seed in (3, 4))
    assert k.scale.shape == (3, 2, 1, 7)
    whole = [dequantised(x, of_cache=True) for x in (k, v)]
    np.testing.assert_allclose(attend(q, k, v, mask), attend(q, *whole, mask), atol=2e-6)
    got = attend_segment(q, k, v, mask)
    want = attend_segment(q, *whole, mask)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


# --- Rollouts -------------------------------------------------------------------------------------

BOTH = ("weights", "cache")


def roll_out(layout, **options):
    settings = {"group_size": 4, "max_new_tokens": 24, "eos_ids": (1,), "temperature": 0.8}
    arguments = options.pop("prompts", (PROMPTS, MASK))
    return generate(*layout, *arguments, key=jax.random.key(1), **settings | options)


@pytest.mark.parametrize("int8", [("weights",), ("cache",), BOTH])
def test_log_probs_are_near_the_models_and_not_equal(int8):
    rollouts = roll_out(decoding_layout(MODEL, PARAMS, int8=int8))
    want, _ = completion_logps(MODEL, PARAMS, rollouts, temperature=0.8)
    gap = np.abs(np.where(rollouts.completion_mask, rollouts.logps - want, 0))
    assert 1e-4 < gap.max() and gap[rollouts.completion_mask].mean() < 0.05


def test_cache_takes_a_quarter():
    model, _ = decoding_layout(MODEL, PARAMS, int8=("cache",))
    size = lambda model: sum(x.nbytes for x in jax.tree.leaves(model.init_cache(4, 32).keys))  # noqa: E731
    assert size(model) == size(MODEL) * (16 + 4) / (16 * 4)  # a float32 for every 16 bytes


def test_weights_of_the_layers_are_in_eight_bits_and_nothing_else():
    _, params = decoding_layout(MODEL, PARAMS, int8=("weights",))
    is_int8 = lambda x: isinstance(x, Int8)  # noqa: E731
    names = {
        jax.tree_util.keystr(path[-2:] if path[-1].key == "w" else path[-1:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_int8)
        if is_int8(leaf)
    }
    assert names == {
        *(f"['{n}']['w']" for n in "qkv"), *(f"['{n}']" for n in ("o", "gate", "up", "down"))
    }  # fmt: skip


@pytest.mark.parametrize("slots", [8, 4])
def test_slots_change_no_row(slots):
    # Rows end, move, and others take their slots: every array of the cache must go along.
    layout = decoding_layout(MODEL, PARAMS, int8=BOTH)
    budgets = np.random.default_rng(0).integers(1, 24, 16).astype(np.int32)
    options = {"max_new_tokens": budgets, "buffer_length": 24}
    want, got = roll_out(layout, **options), roll_out(layout, slots=slots, **options)
    np.testing.assert_array_equal(got.completion_ids, want.completion_ids)
    np.testing.assert_allclose(got.logps, want.logps, rtol=0, atol=1e-5)


def test_prefixes_are_continued_in_eight_bits():
    layout = decoding_layout(MODEL, PARAMS, int8=BOTH)
    whole = roll_out(layout, group_size=1, temperature=0.0, eos_ids=())
    lengths = np.array([3, 0, 9, 5], np.int32)
    rest = continue_from(
        *layout, PROMPTS, MASK, np.asarray(whole.completion_ids), lengths, jax.random.key(0),
        max_new_tokens=15, eos_ids=(), temperature=0.0,
    )  # fmt: skip
    # Greedy tokens go on as they would have, though the prefix is read at once, not token by token.
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(
            rest.completion_ids[row], whole.completion_ids[row, length : length + 15]
        )


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 4, "model": 2}])
def test_mesh_changes_no_token(sizes):
    mesh = make_mesh(**{"data": 1, **sizes})
    want = roll_out(decoding_layout(MODEL, PARAMS, int8=BOTH))
    params = jax.device_put(PARAMS, shardings(declare(CONFIG), mesh))
    model, params = decoding_layout(MODEL, params, mesh, int8=BOTH)
    got = roll_out((model, params), prompts=put_batch((PROMPTS, MASK), mesh))
    np.testing.assert_array_equal(got.completion_ids, want.completion_ids)
    np.testing.assert_allclose(got.logps, want.logps, rtol=0, atol=1e-5)


def test_unknown_names_and_models_are_refused():
    with pytest.raises(InputError, match="some of weights, cache, got \\['kv'\\]"):
        decoding_layout(MODEL, PARAMS, int8=("kv",))
    laid_out = decoding_layout(MODEL, PARAMS)
    with pytest.raises(InputError, match="not yet laid out"):
        decoding_layout(*laid_out, int8=("weights",))


# --- The weights that correct it ------------------------------------------------------------------


def batch_of(old_logps, source):
    rows, length = source.shape
    zeros = np.zeros((rows, length), np.float32)
    return TrainBatch(
        prompt_ids=zeros[:, :1].astype(np.int32), prompt_mask=np.ones((rows, 1), bool),
        completion_ids=zeros.astype(np.int32), token_source=source,
        completion_mask=source > 0, old_logps=old_logps, advantages=zeros + 2.0,
    )  # fmt: skip


def test_weights_by_hand():
    source = np.array([[1, 1, 1, 2, 0]], np.int8)  # POLICY x 3, TEACHER, PAD
    old = np.log(np.array([[0.5, 0.2, 0.9, 0.5, 0.5]], np.float32))
    sampler = np.log(np.array([[0.4, 0.4, 0.1, 0.1, 0.1]], np.float32))
    batch, info = correct_for_sampler(batch_of(old, source), sampler)
    # 0.5 / 0.4, 0.2 / 0.4, 0.9 / 0.1 cut at 2; a teacher's token and padding stay
    np.testing.assert_allclose(batch.advantages, [[2.5, 1.0, 4.0, 2.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(info["is_weight"], (1.25 + 0.5 + 2.0) / 3, rtol=1e-6)
    np.testing.assert_allclose(info["logp_gap"], np.log(9.0), rtol=1e-6)
    assert batch.old_logps is not sampler


def test_a_sampler_that_is_the_policy_changes_no_bit():
    source = np.array([[1, 1, 2, 0]], np.int8)
    old = np.float32([[-0.3, -1.7, -2.0, 0.0]])
    measured = functools.partial(correct_for_sampler, batch_of(old, source), old)
    batch, info = measured()
    np.testing.assert_array_equal(batch.advantages, batch_of(old, source).advantages)
    assert info["logp_gap"] == 0 and info["is_weight"] == 1
    other, only_gap = measured(weigh=False)
    assert set(only_gap) == {"logp_gap"}
    np.testing.assert_array_equal(other.advantages, batch.advantages)
