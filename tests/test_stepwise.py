"""Correction step by step: who writes what, when it stops, and the loop with it."""

import jax
import numpy as np
import pytest
from test_train import rows, run, training_rows

from scope_jax.configlib import load_config
from scope_jax.records import POLICY, TEACHER, Continuations, CorrectionRequests, InputError
from scope_jax.roles import teacher_stop
from scope_jax.splicing import splice_rollouts
from scope_jax.stepwise import correct_stepwise

EOS, LINE, T = 1, 9, 12  # a step is some tokens and LINE


def requests_of(prefixes, budgets=None):
    ids = np.zeros((len(prefixes), T), np.int32)
    for row, prefix in enumerate(prefixes):
        ids[row, : len(prefix)] = prefix
    lengths = np.array([len(prefix) for prefix in prefixes], np.int32)
    budgets = T - lengths if budgets is None else np.array(budgets)
    prompt = np.ones((len(prefixes), 2), np.int32)
    records = tuple({"problem": str(row)} for row in range(len(prefixes)))
    return CorrectionRequests(prompt, prompt > 0, ids, lengths, budgets.astype(np.int32), records)


class Writer:
    """Writes the next of a row's scripted texts, when it is asked; `asked` has what it saw."""

    def __init__(self, *scripts, logp=0.0):
        self.scripts, self.logp, self.asked = [list(s) for s in scripts], logp, []

    def __call__(self, requests, key):
        del key
        ids, mask = (np.zeros((len(self.scripts), T), t) for t in (np.int32, bool))
        stopped = np.zeros(len(self.scripts), bool)
        seen = {}
        for row in np.flatnonzero(requests.budgets > 0).tolist():
            seen[row] = requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
            text = self.scripts[row].pop(0)[: requests.budgets[row]]
            ids[row, : len(text)], mask[row, : len(text)] = text, True
            stopped[row] = bool(text) and text[-1] == EOS
        self.asked.append(seen)
        return Continuations(ids, mask, np.where(mask, self.logp, 0.0), stopped)


def first_end(ids, mask):
    """Where the first step of a row ends; an end token behind it belongs to it."""
    ends = []
    for row, real in zip(ids, mask, strict=True):
        text = row[real].tolist()
        end = text.index(LINE) + 1 if LINE in text else len(text)
        ends.append(end + (text[end:] == [EOS]))
    return np.array(ends)


def judge_of(bad):
    """Right is what holds no token of `bad`; a step is wrong from its beginning on."""

    def judge(requests, mask, ended):
        right, cut = np.zeros(len(mask), bool), np.full(len(mask), -1, np.int32)
        for row, real in enumerate(mask):
            text = requests.prefix_ids[row][real].tolist()
            wrong = [place for place, token in enumerate(text) if token in bad]
            right[row] = ended[row] and not wrong
            if wrong:
                before = [place + 1 for place in range(wrong[0]) if text[place] == LINE]
                cut[row] = before[-1] if before else 0
        return right, cut

    return judge


def correct(requests, teacher, policy, bad=(6, 7), max_rounds=4):
    written = correct_stepwise(
        requests, jax.random.key(0), teach=teacher, go_on=policy, first_end=first_end,
        judge=judge_of(bad), max_rounds=max_rounds, policy_eos_id=EOS,
    )  # fmt: skip
    texts = [row[real].tolist() for row, real in zip(written.ids, written.mask, strict=True)]
    who = [row[real].tolist() for row, real in zip(written.source, written.mask, strict=True)]
    assert not written.ids[~written.mask].any() and not written.source[~written.mask].any()
    return texts, who, written


def test_a_second_error_has_a_second_round():
    teacher = Writer([[2, LINE], [3, LINE]], logp=-7.0)
    policy = Writer([[4, LINE, 6, LINE, EOS], [5, LINE, EOS]], logp=-0.5)
    texts, who, written = correct(requests_of([[8, LINE]]), teacher, policy)
    assert texts == [[2, LINE, 4, LINE, 3, LINE, 5, LINE, EOS]]
    P, Q = POLICY, TEACHER
    assert who == [[Q, Q, P, P, Q, Q, P, P, P]]
    assert written.logps[0, :9].tolist() == [-7, -7, -0.5, -0.5, -7, -7, -0.5, -0.5, -0.5]
    assert written.stopped.tolist() == [True]
    assert written.counts == {"teacher/rounds": 2, "teacher/policy_tokens": 5 + 3}
    # Each is asked with exactly what stands before: the wrong step is gone.
    assert teacher.asked == [{0: [8, LINE]}, {0: [8, LINE, 2, LINE, 4, LINE]}]
    assert policy.asked[1] == {0: [8, LINE, 2, LINE, 4, LINE, 3, LINE]}


def test_only_the_teachers_first_step_counts():
    teacher, policy = Writer([[2, LINE, 3, LINE, EOS]]), Writer([[5, LINE, EOS]])
    texts, who, _ = correct(requests_of([[8, LINE]]), teacher, policy)
    assert texts == [[2, LINE, 5, LINE, EOS]] and who[0] == [2, 2, 1, 1, 1]


def test_a_teacher_that_ends_the_solution_leaves_nothing_to_the_policy():
    teacher, policy = Writer([[2, LINE, EOS]]), Writer([])
    texts, who, written = correct(requests_of([[8, LINE]]), teacher, policy)
    assert texts == [[2, LINE, EOS]] and who == [[TEACHER] * 3] and written.stopped[0]


def test_an_error_in_the_corrected_step_or_before_it_ends_the_rounds():
    teacher, policy = Writer([[6, LINE]] * 4), Writer([[5, LINE, EOS]] * 4)
    texts, _, written = correct(requests_of([[8, LINE]]), teacher, policy)
    assert texts == [[6, LINE, 5, LINE, EOS]] and written.counts["teacher/rounds"] == 1


def test_rounds_run_out():
    teacher, policy = Writer([[2, LINE]] * 4), Writer([[6, LINE, EOS]] * 4)
    texts, who, written = correct(requests_of([[8]]), teacher, policy, max_rounds=3)
    assert texts == [[2, LINE, 2, LINE, 2, LINE, 6, LINE, EOS]]
    assert who == [[TEACHER] * 6 + [POLICY] * 3] and written.counts["teacher/rounds"] == 3


def test_rows_are_open_each_for_itself_and_filling_rows_never():
    teacher = Writer([[2, LINE]], [[2, LINE], [3, LINE]], [[2]])
    policy = Writer([[4, LINE, EOS]], [[7, LINE, EOS], [4, EOS]], [])
    requests = requests_of([[8, LINE], [8], [8, 8]], budgets=[10, 11, 0])
    texts, _, written = correct(requests, teacher, policy)
    assert texts == [[2, LINE, 4, LINE, EOS], [2, LINE, 3, LINE, 4, EOS], []]
    assert written.stopped.tolist() == [True, True, False]
    assert [sorted(seen) for seen in teacher.asked] == [[0, 1], [1]]


def test_what_does_not_end_within_the_width_is_not_stopped():
    teacher, policy = Writer([[2, LINE]]), Writer([[4] * T])
    texts, _, written = correct(requests_of([[8] * 8]), teacher, policy)
    assert texts == [[2, LINE, 4, 4]] and not written.stopped[0]
    silent = Writer([[]])
    texts, _, written = correct(requests_of([[8]]), silent, Writer([]))
    assert texts == [[]] and not written.stopped[0]


def test_sources_of_a_continuation_are_spliced():
    ids, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), bool)
    new, real = np.array([[2, 3, 0]]), np.array([[True, True, False]])
    new_source = np.array([[TEACHER, POLICY, 0]], np.int8)
    columns = (ids, mask, np.full((1, 4), -1.0), np.array([1]), new, real, np.full((1, 3), -2.0))
    spliced = splice_rollouts(*columns, new_source, pad_id=0)
    assert spliced[0].tolist() == [[5, 2, 3, 0]]
    assert spliced[2].tolist() == [[POLICY, TEACHER, POLICY, 0]]
    assert splice_rollouts(*columns, pad_id=0)[2].tolist() == [[POLICY, TEACHER, TEACHER, 0]]


def test_a_literal_separator_ends_what_the_teacher_writes():
    stop = lambda *o: teacher_stop(load_config("worksheet", list(o)))  # noqa: E731
    assert stop() == () and stop("--config.method=scope_step") == ("\n",)
    assert stop("--config.method=scope_step", "--config.steps.splitter=Step k") == ()


@pytest.fixture(scope="module")
def stepwise_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("step") / "run"
    run(workdir, "--config.method=scope_step", "--config.total_steps=3")
    return workdir


def test_the_loop_writes_fewer_teacher_tokens(stepwise_run, tmp_path):
    steps = training_rows(stepwise_run)
    assert sum(row["corrections/accepted"] for row in steps) > 0
    # A line of the worksheet has five tokens; an end token may follow the last one.
    for row in steps:
        assert row["corrections/made"] <= row["teacher/rounds"]
        assert 0 < row["teacher_tokens"] <= 6 * row["teacher/rounds"]
        assert np.isfinite(row["loss"])
    del tmp_path
    assert all(row["recompiles"] == 0 for row in rows(stepwise_run) if "loss" in row)


def test_scope_is_one_of_two(tmp_path):
    with pytest.raises(InputError, match="correct.scope='whole' is none of suffix, step"):
        run(tmp_path / "run", "--config.correct.scope=whole")
