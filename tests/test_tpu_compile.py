"""The decode loop compiled for TPUs that this machine has not: what HBM holds, what chips exchange.

A small model with the proportions of experiments/compile_decode.py.
"""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from scope_jax.hlo import big_copies, collectives, largest, parse
from scope_jax.models.transformer import Transformer, TransformerConfig, Weight, declare
from scope_jax.programs import decode_programs, memory
from scope_jax.records import TrainBatch
from scope_jax.sharding import TRAINING, spec
from scope_jax.update import completion_logps

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "libtpu is absent, so nothing can be compiled for a TPU: pip install 'scope_jax[aot]'",
        allow_module_level=True,
    )

CONFIG = TransformerConfig(
    vocab_size=4096, embed_dim=512, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=128,
    mlp_dim=2048, qkv_bias=True, dtype="bfloat16",
)  # fmt: skip
SIZES = {"fsdp": 2, "model": 4}
WORK = {"prompts": 8, "group": 8, "width": 256, "columns": 1024}
ONE_LAYER = 64 // 2 * 4 // 4 * 1024 * 128 * 2  # bytes of a layer's keys on a chip
SMALLEST_MATRIX = 512 * 4 // 4 * 128 * 2  # bytes of a layer's key projection on a chip


@pytest.fixture(scope="module")
def tool():
    path = pathlib.Path(__file__).parents[1] / "experiments" / "compile_decode.py"
    spec = importlib.util.spec_from_file_location("compile_decode", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_segment(tool, topology, config=CONFIG, **options):
    _, mesh = tool.topology_mesh(topology, **SIZES)
    lowered, held = decode_programs(config, mesh, **WORK, **options)
    compiled = lowered["segment"]().compile()
    return parse(compiled.as_text()), memory(compiled) / in_use(held)


def in_use(held):
    return held["weights"] + held["kv"] + held["prompts_kv"]


def gathered(computations):
    found = collectives(computations)
    assert {
        "op": "all-reduce",
        "bytes": 32 * 512 * 2,
        "per_layer": True,
    } in found  # x, a chip's rows
    return max(x["bytes"] for x in found if x["op"] != "all-reduce")


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_decode_loop_moves_neither_weights_nor_cache(tool, topology):
    computations, hbm = compile_segment(tool, topology)
    assert gathered(computations) < SMALLEST_MATRIX
    assert big_copies(computations, ONE_LAYER) == []
    assert hbm <= 1.10
    per_layer = [x for x in collectives(computations) if x["per_layer"]]
    assert [x["op"] for x in per_layer] == ["all-reduce"] * 2  # after attention and after the MLP


def test_training_layout_would_gather_weights(tool):
    computations, _ = compile_segment(tool, "v5e:2x4", rules=TRAINING)
    gathers = [x["bytes"] for x in collectives(computations) if x["op"] == "all-gather"]
    assert max(gathers) >= SMALLEST_MATRIX


def test_cache_in_another_order_would_be_copied(tool, monkeypatch):
    monkeypatch.setattr("scope_jax.models.kv_cache.in_row_major_order", lambda x: x)
    unordered = dataclasses.replace(CONFIG, rope_theta=2e4)  # traced anew
    computations, hbm = compile_segment(tool, "v5e:2x4", unordered)
    assert big_copies(computations, ONE_LAYER)
    assert hbm > 1.10


def test_eight_bits_are_read_as_they_are(tool):
    int8 = ("weights", "cache")
    _, mesh = tool.topology_mesh("v5e:2x4", **SIZES)
    lowered, held = decode_programs(CONFIG, mesh, **WORK, int8=int8)
    compiled = lowered["segment"]().compile()
    computations = parse(compiled.as_text())
    assert big_copies(computations, ONE_LAYER // 2) == []  # no copy in bfloat16 either
    assert memory(compiled) <= 1.10 * in_use(held)
    _, whole = decode_programs(CONFIG, mesh, **WORK)
    assert held["weights"] < 0.75 * whole["weights"]  # the embedding, a third of this, is whole
    assert held["kv"] < 0.52 * whole["kv"] and held["prompts_kv"] < 0.52 * whole["prompts_kv"]


def test_training_attends_by_the_kernel_on_each_chips_own_heads(tool):
    length, (_, mesh) = 1024, tool.topology_mesh("v5e:2x4", **SIZES)
    model, declared = Transformer(CONFIG), declare(CONFIG)
    array = lambda shape, dtype, axes: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, spec(axes))
    )
    params = jax.tree.map(
        lambda w: array(w.shape, jnp.bfloat16, w.axes), declared,
        is_leaf=lambda x: isinstance(x, Weight),
    )  # fmt: skip
    tokens = array((8, length), jnp.int32, ("batch",))

    def loss(params, tokens, positions):
        return model(params, tokens, positions=positions)[0].astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text and "splash" in text
    # Nobody sends queries, keys or scores around: heads and rows stay on their chip.
    rows, heads = 8 // 2, CONFIG.num_heads // 4
    gathers = [
        op for ops in parse(text).values() for op in ops
        if op.kind in ("all-gather", "all-to-all") and f"{length},{CONFIG.head_dim}]" in op.text
    ]  # fmt: skip
    assert gathers == []
    # Scores of all queries in float32 would take more than all that the program holds for now.
    scores = rows * heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < CONFIG.num_layers * scores


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_kernel_runs_again_only_where_attention_is_not_kept(tool, remat):
    length, group, (_, mesh) = 512, 4, tool.topology_mesh("v5e:2x4", **SIZES)
    model = Transformer(dataclasses.replace(CONFIG, remat=remat))
    array = lambda shape, dtype, axes: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, spec(axes))
    )
    params = jax.tree.map(
        lambda w: array(w.shape, jnp.bfloat16, w.axes), declare(CONFIG),
        is_leaf=lambda x: isinstance(x, Weight),
    )  # fmt: skip
    of = lambda dtype: array((4 * group, length), dtype, ("batch",))  # noqa: E731
    batch = TrainBatch(
        of(jnp.int32), of(jnp.bool_), of(jnp.int32), of(jnp.int8), of(jnp.bool_), of(jnp.float32),
        of(jnp.float32),
    )  # fmt: skip

    def loss(params, batch):
        return completion_logps(model, params, batch, group_size=group)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    # Prompts and completions, each: the kernel forward, the two of its gradient, forward again.
    kernels = re.findall(r'custom_call_target="tpu_custom_call"', text)
    assert len(kernels) == 2 * (3 if remat == "attention" else 4)


def test_sizes_are_read_from_the_compiled_text():
    assert largest("bf16[2,64]{1,0:T(8,128)(2,1)}") == 2 * 64 * 2
    assert largest("(f32[3]{0}, u32[]{:S(2)}, pred[16,4])") == 16 * 4
    assert largest("f8e4m3fn[7]") == 7
    assert largest("token[]") <= 1
    assert jnp.dtype(CONFIG.dtype).itemsize == 2
