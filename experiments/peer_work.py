"""The work that the peers' scripts time (W1 and W4 of ../shared/peers), for our own benchmarks.

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
    add("--prompt-len", type=int, default=128)
    add("--new-tokens", type=int, default=new_tokens, help="tokens of the longest completion")
    add("--len-median", type=float, help="of a long tail; default new-tokens / 6")
    add("--len-sigma", type=float, default=1.0, help="of the log-normal lengths")
    add("--slots", type=int, help="rows in flight; default P * G")
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


def make_work(args, *, long_tail: bool) -> dict[str, np.ndarray]:
    """Returns {"prompts" [P, N], "lengths" [P * G]}, the peers' arrays of the same seed."""
    rng, rows = np.random.default_rng(args.seed), args.P * args.G
    work = {"prompts": rng.integers(10, args.vocab, (args.P, args.prompt_len))}
    work["lengths"] = np.full(rows, args.new_tokens, np.int64)
    if long_tail:
        drawn = np.rint(rng.lognormal(np.log(args.len_median), args.len_sigma, rows))
        shortest = min(8, args.new_tokens)
        work["lengths"] = np.clip(drawn, shortest, args.new_tokens).astype(np.int64)
    return work


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


def report(args, workload: str, work, walls, cpu_share, **extra) -> None:
    seconds, tokens = statistics.median(walls), int(work["lengths"].sum())
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
