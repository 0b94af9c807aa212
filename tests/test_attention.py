"""Tests of the back ends for whole contexts, each against plain `attend` in float32.

Rows: whole, padded on the left, on the right, on both sides (what prompts + completions look like),
and with a hole. Outputs are compared, and gradients weighed, at real tokens only: what padding gets
is read by nobody.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.models import attention
from scope_jax.models.attention import (
    attend,
    attend_by_blocks,
    attend_context,
    attend_cudnn,
    attend_splash,
    context_mask,
)
from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.sharding import make_mesh

HEADS, KV_HEADS = 6, 2


def padded_positions(length, rows=5):
    """[rows, L]: 0, 1, .. on the real columns of each kind of row, -1 elsewhere."""
    real = np.zeros((5, length), bool)
    real[0] = True
    real[1, length // 3 :] = True
    real[2, : length // 2] = True
    real[3, length // 5 : -7] = True
    real[4, 3:-2], real[4, length // 2 : length // 2 + 9] = True, False
    real = real[np.arange(rows) % 5]
    return np.where(real, np.cumsum(real, axis=1) - 1, -1).astype(np.int32)


def random_inputs(length, head_dim, rows=5, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q = draw(rows, length, HEADS, head_dim)
    k, v = (draw(rows, KV_HEADS, length, head_dim) for _ in "kv")
    positions = padded_positions(length, rows)
    weight = draw(*q.shape) * (positions >= 0)[:, :, None, None]  # the output's gradient
    return q, k, v, positions, weight


def plain(q, k, v, positions, *, sliding_window=None):
    return attend(q, k, v, context_mask(positions, positions, sliding_window))


@functools.partial(jax.jit, static_argnums=0, static_argnames="sliding_window")
def out_and_gradients(fn, q, k, v, positions, weight, *, sliding_window):
    of_inputs = functools.partial(fn, positions=positions, sliding_window=sliding_window)
    out, pull = jax.vjp(of_inputs, q, k, v)
    real = (positions >= 0)[:, :, None, None]
    return jnp.where(real, out, 0), *pull(weight)


def assert_equals_plain(fn, inputs, sliding_window, atol, gradient_atol):
    want = out_and_gradients(plain, *inputs, sliding_window=sliding_window)
    got = out_and_gradients(fn, *inputs, sliding_window=sliding_window)
    assert np.abs(want[0]).mean() > 0.05
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=atol)
    for x, y in zip(got[1:], want[1:], strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=gradient_atol)


# --- The mask -------------------------------------------------------------------------------------


def test_mask_by_hand():
    positions = jnp.array([[-1, 0, 1, -1, 2]])
    want = [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1],
    ]
    assert context_mask(positions, positions, None)[0].astype(int).tolist() == want
    want[4][1] = 0  # a window of 2: itself and the one before, whatever stands between
    assert context_mask(positions, positions, 2)[0].astype(int).tolist() == want


# --- xla ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliding_window", [None, 20])
@pytest.mark.parametrize("length", [64, 96, 131])  # one block; 3 exactly; 5, the last not full
def test_blocks_of_queries_equal_all_at_once(length, sliding_window):
    block = 31 if length == 131 else 32

    def in_blocks(q, k, v, positions, *, sliding_window):
        return attend_by_blocks(
            q, k, v, positions, positions, block=block, sliding_window=sliding_window
        )

    inputs = random_inputs(length, head_dim=16)
    assert_equals_plain(in_blocks, inputs, sliding_window, atol=1e-6, gradient_atol=1e-5)


@pytest.mark.parametrize("sliding_window", [None, 20])
@pytest.mark.parametrize("backend", ["xla", "splash", "cudnn"])
def test_last_queries_equal_those_of_the_whole_context(backend, sliding_window, monkeypatch):
    length, earlier = 600, 37  # by blocks, in "xla"
    q, k, v, positions, weight = random_inputs(length, head_dim=16, rows=3)
    monkeypatch.setattr(
        attention, "attend_splash", functools.partial(attend_splash, interpret=True)
    )
    monkeypatch.setattr(
        attention, "attend_cudnn", functools.partial(attend_cudnn, implementation="xla")
    )

    def last(q, k, v, *, positions, sliding_window):
        return attend_context(
            q, k, v, positions[:, earlier:], key_positions=positions, backend=backend,
            sliding_window=sliding_window,
        )  # fmt: skip

    def of_all(q, k, v, *, positions, sliding_window):
        whole = jnp.pad(q, ((0, 0), (earlier, 0), (0, 0), (0, 0)))
        return plain(whole, k, v, positions, sliding_window=sliding_window)[:, earlier:]

    real, weight = (positions >= 0)[:, earlier:, None, None], weight[:, earlier:]
    results = []
    for fn in (last, of_all):
        fn = functools.partial(fn, positions=positions, sliding_window=sliding_window)
        out, pull = jax.vjp(fn, q[:, earlier:], k, v)
        results.append((jnp.where(real, out, 0), *pull(weight)))
    for x, y in zip(*results, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    assert np.abs(results[1][0]).mean() > 0.05


def test_short_context_is_one_plain_attention():
    q, k, v, positions, _ = random_inputs(attention.SPLASH_MIN_LENGTH - 1, head_dim=8, rows=1)
    for backend in ("auto", "xla"):
        run = functools.partial(attend_context, backend=backend)
        traced = str(jax.make_jaxpr(run)(q, k, v, positions))
        alone = functools.partial(attend_by_blocks, q, k, v, positions, positions)
        assert traced.count("\n") > 5 and "scan" not in traced and "pallas_call" not in traced
        np.testing.assert_array_equal(run(q, k, v, positions), alone())
        np.testing.assert_allclose(alone(), plain(q, k, v, positions), rtol=0, atol=1e-6)


def temp_bytes(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_long_context_holds_no_scores_of_all_queries():
    length, head_dim = 2048, 16
    shape = jax.ShapeDtypeStruct
    q = shape((1, length, HEADS, head_dim), jnp.float32)
    k = shape((1, KV_HEADS, length, head_dim), jnp.float32)
    positions = shape((1, length), jnp.int32)
    scores = HEADS * length * length * 4

    def gradient(fn):
        return jax.grad(lambda q, k, v, at: jnp.sum(fn(q, k, v, at) ** 2), argnums=(0, 1, 2))

    by_blocks = functools.partial(attend_context, backend="xla")
    assert temp_bytes(plain, q, k, k, positions) >= scores
    assert temp_bytes(by_blocks, q, k, k, positions) < scores / 2
    assert temp_bytes(gradient(plain), q, k, k, positions) >= scores
    assert temp_bytes(gradient(by_blocks), q, k, k, positions) < scores


# --- splash ---------------------------------------------------------------------------------------

splash = functools.partial(attend_splash, interpret=True)


@pytest.mark.parametrize("sliding_window", [None, 50, 1000])
@pytest.mark.parametrize(("length", "head_dim"), [(140, 64), (256, 128)])
def test_splash_equals_plain(length, head_dim, sliding_window):
    inputs = random_inputs(length, head_dim)
    assert_equals_plain(splash, inputs, sliding_window, atol=1e-5, gradient_atol=2e-5)


@pytest.mark.parametrize("sliding_window", [None, 50])
def test_splash_of_several_blocks_equals_plain(sliding_window, monkeypatch):
    monkeypatch.setattr(attention, "SPLASH_BLOCK", 128)
    inputs = random_inputs(300, head_dim=64)  # 3 blocks of 128
    fresh = functools.partial(attend_splash, interpret=True)  # traced with this block
    assert_equals_plain(fresh, inputs, sliding_window, atol=1e-5, gradient_atol=2e-5)


@pytest.mark.parametrize("rows", [8, 3])  # split over data and fsdp; divided by neither
def test_splash_on_a_mesh_equals_plain(rows):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    inputs = random_inputs(130, head_dim=64, rows=rows)
    batch = ("data", "fsdp") if rows == 8 else None
    by_row, by_head = PartitionSpec(batch, None, "model"), PartitionSpec(batch, "model")
    specs = (by_row, by_head, by_head, PartitionSpec(batch), by_row)
    on_mesh = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs, strict=True)
    ]
    want = out_and_gradients(plain, *inputs, sliding_window=None)
    got = out_and_gradients(splash, *on_mesh, sliding_window=None)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    if rows == 8:  # nothing was gathered on the way
        assert got[0].sharding.shard_shape(got[0].shape)[0] == 8 // 4
        assert got[1].sharding.shard_shape(got[1].shape)[2] == HEADS // 2


# --- cuDNN ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sliding_window", [None, 20])
def test_cudnn_call_equals_plain_with_xla_in_its_place(sliding_window):
    without_gpu = functools.partial(attend_cudnn, implementation="xla")
    inputs = random_inputs(65, head_dim=16)
    assert_equals_plain(without_gpu, inputs, sliding_window, atol=1e-5, gradient_atol=1e-5)


def test_cudnn_equals_plain_on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU: cuDNN's kernel itself is not run here")
    *qkv, positions, _ = random_inputs(300, head_dim=64)
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    real = (positions >= 0)[:, :, None, None]
    got = jnp.where(real, jax.jit(attend_cudnn)(*half, positions), 0).astype(jnp.float32)
    want = jnp.where(real, plain(*(x.astype(jnp.float32) for x in half), positions), 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-2)


# --- Selection ------------------------------------------------------------------------------------


def lowered_for(platform, fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_auto_takes_the_kernel_where_the_program_is_lowered_for_a_tpu():
    q, k, v, positions, _ = random_inputs(attention.SPLASH_MIN_LENGTH, head_dim=64)
    assert "tpu_custom_call" in lowered_for("tpu", attend_context, q, k, v, positions)
    assert "tpu_custom_call" not in lowered_for("cpu", attend_context, q, k, v, positions)


def test_auto_leaves_short_contexts_and_narrow_heads_to_xla():
    for length, head_dim in ((attention.SPLASH_MIN_LENGTH - 1, 64), (256, 16)):
        q, k, v, positions, _ = random_inputs(length, head_dim, rows=1)
        assert "tpu_custom_call" not in lowered_for("tpu", attend_context, q, k, v, positions)


def test_unknown_backend_is_an_error_that_lists_the_known_ones():
    q, k, v, positions, _ = random_inputs(8, head_dim=4, rows=1)
    with pytest.raises(ValueError, match="auto, xla, splash, cudnn, got 'flash'"):
        attend_context(q, k, v, positions, backend="flash")


# --- In the model ---------------------------------------------------------------------------------

CONFIG = TransformerConfig(
    vocab_size=19, embed_dim=16, num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS,
    head_dim=64, mlp_dim=20, attention="xla",
)  # fmt: skip


@pytest.mark.parametrize("sliding_window", [None, 30])
def test_model_gives_the_same_hidden_with_each_back_end(sliding_window, monkeypatch):
    monkeypatch.setattr(attention, "attend_splash", splash)
    monkeypatch.setattr(
        attention, "attend_cudnn", functools.partial(attend_cudnn, implementation="xla")
    )
    model = Transformer(dataclasses.replace(CONFIG, sliding_window=sliding_window))
    params, positions = model.init(jax.random.key(0)), padded_positions(140)
    tokens = np.random.default_rng(0).integers(0, 19, positions.shape).astype(np.int32)

    @functools.partial(jax.jit, static_argnames="model")
    def hidden(model, params):
        alone, _ = model(params, tokens, positions=positions)
        cache = model.init_cache(*tokens.shape)  # filled by these tokens: the same attention
        filling, cache = model(params, tokens, positions=positions, cache=cache)
        return alone, filling, cache

    @functools.partial(jax.jit, static_argnames="model")
    def with_room(model, params):  # one more slot: the mask over the cache
        cache = model.init_cache(tokens.shape[0], tokens.shape[1] + 1)
        return model(params, tokens, positions=positions, cache=cache)[0]

    real, want = positions >= 0, np.asarray(with_room(model, params))
    for backend in ("xla", "splash", "cudnn"):
        other = Transformer(dataclasses.replace(model.config, attention=backend))
        alone, filling, cache = hidden(other, params)
        np.testing.assert_allclose(np.asarray(alone)[real], want[real], rtol=0, atol=2e-5)
        np.testing.assert_allclose(np.asarray(filling)[real], want[real], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(cache.positions, positions)
