"""The test that decides, also for arms that never vary and for sessions that never reach a target."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from normbench.stats import estimates, survival
from normbench.stats.estimates import ROUNDING, Estimate
from normbench.stats.series import Floats, effective_n


@dataclass(frozen=True)
class Primary:
    """The test that decides: its name, its estimate, and p values that hold for arms without spread too."""

    name: str
    estimate: Estimate
    p: float
    flat: bool
    scale: float

    def tost(self, margin: float) -> float:
        """p of "the difference is the margin or more"."""
        if not self.flat:
            return float(self.estimate.tost(margin))
        gap = abs(float(self.estimate.diff))
        if gap >= margin:
            return 1.0
        return self.p if gap > ROUNDING * self.scale else 0.0

    @classmethod
    def of(cls, x: Floats, y: Floats, is_paired: bool, is_time: bool) -> "Primary":
        """`x` the baseline's, `y` the treatment's sessions; at least two of each."""
        test, name = choose_test(is_paired, is_time)
        estimate = test(x, y)
        scale = float(max(np.abs(x).max(), np.abs(y).max()))
        sides = (y - x,) if is_paired else (x, y)
        flat = all(float(np.ptp(side)) <= ROUNDING * scale for side in sides)
        if not flat:
            return cls(name, estimate, float(estimate.p), flat, scale)
        same = abs(float(estimate.diff)) <= ROUNDING * scale
        p = 1.0 if same else estimates.permutation_p(x.size, y.size, is_paired)
        return cls("exact permutation", estimate, p, flat, scale)

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
        return cls(name, estimate, p, not float(estimate.se) > 0, horizon)


def choose_test(is_paired: bool, is_time: bool) -> tuple[Callable[[Floats, Floats], Estimate], str]:
    """Welch's or the paired t; with effective numbers of sessions for times."""
    if is_time:
        return (
            (estimates.paired_serial, "paired t (ess)")
            if is_paired
            else (estimates.welch_serial, "Welch (ess)")
        )
    return (estimates.paired, "paired t") if is_paired else (estimates.welch, "Welch")


def flat(x: Floats) -> bool:
    """Whether nothing varies but by rounding."""
    return float(np.ptp(x)) <= ROUNDING * float(np.abs(x).max())
