"""Means with intervals and paired tests, over few seeds. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Mean(NamedTuple):
    value: float
    half: float | None  # half width of the 95 % interval; None for fewer than two values
    count: int


def mean_interval(values: Sequence[float], level: float = 0.95) -> Mean:
    """Returns the mean with its interval by the t distribution, count - 1 degrees of freedom."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Mean(float(values.mean()), None, len(values))
    quantile = stats.t.ppf((1 + level) / 2, len(values) - 1)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    return Mean(float(values.mean()), float(half), len(values))


def paired_t(differences: Sequence[float]) -> float | None:
    """Returns the two-sided p of mean 0 by the t test; None for fewer than two differences.

    Differences that are all the same have no spread: p is 1 if they are 0, else 0.
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip(differences: Sequence[float]) -> float | None:
    """Returns the exact two-sided p of the sign-flip permutation test of the mean.

    If a pair's two runs could be exchanged, each difference could have the other sign: p is the
    share of all 2^n choices of signs whose mean is at least as far from 0. With n pairs it is at
    least 2^(1 - n): five pairs cannot fall below 0.0625. ValueError: more than 20 differences.
    """
    differences = np.asarray(differences, float)
    if len(differences) < 2:
        return None
    if len(differences) > 20:
        raise ValueError(f"2^{len(differences)} choices of signs are too many")
    sums = differences[:1]  # by symmetry the first sign may stay as it is
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-9))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns the p-values of a family adjusted by Holm's method; None stays None and counts not.

    The k-th smallest of m is multiplied by m - k + 1; none becomes smaller than one before it.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for k, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - k)))
        adjusted[i] = highest
    return adjusted
