"""Turns OUT/cells.jsonl into OUT/tables.md, and into figures with their data.

    python experiments/miniature/tables.py --out /tmp/miniature [--smoke]

Means have 95 % intervals over the runs by the t distribution. Tests are over differences of two
arms' runs from the same base and RL seed: the t test, the exact sign-flip test, and Holm's
adjustment of the latter over all arms of a table. Diversity of two runs is compared on the problems
where both have enough correct samples: else the one that solves harder problems would be compared
on other ones. Runs of the same base are not independent; `bases` says for how many of the bases the
mean difference is positive.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from cells import ARMS, ASKED_LATER, FULL, PRIMARY, REFERENCES, SMOKE, Plan, tuned_arms
from grid import pilot_rates, read_lines
from stats import Mean, holm, mean_interval, paired_t, sign_flip

Runs = dict[str, dict[tuple[str, int], dict]]  # arm -> (base, seed) -> line of cells.jsonl
PER_PROBLEM = ("distinct_all", "distinct", "same", "td", "ed")


def tokens(value: float) -> str:
    return f"{value / 1000:.1f}k"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # heading, name, how it is written
    ("greedy", "greedy", "{:.3f}".format),
    ("pass@1", "pass@1", "{:.3f}".format),
    ("pass@8", "pass@8", "{:.3f}".format),
    ("OOD pass@1", "ood_pass@1", "{:.3f}".format),
    ("distinct among {m} correct", "distinct", "{:.3f}".format),
    ("two correct the same", "same", "{:.3f}".format),
    ("TD of correct", "td", "{:.3f}".format),
    ("groups with signal", "signal", "{:.3f}".format),
    ("policy tokens", "policy_tokens", tokens),
    ("teacher tokens", "teacher_tokens", tokens),
    ("updates", "updates", "{:.0f}".format),
    ("seconds", "seconds", "{:.0f}".format),
)


def load_runs(out: pathlib.Path, steps: int) -> dict[tuple[str, int], Runs]:
    """Returns the finished cells of so many training steps by (task, n), arms in the order of
    ARMS.
    """
    found: dict[tuple[str, int], Runs] = {}
    rows = [row for row in read_lines(out / "cells.jsonl") if row["status"] == "done"]
    rows = [row for row in rows if row["steps"] == steps]
    for row in sorted(rows, key=lambda row: (row["task"], row["n"], list(ARMS).index(row["arm"]))):
        runs = found.setdefault((row["task"], row["n"]), {}).setdefault(row["arm"], {})
        runs[row["base"], row["seed"]] = row
    return found


def value(row: dict, column: str) -> float | None:
    """Returns a run's value of a column; None where it has none (the base policy spends nothing).

    "signal" is the mean over all steps of the share of groups with an advantage that is not 0.
    """
    if column == "signal":
        curve = row.get("curve", {}).get("signal")
        return float(np.mean([share for _, share in curve])) if curve else None
    return {**row.get("spent", {}), **row["columns"]}.get(column)


def values(runs: dict[tuple[str, int], dict], column: str) -> list[float]:
    return [x for row in runs.values() if (x := value(row, column)) is not None]


def differences(one: dict, other: dict, column: str) -> dict[tuple[str, int], float]:
    """Returns (base, seed) -> how much higher the column is in `one`'s run than in `other`'s."""
    found = {}
    for pair in one.keys() & other.keys():
        a, b = one[pair], other[pair]
        if column in PER_PROBLEM:
            both = [
                x[column] - y[column]
                for x, y in zip(a["problems"], b["problems"], strict=True)
                if x.get(column) is not None and y.get(column) is not None
            ]
            if both:
                found[pair] = float(np.mean(both))
        elif (x := value(a, column)) is not None and (y := value(b, column)) is not None:
            found[pair] = x - y
    return dict(sorted(found.items()))


def bases_won(found: dict[tuple[str, int], float]) -> str:
    by_base: dict[str, list[float]] = {}
    for (base, _), difference in found.items():
        by_base.setdefault(base, []).append(difference)
    return f"{sum(np.mean(d) > 0 for d in by_base.values())}/{len(by_base)}"


# ------------------------------------------------------------------------------ Markdown


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(mean: Mean | None, write: Callable[[float], str] = "{:.3f}".format) -> str:
    if mean is None:
        return "-"
    return write(mean.value) + (f" ± {write(mean.half)}" if mean.half is not None else "")


def probability(p: float | None) -> str:
    if p is None:
        return "-"
    return "<.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def results_table(arms: Runs, among: int) -> str:
    """Returns every arm's means with their intervals."""
    rows = []
    for arm, runs in arms.items():
        found = [(values(runs, name), write) for _, name, write in COLUMNS]
        cells = [interval(mean_interval(x) if x else None, write) for x, write in found]
        rows.append([arm, str(len(runs)), *cells])
    return table(["arm", "runs", *(heading.format(m=among) for heading, *_ in COLUMNS)], rows)


def paired_table(arms: Runs, reference: str) -> str:
    """Returns every arm's differences from a reference arm, with tests."""
    others = [arm for arm in arms if arm not in (reference, "base")]
    tested = ("pass@1", "greedy", "ood_pass@1", "distinct", "same")
    found = {c: [differences(arms[a], arms[reference], c) for a in others] for c in tested}
    flips = {c: [sign_flip(list(d.values())) for d in found[c]] for c in tested}
    adjusted = {column: holm(p) for column, p in flips.items()}
    rows = []
    for i, arm in enumerate(others):
        first = found["pass@1"][i]
        row = [arm, str(len(first)), _difference(first), probability(paired_t([*first.values()]))]
        row += [probability(flips["pass@1"][i]), probability(adjusted["pass@1"][i])]
        row += [bases_won(first)]
        for column in tested[1:]:
            row += [_difference(found[column][i]), probability(adjusted[column][i])]
        rows.append(row)
    headings = ["arm", "pairs", "Δ pass@1", "p (t)", "p (flip)", "p (Holm)", "bases"]
    for name in ("greedy", "OOD pass@1", "distinct", "two the same"):
        headings += [f"Δ {name}", "p (Holm)"]
    return table(headings, rows)


def _difference(found: dict) -> str:
    return interval(mean_interval([*found.values()]) if found else None, "{:+.3f}".format).replace(
        "± +", "± "
    )


def tests_table(
    results: dict[tuple[str, int], Runs], plan: Plan, claims=PRIMARY, seeds=None
) -> str:
    """Returns the tests of claims in every (task, n) of the block "headline": one family.

    Args:
      claims: of (better, than, column).
      seeds: RL seeds that count; None = all.
    """
    headline = {(b.task, n) for b in plan.blocks if b.name == "headline" for n in b.sizes}
    rows, p_values = [], []
    for task, n in sorted(headline & results.keys()):
        for better, than, column in claims:
            arms = results[task, n]
            found = differences(arms.get(better, {}), arms.get(than, {}), column)
            found = {pair: x for pair, x in found.items() if seeds is None or pair[1] in seeds}
            p_values.append(sign_flip([*found.values()]))
            p_t = probability(paired_t([*found.values()]))
            row = [f"{task} n={n}", f"{better} > {than}", column, str(len(found))]
            row += [_difference(found), p_t, probability(p_values[-1]), bases_won(found)]
            rows.append(row)
    for row, p in zip(rows, holm(p_values), strict=True):
        row.insert(-1, probability(p))
    headings = ["task", "claim", "column", "pairs", "difference", "p (t)", "p (flip)", "p (Holm)"]
    return table([*headings, "bases"], rows)


def pilot_table(out: pathlib.Path, plan: Plan) -> str:
    """Returns the pilot's pass@1 on the valid split, the chosen rates bold: a table for each task
    and number of steps.
    """
    found: dict[Any, list[float]] = {}
    for row in read_lines(out / "pilot.jsonl"):
        reached = row["curve"]["valid_pass@1"][-1][1] if row["status"] == "done" else 0.0
        key = (row["task"], row["steps"], row["arm"], row["rate"])
        found.setdefault(key, []).append(reached)
    chosen, parts = pilot_rates(plan, out), []
    for (task, steps), arms in tuned_arms(plan).items():
        rates, rows = plan.rates[task], []
        for arm in arms:
            best, row = chosen.get((task, steps, arm)), [arm]
            for rate in rates:
                reached = found.get((task, steps, arm, rate))
                text = "-" if reached is None else f"{np.mean(reached):.3f}"
                row.append(f"**{text}**" if rate == best else text)
            edge = len(rates) > 1 and best in (rates[0], rates[-1])
            rows.append([*row, "edge of the grid" if edge else ""])
        headings = [f"{task}, {steps} steps", *(f"{rate:g}" for rate in rates), ""]
        parts.append(table(headings, rows))
    return "\n".join(parts)


def longer_steps(plan: Plan) -> list[int]:
    """Returns the training steps of blocks that do not have the plan's."""
    return sorted({block.steps for block in plan.blocks} - {0, plan.steps})


def report(out: pathlib.Path, plan: Plan) -> str:
    """Returns the whole of tables.md."""
    results, among = load_runs(out, plan.steps), plan.final["among"]
    parts = ["# Results\n", "## Primary comparisons\n", tests_table(results, plan)]
    parts += ["RL seed 0 alone, one pair a base:\n", tests_table(results, plan, seeds=(0,))]
    parts += ["Not registered, asked later:\n", tests_table(results, plan, ASKED_LATER)]
    for steps in (plan.steps, *longer_steps(plan)):
        for (task, n), arms in load_runs(out, steps).items():
            parts += [f"## {task}, n = {n}, {steps} steps\n", results_table(arms, among)]
            for reference in REFERENCES:
                if reference in arms:
                    parts += [f"Against {reference}:\n", paired_table(arms, reference)]
    parts += ["## Pilot: valid pass@1 by learning rate\n", pilot_table(out, plan)]
    failed = [row for row in read_lines(out / "cells.jsonl") if row["status"] == "failed"]
    if failed:
        lines = [[row["name"], row["reason"].replace("|", "/")] for row in failed]
        parts += ["## Failed\n", table(["cell", "reason"], lines)]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="grid.py's")
    parser.add_argument("--smoke", action="store_true", help="it was a --smoke grid")
    args = parser.parse_args()
    plan = SMOKE if args.smoke else FULL
    results = load_runs(args.out, plan.steps)
    if not results:
        print(f"error: {args.out / 'cells.jsonl'} has no finished cell", file=sys.stderr)
        return 2
    (args.out / "tables.md").write_text(report(args.out, plan))
    print(args.out / "tables.md")
    try:
        import figures
    except ModuleNotFoundError as error:
        print(f"no figures: {error}; pip install 'scope_jax[eval]'", file=sys.stderr)
        return 0
    longer = [load_runs(args.out, steps) for steps in longer_steps(plan)]
    merged = {setting: arms for found in longer for setting, arms in found.items()}
    for file in figures.draw_all(results, merged, plan, args.out / "figures"):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
