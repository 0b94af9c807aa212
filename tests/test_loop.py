"""The loop beside its repairs: overlap, the teacher's budget, whole traces, the user's hook."""

import json
import sys

import jax
import numpy as np
import pytest
from test_train import WORKSHEET, run, training_rows

from scope_jax import train as train_module
from scope_jax.configlib import load_config
from scope_jax.records import InputError
from scope_jax.roles import check_options, make_meshes

STEPS = "--config.total_steps=3"


class InTurn:
    """`Pending` without a thread: its work is done where it is started."""

    def __init__(self, timer, phase, fn, *args):  # noqa: ARG002
        self.result = fn(*args)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.result, dtype)


def test_a_step_is_the_same_whether_its_answers_are_verified_beside_it_or_in_turn(
    tmp_path, monkeypatch
):
    beside = run(tmp_path / "beside", STEPS)
    monkeypatch.setattr(train_module, "Pending", InTurn)
    in_turn = run(tmp_path / "in_turn", STEPS)
    jax.tree.map(np.testing.assert_array_equal, beside, in_turn)
    assert training_rows(tmp_path / "beside") == training_rows(tmp_path / "in_turn")


def test_the_teacher_gets_its_share_of_the_groups(tmp_path):
    many = ("--config.locate.locator=zero", "--config.select.min_prefix_steps=0")
    many += ("--config.select.require_finished=False", STEPS, "--config.reward.solved_at=2.0")
    many += ("--config.correct.insert=append", "--config.learn.mini_batches=1")
    # so every rollout of every group may be repaired
    run(tmp_path / "all", *many)
    budget = ("share=1.0", "share_end=0.25", "over_steps=2")
    run(tmp_path / "less", *many, *(f"--config.teacher_budget.{text}" for text in budget))
    made = lambda name: [row["corrections/made"] for row in training_rows(tmp_path / name)]  # noqa: E731
    assert made("all") == [8, 8, 8]
    assert made("less") == [8, round(0.625 * 8), 2]


@pytest.mark.parametrize("insert", ["replace_source", "append"])
def test_where_nothing_could_be_repaired_a_whole_trace_stands_in(tmp_path, insert):
    options = ("--config.locate.tau=0.0", "--config.learn.mini_batches=1", STEPS)
    options += (f"--config.correct.insert={insert}", "--config.log.rollouts_every=1")
    run(tmp_path, *options, "--config.correct.fallback=whole_trace")
    found = training_rows(tmp_path)
    assert all(row["corrections/made"] == 0 for row in found)  # tau 0: no error is ever found
    assert sum(row["corrections/whole_traces"] for row in found) > 0
    assert all(row["corrections/whole_traces"] == row["corrections/accepted"] for row in found)
    assert sum(row["teacher_tokens"] for row in found) > 0
    lines = [
        json.loads(line)
        for file in (tmp_path / "rollouts").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    traces = [line for line in lines if "correction" in line]
    assert traces and all(line["kept_prefix"] == "" for line in traces)
    assert all(line["reward_after"] == 1.0 for line in traces)  # they were verified, too


def test_a_hook_sees_every_step_and_may_log(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(
        "seen = []\n"
        "def after_step(step, metrics):\n"
        "    seen.append((step, metrics['reward']))\n"
        "    return {'mine/step': 10 * step} if step > 1 else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tmp_path / "run", STEPS, "--config.hooks.after_step=my_hooks:after_step")
    found = training_rows(tmp_path / "run")
    assert [row.get("mine/step") for row in found] == [None, 20, 30]
    seen = sys.modules["my_hooks"].seen
    assert seen == [(row["step"], pytest.approx(row["reward"])) for row in found]


@pytest.mark.parametrize(
    "options, words",
    [
        (["teacher_budget.share=1.5"], "teacher_budget.share is a share"),
        (["correct.fallback=luffy"], "none of none, whole_trace"),
        (["refill.all_wrong=keep"], "none of refill, repair"),
        (["refill.all_wrong=repair", "refill.rounds=1", "correct.n_correct=0"], "needs repairs"),
    ],
)
def test_options_of_the_loop_that_cannot_be_are_refused(options, words):
    config = load_config(WORKSHEET, [f"--config.{option}" for option in options])
    with pytest.raises(InputError, match=words):
        check_options(config, make_meshes(**config.mesh)[0])
