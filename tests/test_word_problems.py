"""The generated word problems: right arithmetic, disjoint splits, readable by what reads them."""

import collections
import importlib.util
import itertools
import json
import pathlib
import re
import sys

import pytest

from scope_jax.alignment import align_trace
from scope_jax.configlib import load_config
from scope_jax.records import InputError
from scope_jax.rewards import verify
from scope_jax.step_labels import read_step_labels
from scope_jax.tasks.math_problems import problems, read_problems

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {"train": 300, "test": 120, "ood": 90}
NOTE = re.compile(r"(\d+) ([-+*/]) (\d+) = <<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


word_problems = load_script("word_problems")
SPLITS = word_problems.make_splits(SIZES, seed=0)
ROWS = list(itertools.chain(*SPLITS.values()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes."""
    out = tmp_path_factory.mktemp("word_problems")
    argv = [f"--{name}={size}" for name, size in SIZES.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["word_problems.py", f"--out={out}", *argv])
        word_problems.main()
    return out


def undone(sign: str, result: int, b: int) -> int:
    """Returns the first number of a calculation, from its result and the second one."""
    return {"+": result - b, "-": result + b, "/": result * b}[sign]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_every_note_is_right_and_the_gold_is_the_last_result():
    for row in ROWS:
        *lines, last = row["answer"].split("\n")
        for line in lines:
            (note,) = NOTE.findall(line)
            shown, (a, sign, b, result), behind = note[:3], note[3:7], note[7]
            assert shown == (a, sign, b) and behind == result, line
            a, b, result = int(a), int(b), int(result)
            assert b * a == result if sign == "*" else undone(sign, result, b) == a, line
            assert numbers(line)[-1] == result > 1, line
        assert last == f"#### {result}"


def test_a_calculation_takes_numbers_of_the_question_or_results_before_it():
    for row in ROWS:
        known = numbers(row["question"])
        for a, _, b, *_, result in NOTE.findall(row["answer"]):
            assert {int(a), int(b)} <= set(known), row
            known.append(int(result))
        assert len(set(known)) == len(known), row
        used = {int(n) for a, _, b, *_ in NOTE.findall(row["answer"]) for n in (a, b)}
        assert used | {known[-1]} == set(known), row


def test_texts_are_sentences():
    for row in ROWS:
        assert row["question"].endswith("?") and row["question"][0].isupper()
        assert not re.search(r"[{}\[\]]|  |\b1\b", row["question"]), row
        assert all(re.fullmatch(r"[A-Z].*\.", line) for line in row["answer"].split("\n")[:-1])


def test_splits_share_no_question_and_have_their_numbers_of_calculations():
    assert {name: len(rows) for name, rows in SPLITS.items()} == SIZES
    assert len({row["question"] for row in ROWS}) == len(ROWS)
    steps = {
        name: collections.Counter(row["answer"].count("<<") for row in rows)
        for name, rows in SPLITS.items()
    }
    assert steps == {"train": {1: 150, 2: 150}, "test": {1: 60, 2: 60}, "ood": {3: 90}}


def test_the_seed_decides_and_a_split_does_not_depend_on_anothers_size():
    again = word_problems.make_splits(SIZES, seed=0)
    assert again == SPLITS
    fewer = word_problems.make_splits({**SIZES, "train": 30}, seed=0)
    assert fewer["test"] == SPLITS["test"] and fewer["ood"] == SPLITS["ood"]
    assert word_problems.make_splits(SIZES, seed=1)["test"] != SPLITS["test"]


def test_no_test_problem_is_a_training_problem_with_other_names():
    words = {
        word for name, *_ in word_problems.PEOPLE for word in (name, "he", "she", "him", "her")
    }
    words |= {word for things in word_problems.THINGS for word in things}
    places = {place.split()[-1] for place in word_problems.PLACES}

    def shape(row):
        text = re.findall(r"\w+", row["question"])
        return tuple("_" if {w, w.lower()} & (words | places) else w for w in text)

    train = {shape(row) for row in SPLITS["train"]}
    assert len(train) < SIZES["train"]  # inside of a split there are such pairs
    assert not train & {shape(row) for row in SPLITS["test"]}


def test_every_template_is_drawn_and_has_a_question_of_its_own():
    templates = word_problems.TEMPLATES
    assert collections.Counter(len(lines) for _, _, lines in templates) == {1: 9, 2: 9, 3: 6}
    patterns = [
        re.sub(r"\\{\w+\\}", r"[\\w ]+", re.escape(question)) for _, question, _ in templates
    ]
    drawn = [
        [i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, row["question"])]
        for row in ROWS
    ]
    assert all(len(matching) == 1 for matching in drawn)
    assert {matching[0] for matching in drawn} == set(range(len(templates)))


def test_more_questions_than_the_templates_have_are_refused(monkeypatch):
    monkeypatch.setattr(word_problems, "TRIES", 1)
    monkeypatch.setattr(word_problems, "make_problem", lambda *_: ({"question": "?"}, "?"))
    with pytest.raises(InputError, match="the templates have no 90 questions for ood"):
        word_problems.make_splits({"train": 0, "test": 0, "ood": 90}, seed=0)


def test_files_are_read_as_problems_and_their_solutions_verify(folder):
    for split, rows in SPLITS.items():
        found = read_problems(folder / f"{split}.jsonl")
        assert [row["problem"] for row in found] == [row["question"] for row in rows]
        assert all(verify(row["gold"], row["solution"]) for row in found)
    config = load_config(f"word_problems_smollm2:data={folder}", [])
    task = config.to_dict()["task"]
    assert task.pop("module") == problems.__module__
    assert {split: len(problems(split, **task)) for split in SIZES} == SIZES


def test_the_teacher_goes_on_behind_the_lines_that_a_rollout_has(folder):
    for row in read_problems(folder / "ood.jsonl"):
        steps = align_trace(row["solution"], "", problem=row["problem"], splitter="\n")
        assert steps is not None and len(steps) == 4
        for kept in range(3):
            prefix = "".join(steps[:kept])
            found = align_trace(row["solution"], prefix, problem=row["problem"], splitter="\n")
            assert found == steps[kept:]


@pytest.mark.parametrize("layout", ["trl", "processbench"])
def test_step_labels_can_be_made(layout, folder, monkeypatch):
    out = folder / f"{layout}.jsonl"
    argv = ["--data", str(folder / "train.jsonl"), "--layout", layout, "--corrupted", "1.0"]
    monkeypatch.setattr(sys, "argv", ["gsm8k_step_labels.py", *argv, "--out", str(out)])
    load_script("gsm8k_step_labels").main()
    if layout == "trl":
        records = read_step_labels(out, "trl")
        assert len(records) == SIZES["train"] and all(r["labels"][-1] == 0 for r in records)
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == SIZES["train"] and all(row["label"] >= 0 for row in rows)
