"""Tests of process reward models: scores against a plain forward, unscorable rows, round trips."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scope_jax.models.hf import save_hf
from scope_jax.models.transformer import Transformer, TransformerConfig, Weight
from scope_jax.prm import PRM, _compiled_scorer, load_prm, save_prm, score_steps
from scope_jax.records import InputError
from scope_jax.sharding import make_mesh

PRM_MODEL = PRM(
    Transformer(
        TransformerConfig(
            vocab_size=12, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
            mlp_dim=12, qkv_bias=True, max_position=7,
        )
    )
)  # fmt: skip

# Three rows of 7, 5 and 4 tokens, in a batch of 8 columns: "." is padding, "|" ends a step.
#   . t t t | t | |        2 of padding on the left of row 1, some on both sides of row 2
#   . . . t t | t |
#   . . t | t | . .
ROW_LENGTHS, ROW_STARTS = (7, 5, 4), (1, 3, 2)
STEP_ENDS = ((3, 5, 6), (2, 4), (1, 3))  # columns within the row
TOKENS = [
    np.random.default_rng(row).integers(0, 12, n).astype(np.int32)
    for row, n in enumerate(ROW_LENGTHS)
]
IDS, MASK = np.full((3, 8), 11, np.int32), np.zeros((3, 8), bool)
POSITIONS, STEP_MASK = np.full((3, 3), 99, np.int32), np.zeros((3, 3), bool)
for row, (tokens, start, ends) in enumerate(zip(TOKENS, ROW_STARTS, STEP_ENDS, strict=True)):
    IDS[row, start : start + len(tokens)], MASK[row, start : start + len(tokens)] = tokens, True
    POSITIONS[row, : len(ends)], STEP_MASK[row, : len(ends)] = np.add(start, ends), True


def random_params(prm):
    rng = np.random.default_rng(0)

    def draw(weight):
        noise = 0.5 * rng.standard_normal(weight.shape)
        return jnp.asarray(1 + noise if weight.init == "ones" else noise, jnp.float32)

    return jax.tree.map(draw, prm.declare(), is_leaf=lambda x: isinstance(x, Weight))


PARAMS = random_params(PRM_MODEL)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


# --- Scores ---------------------------------------------------------------------------------------


def test_scores_are_the_softmax_of_a_plain_forward_at_the_ends_of_the_steps():
    scored = score_steps(PRM_MODEL, PARAMS, IDS, MASK, POSITIONS, STEP_MASK)
    assert scored.scores.dtype == jnp.float32
    head = jax.tree.map(np.asarray, PARAMS["head"])
    forward = jax.jit(
        lambda ids, positions: PRM_MODEL.backbone(PARAMS["backbone"], ids, positions=positions)[0]
    )
    for row, (tokens, ends) in enumerate(zip(TOKENS, STEP_ENDS, strict=True)):
        hidden = forward(tokens[None], np.arange(len(tokens))[None])  # alone and without padding
        for step, end in enumerate(ends):
            wrong, correct = np.asarray(hidden, np.float64)[0, end] @ head["w"] + head["b"]
            want = np.exp(correct) / (np.exp(wrong) + np.exp(correct))
            np.testing.assert_allclose(scored.scores[row, step], want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scored.mask, STEP_MASK)
    assert np.std(np.asarray(scored.scores)[STEP_MASK]) > 0.05


def test_later_tokens_change_no_score():
    first = score_steps(PRM_MODEL, PARAMS, IDS, MASK, POSITIONS, STEP_MASK)
    changed = IDS.copy()
    changed[0, ROW_STARTS[0] + STEP_ENDS[0][1] + 1] += 1  # the first token of row 0's last step
    second = score_steps(PRM_MODEL, PARAMS, changed % 12, MASK, POSITIONS, STEP_MASK)
    np.testing.assert_array_equal(second.scores[0, :2], first.scores[0, :2])
    assert abs(second.scores[0, 2] - first.scores[0, 2]) > 1e-4


def constant_prm(params, ids, positions, score_positions):
    """A plain function: the score is the token that is read, divided by 10."""
    del params, positions
    return jnp.take_along_axis(ids, score_positions, axis=1) / 10.0


def test_plain_function_is_a_prm():
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    positions, step_mask = np.array([[1, 3], [2, 9]]), np.array([[True, True], [True, False]])
    scored = score_steps(constant_prm, (), ids, np.ones((2, 4), bool), positions, step_mask)
    np.testing.assert_allclose(scored.scores, [[2 / 10, 4 / 10], [7 / 10, 0]], rtol=1e-6)
    np.testing.assert_array_equal(scored.mask, step_mask)


def test_scoring_inside_of_another_jit_leaves_the_options_to_it(monkeypatch):
    """XLA's options belong to the outermost jit, whichever of the inputs are traced."""
    options = {"xla_backend_optimization_level": 3}
    monkeypatch.setattr("scope_jax.prm.update_compiler_options", lambda _: options)
    jax.clear_caches()
    _compiled_scorer.cache_clear()
    rest = (MASK, POSITIONS, STEP_MASK)
    whole = score_steps(PRM_MODEL, PARAMS, IDS, *rest)
    of_ids = jax.jit(lambda ids: score_steps(PRM_MODEL, PARAMS, ids, *rest))
    of_both = jax.jit(lambda params, ids: score_steps(PRM_MODEL, params, ids, *rest))
    for scored in (of_ids(IDS), of_both(PARAMS, IDS)):
        np.testing.assert_allclose(scored.scores, whole.scores, rtol=0, atol=1e-5)
    _compiled_scorer.cache_clear()


# --- Rows that cannot be scored -------------------------------------------------------------------


def test_row_beyond_the_context_is_masked_out_entirely():
    config = dataclasses.replace(PRM_MODEL.backbone.config, max_position=5)
    short = PRM(Transformer(config))
    whole = score_steps(PRM_MODEL, PARAMS, IDS, MASK, POSITIONS, STEP_MASK)
    scored = score_steps(short, PARAMS, IDS, MASK, POSITIONS, STEP_MASK)
    assert scored.mask.tolist() == [
        [False] * 3,
        [True, True, False],
        [True, True, False],
    ]  # 7 > 5 = 5 > 4
    assert (scored.scores[0] == 0).all()
    np.testing.assert_allclose(scored.scores[1:], whole.scores[1:], rtol=0, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Given:
    """A PRM whose scores are its params; reads no token."""

    max_position: int = 100

    def __call__(self, params, ids, positions, score_positions):
        del ids, positions, score_positions
        return params


def test_row_with_a_score_that_is_not_finite_is_masked_out_entirely():
    scores = np.array([[0.9, np.nan], [0.8, 0.7], [np.inf, 0.6], [0.5, np.nan]], np.float32)
    step_mask = np.array([[True, True], [True, True], [True, True], [True, False]])
    zeros, ones = np.zeros((4, 2), np.int32), np.ones((4, 2), bool)
    scored = score_steps(Given(), scores, zeros, ones, zeros, step_mask)
    assert scored.mask.tolist() == [
        [False] * 2,
        [True] * 2,
        [False] * 2,
        [True, False],
    ]  # padding may be NaN
    np.testing.assert_array_equal(scored.scores, np.float32([[0, 0], [0.8, 0.7], [0, 0], [0.5, 0]]))


def test_row_without_steps_has_no_scores():
    zeros, ones = np.zeros((1, 2), np.int32), np.ones((1, 2), bool)
    scored = score_steps(Given(), np.full((1, 2), 0.9, np.float32), zeros, ones, zeros, ~ones)
    assert not scored.mask.any() and not scored.scores.any()


# --- Directories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_prm_loads_with_the_same_bits(dtype, tmp_path):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    save_prm(tmp_path, PRM_MODEL, params)
    prm, loaded = load_prm(tmp_path)
    config = dataclasses.replace(PRM_MODEL.backbone.config, dtype=dtype)
    assert prm == PRM(Transformer(config))
    assert prm.max_position == 7
    assert_same_bits(loaded, params)
    widened = load_prm(tmp_path, dtype=np.float32)[1]
    assert_same_bits(widened, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_saved_head_has_the_names_and_layout_of_trl(tmp_path):
    save_prm(tmp_path, PRM_MODEL, PARAMS)
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], PARAMS["head"]["w"].T)
    np.testing.assert_array_equal(tensors["score.bias"], PARAMS["head"]["b"])
    assert tensors["score.weight"].shape == (2, 8)
    assert "lm_head.weight" not in tensors


def test_unused_language_model_head_is_tolerated(tmp_path):
    save_prm(tmp_path, PRM_MODEL, PARAMS)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": np.ones((12, 8), np.float32)}, tmp_path / "model.safetensors"
    )
    assert_same_bits(load_prm(tmp_path)[1], PARAMS)


def test_prm_loads_onto_a_mesh(tmp_path):
    save_prm(tmp_path, PRM_MODEL, PARAMS)
    with pytest.raises(InputError, match=r"does not divide over model=2"):
        load_prm(tmp_path, mesh=make_mesh(data=2, fsdp=2, model=2))  # one kv head
    _, params = load_prm(tmp_path, mesh=make_mesh(data=4, fsdp=2, model=1))
    assert_same_bits(params, PARAMS)
    assert params["backbone"]["embed"].addressable_shards[0].data.shape == (12, 8 // 2)


def test_language_model_is_no_prm(tmp_path):
    backbone = dataclasses.replace(PRM_MODEL.backbone.config, tie_embeddings=True)
    save_hf(tmp_path, Transformer(backbone), PARAMS["backbone"])
    with pytest.raises(InputError, match="holds no known PRM head"):
        load_prm(tmp_path)


def test_prm_without_its_head_s_tensors_is_refused(tmp_path):
    save_prm(tmp_path, PRM_MODEL, PARAMS)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["score.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: score\.bias"):
        load_prm(tmp_path)


def test_unknown_head_is_named(tmp_path):
    save_prm(tmp_path, PRM_MODEL, PARAMS)
    file = tmp_path / "config.json"
    told = {"head": "oracle", "format": "trl"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "scope_jax_prm": told}))
    with pytest.raises(InputError, match="PRM head 'oracle' is not known"):
        load_prm(tmp_path)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_prm(tmp_path / "missing")
