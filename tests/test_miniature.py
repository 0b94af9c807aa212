"""experiments/miniature: its statistics against numbers by hand and scipy's, its table of cells,
and the whole harness in small.
"""

import gzip
import importlib
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

from scope_jax.tasks import worksheet

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "miniature"


@pytest.fixture
def part(monkeypatch):
    """Imports a file of experiments/miniature as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def close(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- statistics -----------------------------------------------------------------------------------


def test_the_interval_is_students(part):
    stats = part("stats")
    # mean 3, deviation sqrt(2.5), t of 4 degrees of freedom 2.776445: half 2.776445 * sqrt(2.5 / 5)
    mean = stats.mean_interval([1, 2, 3, 4, 5])
    assert mean.value == 3 and mean.count == 5
    assert mean.half == pytest.approx(2.776445105 * np.sqrt(0.5), rel=1e-9)
    values = np.random.default_rng(0).normal(size=7)
    low, high = scipy_stats.t.interval(0.95, 6, values.mean(), scipy_stats.sem(values))
    mean = stats.mean_interval(values)
    assert (mean.value - mean.half, mean.value + mean.half) == (close(low), close(high))
    assert stats.mean_interval([0.5]) == (0.5, None, 1)


def test_the_paired_t_test_is_scipys(part):
    stats, rng = part("stats"), np.random.default_rng(1)
    one, other = rng.normal(0.5, 1, 9), rng.normal(0, 1, 9)
    assert stats.paired_t(one - other) == close(scipy_stats.ttest_rel(one, other).pvalue)
    assert (stats.paired_t([0.1]), stats.paired_t([0, 0]), stats.paired_t([1, 1])) == (None, 1, 0)


def test_sign_flips_are_counted_out(part):
    stats = part("stats")
    # of the 8 choices of signs for 1, 2, 3 only +++ and --- reach |sum| 6
    assert stats.sign_flip([1, 2, 3]) == 2 / 8
    # -1 + 2 + 3 = 4: also +1+2+3 = 6 and their opposites
    assert stats.sign_flip([-1, 2, 3]) == 4 / 8
    assert stats.sign_flip([1, -1]) == 1 and stats.sign_flip([0.0, 0.0]) == 1
    assert stats.sign_flip([2.0] * 5) == 2 / 32 and stats.sign_flip([2.0]) is None
    with pytest.raises(ValueError, match="too many"):
        stats.sign_flip([1.0] * 21)


def test_sign_flips_are_scipys_permutation_test(part):
    for seed in range(5):
        values = np.random.default_rng(seed).normal(0.4, 1, 8)
        expected = scipy_stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert part("stats").sign_flip(values) == close(expected.pvalue)


def test_holm_by_hand(part):
    holm = part("stats").holm
    # sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04 -> never falling: .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == [close(x) for x in (0.06, 0.04, 0.06, 0.06)]
    assert holm([0.5, None, 0.6]) == [1.0, None, 1.0]
    assert holm([]) == []


# --- diversity among correct samples --------------------------------------------------------------


def test_errors_count_in_no_column_of_diversity(part):
    final = part("final")
    key = worksheet.valid_order
    lines = "c5*2=0\na3+9=2\nf8-4=4\nb2+2=4\nd2*3=6\n"
    other = "a3+9=2\nc5*2=0\nf8-4=4\nb2+2=4\nd2*3=6\n"
    wrong = [lines.replace("=0", f"={x}") for x in range(1, 9)]
    texts, solved = [lines, lines, other, *wrong], [True] * 3 + [False] * 8
    found = final.problem_columns("c5*2,a3+9,f8-4,b2+2,d2*3?", texts, solved, key, 2)
    assert (found["correct"], found["distinct_all"]) == (3, 2)
    assert found["distinct"] == close(5 / 3)  # pairs: same, different, different
    assert found["td"] == close(2 / 3)  # of five words only copies are alike
    assert found["same"] == close(1 / 3)
    none = final.problem_columns("x", wrong, [False] * 8, key, 2)
    assert none == {**dict.fromkeys(found), "correct": 0}


def test_td_is_left_out_where_it_cannot_tell_copies(part):
    final, text = part("final"), "c5*2=0\na3+9=2\n"
    found = final.problem_columns("c5*2,a3+9?", [text] * 4, [True] * 4, lambda _, text: text, 2)
    assert found["td"] is None and found["distinct"] == 1


def test_columns_are_means_over_problems(part):
    entry = lambda correct, distinct: {  # noqa: E731
        "correct": correct, "distinct_all": None, "distinct": distinct, "same": None, "td": None,
        "ed": None,
    }  # fmt: skip
    columns = part("final").columns_of([entry(2, 1.5), entry(0, None), entry(4, 2.5)], 4)
    assert columns["pass@1"] == close((2 / 4 + 0 + 1) / 3)
    assert columns["pass@2"] == close((1 - 1 / 6 + 0 + 1) / 3)
    assert (columns["distinct"], columns["distinct_problems"], columns["td"]) == (2, 2, None)


# --- the table of cells ---------------------------------------------------------------------------


def test_the_preregistration_quotes_the_tables_of_the_code(part):
    cells, text = part("cells"), (FOLDER / "PREREGISTRATION.md").read_text()
    claims = [cells.claims_table(which) for which in (cells.PRIMARY, cells.ASKED_LATER)]
    for table in (cells.grid_table(), cells.arms_table(), *claims):
        assert table in text


def test_names_of_cells_are_unique_and_arms_known(part):
    cells = part("cells")
    for plan in (cells.FULL, cells.SMOKE):
        grid, pilot = cells.grid_cells(plan), cells.pilot_cells(plan)
        names = [cell.name for cell in grid + pilot]
        assert len(set(names)) == len(names)
        assert {cell.arm for cell in grid + pilot} <= cells.ARMS.keys()
        tested = {arm for block in plan.blocks for arm in block.arms}
        assert {cells.ARMS[arm].rate_of for arm in tested} - {""} <= {cell.arm for cell in pilot}
    assert cells.teachers_of(cells.FULL, "worksheet", "1") == ["own", "verbose", "imperfect"]
    assert cells.teachers_of(cells.FULL, "worksheet", "100") == ["own"]
    headline = cells.FULL.blocks[0]
    assert len(headline.bases) >= 5 and cells.FULL.pilot_base not in cells.BASES
    assert {arm for pair in cells.PRIMARY for arm in pair[:2]} <= set(headline.arms)


def test_every_override_of_the_table_is_a_key_of_the_config(part):
    from scope_jax.configlib import load_config
    from scope_jax.methods import METHODS

    cells = part("cells")
    for plan in (cells.FULL, cells.SMOKE):
        for cell in cells.grid_cells(plan):
            arm = cells.ARMS[cell.arm]
            there = (ROOT / "configs" / f"{cell.task}.py").exists() and arm.teacher == "own"
            if arm.method in METHODS and there:
                _, config, *overrides = cells.options(cell, plan, ROOT / "models", 3e-4)
                loaded = load_config(config, overrides)
                assert loaded.method == arm.method and loaded.eval.split == "valid"
                assert loaded.optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({1e-4: [0.2, 0.4], 2e-4: [0.5, 0.2], 4e-4: [0.1, 0.5]}, 2e-4),
        ({2e-4: [0.3, 0.3], 1e-4: [0.4, 0.2]}, 1e-4),  # equal: the lower one
        ({1e-4: [0.2, 0.4], 2e-4: [0.5]}, None),  # not complete
        ({1e-4: [0.0, 0.0], 2e-4: [0.0, 0.0]}, None),  # every run failed
    ],
)
def test_the_pilot_takes_the_best_mean(part, accuracies, expected):
    assert part("cells").choose_rate(accuracies, 2) == expected


# --- grid.py --------------------------------------------------------------------------------------


def test_a_torn_line_costs_only_itself(part, tmp_path):
    grid, file = part("grid"), tmp_path / "cells.jsonl"
    grid.append_line(file, {"name": "a", "status": "failed"})
    with file.open("a") as lines:
        lines.write('{"name": "b", "sta')
    grid.append_line(file, {"name": "c", "status": "done"})
    assert [row["name"] for row in grid.read_lines(file)] == ["a", "c"]
    assert grid.to_do(["a", "b", "c"], file, retry=False) == {"b"}
    assert grid.to_do(["a", "b", "c"], file, retry=True) == {"a", "b"}
    grid.append_line(file, {"name": "a", "status": "done"})  # the last line counts
    assert grid.to_do(["a", "b", "c"], file, retry=True) == {"b"}


def test_packed_results_are_read_and_not_written_beside(part, tmp_path, monkeypatch, capsys):
    grid, row = part("grid"), {"name": "a", "status": "done"}
    (tmp_path / "cells.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert grid.read_lines(tmp_path / "cells.jsonl") == [row]
    monkeypatch.setattr(sys, "argv", ["grid.py", "--out", str(tmp_path), "--smoke"])
    assert grid.main() == 2 and "unpack cells.jsonl.gz" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_process_that_fails_says_why(part, tmp_path):
    grid = part("grid")
    code = "import sys; print('error: no such thing', file=sys.stderr); print('x'); sys.exit(2)"
    ended = grid.run_process([sys.executable, "-c", code], tmp_path / "log", tmp_path, 60.0)
    assert ended["reason"] == "exit 2: error: no such thing" and ended["cpu_seconds"] > 0
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ended = grid.run_process(sleep, tmp_path / "log2", tmp_path, 0.5)
    assert ended["reason"].startswith("not done after") and ended["seconds"] < 30


def test_each_core_takes_the_next_item_until_the_deadline(part):
    grid, done = part("grid"), []
    grid.on_each_core(done.append, list(range(20)), [0, 0], time.monotonic() + 60)
    assert sorted(done) == list(range(20))
    grid.on_each_core(done.append, [99], [0], time.monotonic() - 1)
    assert 99 not in done


# --- tables.py, on made-up runs -------------------------------------------------------------------


def make_up(cells, grid, out: pathlib.Path, plan) -> None:
    """Writes cells.jsonl and pilot.jsonl of runs that never were, with an effect for each arm."""
    rng = np.random.default_rng(0)
    effect = {arm: rng.normal(0.25, 0.08) for arm in cells.ARMS} | {"base": 0.0, "scope": 0.42}
    tilt = {base: rng.normal(0, 0.03) for base in (*cells.BASES, plan.pilot_base)}
    out.mkdir(parents=True)
    for cell in cells.grid_cells(plan) + cells.pilot_cells(plan):
        ease = 0.9 - 0.15 * (cell.n - 4)
        top = np.clip(
            0.05 * ease + ease * effect[cell.arm] + tilt[cell.base] + rng.normal(0, 0.02), 0, 1
        )
        correct = rng.binomial(16, rng.beta(4 * top + 0.1, 4 * (1 - top) + 0.1, size=64))
        problems = [
            {
                "correct": int(c), "distinct_all": None if c < 1 else 1.0, "ed": 0.0,
                "distinct": None if c < 4 else float(rng.uniform(3, 4) - top / 2),
                "td": None if c < 2 else float(rng.uniform(0.8, 1)),
                "same": None if c < 2 else float(rng.uniform(0, 0.1)),
            }
            for c in correct
        ]  # fmt: skip
        steps, rise = range(1, 61), 1 - np.exp(-np.arange(1, 61) / 25)
        curve = {
            "valid_pass@1": [[s, float(0.05 + (top - 0.05) * s / 60)] for s in range(0, 61, 15)],
            "signal": [[s, float(x)] for s, x in zip(steps, 0.2 + 0.7 * top * rise, strict=True)],
        }
        columns = importlib.import_module("final").columns_of(problems, 16)
        columns |= {"greedy": float(min(1, top * 1.4)), "ood_pass@1": float(top * 0.7)}
        row = {"name": cell.name, **cell._asdict(), "status": "done", "reason": ""}
        row |= {"columns": columns, "problems": problems}
        if cells.ARMS[cell.arm].method:
            row |= {"curve": curve, "rate": cell.rate or plan.rates[cell.task][0]}
            row["spent"] = {"policy_tokens": 2e5, "teacher_tokens": 2e4, "updates": 120}
            row["spent"]["seconds"] = 21.0
        with (out / ("pilot.jsonl" if cell.rate else "cells.jsonl")).open("a") as file:
            file.write(json.dumps(row) + "\n")
    grid.append_line(
        out / "cells.jsonl", {"name": "x", "status": "failed", "reason": "exit 2: a|b"}
    )


def test_tables_of_made_up_runs(part, tmp_path):
    cells, grid, tables = part("cells"), part("grid"), part("tables")
    make_up(cells, grid, tmp_path / "out", cells.FULL)
    results = tables.load_runs(tmp_path / "out", cells.FULL.steps)
    assert list(results) == [("ledger", 6)] + [("worksheet", n) for n in (4, 5, 6, 7)]
    scope, rival = (results["worksheet", 5][arm] for arm in ("scope", "dr_grpo"))
    found = tables.differences(scope, rival, "pass@1")
    assert len(found) == 12
    pair = ("1", 0)
    by_hand = scope[pair]["columns"]["pass@1"] - rival[pair]["columns"]["pass@1"]
    assert found[pair] == close(by_hand)
    both = [
        x["distinct"] - y["distinct"]
        for x, y in zip(scope[pair]["problems"], rival[pair]["problems"], strict=True)
        if None not in (x["distinct"], y["distinct"])
    ]
    found = tables.differences(scope, rival, "distinct")
    assert found[pair] == close(np.mean(both)) and 0 < len(both) < 64
    text = tables.report(tmp_path / "out", cells.FULL)
    assert "| scope > dr_grpo | pass@1 | 12 |" in text and "exit 2: a/b" in text
    assert "| x |" in text and "## Pilot" in text


# --- all of it, in small --------------------------------------------------------------------------


def test_the_smoke_grid_makes_tables_and_figures_and_is_not_run_twice(tmp_path):
    def command(name: str) -> str:
        line = [sys.executable, str(FOLDER / name), "--out", str(tmp_path), "--smoke"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=900, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    began = time.monotonic()
    assert "3 done, 0 failed" in command("grid.py")
    print(f"{time.monotonic() - began:.0f} s")
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows if row["status"] == "done"].count("scope") == 1
    trained = {row["arm"]: row for row in rows if row["arm"] != "base"}
    assert all(row["spent"]["updates"] == 6 for row in trained.values())
    assert trained["scope"]["spent"]["teacher_tokens"] > 0
    assert len(trained["scope"]["curve"]["signal"]) == 3
    assert "left: 0 bases, 0 of the pilot, 0 cells" in command("grid.py")
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 3
    command("tables.py")
    assert "| scope | 1 |" in (tmp_path / "tables.md").read_text()
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"accuracy.png", "accuracy.csv", "signal.png", "diversity.csv"} <= drawn
