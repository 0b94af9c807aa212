"""Several processes on this machine, over gloo: what one process does, they do together."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import hosts_worker
import jax
import numpy as np
import pytest

from scope_jax import hosts, metrics
from scope_jax.checkpoint import restore_params
from scope_jax.configlib import load_config
from scope_jax.hosts import join_hosts
from scope_jax.records import InputError
from scope_jax.roles import load_policy
from scope_jax.sharding import make_mesh
from scope_jax.train import train

WORKER = pathlib.Path(__file__).with_name("hosts_worker.py")
CONFIG = "worksheet:n=3,runlocal"
# Evaluation in the shapes of training: fewer programs to compile.
OPTIONS = ("--config.eval.max_new_tokens=21", "--config.eval.group_size=4")
DEVICES = 8  # of all processes together, and of this one


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def started_hosts(folder, count: int, *arguments, own=()):
    """Starts the worker in `count` processes and gives them; their output goes to `outputs`.

    Args:
      own: more arguments of the last process.
    """
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    common = {"XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    common |= {"SCOPE_JAX_COORDINATOR": f"127.0.0.1:{free_port()}"}
    common |= {"SCOPE_JAX_NUM_PROCESSES": str(count)}
    root = str(pathlib.Path(__file__).parents[1])
    common |= {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    processes = []
    try:
        for i, file in enumerate(outputs(folder, count)):
            command = [sys.executable, str(WORKER), str(folder), *arguments]
            with file.open("w") as output:
                process = subprocess.Popen(
                    command + list(own) * (i == count - 1), stdout=output, stderr=output,
                    env={**os.environ, **common, "SCOPE_JAX_PROCESS_ID": str(i)},
                )  # fmt: skip
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def outputs(folder, count: int) -> list[pathlib.Path]:
    return [folder / f"process_{i}.txt" for i in range(count)]


def run_hosts(folder, count: int, *arguments, own=(), timeout=240) -> list[tuple[int, str]]:
    """Runs the worker in `count` processes; returns (exit code, output) of each."""
    with started_hosts(folder, count, *arguments, own=own) as processes:
        deadline = time.monotonic() + timeout
        codes = [p.wait(max(1, deadline - time.monotonic())) for p in processes]
    texts = [file.read_text() for file in outputs(folder, count)]
    return list(zip(codes, texts, strict=True))


def records(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(workdir) -> list[dict]:
    return records(workdir / "metrics.jsonl")


# --- Two processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """Two processes trained on fixed rollouts, then ran two real steps on mesh 4x2: the folder, and
    what they printed.
    """
    folder = tmp_path_factory.mktemp("two_hosts")
    arguments = ("--config", CONFIG, "--workdir", str(folder / "run"), *OPTIONS)
    done = run_hosts(folder, 2, "2x2x2", *arguments, "--config.mesh.fsdp=2")
    assert [code for code, _ in done] == [0, 0], done
    return folder, [text for _, text in done]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The workdir of three steps in this process, on mesh 8x1."""
    workdir = tmp_path_factory.mktemp("one_host") / "run"
    train(load_config(CONFIG, ["--config.total_steps=3", *OPTIONS]), workdir)
    return workdir


def check_curves(folder):
    curves = json.loads((folder / "curves.json").read_text())
    for sizes, found in curves.items():
        want = hosts_worker.loss_curve(make_mesh(*map(int, sizes.split("x"))))
        for curve in found:  # unpacked; packed, which has other roundings for AdamW to enlarge
            np.testing.assert_allclose(curve, want[: len(curve)], atol=1e-5, rtol=1e-5)
        assert [len(curve) for curve in found] == [len(want), 4]


def test_two_processes_have_one_process_s_losses_on_fixed_rollouts(two_hosts):
    check_curves(two_hosts[0])


@pytest.mark.slow
def test_four_processes_have_one_process_s_losses_and_tokens(tmp_path):
    done = run_hosts(tmp_path, 4, "4x2x1,2x2x2")
    assert [code for code, _ in done] == [0] * 4, done
    check_curves(tmp_path)
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    assert tokens == hosts_worker.sampled(make_mesh(2, 2, 2))
    assert np.count_nonzero(tokens) > 40


def check_same_rows(ours, theirs, tolerance):
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, want in zip(ours, theirs, strict=True):
        assert row.keys() == want.keys()
        for key in row:
            if not key.startswith(("seconds/", "tokens_per_s/", "mfu/")):
                assert row[key] == pytest.approx(want[key], abs=tolerance), (row["step"], key)


def test_a_run_of_two_processes_is_that_of_one(two_hosts, one_host):
    folder, outputs = two_hosts
    before, *steps, after = rows(folder / "run")
    assert [row["step"] for row in steps] == [1, 2] and "eval/pass@1" in after
    check_same_rows([before, *steps], rows(one_host)[:3], 1e-5)
    assert all(row["recompiles"] == 0 for row in steps)
    for step in (1, 2):  # the same tokens and repairs
        file = f"rollouts/step_{step:06d}.jsonl"
        ours, theirs = (records(path / file) for path in (folder / "run", one_host))
        for record, want in zip(ours, theirs, strict=True):
            for name, tolerance in (("step_scores", 2e-4), ("logps", 2e-3), ("logps_after", 2e-3)):
                for one, other in ((record, want), (record.get("repair"), want.get("repair"))):
                    if one and name in one:
                        assert one.pop(name) == pytest.approx(other.pop(name), abs=tolerance)
            assert record == want
    assert "8 cpu device(s) of 2 processes" in outputs[0]
    assert "eval at step" in outputs[0] and "eval at step" not in outputs[1]
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1


def test_one_process_goes_on_from_a_checkpoint_of_two_hosts_on_another_mesh(two_hosts, one_host):
    workdir = two_hosts[0] / "run"
    train(load_config(CONFIG, ["--config.total_steps=3", *OPTIONS]), workdir)
    (ours,) = [row for row in rows(workdir) if row["step"] == 3 and "loss" in row]
    (want,) = [row for row in rows(one_host) if row["step"] == 3 and "loss" in row]
    check_same_rows([ours], [want], 1e-5)


# --- Errors -----------------------------------------------------------------------------------


def errors(done) -> list[str]:
    texts = [[line for line in text.splitlines() if "error: " in line] for _, text in done]
    assert [len(lines) for lines in texts] == [1] * len(done), done
    assert [code for code, _ in done] == [2] * len(done), done
    return [line for (line,) in texts]


def test_what_one_process_cannot_read_ends_all_with_its_line(tmp_path):
    arguments = ("--config", CONFIG, "--workdir", str(tmp_path / "run"))
    own = ("--config.model.path=/nowhere",)
    first, last = errors(run_hosts(tmp_path, 2, "", *arguments, own=own))
    assert last.startswith("error: model directory /nowhere does not exist")
    assert first == last.replace("error: ", "error: process 1: ")
    assert not (tmp_path / "run").exists()


# --- One process ends -------------------------------------------------------------------------

GONE = "error: another process is gone: "


def arguments_of(workdir) -> tuple[str, ...]:
    """Those of `two_hosts`, with a checkpoint after every step."""
    mesh = ("--config.mesh.fsdp=2", "--config.checkpoint.every=1")
    return ("--config", CONFIG, "--workdir", str(workdir), *OPTIONS, *mesh)


def wait_for_step(workdir, processes) -> None:
    deadline, file = time.monotonic() + 240, workdir / "metrics.jsonl"
    while not file.exists() or '"loss"' not in file.read_text():
        assert [p.poll() for p in processes] == [None] * len(processes)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(GONE)]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on_from_its_checkpoint(
    tmp_path, two_hosts, victim
):
    workdir, other = tmp_path / "run", 1 - victim
    with started_hosts(tmp_path, 2, "", *arguments_of(workdir)) as processes:
        wait_for_step(workdir, processes)
        processes[victim].kill()
        began = time.monotonic()
        code = processes[other].wait(60)
        print(f"process {other} stopped {time.monotonic() - began:.1f} s after {victim}: {code}")
    text = outputs(tmp_path, 2)[other].read_text()
    assert code != 0
    assert gone_lines(text) == [f"{GONE}process {victim} was killed"], text

    done = run_hosts(tmp_path, 2, "", *arguments_of(workdir))
    assert [code for code, _ in done] == [0, 0], done
    trained = lambda folder: [row for row in rows(folder) if "loss" in row][:2]  # noqa: E731
    whole = two_hosts[0] / "run"
    check_same_rows(trained(workdir), trained(whole), 0)
    assert [row["step"] for row in trained(workdir)] == [1, 2]
    _, params = load_policy(load_config(CONFIG, list(OPTIONS)))
    ours, theirs = (restore_params(folder, params, step=2) for folder in (workdir, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (ours, params)), strict=True))


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("InputError", 2, "no such thing"),
        pytest.param("KeyError", 1, "KeyError: 'no such thing'", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_the_other_with_its_line(tmp_path, kind, code, said):
    own = (f"--fail-after=1,{kind}",)
    done = run_hosts(tmp_path, 2, "", *arguments_of(tmp_path / "run"), own=own)
    (first, text), (last, own_text) = done
    assert last == code and first != 0
    assert gone_lines(text) == [f"{GONE}process 1: {said}"]
    assert gone_lines(own_text) == [] and "no such thing" in own_text


@pytest.mark.parametrize(
    "given",
    [
        {"COORDINATOR": "127.0.0.1:1"},
        {"COORDINATOR": "127.0.0.1:1", "NUM_PROCESSES": "2"},
        {"COORDINATOR": "127.0.0.1", "NUM_PROCESSES": "2", "PROCESS_ID": "0"},
        {"COORDINATOR": "127.0.0.1:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
        {"COORDINATOR": "127.0.0.1:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"},
        {"NUM_PROCESSES": "2", "PROCESS_ID": "0"},
    ],
)
def test_half_an_address_is_refused(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(f"SCOPE_JAX_{name}", value)
    with pytest.raises(InputError, match="several hosts need SCOPE_JAX_COORDINATOR=auto, or HOST"):
        join_hosts()


def test_nobody_to_join_is_one_line(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address\nshould be defined.")

    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    monkeypatch.setenv("SCOPE_JAX_COORDINATOR", "auto")
    message = "SCOPE_JAX_COORDINATOR=auto: cannot join: coordinator_address should be defined."
    with pytest.raises(InputError, match=message):
        join_hosts()


# --- Metrics ----------------------------------------------------------------------------------


def test_metrics_of_all_hosts_as_arithmetic(monkeypatch):
    mine = {
        "reward": np.float32(0.5), "policy_tokens": np.int64(10), "recompiles": 0,
        "corrections/made": 3, "corrections/correct_share": 0.5, "corrections/first_error": 2.0,
        "prm/agreement": 0.0, "prm/scored": 0, "seconds/step": 2.0, "tokens_per_s/sample": 5.0,
    }  # fmt: skip
    other = {
        "reward": 0.25, "policy_tokens": 7, "recompiles": 1,
        "corrections/made": 1, "corrections/correct_share": 0.1, "corrections/first_error": 0.0,
        "prm/agreement": 0.0, "prm/scored": 0, "seconds/step": 3.0, "tokens_per_s/sample": 4.0,
    }  # fmt: skip
    assert metrics.over_hosts(mine) is mine  # one process
    monkeypatch.setattr(metrics.jax, "process_count", lambda: 2)
    monkeypatch.setattr(metrics, "all_hosts", lambda own: json.loads(json.dumps([own, other])))
    assert metrics.over_hosts(mine) == {
        "reward": (0.5 + 0.25) / 2, "policy_tokens": 10 + 7, "recompiles": 1,
        "corrections/made": 3 + 1, "corrections/correct_share": (3 * 0.5 + 1 * 0.1) / 4,
        "corrections/first_error": (3 * 2.0 + 1 * 0.0) / 4,
        "prm/agreement": 0.0, "prm/scored": 0, "seconds/step": 3.0, "tokens_per_s/sample": 5.0 + 4,
    }  # fmt: skip
