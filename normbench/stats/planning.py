"""How many sessions a question needs, before any of them is paid for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats as scipy_stats
from scipy.special import roots_jacobi
from statsmodels.stats.power import TTestIndPower, TTestPower

from normbench.stats.series import Floats
from normbench.values import Refused

MOST = 10**9
FEW = 100  # sessions up to which Welch's test has visibly less power than Student's


def power_of_difference(n: int, effect: float, alpha: float, is_paired: bool) -> float:
    """Power of the two-sided paired or Welch's t test; `effect`: true difference over sd (of differences)."""
    if is_paired:
        return float(TTestPower().power(effect, n, alpha, alternative="two-sided"))
    if n > FEW:
        return float(TTestIndPower().power(effect, n, alpha, ratio=1.0, alternative="two-sided"))
    weights, df = welch_df(n)
    limits, ncp = scipy_stats.t.isf(alpha / 2, df), effect * math.sqrt(n / 2)
    right_way = scipy_stats.nct.sf(limits, 2 * n - 2, ncp)
    wrong_way = np.nan_to_num(scipy_stats.nct.cdf(-limits, 2 * n - 2, ncp))
    return float(weights @ (right_way + wrong_way))


def power_of_equivalence(n: int, margin: float, alpha: float, is_paired: bool) -> float:
    """Power of two one-sided tests where there is no true difference; `margin` in sds.

    2 · P(T > t_{1−alpha}) − 1 with T's noncentrality margin / standard error: Phillips 1990's approximation,
    exact but for the correlation of the two tests.
    """
    if is_paired or n > FEW:
        weights, df = np.ones(1), np.full(1, n - 1.0 if is_paired else 2.0 * n - 2)
    else:
        weights, df = welch_df(n)
    ncp = margin * math.sqrt(n if is_paired else n / 2)
    one = scipy_stats.nct.sf(scipy_stats.t.isf(alpha, df), n - 1 if is_paired else 2 * n - 2, ncp)
    one = np.where(np.isnan(one), float(ncp > 30), one)
    return max(0.0, 2 * float(weights @ one) - 1)


@cache
def welch_df(n: int) -> tuple[Floats, Floats]:
    """Probabilities and Welch's degrees of freedom, for two normal arms of n sessions and one variance.

    With equal n Welch's t is Student's, and only its df vary: (n − 1) / (r² + (1 − r)²), r one arm's share of
    the two sample variances, Beta((n−1)/2, (n−1)/2) and independent of their sum. Gauss–Jacobi nodes of r.
    """
    nodes, weights = roots_jacobi(40, (n - 3) / 2, (n - 3) / 2)
    r = (nodes + 1) / 2
    return weights / weights.sum(), (n - 1) / (r**2 + (1 - r) ** 2)


def fewest(power_at: Callable[[int], float], power: float) -> int | None:
    """The smallest n ≥ 2 with at least this power; None above a thousand million."""
    high = 2
    while power_at(high) < power:
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if middle >= 2 and power_at(middle) >= power:
            high = middle
        else:
            low = middle
    return max(high, 2)


def sessions_for_difference(
    sd: float, difference: float, alpha: float = 0.05, power: float = 0.8, is_paired: bool = False
) -> int | None:
    """Sessions an arm to find a true `difference`; `sd` of one session, or of paired differences."""
    effect = abs(difference) / sd
    if effect == 0:
        return None
    if effect < 1e-3:  # far above a thousand sessions the normal distribution says it, without losing digits
        z = scipy_stats.norm.isf(alpha / 2) + scipy_stats.norm.isf(1 - power)
        n = math.ceil((1 if is_paired else 2) * (z / effect) ** 2)
        return n if n <= MOST else None
    return fewest(lambda n: power_of_difference(n, effect, alpha, is_paired), power)


def sessions_for_equivalence(
    sd: float, margin: float, alpha: float = 0.05, power: float = 0.8, is_paired: bool = False
) -> int | None:
    """Sessions an arm to show equivalence within `margin` where there is no difference."""
    effect = margin / sd
    if effect < 1e-3:
        z = scipy_stats.norm.isf(alpha) + scipy_stats.norm.isf((1 - power) / 2)
        n = math.ceil((1 if is_paired else 2) * (z / effect) ** 2)
        return n if n <= MOST else None
    return fewest(lambda n: power_of_equivalence(n, effect, alpha, is_paired), power)


@dataclass(frozen=True)
class Question:
    """What a plan is to answer: a difference to be found, a margin to be kept within, or both.

    `sd` is that of one session or, with `paired_sd`, of paired differences; with a `correlation` the sd of
    one session is turned into theirs, sd · √(2 (1 − correlation)).
    """

    sd: float
    alpha: float = 0.05
    power: float = 0.8
    difference: float | None = None
    margin: float | None = None
    correlation: float | None = None
    comparisons: int = 1
    paired_sd: bool = False

    def __post_init__(self) -> None:
        if self.difference is None and self.margin is None:
            raise Refused("--plan needs --difference (to be found) or --margin (to be equivalent within)")
        for name in ("sd", "difference", "margin"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise Refused(f"--{name} must be a number above 0, got {value:g}")
        if self.correlation is not None and not -1 < self.correlation < 1:
            raise Refused(f"--correlation must lie between -1 and 1, got {self.correlation:g}")
        if self.comparisons < 1:
            raise Refused(f"--comparisons must be an int ≥ 1, got {self.comparisons}")

    @property
    def is_paired(self) -> bool:
        """Whether sessions will share random numbers."""
        return self.paired_sd or self.correlation is not None

    @property
    def spread(self) -> float:
        """The sd of what the test averages."""
        return self.sd if self.correlation is None else self.sd * math.sqrt(2 * (1 - self.correlation))

    @property
    def each_alpha(self) -> float:
        """Alpha shared out among the comparisons, as Holm's first step does."""
        return self.alpha / self.comparisons

    def sessions_for_difference(self) -> int | None:
        """Sessions an arm; None where they cannot be paid for."""
        args = (self.each_alpha, self.power, self.is_paired)
        return (
            None if self.difference is None else sessions_for_difference(self.spread, self.difference, *args)
        )

    def sessions_for_margin(self) -> int | None:
        """Sessions an arm; None where they cannot be paid for."""
        args = (self.each_alpha, self.power, self.is_paired)
        return None if self.margin is None else sessions_for_equivalence(self.spread, self.margin, *args)

    def describe(self) -> Iterator[str]:
        """The answer in sentences."""
        test = "paired t" if self.is_paired else "Welch's t"
        family = f", {self.comparisons} comparisons" if self.comparisons > 1 else ""
        how = f"({test}, power {self.power:g}, alpha {self.alpha:g}{family})"
        if self.difference is not None:
            many = amount(self.sessions_for_difference())
            yield f"to find a difference of {self.difference:g} at sd {self.sd:.3g}: {many} an arm {how}"
        if self.margin is not None:
            many = amount(self.sessions_for_margin())
            yield f"to show equivalence within ±{self.margin:.3g} at sd {self.sd:.3g}: {many} an arm {how}"


def amount(n: int | None) -> str:
    """A count for reading."""
    return "more than a thousand million sessions" if n is None else f"{n:,} sessions"


def upper_sd(sd: float, n: int, confidence: float = 0.8) -> float:
    """What the true sd stays below with this confidence, after a pilot of n normal sessions (Browne 1995)."""
    return sd * math.sqrt((n - 1) / float(scipy_stats.chi2.ppf(1 - confidence, n - 1)))
