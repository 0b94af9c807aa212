"""Tests of the PRM calibration: hand arithmetic, and plain-Python twins over random scores."""

import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.calibration import (
    baselines,
    bootstrap_f1,
    first_error,
    process_bench,
    reliability,
    threshold_sweep,
)
from scope_jax.locate import first_error_step
from scope_jax.records import InputError

# At threshold 0.5:             first error  label
SCORES = [
    np.array([0.9, 0.2, 0.1]),  # 1          1   right
    np.array([0.9, 0.8, 0.4]),  # 2          0   wrong
    np.array([0.1]),  #           0          0   right
    None,  #                      unscored   2   wrong
    np.array([0.6, 0.7]),  #      -1         -1  right
    np.array([0.6, 0.3]),  #      1          -1  wrong
    None,  #                      unscored   -1  wrong
]
LABELS = [1, 0, 0, 2, -1, -1, -1]


def random_solutions(seed, count=40, coarse=True):
    """Scores on a grid of twelve values (many ties), some solutions unscored, and labels."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, count)
    labels = [int(rng.integers(-1, n)) for n in sizes]
    scores = [rng.integers(0, 12, n) / 11 if coarse else rng.random(n) for n in sizes]
    return [None if rng.random() < 0.1 else row for row in scores], labels


def plain_first_error(row, threshold):
    for k, score in enumerate(row):
        if np.float32(score) < np.float32(threshold):
            return k
    return -1


def plain_process_bench(scores, labels, threshold):
    hits = {True: [], False: []}
    for row, label in zip(scores, labels, strict=True):
        hits[label >= 0].append(row is not None and plain_first_error(row, threshold) == label)
    error, correct = (sum(hits[side]) / max(len(hits[side]), 1) for side in (True, False))
    f1 = 0.0 if error + correct == 0 else 2 * error * correct / (error + correct)
    return error, correct, f1


# --- ProcessBench ---------------------------------------------------------------------------------


def test_f1_is_the_harmonic_mean_of_exact_hits_and_clean_passes():
    assert process_bench(SCORES, LABELS, 0.5) == {
        "acc_error": 2 / 4,
        "acc_correct": 1 / 3,
        "f1": pytest.approx(2 * (2 / 4) * (1 / 3) / (2 / 4 + 1 / 3), rel=1e-15),
        "n_error": 4,
        "n_correct": 3,
        "unscored": 2,
    }


def test_a_score_equal_to_the_threshold_is_not_an_error():
    assert first_error([0.5, 0.4], 0.5) == 1
    # 0.7 as float32 is below 0.7 as float64; the training loop compares float32 with float32.
    assert first_error(np.array([0.7], np.float32), 0.7) == -1
    assert first_error([], 0.5) == -1


@pytest.mark.parametrize("seed", range(3))
def test_first_error_is_the_training_loops(seed):
    rng = np.random.default_rng(seed)
    rows = (rng.integers(0, 11, (50, 6)) / 10).astype(np.float32)
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        loop = first_error_step(jnp.asarray(rows), jnp.ones((50, 6), bool), threshold)
        assert [first_error(row, threshold) for row in rows] == loop.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_process_bench_equals_its_plain_twin(seed):
    scores, labels = random_solutions(seed)
    for threshold in (0.0, 0.25, 0.5, 7 / 11, 1.0):
        found = process_bench(scores, labels, threshold)
        want = plain_process_bench(scores, labels, threshold)
        assert (found["acc_error"], found["acc_correct"]) == want[:2]
        assert found["f1"] == pytest.approx(want[2], rel=1e-15)


@pytest.mark.parametrize(
    ("scores", "labels", "want"),
    [
        ([], [], (0.0, 0.0, 0.0, 0, 0, 0)),
        ([[0.9], [0.9, 0.1]], [-1, -1], (0.0, 0.5, 0.0, 0, 2, 0)),
        ([[0.1], [0.9, 0.1]], [0, 0], (0.5, 0.0, 0.0, 2, 0, 0)),
        ([None, None], [3, -1], (0.0, 0.0, 0.0, 1, 1, 2)),
        ([[0.1], [0.9]], [0, -1], (1.0, 1.0, 1.0, 1, 1, 0)),
    ],
    ids=["empty", "all correct", "all wrong", "all unscored", "perfect"],
)
def test_edges_have_numbers_not_nan(scores, labels, want):
    assert tuple(process_bench(scores, labels, 0.5).values()) == want
    sweep = threshold_sweep(scores, labels)
    best = sweep.pop("best")
    assert all(np.isfinite(column).all() for column in sweep.values())
    assert best["f1"] == sweep["f1"].max() and 0 <= best["threshold"] <= 1
    low, high = bootstrap_f1(scores, labels, 0.5)
    assert low == high == want[2]  # a share of 0, 1/2 against no rival, or 1 cannot vary F1
    assert math.isfinite(
        baselines([1] * len(labels), [-1] * len(labels), 0.5)["random_scores"]["f1"]
    )


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[0.1], [0.5, 0.5]], [0, 2], "solution 1: label 2 but only 2 steps"),
        ([[0.1], []], [0, 0], "solution 1: label 0 but only 0 steps"),
        ([[0.1], [0.5]], [0, -2], "solution 1: label -2 is not an integer of at least -1"),
        ([[0.1], [0.5]], [0, True], "solution 1: label True is not an integer of at least -1"),
        ([[0.1], [0.5]], [0, 0.0], "solution 1: label 0.0 is not an integer of at least -1"),
        ([[0.1], [0.5, np.nan]], [0, 1], "solution 1: score nan is not a probability in [0, 1]"),
        ([[0.1], [np.inf]], [0, 0], "solution 1: score inf is not a probability in [0, 1]"),
        ([[1.5]], [0], "solution 0: score 1.5 is not a probability in [0, 1]"),
        ([[-0.5]], [0], "solution 0: score -0.5 is not a probability in [0, 1]"),
        ([[[0.1]]], [0], "solution 0: scores must be [number of steps], got (1, 1)"),
        ([[0.1]], [0, 0], "1 solutions but 2 labels"),
    ],
)
def test_bad_solutions_are_named(scores, labels, message):
    calls = (
        lambda: process_bench(scores, labels, 0.5),
        lambda: threshold_sweep(scores, labels),
        lambda: bootstrap_f1(scores, labels, 0.5),
        lambda: reliability(scores, labels),
    )
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == message


# --- Thresholds -----------------------------------------------------------------------------------


def test_sweep_by_hand():
    """Scores 0.25 and 0.75 leave three thresholds: below, between, above."""
    sweep = threshold_sweep([[0.75, 0.25], [0.75]], [1, -1])
    assert sweep["threshold"].tolist() == [0.25 / 2, (0.25 + 0.75) / 2, (0.75 + 1) / 2]
    assert sweep["acc_error"].tolist() == [0, 1, 0]  # none; step 1; step 0
    assert sweep["acc_correct"].tolist() == [1, 1, 0]
    assert sweep["f1"].tolist() == [0, 1, 0]
    assert sweep["best"] == {"threshold": 0.5, "acc_error": 1, "acc_correct": 1, "f1": 1}


def test_scores_of_0_and_1_get_thresholds_outside_them():
    sweep = threshold_sweep([[1.0, 0.0], [1.0]], [0, -1])
    assert sweep["threshold"].tolist() == [0.0, 0.5, float(np.nextafter(np.float32(1), 2))]
    assert sweep["acc_error"].tolist() == [0, 0, 1]  # only above 1 does a score of 1 count as wrong
    assert sweep["acc_correct"].tolist() == [1, 1, 0]


def test_neighbouring_floats_are_told_apart():
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    sweep = threshold_sweep([np.array([high, low])], [1])
    assert sweep["acc_error"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_sweep_equals_a_loop_over_its_thresholds(seed, coarse):
    scores, labels = random_solutions(seed, coarse=coarse)
    sweep = threshold_sweep(scores, labels)
    sweep.pop("best")
    assert (np.diff(sweep["threshold"]) > 0).all()
    for t, *found in zip(*sweep.values(), strict=True):
        assert found == pytest.approx(plain_process_bench(scores, labels, t), abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_beats_the_best_one(seed):
    scores, labels = random_solutions(seed, coarse=False)
    found = threshold_sweep(scores, labels)["best"]
    best = process_bench(scores, labels, found["threshold"])["f1"]
    assert best == pytest.approx(found["f1"], rel=1e-15) and best > 0
    grid = [plain_process_bench(scores, labels, t)[2] for t in np.linspace(0, 1.001, 500)]
    assert max(grid) <= best + 1e-15


@pytest.mark.parametrize(
    ("scores", "labels", "want"),
    [
        # F1 is 0 at 0.05, 1 between 0.1 and 0.9 (in the gaps at 0.2, 0.45, 0.75), 0 above.
        ([[0.9, 0.1], [0.9], [0.9, 0.6]], [1, -1, -1], (0.1 + 0.6) / 2),
        ([[0.9, 0.1], [0.9], [0.3, 0.1]], [1, -1, 1], (0.1 + 0.3) / 2),
        ([[0.1]], [-1], 0.1 + 0.9 / 2),  # F1 is 0 throughout
        ([[0.25], [0.75], [0.75]], [0, -1, 0], 0.5),
    ],
)
def test_ties_go_to_the_threshold_nearest_one_half(scores, labels, want):
    assert threshold_sweep(scores, labels)["best"]["threshold"] == pytest.approx(want, rel=1e-6)


def test_even_ties_go_to_the_smaller_threshold():
    sweep = threshold_sweep([[0.5]], [-1])  # no erroneous solution: F1 is 0 at both
    assert sweep["threshold"].tolist() == [0.25, 0.75]
    assert sweep["best"]["threshold"] == 0.25


def test_sweep_of_5000_solutions_takes_under_a_second():
    scores, labels = random_solutions(0, count=5000, coarse=False)
    start = time.perf_counter()
    sweep = threshold_sweep(scores, labels)
    assert time.perf_counter() - start < 1
    assert len(sweep["f1"]) > 10_000


# --- Bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_equals_resampling_the_solutions():
    """Against the plain resampling of solutions, stratum by stratum."""
    scores, labels = random_solutions(1, count=200)
    low, high = bootstrap_f1(scores, labels, 0.3, resamples=20_000)
    rng = np.random.default_rng(0)
    right = {True: [], False: []}
    for row, label in zip(scores, labels, strict=True):
        right[label >= 0].append(row is not None and plain_first_error(row, 0.3) == label)
    draws = []
    for _ in range(4000):
        a, b = (rng.choice(right[side], len(right[side])).mean() for side in (True, False))
        draws.append(2 * a * b / (a + b))
    # Both are Monte Carlo: the quantile of 4000 draws has a standard error of about 0.003 here.
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.01)
    assert high - low > 0.1


def test_bootstrap_is_seeded_holds_the_estimate_and_narrows_with_the_level():
    scores, labels = random_solutions(2, count=100)
    low, high = bootstrap_f1(scores, labels, 0.3)
    assert (low, high) == bootstrap_f1(scores, labels, 0.3)
    assert low < process_bench(scores, labels, 0.3)["f1"] < high
    inner = bootstrap_f1(scores, labels, 0.3, level=0.5)
    assert low < inner[0] < inner[1] < high
    draws = {bootstrap_f1(scores, labels, 0.3, resamples=50, seed=seed) for seed in range(5)}
    assert len(draws) > 1


# --- Reliability ----------------------------------------------------------------------------------


def test_steps_after_the_first_error_are_left_out():
    scores = [np.array([0.9, 0.2, 0.1]), None, np.array([0.8, 0.3])]
    found = reliability(scores, [1, 0, -1], bins=2)
    # Labelled: 0.9 right, 0.2 wrong, 0.8 right, 0.3 right. Not 0.1.
    low, high = found["bins"]
    assert (low["low"], low["high"], low["count"], low["share_correct"]) == (0, 0.5, 2, 1 / 2)
    assert (high["low"], high["high"], high["count"], high["share_correct"]) == (0.5, 1, 2, 2 / 2)
    assert low["mean_score"] == pytest.approx((0.2 + 0.3) / 2, rel=1e-6)
    assert high["mean_score"] == pytest.approx((0.9 + 0.8) / 2, rel=1e-6)
    assert found["steps"] == 4
    assert found["ece"] == pytest.approx((2 * (0.5 - 0.25) + 2 * (1 - 0.85)) / 4, rel=1e-6)


def test_edges_belong_to_the_bin_above_and_1_to_the_last():
    found = reliability([np.array([i / 10 for i in range(11)])], [-1])
    assert [b["count"] for b in found["bins"]] == [1] * 9 + [2]
    empty = reliability([np.array([0.05])], [-1])["bins"][5]
    assert empty == {
        "low": 0.5, "high": 0.6, "count": 0, "mean_score": None, "share_correct": None,
    }  # fmt: skip


@pytest.mark.parametrize("bins", [1, 3, 10])
@pytest.mark.parametrize("seed", range(3))
def test_reliability_equals_its_plain_twin(seed, bins):
    scores, labels = random_solutions(seed, coarse=False)
    boxes = [[] for _ in range(bins)]
    for row, label in zip(scores, labels, strict=True):
        for k, score in enumerate(() if row is None else row):
            if label < 0 or k <= label:
                boxes[min(int(score * bins), bins - 1)].append((score, k != label))
    total, gap = sum(map(len, boxes)), 0.0
    found = reliability(scores, labels, bins)
    for box, row in zip(boxes, found["bins"], strict=True):
        mean, share = (sum(column) / len(box) for column in zip(*box, strict=True))
        assert row["count"] == len(box)
        assert (row["mean_score"], row["share_correct"]) == pytest.approx((mean, share), rel=1e-6)
        gap += len(box) / total * abs(mean - share)
    assert (found["steps"], found["ece"]) == (total, pytest.approx(gap, rel=1e-5))


def test_a_calibrated_scorer_has_a_small_ece():
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    labels = [-1 if rng.random() < score else 0 for score in scores]  # one step each
    assert reliability([[s] for s in scores], labels)["ece"] < 0.015
    assert reliability([[1 - s] for s in scores], labels)["ece"] > 0.45


def test_reliability_of_nothing():
    found = reliability([None], [4])
    assert (found["steps"], found["ece"]) == (0, None)
    with pytest.raises(InputError, match="bins must be at least 1, got 0"):
        reliability(SCORES, LABELS, 0)


# --- Baselines ------------------------------------------------------------------------------------


def test_constant_predictors_are_blind_on_one_side():
    found = baselines([3, 3, 1, 4, 2, 2, 5], LABELS, 0.5)
    never, zero = found["never_an_error"], found["always_step_0"]
    assert (never["acc_error"], never["acc_correct"], never["f1"]) == (0, 1, 0)
    assert (zero["acc_error"], zero["acc_correct"], zero["f1"]) == (2 / 4, 0, 0)


def test_random_scores_reach_their_expected_accuracies():
    """Uniform scores pass k steps with (1 - t)^k; the first error is j with (1 - t)^j t."""
    rng = np.random.default_rng(3)
    num_steps = rng.integers(1, 5, 4000).tolist()
    labels = [int(rng.integers(-1, n)) for n in num_steps]
    t = 0.3
    error = np.mean([(1 - t) ** j * t for j in labels if j >= 0])
    correct = np.mean([(1 - t) ** n for n, j in zip(num_steps, labels, strict=True) if j < 0])
    found = baselines(num_steps, labels, t)["random_scores"]
    # Over 20 draws of 4000 solutions the standard error is about 0.001.
    assert found["f1"] == pytest.approx(2 * error * correct / (error + correct), abs=0.005)
    assert found["f1"] <= found["best_f1"] < 0.5
    assert found == baselines(num_steps, labels, t)["random_scores"]
