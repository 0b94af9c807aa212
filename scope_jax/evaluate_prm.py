"""How well a PRM finds the first wrong step, on solutions that people have labelled.

python -m scope_jax.evaluate --prm DIR --data champ_processbench.jsonl.gz --out OUT

The data are ProcessBench's rows, {"id", "problem", "steps": [text], "label": 0-based first wrong
step, -1 = none}. OUT gets report.json, scores.jsonl (each solution's scores) and reliability.png.
"""

import importlib.util
import json
import os
import pathlib
import shlex
import sys
import tempfile
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scope_jax.calibration import (
    Scores,
    baselines,
    bootstrap_f1,
    first_error,
    process_bench,
    reliability,
    threshold_sweep,
)
from scope_jax.data import read_jsonl
from scope_jax.models.hf import load_tokenizer
from scope_jax.prm import load_prm, score_solutions
from scope_jax.records import InputError
from scope_jax.step_labels import check_text

_SWEEP_POINTS = 200  # of the curve in report.json


def evaluate_prm(
    prm_dir,
    data_file,
    *,
    format: str | None = None,
    out=None,
    threshold: float = 0.5,
    batch_size: int = 8,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Scores every solution of a file with a PRM and reports how good the scores are.

    Args:
      prm_dir: directory or hub id of a PRM, as `load_prm`.
      data_file: .jsonl or .jsonl.gz, see the module's docstring.
      format: `load_prm`'s.
      out: directory for the report; None writes nothing. Files of an older report are replaced,
        all at the end, so that an error leaves them as they were.
      threshold: in [0, 1], scores below it count as wrong; the best one is reported beside it.
      batch_size: solutions a forward.
      max_length: tokens; longer solutions are not scored and count as wrong (default: the PRM's
        context).
      limit: only the first so many rows.
    Returns:
      The report, see `make_report`.
    Raises:
      InputError: a bad option, row or PRM, or `out` without matplotlib; nothing is written then.
    """
    for name, value in {"batch size": batch_size, "max length": max_length, "limit": limit}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 <= threshold <= 1:  # also NaN
        raise InputError(f"threshold must be in [0, 1], got {threshold}")
    if out is not None:
        _check_out(pathlib.Path(out))
    rows = read_solutions(data_file)[:limit]
    prm, params = load_prm(prm_dir, format=format)
    tokenizer, _ = load_tokenizer(prm_dir)
    start = time.perf_counter()
    problems, steps = [row["problem"] for row in rows], [row["steps"] for row in rows]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=len(rows))
        scores = score_solutions(
            prm, params, tokenizer, problems, steps, batch_size=batch_size, max_length=max_length,
            progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    report = {
        "prm": str(prm_dir),
        "data": str(data_file),
        "command": shlex.join(sys.argv),
        "scoring_seconds": round(time.perf_counter() - start, 2),
        **make_report(rows, scores, threshold),
    }
    if out is not None:
        write_report(pathlib.Path(out), report, rows, scores)
    return report


def read_solutions(path) -> list[dict[str, Any]]:
    """Returns the rows {"id", "problem", "steps", "label"} of a file in ProcessBench's layout.

    A row without an id is named by its file and line.

    Raises:
      InputError: no such file, an empty one, or a bad row (file and line are named).
    """
    rows = []
    for row in read_jsonl(path):
        source, steps, label = row["_source"], row.get("steps"), row.get("label")
        if missing := [name for name in ("problem", "steps", "label") if name not in row]:
            raise InputError(
                f'{source}: no "{missing[0]}"; rows are {{"id", "problem", "steps", "label"}}'
            )
        problem = check_text(row["problem"], '"problem"', source)
        if not isinstance(steps, list) or not steps:
            raise InputError(f'{source}: "steps" must be a list of at least one text')
        steps = [check_text(step, f"step {k}", source) for k, step in enumerate(steps)]
        if type(label) is not int or not -1 <= label < len(steps):
            raise InputError(
                f'{source}: "label" must be an integer in -1 .. {len(steps) - 1} (the first wrong '
                f"of its {len(steps)} steps, -1 = none), got {label!r:.40}"
            )
        identity = str(row.get("id", source))
        rows.append({"id": identity, "problem": problem, "steps": steps, "label": label})
    return rows


def make_report(rows: list[dict], scores: Scores, threshold: float) -> dict[str, Any]:
    """Returns all figures of a report, as plain numbers that JSON can hold.

    Args:
      rows: of `read_solutions`; scores: one entry per row, [its steps] float or None.
    Returns:
      "solutions", "steps"; "at_threshold" and "best": `process_bench` with "threshold" and
      "f1_interval" (95 %, bootstrap); "baselines" and "reliability" as in calibration.py; "sweep":
      lists of at most 200 points of `threshold_sweep`, the best one among them.
    """
    labels = [row["label"] for row in rows]
    num_steps = [len(row["steps"]) for row in rows]
    for i, row in enumerate(scores):
        if row is not None and len(row) != num_steps[i]:
            raise ValueError(f"solution {i}: {len(row)} scores for {num_steps[i]} steps")
    sweep = threshold_sweep(scores, labels)
    best = sweep.pop("best")["threshold"]

    def at(value: float) -> dict[str, Any]:
        interval = list(bootstrap_f1(scores, labels, value))
        return {"threshold": value, **process_bench(scores, labels, value), "f1_interval": interval}

    spread = np.linspace(0, len(sweep["f1"]) - 1, min(len(sweep["f1"]), _SWEEP_POINTS - 1))
    kept = np.union1d(spread.astype(int), np.flatnonzero(sweep["threshold"] == best))
    return {
        "solutions": len(rows),
        "steps": sum(num_steps),
        "at_threshold": at(threshold),
        "best": at(best),
        "baselines": baselines(num_steps, labels, threshold),
        "reliability": reliability(scores, labels),
        "sweep": {name: column[kept].tolist() for name, column in sweep.items()},
    }


def write_report(out: pathlib.Path, report: dict, rows: list[dict], scores: Scores) -> None:
    """Writes report.json, scores.jsonl and reliability.png into `out`, all or none of them.

    A line of scores.jsonl is {"id", "label", "predicted" (at the report's threshold; null, like
    "scores", where the solution was not scored), "scores"}.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        unfinished = pathlib.Path(folder)
        draw(report, unfinished / "reliability.png")
        with open(unfinished / "scores.jsonl", "w") as file:
            for row, score in zip(rows, scores, strict=True):
                known = score is not None
                predicted = (
                    first_error(score, report["at_threshold"]["threshold"]) if known else None
                )
                values = [round(float(x), 6) for x in score] if known else None
                line = {"id": row["id"], "label": row["label"], "predicted": predicted}
                file.write(json.dumps({**line, "scores": values}) + "\n")
        (unfinished / "report.json").write_text(
            json.dumps(report, indent=2, allow_nan=False) + "\n"
        )
        for name in ("scores.jsonl", "reliability.png", "report.json"):
            os.replace(unfinished / name, out / name)


def draw(report: dict, path) -> None:
    """Draws the reliability curve over its histogram, and the threshold sweep beside them."""
    from matplotlib.figure import Figure  # an extra; Figure alone needs no display

    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 1])
    curve = figure.add_subplot(grid[0, 0])
    histogram = figure.add_subplot(grid[1, 0], sharex=curve)
    _draw_reliability(curve, histogram, report["reliability"])
    sweep = figure.add_subplot(grid[:, 1])
    _draw_sweep(sweep, report)
    handles, labels = sweep.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    prm = "/".join(pathlib.Path(report["prm"]).parts[-2:])
    title = f"{prm} on {pathlib.Path(report['data']).name}"
    figure.suptitle(title, parse_math=False, fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_reliability(curve, histogram, found: dict) -> None:
    filled = [row for row in found["bins"] if row["count"]]
    curve.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    curve.plot(
        [row["mean_score"] for row in filled], [row["share_correct"] for row in filled],
        color="C0", marker="o", label="this PRM",
    )  # fmt: skip
    error = "no labelled step" if found["ece"] is None else f"ECE {found['ece']:.3f}"
    curve.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of steps correct")
    curve.set_title(f"Reliability, {found['steps']:,} labelled steps, {error}", fontsize=10)
    curve.tick_params(labelbottom=False)
    curve.legend(loc="best", fontsize=9)
    curve.grid(alpha=0.3)
    bins = found["bins"]
    histogram.bar(
        [row["low"] for row in bins], [row["count"] for row in bins], width=1 / len(bins),
        align="edge", color="C0", alpha=0.6, edgecolor="white",
    )  # fmt: skip
    for row in bins:  # in numbers, for most scores lie in one or two bins
        middle = (row["low"] + row["high"]) / 2
        histogram.annotate(f"{row['count']:,}", (middle, row["count"]), ha="center", va="bottom",
                           fontsize=8)  # fmt: skip
    histogram.set(xlabel="PRM score", ylabel="steps")
    histogram.margins(y=0.3)


def _draw_sweep(axes, report: dict) -> None:
    sweep, best, given = report["sweep"], report["best"], report["at_threshold"]
    names = {
        "f1": ("F1", "C3", 2.2),
        "acc_error": ("right first error (erroneous solutions)", "C1", 1.3),
        "acc_correct": ("no error found (correct solutions)", "C2", 1.3),
    }
    for key, (label, color, width) in names.items():
        axes.plot(sweep["threshold"], sweep[key], color=color, linewidth=width, label=label)
    random = report["baselines"]["random_scores"]["best_f1"]
    axes.axhline(
        random, color="0.5", linestyle=":", label=f"best F1 of random scores, {random:.3f}"
    )
    for name, row, color in (("threshold", given, "C0"), ("best on this file", best, "C3")):
        label = f"{name} {row['threshold']:.3g}: F1 {row['f1']:.3f}"
        axes.axvline(row["threshold"], color=color, linestyle="--", label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold", ylabel="accuracy, F1")
    axes.set_title(f"ProcessBench, {report['solutions']:,} solutions", fontsize=10)
    axes.grid(alpha=0.3)


def print_report(report: dict, out=None) -> None:
    """Prints the report as a table, and its main figures as one JSON object on the last line."""
    given, best, base = report["at_threshold"], report["best"], report["baselines"]
    random, console = base["random_scores"], Console(markup=False, highlight=False)
    table = Table(
        "predictor", "threshold", "F1", "95 %", "error found", "clean passed",
        title=f"{report['prm']} on {report['data']}", title_justify="left",
    )  # fmt: skip
    for name, row in (("PRM", given), ("PRM, best", best)):
        low, high = row["f1_interval"]
        table.add_row(
            name, f"{row['threshold']:.3f}", f"{row['f1']:.3f}", f"{low:.2f} - {high:.2f}",
            f"{row['acc_error']:.3f}", f"{row['acc_correct']:.3f}",
        )  # fmt: skip
    table.add_row("random", f"{given['threshold']:.3f}", f"{random['f1']:.3f}")
    table.add_row("random, best", "", f"{random['best_f1']:.3f}")
    for key, name in (("never_an_error", "no error"), ("always_step_0", "always step 0")):
        row = base[key]
        accuracies = (f"{row['acc_error']:.3f}", f"{row['acc_correct']:.3f}")
        table.add_row(name, "", f"{row['f1']:.3f}", "", *accuracies)
    console.print(table)
    counts = f"{given['n_error']} with an error, {given['n_correct']} without"
    console.print(f"{report['solutions']} solutions ({counts}), {report['steps']} steps")
    if given["unscored"]:
        console.print(
            f"{given['unscored']} of them could not be scored (too long for the PRM, or not to be "
            "laid out exactly) and count as wrong"
        )
    if not (given["n_error"] and given["n_correct"]):
        console.print("F1 means nothing here: the file lacks erroneous or correct solutions")
    ece, steps = report["reliability"]["ece"], report["reliability"]["steps"]
    console.print("" if ece is None else f"expected calibration error {ece:.3f} on {steps} steps")
    console.print("the best threshold was chosen on this same file, so its F1 is optimistic")
    if out is not None:
        console.print(f"written: {out}/report.json, scores.jsonl, reliability.png")
    figures = {key: report[key] for key in ("prm", "data", "solutions", "scoring_seconds")}
    figures |= {key: best[key] for key in ("unscored", "n_error", "n_correct")}
    for prefix, row in (("", given), ("best_", best)):
        keys = ("threshold", "f1", "f1_interval", "acc_error", "acc_correct")
        figures |= {prefix + key: row[key] for key in keys}
    random_figures = {"random_f1": random["f1"], "random_best_f1": random["best_f1"]}
    print(json.dumps({**figures, **random_figures, "ece": ece}))


def _check_out(out: pathlib.Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "reliability.png needs matplotlib: pip install 'scope_jax[eval]', or leave --out away"
        )
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise InputError(f"--out {out}: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: {parent} is not writable")
