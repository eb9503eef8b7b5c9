"""How long until a target is reached, where some sessions never get there: censored, not dropped.

A session that ends before it reaches the target says "longer than this". The log-rank test compares the
arms over all of it; the effect is the difference of restricted means: the average time to the target,
counted up to the earlier end of the two arms' observations.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from normbench.stats.estimates import Estimate
from normbench.stats.series import Floats


@dataclass(frozen=True)
class Reached:
    """Per session: when the target was reached or, where not `reached`, when it was last found missing."""

    time: Floats
    reached: NDArray[np.bool_]

    def first(self, n: int) -> "Reached":
        """The first n sessions."""
        return Reached(self.time[:n], self.reached[:n])


def steps_of(arm: Reached) -> tuple[Floats, Floats, Floats]:
    """Times at which sessions reached the target, how many did, and how many had not before."""
    times, events = np.unique(arm.time[arm.reached], return_counts=True)
    at_risk = arm.time.size - np.searchsorted(np.sort(arm.time), times, side="left")
    return times, events.astype(float), at_risk.astype(float)


def restricted_mean(arm: Reached, horizon: float) -> tuple[float, float]:
    """Area under Kaplan–Meier's curve up to the horizon, and its standard error (Greenwood's).

    Without censoring these are the mean of min(time, horizon) and its sd / √n with divisor n.
    """
    times, events, at_risk = steps_of(arm)
    kept = times < horizon
    times, events, at_risk = times[kept], events[kept], at_risk[kept]
    curve = np.concatenate([[1.0], np.cumprod(1 - events / at_risk)])
    widths = np.diff(np.concatenate([[0.0], times, [horizon]]))
    areas = curve * widths
    beyond = areas.sum() - np.cumsum(areas)[:-1]  # area after each event
    open_ = at_risk > events
    weight = np.where(open_, events / (at_risk * np.where(open_, at_risk - events, 1.0)), 0.0)
    return float(areas.sum()), math.sqrt(float((beyond**2 * weight).sum()))


def horizon_of(*arms: Reached) -> float:
    """Up to where both curves are known: the earlier end of observations that stop short of the target."""
    last = [float(arm.time.max()) for arm in arms]
    short = [end for arm, end in zip(arms, last, strict=True) if not arm.reached[arm.time == end].all()]
    return min(short) if short else max(last)


def difference(baseline: Reached, treatment: Reached, horizon: float, inflation: float = 1.0) -> Estimate:
    """The difference of restricted means; Greenwood's variances with divisor n − 1, times `inflation`."""
    n_b, n_t = baseline.time.size, treatment.time.size
    (mean_b, se_b), (mean_t, se_t) = (restricted_mean(arm, horizon) for arm in (baseline, treatment))
    variance = se_b**2 * n_b / (n_b - 1) + se_t**2 * n_t / (n_t - 1)
    df = max((n_b + n_t) / inflation - 2, 1.0)
    return Estimate(*(np.asarray(v) for v in (mean_t - mean_b, math.sqrt(variance * inflation), df)))


def log_rank_scores(both: Reached) -> Floats:
    """Each session's score: 1 if it reached the target, less the hazard that had summed up by its time.

    Their sum over one arm is that arm's observed minus expected count, the log-rank test's numerator.
    """
    times, events, at_risk = steps_of(both)
    hazard = np.concatenate([[0.0], np.cumsum(events / at_risk)])
    return np.asarray(both.reached - hazard[np.searchsorted(times, both.time, side="right")])


def log_rank(
    baseline: Reached, treatment: Reached, is_paired: bool, inflation: float = 1.0, seed: int = 0
) -> float:
    """Two-sided p of the log-rank test; 1 where no session of either arm reached the target.

    Up to 200 sessions an arm from permutations of the labels (within pairs where paired; all of them up to
    9,999, else as many drawn with `seed`): the chi-square approximation errs 6 to 7 times in 100 there.
    Above, SciPy's. `inflation` divides the squared z value, for times that repeat themselves: sessions /
    effective sessions.
    """
    if not (baseline.reached.any() or treatment.reached.any()):
        return 1.0
    n = baseline.time.size
    if max(n, treatment.time.size) > 200:
        sides = [scipy_stats.CensoredData.right_censored(a.time, ~a.reached) for a in (treatment, baseline)]
        p = float(scipy_stats.logrank(x=sides[0], y=sides[1]).pvalue)
    else:
        joined = Reached(np.concatenate([baseline.time, treatment.time]),
                         np.concatenate([baseline.reached, treatment.reached]))  # fmt: skip
        scores = log_rank_scores(joined)
        sides_of: Any = (scores[n:] - scores[:n],) if is_paired else (scores[n:], scores[:n])
        test: Any = scipy_stats.permutation_test(
            sides_of, score_difference, permutation_type="samples" if is_paired else "independent",
            n_resamples=9999, vectorized=True, rng=np.random.default_rng(seed),
        )  # fmt: skip
        p = float(test.pvalue)
    return float(2 * scipy_stats.norm.sf(scipy_stats.norm.isf(min(p, 1.0) / 2) / math.sqrt(inflation)))


def score_difference(treatment: Floats, baseline: Floats | None = None, axis: int = -1) -> Floats:
    """The treatment's mean score above the baseline's; for pairs, the mean of their differences."""
    mean = treatment.mean(axis=axis)
    return np.asarray(mean if baseline is None else mean - baseline.mean(axis=axis))
