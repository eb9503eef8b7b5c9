"""The failure probability against the rate, and what rate goes with a probability, with its interval.

Every session has a limit of its own, and its trials say between which two rates it lies. Over the sessions
the limit's logarithm is logistic, so that

    P(fail at rate r) = 1 / (1 + exp(−(log r − m) / s)),        m: log of the rate at which half of them fail

which is logistic regression on the log rate, with each session counted once instead of once for each of its
rates, as if those were independent. The likelihood of a session whose limit is between a and b is
P(fail at b) − P(fail at a). Intervals are profile likelihood: all values of m that no s makes too unlikely.
Where every session has its limit between the same two rates (complete separation) any small s fits equally
well; the interval is then the gap between the two rates, and no formula pretends to more.

For the small numbers of sessions here chi²'s bound is too small; in its place stands the bound that makes
the interval of a normal mean with unknown sd exact, n log(1 + t²/(n − 1)), t Student's with n − 1 degrees of
freedom. How often that holds: docs/lr_limit.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from scipy.optimize import brentq
from scipy.special import expit

Floats = NDArray[np.float64]
LEVEL = 0.95
SCALES = 80  # values of s that are tried, evenly on a log scale
POINTS = 400  # values of m that are tried, before the ends are found exactly
BEYOND = math.log(1e3)  # how far outside the rates tried an end is looked for
FLAT = 1e-3  # log likelihoods that differ by less are equal: any of their values fits
IMPOSSIBLE = 1e-300


def cell_of(failed: Mapping[float, bool]) -> tuple[float, float]:
    """Between which two of its rates a session's limit lies, by the trials of these rates; as logarithms.

    Where it also trained above a rate at which it failed, the place that contradicts fewest of its trials; of
    several, all from the first to the last. −inf, +inf where it failed, or trained, at every rate.
    """
    rates = sorted(failed)
    edges = [-math.inf, *map(math.log, rates), math.inf]
    wrong = [
        sum(failed[rate] for rate in rates[:i]) + sum(not failed[rate] for rate in rates[i:])
        for i in range(len(rates) + 1)
    ]
    best = [i for i, count in enumerate(wrong) if count == min(wrong)]
    return edges[best[0]], edges[best[-1] + 1]


def contradicts(failed: Mapping[float, bool]) -> bool:
    """Whether a session trained at a rate above one at which it failed."""
    rates = sorted(failed)
    return any(failed[a] and not failed[b] for a, b in pairwise(rates))


@dataclass(frozen=True)
class Interval:
    """A value with the interval around it; infinite where the trials do not bound it."""

    value: float
    low: float
    high: float

    def exp(self) -> "Interval":
        """Of what this is the logarithm of."""
        return Interval(
            *(math.inf if v == math.inf else math.exp(v) for v in (self.value, self.low, self.high))
        )


class Fit:
    """The logistic distribution of values known to lie in cells: sessions' log limits, or their differences.

    Args:
        cells: (low, high) of each session, low < high, ±inf allowed.
        finest: the smallest s that can be told, well below the smallest cell.
    """

    def __init__(self, cells: Sequence[tuple[float, float]], finest: float) -> None:
        self.low = np.array([low for low, _ in cells], np.float64)
        self.high = np.array([high for _, high in cells], np.float64)
        finite = [edge for cell in cells for edge in cell if math.isfinite(edge)] or [0.0]
        self.edges = (min(finite), max(finite))
        widest = self.edges[1] - self.edges[0] + 1.0
        self.scales: Floats = np.geomspace(finest, 4 * widest, SCALES)

    def log_likelihood(self, m: Floats, s: Floats) -> Floats:
        """Of arrays that broadcast against each other; both are given an axis for the sessions."""
        m, s = m[..., None], s[..., None]
        below, above = (self.low - m) / s, (self.high - m) / s
        # by the tail that both ends are on, where differences near 1 would cancel
        flip = below > 0
        inside = np.where(flip, expit(-below) - expit(-above), expit(above) - expit(below))
        return np.asarray(np.log(np.maximum(inside, IMPOSSIBLE)).sum(-1))

    def profile(self, x: Floats, probability: float = 0.5) -> Floats:
        """The best log likelihood for each value x of the quantile at this failure probability."""
        shift = math.log(probability / (1 - probability))
        return np.asarray(self.log_likelihood(x[:, None] - shift * self.scales, self.scales).max(-1))

    def allowed(self, level: float) -> float:
        """How far below the best the log likelihood of a value inside may be; infinite for one session."""
        n = len(self.low)
        if n < 2:
            return math.inf
        t = float(scipy_stats.t.isf((1 - level) / 2, n - 1))
        return 0.5 * n * math.log1p(t * t / (n - 1))

    def points(self) -> Floats:
        """Values of x from well below the rates tried to well above, close together between them."""
        low, high = self.edges
        margin = 0.25 * (high - low) + 0.5
        inner = np.linspace(low - margin, high + margin, POINTS)
        outer = np.linspace(margin, BEYOND + margin, POINTS // 8)[1:]
        return np.concatenate([(low - outer)[::-1], inner, high + outer])

    def quantile(self, probability: float = 0.5, level: float = LEVEL) -> Interval:
        """The log rate at which this share fails, and its interval.

        The value is the middle of those that fit best. Infinite beyond BEYOND of the rates tried.
        """
        x = self.points()
        found = self.profile(x, probability)
        best = float(found.max())
        value = middle(x, found >= best - FLAT)
        least = best - self.allowed(level)
        inside = np.flatnonzero(found >= least)

        def over(at: float) -> float:
            return float(self.profile(np.array([at]), probability)[0]) - least

        first, last = int(inside[0]), int(inside[-1])
        low = -math.inf if first == 0 else brentq(over, x[first - 1], x[first], xtol=1e-6)
        high = math.inf if last == len(x) - 1 else brentq(over, x[last], x[last + 1], xtol=1e-6)
        return Interval(value, float(low), float(high))

    def scale(self) -> float:
        """s of the curve that fits best; the finest where nothing bounds it from below."""
        at = self.quantile(0.5).value
        if not math.isfinite(at):
            return math.nan
        return float(self.scales[self.log_likelihood(np.full(SCALES, at), self.scales).argmax()])


def middle(x: Floats, chosen: NDArray[np.bool_]) -> float:
    """The middle of the chosen values; infinite where they go on to an end."""
    places = np.flatnonzero(chosen)
    if places[0] == 0:
        return -math.inf
    if places[-1] == len(x) - 1:
        return math.inf
    return float(x[places[0]] + x[places[-1]]) / 2


def difference_cells(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Between what each session's difference one − other lies, by its two cells."""
    return [(a[0] - b[1], a[1] - b[0]) for a, b in zip(one, other, strict=True)]


def proportion_interval(failed: int, sessions: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share, of one rate by itself."""
    found: Any = scipy_stats.binomtest(failed, sessions).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)
