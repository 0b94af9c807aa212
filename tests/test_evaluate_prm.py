"""Tests of the PRM evaluation: its rows, its figures, its files, and the command."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

import scope_jax.evaluate_prm
from scope_jax.evaluate import main
from scope_jax.evaluate_prm import (
    draw,
    evaluate_prm,
    make_report,
    print_report,
    read_solutions,
    write_report,
)
from scope_jax.models.hf import load_tokenizer
from scope_jax.prm import load_prm, score_solutions
from scope_jax.records import InputError
from scope_jax.tasks.worksheet import fact_value, hard_facts, make_sheet

PRM = pathlib.Path(scope_jax.evaluate_prm.__file__).parent / "tasks" / "worksheet_models" / "prm"
ROW = {"id": "a", "problem": "1+1+1?", "steps": ["1+1=2", "2+1=4"], "label": 1}
FILES = ["reliability.png", "report.json", "scores.jsonl"]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def random_case(seed=0, count=60):
    rng = np.random.default_rng(seed)
    rows, scores = [], []
    for i in range(count):
        n = int(rng.integers(1, 6))
        label = int(rng.integers(-1, n))
        rows.append({"id": f"r{i}", "problem": "p", "steps": ["s"] * n, "label": label})
        scores.append(None if i % 20 == 7 else rng.random(n, np.float32))
    return rows, scores


def full_report(rows, scores, **names):
    base = {"prm": "some/prm", "data": "some/file.jsonl", "command": "x", "scoring_seconds": 1.0}
    return {**base, **names, **make_report(rows, scores, 0.5)}


# --- Rows -----------------------------------------------------------------------------------------


def test_rows_keep_their_order_and_a_nameless_one_gets_its_line(tmp_path):
    clean = {**ROW, "id": 7, "label": -1, "answer": "3", "generator": "GPT"}
    nameless = {key: ROW[key] for key in ("problem", "steps", "label")}
    file = write(tmp_path / "rows.jsonl", [ROW, clean, nameless])
    assert read_solutions(file) == [
        ROW, {**ROW, "id": "7", "label": -1}, {**ROW, "id": f"{file}:3"},
    ]  # fmt: skip


RANGE = '"label" must be an integer in -1 .. 1 (the first wrong of its 2 steps, -1 = none), got '


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": ""}, '"problem" is empty'),
        ({"problem": ["a"]}, '"problem" must be text, got list'),
        ({"steps": "a"}, '"steps" must be a list of at least one text'),
        ({"steps": []}, '"steps" must be a list of at least one text'),
        ({"steps": ["a", " "]}, "step 1 is empty"),
        ({"steps": ["a", None]}, "step 1 must be text, got NoneType"),
        ({"steps": ["\ud800"]}, "step 0 holds half a surrogate pair: not Unicode"),
        ({"label": 2}, RANGE + "2"),
        ({"label": -2}, RANGE + "-2"),
        ({"label": True}, RANGE + "True"),
        ({"label": 1.0}, RANGE + "1.0"),
        ({"label": "1"}, RANGE + "'1'"),
        ({"label": None}, RANGE + "None"),
    ],
)
def test_bad_row_is_named(change, message, tmp_path):
    file = write(tmp_path / "rows.jsonl", [ROW, {**ROW, **change}])
    with pytest.raises(InputError) as caught:
        read_solutions(file)
    assert str(caught.value) == f"{file}:2: {message}"


@pytest.mark.parametrize("name", ["problem", "steps", "label"])
def test_missing_field_is_named(name, tmp_path):
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(InputError, match=f'rows.jsonl:1: no "{name}"; rows are'):
        read_solutions(write(tmp_path / "rows.jsonl", [row]))


def test_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match="rows.jsonl holds no rows"):
        read_solutions(write(tmp_path / "rows.jsonl", []))


def test_real_human_labels_are_read(shared):
    rows = read_solutions(shared / "data" / "champ_processbench.jsonl.gz")
    assert len(rows) == 540
    assert sum(row["label"] < 0 for row in rows) == 96


# --- Figures --------------------------------------------------------------------------------------


def test_report_by_hand():
    rows = [ROW, {**ROW, "label": -1}, {**ROW, "label": 0}]
    scores = [np.array([0.9, 0.25]), np.array([0.75, 0.9]), None]
    report = make_report(rows, scores, 0.2)
    assert (report["solutions"], report["steps"]) == (3, 6)
    given, best = report["at_threshold"], report["best"]
    assert (given["threshold"], given["acc_error"], given["acc_correct"]) == (0.2, 0 / 2, 1)
    assert best["threshold"] == (0.25 + 0.75) / 2
    assert (best["acc_error"], best["acc_correct"], best["unscored"]) == (1 / 2, 1, 1)
    assert best["f1"] == pytest.approx(2 * 0.5 * 1 / (0.5 + 1))
    low, high = best["f1_interval"]
    assert (low, high) == (0, 1)  # two erroneous solutions, one found: 0, 1 or 2 in a resample
    assert report["reliability"]["steps"] == 2 + 2
    assert report["baselines"]["always_step_0"]["acc_error"] == 1 / 2


def test_sweep_is_thinned_but_keeps_its_best_point():
    rows, scores = random_case(count=400)
    report = make_report(rows, scores, 0.5)
    sweep = report["sweep"]
    assert {len(column) for column in sweep.values()} <= {199, 200}
    where = sweep["threshold"].index(report["best"]["threshold"])
    assert sweep["f1"][where] == max(sweep["f1"]) == pytest.approx(report["best"]["f1"])
    assert sweep["threshold"] == sorted(set(sweep["threshold"]))
    assert sweep["threshold"][0] < 0.01 and sweep["threshold"][-1] > 0.99


def test_scores_of_another_solution_are_refused():
    with pytest.raises(ValueError, match="solution 0: 1 scores for 2 steps"):
        make_report([ROW], [np.array([0.5])], 0.5)


# --- Files ----------------------------------------------------------------------------------------


def test_files_hold_the_report_the_scores_and_a_picture(tmp_path):
    rows, scores = random_case()
    report = full_report(rows, scores)
    out = tmp_path / "new" / "out"
    write_report(out, report, rows, scores)
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert json.loads((out / "report.json").read_text()) == report
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert lines[7] == {"id": "r7", "label": rows[7]["label"], "predicted": None, "scores": None}
    for line, row, score in zip(lines, rows, scores, strict=True):
        assert (line["id"], line["label"]) == (row["id"], row["label"])
        if score is not None:
            assert line["scores"] == pytest.approx(score.tolist(), abs=1e-6)
            below = [k for k, s in enumerate(score) if s < 0.5]
            assert line["predicted"] == (below or [-1])[0]


def test_picture_is_drawn_for_any_name_and_any_data(tmp_path):
    from matplotlib.image import imread

    rows, scores = random_case()
    cases = [
        full_report(rows, scores),
        full_report(rows[:3], [None] * 3, prm=r"a$b_{\x", data="c$^[/]d.jsonl"),
        full_report([{**ROW, "label": -1}], [np.array([0.0, 1.0])]),
    ]
    pictures = []
    for i, report in enumerate(cases):
        draw(report, tmp_path / f"{i}.png")
        pictures.append(imread(tmp_path / f"{i}.png"))
        assert pictures[-1].shape == (750, 1650, 4)
        assert (pictures[-1][..., :3].min(-1) < 0.9).mean() > 0.01  # not a blank page
    assert (pictures[0] != pictures[1]).any()


def test_error_leaves_the_older_report_alone(tmp_path, monkeypatch):
    rows, scores = random_case()
    write_report(tmp_path, full_report(rows, scores), rows, scores)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken(_, path):
        path.write_bytes(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(scope_jax.evaluate_prm, "draw", broken)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, full_report(rows[:9], scores[:9]), rows[:9], scores[:9])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_last_line_is_one_json_object_and_oddities_are_said(capsys):
    print_report(full_report([{**ROW, "label": -1}, ROW], [None, None], prm="[/red]"), "out[/b]")
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["prm"] == "[/red]"
    assert (figures["unscored"], figures["f1"], figures["ece"]) == (2, 0, None)
    text = " ".join(" ".join(lines).split())
    assert "2 of them could not be scored" in text
    assert "chosen on this same file, so its F1 is optimistic" in text
    assert "F1 means nothing here" not in text
    print_report(full_report([ROW], [np.array([0.9, 0.1])]))
    assert "F1 means nothing here" in capsys.readouterr().out


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    """Worksheets with the shipped policy's errors: fixed wrong values of hard facts."""
    rng, hard = np.random.default_rng(0), hard_facts(0)
    rows = []
    for i in range(120):
        sheet, steps, wrong = make_sheet(5, rng), [], []
        for item in rng.permutation(sheet.rstrip("?").split(",")):
            wrong.append(item[1:] in hard and rng.random() < 0.3)
            steps.append(f"{item}={hard[item[1:]] if wrong[-1] else fact_value(item[1:])}")
        label = wrong.index(True) if True in wrong else -1
        rows.append({"id": f"s{i}", "problem": sheet, "steps": steps, "label": label})
    return write(tmp_path_factory.mktemp("data") / "sheets.jsonl", rows)


def test_shipped_prm_finds_the_errors_it_was_trained_on(sheets, tmp_path, capsys):
    command = ["--prm", str(PRM), "--data", str(sheets), "--out", str(tmp_path / "out")]
    assert main([*command, "--threshold", "0.25"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["solutions"], figures["unscored"], figures["threshold"]) == (120, 0, 0.25)
    assert figures["best_f1"] >= figures["f1"] > 0.85
    assert figures["random_best_f1"] < 0.4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["at_threshold"]["f1"] == figures["f1"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == FILES


def test_scores_do_not_depend_on_the_batch(sheets, tmp_path):
    assert evaluate_prm(PRM, sheets, limit=10, out=tmp_path)["solutions"] == 10
    rows = read_solutions(sheets)[:10]
    prm, params = load_prm(PRM)
    problems, steps = [row["problem"] for row in rows], [row["steps"] for row in rows]
    alone = score_solutions(prm, params, load_tokenizer(PRM)[0], problems, steps, batch_size=3)
    lines = map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())
    for line, want in zip(lines, alone, strict=True):
        assert line["scores"] == pytest.approx(want.tolist(), abs=1e-5)


def test_too_long_solutions_count_as_wrong(sheets):
    report = evaluate_prm(PRM, sheets, max_length=5, limit=20)
    best = report["best"]
    assert best["unscored"] == 20
    assert (best["acc_error"], best["acc_correct"], best["f1"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "worksheet"], "give --config C with --workdir DIR or --model DIR, or --prm"),
        (["--workdir", "w"], "give --config C with --workdir DIR or --model DIR, or --prm"),
        (["--config", "worksheet", "--workdir", "w", "--model", "m"], "give --config C with"),
        (["--prm", "p"], "--prm is for a PRM: give both --prm DIR and --data FILE"),
        (["--data", "d"], "--data is for a PRM: give both --prm DIR and --data FILE"),
        (["--config", "worksheet", "--workdir", "w", "--limit", "3"], "--limit is for a PRM"),
        (["--prm", "p", "--data", "d", "--config", "worksheet"], "--config does not go with --prm"),
        (["--prm", "p", "--data", "d", "--model", "m"], "--model does not go with --prm"),
        (["--prm", "p", "--data", "d", "--config.seed=1"], "--config.seed=1 does not go with"),
        (
            ["--prm", "p", "--data", "d", "--batch-size", "0"],
            "batch size must be at least 1, got 0",
        ),
        (["--prm", "p", "--data", "d", "--limit", "-1"], "limit must be at least 1, got -1"),
        (["--prm", "p", "--data", "d", "--max-length", "0"], "max length must be at least 1"),
        (["--prm", "p", "--data", "d", "--threshold", "nan"], "threshold must be in [0, 1], got"),
        (["--prm", "p", "--data", "d", "--threshold", "5"], "threshold must be in [0, 1], got 5"),
        (["--prm", "p", "--data", "absent.jsonl"], "data file absent.jsonl does not exist"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {message}")


def test_bad_prm_or_place_gives_one_line_and_writes_nothing(sheets, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    cases = [
        (str(tmp_path / "absent"), tmp_path / "out", "absent"),
        (str(PRM), tmp_path / "file", "is not a directory"),
        (str(PRM), tmp_path / "file" / "out", "is not a directory"),
    ]
    for prm, out, message in cases:
        assert main(["--prm", prm, "--data", str(sheets), "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_missing_matplotlib_is_said_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["--prm", "absent", "--data", "absent", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err == (
        "error: reliability.png needs matplotlib: pip install 'scope_jax[eval]', or leave --out "
        "away\n"
    )
    assert not (tmp_path / "out").exists()
