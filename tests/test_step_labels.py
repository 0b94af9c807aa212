"""Tests of the readers of step labels: each layout by hand, and every way a row can be wrong."""

import gzip
import json

import pytest

from scope_jax.records import InputError
from scope_jax.step_labels import class_balance, read_step_labels, split


def write(tmp_path, *rows, name="labels.jsonl"):
    file = tmp_path / name
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def read(tmp_path, kind, *rows):
    """Returns (problem, steps, labels) of every record."""
    records = read_step_labels(write(tmp_path, *rows), kind)
    return [(r["problem"], r["steps"], r["labels"]) for r in records]


def refusal(tmp_path, kind, row, good):
    """Returns what the error says of `row`, which is the second line, after a good one."""
    file = write(tmp_path, good, row)
    with pytest.raises(InputError) as caught:
        read_step_labels(file, kind)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{file}:2: ")
    return message.removeprefix(f"{file}:2: ")


# --- TRL ------------------------------------------------------------------------------------------

TRL = {"prompt": "1+1+1?", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.jsonl.gz"])
def test_trl_rows_keep_their_lines(name, tmp_path):
    file = write(tmp_path, TRL, {**TRL, "labels": [True, True], "extra": 0}, name=name)
    same = {"problem": "1+1+1?", "steps": ["1+1=2", "2+1=4"]}
    assert read_step_labels(file, "trl") == [
        {**same, "labels": [1, 0], "source": f"{file}:1"},
        {**same, "labels": [1, 1], "source": f"{file}:2"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["a"] * 4, "labels": [True] * 3}, "4 steps but 3 labels"),
        ({"prompt": None}, '"prompt" must be text, got NoneType'),
        ({"prompt": " \n"}, '"prompt" is empty'),
        ({"completions": "1+1=2"}, '"completions" must be a list, got str'),
        ({"labels": {"0": True}}, '"labels" must be a list, got dict'),
        ({"completions": ["a", ""]}, "step 1 is empty"),
        ({"completions": ["a", 3]}, "step 1 must be text, got int"),
        ({"completions": ["a", "\ud800"]}, "step 1 holds half a surrogate pair: not Unicode"),
        ({"labels": [True, 1]}, "label 1 must be true or false, got 1"),
        ({"labels": [None, True]}, "label 0 must be true or false, got None"),
        (
            {"completions": [], "labels": []},
            '"completions" is empty: a solution needs at least one step',
        ),
    ],
)
def test_bad_trl_row_is_named(change, message, tmp_path):
    assert refusal(tmp_path, "trl", {**TRL, **change}, TRL) == message


def test_missing_fields_are_named(tmp_path):
    assert refusal(tmp_path, "trl", {"prompt": "a"}, TRL) == (
        '"completions" must be a list, got nothing'
    )


# --- PRM800K --------------------------------------------------------------------------------------


def step(*completions, chosen=None, human=None):
    rated = [{"text": text, "rating": rating, "flagged": None} for text, rating in completions]
    return {"completions": rated, "chosen_completion": chosen, "human_completion": human}


def prm800k(*steps, reason="solution"):
    label = {"steps": list(steps), "total_time": 1, "finish_reason": reason}
    return {"labeler": "x", "question": {"problem": "P"}, "label": label}


GOOD = prm800k(step(("a", 1), chosen=0))


def test_prm800k_neutral_steps_are_correct(tmp_path):
    row = prm800k(step(("a", 1), chosen=0), step(("b", 0), chosen=0), step(("c", -1), chosen=0))
    assert read(tmp_path, "prm800k", row) == [("P", ["a", "b", "c"], [1, 1, 0])]


def test_prm800k_alternatives_have_an_unlabelled_prefix(tmp_path):
    row = prm800k(
        step(("a", 1), chosen=0),
        step(("b1", -1), ("b2", 1), ("b3", 0), chosen=1),
        step(("c1", 0), ("c2", None), chosen=0),
    )
    assert read(tmp_path, "prm800k", row) == [
        ("P", ["a", "b2", "c1"], [1, 1, 1]),
        ("P", ["a", "b1"], [None, 0]),
        ("P", ["a", "b3"], [None, 1]),
    ]


@pytest.mark.parametrize("human", ["by hand", {"text": "by hand", "rating": None}])
def test_prm800k_human_step_is_correct_and_the_chain_goes_on(human, tmp_path):
    row = prm800k(step(("a", -1), human=human), step(("b", 1), chosen=0))
    assert read(tmp_path, "prm800k", row) == [
        ("P", ["by hand", "b"], [1, 1]),
        ("P", ["a"], [0]),
    ]


def test_prm800k_found_error_ends_the_chain(tmp_path):
    """The README's example: two neutral steps, then five alternatives of which none is chosen."""
    last = step(("u", -1), ("v", 0), ("w", -1), ("x", 0), ("y", 0))
    row = prm800k(
        step(("a", 0), chosen=0), step(("b", 0), chosen=0), last, reason="found_error"
    )  # fmt: skip
    assert read(tmp_path, "prm800k", row) == [
        ("P", ["a", "b"], [1, 1]),
        *[
            ("P", ["a", "b", text], [None, None, label])
            for text, label in zip("uvwxy", [0, 1, 0, 1, 1], strict=True)
        ],
    ]


def test_prm800k_lone_unchosen_completion_belongs_to_the_solution(tmp_path):
    row = prm800k(step(("a", 1), chosen=0), step(("b", -1)), reason="found_error")
    assert read(tmp_path, "prm800k", row) == [("P", ["a", "b"], [1, 0])]


def test_prm800k_stops_at_a_step_without_any_text(tmp_path):
    hole = {"completions": None, "chosen_completion": None, "human_completion": None}
    row = prm800k(step(("a", 1), chosen=0), hole, step(("c", 1), chosen=0), reason="give_up")
    assert read(tmp_path, "prm800k", row) == [("P", ["a"], [1])]


def test_prm800k_null_ratings_are_context_and_unlabelled_rows_vanish(tmp_path):
    row = prm800k(step(("a", None), chosen=0), step(("b", 1), chosen=0))
    silent = prm800k(step(("a", None), ("b", None), chosen=0))
    nothing = prm800k(reason="bad_problem")
    assert read(tmp_path, "prm800k", silent, row, nothing) == [("P", ["a", "b"], [None, 1])]
    with pytest.raises(InputError, match="holds no labelled step"):
        read(tmp_path, "prm800k", silent, nothing)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, '"question" must be an object, got NoneType'),
        ({"question": {"problem": 3}}, '"question.problem" must be text, got int'),
        ({**GOOD, "label": []}, '"label" must be an object, got list'),
        ({**GOOD, "label": {"steps": {}}}, '"steps" must be a list, got dict'),
        (prm800k("a"), "step 0 must be an object, got str"),
        (prm800k({"completions": "a"}), 'step 0: "completions" must be a list, got str'),
        (prm800k({"completions": [3]}), "step 0, completion 0 must be an object, got int"),
        (prm800k(step(("", 1), chosen=0)), "step 0, completion 0: text is empty"),
        (
            prm800k(step(("a", 1), chosen=0), step(("b", 2), chosen=0)),
            "step 1, completion 0: rating must be -1, 0, 1 or null, got 2",
        ),
        (
            prm800k(step(("a", True), chosen=0)),
            "step 0, completion 0: rating must be -1, 0, 1 or null, got True",
        ),
        (
            prm800k(step(("a", 1), chosen=1)),
            "step 0: chosen_completion 1 is not an index of its 1 completions",
        ),
        (
            prm800k(step(("a", 1), chosen=-1)),
            "step 0: chosen_completion -1 is not an index of its 1 completions",
        ),
        (prm800k(step(human=["a"])), "step 0: human must be text, got list"),
    ],
)
def test_bad_prm800k_row_is_named(row, message, tmp_path):
    assert refusal(tmp_path, "prm800k", row, GOOD) == message


# --- Math-Shepherd --------------------------------------------------------------------------------


def shepherd(text):
    """A row from a text with [+] and [-] for the marks."""
    marked = text.replace("[+]", "ки").replace("[-]", "ки")
    return {"input": marked, "label": text.replace("[+]", "+").replace("[-]", "-"), "task": "GSM8K"}


PLAIN = shepherd("2+3-1? Step 1: 2+3=5 [+]\nStep 2: 5-1=3 [-]\nStep 3: The answer is: 3 [-]")


def test_math_shepherd_steps_end_at_their_marks(tmp_path):
    steps = ["Step 1: 2+3=5", "Step 2: 5-1=3", "Step 3: The answer is: 3"]
    assert read(tmp_path, "math_shepherd", PLAIN) == [("2+3-1?", steps, [1, 0, 0])]


def test_math_shepherd_text_after_the_last_mark_has_no_label(tmp_path):
    row = shepherd("P. step 1: a [+]\nStep 2: cut o")
    want = [("P.", ["step 1: a", "Step 2: cut o"], [1, None])]
    assert read(tmp_path, "math_shepherd", row) == want


def test_math_shepherd_label_inside_the_problem_is_left_out(tmp_path):
    row = shepherd("Add these. [-]\n 1 and 2 Step 1: 3 [+]")
    [(problem, steps, labels)] = read(tmp_path, "math_shepherd", row)
    assert problem.split() == ["Add", "these.", "1", "and", "2"]
    assert (steps, labels) == (["Step 1: 3"], [1])


def test_math_shepherd_problem_without_step_1_ends_at_its_question_mark(tmp_path):
    row = shepherd("What is 1+1? It is 2. [+]\nThe answer is: 2 [+]")
    want = [("What is 1+1?", ["It is 2.", "The answer is: 2"], [1, 1])]
    assert read(tmp_path, "math_shepherd", row) == want


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "a"}, '"input" must be text, got NoneType'),
        ({"input": "Step 1: a ки", "label": 7}, '"label" must be text, got int'),
        (
            {"input": "P Step 1: a ки b ки", "label": "P Step 1: a + b"},
            '"input" and "label" differ before mark 1 of 2',
        ),
        (shepherd("P? Q? r [+]"), 'no "Step 1:" in "input", so the problem\'s end is unknown'),
        (shepherd("Step 1: a [+]"), "the problem is empty"),
        (shepherd("P Step 1: a [+] \n [-]"), "step 1 is empty"),
    ],
)
def test_bad_math_shepherd_row_is_named(row, message, tmp_path):
    assert refusal(tmp_path, "math_shepherd", row, PLAIN) == message


def test_math_shepherd_says_what_is_wrong_with_the_marks(tmp_path):
    def said(**change):
        return refusal(tmp_path, "math_shepherd", {**PLAIN, **change}, PLAIN)

    plain = PLAIN["label"]
    assert (
        said(label=plain.replace("5-1", "5-2")) == '"input" and "label" differ before mark 1 of 3'
    )
    assert said(label=plain + " +") == '"label" goes on where "input" ends'
    assert said(label=plain[:-1]) == "mark 2 has '' in \"label\", not + or -"
    assert said(label=PLAIN["input"]) == "mark 0 has 'ки' in \"label\", not + or -"
    assert said(input="P? a", label="P? a") == 'no "ки" in "input": no step is labelled'
    assert said(input="P a ки", label="P a +") == (
        'no "Step 1:" in "input", so the problem\'s end is unknown'
    )


# --- All ------------------------------------------------------------------------------------------


def test_unknown_kind_is_refused_before_the_file_is_opened(tmp_path):
    with pytest.raises(InputError, match="one of trl, prm800k, math_shepherd, got 'csv'"):
        read_step_labels(tmp_path / "absent.jsonl", "csv")


HOSTILE = [None, True, -1, 1e999, "", "x" * 9, "ки", [], [[]], [None], {}, {"text": {}}, [{}]]


@pytest.mark.parametrize("kind", ["trl", "prm800k", "math_shepherd"])
def test_no_value_in_any_place_crashes_a_reader(kind, tmp_path):
    """Replaces every node of a good row, at every depth, by values of other types."""
    good = {"trl": TRL, "prm800k": GOOD, "math_shepherd": PLAIN}[kind]

    def variants(node):
        yield from HOSTILE
        keys = node if isinstance(node, dict) else range(len(node) if type(node) is list else 0)
        for key in keys:
            for value in variants(node[key]):
                changed = dict(node) if isinstance(node, dict) else list(node)
                changed[key] = value
                yield changed

    read_rows = refused = 0
    for row in variants(good):
        file = write(tmp_path, good, row)
        try:
            records = read_step_labels(file, kind)
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"{file}:2: ") and "\n" not in str(error)
        else:
            read_rows += 1
            for record in records:
                assert len(record["steps"]) == len(record["labels"])
                assert {0, 1} & set(record["labels"]) and set(record["labels"]) <= {0, 1, None}
    assert refused > read_rows > 0


def record(problem, *labels):
    return {"problem": problem, "steps": ["s"] * len(labels), "labels": list(labels), "source": ""}


def test_class_balance_counts_labelled_steps_only():
    records = [record("a", 1, 1, 0), record("b", None, 0), record("c", None, 1), record("d", 1)]
    assert class_balance(records) == {
        "solutions": 4,
        "steps_labelled": 3 + 1 + 1 + 1,
        "share_wrong": 2 / 6,
        "share_with_error": 2 / 4,
    }
    nothing = {"solutions": 0, "steps_labelled": 0, "share_wrong": 0.0, "share_with_error": 0.0}
    assert class_balance([]) == nothing


RECORDS = [record(f"p{i % 20}" + "  \n" * (i % 3), i % 2) for i in range(100)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_split_keeps_each_problem_on_one_side(share):
    train, held_out = split(RECORDS, share, seed=0)
    names = [{r["problem"].strip() for r in side} for side in (train, held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20
    assert len(names[1]) == {0.0: 0, 0.01: 1, 0.3: 6, 0.9: 18}[share]
    assert [r for r in RECORDS if r in train] == train and len(train) + len(held_out) == 100


def test_split_depends_on_the_seed_and_not_on_the_order():
    def held_out(records, seed):
        return {r["problem"].strip() for r in split(records, 0.3, seed)[1]}

    assert held_out(RECORDS, 0) == held_out(RECORDS[::-1], 0)
    assert len({frozenset(held_out(RECORDS, seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_split_refuses_other_shares(share):
    with pytest.raises(InputError, match=r"held_out_share must be in \[0, 1\)"):
        split(RECORDS, share, seed=0)


def test_split_leaves_something_to_train_on():
    with pytest.raises(InputError, match="leaves none to train on"):
        split([record("a", 1), record("a ", 0)], 0.1, seed=0)
