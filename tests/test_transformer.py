"""Tests of the forward and its cache: a float64 twin, what a token sees, what a config changes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.models.kv_cache import (
    SharedPrompts,
    init_cache,
    move_rows,
    positions_from_mask,
    take_in_shards,
    take_rows,
)
from scope_jax.models.transformer import (
    Llama3Rope,
    Transformer,
    TransformerConfig,
    Weight,
    declare,
    init_params,
    rms_norm,
    rotary_frequencies,
    rotary_turns,
    rotate,
)

# num_heads * head_dim is not embed_dim and a kv head has three query heads, so that a mixed-up axis
# changes a shape or a value.
CONFIG = TransformerConfig(
    vocab_size=19,
    embed_dim=16,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=20,
    qkv_bias=True,
)
ROWS, LENGTH = 3, 7
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))


@functools.partial(jax.jit, static_argnames="model")
def hidden_of(model, params, tokens, positions):
    return model(params, tokens, positions=positions)[0]


@functools.partial(jax.jit, static_argnames="model")
def read_one(model, params, token, position, cache):
    hidden, cache = model(params, token[:, None], positions=position[:, None], cache=cache)
    return hidden[:, 0], cache


def random_params(config, seed=0):
    """Params of which none keeps its initial 0 or 1."""
    rng = np.random.default_rng(seed)

    def draw(weight):
        noise = 0.3 * rng.standard_normal(weight.shape)
        return jnp.asarray(1 + noise if weight.init == "ones" else noise, jnp.float32)

    return jax.tree.map(draw, declare(config), is_leaf=lambda x: isinstance(x, Weight))


PARAMS = random_params(CONFIG)
MODEL = Transformer(CONFIG)


# --- The forward against a plain twin -------------------------------------------------------------


def twin_hidden(c, params, tokens):
    """The forward of one row in float64, token by token and head by head."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def project(w, inputs, head):
        return [x @ w["w"][:, head] + w["b"][head] for x in inputs]

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + c.rms_norm_eps) * scale

    def turn(x, position):
        out, half = np.zeros_like(x), c.head_dim // 2
        for i in range(half):
            angle = position / c.rope_theta ** (2 * i / c.head_dim)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    rows = [params["embed"][token] for token in tokens]
    for n in range(c.num_layers):
        w = jax.tree.map(lambda x, n=n: x[n], params["layers"])
        normed = [norm(x, w["attn_norm"]) for x in rows]
        attended = [np.zeros(c.embed_dim) for _ in rows]
        for head in range(c.num_heads):
            kv_head = head // (c.num_heads // c.num_kv_heads)
            queries = [turn(q, t) for t, q in enumerate(project(w["q"], normed, head))]
            keys = [turn(k, t) for t, k in enumerate(project(w["k"], normed, kv_head))]
            values = project(w["v"], normed, kv_head)
            for t, query in enumerate(queries):
                weights = np.exp([query @ keys[s] / np.sqrt(c.head_dim) for s in range(t + 1)])
                mixed = sum(weight * values[s] for s, weight in enumerate(weights / weights.sum()))
                attended[t] += mixed @ w["o"][head]
        rows = [x + y for x, y in zip(rows, attended, strict=True)]
        for t, x in enumerate(rows):
            normed_x = norm(x, w["mlp_norm"])
            gate = normed_x @ w["gate"]
            rows[t] = x + (gate / (1 + np.exp(-gate)) * (normed_x @ w["up"])) @ w["down"]
    return np.stack([norm(x, params["final_norm"]) for x in rows])


def test_forward_equals_a_plain_float64_forward():
    hidden = hidden_of(MODEL, PARAMS, TOKENS, POSITIONS)
    want = np.stack([twin_hidden(CONFIG, PARAMS, row) for row in TOKENS])
    assert hidden.dtype == jnp.float32
    assert np.abs(want).mean() > 0.3
    np.testing.assert_allclose(hidden, want, rtol=0, atol=1e-5)


def test_rms_norm_by_hand():
    x = jnp.array([[[3.0, 4.0]]])
    want = [3 / np.sqrt((9 + 16) / 2 + 0.5) * 2, 4 / np.sqrt((9 + 16) / 2 + 0.5) * 10]
    np.testing.assert_allclose(rms_norm(x, jnp.array([2.0, 10.0]), 0.5)[0, 0], want, rtol=1e-6)


def test_rotation_by_hand():
    # head_dim 4, theta 100: pair (0, 2) turns by position * 1, pair (1, 3) by position * 100**-0.5
    cos, sin = rotary_turns(jnp.array([[0, 3]]), 4, 100.0)
    np.testing.assert_allclose(cos[0, :, 0], np.cos([[0, 0], [3 * 1, 3 / 10]]), rtol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin([[0, 0], [3 * 1, 3 / 10]]), rtol=1e-6)
    x = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0, 0.0]), (1, 2, 1, 4))
    want = [[1, 1, 0, 0], [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)]]
    np.testing.assert_allclose(rotate(x, (cos, sin))[0, :, 0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (64, 5e5, Llama3Rope(32.0, 1.0, 4.0, 8192)),  # Llama 3.2 1B
        (128, 5e5, Llama3Rope(8.0, 1.0, 4.0, 8192)),  # Llama 3.1 8B
        (8, 100.0, Llama3Rope(3.0, 0.5, 6.0, 50)),
    ],
)
def test_llama3_frequencies_equal_the_published_formula(head_dim, theta, scaling):
    want, bands = [], set()
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < scaling.original_max_position / scaling.high_freq_factor:
            bands.add("kept")
            want.append(frequency)
        elif wavelength > scaling.original_max_position / scaling.low_freq_factor:
            bands.add("slowed")
            want.append(frequency / scaling.factor)
        else:
            bands.add("between")
            smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            want.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    assert bands == {"kept", "between", "slowed"}
    np.testing.assert_allclose(rotary_frequencies(head_dim, theta, scaling), want, rtol=2e-5)


def test_norm_of_queries_and_keys_by_hand():
    # One token at position 0 (no rotation), one layer, one head: the score of a token with itself
    # is q.k / sqrt(head_dim), but its attention weight is 1 whatever it is. So two tokens:
    # attention weights are softmax of the normed products, and values pass through.
    config = TransformerConfig(
        vocab_size=2, embed_dim=2, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        mlp_dim=1, qk_norm=True, rope_theta=1e30, rms_norm_eps=1e-12,
    )  # fmt: skip
    params = jax.tree.map(
        lambda w: jnp.zeros(w.shape), declare(config), is_leaf=lambda x: isinstance(x, Weight)
    )
    eye = jnp.eye(2)
    params["embed"] = jnp.array([[3.0, 4.0], [4.0, -3.0]])
    params["final_norm"] = jnp.ones(2)
    layer = params["layers"]
    layer["attn_norm"] = jnp.ones((1, 2))
    for name in "qkv":
        layer[name]["w"] = 7 * eye.reshape(1, 2, 1, 2)  # the norm takes the 7 off q and k again
    layer["o"] = eye.reshape(1, 1, 2, 2)
    layer["q"]["norm"], layer["k"]["norm"] = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0]])
    hidden = hidden_of(Transformer(config), params, np.array([[0, 1]]), np.zeros((1, 2), np.int32))
    x = np.array([[3.0, 4.0], [4.0, -3.0]]) / np.sqrt(12.5)  # after attn_norm; norms keep it
    scores = (x * [1.0, 2.0]) @ (x * [3.0, 5.0]).T / np.sqrt(2)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out = np.array([[3.0, 4.0], [4.0, -3.0]]) + weights @ (7 * x)
    want = out / np.sqrt((out**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(hidden[0], want, rtol=1e-5)


# --- What a token sees ----------------------------------------------------------------------------


def test_later_token_changes_no_earlier_hidden():
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % CONFIG.vocab_size
    before = np.asarray(hidden_of(MODEL, PARAMS, TOKENS, POSITIONS))
    after = np.asarray(hidden_of(MODEL, PARAMS, changed, POSITIONS))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (
        np.abs(after[:, 4:] - before[:, 4:]).max(axis=(0, 2)) > 1e-2
    ).all()  # the later ones all see it


def test_left_padding_changes_no_hidden():
    lengths = [7, 4, 1]
    padded, mask = np.full((ROWS, LENGTH), 18, np.int32), np.zeros((ROWS, LENGTH), bool)
    for row, length in enumerate(lengths):
        padded[row, LENGTH - length :], mask[row, LENGTH - length :] = TOKENS[row, :length], True
    positions = positions_from_mask(mask)
    hidden = hidden_of(MODEL, PARAMS, padded, positions)
    plain = hidden_of(MODEL, PARAMS, TOKENS, POSITIONS)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            hidden[row, LENGTH - length :], plain[row, :length], rtol=0, atol=1e-5
        )
    other_padding = np.where(mask, padded, 3)
    again = hidden_of(MODEL, PARAMS, other_padding, positions)
    np.testing.assert_array_equal(np.asarray(again)[mask], np.asarray(hidden)[mask])
    assert np.isfinite(hidden).all()  # padding too: a NaN there would reach every gradient


def test_positions_count_the_real_tokens():
    mask = jnp.array([[False, True, True, False], [True, True, False, True], [False] * 4])
    assert positions_from_mask(mask).tolist() == [[-1, 0, 1, -1], [0, 1, -1, 2], [-1] * 4]
    assert positions_from_mask(mask).dtype == jnp.int32


WINDOWED = Transformer(dataclasses.replace(CONFIG, sliding_window=3))


@functools.partial(jax.jit, static_argnames="model")
def hidden_under_mask(model, params, tokens, positions, mask):
    """The forward with one layer's mask written down by hand, [B, L, L] bool."""
    c, x = model.config, params["embed"][tokens]
    turns = rotary_turns(positions, c.head_dim, c.rope_theta)
    for n in range(c.num_layers):
        w = jax.tree.map(lambda a, n=n: a[n], params["layers"])
        x, _, _ = model._layer(w, n, x, None, None, None, mask, positions, turns)
    return rms_norm(x, params["final_norm"], c.rms_norm_eps)


def test_sliding_window_equals_a_mask_written_by_hand():
    band = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 1, 1, 1],
        ],
        bool,
    )
    mask = np.broadcast_to(band, (ROWS, LENGTH, LENGTH))
    want = hidden_under_mask(MODEL, PARAMS, TOKENS, POSITIONS, mask)
    got = hidden_of(WINDOWED, PARAMS, TOKENS, POSITIONS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    full = hidden_of(MODEL, PARAMS, TOKENS, POSITIONS)
    np.testing.assert_allclose(got[:, :3], full[:, :3], rtol=0, atol=1e-5)
    assert (np.abs(got - full).max(axis=(0, 2))[3:] > 1e-2).all()


def test_sliding_window_counts_positions_in_the_cache_not_slots():
    # Row 1 has padding on its left, row 2 a hole: their windows skip those slots.
    slots = [[0, 1, 2, 3, 4, 5, 6], [-1, -1, -1, 0, 1, 2, 3], [0, 1, 2, 3, -1, 4, 5]]
    slots = np.array(slots, np.int32)
    tokens = np.take_along_axis(TOKENS, np.maximum(slots, 0), axis=1)
    want = np.asarray(hidden_of(WINDOWED, PARAMS, TOKENS, POSITIONS))
    cache = WINDOWED.init_cache(ROWS, LENGTH + 1)
    for t in range(LENGTH):
        hidden, cache = read_one(WINDOWED, PARAMS, tokens[:, t], slots[:, t], cache)
        for row in np.nonzero(slots[:, t] >= 0)[0]:
            np.testing.assert_allclose(hidden[row], want[row, slots[row, t]], rtol=0, atol=1e-5)


# --- The cache ------------------------------------------------------------------------------------


def test_cached_tokens_one_by_one_equal_the_full_forward():
    want = np.asarray(hidden_of(MODEL, PARAMS, TOKENS, POSITIONS))
    cache = MODEL.init_cache(ROWS, LENGTH + 2)  # two slots stay empty
    for t in range(LENGTH):
        hidden, cache = read_one(MODEL, PARAMS, TOKENS[:, t], POSITIONS[:, t], cache)
        np.testing.assert_allclose(hidden, want[:, t], rtol=0, atol=1e-5)
    assert cache.length == LENGTH
    assert cache.positions.tolist() == [[*range(LENGTH), -1, -1]] * ROWS


def test_cache_keeps_prefill_and_decode_apart_from_padding():
    # Row 0 is whole, row 1 has 3 tokens of padding on its left, row 2 a hole (an ended row's slot).
    slots = [[0, 1, 2, 3, 4, 5, 6], [-1, -1, -1, 0, 1, 2, 3], [0, 1, 2, 3, -1, 4, 5]]
    tokens = np.array(
        [[TOKENS[row, p] if p >= 0 else 18 for p in line] for row, line in enumerate(slots)],
        np.int32,
    )
    slots = np.array(slots, np.int32)
    want = np.asarray(hidden_of(MODEL, PARAMS, TOKENS, POSITIONS))
    prefill = jax.jit(lambda p, t, s, c: MODEL(p, t, positions=s, cache=c))
    hidden, cache = prefill(PARAMS, tokens[:, :4], slots[:, :4], MODEL.init_cache(ROWS, LENGTH + 2))
    got = [*np.moveaxis(np.asarray(hidden), 1, 0)]
    for t in range(4, LENGTH):
        hidden, cache = read_one(MODEL, PARAMS, tokens[:, t], slots[:, t], cache)
        got.append(np.asarray(hidden))
    got = np.stack(got, axis=1)
    for row, column in zip(*np.nonzero(slots >= 0), strict=True):
        np.testing.assert_allclose(
            got[row, column], want[row, slots[row, column]], rtol=0, atol=1e-5
        )
    np.testing.assert_array_equal(cache.positions[:, :LENGTH], slots)


def test_rows_of_a_cache_are_taken_with_their_positions():
    cache = init_cache((1, 2), 2, 3, 1, 4, jnp.float32)
    cache = dataclasses.replace(
        cache,
        keys=(cache.keys[0].at[:, 1].set(1.0), cache.keys[1].at[:, 1].set(2.0)),
        positions=jnp.array([[0, -1, -1], [5, 6, -1]]),
    )
    taken = take_rows(cache, jnp.array([1, 0, 1, 1]))
    assert [x.shape for x in taken.keys] == [(1, 4, 1, 3, 4), (2, 4, 1, 3, 4)]
    assert taken.keys[1][1, :, 0, 0, 0].tolist() == [2, 0, 2, 2]
    assert taken.positions[:, 0].tolist() == [5, 0, 5, 5]
    assert taken.length.shape == ()


@pytest.mark.parametrize("columns", [2, 3, 6])
def test_moved_cache_keeps_the_columns_from_the_first_on(columns):
    slots = 4
    cache = init_cache((2,), 3, slots, 1, 2, jnp.float32)
    column = jnp.broadcast_to(jnp.arange(slots)[None, None, None, :, None], (2, 3, 1, slots, 2))
    positions = jnp.array([[0, 1, 2, -1], [-1, 5, 6, -1], [-1, -1, 9, -1]])
    cache = dataclasses.replace(
        cache,
        keys=(column + 0.0,),
        values=(column + 0.5,),
        positions=positions,
        length=jnp.array(3),
    )
    moved = move_rows(cache, jnp.array([[2, 1]]), jnp.array(1), columns)
    assert moved.length == 2
    assert moved.positions.tolist() == [
        [-1, 9] + [-1] * (columns - 2),
        [5, 6] + [-1] * (columns - 2),
    ]
    assert moved.keys[0].shape == (2, 2, 1, columns, 2)
    assert moved.keys[0][0, 0, 0, :2, 0].tolist() == [1, 2]
    assert moved.values[0][1, 1, 0, :2, 1].tolist() == [1.5, 2.5]


def test_shards_take_from_their_own_part_of_an_axis():
    x = jnp.arange(24).reshape(2, 6, 2)
    got = take_in_shards(x, jnp.array([[1], [0], [9]]), axis=1)  # 9 is clipped
    np.testing.assert_array_equal(got, x[:, jnp.array([1, 2, 5])])
    got = take_in_shards(x, jnp.array([[5, 0]]), axis=1)
    np.testing.assert_array_equal(got, x[:, jnp.array([5, 0])])
    assert take_in_shards(jnp.arange(6), jnp.array([[2, 0], [1, 1]])).tolist() == [2, 0, 4, 4]


def test_shared_prompts_equal_a_cache_of_each_rows_own():
    # Two prompts, one with padding; rows 0, 2 and 3 complete the first, row 1 the second; row 4 is
    # a free slot. Lanes are filled up with 5, "none".
    model = WINDOWED
    ids = np.array([TOKENS[0][:4], TOKENS[1][:4]], np.int32)
    at = np.array([[0, 1, 2, 3], [-1, 0, 1, 2]], np.int32)
    prompt_of, start = np.array([0, 1, 0, 0, 0]), np.array([4, 3, 4, 4, 4])
    lanes, lane = np.array([[0, 2, 3], [1, 5, 5]]), np.array([0, 3, 1, 2, 0])
    for wide in (model, dataclasses.replace(model, config=MODEL.config)):
        _, prompts = wide(PARAMS, ids, positions=at, cache=wide.init_cache(2, 4))
        _, own = wide(
            PARAMS, ids[prompt_of], positions=at[prompt_of], cache=wide.init_cache(5, 4 + 3)
        )
        shared = SharedPrompts(
            prompts.keys, prompts.values, prompts.positions, jnp.array([lanes]), jnp.array([lane])
        )
        apart = dataclasses.replace(wide.init_cache(5, 3), prompts=shared)
        for t in range(3):
            tokens = TOKENS[:1, t : t + 1] + np.arange(5, dtype=np.int32)[:, None]
            positions = np.where(np.arange(5) < 4, start + t, -1)[:, None].astype(np.int32)
            want, own = wide(PARAMS, tokens, positions=positions, cache=own)
            got, apart = wide(PARAMS, tokens, positions=positions, cache=apart)
            np.testing.assert_allclose(got[:4], want[:4], rtol=0, atol=1e-5)
            assert np.isfinite(got).all()


def test_blocks_of_layers_equal_one_stack():
    want = np.asarray(hidden_of(MODEL, PARAMS, TOKENS, POSITIONS))
    split, params = MODEL.one_block_per_layer(PARAMS)
    assert [jax.tree.leaves(block)[0].shape[0] for block in params["layers"]] == [1, 1]
    np.testing.assert_allclose(hidden_of(split, params, TOKENS, POSITIONS), want, rtol=0, atol=1e-6)
    assert split.one_block_per_layer(params) == (split, params)  # nothing left to do
    cache = split.init_cache(ROWS, LENGTH)
    for t in range(LENGTH):
        hidden, cache = read_one(split, params, TOKENS[:, t], POSITIONS[:, t], cache)
        np.testing.assert_allclose(hidden, want[:, t], rtol=0, atol=1e-5)


# --- What a config changes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_bias_is_used(name):
    layers = {
        **PARAMS["layers"],
        name: {**PARAMS["layers"][name], "b": jnp.zeros_like(PARAMS["layers"][name]["b"])},
    }
    before = hidden_of(MODEL, PARAMS, TOKENS, POSITIONS)
    after = hidden_of(MODEL, {**PARAMS, "layers": layers}, TOKENS, POSITIONS)
    assert np.abs(after - before).max() > 1e-2


def test_declaration_has_biases_and_an_unembedding_only_where_the_config_says_so():
    assert set(declare(CONFIG)) == {"embed", "layers", "final_norm", "unembed"}
    assert set(declare(CONFIG)["layers"]["q"]) == {"w", "b"}
    plain = declare(dataclasses.replace(CONFIG, qkv_bias=False, tie_embeddings=True))
    assert set(plain) == {"embed", "layers", "final_norm"}
    assert [set(plain["layers"][name]) for name in "qkv"] == [{"w"}] * 3


def test_norms_of_queries_and_keys_are_declared_only_where_the_config_says_so():
    normed = declare(dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=True))["layers"]
    assert [set(normed[name]) for name in "qkv"] == [{"w", "norm"}, {"w", "norm"}, {"w"}]
    norm = normed["k"]["norm"]
    assert (norm.shape, norm.hf) == ((2, 4), "model.layers.{i}.self_attn.k_norm.weight")
    assert norm.init == "ones"


def test_tied_model_reads_its_logits_off_the_embedding():
    tied = Transformer(dataclasses.replace(CONFIG, tie_embeddings=True))
    np.testing.assert_array_equal(tied.unembed(PARAMS), PARAMS["embed"].T)
    np.testing.assert_array_equal(MODEL.unembed(PARAMS), PARAMS["unembed"])
    assert MODEL.unembed(PARAMS).shape == (CONFIG.embed_dim, CONFIG.vocab_size)


@pytest.mark.parametrize("kind", ["attention", "full"])
def test_remat_recomputes_and_gives_the_same_gradients(kind):
    def loss(params, model):
        hidden, _ = model(params, TOKENS, positions=POSITIONS)
        return jnp.sum(jnp.sin(hidden @ model.unembed(params)))

    remat = Transformer(dataclasses.replace(CONFIG, remat=kind))
    assert "remat" in str(jax.make_jaxpr(lambda p: loss(p, remat))(PARAMS))
    assert "remat" not in str(jax.make_jaxpr(lambda p: loss(p, MODEL))(PARAMS))
    # Optimised, as it runs: the unoptimised code of conftest.py rounds recomputed sums otherwise.
    optimised = {"xla_backend_optimization_level": 3}
    gradient = jax.jit(jax.grad(loss), static_argnames="model", compiler_options=optimised)
    want, got = gradient(PARAMS, MODEL), gradient(PARAMS, remat)
    assert all(
        np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want)
    )  # every weight takes part
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_remat_that_keeps_attention_computes_fewer_products_again():
    def products(remat):
        model = Transformer(dataclasses.replace(CONFIG, remat=remat))
        loss = lambda params: model(params, TOKENS, positions=POSITIONS)[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(PARAMS)).count("dot_general")

    layer = 9  # q, k, v, scores, values, o, gate, up, down
    assert products("full") - products("none") == layer - 1  # nothing reads down's result
    assert products("full") - products("attention") == 2  # scores and values


def test_hidden_has_the_dtype_of_the_computation():
    half = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    cache = jax.eval_shape(lambda: half.init_cache(ROWS, LENGTH))
    hidden, new_cache = jax.eval_shape(
        lambda p, c: half(p, TOKENS, positions=POSITIONS, cache=c), PARAMS, cache
    )  # fmt: skip
    assert hidden.dtype == jnp.bfloat16
    assert new_cache.keys[0].dtype == new_cache.values[0].dtype == jnp.bfloat16


# --- Initial weights ------------------------------------------------------------------------------


def test_initial_params_have_the_declared_shapes_and_dtype():
    declared = declare(CONFIG)
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.eval_shape(lambda dtype=dtype: MODEL.init(jax.random.key(0), dtype))
        want = jax.tree.map(
            lambda w, dtype=dtype: jax.ShapeDtypeStruct(w.shape, dtype), declared, is_leaf=is_weight
        )
        assert params == want
    for weight in jax.tree.leaves(declared, is_leaf=is_weight):
        assert len(weight.axes) == len(weight.shape)
        assert weight.stacked == (weight.shape[0] == CONFIG.num_layers)


def test_declared_fan_in_is_that_of_the_linear_map():
    inits = {
        ".".join(weight.hf.split(".")[-2:]): weight
        for weight in jax.tree.leaves(declare(CONFIG), is_leaf=lambda x: isinstance(x, Weight))
    }
    fan_ins = {name: w.shape[w.stacked :][: w.in_dims] for name, w in inits.items() if w.in_dims}
    assert fan_ins == {
        "q_proj.weight": (16,), "k_proj.weight": (16,), "v_proj.weight": (16,),
        "o_proj.weight": (6, 4), "gate_proj.weight": (16,), "up_proj.weight": (16,),
        "down_proj.weight": (20,), "lm_head.weight": (16,),
    }  # fmt: skip
    assert {name for name, w in inits.items() if w.init == "ones"} == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight",
    }  # fmt: skip
    assert {n for n, w in inits.items() if w.init == "zeros"} == {f"{p}_proj.bias" for p in "qkv"}


def test_initial_weights_have_the_scale_of_their_fan_in():
    axes = {"plain": (None, None, None), "stacked": ("layers", None, None)}
    declared = {
        "ones": Weight((3,), (None,), "ones", ""),
        "zeros": Weight((3,), (None,), "zeros", ""),
        "embedding": Weight((32, 8, 16), axes["plain"], "normal", ""),
        "one": Weight((32, 8, 16), axes["plain"], "normal", "", 1),
        "another": Weight((32, 8, 16), axes["plain"], "normal", "", 1),
        "two": Weight((32, 8, 16), axes["plain"], "normal", "", 2),
        "stacked": Weight((32, 8, 16), axes["stacked"], "normal", "", 1),
    }
    params = init_params(declared, jax.random.key(0))
    assert params["ones"].tolist() == [1] * 3 and params["zeros"].tolist() == [0] * 3
    stds = {"embedding": 0.02, "one": 32**-0.5, "two": (32 * 8) ** -0.5, "stacked": 8**-0.5}
    for name, std in stds.items():
        np.testing.assert_allclose(params[name].std(), std, rtol=0.05)
    assert not np.allclose(params["one"], params["another"])  # a key of its own each


# --- A model as a static argument of jit ----------------------------------------------------------


def test_equal_models_hash_alike_and_others_do_not_compare_equal():
    twin, other = (
        Transformer(dataclasses.replace(CONFIG)),
        Transformer(dataclasses.replace(CONFIG, remat="full")),
    )
    assert twin is not MODEL and twin == MODEL and hash(twin) == hash(MODEL)
    assert other != MODEL
    with pytest.raises(dataclasses.FrozenInstanceError):
        twin.config = other.config


def test_equal_models_share_one_trace():
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnames="model")
    @chex.assert_max_traces(n=1)
    def width(model, x):
        return x + model.config.embed_dim

    for _ in range(3):
        assert width(Transformer(dataclasses.replace(CONFIG)), jnp.zeros(())) == CONFIG.embed_dim
    with pytest.raises(AssertionError, match="traced > 1"):
        width(Transformer(dataclasses.replace(CONFIG, rope_theta=5e5)), jnp.zeros(()))
