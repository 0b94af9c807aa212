"""What does a TPU run when it decodes? Compiled for a topology that this machine has not.

    pip install libtpu
    python experiments/compile_decode.py --topology v5e:2x4 --mesh fsdp=2,model=4

Compiles `segment` (the decode loop) of a model with Qwen2.5-7B's shapes, bfloat16, in the decoding
layout, and prints one JSON line: HBM of a chip against weights and KV cache, what the chips send
each other for a token, copies of the cache's size, and what a token costs at least. HBM is also
given for `prefill` (a chunk of prompts, put into the places of all) and for the last `move`, from
half the columns.
Nothing runs: times are the compiler's estimates (scope_jax/hlo.py). Hardware: 2 CPU cores, 1
minute.
"""

import argparse
import dataclasses
import json
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu looks for the machine's metadata otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs: processes may compile side by side

import jax.numpy as jnp

from scope_jax.hardware import GIB, topology_devices
from scope_jax.hlo import big_copies, collectives, estimate, parse
from scope_jax.models.transformer import TransformerConfig
from scope_jax.programs import decode_programs, memory
from scope_jax.sampling import INT8
from scope_jax.sharding import make_mesh

QWEN_7B = TransformerConfig(
    vocab_size=152064, embed_dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128,
    mlp_dim=18944, rope_theta=1e6, qkv_bias=True, dtype="bfloat16",
)  # fmt: skip


def topology_mesh(topology: str, **sizes: int):
    """Returns (the chip, a mesh over the chips of "v5e:2x4", say)."""
    chip, devices = topology_devices(topology)
    return chip, make_mesh(**{"data": 1, **sizes}, devices=devices)


def measure(config, topology: str, sizes: dict[str, int], **work) -> dict:
    chip, mesh = topology_mesh(topology, **sizes)
    lowered, held = decode_programs(config, mesh, **work)
    weights, kv = held["weights"], held["kv"] + held["prompts_kv"]
    began = time.perf_counter()
    segment = lowered["segment"]().compile()
    seconds = time.perf_counter() - began
    computations = parse(segment.as_text())
    sent = collectives(computations)
    rows = work["prompts"] * work["group"] // (mesh.shape["data"] * mesh.shape["fsdp"])
    heads = config.num_kv_heads // mesh.shape["model"]
    item = 1 if "cache" in work["int8"] else jnp.dtype(config.dtype).itemsize
    one_layer = rows * heads * work["columns"] * config.head_dim * item
    coords = [device.coords for device in mesh.devices.flat]
    step = estimate(computations, chip, coords)
    gib = lambda x: round(x / GIB, 3)  # noqa: E731
    return {
        "topology": topology, "mesh": sizes, "layers": config.num_layers, **work,
        "weights_gib": gib(weights), "kv_gib": gib(kv), "hbm_gib": gib(memory(segment)),
        "ratio": round(memory(segment) / (weights + kv), 4),
        "collectives_per_layer": [f"{x['op']} {x['bytes']}" for x in sent if x["per_layer"]],
        "collectives_per_token": [f"{x['op']} {x['bytes']}" for x in sent if not x["per_layer"]],
        "copies_in_loop": big_copies(computations, one_layer, loop_only=True),
        "copies_in_all": big_copies(computations, one_layer),
        "step_ms_estimated": round(step.seconds * 1e3, 3),
        "step_ms_without_transfers": round(step.compute * 1e3, 3),
        "step_ms_of_reading": round((weights + kv) / chip.bandwidth * 1e3, 3),
        "prefill_hbm_gib": gib(memory(lowered["prefill"]().compile())),
        "move_hbm_gib": gib(memory(lowered["move"]().compile())),
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
