"""Hugging Face directories <-> params: config.json and safetensors, nothing else is ever opened (no
pickle).

The names and layouts come from the weight declarations (`Weight.hf`, `Weight.in_dims`): Hugging
Face stores a linear map as [out, in] with heads flattened, we store [in dims ..., out dims ...]
stacked over layers.
"""

import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scope_jax.models.lora import merge
from scope_jax.models.safetensors_files import (
    CHUNK_BYTES,
    FLOATS,
    Output,
    Tensors,
    write_file,
    write_files,
)
from scope_jax.models.transformer import (
    Llama3Rope,
    Transformer,
    TransformerConfig,
    Weight,
    declare,
)
from scope_jax.records import InputError
from scope_jax.sharding import TRAINING, shardings

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not expected here

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers takes for keys that a family's config.json may leave out.
_LEFT_OUT = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip


def load_hf(path_or_hub_id, *, mesh=None, rules=None, dtype=None):
    """Loads a Llama, Mistral, Qwen2 or Qwen3 family checkpoint, in bounded host memory.

    Args:
      path_or_hub_id: a directory with config.json and *.safetensors, or a hub id (fetched by
        huggingface_hub, which transformers brings along).
      mesh: place the params on it (default: the default device).
      rules: sharding rules on that mesh (default: TRAINING).
      dtype: of the params (default: as the embeddings are stored; float32 for F64, bfloat16 for
        8-bit floats). The computation runs in it too.
    Returns:
      (Transformer, params).
    Raises:
      InputError: no such directory, an unsupported architecture, or ONE message with all missing,
        unexpected, mis-shaped and unreadable tensors.
    """
    directory = resolve(path_or_hub_id)
    config = config_from_hf(read_config(directory), directory / "config.json")
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
            snapshot_download(
                text,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
            )
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
    """Translates config.json; refuses what this forward does not compute instead of ignoring it.

    Args:
      hf: content of config.json.
      source: names the file in errors.
    Raises:
      InputError: an unknown architecture or feature, or a key with an impossible value.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{source}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    hf = {**_LEFT_OUT[family], **hf}
    _refuse_unsupported(hf, family, source)
    heads, embed_dim = (
        _positive(hf, key, source) for key in ("num_attention_heads", "hidden_size")
    )
    kv_heads = heads
    if hf["num_key_value_heads"] is not None:
        kv_heads = _positive(hf, "num_key_value_heads", source)
    if heads % kv_heads:
        raise InputError(
            f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    if hf.get("head_dim") is not None:
        head_dim = _positive(hf, "head_dim", source)
    elif embed_dim % heads == 0:
        head_dim = embed_dim // heads
    else:
        raise InputError(
            f"{source}: hidden_size {embed_dim} does not divide by num_attention_heads {heads}, "
            "and head_dim is not given"
        )
    if head_dim % 2:
        raise InputError(f"{source}: head_dim {head_dim} is odd: rotary positions turn pairs")
    tied, window = hf.get("tie_word_embeddings", False), None
    if not isinstance(tied, bool):
        raise InputError(f"{source}: key 'tie_word_embeddings' must be true or false, not {tied!r}")
    if family == "mistral" and hf["sliding_window"] is not None:
        window = _positive(hf, "sliding_window", source)
    rope = _rope(hf)
    return TransformerConfig(
        vocab_size=_positive(hf, "vocab_size", source),
        embed_dim=embed_dim,
        num_layers=_positive(hf, "num_hidden_layers", source),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=_positive(hf, "intermediate_size", source),
        rope_theta=_positive(rope, "rope_theta", source, float),
        rms_norm_eps=_positive({"rms_norm_eps": 1e-6, **hf}, "rms_norm_eps", source, float),
        rope_scaling=_llama3_rope(rope, source) if "llama3" in _rope_types(hf) else None,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
        tie_embeddings=tied,
        max_position=_positive(hf, "max_position_embeddings", source),
    )


def _positive(hf: Mapping[str, Any], key: str, source, kind: type = int):
    """Returns a positive number of config.json."""
    if key not in hf:
        raise InputError(f"{source}: key {key!r} is missing")
    value = hf[key]
    if type(value) not in {int, kind} or not 0 < value < math.inf:
        whole = "whole " if kind is int else ""
        raise InputError(f"{source}: key {key!r} must be a positive {whole}number, not {value!r}")
    return kind(value)


def _rope_blocks(hf: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what the old and the new spelling (transformers 5) say of rotary positions."""
    blocks = [hf.get(key) for key in ("rope_scaling", "rope_parameters")]
    return [block for block in blocks if isinstance(block, dict)]


def _rope_types(hf: Mapping[str, Any]) -> set[str]:
    named = {str(b[k]) for b in _rope_blocks(hf) for k in ("type", "rope_type") if b.get(k)}
    return named - {"default"}


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of rotary positions in one dict, absent ones with transformers' defaults."""
    rope: dict[str, Any] = {
        "rope_theta": 10000.0,
        "original_max_position_embeddings": hf["max_position_embeddings"],
    }
    for block in (hf, *_rope_blocks(hf)):
        rope |= {key: value for key, value in block.items() if value is not None}
    return rope


def _llama3_rope(rope: Mapping[str, Any], source) -> Llama3Rope:
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (_positive(rope, key, source, float) for key in factors)
    if low >= high:
        raise InputError(f"{source}: low_freq_factor {low} is not below high_freq_factor {high}")
    original = _positive(rope, "original_max_position_embeddings", source)
    return Llama3Rope(factor, low, high, original)


def _refuse_unsupported(hf: Mapping[str, Any], family: str, source) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key) or {}, dict):
            raise InputError(f"{source}: key {key!r} must be an object, not {hf[key]!r}")
    types = _rope_types(hf)
    unknown = sorted(types - {"llama3"})
    windowed = family == "mistral" and hf["sliding_window"] is not None
    layers = hf.get("layer_types") or []
    same = ["sliding_attention" if windowed else "full_attention"] * len(layers)
    refused = {
        f"rope scaling {', '.join(map(repr, unknown))}": bool(unknown),
        "rotary positions per layer type": any(
            isinstance(value, dict) for block in _rope_blocks(hf) for value in block.values()
        ),
        "partial_rotary_factor": _rope(hf).get("partial_rotary_factor", 1.0) != 1.0,
        "sliding window attention (use_sliding_window)": bool(hf.get("use_sliding_window")),
        "windows per layer (layer_types)": layers != same,
        f"activation {hf.get('hidden_act')!r}": hf.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(hf.get("mlp_bias")),
        f"attention_bias of a {family} model": family != "qwen2" and bool(hf.get("attention_bias")),
        "quantization_config": bool(hf.get("quantization_config")),
    }
    if found := [name for name, present in refused.items() if present]:
        raise InputError(f"{source}: not supported: {', '.join(found)}")


def config_to_hf(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json content that `config_from_hf` and transformers read back as `c`.

    The family follows from the features: norms of queries and keys make a Qwen3, biases a Qwen2, a
    sliding window a Mistral, and everything else is a Llama (so a Mistral without a window, a Llama
    to the last operation, is saved as one).

    Raises:
      InputError: features that no family has together.
    """
    features = {"qwen3": c.qk_norm, "qwen2": c.qkv_bias, "mistral": c.sliding_window is not None}
    found = [name for name, present in features.items() if present] or ["llama"]
    if len(found) > 1:
        raise InputError(f"no model_type has the features of {' and '.join(found)} together")
    extra: dict[str, Any] = {"sliding_window": c.sliding_window} if found == ["mistral"] else {}
    if c.rope_scaling is not None:  # the old spelling: transformers 4 and 5 read it
        extra["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_position,
        }
    return {
        "architectures": [FAMILIES[found[0]]],
        "model_type": found[0],
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
        **extra,
    }


def load_tokenizer(path_or_hub_id):
    """Loads a checkpoint's tokenizer.

    Returns:
      (transformers tokenizer, end token ids: its own and those that config.json and
      generation_config.json name).
    Raises:
      InputError: the directory has none, it has no end token, or it is of a larger vocabulary than
        the model.
    """
    from transformers import AutoTokenizer  # takes seconds; only commands that need text pay

    directory = resolve(path_or_hub_id)
    ends: list[Any] = []
    vocab_size = None
    for name in ("config.json", "generation_config.json"):
        if (directory / name).exists():
            told = read_config(directory, name)
            named, vocab_size = told.get("eos_token_id"), vocab_size or told.get("vocab_size")
            named = named if isinstance(named, list) else [named]
            if any(type(i) not in (int, type(None)) for i in named):
                raise InputError(
                    f"{directory / name}: key 'eos_token_id' must hold ids, not {named}"
                )
            ends += named
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; it also checks config.json
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{directory} holds no tokenizer that can be read: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{directory}: the tokenizer names no end token (eos_token)")
    last = max(tokenizer.get_vocab().values())  # an id past the end would read another embedding
    if isinstance(vocab_size, int) and last >= vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {last}, config.json's vocab_size is "
            f"{vocab_size}: they are not of one model"
        )
    return tokenizer, tuple(sorted({i for i in [tokenizer.eos_token_id, *ends] if i is not None}))


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

    One shard of one weight at a time is in a host buffer, filled in pieces of a few MiB, so the
    peak of the host's memory stays near what the devices' copies leave there. A weight whose
    stored columns are split is read once for each of their shards.

    Args:
      declared: tree of `Weight`.
      tensors: the checkpoint.
      mesh, rules: place the params on a mesh (default: uncommitted on the default device).
      dtype: of the params (default: as in `load_hf`).
      ignore: parts of the names of tensors that may be there unread (a tied head's copy, old rotary
        buffers).
    Raises:
      InputError: one message with every missing, unexpected, mis-shaped and unreadable tensor.
    """
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    leaves, tree = jax.tree.flatten(declared, is_leaf=is_weight)
    _check_tensors(leaves, tensors, ignore)
    if dtype is None:
        stored = tensors.dtype("model.embed_tokens.weight")
        dtype = {8: np.float32, 1: jnp.bfloat16}.get(stored.itemsize, stored)
    dtype = _float_dtype(dtype)
    places = [None] * len(leaves)
    if mesh is not None:
        places = tree.flatten_up_to(shardings(declared, mesh, rules or TRAINING))
    return tree.unflatten(
        [_load_weight(w, tensors, place, dtype) for w, place in zip(leaves, places, strict=True)]
    )


def _float_dtype(dtype) -> np.dtype:
    try:
        found = np.dtype(jax.dtypes.canonicalize_dtype(dtype))  # float64 only where jax has it
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype {dtype!r} is no floating-point type; try float32 or bfloat16")
    return found


def _check_tensors(leaves: list[Weight], tensors: Tensors, ignore) -> None:
    """Raises ONE InputError for all tensors that do not fit the declarations."""
    expected = {name: shape for weight in leaves for name, shape in hf_tensors(weight)}
    names = tensors.names()
    both = sorted(set(expected) & names)
    problems = {
        "missing": sorted(set(expected) - names),
        "unexpected": sorted(
            n for n in names - set(expected) if not any(part in n for part in ignore)
        ),
        "mis-shaped": [
            f"{n} {tensors.shape(n)} instead of {expected[n]}"
            for n in both
            if tensors.shape(n) != expected[n]
        ],
        f"in a number format other than {', '.join(FLOATS)}": [
            f"{n} is {tensors.format(n)}" for n in both if tensors.format(n) not in FLOATS
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(v)} {k}: {', '.join(v)}" for k, v in problems.items() if v)
        raise InputError(f"{tensors.directory}: tensors do not fit config.json: {text}")


def _load_weight(weight: Weight, tensors: Tensors, place: Any, dtype) -> jax.Array:
    """Reads one weight onto its devices, shard by shard."""
    if place is None:
        whole = tuple((0, size) for size in weight.shape)
        array = jax.device_put(_read_part(weight, tensors, whole, dtype)).block_until_ready()
        gc.collect(0)  # JAX holds on to a copied host buffer until Python collects
        return array
    devices: dict[tuple, list[Any]] = {}  # of each distinct part
    for device, index in place.addressable_devices_indices_map(weight.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, weight.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        part = _read_part(weight, tensors, bounds, dtype)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in holders])
        del part
        gc.collect(0)  # as above: this buffer goes before the next one is allocated
    return jax.make_array_from_single_device_arrays(weight.shape, place, arrays)


def _read_part(weight: Weight, tensors: Tensors, bounds, dtype) -> np.ndarray:
    """Returns the part of a weight within (start, stop) bounds per dimension."""
    out = np.empty([stop - start for start, stop in bounds], dtype)
    names = [name for name, _ in hf_tensors(weight)]
    first_layer, last_layer = bounds[0] if weight.stacked else (0, 1)
    inner, shape = bounds[weight.stacked :], weight.shape[weight.stacked :]
    # Stored order: the dims that a linear map writes, then those that it sums over.
    order = [*range(weight.in_dims, len(shape)), *range(weight.in_dims)]
    (first, last), *others = [inner[axis] for axis in order]
    row_shape = [shape[axis] for axis in order[1:]]
    row_part = tuple(slice(start, stop) for start, stop in others)
    for layer in range(first_layer, last_layer):
        target = (out[layer - first_layer] if weight.stacked else out).transpose(order)
        for row, rows in tensors.chunks(names[layer], first, last, math.prod(row_shape)):
            piece = rows.reshape(-1, *row_shape)[(slice(None), *row_part)]
            target[row - first : row - first + len(piece)] = piece
    return out


def save_hf(path, model: Transformer, params, tokenizer=None, *, max_shard_bytes=5_000_000_000):
    """Writes a directory that `load_hf` and transformers load: safetensors, config.json and the
    tokenizer's files.

    Args:
      path: directory, made if it is not there.
      model, params: as from `load_hf`; stored in the params' dtype, LoRA merged into them.
      tokenizer: a transformers tokenizer.
      max_shard_bytes: a larger model is split into several files.
    """
    model, params = merge(model, params)
    write_checkpoint(
        path, declare(model.config), params, config_to_hf(model.config), tokenizer,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip


def save_adapter(path, model: Transformer, adapters, base: str):
    """Writes a directory that PEFT loads onto the base model: adapter_model.safetensors and
    adapter_config.json.

    Layout: https://huggingface.co/docs/peft/developer_guides/checkpoint

    Args:
      path: directory, made if it is not there.
      model: with config.lora.
      adapters: params["lora"]; stored in their dtype.
      base: path or hub id of the base model.
    """
    lora = model.config.lora
    if lora is None:
        raise InputError("the model has no config.lora, so there is no adapter to write")
    declared = declare(model.config)["lora"]
    leaves, tree = jax.tree.flatten(declared, is_leaf=lambda x: isinstance(x, Weight))
    values = tree.flatten_up_to(adapters)
    outputs = [o for w, v in zip(leaves, values, strict=True) for o in _outputs(w, v)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        # "..self_attn.q_proj.lora_A.weight": PEFT takes all modules whose names end so
        "target_modules": [declared[name]["a"].hf.split(".")[-3] for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,  # stored [out, in]
        "use_rslora": False,  # the scale is alpha / r
        "inference_mode": True,
    }
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    for name, write in (
        ("adapter_model.safetensors", lambda file: write_file(file, outputs)),
        ("adapter_config.json", lambda f: f.write_text(json.dumps(config, indent=2) + "\n")),
    ):
        partial = directory / f"{name}.partial"
        write(partial)
        partial.rename(directory / name)


def write_checkpoint(
    path,
    declared,
    params,
    config: dict[str, Any],
    tokenizer=None,
    *,
    max_shard_bytes=5_000_000_000,
):
    """Writes tokenizer files, weights and config.json, in this order; no file is half-written under
    its own name, and shards of an earlier save are removed.

    The weights leave the devices one piece of one layer at a time.

    Args:
      path: directory, made if it is not there.
      declared, params: tree of `Weight`, and the same tree of arrays.
      config: content of config.json; end and padding ids that it lacks are the tokenizer's.
      tokenizer: a transformers tokenizer.
      max_shard_bytes: a larger model is split into several files.
    Raises:
      InputError: params that do not have the declared shapes, or a dtype that cannot be stored.
    """
    leaves, tree = jax.tree.flatten(declared, is_leaf=lambda x: isinstance(x, Weight))
    values = tree.flatten_up_to(params)
    for weight, value in zip(leaves, values, strict=True):
        if value.shape != weight.shape:
            raise InputError(f"{weight.hf} has shape {value.shape} instead of {weight.shape}")
    outputs = [o for w, v in zip(leaves, values, strict=True) for o in _outputs(w, v)]
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = {**ids, **config}
    dtype = str(values[0].dtype)  # of the embeddings: the first key of every tree
    write_files(directory, outputs, max_shard_bytes)
    partial = directory / "config.json.partial"
    partial.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
    partial.rename(directory / "config.json")


def _outputs(weight: Weight, value) -> Iterator[Output]:
    """Yields the tensors of one weight; a layer leaves the devices when it is written."""

    def pieces(layer: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        whole = _fetch(value, layer if weight.stacked else None)
        if not weight.in_dims:
            yield whole
            return
        stored = whole.reshape(shape[::-1]).T
        row_bytes = shape[1] * stored.dtype.itemsize
        step = max(1, CHUNK_BYTES // row_bytes)  # no second copy of all rows
        for start in range(0, shape[0], step):
            yield stored[start : start + step]

    for layer, (name, shape) in enumerate(hf_tensors(weight)):
        dtype = np.dtype(value.dtype)
        yield Output(name, shape, dtype, functools.partial(pieces, layer, shape))


def _fetch(value, layer: int | None) -> np.ndarray:
    """Returns one layer of a stacked array, or (None) a whole array, on the host.

    Each device slices its own shard: a slice of the sharded array could gather all of it on every
    device, and `np.asarray` of a param keeps a host copy for as long as the param lives.
    """
    if isinstance(value, np.ndarray):
        return value if layer is None else value[layer]
    out = np.empty(value.shape if layer is None else value.shape[1:], value.dtype)
    for shard in value.addressable_shards:
        start, stop, _ = shard.index[0].indices(value.shape[0])
        if shard.replica_id or (layer is not None and not start <= layer < stop):
            continue
        at, count = (0, stop - start) if layer is None else (layer - start, 1)
        at = jax.device_put(np.int32(at), shard.device)
        local = np.asarray(jax.lax.dynamic_slice_in_dim(shard.data, at, count))
        if layer is None:
            out[shard.index] = local
        else:
            out[shard.index[1:]] = local[0]
    return out
