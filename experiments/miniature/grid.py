"""Runs the grid of cells.py: base models, then the pilot of learning rates, then the cells.

    python experiments/miniature/grid.py --out /tmp/miniature --minutes 360
    python experiments/miniature/grid.py --out /tmp/miniature --list          (what is left)
    python experiments/miniature/grid.py --out /tmp/miniature_smoke --smoke   (three minutes)
    python experiments/miniature/tables.py --out /tmp/miniature

A cell is a process of `python -m scope_jax.train` and one of final.py, on one core and one thread;
as many cells run at a time as there are cores. OUT/cells.jsonl gets a line when a cell has ended
(OUT/pilot.jsonl for the pilot's, OUT/bases.jsonl for base models); what has its line as "done" is
not run again, so the same command goes on where it was stopped. One that failed has its reason
there and is run again with --retry. After --minutes no cell is started any more.

Several machines: give each the same OUT or a copy, and --shard I/N. The pilot must be complete
before a cell starts; copies of pilot.jsonl are joined with cat.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import gzip
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time

from cells import (
    ARMS,
    FULL,
    ROOT,
    SHIPPED,
    SMOKE,
    Cell,
    Plan,
    choose_rate,
    grid_cells,
    options,
    pilot_cells,
    teachers_of,
    tuned_as,
)

HERE = pathlib.Path(__file__).parent
TIMEOUT = 1800.0  # seconds of one process of a cell; a base takes longer
BASE_TIMEOUT = 7200.0
# One thread: XLA's pools take their size from NPROC and from the cores the process may run on.
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1", "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu",
}  # fmt: skip
STOPPING = threading.Event()
RUNNING: set[subprocess.Popen] = set()


# ------------------------------------------------------------------------------ files


def read_lines(file: pathlib.Path) -> list[dict]:
    """Returns a file's JSON lines, of each name the last one; torn lines are left out. Where there
    is no FILE it reads FILE.gz, as results/ has it.
    """
    found, packed = {}, file.with_name(f"{file.name}.gz")
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else ""
    for line in (file.read_text() if file.exists() else text).splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found[row["name"]] = row
    return list(found.values())


def append_line(file: pathlib.Path, row: dict) -> None:
    """Appends one line, whole, whoever else appends; a torn line before it stays alone."""
    with file.open("ab+") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        size = lines.seek(0, os.SEEK_END)
        lines.seek(max(0, size - 1))
        torn = lines.read(1) not in (b"", b"\n")
        lines.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def to_do(names: list[str], file: pathlib.Path, retry: bool) -> set[str]:
    """Returns the names without a line in a file, and, to `retry`, those that failed."""
    status = {row["name"]: row["status"] for row in read_lines(file)}
    again = ("failed",) if retry else ()
    return {name for name in names if status.get(name) in (None, *again)}


# ------------------------------------------------------------------------------ processes


def run_process(
    command: list[str], log: pathlib.Path, out: pathlib.Path, timeout: float, env=ONE_THREAD
) -> dict:
    """Runs a command to its end; its output goes to a log.

    Args:
      out: has the compiled programs of all processes.
      timeout: in seconds; then it is killed.
      env: what it has in its environment beside ours.
    Returns:
      {"seconds", "cpu_seconds", "reason": "" or why it failed}.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    began, reason = time.perf_counter(), ""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            env={**os.environ, **env, **cache, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        RUNNING.add(process)
        if STOPPING.is_set():  # since the last look
            process.terminate()
        killer = threading.Timer(timeout, process.kill)
        killer.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        killer.cancel()
        RUNNING.discard(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        reason = f"exit {process.returncode}: {(errors or lines or ['no output'])[-1][:300]}"
        reason = f"not done after {timeout:.0f} s" if seconds > timeout else reason
    return {
        "seconds": round(seconds, 2), "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "reason": reason,
    }  # fmt: skip


def on_each_core(work, items: list, cores: list[int], deadline: float) -> None:
    """Calls work(item) for the items in their order, on every core one at a time; none is begun
    after the deadline (of time.monotonic).
    """
    queue = collections.deque(items)

    def worker(core: int) -> None:
        with contextlib.suppress(AttributeError):  # not on macOS
            os.sched_setaffinity(0, {core})  # of this thread: its processes inherit it
        while not STOPPING.is_set() and time.monotonic() < deadline:
            try:
                item = queue.popleft()
            except IndexError:
                return
            work(item)

    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(worker, cores))


def stop(*_) -> None:
    """Ends the processes that run; their cells get no line."""
    STOPPING.set()
    for process in list(RUNNING):
        process.terminate()


# ------------------------------------------------------------------------------ bases, cells


def base_dir(out: pathlib.Path, task: str, base: str) -> pathlib.Path:
    if base == SHIPPED:
        return ROOT / "scope_jax" / "tasks" / f"{task}_models"
    return out / "bases" / f"{task}-{base}"


def make_base(plan: Plan, out: pathlib.Path, task: str, base: str) -> None:
    """Makes the base policy, the teachers that the plan wants, and the PRM of a seed."""
    folder = base_dir(out, task, base)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "scope_jax.pretrain", "--seed", base, "--out", str(folder)]
    command += ["--task", task] if task != "worksheet" else []
    teachers = teachers_of(plan, task, base)
    command += ["--teachers", *teachers] if teachers != ["own"] else []
    ended = run_process(command, folder.with_suffix(".log"), out, BASE_TIMEOUT)
    if STOPPING.is_set():
        return
    row = {"name": f"{task}-{base}", "status": "failed" if ended["reason"] else "done", **ended}
    if not ended["reason"]:
        row["report"] = json.loads((folder / "pretrain.json").read_text())
    append_line(out / "bases.jsonl", row)
    say(row)


def run_cell(cell: Cell, plan: Plan, out: pathlib.Path, file: str, rate: float | None) -> None:
    """Trains and evaluates a cell from its beginning and writes its line. The pilot's cells (with a
    rate of their own) end with the last evaluation of the training, on the valid split.
    """
    workdir, trained = out / "runs" / cell.name, bool(ARMS[cell.arm].method)
    shutil.rmtree(workdir, ignore_errors=True)
    log = workdir.with_suffix(".log")
    log.unlink(missing_ok=True)
    line = options(cell, plan, base_dir(out, cell.task, cell.base), rate)
    row = {"name": cell.name, **cell._asdict(), "rate": rate, "commit": commit(), "reason": ""}
    if trained:
        command = [sys.executable, "-m", "scope_jax.train", *line, "--workdir", str(workdir)]
        row["train"] = run_process(command, log, out, TIMEOUT)
        row["reason"] = row["train"]["reason"]
        if not row["reason"]:
            row |= of_training(workdir)
    if cell.rate is None and not row["reason"] and not STOPPING.is_set():
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "final.py"), *line, "--out", f"{workdir}/final.json"]
        command += ["--workdir", str(workdir)] if trained else []
        command += [f"--{name}={value}" for name, value in plan.final.items()]
        row["evaluation"] = run_process(command, log, out, TIMEOUT)
        row["reason"] = row["evaluation"]["reason"]
        if not row["reason"]:
            row |= json.loads((workdir / "final.json").read_text())
    if STOPPING.is_set():
        return
    row["status"] = "failed" if row["reason"] else "done"
    append_line(out / file, row)
    say(row)


def of_training(workdir: pathlib.Path) -> dict:
    """Returns what a run's metrics.jsonl says: {"spent", "curve"}."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "eval/k" not in row]
    evaluations = [row for row in rows if "eval/k" in row]
    total = lambda name: sum(row.get(name) or 0 for row in steps)  # noqa: E731
    minis = json.loads((workdir / "config.json").read_text())["learn"]["mini_batches"]
    seconds = [row["seconds/step"] for row in steps]
    spent = {
        "steps": len(steps),
        "updates": minis * len(steps) - int(total("skipped")),
        "policy_tokens": int(total("policy_tokens")),
        "teacher_tokens": int(total("teacher_tokens")),
        "corrections": int(total("corrections/accepted")),
        # the first step compiles: it counts as a median one
        "seconds": round(sum(seconds[1:]) + statistics.median(seconds), 2),
        "median_step_seconds": round(statistics.median(seconds), 4),
    }
    named = lambda name: [  # noqa: E731
        [row["step"], round(row[name], 5)] for row in steps if row.get(name) is not None
    ]
    curve = {
        "valid_pass@1": [[row["step"], round(row["eval/pass@1"], 5)] for row in evaluations],
        "signal": named("groups_with_signal"),
        "solve_rate": named("solve_rate"),
        "entropy": named("entropy"),
        # errors included: it is logged to be set against the diversity of correct samples
        "textual_diversity": named("diversity/textual_diversity"),
    }
    return {"spent": spent, "curve": curve}


def pilot_rates(plan: Plan, out: pathlib.Path) -> dict[tuple[str, int, str], float | None]:
    """Returns (task, steps, arm) -> the learning rate that the pilot chose, None where it has not
    ended.
    """
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for cell in pilot_cells(plan):
        _ = found[cell.task, cell.steps, cell.arm][cell.rate]  # also one not measured at
    for row in read_lines(out / "pilot.jsonl"):
        reached = row["curve"]["valid_pass@1"][-1][1] if row["status"] == "done" else 0.0
        found[row["task"], row["steps"], row["arm"]][row["rate"]].append(reached)
    seeds = len(plan.pilot_seeds)
    return {arm: choose_rate(accuracies, seeds) for arm, accuracies in found.items()}


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def say(row: dict) -> None:
    parts = [row.get(part, row if part == "seconds" else {}) for part in ("train", "evaluation")]
    seconds = sum(part.get("seconds", 0) for part in parts) or row.get("seconds", 0)
    accuracy = row.get("columns", {}).get("pass@1")
    shown = f"pass@1 {accuracy:.3f}" if accuracy is not None else row["reason"]
    print(f"{row['name']}: {row['status']} in {seconds:.0f} s  {shown}", flush=True)


# ------------------------------------------------------------------------------ the grid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--shard", default="1/1", help="I/N: every N-th cell, from the I-th on")
    parser.add_argument(
        "--only", default="*", help="cells whose name fits, as '*-n5-*-scope', and their pilot"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="then nothing is begun")
    parser.add_argument("--cores", type=int, default=0, help="to use; 0 = all")
    parser.add_argument("--smoke", action="store_true", help="three tiny cells")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--list", action="store_true", help="say what is left and stop")
    args = parser.parse_args()
    args.out = args.out.absolute()
    if packed := [f.name for f in args.out.glob("*.jsonl.gz") if not f.with_suffix("").exists()]:
        print(f"error: unpack {', '.join(packed)} of {args.out} first: gunzip --keep")
        return 2
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    plan, deadline = SMOKE if args.smoke else FULL, time.monotonic() + 60 * args.minutes
    part, parts = map(int, args.shard.split("/"))
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    cores = sorted(available)[: args.cores or None]
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    def mine(cells: list[Cell], file: str) -> list[Cell]:
        left = to_do([cell.name for cell in cells], args.out / file, args.retry)
        return [cell for cell in cells[part - 1 :: parts] if cell.name in left]

    fits = lambda cell: fnmatch.fnmatch(cell.name, args.only)  # noqa: E731
    chosen = [cell for cell in grid_cells(plan) if fits(cell)]
    tuned = {(cell.task, cell.steps, tuned_as(cell)) for cell in chosen}
    pilot = [c for c in pilot_cells(plan) if (c.task, c.steps, c.arm) in tuned or fits(c)]
    pilot, grid = mine(pilot, "pilot.jsonl"), mine(chosen, "cells.jsonl")
    needed = dict.fromkeys((c.task, c.base) for c in pilot + grid if c.base != SHIPPED)
    left = to_do(["-".join(base) for base in needed], args.out / "bases.jsonl", args.retry)
    bases = [base for base in needed if "-".join(base) in left]
    print(f"left: {len(bases)} bases, {len(pilot)} of the pilot, {len(grid)} cells; {len(cores)} "
          "cores", flush=True)  # fmt: skip
    if args.list:
        print("\n".join(["-".join(base) for base in bases] + [c.name for c in pilot + grid]))
        return 0
    on_each_core(lambda base: make_base(plan, args.out, *base), bases, cores, deadline)
    on_each_core(
        lambda cell: run_cell(cell, plan, args.out, "pilot.jsonl", cell.rate),
        pilot, cores, deadline,
    )  # fmt: skip
    rates = pilot_rates(plan, args.out)
    rate_of = lambda cell: rates.get((cell.task, cell.steps, tuned_as(cell)))  # noqa: E731
    ready = [c for c in grid if not ARMS[c.arm].method or rate_of(c) is not None]
    for arm in sorted({c.arm for c in grid} - {c.arm for c in ready}):
        print(f"{arm}: the pilot of its learning rate is not complete", flush=True)
    for row in read_lines(args.out / "cells.jsonl"):
        now = rates.get((row["task"], row["steps"], ARMS[row["arm"]].rate_of or row["arm"]))
        if row["status"] == "done" and row["rate"] not in (None, now):
            print(
                f"error: {row['name']} ran at {row['rate']}, the pilot says {now}: another --out?"
            )
            return 2
    on_each_core(
        lambda cell: run_cell(cell, plan, args.out, "cells.jsonl", rate_of(cell)),
        ready, cores, deadline,
    )  # fmt: skip
    rows = read_lines(args.out / "cells.jsonl")
    failed = [row for row in rows if row["status"] == "failed"]
    print(f"cells.jsonl: {len(rows) - len(failed)} done, {len(failed)} failed")
    return 130 if STOPPING.is_set() else 0


if __name__ == "__main__":
    sys.exit(main())
