"""Tests of the teachers: whose end token closes a text, where a worked solution takes over, what a
hint changes, and every kind with either scope on the worksheet's own models.
"""

import jax
import numpy as np
import pytest
from test_endpoint import started_server
from test_train import rows, run

from scope_jax.configlib import load_config
from scope_jax.models.hf import load_hf
from scope_jax.records import PAD, POLICY, TEACHER, CorrectionRequests, InputError, Rollouts
from scope_jax.roles import (
    TEACHERS,
    check_options,
    describe,
    load_policy,
    load_scorer,
    load_teacher,
)
from scope_jax.run import teach_in_scope
from scope_jax.sampling import continue_from, decoding_layout
from scope_jax.sharding import put_batch
from scope_jax.splicing import splice
from scope_jax.tasks import ledger, worksheet
from scope_jax.teachers import (
    dataset_teacher,
    hinted_teacher,
    model_teacher,
    scripted_teacher,
    whole_trace_teacher,
)

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


# --- What the data set cannot give is counted -----------------------------------------------------


def given_texts(teach, prefixes, records, budgets=None):
    """Returns the texts that a teacher of characters wrote, what stopped, and the counts."""
    wanted = requests(prefixes, budgets or [80] * len(prefixes), records)
    before = wanted.prefix_ids.copy()
    written = teach(wanted, jax.random.key(0))
    np.testing.assert_array_equal(wanted.prefix_ids, before)
    pairs = zip(written.ids, written.mask, strict=True)
    texts = ["".join(map(chr, ids[mask])) for ids, mask in pairs]
    counts = {name.removeprefix("teacher/"): n for name, n in written.counts.items()}
    return texts, written.stopped.tolist(), counts


END = {"policy_eos_id": ord("$"), "max_new_tokens": 80}


@pytest.mark.parametrize("one_step", [False, True])
def test_rows_without_a_place_in_their_solution_are_counted_and_not_stopped(one_step):
    teach = dataset_teacher(Characters(), one_step=one_step, **END)
    prefixes = ["May: 24\n", "May: 99\n", "24, 72\n#### 72", "24", "x = 3\n\n", ""]
    solutions = [CLIPS, CLIPS, CLIPS, None, "y = 4\n\nz = 5", CLIPS]
    records = [{"solution": solution} for solution in solutions]
    texts, stopped, counts = given_texts(teach, prefixes, records, [80] * 5 + [0])
    rest = f"{SECOND}\n" if one_step else f"{SECOND}\n{ANSWER}$"
    assert texts == [rest, "", "", "", "", ""] and stopped == [True] + [False] * 5
    assert counts == {"unmatched": 2, "complete": 1, "no_solution": 1, "alignment_failed": 0}


def test_a_solution_that_the_tokenizer_cannot_show_is_counted():
    teach = dataset_teacher(Characters(), **END)
    texts, stopped, counts = given_texts(teach, [""], [{"solution": "x = \ufffd"}])
    assert texts == [""] and stopped == [False] and counts["alignment_failed"] == 1


def test_one_step_of_a_solution_has_no_end_token_unless_it_is_the_last():
    teach = dataset_teacher(Characters(), one_step=True, **END)
    record = {"solution": "x = 12\n\nso y = 34\n\nand z = 56"}
    prefixes = ["", "x = 12\n\n", "x = 12\n\ny = 34\n\n"]
    texts, stopped, _ = given_texts(teach, prefixes, [record] * 3)
    assert texts == ["x = 12\n\n", "so y = 34\n\n", "and z = 56$"] and all(stopped)
    texts, stopped, _ = given_texts(teach, prefixes, [record] * 3, [8, 7, 10])
    assert texts == ["x = 12\n\n", "so y = ", "and z = 56"] and stopped == [True, False, False]


def test_a_trace_in_r1_s_form():
    record = {"solution": "<think>\nx = 12\n\ny = 34\n</think>\n\nSo y = 34."}
    teach, asked = dataset_teacher(Characters(), **END), requests(["x = 12\n\n"], [80], [record])
    plain, stopped, counts = given_texts(teach, ["x = 12\n\n"], [record])
    assert plain == [""] and not stopped[0] and counts["unmatched"] == 1  # not in the answer
    texts, stopped, _ = given_texts(teach, ["<think>\nx = 12\n\n"], [record])
    assert texts == ["y = 34\n</think>\n\nSo y = 34.$"] and stopped == [True]
    prompt = np.array([list(map(ord, "Go. <think>\n"))])
    thinks = asked.replace(prompt_ids=prompt, prompt_mask=prompt > 0)
    written = teach(thinks, jax.random.key(0))
    assert "".join(map(chr, written.ids[0][written.mask[0]])) == texts[0]


# --- Whole traces and scripts ---------------------------------------------------------------------


def test_a_whole_trace_is_the_whole_solution_whatever_the_prefix():
    teach, whole = whole_trace_teacher(Characters(), **END), f"{FIRST}\n{SECOND}\n{ANSWER}$"
    records = [{"solution": text} for text in (CLIPS, CLIPS, None, CLIPS, "<think>a</think>b")]
    texts, stopped, counts = given_texts(
        teach, ["", "24\n", "", "", ""], records, [80] * 3 + [9, 80]
    )
    assert texts == [whole, whole, "", FIRST[:9], "b$"]
    assert stopped == [True, True, False, False, True]
    assert counts == {"no_solution": 1, "alignment_failed": 0}


def test_a_script_is_asked_for_the_rest_of_each_row_and_may_decline():
    asked = []

    def expert(record, prefix):
        asked.append((record["n"], prefix))
        return None if record["n"] == 2 else f"then {record['n']}" * record["n"]

    teach = scripted_teacher(expert, Characters(), **END)
    records = [{"n": n} for n in (1, 2, 3, 0)]
    texts, stopped, counts = given_texts(teach, ["a\n", "b\n", "", "d"], records, [80, 80, 0, 80])
    assert texts == ["then 1$", "", "", "$"] and stopped == [True, False, False, True]
    assert asked == [(1, "a\n"), (2, "b\n"), (0, "d")]
    assert counts == {"declined": 1, "alignment_failed": 0}


@pytest.mark.parametrize("task", [worksheet, ledger])
def test_the_tasks_experts_finish_every_right_beginning_and_no_wrong_one(task):
    problems, rng = task.problems("train", n=5), np.random.default_rng(0)
    for index in range(60):
        record = problems[index]
        lines = task.solution(record["problem"], rng).splitlines(keepends=True)  # another order
        kept = "".join(lines[: rng.integers(6)])
        rest = task.continue_solution(record, kept)
        assert task.verify(record["gold"], kept + rest)
        assert task.continue_solution(record, "") == record["solution"]
        wrong = kept + lines[-1][:-2] + str((int(lines[-1][-2]) + 1) % 10) + "\n"
        assert task.continue_solution(record, wrong) is None
        assert task.continue_solution(record, kept + "c5") is None  # unfinished
        assert task.continue_solution(record, "\0\n") is None


# --- The policy with a hint -----------------------------------------------------------------------

HINT = "({answer}) {problem}"


def hinted(continue_fn, **options):
    options = {"hint": HINT, "policy_eos_id": 7, "prompt_bucket": 24} | options
    return hinted_teacher(continue_fn, Characters(), lambda text: f"Q: {text}", **options)


def silent(requests, key, params):
    del key, params
    empty = np.zeros((len(requests.records), 4), bool)
    return Rollouts(None, None, empty * 1, empty, empty, empty * 1.0, empty * 1.0, empty[:, 0])


def test_only_the_teacher_s_prompt_holds_the_answer():
    asked = []
    given = requests(
        ["ab", "c", "d"], [9, 9, 0], [{"problem": "{answer}?", "gold": "{problem}"}] * 3
    )
    teach = hinted(lambda *a: asked.append(a) or silent(*a))
    written = teach(given, "key", "params")
    ((seen, key, params),) = asked
    assert (key, params) == ("key", "params")
    texts = [
        "".join(map(chr, ids[mask]))
        for ids, mask in zip(seen.prompt_ids, seen.prompt_mask, strict=True)
    ]
    assert texts == ["Q: ({problem}) {answer}?"] * 2 + ["\0"]  # nothing is filled in twice
    for name in ("prefix_ids", "prefix_length", "budgets"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(given, name))
    assert given.prompt_ids.shape == (3, 1) and seen.prompt_ids.shape == (3, 24)
    assert written.counts == {"teacher/alignment_failed": 0, "teacher/prompt_too_long": 0}
    assert written.source is None  # so all its tokens count as a teacher's


def test_a_hinted_prompt_that_does_not_fit_is_counted_and_not_continued():
    given = requests(["a", "b"], [9, 9], [{"problem": "p" * n, "gold": "g"} for n in (17, 18)])
    asked = []
    written = hinted(lambda *a: asked.append(a[0]) or silent(*a))(given, None, None)
    assert asked[0].budgets.tolist() == [9, 0] and asked[0].prompt_mask.any(1).all()
    assert written.counts["teacher/prompt_too_long"] == 1 and given.budgets.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("hint", "reason"),
    [("{problem}", "where {answer} goes"), ("{answer}", "where {problem} goes")]
    + [("{problem}{answer}\ufffd", "cannot write teacher.hint")],
)
def test_a_hint_without_its_places_is_refused(hint, reason):
    with pytest.raises(InputError) as error:
        hinted(silent, hint=hint)
    assert reason in str(error.value) and "\n" not in str(error.value)


# --- Every kind, with either scope ----------------------------------------------------------------

T = 24  # tokens of a completion, five a line


@pytest.fixture(scope="module")
def server():
    with started_server() as port:
        yield port


@pytest.fixture(scope="module")
def worksheet_policy():
    return load_policy(kind_config("model"))


def kind_config(kind, *overrides, scope="suffix", port=1):
    values = {"teacher.kind": kind, "correct.scope": scope, "locate.locator": "oracle"}
    values |= {"teacher.hint": "{answer}{problem}", "teacher.url": f"http://127.0.0.1:{port}/v1"}
    values |= {"teacher.model": "far", "sample.max_new_tokens": T}
    if kind == "endpoint":
        values["teacher.path"] = ""
    given = [f"--config.{name}={value}" for name, value in values.items()]
    return load_config("worksheet:n=3,runlocal", [*given, *overrides])


def cut_sheets(policy, count=8):
    """Rows of worksheets whose first line is right; what the policy wrote behind it is wrong."""
    records = [policy.problems("train")[i] for i in range(count)]
    prompts = policy.tokenize(records)
    ids, lengths = np.zeros((count, T), np.int32), np.zeros(count, np.int32)
    for row, record in enumerate(records):
        first = record["solution"].split("\n")[0] + "\n"
        kept = policy.tokenizer.encode(first, add_special_tokens=False)
        ids[row, : len(kept)], lengths[row] = kept, len(kept)
        ids[row, len(kept) :] = kept[0]
    budgets = np.where(np.arange(count) == count - 1, 0, T - lengths).astype(np.int32)
    return CorrectionRequests(prompts.ids, prompts.mask, ids, lengths, budgets, tuple(records))


@pytest.mark.parametrize("scope", ["suffix", "step"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_every_kind_writes_suffixes_and_single_steps(kind, scope, worksheet_policy, server):
    policy, params = worksheet_policy
    config = kind_config(kind, scope=scope, port=server)
    check_options(config, policy.mesh)
    plain = load_scorer(config, policy, params)
    scorer = lambda requests, key, params: plain(requests)  # noqa: E731, ARG005
    teach = teach_in_scope(config, policy, load_teacher(config, policy), scorer)
    given = cut_sheets(policy)
    before = jax.tree.map(np.copy, given)
    written = teach(given, jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, given, before)
    assert written.mask[:-1].any(1).sum() >= 6 and not written.mask[-1].any()
    assert not written.stopped[-1]
    source = written.source if written.source is not None else np.where(written.mask, TEACHER, PAD)
    assert (source[:, 0][written.mask[:, 0]] == TEACHER).all()
    if scope == "step":  # a line has five tokens, an end token may follow
        assert written.counts["teacher/rounds"] >= 6
        assert written.teacher_tokens() <= 6 * written.counts["teacher/rounds"]
        assert (source == POLICY).any() == (written.counts["teacher/policy_tokens"] > 0)
    else:
        assert written.teacher_tokens() == written.mask.sum()
    ids, mask, who, _ = splice(
        given.prefix_ids, np.ones((8, T), bool), given.prefix_length, written.ids, written.mask,
        pad_id=policy.pad_id, continuation_source=source,
    )  # fmt: skip
    for row, length in enumerate(given.prefix_length):
        np.testing.assert_array_equal(np.asarray(ids)[row, :length], given.prefix_ids[row, :length])
        assert (np.asarray(who)[row, :length] == POLICY).all()
    texts = [
        policy.tokenizer.decode(np.asarray(i)[m])
        for i, m in zip(ids, np.asarray(mask), strict=True)
    ]
    right = [
        worksheet.verify(r["gold"], t.removesuffix("<eos>"))
        for r, t in zip(given.records, texts, strict=True)
    ]
    if kind in ("dataset", "scripted") and scope == "suffix":
        assert right == written.stopped.tolist() == [True] * 7 + [False]


def test_the_hinted_policy_is_continue_from_with_its_own_prompt_and_the_weights_given(
    worksheet_policy,
):
    policy, params = worksheet_policy
    _, other = load_hf(
        "scope_jax/tasks/worksheet_models/teacher", mesh=policy.mesh, dtype="float32"
    )
    given = cut_sheets(policy)
    teach, key = load_teacher(kind_config("hinted_policy"), policy), jax.random.key(3)
    texts = [record["gold"] + record["problem"] for record in given.records]  # as its hint says
    hinted_ids = np.zeros((8, 30), np.int32)
    for row, text in enumerate(texts):
        prompt = policy.tokenizer.encode(text, add_special_tokens=False)
        hinted_ids[row, -len(prompt) :] = prompt
    columns = (hinted_ids, hinted_ids > 0, given.prefix_ids, given.prefix_length, given.budgets)
    *columns, budgets = put_batch(columns, policy.decode_mesh)
    drawn = []
    for weights in (params, other):
        expected = continue_from(
            *decoding_layout(policy.model, weights, policy.decode_mesh), *columns, key=key,
            max_new_tokens=budgets, buffer_length=T, **policy.ends,
        )  # fmt: skip
        written, mask = teach(given, key, weights), np.asarray(expected.completion_mask)
        np.testing.assert_array_equal(written.mask, mask)
        np.testing.assert_array_equal(written.ids[mask], np.asarray(expected.completion_ids)[mask])
        np.testing.assert_array_equal(written.stopped, np.asarray(expected.finished))
        drawn.append(written.ids[mask].tolist())
    assert drawn[0] != drawn[1]


def test_a_run_with_a_hinted_policy_compiles_nothing_after_its_first_step(tmp_path):
    hint = "--config.teacher.hint={answer}{problem}"
    few = ("--config.eval.ood=False", "--config.eval.problems=8")
    run(tmp_path / "run", "--config.teacher.kind=hinted_policy", hint, *few)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["recompiles"] for row in steps] == [0, 0]
    assert all(row["teacher/prompt_too_long"] == 0 for row in steps)
    assert sum(row["teacher_tokens"] for row in steps) > 0
    assert all(np.isfinite(row["loss"]) for row in steps)


def test_every_kind_is_described_and_others_are_refused(worksheet_policy):
    policy, params = worksheet_policy
    lines = set()
    for kind in TEACHERS:
        (line,) = [
            s
            for s in describe(kind_config(kind), policy, params, 0).splitlines()
            if "teacher:" in s
        ]
        lines.add(line.partition("teacher: ")[2])
    assert len(lines) == len(TEACHERS) and all(lines)
    with pytest.raises(InputError) as error:
        check_options(kind_config("oracle"), policy.mesh)
    assert str(error.value) == f"teacher.kind='oracle' is none of {', '.join(TEACHERS)}"


def test_what_a_teacher_lacks_is_said_in_one_line(worksheet_policy):
    policy, _ = worksheet_policy
    config = kind_config("scripted", "--config.task.module=scope_jax.tasks.math_problems")
    with pytest.raises(
        InputError, match=r"scope_jax.tasks.math_problems has no function continue_"
    ):
        load_teacher(config, policy)
    with pytest.raises(
        InputError, match="worksheet_models/teacher may read 265 tokens; it was made"
    ):
        load_teacher(kind_config("model", "--config.sample.max_new_tokens=250"), policy)
    default = load_config("worksheet:n=3,runlocal", ["--config.teacher.kind=hinted_policy"])
    with pytest.raises(InputError, match="the policy's tokenizer cannot write teacher.hint"):
        load_teacher(default, policy)
