"""Tests of Monte-Carlo step labels: rates against a plain twin, and labels of a shipped policy."""

import collections
import json

import numpy as np
import pytest

from scope_jax import monte_carlo
from scope_jax.data import read_jsonl
from scope_jax.models.hf import load_tokenizer
from scope_jax.monte_carlo import label_problems, success_rates
from scope_jax.records import InputError, Rollouts
from scope_jax.step_labels import read_step_labels
from scope_jax.tasks import worksheet

POLICY = "scope_jax/tasks/worksheet_models/policy"
RIGHT, WRONG = 1, 2  # ids of a scripted policy's last token
TRIES = 4


def rollouts(rows):
    ids = np.full((len(rows), 8), 9, np.int32)
    mask = np.arange(8) < np.array([len(row) for row in rows])[:, None]
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    none = np.zeros(ids.shape, np.float32)
    return Rollouts(
        prompt_ids=None, prompt_mask=None, completion_ids=ids, completion_mask=mask,
        token_source=none, logps=none, sampling_logps=none, finished=np.ones(len(rows), bool),
    )  # fmt: skip


# Three solutions of 3, 2 and 1 steps, one that did not finish, and how many of 4 tries succeed.
ROWS = [[10, 11, 12, 13, RIGHT], [20, 21, 22, WRONG], [30, RIGHT], [40, 41]]
ENDS = np.array([[1, 3, 5], [2, 4, 0], [2, 0, 0], [1, 2, 0]], np.int32)
STEPS = np.array([[True] * 3, [True, True, False], [True, False, False], [False] * 3])
REWARDS = np.array([1.0, 0.0, 1.0, 1.0])
SUCCESSES = {(10,): 3, (10, 11, 12): 4, (20, 21): 1}


class Scripted:
    """Continues a known prefix with RIGHT so many times of 4, else with WRONG."""

    def __init__(self, rows):
        self.rows, self.calls, self.done = rows, [], collections.Counter()

    def continue_fn(self, index, prefix, call):
        assert index.shape == prefix.shape == (self.rows,) and call == len(self.calls)
        self.calls.append((index.tolist(), prefix.tolist()))
        ids, mask = np.full((self.rows, 3), 9, np.int32), np.zeros((self.rows, 3), bool)
        for n, (i, length) in enumerate(zip(index, prefix, strict=True)):
            if length:
                known = tuple(ROWS[i][:length])
                right = self.done[known] < SUCCESSES[known]
                self.done[known] += 1
                ids[n, :2], mask[n, :2] = [77, RIGHT if right else WRONG], True
        return ids, mask

    def solved_fn(self, index, completions):
        assert len(index) == len(completions)
        for i, ids in zip(index, completions, strict=True):
            kept = ids[: ids.index(77)]
            assert tuple(kept) in SUCCESSES and kept == ROWS[i][: len(kept)]
            assert 9 not in ids  # nothing behind a mask
        return np.array([ids[-1] == RIGHT for ids in completions])


def rates(rows):
    script = Scripted(rows)
    found = success_rates(
        rollouts(ROWS).completion_ids, REWARDS, ENDS, STEPS, script.continue_fn, script.solved_fn,
        tries=TRIES, rows=rows,
    )  # fmt: skip
    return found, script


def slow_rates():
    """The specification: every prefix's share of successes; a whole solution's own verdict."""
    want = np.zeros(ENDS.shape)
    for i, row in enumerate(ROWS):
        for k in range(int(STEPS[i].sum())):
            last = k == STEPS[i].sum() - 1
            prefix = tuple(row[: ENDS[i, k]])
            want[i, k] = REWARDS[i] if last else SUCCESSES[prefix] / TRIES
    return want


def test_rates_are_the_share_of_continuations_that_are_right():
    found, _ = rates(rows=12)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[3 / 4, 4 / 4, 1], [1 / 4, 0, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(found, slow_rates())


def test_every_prefix_of_a_finished_solution_is_tried_and_no_other():
    _, script = rates(rows=12)
    # 2 + 1 + 0 prefixes of 4 tries fill one call of 12; the unfinished row 3 is never continued
    assert script.calls == [([0] * 8 + [1] * 4, [1] * 4 + [3] * 4 + [2] * 4)]
    assert script.done == {(10,): 4, (10, 11, 12): 4, (20, 21): 4}


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 16])
def test_batches_that_do_not_divide_change_nothing(rows):
    found, script = rates(rows)
    np.testing.assert_allclose(found, slow_rates())
    assert len(script.calls) == -(-12 // rows)
    assert sum(length > 0 for _, prefix in script.calls for length in prefix) == 12


def test_solutions_of_one_step_need_no_continuation():
    script = Scripted(4)
    found = success_rates(
        rollouts(ROWS[2:3]).completion_ids, [0.0], ENDS[2:3], STEPS[2:3], script.continue_fn,
        script.solved_fn, tries=2, rows=4,
    )  # fmt: skip
    assert found.tolist() == [[0, 0, 0]] and script.calls == []


# --- A real policy: the package's worksheet solver ------------------------------------------------


def test_labels_of_a_policy_are_written_in_trls_layout(tmp_path, monkeypatch):
    sheets = [worksheet.problems("train", n=3, ood_n=5, seed=0)[i]["gold"] for i in range(3)]
    data = tmp_path / "problems.jsonl"
    lines = [json.dumps({"problem": sheet, "answer": sheet}) for sheet in sheets]
    data.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(  # not math-verify: the sheet's own rule, which is given the sheet as gold
        monte_carlo, "score_completions",
        lambda _, golds, texts: list(map(worksheet.verify, golds, texts)),
    )  # fmt: skip
    out, said = tmp_path / "labels.jsonl", []
    label_problems(
        POLICY, data, out, problems=3, samples=2, tries=2, max_new_tokens=24, splitter="\n",
        seed=0, prompt_length=16, rows=4, say=said.append,
    )  # fmt: skip
    rows = list(read_jsonl(out))
    assert 0 < len(rows) <= 3 * 2 and len(said) == 2  # two problems fill four rows
    tokenizer, _ = load_tokenizer(POLICY)
    for row in rows:
        assert row["prompt"] in sheets
        assert len(row["completions"]) == len(row["labels"]) == len(row["success"])
        assert row["labels"] == [rate > 0 for rate in row["success"]]
        assert all(rate in (0.0, 0.5, 1.0) for rate in row["success"])
        assert all(text == text.strip() and text for text in row["completions"])
        solved = worksheet.verify(row["prompt"], "\n".join(row["completions"]))
        assert row["success"][-1] == solved
        assert tokenizer.eos_token not in "".join(row["completions"])
    assert [record["problem"] for record in read_step_labels(out, "trl")] == [
        row["prompt"] for row in rows
    ]
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(InputError, match="finished no solution") as error:
        label_problems(
            POLICY, data, tmp_path / "none.jsonl", problems=1, samples=2, tries=2,
            max_new_tokens=2, splitter="\n", seed=0, prompt_length=16, rows=4, say=said.append,
        )  # fmt: skip
    assert "\n" not in str(error.value) and not (tmp_path / "none.jsonl").exists()
