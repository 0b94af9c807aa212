"""Tests of the PRM heads against PyTorch: published key layouts, scores, and round trips.

tests/goldens/make_prm_goldens.py made the checkpoints and the scores that these tests read.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scope_jax.prm import all_right, last_tokens, load_prm, save_prm, score_steps
from scope_jax.records import InputError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
HEADS = {
    "prm_mlp2": "mlp2_at_token",
    "prm_linear2": "linear2_at_sep",
    "prm_value": "value_sigmoid_at_sep",
    "prm_pair": "lm_pair_at_token",
    "prm_pair_tied": "lm_pair_at_token",
}
HEAD_TENSORS = {  # name and shape in the published checkpoints, hidden size 32, 64 tokens
    "prm_mlp2": {
        "score.0.weight": (32, 32), "score.0.bias": (32,),
        "score.2.weight": (2, 32), "score.2.bias": (2,),
    },
    "prm_linear2": {"score.weight": (2, 32), "score.bias": (2,)},
    "prm_value": {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)},
    "prm_pair": {"lm_head.weight": (64, 32)},
    "prm_pair_tied": {},
}  # fmt: skip
BATCH = ("ids", "mask", "score_positions", "step_mask")
ALL = pytest.mark.parametrize("name", HEADS)


def read_golden(name):
    golden = np.load(GOLDENS / name / "golden.npz")
    return [golden[key] for key in BATCH], golden["scores"], golden["step_mask"]


def copy_with(name, directory, change):
    """Copies a checkpoint and changes its dict of tensors."""
    shutil.copytree(GOLDENS / name, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


# --- Scores ---------------------------------------------------------------------------------------


@ALL
def test_scores_equal_pytorch(name):
    batch, want, step_mask = read_golden(name)
    assert step_mask.sum(-1).tolist() == [5, 3, 1, 4]  # unequal numbers of steps
    assert batch[1].sum(-1).tolist() == [14, 9, 4, 11] and batch[1][:, -1].all()  # left-padded
    prm, params = load_prm(GOLDENS / name)
    assert prm.head == HEADS[name]
    scored = score_steps(prm, params, *batch)
    assert scored.scores.dtype == jnp.float32
    np.testing.assert_array_equal(scored.mask, step_mask)
    assert want[step_mask].std() > 0.2
    np.testing.assert_allclose(scored.scores, want, rtol=0, atol=1e-5)


@ALL
def test_score_over_several_tokens_is_the_product_of_theirs(name):
    batch, _, step_mask = read_golden(name)
    ids, mask, at, _ = batch
    prm, params = load_prm(GOLDENS / name)
    pooled = dataclasses.replace(prm, reads=3)
    got = score_steps(pooled, params, *batch)
    np.testing.assert_array_equal(got.mask, step_mask)
    columns = np.arange(ids.shape[1])[None, :].repeat(len(ids), 0)  # a score at every token
    single = np.asarray(score_steps(prm, params, ids, mask, columns, mask).scores)
    for row, step in zip(*np.nonzero(step_mask), strict=True):
        first = at[row, step - 1] + 1 if step else 0
        tokens = range(max(first, at[row, step] - 2), at[row, step] + 1)
        want = np.prod([single[row, t] for t in tokens if mask[row, t]])
        np.testing.assert_allclose(got.scores[row, step], want, rtol=0, atol=1e-5)


def test_last_tokens_end_where_the_step_before_does():
    positions = jnp.array([[-1, -1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
    at, real = last_tokens(positions, jnp.array([[3, 7], [1, 2]]), 3)
    assert at.tolist() == [[3, 2, 1, 7, 6, 5], [1, 0, 0, 2, 1, 0]]
    assert real.tolist() == [
        [[True, True, False], [True, True, True]],
        [[True, True, False], [True, False, False]],
    ]


def test_log_odds_that_all_are_right_stay_finite_with_their_gradients():
    odds = jnp.array([[60.0, 60.0], [-60.0, 3.0], [-200.0, -200.0], [0.0, 0.0]])
    real = jnp.array([[True, True], [True, True], [True, True], [True, False]])
    value, gradient = jax.jvp(lambda x: all_right(x, real), (odds,), (jnp.ones_like(odds),))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(value[1:], [-60 - np.log1p(np.exp(-3)), -400, 0], atol=1e-4)
    assert value[0] > 15  # a probability of 1 - 1e-7 is as near to 1 as float32 tells


@pytest.mark.parametrize("reads", [0, -1, 2.5, "2", None])
def test_bad_number_of_reads_is_named(reads, tmp_path):
    prm, params = load_prm(GOLDENS / "prm_linear2")
    save_prm(tmp_path, dataclasses.replace(prm, reads=4), params)
    assert load_prm(tmp_path)[0].reads == 4
    config = json.loads((tmp_path / "config.json").read_text())
    config["scope_jax_prm"]["reads"] = reads
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match='config.json: "reads" of "scope_jax_prm" must be'):
        load_prm(tmp_path)


def test_step_whose_probability_underflows_to_zero_is_still_a_step():
    batch, want, step_mask = read_golden("prm_mlp2")
    assert want[1, 1] == 0 and step_mask[1, 1]  # the model card's `!= 0` would lose this one
    prm, params = load_prm(GOLDENS / "prm_mlp2")
    scored = score_steps(prm, params, *batch)
    assert scored.scores[1, 1] == 0 and scored.mask[1, 1]
    assert (np.asarray(scored.scores)[1, [0, 2]] > 0.9).all() and scored.mask[1, [0, 2]].all()


@ALL
def test_row_alone_has_the_scores_that_it_has_in_the_batch(name):
    batch, want, step_mask = read_golden(name)
    prm, params = load_prm(GOLDENS / name)
    together = score_steps(prm, params, *batch)
    for row in range(4):
        alone = score_steps(prm, params, *(array[[row]] for array in batch))
        np.testing.assert_array_equal(alone.mask[0], step_mask[row])
        # Products of another shape round otherwise: up to 1.2e-6 of a score on a CPU with AVX-512.
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=0, atol=1e-5)
    ids, mask, positions, _ = (array[[1]] for array in batch)  # and without its 5 of padding
    alone = score_steps(prm, params, ids[:, 5:], mask[:, 5:], positions - 5, step_mask[[1]])
    np.testing.assert_allclose(alone.scores[0], want[1], rtol=0, atol=1e-5)


def test_pair_ids_say_which_logit_is_good(tmp_path):
    batch, want, step_mask = read_golden("prm_pair")
    directory = shutil.copytree(GOLDENS / "prm_pair", tmp_path / "swapped")
    config = json.loads((directory / "config.json").read_text())
    config["scope_jax_prm"]["pair_ids"] = config["scope_jax_prm"]["pair_ids"][::-1]
    (directory / "config.json").write_text(json.dumps(config))
    scored = score_steps(*load_prm(directory), *batch)
    np.testing.assert_allclose(  # softmax of two: P(bad) = 1 - P(good)
        np.asarray(scored.scores)[step_mask], 1 - want[step_mask], rtol=0, atol=1e-5
    )


# --- Directories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prm_mlp2", "prm_value"])
def test_unused_language_model_head_changes_nothing(name, tmp_path):
    batch, _, _ = read_golden(name)
    want = score_steps(*load_prm(GOLDENS / name), *batch)
    changes = {
        "other": lambda tensors: tensors.update({"lm_head.weight": np.ones((64, 32), np.float32)}),
        "absent": lambda tensors: tensors.pop("lm_head.weight"),
    }
    for case, change in changes.items():
        prm, params = load_prm(copy_with(name, tmp_path / case, change))
        assert_same_bits(score_steps(prm, params, *batch), want)


@ALL
def test_saved_prm_loads_with_the_same_bits_and_scores(name, tmp_path):
    batch, _, _ = read_golden(name)
    prm, params = load_prm(GOLDENS / name)
    save_prm(tmp_path / "saved", prm, params)
    again, loaded = load_prm(tmp_path / "saved")
    assert again == prm
    assert_same_bits(loaded, params)
    assert_same_bits(score_steps(again, loaded, *batch), score_steps(prm, params, *batch))


@ALL
def test_saved_tensors_have_the_published_names_shapes_and_bits(name, tmp_path):
    published = load_file(GOLDENS / name / "model.safetensors")
    if "lm_head.weight" not in HEAD_TENSORS[name]:
        published.pop("lm_head.weight", None)  # unused, so not kept
    save_prm(tmp_path, *load_prm(GOLDENS / name))
    saved = load_file(tmp_path / "model.safetensors")
    assert_same_bits(saved, published)
    for tensor, shape in HEAD_TENSORS[name].items():
        assert saved[tensor].shape == shape


@pytest.mark.parametrize(
    ("name", "tensor"), [(name, tensor) for name in HEADS for tensor in HEAD_TENSORS[name]]
)
def test_missing_tensor_of_the_head_is_named_in_one_line(name, tensor, tmp_path):
    directory = copy_with(name, tmp_path / "damaged", lambda tensors: tensors.pop(tensor))
    with pytest.raises(InputError) as error:
        load_prm(directory)
    assert tensor in str(error.value) and str(directory) in str(error.value)
    assert "\n" not in str(error.value)


def test_head_of_another_width_is_named_with_both_shapes(tmp_path):
    def narrow(tensors):
        tensors["v_head.summary.weight"] = tensors["v_head.summary.weight"][:, :-1].copy()

    directory = copy_with("prm_value", tmp_path / "damaged", narrow)
    with pytest.raises(InputError, match=r"v_head\.summary\.weight \(1, 31\).*\(1, 32\)"):
        load_prm(directory)
