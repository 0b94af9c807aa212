"""Tests of the teachers: whose end token closes a text, and where a worked solution takes over."""

import jax
import numpy as np
import pytest

from scope_jax.records import PAD, POLICY, CorrectionRequests, Rollouts
from scope_jax.teachers import dataset_teacher, model_teacher

POLICY_EOS, TEACHER_EOS = 0, 9


class Characters:
    """The tokenizer whose ids are code points."""

    all_special_tokens = ()

    def decode(self, ids, *, clean_up_tokenization_spaces=False):
        assert not clean_up_tokenization_spaces
        return "".join(map(chr, ids))

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return list(map(ord, text))


def requests(prefixes, budgets, records):
    """CorrectionRequests of rows of text; what lies after a prefix is not to be read."""
    width = max(map(len, prefixes)) + 2
    prefix_ids = np.full((len(prefixes), width), ord("7"), np.int32)
    for row, prefix in enumerate(prefixes):
        prefix_ids[row, : len(prefix)] = list(map(ord, prefix))
    return CorrectionRequests(
        prompt_ids=np.ones((len(prefixes), 1), np.int32),
        prompt_mask=np.ones((len(prefixes), 1), bool),
        prefix_ids=prefix_ids,
        prefix_length=np.array([len(prefix) for prefix in prefixes], np.int32),
        budgets=np.array(budgets, np.int32),
        records=tuple(records),
    )


# --- A model --------------------------------------------------------------------------------------


def test_model_teacher_writes_the_policy_s_end_token_for_its_own():
    ids = np.array(
        [
            [3, TEACHER_EOS, 0, 0],
            [3, 4, 5, 6],
            [4, 5, 6, TEACHER_EOS],
            [0] * 4,
            [TEACHER_EOS, 0, 0, 0],
        ]
    )
    mask = np.arange(4) < np.array([2, 4, 4, 0, 1])[:, None]
    logps = np.where(mask, -0.5, 0.0).astype(np.float32)
    asked = []

    def continue_fn(*arguments):
        asked.append(arguments)
        return Rollouts(
            prompt_ids=None, prompt_mask=None,
            completion_ids=jax.device_put(ids), completion_mask=jax.device_put(mask),
            token_source=np.where(mask, POLICY, PAD), logps=logps, sampling_logps=logps,
            finished=np.array([True, False, True, False, True]),
        )  # fmt: skip

    given, key = requests(["a"] * 5, [4] * 5, [{}] * 5), jax.random.key(0)
    written = model_teacher(continue_fn, policy_eos_id=7)(given, key)
    assert written.ids.tolist() == [[3, 7, 0, 0], [3, 4, 5, 6], [4, 5, 6, 7], [0] * 4, [7, 0, 0, 0]]
    assert written.stopped.tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(written.mask, mask)
    np.testing.assert_array_equal(written.logps, logps)
    assert len(asked) == 1 and asked[0][0] is given and asked[0][1] is key


def test_a_row_that_a_stop_string_ended_keeps_its_last_token():
    ids, mask = np.array([[3, 5], [3, TEACHER_EOS], [3, 5]]), np.ones((3, 2), bool)
    finished = np.array([True, True, False])
    rollouts = Rollouts(None, None, ids, mask, mask, mask, mask, finished)
    given = requests(["a"] * 3, [2] * 3, [{}] * 3)
    teach = model_teacher(lambda *_: rollouts, policy_eos_id=7, eos_ids=(TEACHER_EOS, 8))
    written = teach(given, jax.random.key(0))
    assert written.ids.tolist() == [[3, 5], [3, 7], [3, 5]]
    assert written.stopped.tolist() == finished.tolist()


# --- A worked solution ----------------------------------------------------------------------------

CLIPS = "In May 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"
FIRST, SECOND, ANSWER = "In May 48/2 = 24 clips.", "In all 48+24 = 72 clips.", "#### 72"


def write(prefixes, budgets, solutions, max_new_tokens=80):
    """Returns (texts without the end token, ends with the policy's?, the continuations)."""
    teach = dataset_teacher(Characters(), policy_eos_id=POLICY_EOS, max_new_tokens=max_new_tokens)
    records = [{} if solution is None else {"solution": solution} for solution in solutions]
    written = teach(requests(prefixes, budgets, records), jax.random.key(0))
    assert (
        written.ids.shape
        == written.mask.shape
        == written.logps.shape
        == (len(prefixes), max_new_tokens)
    )
    assert (np.sort(~written.mask, axis=1) == ~written.mask).all()
    assert (written.ids[~written.mask] == 0).all() and (written.logps == 0).all()
    rows = [ids[mask].tolist() for ids, mask in zip(written.ids, written.mask, strict=True)]
    closed = [bool(row) and row[-1] == POLICY_EOS for row in rows]
    texts = [
        "".join(map(chr, row[:-1] if end else row)) for row, end in zip(rows, closed, strict=True)
    ]
    assert written.stopped.tolist() == closed
    return texts, closed


def test_dataset_teacher_writes_what_the_prefix_lacks_and_closes_it():
    texts, closed = write(["", "May: 24\n", "May: 24. All: 72\n"], [80] * 3, [CLIPS] * 3)
    assert texts == [f"{FIRST}\n{SECOND}\n{ANSWER}", f"{SECOND}\n{ANSWER}", ANSWER]
    assert closed == [True] * 3


def test_tokens_after_the_prefix_are_not_read():
    # `requests` fills them with "7": a prefix "2" would read as 277
    texts, _ = write(["May: 24\nAll: 2"], [80], ["a = 24\nb = 2\n#### 2"])
    assert texts == ["#### 2"]


def test_solution_and_end_token_must_fit_the_budget():
    whole = len(ANSWER) + 1  # with the end token
    prefix = "24 and 72"
    texts, closed = write([prefix] * 4, [whole, whole - 1, 3, 0], [CLIPS] * 4)
    assert texts == [ANSWER, ANSWER, ANSWER[:3], ""]
    assert closed == [True, False, False, False]


def test_budget_beyond_the_buffer_is_the_buffer_s():
    texts, closed = write(
        ["24 and 72", ""], [80, 80], [CLIPS, "#### 7"], max_new_tokens=len(ANSWER)
    )
    assert texts == [ANSWER, "#### 7"]
    assert closed == [False, True]


@pytest.mark.parametrize("solution", [None, ""])
def test_record_without_a_solution_gives_nothing(solution):
    assert write(["24"], [80], [solution]) == ([""], [False])
