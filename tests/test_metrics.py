import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.metrics import (
    CompileCounter,
    Timer,
    Writer,
    correction_metrics,
    learning_metrics,
    mean_diversity,
    reward_metrics,
    rollout_records,
)
from scope_jax.records import POLICY, TEACHER


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
