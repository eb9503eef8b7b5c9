"""The test that decides, also for arms that never vary and for sessions that never reach a target."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from normbench.stats import estimates, survival
from normbench.stats.arms import Match
from normbench.stats.estimates import Estimate, still
from normbench.stats.series import Floats, effective_n, has_spread


@dataclass(frozen=True)
class Primary:
    """The test that decides: its name, its estimate, and p values that hold for arms without spread too.

    `least_p` is the smallest p that sessions without spread can give.
    """

    name: str
    estimate: Estimate
    p: float
    flat: bool = False
    least_p: float = 1.0

    def tost(self, margin: float) -> float:
        """p of "the difference is the margin or more"."""
        if not self.flat:
            return float(self.estimate.tost(margin))
        return self.least_p if abs(float(self.estimate.diff)) < margin else 1.0

    @classmethod
    def of(cls, match: Match, places: int | None = None, seed: int = 0) -> "Primary":
        """The test of one comparison, on the sessions of so many places; at least two sessions a side."""
        if match.metric.is_until:
            return cls.until(*match.reached(places), match.is_paired, match.metric.is_time, seed)
        return cls.means(*match.sides(places), match.is_paired, match.metric.is_time)

    @classmethod
    def means(cls, x: Floats, y: Floats, is_paired: bool, is_time: bool) -> "Primary":
        """Welch's or the paired t; without spread the exact permutation test."""
        test, name = choose_test(is_paired, is_time)
        estimate = test(x, y)
        if not still(x, y, is_paired):
            return cls(name, estimate, float(estimate.p))
        least = estimates.permutation_p(x.size, y.size, is_paired)
        same = not has_spread(np.array([x.mean(), y.mean()]))
        return cls("exact permutation", estimate, 1.0 if same else least, True, least)

    @classmethod
    def until(
        cls, one: survival.Reached, other: survival.Reached, is_paired: bool, is_time: bool, seed: int
    ) -> "Primary":
        """The log-rank test and the difference of restricted means; for times with effective sessions."""
        horizon = survival.horizon_of(one, other)
        inflation = 1.0
        if is_time:
            x, y = np.minimum(one.time, horizon), np.minimum(other.time, horizon)
            worth = [x.size / float(effective_n(x)), y.size / float(effective_n(y))]
            if is_paired:
                worth = [x.size / float(effective_n(y - x, estimates.CAUTION))]
            inflation = max(1.0, *worth)
        name = "log-rank" + (" within pairs" if is_paired else "") + (" (ess)" if is_time else "")
        p = survival.log_rank(one, other, is_paired, inflation, seed)
        estimate = survival.difference(one, other, horizon, inflation)
        known = float(estimate.se) > 0 and one.reached.any() and other.reached.any()
        return cls(name, estimate, p, not known)


def choose_test(is_paired: bool, is_time: bool) -> tuple[Callable[[Floats, Floats], Estimate], str]:
    """Welch's or the paired t; with effective numbers of sessions for times."""
    if is_time and is_paired:
        return estimates.paired_serial, "paired t (ess)"
    if is_time:
        return estimates.welch_serial, "Welch (ess)"
    return (estimates.paired, "paired t") if is_paired else (estimates.welch, "Welch")
