"""The figures of tables.py, each with its data as CSV beside it; for matplotlib, extra "eval"."""

import csv
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cells import ABLATIONS, ARMS, OTHER_TEACHERS, Plan
from stats import mean_interval
from tables import Runs, differences, values

# Of the many arms these are told apart by colour (Okabe and Ito's, safe for the colour-blind).
SHOWN = {
    "base": "#7F7F7F", "dr_grpo": "#000000", "luffy": "#E69F00", "rl_sft": "#CC79A7",
    "scope_random_correct": "#56B4E9", "scope": "#D55E00", "scope_plus": "#009E73",
    "dapo": "#0072B2",
}  # fmt: skip
GREY = "#D5D5D5"
Results = dict[tuple[str, int], Runs]


def draw_all(
    results: Results, longer: Results, plan: Plan, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws all figures that the results have data for; returns the files.

    Args:
      longer: of runs with more steps than the plan's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    headline = [(b.task, n) for b in plan.blocks if b.name == "headline" for n in b.sizes]
    main = {key: results[key] for key in headline if key in results}
    distinct = f"distinct valid solutions\namong {plan.final['among']} correct"
    files = [
        over_training(main, "valid_pass@1", "pass@1, valid split", folder / "accuracy"),
        over_training(main, "signal", "groups with signal", folder / "signal", smooth=5),
        over_training(longer, "valid_pass@1", "pass@1, valid split", folder / "accuracy_longer"),
        against_accuracy(main, longer, "distinct", distinct, folder / "diversity"),
        against_accuracy(main, longer, "pass@8", "pass@8, test split", folder / "pass_at_8"),
        pass_at_k(main, folder / "pass_at_k"),
        gain_against_difficulty(results, folder / "difficulty"),
        changes(main, ABLATIONS, folder / "ablations"),
        changes(main, OTHER_TEACHERS, folder / "teachers", "dr_grpo"),
    ]
    return [file for pair in files if pair for file in pair]


def save(figure, file: pathlib.Path, headings: list[str], rows: list[list]) -> list[pathlib.Path]:
    """Writes FILE.png and FILE.csv."""
    png, data = file.with_suffix(".png"), file.with_suffix(".csv")
    figure.savefig(png, dpi=150, bbox_inches="tight")
    plt.close(figure)
    with data.open("w", newline="") as out:
        csv.writer(out).writerows([headings, *rows])
    return [png, data]


def panels(results: Results, width: float = 4.4, height: float = 3.4):
    """Returns (figure, axes, one for each (task, n)), titled."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(width * len(results), height), squeeze=False,
        layout="constrained", sharey=True,
    )  # fmt: skip
    for axis, (task, n) in zip(axes[0], results, strict=True):
        axis.set_title(f"{task}, n = {n}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes[0]


def legend(figure, axes) -> None:
    """Puts one legend for all panels at the right."""
    named = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    ordered = [name for name in SHOWN if name in named]
    ordered += [name for name in named if name not in SHOWN]
    figure.legend(
        [named[name] for name in ordered], ordered, loc="outside right center", frameon=False,
        fontsize=8,
    )  # fmt: skip


def over_training(results: Results, curve: str, label: str, file: pathlib.Path, smooth: int = 1):
    """Draws a curve over the steps: mean and 95 % interval over the runs; nothing without runs.

    Args:
      smooth: steps of a running mean.
    """
    if not results:
        return None
    figure, axes = panels(results)
    rows = []
    for axis, ((task, n), arms) in zip(axes, results.items(), strict=True):
        for arm, color in SHOWN.items():
            runs = [row["curve"][curve] for row in arms.get(arm, {}).values() if "curve" in row]
            if not runs:
                continue
            steps, smoothed = [step for step, _ in runs[0]], []
            for run in runs:
                shares = [share for _, share in run]
                smoothed.append(
                    [np.mean(shares[max(0, i + 1 - smooth) : i + 1]) for i in range(len(shares))]
                )
            means = [mean_interval(at) for at in zip(*smoothed, strict=True)]
            middle = np.array([mean.value for mean in means])
            half = np.array([mean.half or 0.0 for mean in means])
            axis.plot(steps, middle, color=color, label=arm, linewidth=1.6)
            low, high = np.clip([middle - half, middle + half], 0, 1)  # of shares
            axis.fill_between(steps, low, high, color=color, alpha=0.12, lw=0)
            rows += [[task, n, arm, s, m.value, m.half] for s, m in zip(steps, means, strict=True)]
        axis.set_xlabel("training step")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(label)
    legend(figure, axes)
    return save(figure, file, ["task", "n", "arm", "step", "mean", "half"], rows)


def against_accuracy(
    results: Results, longer: Results, column: str, label: str, file: pathlib.Path
):
    """Draws each arm at (pass@1, column): what it keeps or loses at the accuracy that it has. The
    means of all arms are within the picture, and the intervals of those that SHOWN names.

    Args:
      longer: runs with more steps, drawn hollow: so arms meet at other accuracies, too.
    """
    figure, axes = panels(results, width=4.8)
    rows = []
    inside: list[float] = []  # an arm that collapsed has an interval too wide to draw whole
    for axis, (task, n) in zip(axes, results, strict=True):
        for trained, marks in ((results, "full"), (longer, "none")):
            for arm, runs in trained.get((task, n), {}).items():
                found = [values(runs, name) for name in ("pass@1", column)]
                if not all(found):
                    continue
                x, y = (mean_interval(measured) for measured in found)
                known = arm in SHOWN
                half = (y.half or 0.0) * known
                inside += [y.value - half, y.value + half]
                axis.errorbar(
                    x.value, y.value, xerr=x.half, yerr=y.half, fmt="o", markersize=5,
                    color=SHOWN.get(arm, GREY), fillstyle=marks, elinewidth=0.8,
                    label=arm if known else "other arms", zorder=3 if known else 2,
                )  # fmt: skip
                rows.append([task, n, marks == "none", arm, x.value, x.half, y.value, y.half])
        axis.set_xlabel("pass@1" + ", hollow: more steps" * ((task, n) in longer))
        axis.margins(x=0.08)
    if inside:
        margin = 0.08 * (max(inside) - min(inside)) + 1e-3
        axes[0].set_ylim(min(inside) - margin, max(inside) + margin)
    axes[0].set_ylabel(label)
    legend(figure, axes)
    headings = ["task", "n", "longer", "arm", "pass@1", "half", column, "half"]
    return save(figure, file, headings, rows)


def pass_at_k(results: Results, file: pathlib.Path):
    """Draws pass@k over k: what an arm gains at k = 1 it may lose at large k."""
    figure, axes = panels(results)
    rows = []
    for axis, ((task, n), arms) in zip(axes, results.items(), strict=True):
        for arm, color in SHOWN.items():
            runs = arms.get(arm, {})
            ks = [k for k in (1, 2, 4, 8, 16, 32) if runs and values(runs, f"pass@{k}")]
            means = [mean_interval(values(runs, f"pass@{k}")) for k in ks]
            if ks:
                half = [mean.half or 0.0 for mean in means]
                axis.errorbar(
                    ks, [mean.value for mean in means], yerr=half, color=color, label=arm,
                    marker="o", markersize=3, linewidth=1.4, elinewidth=0.7,
                )  # fmt: skip
            rows += [[task, n, arm, k, m.value, m.half] for k, m in zip(ks, means, strict=True)]
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("k")
        axis.set_ylim(0, 1.03)
    axes[0].set_ylabel("pass@k, test split")
    legend(figure, axes)
    return save(figure, file, ["task", "n", "arm", "k", "mean", "half"], rows)


def gain_against_difficulty(results: Results, file: pathlib.Path):
    """Draws what arms gain over dr_grpo in pass@1 against the base policy's pass@8, by task and n:
    the fewer problems it ever solves, the fewer groups have a signal of their own.
    """
    points: dict[str, list[list]] = {}
    for (task, n), arms in results.items():
        base = values(arms.get("base", {}), "pass@8")
        if not base or "dr_grpo" not in arms:
            continue
        for arm in SHOWN:
            if arm in ("base", "dr_grpo") or arm not in arms:
                continue
            found = differences(arms[arm], arms["dr_grpo"], "pass@1")
            if found:
                gain = mean_interval([*found.values()])
                points.setdefault(arm, []).append([1 - np.mean(base), task, n, *gain[:2]])
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    axis.axhline(0, color="black", linewidth=0.8)
    for arm, found in points.items():
        for task in dict.fromkeys(row[1] for row in found):
            at = sorted(row for row in found if row[1] == task)
            axis.errorbar(
                [row[0] for row in at], [row[3] for row in at], yerr=[row[4] or 0 for row in at],
                color=SHOWN[arm], label=arm, marker="o", markersize=4, linewidth=1.4,
                elinewidth=0.8, capsize=2,
            )  # fmt: skip
    tops: dict = {}
    for share, task, n, gain, half in (row for found in points.values() for row in found):
        tops[share, task, n] = max(tops.get((share, task, n), -1.0), gain + (half or 0))
    for (share, task, n), top in tops.items():
        axis.annotate(f"{task}\nn = {n}", (share, top), (0, 5), textcoords="offset points",
                      ha="center", fontsize=7)  # fmt: skip
    axis.margins(x=0.1, y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("base policy: problems unsolved in 8 samples")
    axis.set_ylabel("gain over dr_grpo, pass@1")
    legend(figure, [axis])
    rows = [[arm, *row] for arm, found in points.items() for row in found]
    return save(figure, file, ["arm", "difficulty", "task", "n", "gain", "half"], rows)


def changes(
    results: Results, names: tuple[str, ...], file: pathlib.Path, reference: str | None = None
):
    """Draws bars of what arms change in pass@1 against a reference, on the same pairs.

    Args:
      reference: an arm; None: of each arm the one that it has its learning rate from.
    """
    references = {name: reference or ARMS[name].rate_of for name in names}
    having = {
        key: arms for key, arms in results.items()
        if any(name in arms and references[name] in arms for name in names)
    }  # fmt: skip
    if not having:
        return None
    bars = [name for name in names if any(name in arms for arms in having.values())]
    figure, axes = panels(having, width=4.6, height=0.8 + 0.34 * len(bars))
    rows = []
    for axis, ((task, n), arms) in zip(axes, having.items(), strict=True):
        axis.grid(axis="y", visible=False)
        for place, arm in enumerate(bars):
            found = differences(arms.get(arm, {}), arms.get(references[arm], {}), "pass@1")
            if not found:
                continue
            mean = mean_interval([*found.values()])
            method = ARMS[arm].method
            axis.barh(
                place, mean.value, xerr=mean.half or 0, height=0.62, alpha=0.85,
                color=SHOWN.get(method, GREY), error_kw={"elinewidth": 1.0},
            )  # fmt: skip
            rows.append([task, n, arm, references[arm], mean.value, mean.half, mean.count])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_yticks(range(len(bars)), bars, fontsize=8)
        axis.set_ylim(len(bars) - 0.5, -0.5)  # the first one on top
        named = reference or " or ".join(dict.fromkeys(references.values()))
        axis.set_xlabel(f"pass@1 minus that of {named}")
    return save(figure, file, ["task", "n", "arm", "than", "change", "half", "pairs"], rows)
