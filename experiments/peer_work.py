"""The work that the peers' scripts time (W1 to W4 of ../shared/peers), for our own benchmarks.

Same flags, same inputs from the same seed (`work_hash` says so), same JSON line. Not a benchmark
itself: bench_*.py import it.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import sys
import time
from importlib.metadata import version

import numpy as np


def parse(description: str, *, new_tokens: int, argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--model-dir", required=True, type=pathlib.Path, help="as ../shared/peers/make_model.py")
    add("--P", type=int, default=2, help="prompts")
    add("--G", type=int, default=4, help="samples per prompt")
    add("--B", type=int, default=8, help="rows of an update (W2)")
    add("--prompt-len", type=int, default=128)
    add("--new-tokens", type=int, default=new_tokens, help="tokens of the longest completion")
    add("--len-median", type=float, help="of a long tail; default new-tokens / 6")
    add("--len-sigma", type=float, default=1.0, help="of the log-normal lengths")
    add("--slots", type=int, help="rows in flight; default P * G")
    add("--micro", type=int, help="rows whose gradients exist at once; default all")
    add("--pack", action="store_true", help="W2 with a long tail, packed and not")
    add("--lr", type=float, default=1e-6)
    add("--remat", choices=["none", "attention", "full"], default="none")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--reps", type=int, default=5)
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU cores to use; default all")
    add("--check", action="store_true", help="recompute log-probs by a full forward")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.sched_setaffinity(0, cores)  # before jax starts its threads
    args.threads, args.load1 = len(cores), round(os.getloadavg()[0], 2)
    args.vocab = json.loads((args.model_dir / "config.json").read_text())["vocab_size"]
    args.slots = args.slots or args.P * args.G
    args.len_median = args.len_median or args.new_tokens / 6
    return args


def make_work(args, workload: str) -> dict[str, np.ndarray]:
    """Returns the peers' arrays of the same seed: "prompts" [P, N] (W2: [B, N]); to decode (W1, W4)
    "lengths" [P * G]; to learn from (W2) "completions", "old_logp" [B, T] and "advantages" [B].
    """
    rng, rows = np.random.default_rng(args.seed), args.P * args.G
    work = {"prompts": rng.integers(10, args.vocab, (args.P, args.prompt_len))}
    if workload == "W2":
        shape = (args.B, args.new_tokens)
        work["prompts"] = rng.integers(10, args.vocab, (args.B, args.prompt_len))
        work["completions"] = rng.integers(10, args.vocab, shape)
        work["advantages"] = rng.standard_normal(args.B).astype(np.float32)
        around_uniform = -np.log(args.vocab) + 0.1 * rng.standard_normal(shape)
        work["old_logp"] = around_uniform.astype(np.float32)
    if workload == "W2" and args.pack:  # not the peers' work: lengths, and a prompt for G rows
        work["prompts"] = np.repeat(work["prompts"][:: args.G], args.G, axis=0)
        work["lengths"] = _long_tail(args, rng, args.B)
    if workload == "W1":
        work["lengths"] = np.full(rows, args.new_tokens, np.int64)
    if workload == "W4":
        work["lengths"] = _long_tail(args, rng, rows)
    return work


def _long_tail(args, rng, rows: int) -> np.ndarray:
    """Log-normal lengths, from 8 (or fewer, if all are) to `new_tokens`."""
    drawn = np.rint(rng.lognormal(np.log(args.len_median), args.len_sigma, rows))
    return np.clip(drawn, min(8, args.new_tokens), args.new_tokens).astype(np.int64)


def work_hash(work) -> str:
    parts = (np.ascontiguousarray(work[name]).tobytes() for name in sorted(work))
    return hashlib.sha1(b"".join(parts)).hexdigest()[:12]


def peak_mb(key: str = "VmHWM") -> float:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return round(int(line.split()[1]) / 1024, 1)
    return float("nan")


def timed(run, reps: int) -> tuple[list[float], float]:
    """Returns (wall seconds of each repetition, share of the cores' time that we had)."""
    walls, began, cpu = [], time.perf_counter(), time.process_time()
    for rep in range(reps):
        start = time.perf_counter()
        run(rep + 1)
        walls.append(time.perf_counter() - start)
    return walls, (time.process_time() - cpu) / (time.perf_counter() - began)


def machine() -> tuple[float, float]:
    """Returns this machine's (float32 FLOP/s of a large product, bytes/s of a large read)."""
    import jax
    import jax.numpy as jnp

    square, row = jnp.ones((2048, 2048)), jnp.ones(1 << 27)
    best = {}
    for name, fn, x in (("flops", lambda x: x @ x, square), ("bytes", jnp.sum, row)):
        fn = jax.jit(fn)
        jax.block_until_ready(fn(x))
        best[name] = min(timed(lambda _, fn=fn, x=x: jax.block_until_ready(fn(x)), 5)[0])
    return 2 * 2048**3 / best["flops"], row.nbytes / best["bytes"]


def report(args, workload: str, work, walls, cpu_share, tokens: int, **extra) -> None:
    seconds = statistics.median(walls)
    names = ("jax", "jaxlib", "flax", "scope_jax")
    versions = {name: version(name) for name in names}
    row = {
        "peer": "scope_jax", "workload": workload, "model": args.model_dir.name, "P": args.P,
        "G": args.G, "prompt_len": args.prompt_len, "new_tokens": args.new_tokens,
        "slots": args.slots, "dtype": args.dtype, "threads": args.threads,
        "seconds": round(seconds, 4), "seconds_all": [round(wall, 4) for wall in walls],
        "tokens": tokens, "tokens_per_s": round(tokens / seconds, 3),
        "work_hash": work_hash(work), "load1_at_start": args.load1,
        "cpu_busy": round(cpu_share / args.threads, 3),
        "versions": {"python": sys.version.split()[0], **versions}, **extra,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
