"""A difference of two means as three numbers, difference, standard error and degrees of freedom.

Test, interval, equivalence and power all follow from the three, so they can never disagree. All functions
work along the last axis. `baseline` and `treatment` are arrays of sessions; a difference is treatment −
baseline.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats as scipy_stats
from scipy.optimize import brentq

from normbench.stats.series import Floats, effective_n, has_spread, spread_of

CAUTION = 0.5  # standard errors added to the lag-1 correlation of differences; docs/calibration.md says why


def still(baseline: Floats, treatment: Floats, is_paired: bool) -> bool:
    """Whether nothing varies but by rounding: neither arm, or where paired no difference."""
    size = max(float(np.abs(baseline).max()), float(np.abs(treatment).max()))
    sides = [treatment - baseline] if is_paired else [baseline, treatment]
    return not any(has_spread(side, size) for side in sides)


@dataclass(frozen=True)
class Estimate:
    """`diff` ± `se` with `df` degrees of freedom."""

    diff: Floats
    se: Floats
    df: Floats

    @property
    def t(self) -> Floats:
        """diff / se; 0 where both are 0."""
        safe = np.where(self.se > 0, self.se, 1.0)
        infinite = np.where(self.diff == 0, 0.0, np.copysign(np.inf, self.diff))
        return np.where(self.se > 0, self.diff / safe, infinite)

    @property
    def p(self) -> Floats:
        """Two-sided p value of no difference."""
        return np.asarray(2 * scipy_stats.t.sf(np.abs(self.t), self.df))

    def interval(self, alpha: float) -> tuple[Floats, Floats]:
        """The 1 − alpha interval of the difference."""
        half = self.se * scipy_stats.t.isf(alpha / 2, self.df)
        return self.diff - half, self.diff + half

    def tost(self, margin: Floats | float) -> Floats:
        """p value of "the difference is `margin` or more, one way or the other" (Schuirmann's two tests)."""
        safe = np.where(self.se > 0, self.se, np.nan)
        return np.asarray(scipy_stats.t.sf((margin - np.abs(self.diff)) / safe, self.df))

    def detectable(self, alpha: float, power: float = 0.8) -> float:
        """The smallest true difference that this test finds with `power`, were all else as it is here."""
        if not (self.se > 0 and self.df >= 1):
            return math.nan
        return noncentrality(float(self.df), alpha, power) * float(self.se)


@cache
def noncentrality(df: float, alpha: float, power: float) -> float:
    """How many standard errors off zero a mean must be for a two-sided t test to have this power."""
    limit = float(scipy_stats.t.isf(alpha / 2, df))

    def missing(shift: float) -> float:
        wrong_way = float(scipy_stats.nct.cdf(-limit, df, shift))  # NaN where it is too small for SciPy
        right_way = float(scipy_stats.nct.sf(limit, df, shift))
        return power - right_way - (0.0 if math.isnan(wrong_way) else wrong_way)

    high = 1.0
    while missing(high) > 0:
        high *= 1.5
    return float(brentq(missing, 0.0, high, xtol=1e-12))


def moments(x: Floats) -> tuple[Floats, Floats]:
    """Mean, and variance with divisor n − 1."""
    return x.mean(axis=-1), x.var(axis=-1, ddof=1)


def satterthwaite(a: Floats, df_a: Floats | int, b: Floats, df_b: Floats | int) -> Floats:
    """Degrees of freedom of a + b, two variances of means."""
    whole = a + b
    safe = np.where(whole > 0, whole, 1.0)
    share = np.where(whole > 0, a / safe, 0.5)
    return np.asarray(1 / (share**2 / df_a + (1 - share) ** 2 / df_b))


def welch(baseline: Floats, treatment: Floats) -> Estimate:
    """Welch's: each arm with its own variance."""
    (mean_b, var_b), (mean_t, var_t) = moments(baseline), moments(treatment)
    a, b = var_b / baseline.shape[-1], var_t / treatment.shape[-1]
    df = satterthwaite(a, baseline.shape[-1] - 1, b, treatment.shape[-1] - 1)
    return Estimate(mean_t - mean_b, np.sqrt(a + b), df)


def student(baseline: Floats, treatment: Floats) -> Estimate:
    """Student's: one variance for both arms."""
    (mean_b, var_b), (mean_t, var_t) = moments(baseline), moments(treatment)
    n_b, n_t = baseline.shape[-1], treatment.shape[-1]
    df = n_b + n_t - 2
    pooled = ((n_b - 1) * var_b + (n_t - 1) * var_t) / df
    return Estimate(mean_t - mean_b, np.sqrt(pooled * (1 / n_b + 1 / n_t)), np.full_like(mean_b, df))


def paired(baseline: Floats, treatment: Floats) -> Estimate:
    """The t test of the sessions' differences."""
    mean, var = moments(treatment - baseline)
    n = baseline.shape[-1]
    return Estimate(mean, np.sqrt(var / n), np.full_like(mean, n - 1))


def welch_serial(baseline: Floats, treatment: Floats) -> Estimate:
    """Welch's with effective numbers of sessions in place of n: for times in the order they were measured."""
    ess_b, ess_t = effective_n(baseline), effective_n(treatment)
    a, b = spread_of(baseline, ess_b) / ess_b, spread_of(treatment, ess_t) / ess_t
    df = satterthwaite(a, np.maximum(ess_b - 1, 1e-3), b, np.maximum(ess_t - 1, 1e-3))
    return Estimate(treatment.mean(axis=-1) - baseline.mean(axis=-1), np.sqrt(a + b), df)


def paired_serial(baseline: Floats, treatment: Floats) -> Estimate:
    """The paired test with the effective number of differences: drift that both share is gone already."""
    differences = treatment - baseline
    ess = effective_n(differences, CAUTION)
    se = np.sqrt(spread_of(differences, ess) / ess)
    return Estimate(differences.mean(axis=-1), se, np.maximum(ess - 1, 1e-3))


def permutation_p(n_baseline: int, n_treatment: int, is_paired: bool) -> float:
    """Two-sided p of the most extreme arrangement: for arms that never vary and yet differ.

    Of all ways to give the labels to the sessions, 2 of C(n_b + n_t, n_t), or of the 2ⁿ signs of paired
    differences, are as extreme as arms that do not overlap.
    """
    ways = 2**n_baseline if is_paired else math.comb(n_baseline + n_treatment, n_treatment)
    return 2 / ways


def hedges_g(baseline: Floats, treatment: Floats) -> float:
    """Standardized difference with the exact small-sample factor (Hedges 1981).

        (mean_t − mean_b) / sd_pooled · Γ(df/2) / (√(df/2) Γ((df − 1)/2))

    NaN without spread or below two sessions an arm.
    """
    df = baseline.size + treatment.size - 2
    if min(baseline.size, treatment.size) < 2:
        return math.nan
    pooled = student(baseline, treatment)
    sd = float(pooled.se) / math.sqrt(1 / baseline.size + 1 / treatment.size)
    if sd == 0:
        return math.nan
    factor = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    return float(pooled.diff) / sd * factor


def rank_test(baseline: Floats, treatment: Floats, is_paired: bool) -> tuple[str, float]:
    """Wilcoxon's signed ranks for pairs, Mann–Whitney's U otherwise: name and p; p = 1 where all are equal.

    Exact for small samples without ties, else the normal approximation with ties and continuity corrected.
    """
    if is_paired:
        differences = treatment - baseline
        moved = differences[differences != 0]
        if moved.size == 0:
            return "wilcoxon", 1.0
        tied = np.unique(np.abs(moved)).size < moved.size or moved.size < differences.size
        method: Any = "exact" if not tied and moved.size <= 50 else "asymptotic"
        if moved.size < 2 and tied:
            return "wilcoxon", 1.0
        outcome: Any = scipy_stats.wilcoxon(differences, correction=method == "asymptotic", method=method)
        return "wilcoxon", float(outcome.pvalue)
    both = np.concatenate([baseline, treatment])
    if np.all(both == both[0]):
        return "mann_whitney", 1.0
    tied = np.unique(both).size < both.size
    method = "exact" if not tied and min(baseline.size, treatment.size) <= 8 else "asymptotic"
    return "mann_whitney", float(scipy_stats.mannwhitneyu(treatment, baseline, method=method).pvalue)


def bca(baseline: Floats, treatment: Floats, is_paired: bool, alpha: float, seed: int = 0,
        resamples: int = 9999) -> tuple[float, float]:  # fmt: skip
    """Bias-corrected and accelerated bootstrap interval of the difference (Efron 1987); seeded.

    NaN where resampling cannot tell: below 3 sessions a side, without spread, above 1,000 sessions.
    """
    sides = (treatment - baseline,) if is_paired else (treatment, baseline)
    sizes = [side.size for side in sides]
    flat = still(baseline, treatment, True) if is_paired else not all(has_spread(side) for side in sides)
    if resamples < 1 or min(sizes) < 3 or max(sizes) > 1000 or flat:
        return math.nan, math.nan

    def difference(*samples: Floats, axis: int = -1) -> Floats:
        means = [sample.mean(axis=axis) for sample in samples]
        return np.asarray(means[0] if is_paired else means[0] - means[1])

    # a degenerate resample makes NaN, which says it
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", scipy_stats.DegenerateDataWarning)
        result: Any = scipy_stats.bootstrap(
            sides, difference, method="BCa", confidence_level=1 - alpha, vectorized=True,
            n_resamples=resamples, batch=1000, rng=np.random.default_rng(seed),
        )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
