"""Tests of Hugging Face directories: parity with PyTorch, round trips, one line on what is wrong.

tests/goldens/make_hf_goldens.py made the checkpoints and the outputs that these tests read.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tracemalloc
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scope_jax.models.hf import (
    config_from_hf,
    config_to_hf,
    load_hf,
    load_tokenizer,
    load_tree,
    save_hf,
    write_checkpoint,
)
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.safetensors_files import Tensors
from scope_jax.models.transformer import Llama3Rope, Transformer, Weight
from scope_jax.records import InputError
from scope_jax.sampling import generate
from scope_jax.sharding import Rules, make_mesh

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = ("llama", "qwen2", "qwen3", "llama3", "mistral")


@functools.partial(jax.jit, static_argnames="model")
def logits_of(model, params, ids, mask):
    hidden, _ = model(params, ids, positions=positions_from_mask(mask))
    return hidden @ model.unembed(params)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def copy_golden(family, directory):
    """Copies a golden checkpoint to where a test may damage it."""
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / family / name, directory / name)
    return directory


def change_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def make_tokenizer(**options):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<end>": 1, "one": 2, "two": 3}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", **options)


# --- Parity with PyTorch --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_pytorch(family):
    golden = np.load(GOLDENS / family / "golden.npz")
    mask = golden["mask"]
    assert mask.sum(-1).tolist() == [10, 7, 1] and mask[:, -1].all()  # left-padded
    model, params = load_hf(GOLDENS / family)
    logits = np.asarray(logits_of(model, params, golden["ids"], mask))
    assert golden["logits"].std() > 1
    assert np.abs(logits - golden["logits"])[mask].max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_greedy_continuation_equals_pytorch(family):
    golden = np.load(GOLDENS / family / "golden.npz")
    model, params = load_hf(GOLDENS / family)
    rollouts = generate(
        model, params, golden["ids"], golden["mask"], jax.random.key(0), group_size=1,
        max_new_tokens=golden["greedy"].shape[1], eos_ids=(), temperature=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rollouts.completion_ids, golden["greedy"])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_cached_decode_step_equal_pytorch(family):
    golden = np.load(GOLDENS / family / "golden.npz")
    model, params = load_hf(GOLDENS / family)
    rows, width = golden["ids"].shape
    positions = np.asarray(positions_from_mask(golden["mask"]))

    @jax.jit
    def read(ids, positions, cache):
        hidden, cache = model(params, ids, positions=positions, cache=cache)
        return hidden[:, -1] @ model.unembed(params), cache

    cache = model.init_cache(rows, width + golden["greedy"].shape[1])
    logits, cache = read(golden["ids"], positions, cache)
    got = [logits]
    for t, token in enumerate(golden["greedy"][:, :-1].T):
        logits, cache = read(token[:, None], positions[:, -1:] + 1 + t, cache)
        got.append(logits)
    assert golden["greedy_logits"].shape == (3, 8, 64)
    assert np.abs(np.stack(got, axis=1) - golden["greedy_logits"]).max() <= 1e-4


def without(model, feature):
    return Transformer(dataclasses.replace(model.config, **feature))


@pytest.mark.parametrize(
    ("family", "feature"),
    [("mistral", {"sliding_window": None}), ("llama3", {"rope_scaling": None})],
)
def test_golden_would_notice_a_missing_feature(family, feature):
    golden = np.load(GOLDENS / family / "golden.npz")
    model, params = load_hf(GOLDENS / family)
    other = Transformer(dataclasses.replace(model.config, **feature))
    logits = np.asarray(logits_of(other, params, golden["ids"], golden["mask"]))
    assert np.abs(logits - golden["logits"])[golden["mask"]].max() > 0.1


def test_rope_of_the_golden_has_kept_interpolated_and_slowed_pairs():
    config = load_hf(GOLDENS / "llama3")[0].config
    assert config.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 50)
    assert (config.rope_theta, config.head_dim) == (100.0, 8)
    turns = 50 * 100.0 ** -(np.arange(0, 8, 2) / 8) / (2 * np.pi)
    assert turns[0] > 4 > turns[1] > 1 > turns[2] > turns[3]


def test_golden_families_differ_where_the_forward_does():
    qwen3, _ = load_hf(GOLDENS / "qwen3")
    assert qwen3.config.qk_norm and not qwen3.config.qkv_bias and qwen3.config.tie_embeddings
    assert qwen3.config.head_dim == 16 != qwen3.config.embed_dim // qwen3.config.num_heads
    llama3, _ = load_hf(GOLDENS / "llama3")
    assert llama3.config.num_heads == llama3.config.num_kv_heads
    mistral, _ = load_hf(GOLDENS / "mistral")
    assert mistral.config.sliding_window == 4
    llama, _ = load_hf(GOLDENS / "llama")
    qwen2, _ = load_hf(GOLDENS / "qwen2")
    assert llama.config.num_heads == 2 * llama.config.num_kv_heads
    assert (llama.config.qkv_bias, llama.config.tie_embeddings, llama.config.rope_theta) == (
        False,
        True,
        1e4,
    )
    assert (qwen2.config.qkv_bias, qwen2.config.tie_embeddings, qwen2.config.rope_theta) == (
        True,
        False,
        1e6,
    )
    assert (llama.config.rms_norm_eps, qwen2.config.rms_norm_eps) == (1e-5, 1e-6)
    assert llama.config.max_position == 128


# --- SmolLM2, a real model ------------------------------------------------------------------------


class Smol(NamedTuple):
    model: Transformer
    params: dict
    prompts: list[np.ndarray]
    last_logits: list[np.ndarray]
    logps: list[np.ndarray]
    continuations: list[list[int]]
    ids: np.ndarray  # [3, 31], the prompts, LEFT-padded
    mask: np.ndarray


@pytest.fixture(scope="module")
def smol(smollm2, shared):
    golden = np.load(shared / "data/smollm2/golden_torch_fp32.npz")
    prompts = [golden[f"ids{i}"] for i in range(3)]
    width = max(map(len, prompts))
    ids, mask = np.zeros((3, width), np.int32), np.zeros((3, width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, True
    return Smol(
        *load_hf(smollm2),
        prompts,
        [golden[f"last_logits{i}"] for i in range(3)],
        [golden[f"tok_logprobs{i}"] for i in range(3)],
        [golden[f"greedy{i}"][len(prompt) :].tolist() for i, prompt in enumerate(prompts)],
        ids,
        mask,
    )


def test_smollm2_logits_equal_pytorch(smol):
    logits = logits_of(smol.model, smol.params, smol.ids, smol.mask)
    logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for row, prompt in enumerate(smol.prompts):
        assert np.abs(logits[row, -1] - smol.last_logits[row]).max() <= 2e-4
        read = logps[row, -len(prompt) : -1]  # each but the last predicts its successor
        assert np.abs(read[np.arange(len(prompt) - 1), prompt[1:]] - smol.logps[row]).max() <= 2e-4


def test_smollm2_writes_every_greedy_token_of_pytorch(smol):
    rollouts = generate(
        smol.model, smol.params, smol.ids, smol.mask, jax.random.key(0), group_size=1,
        max_new_tokens=24, eos_ids=(2,), temperature=0.0,
    )  # fmt: skip
    got = [
        ids[mask].tolist()
        for ids, mask in zip(
            *jax.device_get((rollouts.completion_ids, rollouts.completion_mask)), strict=True
        )
    ]
    assert got == smol.continuations
    assert rollouts.finished.tolist() == [want[-1] == 2 for want in smol.continuations]


def test_smollm2_tokenizer_reads_the_golden_prompt(smollm2, shared):
    tokenizer, end_ids = load_tokenizer(smollm2)
    assert 2 in end_ids
    golden = np.load(shared / "data/smollm2/golden_torch_fp32.npz")["ids0"].tolist()
    assert tokenizer.encode(tokenizer.decode(golden), add_special_tokens=False) == golden


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_loads_with_the_same_bits(family, dtype, tmp_path):
    model, params = load_hf(GOLDENS / family, dtype=dtype)
    assert model.config.dtype == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    save_hf(tmp_path / "new" / "dir", model, params)
    again, loaded = load_hf(tmp_path / "new" / "dir")
    assert again == model
    assert_same_bits(loaded, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tensors_are_the_source_s(family, tmp_path):
    save_hf(tmp_path, *load_hf(GOLDENS / family))
    assert_same_bits(
        load_file(tmp_path / "model.safetensors"), load_file(GOLDENS / family / "model.safetensors")
    )
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_config_from_the_saved_directory(family, tmp_path):
    from transformers import AutoConfig

    save_hf(tmp_path, *load_hf(GOLDENS / family))
    want, got = AutoConfig.from_pretrained(GOLDENS / family), AutoConfig.from_pretrained(tmp_path)
    assert type(got) is type(want)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
        "max_position_embeddings", "rope_parameters", "architectures", "dtype",
    )  # fmt: skip
    assert {name: getattr(got, name) for name in names} == {
        name: getattr(want, name) for name in names
    }


def test_saving_over_a_model_replaces_it(tmp_path):
    model, params = load_hf(GOLDENS / "llama")
    save_hf(tmp_path, model, params)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save_hf(tmp_path, model, doubled)
    assert_same_bits(load_hf(tmp_path)[1], doubled)


def test_dtype_of_the_load_rounds_the_stored_values():
    _, params = load_hf(GOLDENS / "llama")
    _, half = load_hf(GOLDENS / "llama", dtype=jnp.bfloat16)
    assert_same_bits(half, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params))


def test_sharded_checkpoint_loads_like_the_whole_one(tmp_path):
    source = load_file(GOLDENS / "qwen2" / "model.safetensors")
    shutil.copy(GOLDENS / "qwen2" / "config.json", tmp_path)
    weight_map = {}
    for number in (1, 2):
        part = {name: source[name] for name in sorted(source)[number - 1 :: 2]}
        save_file(part, tmp_path / f"model-0000{number}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    model, params = load_hf(tmp_path)
    want_model, want = load_hf(GOLDENS / "qwen2")
    assert model == want_model
    assert_same_bits(params, want)


@pytest.mark.parametrize("max_shard_bytes", [1, 9_000, 30_000])
def test_saved_shards_hold_every_tensor_once_and_load_with_the_same_bits(max_shard_bytes, tmp_path):
    model, params = load_hf(GOLDENS / "qwen3", dtype="bfloat16")
    save_hf(tmp_path, model, params, max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    held = {f.name: load_file(f) for f in files}  # the safetensors library reads what we wrote
    assert index["weight_map"] == {n: f for f, tensors in held.items() for n in tensors}
    sizes = {f: sum(x.nbytes for x in tensors.values()) for f, tensors in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(sizes[f] <= max_shard_bytes or len(held[f]) == 1 for f in held)
    assert not list(tmp_path.glob("*.partial"))
    again, loaded = load_hf(tmp_path)
    assert again == model
    assert_same_bits(loaded, params)


def test_saving_removes_the_files_of_an_earlier_save_but_no_others(tmp_path):
    model, params = load_hf(GOLDENS / "llama")
    (tmp_path / "adapter.safetensors").write_bytes(b"mine")
    others = {"adapter.safetensors", "config.json"}
    for max_shard_bytes, number in ((20_000, 5), (45_000, 2), (10**9, 1), (20_000, 5)):
        save_hf(tmp_path, model, params, max_shard_bytes=max_shard_bytes)
        names = {f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)}
        names |= {"model.safetensors.index.json"}
        names = names if number > 1 else {"model.safetensors"}
        assert {f.name for f in tmp_path.iterdir()} == others | names
        assert_same_bits(load_hf(tmp_path)[1], params)


def test_save_that_fails_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    model, params = load_hf(GOLDENS / "llama")
    save_hf(tmp_path, model, params)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("No space left on device")

    (tmp_path / "model-00001-of-00007.safetensors.partial").write_bytes(b"of a killed save")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_hf(tmp_path, model, jax.tree.map(lambda x: 2 * x, params), max_shard_bytes=20_000)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_params_from_a_mesh_are_saved_with_the_same_bytes(tmp_path):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    save_hf(tmp_path / "a", *load_hf(GOLDENS / "qwen2"))
    save_hf(tmp_path / "b", *load_hf(GOLDENS / "qwen2", mesh=mesh))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_big_weight_is_written_and_read_in_several_pieces(tmp_path, monkeypatch):
    params = jax.tree.map(np.asarray, load_hf(GOLDENS / "llama3")[1])
    model = load_hf(GOLDENS / "llama3")[0]
    monkeypatch.setattr("scope_jax.models.hf.CHUNK_BYTES", 10)
    monkeypatch.setattr("scope_jax.models.safetensors_files.CHUNK_BYTES", 300)
    save_hf(tmp_path, model, params)  # host arrays are saved too
    assert_same_bits(
        load_file(tmp_path / "model.safetensors"),
        load_file(GOLDENS / "llama3" / "model.safetensors"),
    )
    assert_same_bits(load_hf(tmp_path)[1], params)
    assert_same_bits(load_hf(tmp_path, mesh=make_mesh(data=1, fsdp=2, model=4))[1], params)


def test_params_of_other_shapes_are_not_saved(tmp_path):
    model, params = load_hf(GOLDENS / "llama")
    with pytest.raises(InputError, match=r"model.norm.weight has shape \(31,\) instead of \(32,\)"):
        save_hf(tmp_path, model, {**params, "final_norm": params["final_norm"][:31]})
    assert not list(tmp_path.iterdir())


def test_tied_model_ignores_a_copy_of_its_head(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    change_tensors(
        directory, lambda t: t.update({"lm_head.weight": 3 * t["model.embed_tokens.weight"]})
    )
    assert_same_bits(load_hf(directory)[1], load_hf(GOLDENS / "llama")[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_the_translation(family):
    config = load_hf(GOLDENS / family)[0].config
    other = dataclasses.replace(
        config, head_dim=12, rope_theta=4e4, max_position=99, rms_norm_eps=1e-3
    )
    stretched = dataclasses.replace(other, rope_scaling=Llama3Rope(2.5, 1.0, 4.0, 77))
    for c in (config, other, stretched):
        c = dataclasses.replace(c, tie_embeddings=not config.tie_embeddings)
        assert config_from_hf(json.loads(json.dumps(config_to_hf(c)))) == c


@pytest.mark.parametrize(
    ("features", "family"),
    [
        ({}, "llama"),
        ({"sliding_window": 3}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
    ],
)
def test_features_name_the_family(features, family):
    config = dataclasses.replace(load_hf(GOLDENS / "llama")[0].config, **features)
    assert config_to_hf(config)["model_type"] == family


def test_features_that_no_family_has_together_are_refused():
    config = load_hf(GOLDENS / "qwen3")[0].config
    with pytest.raises(InputError, match="the features of qwen3 and qwen2 together"):
        config_to_hf(dataclasses.replace(config, qkv_bias=True))


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 50,
}  # fmt: skip


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100, **LLAMA3}},
        {"rope_theta": 100, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 100, "rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": None},
    ],
)
def test_both_spellings_of_llama3_rope_mean_the_same(spelling):
    hf = json.loads((GOLDENS / "llama3" / "config.json").read_text())
    want = config_from_hf(hf)
    del hf["rope_parameters"]
    assert config_from_hf({**hf, **spelling}) == want
    assert want.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 50) and want.rope_theta == 100.0


def test_mistral_without_a_window_is_a_llama_and_one_that_leaves_it_out_has_the_default():
    hf = json.loads((GOLDENS / "mistral" / "config.json").read_text())
    plain = config_from_hf({**hf, "sliding_window": None})
    assert plain.sliding_window is None and config_to_hf(plain)["model_type"] == "llama"
    del hf["sliding_window"]
    assert config_from_hf(hf).sliding_window == 4096  # transformers' default for Mistral


def test_old_config_files_name_theta_and_leave_defaults_out():
    old = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 3, "intermediate_size": 5, "rope_theta": 5e5, "rope_scaling": None,
    }  # fmt: skip
    config = config_from_hf(old)
    assert (config.rope_theta, config.num_kv_heads, config.head_dim, config.tie_embeddings) == (
        5e5,
        3,
        12 // 3,
        False,
    )


# --- On a mesh ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_model_on_a_mesh_has_equal_values_in_sharded_arrays(family):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    model, params = load_hf(GOLDENS / family)
    mesh_model, placed = load_hf(GOLDENS / family, mesh=mesh)
    assert mesh_model == model
    assert_same_bits(placed, params)
    parts = jax.tree.map(lambda x: x.size // x.addressable_shards[0].data.size, placed)
    split = {
        "attn_norm": 1,
        "mlp_norm": 1,
        "q": {"w": 4},
        "k": {"w": 4},
        "v": {"w": 4},
        "o": 4,
        "gate": 4,
        "up": 4,
        "down": 4,
    }
    if family == "qwen2":
        split |= {name: {"w": 4, "b": 2} for name in "qkv"}
    if family == "qwen3":
        split |= {name: {"w": 4, "norm": 1} for name in "qk"}
    head = {} if model.config.tie_embeddings else {"unembed": 4}
    assert parts == {"embed": 4, "layers": split, "final_norm": 1, **head}
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(placed))


def test_rules_of_the_load_place_the_arrays():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    _, params = load_hf(GOLDENS / "llama", mesh=mesh, rules=Rules(embed=None))
    assert params["embed"].addressable_shards[0].data.shape == (64 // 2, 32)
    assert params["layers"]["gate"].addressable_shards[0].data.shape == (2, 32, 48 // 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "stored",
    [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
    + [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
)
def test_every_stored_float_format_loads_into_every_dtype(stored, dtype, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    change_tensors(directory, lambda t: t.update({n: x.astype(stored) for n, x in t.items()}))
    _, params = load_hf(directory, dtype=dtype, mesh=make_mesh(data=2, fsdp=2, model=2))
    want = jax.tree.map(
        lambda x: np.asarray(x).astype(stored).astype(np.dtype(dtype)),
        load_hf(GOLDENS / "llama")[1],
    )
    assert_same_bits(params, want)


@pytest.mark.parametrize(
    ("stored", "default"),
    [(np.float64, "float32"), (np.float16, "float16"), (ml_dtypes.float8_e5m2, "bfloat16")],
)
def test_without_a_dtype_params_are_what_the_computation_can_run_in(stored, default, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    change_tensors(directory, lambda t: t.update({n: x.astype(stored) for n, x in t.items()}))
    model, params = load_hf(directory)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {default}
    assert model.config.dtype == default


def test_load_allocates_little_more_than_one_shard_on_the_host(tmp_path, monkeypatch):
    # 12 MiB, of which the embedding is 8: a shard of it is 1 MiB.
    declared = {
        "embed": Weight((4096, 512), ("vocab", "embed"), "normal", "model.embed_tokens.weight"),
        "up": Weight((2, 512, 1024), ("layers", "embed", "mlp"), "normal", "up.{i}.weight", 1),
    }
    rng = np.random.default_rng(0)
    params = {k: rng.standard_normal(w.shape, np.float32) for k, w in declared.items()}
    write_checkpoint(tmp_path, declared, params, {})
    monkeypatch.setattr("scope_jax.models.safetensors_files.CHUNK_BYTES", 2**16)
    # What is traced is the host's memory; XLA's is not. On the CPU a device array may share an
    # aligned host buffer, which then counts as the device's.
    put, placed, shared, traced = jax.device_put, [], [], []

    def put_copy(x, device):
        placed.append(x.nbytes)
        array = put(x, device)
        shared.append(x.nbytes * (array.unsafe_buffer_pointer() == x.ctypes.data))
        return array

    monkeypatch.setattr(jax, "device_put", put_copy)
    tensors = Tensors(tmp_path)
    chunks = tensors.chunks

    def counting(*args):
        for piece in chunks(*args):
            traced.append(tracemalloc.get_traced_memory()[0] - sum(shared))
            yield piece

    monkeypatch.setattr(tensors, "chunks", counting)
    tracemalloc.start()
    got = load_tree(declared, tensors, mesh=make_mesh(data=1, fsdp=2, model=4))
    tracemalloc.stop()
    assert_same_bits(got, params)
    assert sum(placed) == 12 * 2**20 and len(placed) == 16
    assert 2**20 <= max(traced) <= 1.3 * 2**20


# --- What is wrong with a directory ---------------------------------------------------------------


def refusal(path):
    """Returns the one line that `load_hf` refuses a path with."""
    with pytest.raises(InputError) as caught:
        load_hf(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_directory_is_named(tmp_path):
    missing = tmp_path / "missing"
    assert refusal(missing) == f"model directory {missing} does not exist"
    assert refusal("../no_such_model") == "model directory ../no_such_model does not exist"
    assert "no model directory given" in refusal("")


def test_directory_without_a_config_is_named(tmp_path):
    assert f"{tmp_path / 'config.json'} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b'{"model_type": "llama",', b"\xff\xfe\x00", b"[1, 2]"])
def test_broken_config_is_named(content, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    (directory / "config.json").write_bytes(content)
    assert refusal(directory).startswith(f"{directory / 'config.json'} ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rotary positions per layer type",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "windows per layer"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias of a qwen3 model"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window attention"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
            "windows per layer",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope scaling 'linear'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2.0}},
            "rope scaling 'yarn'",
        ),
        ({"use_sliding_window": True}, "sliding window attention"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True, "mlp_bias": True}, "mlp_bias, attention_bias of a llama model"),
    ],
)
def test_what_the_forward_does_not_compute_is_refused(changes, reason, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    change_config(directory, **changes)
    assert reason in refusal(directory)


def test_missing_size_is_named(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    del config["hidden_size"]
    (directory / "config.json").write_text(json.dumps(config))
    assert "key 'hidden_size' is missing" in refusal(directory)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_attention_heads": None}, "key 'num_attention_heads' must be a positive whole"),
        ({"num_attention_heads": "4"}, "number, not '4'"),
        ({"num_attention_heads": True}, "number, not True"),
        ({"hidden_size": -32}, "key 'hidden_size' must be a positive whole number, not -32"),
        ({"hidden_size": 32.0}, "number, not 32.0"),
        ({"num_hidden_layers": 0}, "number, not 0"),
        ({"vocab_size": [64]}, "number, not [64]"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"head_dim": None, "hidden_size": 34}, "hidden_size 34 does not divide by"),
        ({"rms_norm_eps": None}, "key 'rms_norm_eps' must be a positive number, not None"),
        ({"rms_norm_eps": float("nan")}, "number, not nan"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "'rope_theta' must be a positive number"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "number, not inf"),
        ({"rope_parameters": 3}, "key 'rope_parameters' must be an object, not 3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "key 'factor' is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor 4.0 is not below high_freq_factor 4.0",
        ),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' must be true or false, not 'yes'"),
        ({"model_type": "mistral", "sliding_window": 0}, "'sliding_window' must be a positive"),
        ({"max_position_embeddings": "128"}, "key 'max_position_embeddings' must be"),
    ],
)
def test_impossible_value_is_named_with_its_file(changes, reason, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    change_config(directory, **changes)
    line = refusal(directory)
    assert line.startswith(f"{directory / 'config.json'}: ") and reason in line


def test_all_tensor_faults_come_in_one_message(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")

    def damage(tensors):
        del tensors["model.embed_tokens.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(32, np.int8)

    change_tensors(directory, damage)
    assert refusal(directory).endswith(
        "2 missing: model.embed_tokens.weight, model.layers.1.mlp.up_proj.weight; "
        "1 unexpected: model.layers.0.self_attn.q_proj.bias; "
        "1 mis-shaped: model.norm.weight (31,) instead of (32,); "
        "1 in a number format other than F64, F32, F16, BF16, F8_E4M3, F8_E5M2: "
        "model.layers.0.input_layernorm.weight is I8"
    )


def test_untied_model_without_a_head_is_refused(tmp_path):
    directory = copy_golden("qwen2", tmp_path / "model")
    change_tensors(directory, lambda t: t.pop("lm_head.weight"))
    assert "1 missing: lm_head.weight" in refusal(directory)


@pytest.mark.parametrize("keep", [0, 4, 200, 5000, -1])
def test_truncated_weights_are_refused(keep, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:keep])
    assert refusal(directory).startswith(
        f"{directory / 'model.safetensors'} is not a whole safetensors file"
    )


def test_index_of_an_absent_shard_is_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    names = load_file(directory / "model.safetensors")
    weight_map = {
        **dict.fromkeys(names, "model.safetensors"),
        "model.norm.weight": "gone.safetensors",
    }
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(directory) == f"{index} names gone.safetensors, which is missing"


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", "7"])
def test_damaged_index_is_refused(content, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    index = directory / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(directory).startswith(f"{index} is damaged")


def test_pickled_weights_are_refused_unopened(tmp_path):
    shutil.copy(GOLDENS / "llama" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert (
        refusal(tmp_path)
        == f"{tmp_path} holds no *.safetensors file (pickled checkpoints are refused); convert "
        "pytorch_model.bin where you trust it: "
        "transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )


def with_header(directory, change):
    """Rewrites the header of a golden copy, not its data."""
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: b"{", "its header is not JSON"),
        (lambda _: b"\xff\xff", "its header is not JSON"),
        (lambda _: b"[1]", "damaged header"),
        (lambda _: b'{"a": 3}', "damaged header"),
        (lambda h: h[NORM].pop("shape"), None),
        (lambda h: h[NORM].update(shape=[-32]), f"{NORM} has shape [-32]"),
        (lambda h: h[NORM].update(shape=[33]), "does not take 128 B"),
        (lambda h: h[NORM].update(shape=[32.0]), f"{NORM} has shape [32.0]"),
        (lambda h: h[NORM].update(dtype="F64"), "does not take 128 B"),
        (lambda h: h[NORM].update(data_offsets=[128, 0]), f"{NORM} has shape"),
        (lambda h: h[NORM].update(data_offsets=[10**12, 10**12 + 128]), "instead of"),
        (lambda h: h[NORM].update(data_offsets=[1, 129]), "of the data instead of"),
        (lambda h: h.pop(NORM), None),
    ],
)  # fmt: skip
def test_header_that_does_not_describe_its_file_is_refused(change, reason, tmp_path):
    directory = copy_golden("llama", tmp_path / "model")

    def damage(header):
        text = change(header)
        return text if isinstance(text, bytes) else None

    with_header(directory, damage)
    line = refusal(directory)
    assert line.startswith(f"{directory / 'model.safetensors'} is not a whole safetensors file: ")
    assert reason is None or reason in line


def test_longer_file_than_its_header_says_is_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    with open(directory / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert "is not a whole safetensors file: its header describes" in refusal(directory)


def test_index_of_a_tensor_that_its_shard_lacks_is_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    names = load_file(directory / "model.safetensors")
    weight_map = dict.fromkeys([*names, "model.extra.weight"], "model.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(directory) == (
        f"{index} names tensors that their files lack: model.extra.weight in model.safetensors"
    )


def test_index_that_points_out_of_its_directory_is_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}}))
    assert refusal(directory).startswith(f"{index} is damaged")


def test_tensor_in_two_files_without_an_index_is_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    shutil.copy(directory / "a.safetensors", directory / "b.safetensors")
    line = refusal(directory)
    assert line.startswith(f"{directory / 'b.safetensors'} and a.safetensors both hold ")


@pytest.mark.parametrize("dtype", ["float31", "int8"])
def test_impossible_dtype_of_the_load_is_named(dtype):
    with pytest.raises(InputError, match=f"dtype '{dtype}' is no floating-point type"):
        load_hf(GOLDENS / "llama", dtype=dtype)


def test_file_that_shrinks_between_header_and_data_is_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    declared = {"norm": Weight((32,), (None,), "ones", NORM)}
    tensors = Tensors(directory)
    os.truncate(directory / "model.safetensors", 4000)
    with pytest.raises(InputError, match="is not a whole safetensors file: it shrank"):
        load_tree(declared, tensors, dtype="float32", ignore=("model.",))


# --- Names that are no directories ----------------------------------------------------------------


def test_model_that_the_package_ships_loads_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = load_hf("scope_jax/tasks/worksheet_models/policy")
    assert model.config.num_layers == 2


def test_hub_id_is_fetched_without_pickles(monkeypatch):
    def fetch(name, *, allow_patterns):
        assert name == "some/model"
        assert allow_patterns == ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return str(GOLDENS / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same_bits(load_hf("some/model")[1], load_hf(GOLDENS / "llama")[1])


def test_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch):
    def fetch(*_, **__):
        raise OSError("no route to host\nand twenty more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert (
        refusal("some/model")
        == "some/model is neither a directory nor a model that can be fetched: no route to host"
    )


# --- Tokenizers -----------------------------------------------------------------------------------


def test_saved_tokenizer_loads_with_its_end_ids(tmp_path):
    save_hf(tmp_path, *load_hf(GOLDENS / "llama"), make_tokenizer(eos_token="<end>"))
    tokenizer, end_ids = load_tokenizer(tmp_path)
    assert tokenizer.encode("two one two") == [3, 2, 3]
    assert end_ids == (1,)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (1, 0)


def test_end_ids_join_those_of_the_tokenizer_and_of_both_config_files(tmp_path):
    make_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 3}')
    assert load_tokenizer(tmp_path)[1] == (1, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    assert load_tokenizer(tmp_path)[1] == (1, 2, 3)


def test_end_ids_that_are_no_numbers_are_named(tmp_path):
    make_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": ["</s>"]}')
    with pytest.raises(InputError, match="config.json: key 'eos_token_id' must hold ids"):
        load_tokenizer(tmp_path)


def test_tokenizer_beside_a_damaged_config_is_refused_in_one_line(tmp_path):
    make_tokenizer(eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "32"}')
    with pytest.raises(
        InputError, match="holds no tokenizer that can be read: .*'hidden_size'"
    ) as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_tokenizer_without_an_end_token_is_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="names no end token"):
        load_tokenizer(tmp_path)


def test_directory_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="llama holds no tokenizer") as caught:
        load_tokenizer(GOLDENS / "llama")
    assert "\n" not in str(caught.value)


def test_tokenizer_of_a_larger_vocabulary_than_the_model_is_refused(tmp_path):
    save_hf(tmp_path, *load_hf(GOLDENS / "llama"), make_tokenizer(eos_token="<end>"))
    change_config(tmp_path, vocab_size=3)
    with pytest.raises(InputError, match="ids up to 3, config.json's vocab_size is 3"):
        load_tokenizer(tmp_path)
