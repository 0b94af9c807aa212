"""Tests of Hugging Face directories: parity with PyTorch, round trips, one line on what is wrong.

tests/goldens/make_hf_goldens.py made the checkpoints and the outputs that these tests read.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scope_jax.models.hf import config_from_hf, config_to_hf, load_hf, load_tokenizer, save_hf
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import Transformer
from scope_jax.records import InputError
from scope_jax.sampling import generate
from scope_jax.sharding import Rules, make_mesh

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = ("llama", "qwen2")


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


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation_equals_pytorch(family):
    golden = np.load(GOLDENS / family / "golden.npz")
    model, params = load_hf(GOLDENS / family)
    rollouts = generate(
        model, params, golden["ids"], golden["mask"], jax.random.key(0), group_size=1,
        max_new_tokens=golden["greedy"].shape[1], eos_ids=(), temperature=0.0,
    )  # fmt: skip
    np.testing.assert_array_equal(rollouts.completion_ids, golden["greedy"])


def test_golden_families_differ_where_the_forward_does():
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
    for c in (config, other, dataclasses.replace(other, tie_embeddings=not config.tie_embeddings)):
        assert config_from_hf(json.loads(json.dumps(config_to_hf(c)))) == c


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
    head = {} if family == "llama" else {"unembed": 4}
    assert parts == {"embed": 4, "layers": split, "final_norm": 1, **head}
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(placed))


def test_rules_of_the_load_place_the_arrays():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    _, params = load_hf(GOLDENS / "llama", mesh=mesh, rules=Rules(embed=None))
    assert params["embed"].addressable_shards[0].data.shape == (64 // 2, 32)
    assert params["layers"]["gate"].addressable_shards[0].data.shape == (2, 32, 48 // 2)


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
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, qwen2"),
        ({"model_type": None}, "model_type None is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope scaling 'llama3'",
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


def test_all_tensor_faults_come_in_one_message(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")

    def damage(tensors):
        del tensors["model.embed_tokens.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)

    change_tensors(directory, damage)
    assert refusal(directory).endswith(
        "2 missing: model.embed_tokens.weight, model.layers.1.mlp.up_proj.weight; "
        "1 unexpected: model.layers.0.self_attn.q_proj.bias; "
        "1 mis-shaped: model.norm.weight (31,) instead of (32,)"
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
        == f"{tmp_path} holds no *.safetensors file (pickled checkpoints are refused)"
    )


def test_weights_of_another_number_format_are_refused(tmp_path):
    directory = copy_golden("llama", tmp_path / "model")
    name = "model.embed_tokens.weight"
    change_tensors(directory, lambda t: t.update({name: t[name].astype(np.int8)}))
    assert f"{name} is stored as I8; F32, F16 and BF16 are read" in refusal(directory)


# --- Names that are no directories ----------------------------------------------------------------


def test_model_that_the_package_ships_loads_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = load_hf("scope_jax/tasks/worksheet_models/policy")
    assert model.config.num_layers == 2


def test_hub_id_is_fetched_without_pickles(monkeypatch):
    def fetch(name, *, allow_patterns):
        assert name == "some/model"
        assert allow_patterns == ["*.json", "*.safetensors", "*.jinja"]
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


def test_tokenizer_without_an_end_token_is_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="names no end token"):
        load_tokenizer(tmp_path)


def test_directory_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="llama holds no tokenizer") as caught:
        load_tokenizer(GOLDENS / "llama")
    assert "\n" not in str(caught.value)
