"""Kills a training run again and again and compares what comes out with an undisturbed one.

    python experiments/chaos.py --kills 30 --workdir /tmp/chaos

Both runs have the same config. One is left alone; the other one's process gets SIGKILL at moments
that a seed draws: while it starts, in the middle of a step, or, every third time, as soon as a
checkpoint is being written. Then the same command is run again, until it has ended. If it ends
before there were enough kills, another one is started in another folder. Compared are all rows of
metrics.jsonl (less what is a property of a process: times, speeds, recompilations), the rollout
files byte by byte, and every array of the last checkpoint bit by bit. `lost_steps` has, for each
kill, the steps that had been reported and were done again. The hostile completions and data lines
of tests/hostile.py are tried as well. The last line of the output is one JSON object.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
OF_THE_PROCESS = ("seconds/", "tokens_per_s/", "mfu/", "hbm_peak_gib", "recompiles")
HANG = 600.0  # seconds without an end: longer than any start or step takes here


def start(workdir: pathlib.Path, args) -> subprocess.Popen:
    """Starts the run, or goes on with it; its lines go to WORKDIR.log."""
    command = [sys.executable, "-m", "scope_jax.train", "--config", args.config]
    command += ["--workdir", str(workdir), f"--config.total_steps={args.steps}"]
    command += [f"--config.checkpoint.every={args.every}", "--config.log.rollouts_every=1"]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(args.workdir / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *args.overrides], cwd=ROOT, stdout=log, stderr=log,
            env={**os.environ, **cache}, start_new_session=True,
        )  # fmt: skip


def reported(workdir: pathlib.Path) -> int:
    """Returns the last training step in metrics.jsonl, 0 if there is none; a torn line counts for
    none.
    """
    file, last = workdir / "metrics.jsonl", 0
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        last = row["step"] if "eval/k" not in row else last
    return last


def saving(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob("*tmp*"))


def live(workdir: pathlib.Path, args, draw: random.Random, at_save: bool) -> str:
    """Runs one life: starts the run and kills it at a drawn moment.

    Returns:
      "killed", "killed while saving", "ended", or "hung".
    """
    process, began = start(workdir, args), time.monotonic()
    # As many steps as make the kills last for about one run; none = while it starts.
    steps = reported(workdir) + draw.randint(0, max(1, 2 * args.steps // args.kills))
    delay = draw.uniform(0, args.step_seconds if steps > reported(workdir) else args.start_seconds)
    due = None
    while process.poll() is None:
        now = time.monotonic()
        if now - began > HANG:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "hung"
        if due is None and reported(workdir) >= steps:
            due = now + delay
        caught = at_save and saving(workdir)
        if caught or (due is not None and now >= due and not at_save):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "killed while saving" if caught else "killed"
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"the run failed by itself: see {workdir.with_suffix('.log')}")
    return "ended"


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Returns what two finished runs differ in, [] where they are equal to the bit."""
    found = []
    rows = [[_row(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, other)]
    if rows[0] != rows[1]:
        steps = [a["step"] for a, b in zip(*rows, strict=False) if a != b]
        found.append(f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} rows, differing at {steps}")
    files = [{p.name: p.read_bytes() for p in (d / "rollouts").iterdir()} for d in (one, other)]
    if files[0] != files[1]:
        found.append("rollouts/")
    steps, arrays = zip(*(_arrays(d) for d in (one, other)), strict=True)
    if steps[0] != steps[1] or arrays[0].keys() != arrays[1].keys():
        found.append(f"checkpoints: of steps {steps[0]} and {steps[1]}")
    else:
        found += [name for name, x in arrays[0].items() if x.tobytes() != arrays[1][name].tobytes()]
    return found


def _row(line: str) -> dict:
    return {k: v for k, v in json.loads(line).items() if not k.startswith(OF_THE_PROCESS)}


def _arrays(workdir: pathlib.Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """Returns (the steps of the checkpoints, {name: array} of the last one)."""
    import jax
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints"
    steps = sorted(int(p.name) for p in folder.iterdir())
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(folder.absolute() / str(steps[-1]) / "state")
    data = json.loads((folder / str(steps[-1]) / "data" / "metadata").read_text())["data"]
    named = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in named}
    return steps, arrays | {"data": np.frombuffer(json.dumps(data).encode(), np.uint8)}


def try_bad_inputs(workdir: pathlib.Path) -> dict[str, int]:
    """Verifies and reads what tests/hostile.py has; returns how much, wrong verdicts and hangs."""
    sys.path.insert(0, str(ROOT))
    from scope_jax.rewards import verify_batch
    from scope_jax.tasks.math_problems import read_problems
    from tests import hostile

    began, mark = time.monotonic(), workdir / "executed"
    golds, texts, expected = zip(*hostile.completions(str(mark)), strict=True)
    wrong = sum(
        a != b for a, b in zip(verify_batch(golds, texts, timeout=2.0), expected, strict=True)
    )
    good, bad = hostile.good_lines(), [line for line, _ in hostile.bad_lines()]
    file = workdir / "hostile.jsonl"
    file.write_bytes(b"".join(line + b"\n" for line in [*good, *bad]))
    missed = len(bad) - len(read_problems(file, "skip").skipped)
    return {
        "bad_inputs_tried": len(texts) + len(good) + len(bad),
        "wrong_verdicts": wrong, "bad_lines_missed": missed, "executed": int(mark.exists()),
        "hangs": int(time.monotonic() - began > HANG),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--config", default="worksheet")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=3, help="steps from save to save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-bad-inputs", action="store_true", help="kills alone")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="new")
    args, args.overrides = parser.parse_known_args()
    args.workdir.mkdir(parents=True)
    draw, calm = random.Random(args.seed), args.workdir / "calm"

    for run in ("warm", "calm"):  # the first one fills the cache of compiled programs
        began, first = time.monotonic(), None
        process = start(args.workdir / run, args)
        while process.poll() is None:
            first = first or (reported(args.workdir / run) and time.monotonic())
            time.sleep(0.01)
        if process.returncode:
            raise SystemExit(f"the run failed: see {args.workdir / run}.log")
        args.start_seconds = (first or began) - began
        args.step_seconds = (time.monotonic() - (first or began)) / args.steps
    shutil.rmtree(args.workdir / "warm")

    lost, saves, hangs, restarts, different, number = [], 0, 0, 0, [], 0
    while len(lost) < args.kills:
        victim, number, end = args.workdir / f"victim{number}", number + 1, ""
        while end != "ended":
            enough = len(lost) >= args.kills
            if enough:  # left alone to its end
                end = "ended" if start(victim, args).wait(HANG) == 0 else "failed"
            else:
                end = live(victim, args, draw, at_save=len(lost) % 3 == 2)
            if end == "failed":
                raise SystemExit(f"the run failed by itself: see {victim}.log")
            if end == "ended":
                break
            lost.append(reported(victim) - newest(victim))
            saves, hangs = saves + (end == "killed while saving"), hangs + (end == "hung")
            print(f"kill {len(lost)}: {end}, {reported(victim)} steps reported, {lost[-1]} lost",
                  file=sys.stderr, flush=True)  # fmt: skip
            restarts += 1
        different += differences(calm, victim)
    bad = {"hangs": 0} if args.no_bad_inputs else try_bad_inputs(args.workdir)
    result = {
        "kills": len(lost), "killed_while_saving": saves, "restarts": restarts, "runs": number,
        "bit_equal": not different, "differences": different, "lost_steps": lost,
        "most_lost": max(lost), "save_interval": args.every, **bad, "hangs": hangs + bad["hangs"],
    }  # fmt: skip
    print(json.dumps(result))


def newest(workdir: pathlib.Path) -> int:
    """Returns the step of the newest finished checkpoint, 0 if there is none."""
    names = [p.name for p in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if re.fullmatch(r"\d+", name)), default=0)


if __name__ == "__main__":
    main()
