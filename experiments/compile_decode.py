"""What does a TPU run when it decodes? Compiled for a topology that this machine has not.

    pip install libtpu
    python experiments/compile_decode.py --topology v5e:2x4 --mesh fsdp=2,model=4

Compiles `segment` (the decode loop) of a model with Qwen2.5-7B's shapes, bfloat16, in the decoding
layout, and prints one JSON line: HBM of a chip against weights and KV cache, what the chips send
each other for a token, copies of the cache's size, and what a token costs at least. HBM is also
given for `prefill` (a chunk of prompts, put into the places of all) and for the last `move`, from
half the columns.
Nothing runs: times are the compiler's estimates, without collectives. Hardware: 2 CPU cores, 1
minute.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu looks for the machine's metadata otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs: processes may compile side by side

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from scope_jax.models import decoding
from scope_jax.models.int8 import quantise_weights
from scope_jax.models.kv_cache import SharedPrompts
from scope_jax.models.transformer import Transformer, TransformerConfig, Weight, declare
from scope_jax.sampling import INT8, PREFILL_TOKENS, shardings_of_int8
from scope_jax.sharding import DECODING, make_mesh, shardings, spec

QWEN_7B = TransformerConfig(
    vocab_size=152064, embed_dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
    mlp_dim=18944, rope_theta=1e6, qkv_bias=True, dtype="bfloat16",
)  # fmt: skip
CHIPS = {"v5e": (1.5e9, 819e9), "v5p": (1.75e9, 2765e9)}  # cycles/s, HBM bytes/s
GIB = 2**30


def topology_mesh(topology: str, **sizes: int):
    """Returns a mesh over the chips of "v5e:2x4", say."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return make_mesh(**{"data": 1, **sizes}, devices=chips)


def abstract(tree, where):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def programs(
    config, mesh, *, prompts: int, group: int, width: int, columns: int, rules=DECODING, int8=()
):  # fmt: skip
    """Lowers the programs of `generate` as `sampling.py` calls them, all rows in flight.

    Args:
      int8: as `decoding_layout`'s.
    Returns:
      ({name: function that lowers it}, bytes of the weights on a device, bytes of keys and values).
    """
    if "cache" in int8:
        config = dataclasses.replace(config, cache_dtype="int8")
    model, place = Transformer(config), NamedSharding(mesh, spec(("batch",), rules))
    rows, shards = prompts * group, mesh.shape["data"] * mesh.shape["fsdp"]
    everywhere = NamedSharding(mesh, spec((), rules))
    array = lambda shape, dtype, s=everywhere: jax.ShapeDtypeStruct(shape, dtype, sharding=s)  # noqa: E731
    dtype, declared = jnp.dtype(config.dtype), declare(config)
    params = jax.tree.map(
        lambda w, s: array(w.shape, dtype, s), declared, shardings(declared, mesh, rules),
        is_leaf=lambda x: isinstance(x, Weight),
    )  # fmt: skip
    if "weights" in int8:
        quantise = functools.partial(quantise_weights, declared=declared["layers"])
        layers = jax.eval_shape(quantise, params["layers"], params["layers"])
        params["layers"] = abstract(layers, shardings_of_int8(declared["layers"], mesh, rules))
    ids, mask = (array((prompts, width), dtype, place) for dtype in (jnp.int32, jnp.bool_))
    empty = functools.partial(
        decoding.no_contexts.__wrapped__, model, places=prompts, length=columns, place=None
    )
    contexts = jax.eval_shape(empty, params, ids, mask)
    contexts = abstract(contexts, decoding.placement(contexts, place))
    keys, key = array((rows, 2), jnp.uint32), jax.random.key(0)
    start = functools.partial(
        decoding.start.__wrapped__, model, slots=rows, columns=columns, rows=rows, length=columns,
        pad_id=0, place=None, stops=False,
    )  # fmt: skip
    state = jax.eval_shape(start, contexts, keys)
    state = abstract(state, decoding.placement(state, place))
    cache = contexts.cache
    shared = SharedPrompts(
        cache.keys, cache.values, cache.positions,
        array((shards, prompts // shards, group), jnp.int32),
        array((shards, rows // shards), jnp.int32),
    )  # fmt: skip
    segment = functools.partial(
        decoding.segment.lower, model, params, state, shared, array((shards,), jnp.int32),
        array((), jnp.int32), place=place, impl=jax.random.key_impl(key), eos_ids=(1,),
        greedy=False, top_k=0, temperature=array((), jnp.float32),
    )  # fmt: skip
    chunk = array((shards, min(prompts // shards, PREFILL_TOKENS // width)), jnp.int32)
    prefill = functools.partial(
        decoding.prefill.lower, model, params, contexts, ids, mask, chunk, chunk, width=width,
        length=columns, place=place,
    )  # fmt: skip
    keep, first = array((shards, rows // shards), jnp.int32), array((), jnp.int32)
    half = jax.eval_shape(functools.partial(start, columns=columns // 2), contexts, keys)
    half = abstract(half, decoding.placement(half, place))
    move = functools.partial(decoding.move.lower, half, keep, first, columns=columns, place=place)
    kv = (cache.keys, cache.values, state.cache.keys, state.cache.values)
    return {"segment": segment, "prefill": prefill, "move": move}, on_device(params), on_device(kv)


def on_device(tree) -> int:
    """Returns the bytes of a tree's parts on one device."""
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    ]
    return sum(sizes)


def hbm(compiled) -> int:
    """Returns the bytes that a device needs while the program runs."""
    m = compiled.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return held + m.temp_size_in_bytes


# ------------------------------------------------------------------------------ compiled text

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
ITEM_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    kind: str  # "all-gather", "fusion", ..; an asynchronous one's start and done have the same
    bytes: int  # of the largest array of the result
    calls: tuple[str, ...]  # computations
    text: str


def parse(text: str) -> dict[str, list[Op]]:
    """Returns the operations of each computation of an HLO module's text; "ENTRY" is the first."""
    computations: dict[str, list[Op]] = {}
    inside = None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            inside = computations.setdefault("ENTRY" if head[1] else head[2], [])
        elif inside is not None and (
            op := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        ):
            kind = re.sub(r"-(start|done|update)$", "", op[3]) if "dynamic" not in op[3] else op[3]
            calls = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line)
            inside.append(Op(op[1], kind, largest(op[2]), tuple(calls), line))
    return computations


def largest(shapes: str) -> int:
    """Returns the bytes of the largest array in a result type.

    >>> largest("(bf16[2,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"), largest("pred[3]")
    (256, 3)
    """
    found = re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", shapes)
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n)
        * (ITEM_BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8))
        // 8
        for kind, dims in found
    ]
    return max(sizes, default=0)


def loop_bodies(computations) -> list[tuple[str, int]]:
    """Returns [(computation, depth)] of the while loops of the program: 1 = the decode loop's
    parts, 2 = those of the loop over layers inside it.
    """
    found, waiting = {}, [("ENTRY", 0)]
    while waiting:
        name, depth = waiting.pop()
        if found.get(name, -1) >= depth:
            continue
        found[name] = depth
        for op in computations.get(name, ()):
            waiting += [(called, depth + (op.kind == "while")) for called in op.calls]
    return [(name, depth) for name, depth in found.items() if depth]


def collectives(computations) -> list[dict]:
    """Returns each collective of the decode loop once: {"op", "bytes", "per_layer"}."""
    seen = {}
    for name, depth in loop_bodies(computations):
        for op in computations.get(name, ()):
            if op.kind in COLLECTIVES and f"{op.kind}-done" not in op.text:
                channel = re.search(r"channel_id=(\d+)", op.text)
                at = channel[1] if channel else op.name  # a fused one appears in several clones
                seen[at] = {"op": op.kind, "bytes": op.bytes, "per_layer": depth > 1}
    return sorted(seen.values(), key=lambda x: -x["bytes"])


def big_copies(computations, size: int, *, loop_only: bool = False) -> list[str]:
    """Returns the operations that write `size` bytes or more beside what they read.

    An update of a slice, alone or at the end of a fusion, is done in place: where it cannot, XLA
    puts a copy before it.
    """
    inside = dict(loop_bodies(computations))
    roots = {name: ops[-1].kind for name, ops in computations.items() if ops}
    fused = {
        c for ops in computations.values() for op in ops if op.kind == "fusion" for c in op.calls
    }
    moves = ("copy", "transpose", "concatenate", "pad", "gather", "scatter", "select", "convert")
    found = []
    for name, ops in computations.items():
        for op in ops:
            kind = roots.get(op.calls[0], "") if op.kind == "fusion" and op.calls else op.kind
            # Inside a fusion only a change of layout counts: the rest is not written out.
            counts = op.kind in ("copy", "transpose") if name in fused else (
                op.kind in moves or (op.kind == "fusion" and kind != "dynamic-update-slice")
            )  # fmt: skip
            if counts and op.bytes >= size and (name in inside or not loop_only):
                shape = re.search(r"= \(?(\w+\[[\d,]*\])", op.text)
                found.append(f"{op.kind} {shape[1] if shape else op.name}")
    return found


def cycles(computations, layers: int) -> int:
    """Returns the compiler's estimate of a token's cycles, collectives not counted."""
    total = 0
    for name, depth in loop_bodies(computations):
        for op in computations.get(name, ()):
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', op.text):
                total += int(estimate[1]) * (layers if depth > 1 else 1)
    return total


# ------------------------------------------------------------------------------ the command


def measure(config, topology: str, sizes: dict[str, int], **work) -> dict:
    mesh = topology_mesh(topology, **sizes)
    lowered, weights, kv = programs(config, mesh, **work)
    began = time.perf_counter()
    segment = lowered["segment"]().compile()
    seconds = time.perf_counter() - began
    computations = parse(segment.as_text())
    sent = collectives(computations)
    rows = work["prompts"] * work["group"] // (mesh.shape["data"] * mesh.shape["fsdp"])
    heads = config.num_kv_heads // mesh.shape["model"]
    item = 1 if "cache" in work["int8"] else jnp.dtype(config.dtype).itemsize
    one_layer = rows * heads * work["columns"] * config.head_dim * item
    clock, bandwidth = CHIPS[topology.split(":")[0]]
    gib = lambda x: round(x / GIB, 3)  # noqa: E731
    return {
        "topology": topology, "mesh": sizes, "layers": config.num_layers, **work,
        "weights_gib": gib(weights), "kv_gib": gib(kv), "hbm_gib": gib(hbm(segment)),
        "ratio": round(hbm(segment) / (weights + kv), 4),
        "collectives_per_layer": [f"{x['op']} {x['bytes']}" for x in sent if x["per_layer"]],
        "collectives_per_token": [f"{x['op']} {x['bytes']}" for x in sent if not x["per_layer"]],
        "copies_in_loop": big_copies(computations, one_layer, loop_only=True),
        "copies_in_all": big_copies(computations, one_layer),
        "step_ms_estimated": round(cycles(computations, config.num_layers) / clock * 1e3, 3),
        "step_ms_of_reading": round((weights + kv) / bandwidth * 1e3, 3),
        "prefill_hbm_gib": gib(hbm(lowered["prefill"]().compile())),
        "move_hbm_gib": gib(hbm(lowered["move"]().compile())),
        "compile_seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x4", help="v5e:2x4, v5p:2x2x2, ..")
    parser.add_argument("--mesh", default="fsdp=2,model=4")
    parser.add_argument("--layers", type=int, default=QWEN_7B.num_layers)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16, help="rows of a prompt")
    parser.add_argument("--width", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--columns", type=int, default=1024, help="tokens of a completion")
    parser.add_argument("--int8", nargs="*", default=(), choices=INT8, help="in eight bits")
    args = parser.parse_args()
    sizes = {name: int(n) for name, n in (part.split("=") for part in args.mesh.split(","))}
    config = dataclasses.replace(QWEN_7B, num_layers=args.layers)
    work = {name: getattr(args, name) for name in ("prompts", "group", "width", "columns", "int8")}
    print(json.dumps(measure(config, args.topology, sizes, **work)))


if __name__ == "__main__":
    main()
