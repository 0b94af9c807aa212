"""A run that is interrupted, damaged or not finite: what it loses (nothing), skips and says."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from scope_jax import train as train_module
from scope_jax.checkpoint import open_checkpoints
from scope_jax.configlib import load_config
from scope_jax.preemption import UNSAVED
from scope_jax.tasks import worksheet
from scope_jax.train import main, train

ROOT = pathlib.Path(__file__).parents[1]
OF_THE_PROCESS = ("seconds/", "tokens_per_s/", "mfu/", "hbm_peak_gib", "recompiles")
OPTIONS = ["--config.total_steps=4", "--config.checkpoint.every=1", "--config.checkpoint.keep=3"]


def run(workdir, *overrides: str):
    train(load_config("worksheet:n=3,runlocal", [*OPTIONS, *overrides]), workdir)


def command(workdir, *overrides: str) -> int:
    """Runs the command in this process; returns its exit code."""
    config = ["--config", "worksheet:n=3,runlocal", "--workdir", str(workdir)]
    return main([*config, *OPTIONS, *overrides])


def rows(workdir) -> list[dict]:
    """Returns the rows of metrics.jsonl without what belongs to a process."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    kept = lambda row: {k: v for k, v in row.items() if not k.startswith(OF_THE_PROCESS)}  # noqa: E731
    return [kept(json.loads(line)) for line in lines]


def state(workdir):
    manager = open_checkpoints(workdir)
    return jax.tree.map(np.asarray, manager.restore(manager.latest_step())["state"])


def assert_equal_runs(workdir, other):
    assert rows(workdir) == rows(other)
    files = [{p.name: p.read_text() for p in (d / "rollouts").iterdir()} for d in (workdir, other)]
    assert files[0] == files[1]
    jax.tree.map(np.testing.assert_array_equal, state(workdir), state(other))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run of four steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("calm") / "run"
    run(workdir)
    return workdir


def at_step(monkeypatch, number: int, act):
    """Has `act` called in the middle of the number-th step from now on."""
    sample, calls = train_module.sample, []

    def disturbed(*args):
        calls.append(None)
        if len(calls) == number:
            act()
        return sample(*args)

    monkeypatch.setattr(train_module, "sample", disturbed)


def test_sigterm_saves_the_step_and_ends_well(tmp_path, monkeypatch, capsys, calm):
    with monkeypatch.context() as patched:
        at_step(patched, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(tmp_path / "run", "--config.checkpoint.every=50") == 0
    assert "SIGTERM: saved after step 2" in capsys.readouterr().out
    assert rows(tmp_path / "run")[-1]["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert command(tmp_path / "run", "--config.checkpoint.every=50") == 0
    assert_equal_runs(tmp_path / "run", calm)


def test_sigterm_in_a_step_that_does_not_end_in_time():
    script = (
        "import os, signal, time\n"
        "from scope_jax.preemption import Preemption\n"
        "with Preemption(grace=0.2):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(100)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == UNSAVED
    assert "no step was finished and saved within 0.2 s" in done.stderr


def test_a_damaged_newest_checkpoint_costs_one_interval_and_no_bit(tmp_path, capsys, calm):
    run(tmp_path / "run", "--config.total_steps=2")
    files = (tmp_path / "run" / "checkpoints" / "2" / "state").rglob("d/*")
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert command(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "checkpoints/2 is damaged" in out and "going on from the checkpoint of step 1" in out
    assert rows(tmp_path / "run") == rows(calm)
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path / "run"), state(calm))


def test_an_error_in_the_middle_of_a_step_loses_what_was_not_saved(tmp_path, monkeypatch, calm):
    def fail():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_step(patched, 4, fail)
        run(tmp_path / "run", "--config.checkpoint.every=2")
    run(tmp_path / "run", "--config.checkpoint.every=2")
    assert_equal_runs(tmp_path / "run", calm)


FULL_DISK = """
import resource, sys
from scope_jax import train
sample, calls = train.sample, []
def fill_up(*args):  # a limit on the size of files: metrics are below it, arrays are not
    calls.append(None)
    if len(calls) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return sample(*args)
train.sample = fill_up
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, calm):
    arguments = ["--config", "worksheet:n=3,runlocal", "--workdir", str(tmp_path / "run"), *OPTIONS]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    # The save of step 2 runs beside step 3.
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and "a checkpoint could not be written" in error
    assert "File too large" in error and "the last good one is of step 1" in error
    assert rows(tmp_path / "run")[-1]["step"] == 2
    assert command(tmp_path / "run") == 0
    assert_equal_runs(tmp_path / "run", calm)


def test_a_run_that_died_before_its_last_evaluation_still_evaluates(tmp_path, capsys, calm):
    run(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    *kept, last = file.read_text().splitlines(keepends=True)
    assert "eval/k" in last
    file.write_text("".join(kept) + last[:20])  # torn
    assert command(tmp_path / "run") == 0
    assert rows(tmp_path / "run") == rows(calm)
    assert command(tmp_path / "run") == 2
    assert "has done 4 steps" in capsys.readouterr().err


CALLS: list[str] = []  # of the reward below, since a test emptied it
EVALUATION, STEP = 2 * 8, 8 * 4  # calls of an evaluation (8 problems) and of a step (8 prompts)


def nan_in_the_second_step(gold: str, completion: str) -> float:
    CALLS.append(completion)
    nan = len(CALLS) == EVALUATION + STEP + 5
    return float("nan") if nan else float(worksheet.verify(gold, completion))


def test_a_reward_that_is_not_finite_costs_the_step_and_is_kept(tmp_path):
    CALLS.clear()
    options = ["--config.method=dr_grpo", f"--config.reward.fn={__name__}:nan_in_the_second_step"]
    options += ["--config.eval.ood=False", "--config.total_steps=3"]
    assert command(tmp_path / "run", *options) == 0
    steps = [row for row in rows(tmp_path / "run") if "eval/k" not in row]
    assert [row["skipped"] > 0 for row in steps] == [False, True, False]
    assert steps[1]["reward"] is None and "loss" not in steps[1]
    kept = np.load(tmp_path / "run" / "non_finite" / "step_000002_0.npz", allow_pickle=False)
    assert np.isnan(kept["rewards"]).sum() == 1 and kept["ids"].shape[0] == 32


def test_a_policy_that_is_not_finite_stops_the_run_with_the_reason(tmp_path, capsys):
    assert command(tmp_path / "run", "--config.optimizer.learning_rate=1e38") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "3 steps in a row were not finite" in error
    steps = [row for row in rows(tmp_path / "run") if "eval/k" not in row]
    assert [row["skipped"] for row in steps] == [1, 2, 2]  # of two; the first one was still finite
    assert len(list((tmp_path / "run" / "non_finite").glob("*.npz"))) == 3


@pytest.mark.parametrize(
    "check, reason",
    [("max_logp_gap=1e-12", "sampler and trainer differ"), ("max_recompiles=1", None)],
)
def test_a_check_that_is_configured_ends_the_run(tmp_path, capsys, check, reason):
    assert command(tmp_path / "run", f"--config.checks.{check}") == (2 if reason else 0)
    if reason:
        assert reason in capsys.readouterr().err
        assert rows(tmp_path / "run")[-1]["step"] == 1
