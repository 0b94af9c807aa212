import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from scope_jax import metrics
from scope_jax.metrics import (
    CompileCounter,
    Timer,
    Writer,
    correction_metrics,
    learning_metrics,
    mean_diversity,
    reward_metrics,
    rollout_records,
    runs,
)
from scope_jax.records import POLICY, TEACHER, InputError


class Characters:
    """A tokenizer whose ids are code points."""

    @staticmethod
    def decode(ids) -> str:
        return "".join(map(chr, ids))


def test_metrics_are_one_json_object_a_step_and_numbers_json_cannot_hold_are_null(tmp_path):
    writer = Writer(tmp_path)
    writer.write(1, {"loss": np.float32(0.5), "kl": float("nan"), "made": 3})
    writer.write(2, {"loss": float("inf")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert strict == [{"step": 1, "loss": 0.5, "kl": None, "made": 3.0}, {"step": 2, "loss": None}]
    writer.finish({}, 0)


def test_lines_after_the_checkpoint_and_a_torn_line_are_dropped_on_resume(tmp_path):
    whole = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 5, "lo')
    Writer(tmp_path, start_step=3).finish({}, 0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_the_progress_line_shows_what_a_step_did(tmp_path, capsys):
    writer = Writer(tmp_path)
    writer.step(7, {"reward": 0.25, "corrections/made": 4, "corrections/accepted": 3})
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["step", "reward", "solved", "signal"]
    assert line.split()[:3] == ["7", "0.250", "-"] and "3/4" in line
    writer.finish({}, 0)


def test_the_end_table_compares_before_and_after(tmp_path, capsys):
    writer = Writer(tmp_path)
    writer.step(1, {"corrections/made": 4, "corrections/accepted": 3, "seconds/step": 2.0})
    for step, right in ((0, 0.25), (1, 0.75)):
        writer.evaluation(step, results := {"eval/pass@1": right, "eval/k": 8.0})
    writer.finish(results, 0)
    printed = capsys.readouterr().out
    assert "0.250" in printed and "0.750" in printed and "+0.500" in printed
    assert "3 / 4 (75%)" in printed and "recompilations after warm-up" in printed


def test_a_writer_takes_up_what_the_run_wrote_before(tmp_path, capsys):
    writer = Writer(tmp_path)
    writer.evaluation(0, {"eval/pass@1": 0.25, "eval/k": 8.0})
    for step in (1, 2, 3):
        writer.step(step, {"grad_norm": step / 2, "skipped": 0, "seconds/step": 4.0})
        writer.rollouts(step, {"record": np.zeros(0)}, None, [], Characters, groups=0)
    assert (writer.before["eval/pass@1"], writer.evaluated) == (0.25, 0)
    writer.finish({}, 0)
    again = Writer(tmp_path, start_step=2)
    assert again.recent == [{"step": s, "grad_norm": s / 2, "skipped": 0} for s in (1, 2)]
    assert (again.before["eval/pass@1"], again.evaluated) == (0.25, 0)
    assert [p.name for p in sorted((tmp_path / "rollouts").iterdir())][-1] == "step_000002.jsonl"
    again.evaluation(2, results := {"eval/pass@1": 0.5, "eval/k": 8.0})
    capsys.readouterr()
    again.finish(results, 0)
    printed = capsys.readouterr().out
    assert "+0.250" in printed and "seconds per step              4.00" in printed


def test_timers_add_up_and_give_speeds():
    timer = Timer()
    timer.seconds["sample"] = 2.0
    assert timer.flush(sample=10, teach=5) == {"seconds/sample": 2.0, "tokens_per_s/sample": 5.0}
    with timer("update"):
        pass
    assert set(timer.flush()) == {"seconds/update"}


def test_compilations_are_counted_and_cached_calls_are_not():
    counter = CompileCounter()
    fn = jax.jit(lambda x: x * 3 + 1)
    two, three = jnp.ones(2), jnp.ones(3)
    start = counter.count
    fn(two)
    fn(two)
    assert counter.count == start + 1
    fn(three)
    assert counter.count == start + 2


def test_hostile_completions_stay_data_in_the_rollout_files(tmp_path):
    text = '<script>alert(1)</script>\n"}\x00\ud800 {"step": 9}'
    ids = np.array([[ord(c) for c in text]])
    rows = {
        "record": np.array([0]), "ids": ids, "mask": np.ones_like(ids, bool),
        "rewards": np.zeros(1), "finished": np.ones(1, bool),
    }  # fmt: skip
    problem = {"id": "a", "problem": "p", "gold": "g"}
    writer = Writer(tmp_path)
    writer.rollouts(3, rows, None, [problem], Characters, groups=1)
    writer.finish({}, 0)
    (line,) = (tmp_path / "rollouts" / "step_000003.jsonl").read_text().splitlines()
    assert json.loads(line)["completion"] == text


def test_rollout_records_show_prefix_and_correction():
    ids = np.array([[ord(c) for c in "ab\ncd"]])
    rows = {
        "record": np.array([0]), "ids": ids, "mask": np.ones_like(ids, bool),
        "rewards": np.zeros(1), "finished": np.ones(1, bool),
    }  # fmt: skip
    fixed = {
        "ids": np.array([[ord(c) for c in "ab\nxy"]]), "rewards": np.ones(1),
        "source": np.array([[POLICY] * 3 + [TEACHER] * 2]),
    }  # fmt: skip
    ends, mask, scores = np.array([[3, 5]]), np.ones((1, 2), bool), np.array([[0.9, 0.1]])
    trace = (ends, mask, scores, np.array([1]), np.array([0]), np.array([True]), fixed)
    problem = {"id": "a", "problem": "p", "gold": "g"}
    (record,) = rollout_records(3, rows, trace, [problem], Characters, 1)
    assert record["steps"] == ["ab\n", "cd"] and record["first_error"] == 1
    assert (record["kept_prefix"], record["correction"]) == ("ab\n", "xy")
    assert record["reward_after"] == 1.0


def test_correction_metrics_as_arithmetic():
    first_error = np.array([2, -1, 0, 1])
    chosen, is_real = np.array([0, 3]), np.array([True, False])
    step_mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    wrong = np.array([True, False, False, True])
    plan = (first_error, chosen, is_real)
    metrics = correction_metrics(plan, np.array([True, False]), step_mask, wrong)
    assert metrics["corrections/made"] == 1 and metrics["corrections/accepted"] == 1
    assert metrics["corrections/correct_share"] == 2 / 4  # cut before step 2 of 4
    assert metrics["corrections/first_error"] == 2.0
    assert metrics["prm/agreement"] == (1 + 1 + 0) / 3  # the unscored row has no verdict
    assert metrics["prm/unscored"] == 1


def test_reward_metrics_as_arithmetic():
    assert reward_metrics(np.array([1.0, 0.5, 0.0, 1.0]), 1.0) == {
        "reward": 2.5 / 4,
        "solve_rate": 0.5,
    }


def test_learning_metrics_are_means_over_updates_but_for_the_samplers_gap():
    infos = [{"loss": 1.0, "skipped": 0, "log_ratio_max": 0.25}]
    infos += [{"loss": 3.0, "skipped": 1, "log_ratio_max": 0.75}]
    found = learning_metrics(infos, [[0.5, -0.5], [0.0, 0.0], [0.0, 0.0], [0.25, 0.0]])
    assert found["loss"] == 2.0 and found["skipped"] == 1
    assert found["logp_gap"] == 0.25  # of the first update: the weights that sampled
    assert found["groups_with_signal"] == 2 / 4


def test_diversity_is_averaged_over_groups():
    same, other = ["a b c d e", "a b c d e"], ["a b c d e", "f g h i j"]
    mean = mean_diversity([*same, *other], 2)["diversity/distinct_1"]
    assert mean == (5 / 10 + 10 / 10) / 2


# ------------------------------------------------------------------------------ the report


def test_a_report_is_written_at_evaluations_and_at_the_end(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    written = []

    def write(workdir):
        written.append((clock[0], workdir))
        clock[0] += 3.0  # seconds that it takes

    monkeypatch.setattr(metrics, "write_report", write)
    writer = Writer(tmp_path)
    for now in (10.0, 20.0, 72.0, 74.0, 80.0):
        clock[0] = now
        writer.evaluation(1, results := {"eval/pass@1": 0.5, "eval/k": 8.0})
    writer.finish(results, 0)
    # After a report the next one waits for 3 s / 0.05 = 60 s, but the last one comes.
    assert written == [(10.0, tmp_path), (74.0, tmp_path), (80.0, tmp_path)]


def test_a_report_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "write_report", lambda _: 1 / 0)
    writer = Writer(tmp_path)
    writer.evaluation(0, results := {"eval/pass@1": 0.5, "eval/k": 8.0})
    writer.finish(results, 0)
    assert "report.html could not be written: ZeroDivisionError" in capsys.readouterr().out


def test_the_report_of_a_run_holds_its_curves(tmp_path):
    writer = Writer(tmp_path)
    writer.evaluation(0, {"eval/pass@1": 0.25, "eval/k": 8.0})
    writer.evaluation(1, results := {"eval/pass@1": 0.75, "eval/k": 8.0})
    writer.finish(results, 0)
    assert "[[0.0,0.25],[1.0,0.75]]" in (tmp_path / "report.html").read_text()


def appended_rows():
    """A group of two whose second row was repaired in a slot beside it, and one without repairs."""
    text = [[ord(c) for c in t] for t in ("ab", "cd", "ce", "ab", "fg", "\0\0")]
    mask = np.array([[True] * 2] * 5 + [[False] * 2])
    trained = {
        "record": np.array([0, 0, 0, 1, 1, 1]), "ids": np.array(text), "mask": mask,
        "source": np.array([[1, 1], [1, 1], [1, 2], [1, 1], [1, 1], [0, 0]]),
        "row_mask": np.array([True] * 5 + [False]),
        "advantages": np.array([[0.1] * 2, [-0.2] * 2, [0.3, 0.4], [0.5] * 2, [0.6] * 2, [0] * 2]),
    }  # fmt: skip
    sampled = [0, 1, 3, 4]
    rows = {key: trained[key][sampled] for key in ("record", "ids", "mask")}
    rows |= {"rewards": np.zeros(4), "finished": np.ones(4, bool)}
    fixed = {"ids": np.array(text[2:3]), "source": trained["source"][2:3], "rewards": np.ones(1)}
    ends, steps = np.array([[1, 2]] * 4), np.ones((4, 2), bool)
    trace = (ends, steps, np.ones((4, 2)), np.ones(4, int), np.array([1]), np.array([True]), fixed)
    return rows, trace, trained


def test_records_have_the_advantages_of_the_rows_that_were_trained_on():
    rows, trace, trained = appended_rows()
    problems = [{"id": i, "problem": "p", "gold": "g"} for i in "xy"]
    records = rollout_records(1, rows, trace, problems, Characters, 2, trained)
    assert [r["advantages"] for r in records] == [[[0.1, 2]], [[-0.2, 2]], [[0.5, 2]], [[0.6, 2]]]
    assert [(r["group"], r["slot"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert records[1]["repair"] == {
        "kept": 1, "tokens": ["e"], "source": [[1, 1], [2, 1]], "advantages": [[0.3, 1], [0.4, 1]]
    }  # fmt: skip
    assert all("repair" not in records[i] for i in (0, 2, 3))
    trained["logps_after"] = -trained["advantages"]
    records = rollout_records(1, rows, trace, problems, Characters, 2, trained)
    assert [r["logps_after"][0] for r in records] == [-0.1, 0.2, -0.5, -0.6]
    assert records[1]["repair"]["logps_after"] == [-0.3, -0.4]


def test_records_of_rows_whose_update_is_not_known_have_no_advantages():
    rows, trace, trained = appended_rows()
    del trained["advantages"]  # a step whose update was skipped
    problems = [{"id": i, "problem": "p", "gold": "g"} for i in "xy"]
    for known in (trained, None):
        records = rollout_records(1, rows, trace, problems, Characters, 2, known)
        assert not any("advantages" in r | r.get("repair", {}) for r in records)


def test_runs_tell_a_sequence():
    rng = np.random.default_rng(0)
    for length in range(20):
        values = rng.integers(0, 3, length).tolist()
        told = runs(values)
        assert [value for value, count in told for _ in range(count)] == values
        assert all(a[0] != b[0] for a, b in zip(told, told[1:], strict=False))


# ------------------------------------------------------------------------------ terminal, trackers


def test_a_terminal_shows_the_phase_and_a_pipe_does_not(tmp_path, monkeypatch):
    shown = {}
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=100)
        monkeypatch.setattr(metrics, "Console", lambda console=console, **_: console)
        writer, timer = Writer(tmp_path, 3, total_steps=10), Timer()
        with writer.watching(4, timer), timer("teach"):
            if writer._progress:
                writer._progress.refresh()
        writer.step(4, {"reward": 0.25})
        writer.finish({}, 0)
        shown[terminal] = file.getvalue()
    assert "3/10" in shown[True] and "teach" in shown[True].replace("teach t/s", "")
    assert "\x1b" not in shown[False] and "/10" not in shown[False]
    assert shown[True].endswith("\n") and "0.250" in shown[True] and "0.250" in shown[False]


class FakeTracker(types.ModuleType):
    """Has the calls of wandb and trackio that the Writer makes."""

    def __init__(self, fails=False):
        super().__init__("tracker")
        self.calls, self.fails = [], fails

    def init(self, **options):
        self.calls.append(("init", options))

    def log(self, row, step):
        self.calls.append(("log", step, row))
        if self.fails:
            raise ConnectionError("no route")

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row_and_a_resumed_run_goes_on_in_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, tracker := FakeTracker())
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for start in (0, 1):
        writer = Writer(tmp_path, start, tracker=name)
        writer.step(start + 1, {"reward": 0.5, "kl": float("nan")})
        writer.finish({}, 0)
    (_, first), *logged = tracker.calls
    assert first["config"] == {"seed": 3} and first["project"] == "scope_jax"
    assert logged[:2] == [("log", 1, {"reward": 0.5}), ("finish",)]
    assert logged[2] == ("init", first) and logged[3][1] == 2
    assert ("id" in first) == ("dir" in first) == (name == "wandb")


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", tracker := FakeTracker(fails=True))
    writer = Writer(tmp_path, tracker="wandb")
    for step in (1, 2):
        writer.step(step, {"reward": 0.5})
    writer.finish({}, 0)
    assert [call[0] for call in tracker.calls] == ["init", "log"]
    assert "ConnectionError" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)  # an import of it fails
    with pytest.raises(InputError, match="pip install trackio"):
        Writer(tmp_path, tracker="trackio")
    with pytest.raises(InputError, match="'tensorbored' is none of wandb, trackio"):
        Writer(tmp_path, tracker="tensorbored")


def test_just_the_steps_that_are_to_be_profiled_are_traced(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    for last in (6, 4):  # the second run ends within its profile
        writer, timer = Writer(tmp_path, profile_from=3, profile_steps=3), Timer()
        for step in range(1, last + 1):
            with writer.watching(step, timer):
                events.append(step)
        writer.finish({}, 0)
    folder = str(tmp_path / "profile")
    assert events == [1, 2, folder, 3, 4, 5, "stop", 6, 1, 2, folder, 3, 4, "stop"]


def test_a_profile_is_written(tmp_path):
    writer, timer = Writer(tmp_path, profile_from=1, profile_steps=1), Timer()
    with writer.watching(1, timer), timer("update"):
        jnp.ones(3).sum().block_until_ready()
    writer.finish({}, 0)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_that_would_crash_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: name)
    Writer(tmp_path, profile_from=1).finish({}, 0)  # JAX_PLATFORMS is set: conftest.py
    monkeypatch.delenv("JAX_PLATFORMS")
    Writer(tmp_path).finish({}, 0)
    with pytest.raises(InputError, match="JAX_PLATFORMS=cpu"):
        Writer(tmp_path, profile_from=1)
