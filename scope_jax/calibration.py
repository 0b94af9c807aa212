"""How good a PRM's step scores are: ProcessBench's accuracy, thresholds, reliability.

Pure functions of host arrays. Common to all of them:

  scores: one entry per solution, [number of steps] float in [0, 1] (the probability that each step
    is correct), or None where the PRM could not score the solution. They are compared as float32,
    as the training loop compares them.
  labels: [number of solutions] int, 0-based index of the first wrong step, -1 = no error.

All raise InputError with the solution's 0-based number for a score that is not a number in [0, 1]
(NaN included), and for a label outside -1 .. number of steps - 1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scope_jax.records import InputError

Scores = Sequence[np.ndarray | None]


def first_error(scores, threshold: float) -> int:
    """Returns the index of the first score [S] below `threshold`; -1 where there is none."""
    below = np.asarray(scores, np.float32) < np.float32(threshold)
    return int(below.argmax()) if below.any() else -1


def process_bench(scores: Scores, labels, threshold: float) -> dict[str, Any]:
    """Returns ProcessBench's F1 (https://arxiv.org/abs/2412.06559).

    A solution that could not be scored counts as a wrong prediction, whatever its label.

    Returns:
      "acc_error": share of the erroneous solutions whose first wrong step is found exactly;
      "acc_correct": share of the correct solutions that are predicted -1; "f1": their harmonic
      mean, 0 if both are 0; "n_error", "n_correct", "unscored": numbers of solutions. A share of
      no solutions is 0, so F1 means something only where both numbers are above 0.
    """
    scores, labels = _checked(scores, labels)
    right = _right(scores, labels, threshold)
    acc_error, acc_correct = (_share(right[side]) for side in (labels >= 0, labels < 0))
    return {
        "acc_error": acc_error,
        "acc_correct": acc_correct,
        "f1": float(_harmonic_mean(acc_error, acc_correct)),
        "n_error": int((labels >= 0).sum()),
        "n_correct": int((labels < 0).sum()),
        "unscored": sum(row is None for row in scores),
    }


def threshold_sweep(scores: Scores, labels) -> dict[str, Any]:
    """Returns the accuracies at every threshold that makes a difference.

    Predictions change only where the threshold passes a score, so one threshold stands for each gap
    between neighbouring distinct scores (its midpoint), one for those below all scores, and one for
    those above all (just over 1 if there is a score of 1).

    Returns:
      "threshold", "acc_error", "acc_correct", "f1": [distinct scores + 1] float64 each, by
      ascending threshold; the accuracies as in `process_bench`. Without any score there is the one
      threshold 0.5. "best": these four as floats at the threshold with the largest F1; ties go to
      the one nearest to 0.5, then to the smaller one. On the data that it was chosen on, the best
      F1 is optimistic.
    """
    scores, labels = _checked(scores, labels)
    distinct = np.unique([score for row in scores if row is not None for score in row])
    thresholds = _representatives(distinct) if len(distinct) else np.array([0.5], np.float32)
    low, high = _right_between(scores, labels)
    accuracies = []
    for side in (labels >= 0, labels < 0):
        # Right at t means low < t <= high: count the lows passed, less the highs passed.
        real = side & (low < high)
        passed = np.searchsorted(np.sort(low[real]), thresholds, side="left")
        left = np.searchsorted(np.sort(high[real]), thresholds, side="left")
        accuracies.append((passed - left) / max(side.sum(), 1))
    sweep = {
        "threshold": thresholds.astype(np.float64),
        "acc_error": accuracies[0],
        "acc_correct": accuracies[1],
        "f1": _harmonic_mean(*accuracies),
    }
    distance = np.abs(sweep["threshold"] - 0.5)
    best = np.where(sweep["f1"] == sweep["f1"].max(), distance, np.inf).argmin()
    return {**sweep, "best": {name: float(column[best]) for name, column in sweep.items()}}


def bootstrap_f1(
    scores: Scores, labels, threshold: float, *, resamples=1000, seed=0, level=0.95
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the F1 at a fixed threshold.

    The bootstrap is stratified: erroneous and correct solutions are resampled apart, as both
    numbers are a choice of the benchmark. Of n resampled verdicts, Binomial(n, accuracy) are right,
    so these numbers are drawn directly.

    Args:
      resamples: number of resampled benchmarks; seed: of numpy's generator; level: of the interval.
    Returns:
      (low, high).
    """
    point = process_bench(scores, labels, threshold)
    rng = np.random.default_rng(seed)
    draws = [
        rng.binomial(n, accuracy, resamples) / max(n, 1)
        for n, accuracy in (
            (point["n_error"], point["acc_error"]),
            (point["n_correct"], point["acc_correct"]),
        )
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(_harmonic_mean(*draws), [tail, 1 - tail])
    return float(low), float(high)


def reliability(scores: Scores, labels, bins: int = 10) -> dict[str, Any]:
    """Returns how often steps with a given score are correct.

    Steps before the first error are correct and the first error is wrong. Later steps have no
    label, for they may be sound or build on the error, and are left out, as are unscored solutions.

    Args:
      bins: number of equal-width bins of [0, 1]; a score on an edge belongs to the bin above it.
    Returns:
      "bins": a list of {"low", "high", "count", "mean_score", "share_correct"}, the last two None
      in an empty bin; "steps": number of labelled steps; "ece": expected calibration error, the
      mean over the steps of |mean_score - share_correct| of their bins (Guo et al.,
      https://arxiv.org/abs/1706.04599), None without a step.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    scores, labels = _checked(scores, labels)
    values, correct = [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    for row, label in zip(scores, labels, strict=True):
        if row is not None:
            values.append(row if label < 0 else row[: label + 1])
            correct.append(np.arange(len(values[-1])) != label)
    value, is_correct = np.concatenate(values), np.concatenate(correct)
    place = np.minimum((value * np.float32(bins)).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.maximum(count, 1)
    mean_score = np.bincount(place, value, bins) / filled
    share = np.bincount(place, is_correct, bins) / filled
    rows = [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "count": int(count[b]),
            "mean_score": float(mean_score[b]) if count[b] else None,
            "share_correct": float(share[b]) if count[b] else None,
        }
        for b in range(bins)
    ]
    gap = float((count * np.abs(mean_score - share)).sum())
    return {"bins": rows, "steps": len(value), "ece": gap / len(value) if len(value) else None}


def baselines(num_steps, labels, threshold: float, *, draws=20, seed=0) -> dict[str, Any]:
    """Returns what predictors that never read a solution reach on these labels.

    Args:
      num_steps: [number of solutions] int.
      threshold: of the random scores.
      draws: number of random score sets; seed: of numpy's generator.
    Returns:
      "never_an_error" and "always_step_0": as `process_bench` (both have F1 0, for each is blind
      on one side); "random_scores", uniform in [0, 1): "f1", the mean over the draws at
      `threshold`, and "best_f1", the mean of each draw's F1 at its own best threshold.
    """
    rng = np.random.default_rng(seed)
    at_threshold, at_best = [], []
    for _ in range(draws):
        scores = [rng.random(n, np.float32) for n in num_steps]
        at_threshold.append(process_bench(scores, labels, threshold)["f1"])
        at_best.append(threshold_sweep(scores, labels)["best"]["f1"])
    return {
        "never_an_error": process_bench([np.ones(n) for n in num_steps], labels, 0.5),
        "always_step_0": process_bench([np.zeros(n) for n in num_steps], labels, 0.5),
        "random_scores": {"f1": float(np.mean(at_threshold)), "best_f1": float(np.mean(at_best))},
    }


def _checked(scores, labels) -> tuple[list[np.ndarray | None], np.ndarray]:
    """Returns the scores as float32 rows and the labels [number of solutions] int64."""
    if len(scores) != len(labels):
        raise InputError(f"{len(scores)} solutions but {len(labels)} labels")
    rows = []
    for i, (row, label) in enumerate(zip(scores, labels, strict=True)):
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < -1:
            raise InputError(f"solution {i}: label {label!r} is not an integer of at least -1")
        if row is None:
            rows.append(None)
            continue
        row = np.asarray(row, np.float32)
        if row.ndim != 1:
            raise InputError(f"solution {i}: scores must be [number of steps], got {row.shape}")
        if not ((row >= 0) & (row <= 1)).all():  # also NaN
            bad = row[~((row >= 0) & (row <= 1))][0]
            raise InputError(f"solution {i}: score {bad} is not a probability in [0, 1]")
        if label >= len(row):
            raise InputError(f"solution {i}: label {label} but only {len(row)} steps")
        rows.append(row)
    return rows, np.asarray(labels, np.int64).reshape(-1)


def _right(scores: list, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Returns [number of solutions] bool: the prediction equals the label."""
    pairs = zip(scores, labels, strict=True)
    right = [row is not None and first_error(row, threshold) == label for row, label in pairs]
    return np.array(right, bool)


def _right_between(scores: list, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (low, high), [number of solutions] float32 each: right where low < t <= high.

    The first step below t is j where the minimum of the scores up to j is below t and that of the
    scores before j is not; there is none where t is not above the minimum of all.
    """
    low, high = np.zeros(len(labels), np.float32), np.zeros(len(labels), np.float32)
    for i, (row, label) in enumerate(zip(scores, labels, strict=True)):
        if row is None:
            continue  # low = high: nowhere
        if label < 0:
            low[i], high[i] = -np.inf, row.min(initial=np.inf)
        else:
            before = row[:label].min(initial=np.inf)
            low[i], high[i] = min(before, row[label]), before
    return low, high


def _representatives(distinct: np.ndarray) -> np.ndarray:
    """Returns one threshold below all of the ascending scores, between neighbours, above all."""
    below, above = distinct[:-1], distinct[1:]
    middle = (below + above) / np.float32(2)
    middle = np.where(middle > below, middle, above)  # neighbouring floats have nothing between
    first = distinct[:1] / np.float32(2)
    last = (distinct[-1:] + np.float32(1)) / np.float32(2)
    last = np.where(last > distinct[-1:], last, np.nextafter(distinct[-1:], np.float32(2)))
    return np.concatenate([first, middle, last])


def _share(right: np.ndarray) -> float:
    return float(right.mean()) if right.size else 0.0


def _harmonic_mean(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return 2 * a * b / np.where(a + b > 0, a + b, 1.0)
