"""Is a grid faster with one run at a time on all cores, or with one run on each core?

    python experiments/miniature/bench_threads.py --out /tmp/bench_threads --n 5 --arm scope

Trains the same cell (the shipped base, all of the full plan's steps) both ways, taking turns, after
a round that fills the cache of compiled programs. "step_seconds" leaves out the first step. CPU
seconds hardly depend on what else the machine does; wall-clock seconds do. The last line of the
output is one JSON object; its steps_per_s are of all runs together, from start to end of the
processes ("whole") and of the training steps alone ("steps").
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import statistics
import sys

from cells import FULL, SHIPPED, Cell, options
from grid import ONE_THREAD, base_dir, of_training, run_process


def train(args, name: str, cores: set[int], env: dict[str, str]) -> dict:
    os.sched_setaffinity(0, cores)  # of this thread: its process inherits it
    workdir = args.out / name
    shutil.rmtree(workdir, ignore_errors=True)
    cell = Cell("worksheet", args.n, SHIPPED, 0, args.arm)
    line = options(cell, FULL, base_dir(args.out, "worksheet", SHIPPED), 3e-4)
    command = [sys.executable, "-m", "scope_jax.train", *line, "--workdir", str(workdir)]
    ended = run_process(command, workdir.with_suffix(".log"), args.out, 3600.0, env)
    if ended["reason"]:
        raise SystemExit(ended["reason"])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["seconds/step"] for row in rows if "seconds/step" in row]
    return {**ended, "step_seconds": sum(steps[1:]), "median": of_training(workdir)["spent"]}


def measure(args, ways: dict[str, tuple[list[set[int]], dict[str, str]]]) -> dict:
    """Returns, of each way (the cores of each of its runs, their environment), the medians."""
    found = {name: [] for name in ways}
    for _ in range(args.rounds + 1):
        for name, (places, env) in ways.items():
            with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
                jobs = [
                    pool.submit(train, args, f"{name}-{i}", cores, env)
                    for i, cores in enumerate(places)
                ]
                found[name].append([job.result() for job in jobs])
    result = {}
    for name, rounds in found.items():
        runs = [run for of_round in rounds[1:] for run in of_round]
        middle = lambda key, runs=runs: statistics.median(run[key] for run in runs)  # noqa: E731
        at_a_time = len(ways[name][0])
        result[name] = {
            "runs_at_a_time": at_a_time,
            "seconds": middle("seconds"), "cpu_seconds": middle("cpu_seconds"),
            "median_step_seconds": statistics.median(
                run["median"]["median_step_seconds"] for run in runs
            ),
            "steps_per_s_whole": at_a_time * FULL.steps / middle("seconds"),
            "steps_per_s_steps": at_a_time * (FULL.steps - 1) / middle("step_seconds"),
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--n", type=int, default=5)
    parser.add_argument("--arm", default="scope")
    parser.add_argument("--rounds", type=int, default=2, help="that count")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    all_cores = {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    ways = {
        "one_run_all_cores": ([set(cores)], all_cores),
        "a_run_each_core": ([{core} for core in cores], ONE_THREAD),
    }
    result = {"n": args.n, "arm": args.arm, "cores": len(cores), "load_before": os.getloadavg()[0]}
    result |= measure(args, ways)
    print(json.dumps({**result, "load_after": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
