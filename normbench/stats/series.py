"""Measurements in the order they were made: how much they repeat themselves, and what they are worth.

Times of successive sessions are alike: a machine warms up, clocks change, somebody else uses the disk. n
such times are worth fewer than n independent ones. All functions work along the last axis, so that a
simulation can pass (studies, sessions).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

Floats = NDArray[np.float64]
MOST = 0.999
ROUNDING = 1e-12  # of their size: values that differ by less are equal


def has_spread(x: Floats, size: Floats | float | None = None) -> NDArray[np.bool_]:
    """Whether values differ by more than the rounding of numbers of this size, by default their own."""
    if x.shape[-1] == 0:
        return np.zeros(x.shape[:-1], bool)
    size = np.max(np.abs(x), axis=-1) if size is None else size
    return np.asarray(np.max(x, axis=-1) - np.min(x, axis=-1) > ROUNDING * size)


def lag1(x: Floats) -> Floats:
    """Pearson's correlation of successive values, x[:-1] with x[1:]; NaN below 4 values or without spread."""
    n = x.shape[-1]
    if n < 4:
        return np.full(x.shape[:-1], np.nan)
    before, after = x[..., :-1], x[..., 1:]
    able = has_spread(before) & has_spread(after)
    a = before - before.mean(axis=-1, keepdims=True)
    b = after - after.mean(axis=-1, keepdims=True)
    size = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.where(able, (a * b).sum(axis=-1) / np.where(able, size, 1.0), np.nan)


def corrected_lag1(x: Floats, caution: float = 0.0) -> Floats:
    """lag1 without its bias towards −1, kept in [0, 0.999]; 0 where it cannot be told.

        (r + 1/n) / (1 − 4/n) + caution · sqrt((1 − r²) / n)

    The first part solves E[r] = ρ − (1 + 4ρ)/n (Kendall 1954) for ρ. `caution` adds standard errors of r:
    an underestimated correlation makes false findings, an overestimated one costs sessions.
    """
    n = x.shape[-1]
    r = lag1(x)
    if n < 5:
        return np.where(np.isnan(r), 0.0, MOST)
    corrected = (r + 1 / n) / (1 - 4 / n) + caution * np.sqrt(np.maximum(1 - r * r, 0.0) / n)
    return np.clip(np.where(np.isnan(r), 0.0, corrected), 0.0, MOST)


def effective_n(x: Floats, caution: float = 0.0) -> Floats:
    """How many independent values estimate a mean as well as this series: n² / (n + 2 Σ (n−k) ρᵏ), k = 1…n−1.

    The sum is the exact variance of the mean of an AR(1) series, with ρ from `corrected_lag1`; at most n.
    """
    n = x.shape[-1]
    rho = corrected_lag1(x, caution)
    total = rho * (n * (1 - rho) - (1 - rho**n)) / (1 - rho) ** 2
    return np.asarray(n * n / (n + 2 * total))


def spread_of(x: Floats, ess: Floats) -> Floats:
    """The variance of one value of an AR(1) series: Σ(x − x̄)² / (n (1 − 1/ess)).

    Dividing by n − 1 would be too small: successive values stay near each other, and near their own mean.
    """
    n = x.shape[-1]
    scale = n * (1 - 1 / np.maximum(ess, 1 + 1e-9))
    return np.asarray(x.var(axis=-1) * n / scale)


def variance_and_worth(x: Floats, is_time: bool) -> tuple[float, float]:
    """The variance of one session, and how many (effective) sessions there are of it."""
    if not is_time:
        return float(x.var(ddof=1)), float(x.size)
    worth = effective_n(x)
    return float(spread_of(x, worth)), float(worth)


def drift(x: Floats) -> tuple[float, float]:
    """Spearman's rank correlation of one series with its order, and its p value; NaN without spread."""
    if x.size < 3 or not has_spread(x):
        return float("nan"), float("nan")
    result: Any = scipy_stats.spearmanr(np.arange(x.size), x)
    return float(result.statistic), float(result.pvalue)
