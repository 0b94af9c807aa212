"""How much host memory does loading a checkpoint take beyond what it leaves behind?

    python experiments/load_memory.py --layers 4 --mesh fsdp=2,model=4

Writes a random bfloat16 checkpoint with the layer shapes of Qwen2.5-7B in four shards, loads it in
a fresh process onto a mesh of 8 virtual CPU devices, and prints one JSON line. On virtual devices
the params themselves stay in host memory, so what the load costs on top is

    peak (VmHWM) - settled (VmRSS after gc and malloc_trim)

which must not exceed 1.3 times the largest stacked weight. Hardware: 2 CPU cores, 8 GiB, 1 minute.
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from scope_jax.models.hf import config_to_hf, hf_tensors, load_hf
from scope_jax.models.safetensors_files import Output, write_files
from scope_jax.models.transformer import TransformerConfig, Weight, declare
from scope_jax.sharding import make_mesh

BF16 = np.dtype(ml_dtypes.bfloat16)
LIMIT = 1.3


def qwen_7b(layers: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=152064, embed_dim=3584, num_layers=layers, num_heads=28, num_kv_heads=4,
        head_dim=128, mlp_dim=18944, rope_theta=1e6, qkv_bias=True,
    )  # fmt: skip


def weights(config: TransformerConfig) -> list[Weight]:
    import jax

    return jax.tree.leaves(declare(config), is_leaf=lambda x: isinstance(x, Weight))


def random_rows(seed: int, count: int):
    """Yields `count` bfloat16 numbers, a few MiB at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, count, 2**21):
        yield (0.02 * rng.standard_normal(min(2**21, count - start), np.float32)).astype(BF16)


def write_random(directory: pathlib.Path, config: TransformerConfig, shards: int) -> None:
    """Writes a checkpoint without ever holding a tensor."""
    names = [named for weight in weights(config) for named in hf_tensors(weight)]
    outputs = [
        Output(name, shape, BF16, functools.partial(random_rows, seed, math.prod(shape)))
        for seed, (name, shape) in enumerate(names)
    ]
    total = sum(output.num_bytes for output in outputs)
    write_files(directory, outputs, math.ceil(1.1 * total / shards))
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))


def memory(field: str) -> int:
    """Returns VmHWM or VmRSS of this process in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def load_and_measure(directory: str, mesh_sizes: dict[str, int]) -> dict:
    import jax

    mesh = make_mesh(**mesh_sizes)
    start = time.time()
    model, params = load_hf(directory, mesh=mesh)
    seconds = time.time() - start
    jax.block_until_ready(params)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak, final = memory("VmHWM"), memory("VmRSS")
    held = weights(model.config)
    largest = max(2 * math.prod(w.shape) for w in held if w.stacked)
    return {
        "mesh": mesh_sizes,
        "params_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "largest_stacked_weight_bytes": largest,
        "largest_weight_bytes": max(2 * math.prod(w.shape) for w in held),
        "final_rss_bytes": final,
        "peak_rss_bytes": peak,
        "peak_minus_final_over_largest_stacked": round((peak - final) / largest, 3),
        "limit": LIMIT,
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures the host memory of a load.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mesh", default="fsdp=2,model=4", help="sizes of the axes, 8 devices")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # the fresh process: a directory to load
    args = parser.parse_args()
    sizes = {"data": 1, **{k: int(v) for k, v in (p.split("=") for p in args.mesh.split(","))}}
    if args.load:
        print(json.dumps(load_and_measure(args.load, sizes)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_random(pathlib.Path(folder), qwen_7b(args.layers), shards=4)
        files = len(list(pathlib.Path(folder).glob("*.safetensors")))
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--mesh", args.mesh, "--load", folder]
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    result = {"layers": args.layers, "files": files, **json.loads(output.stdout)}
    print(json.dumps(result))
    return int(result["peak_minus_final_over_largest_stacked"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
