"""Hugging Face directories <-> params: config.json and safetensors, nothing else is ever opened (no
pickle).

The names and layouts come from the weight declarations (`Weight.hf`, `Weight.in_dims`): Hugging
Face stores a linear map as [out, in] with heads flattened, we store [in dims ..., out dims ...]
stacked over layers.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scope_jax.models.transformer import Transformer, TransformerConfig, Weight, declare
from scope_jax.records import InputError
from scope_jax.sharding import TRAINING, shardings

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not expected here

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def load_hf(path_or_hub_id, *, mesh=None, rules=None, dtype=None):
    """Loads a Llama or Qwen2 family checkpoint.

    Args:
      path_or_hub_id: a directory with config.json and *.safetensors, or a hub id (fetched by
        huggingface_hub, which transformers brings along).
      mesh: place the params on it (default: the default device).
      rules: sharding rules on that mesh (default: TRAINING).
      dtype: of the params (default: as stored). The computation runs in it too.
    Returns:
      (Transformer, params).
    Raises:
      InputError: no such directory, an unsupported architecture, or ONE message with all missing,
      unexpected and
        mis-shaped tensors.
    """
    directory = resolve(path_or_hub_id)
    config = config_from_hf(read_config(directory), directory)
    params = load_tree(declare(config), Tensors(directory), mesh=mesh, rules=rules, dtype=dtype)
    return Transformer(dataclasses.replace(config, dtype=str(params["embed"].dtype))), params


def resolve(path_or_hub_id) -> pathlib.Path:
    """Returns a checkpoint's directory; fetches it only if it looks like a hub id, not a path."""
    text = str(path_or_hub_id)
    if not text:
        raise InputError(
            "no model directory given: set --config.model.path=DIR (and prm.path, teacher.path)"
        )
    directory = pathlib.Path(text)
    if not directory.is_dir() and text.startswith("scope_jax/"):
        directory = (
            pathlib.Path(__file__).parents[2] / text
        )  # what the package ships, from any working directory
    if directory.is_dir():
        return directory
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise InputError(f"model directory {text} does not exist")
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(
            snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except Exception as error:  # the hub client raises many kinds; offline is the usual one
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{text} is neither a directory nor a model that can be fetched: {reason}"
        ) from error


def read_config(directory: pathlib.Path, name: str = "config.json") -> dict[str, Any]:
    """Returns a JSON file of a checkpoint directory."""
    file = directory / name
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{file} is missing: {directory} is not a Hugging Face model directory"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no JSON object")
    return config


def config_from_hf(hf: Mapping[str, Any], source: Any = "config.json") -> TransformerConfig:
    """Translates config.json; refuses what this forward does not compute instead of ignoring it."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{source}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    blocks = [hf.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    rope = {**blocks[0], **blocks[1]}
    scaling = {block.get(k) for block in blocks for k in ("type", "rope_type")} - {None, "default"}
    refused = {
        f"rope scaling {', '.join(sorted(map(repr, scaling)))}": bool(scaling),
        "sliding window attention": bool(hf.get("use_sliding_window")),
        f"activation {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(hf.get("mlp_bias")),
        "attention_bias of a llama model": family == "llama" and bool(hf.get("attention_bias")),
    }
    if found := [name for name, present in refused.items() if present]:
        raise InputError(f"{source}: not supported: {', '.join(found)}")
    try:
        heads = hf["num_attention_heads"]
        return TransformerConfig(
            vocab_size=hf["vocab_size"],
            embed_dim=hf["hidden_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            mlp_dim=hf["intermediate_size"],
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            qkv_bias=family == "qwen2",
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position=int(hf.get("max_position_embeddings", 4096)),
        )
    except KeyError as error:
        raise InputError(f"{source}: key {error} is missing") from None


def config_to_hf(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json content that `config_from_hf` and transformers read back as `c`."""
    family = "qwen2" if c.qkv_bias else "llama"
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_position,
    }


def load_tokenizer(path_or_hub_id):
    """Loads a checkpoint's tokenizer.

    Returns:
      (transformers tokenizer, end token ids: its own and those that config.json and
      generation_config.json name).
    Raises:
      InputError: the directory has none, or it has no end token.
    """
    from transformers import AutoTokenizer  # takes seconds; only commands that need text pay

    directory = resolve(path_or_hub_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory} holds no tokenizer: {str(error).splitlines()[0]}") from error
    ends: list[Any] = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            named = read_config(directory, name).get("eos_token_id")
            ends += named if isinstance(named, list) else [named]
    if tokenizer.eos_token_id is None:
        raise InputError(f"{directory}: the tokenizer names no end token (eos_token)")
    return tokenizer, tuple(sorted({int(i) for i in ends if i is not None}))


class Tensors:
    """Random access by name to the tensors of one or more safetensors files of a directory."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            try:
                shard_names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # or not UTF-8
                raise InputError(f"{index} is damaged: {error!r}") from None
            files = [directory / name for name in shard_names]
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise InputError(
                f"{directory} holds no *.safetensors file (pickled checkpoints are refused)"
            )
        self._handles = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except FileNotFoundError:
                raise InputError(f"{index} names {file.name}, which is missing") from None
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is not a whole safetensors file: {error}") from None
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def names(self) -> set[str]:
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        stored = self._handles[name].get_slice(name).get_dtype()
        names = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
        if stored not in names:
            raise InputError(
                f"{self.directory}: {name} is stored as {stored}; F32, F16 and BF16 are read"
            )
        return np.dtype(names[stored])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)


def hf_tensors(weight: Weight) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the (name, shape) of the Hugging Face tensors that make up one declared weight."""
    shape = weight.shape[1:] if weight.stacked else weight.shape
    if weight.in_dims:
        shape = (math.prod(shape[weight.in_dims :]), math.prod(shape[: weight.in_dims]))
    elif len(shape) == 2 and weight.stacked:  # a bias per head
        shape = (math.prod(shape),)
    for i in range(weight.shape[0] if weight.stacked else 1):
        yield weight.hf.format(i=i), shape


def load_tree(
    declared,
    tensors: Tensors,
    *,
    mesh=None,
    rules=None,
    dtype=None,
    ignore=("lm_head.weight", "rotary_emb"),
):
    """Returns the params of a tree of declarations.

    Args:
      declared: tree of `Weight`.
      tensors: the checkpoint.
      dtype: of the params (default: as the embeddings are stored).
      ignore: parts of the names of tensors that may be there unread (a tied head's copy, old rotary
        buffers).
    Raises:
      InputError: one message with every missing, unexpected and mis-shaped tensor.
    """
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    expected = {
        n: s for w in jax.tree.leaves(declared, is_leaf=is_weight) for n, s in hf_tensors(w)
    }
    missing = sorted(set(expected) - tensors.names())
    unexpected = sorted(
        n for n in tensors.names() - set(expected) if not any(part in n for part in ignore)
    )
    shapes = {n: tensors.shape(n) for n in set(expected) & tensors.names()}
    wrong = sorted(
        f"{n} {s} instead of {expected[n]}" for n, s in shapes.items() if s != expected[n]
    )
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": wrong}
    if any(problems.values()):
        text = "; ".join(f"{len(v)} {k}: {', '.join(v)}" for k, v in problems.items() if v)
        raise InputError(f"{tensors.directory}: tensors do not fit config.json: {text}")
    places = None if mesh is None else shardings(declared, mesh, rules or TRAINING)
    dtype = np.dtype(dtype or tensors.dtype("model.embed_tokens.weight"))

    def load(weight: Weight, place):
        shape = weight.shape[1:] if weight.stacked else weight.shape
        out = np.empty(weight.shape, dtype)
        for i, (name, _) in enumerate(hf_tensors(weight)):
            tensor = tensors[name].T if weight.in_dims else tensors[name]
            out[i if weight.stacked else ...] = tensor.reshape(shape).astype(dtype)
        return jax.device_put(out, place)

    places = jax.tree.map(lambda _: None, declared, is_leaf=is_weight) if places is None else places
    return jax.tree.map(load, declared, places, is_leaf=is_weight)


def to_hf_tensors(declared, params) -> dict[str, np.ndarray]:
    """Returns a params tree as {Hugging Face name: array}, in the params' dtype."""
    tensors = {}

    def store(weight: Weight, value):
        value = np.asarray(jax.device_get(value))
        for i, (name, shape) in enumerate(hf_tensors(weight)):
            layer = value[i] if weight.stacked else value
            flat = layer.reshape(shape[::-1]).T if weight.in_dims else layer.reshape(shape)
            tensors[name] = np.ascontiguousarray(flat)

    jax.tree.map(store, declared, params, is_leaf=lambda x: isinstance(x, Weight))
    return tensors


def save_hf(path, model: Transformer, params, tokenizer=None) -> None:
    """Writes a directory that `load_hf` and transformers load: safetensors, config.json and the
    tokenizer's files.

    Args:
      path: directory, made if it is not there.
      model, params: as from `load_hf`; stored in the params' dtype.
      tokenizer: a transformers tokenizer.
    """
    write_checkpoint(
        path, to_hf_tensors(declare(model.config), params), config_to_hf(model.config), tokenizer
    )


def write_checkpoint(
    path, tensors: dict[str, np.ndarray], config: dict[str, Any], tokenizer=None
) -> None:
    """Writes tensors, config.json and tokenizer files; the weights go last and by rename, so none
    are half-written.
    """
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        config = {
            **config,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    dtype = str(next(iter(tensors.values())).dtype)
    (directory / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
    partial = directory / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")
