"""The failure probability against the rate, and what rate goes with a probability, with its interval.

Every session has a limit of its own, and close to it chance decides:

    P(session i fails at rate r) = 1 / (1 + exp(−(log r − m_i) / w)),    m_i logistic: middle m, scale s

which is logistic regression on the log rate with an intercept of each session's own, so that a session's
trials at neighbouring rates do not count as if they were independent of each other. w = 0: a session trains
at every rate below its limit and fails at every one above. Over sessions and chance together the curve is
taken as logistic too, around m with scale √(s² + w²); that is right to 0.011, where s = w.

Likelihoods are sums over cells of log rate, in one of which a session's limit lies. Intervals are profile
likelihood: all values of m that no s makes too unlikely, at the w that fits best. Where every session has its
limit between the same two rates (complete separation) any small s fits equally well; the interval is then
the gap between the two rates, and no formula pretends to more.

For the small numbers of sessions here chi²'s bound is too small; in its place stands the bound that makes
the interval of a normal mean with unknown sd exact, n log(1 + t²/(n − 1)), t Student's with n − 1 degrees of
freedom. How often that holds: docs/lr_limit.md.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from scipy.special import expit

Floats = NDArray[np.float64]
LEVEL = 0.95
PARTS = 4  # cells of a grid step
FINEST = 0.004  # narrowest cell
SCALES = 40  # values of s that are tried
POINTS = 800  # values of m that are tried over the cells, about
COARSE = 16  # values of w that are tried, and of s by which w is chosen
BEYOND = math.log(1e3)  # how far outside the cells an end is looked for
FLAT = 1e-3  # log likelihoods that differ by less are equal: any of their values fits
IMPOSSIBLE = 1e-300


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


@dataclass(frozen=True)
class Cells:
    """Where a log limit may lie: `count` cells `width` apart; the first and the last go on to −∞ and +∞.

    Args:
        first: the middle of the first.
    """

    first: float
    width: float
    count: int

    @property
    def middles(self) -> Floats:
        """(count,), the outermost at −∞ and +∞."""
        found: Floats = self.first + self.width * np.arange(self.count, dtype=np.float64)
        found[0], found[-1] = -np.inf, np.inf
        return found

    @property
    def ends(self) -> tuple[float, float]:
        """Between which they are finite."""
        return self.first + self.width / 2, self.first + self.width * (self.count - 1.5)

    def shares(self, m: Floats, scales: Floats) -> Iterator[Floats]:
        """(count, len(m)) for each scale: the part of the logistic distribution around m in each cell."""
        edges = self.first + self.width * (np.arange(1, self.count) - 0.5)
        for s in scales:
            below = expit((edges[:, None] - m) / s)
            yield np.diff(below, axis=0, prepend=0.0, append=1.0)

    def scales(self, count: int) -> Floats:
        """Evenly on a log scale up to all cells, one too sharp to be seen, one too flat to bound anything."""
        seen = np.geomspace(self.width / 4, self.width * self.count, count - 2)
        return np.concatenate([[self.width / 200], seen, [100 * BEYOND]])


class Fit:
    """The logistic distribution of sessions' log limits, or of their differences.

    Args:
        likelihood: (sessions, cells), of a session's trials where its limit, or difference, is in a cell.
        cells: these cells.
        within: w, the scale within a session.
    """

    def __init__(self, likelihood: Floats, cells: Cells, within: float = 0.0) -> None:
        self.likelihood, self.cells, self.within = likelihood, cells, within
        low, high = cells.ends
        outer = np.linspace(0, BEYOND, POINTS // 16)[1:]
        inner = np.linspace(low, high, (cells.count - 2) * max(1, round(POINTS / cells.count)) + 1)
        self.points: Floats = np.concatenate([(low - outer)[::-1], inner, high + outer])  # every edge is one

    @cached_property
    def curves(self) -> list[tuple[float, Floats]]:
        """For every s: √(s² + w²), and the log likelihood of every m in `points`."""
        scales = self.cells.scales(SCALES)
        found = (log_likelihood(self.likelihood, part) for part in self.cells.shares(self.points, scales))
        return [(math.hypot(s, self.within), each) for s, each in zip(scales, found, strict=True)]

    def profile(self, probability: float) -> Floats:
        """The best log likelihood where the quantile at this failure probability is each of `points`."""
        x, odds = self.points, math.log(probability / (1 - probability))
        each = [np.interp(x - odds * scale, x, found) for scale, found in self.curves]
        return np.asarray(np.max(each, axis=0))

    def allowed(self, level: float) -> float:
        """How far below the best the log likelihood of a value inside may be; infinite for one session."""
        n = len(self.likelihood)
        if n < 2:
            return math.inf
        t = float(scipy_stats.t.isf((1 - level) / 2, n - 1))
        return 0.5 * n * math.log1p(t * t / (n - 1))

    def quantile(self, probability: float = 0.5, level: float = LEVEL) -> Interval:
        """The log rate at which this share fails, and its interval.

        The value is the middle of those that fit best. Infinite further than BEYOND from the cells.
        """
        found = self.profile(probability)
        best = float(found.max())
        low, high = self.span(found, best - FLAT)
        # open on both sides nothing is known; on one, the value is out there
        value = low if math.isinf(low) else high if math.isinf(high) else (low + high) / 2
        return Interval(value, *self.span(found, best - self.allowed(level)))

    def span(self, found: Floats, least: float) -> tuple[float, float]:
        """The points around those at which `found` is at least this; infinite where there is none."""
        x, inside = self.points, np.flatnonzero(found >= least)
        first, last = int(inside[0]), int(inside[-1])
        low = -math.inf if first == 0 else float(x[first - 1])
        return low, math.inf if last == len(x) - 1 else float(x[last + 1])

    def scale(self) -> float:
        """√(s² + w²) of the curve that fits best; NaN where the trials do not bound the limit."""
        at = self.quantile().value
        if not math.isfinite(at):
            return math.nan
        return max(self.curves, key=lambda each: float(np.interp(at, self.points, each[1])))[0]


def fit_limits(sessions: Sequence[Mapping[float, bool]], lowest: float, highest: float, step: float) -> Fit:
    """The sessions' log limits, by whether each failed at the rates it was tried at.

    Args:
        lowest, highest: of the rates tried.
        step: log of the ratio of neighbouring rates.
    """
    width = step / PARTS if step > PARTS * FINEST else step * math.ceil(FINEST / step)
    span = math.log(highest / lowest)
    beside = math.ceil(max(span, 4 * step) / width)  # cells below the lowest rate, and above the highest
    cells = Cells(math.log(lowest) + width * (0.5 - beside), width, 2 * beside + round(span / width))
    coarse = np.linspace(*cells.ends, 10 * COARSE)
    shares = list(cells.shares(coarse, cells.scales(COARSE)))

    def best(likelihood: Floats) -> float:
        return max(float(log_likelihood(likelihood, part).max()) for part in shares)

    widths = [0.0, *np.geomspace(step / PARTS, max(span, step), COARSE)]
    tried = [(within, likelihood_of(sessions, cells, within)) for within in widths]
    within, likelihood = max(tried, key=lambda each: best(each[1]))
    return Fit(likelihood, cells, within)


def likelihood_of(sessions: Sequence[Mapping[float, bool]], cells: Cells, within: float) -> Floats:
    """(sessions, cells): the probability of each session's trials where its limit is in a cell."""
    found = np.ones((len(sessions), cells.count))
    for own, failed in zip(found, sessions, strict=True):
        for rate, bad in failed.items():
            above = math.log(rate) - cells.middles
            own *= expit((above if bad else -above) / within) if within else (above > 0) == bad
    return found


def log_likelihood(likelihood: Floats, shares: Floats) -> Floats:
    """(m,), summed over the sessions: of each m, by the shares (cells, m) of its distribution."""
    return np.asarray(np.log(np.maximum(likelihood @ shares, IMPOSSIBLE)).sum(0))


def fit_differences(one: Fit, other: Fit) -> Fit:
    """The differences one − other of each session's log limits, whatever level the session shares with both.

    A difference is as likely as the likeliest pair of limits that has it.
    """
    width, ours, theirs = one.cells.width, one.cells.count, other.cells.count
    offset = round((one.cells.first - other.cells.first) / width)
    shifts = range(-theirs, ours + 1)  # beyond these both are in an outermost cell
    found = np.empty((len(shifts), len(one.likelihood)))
    for row, shift in zip(found, shifts, strict=True):
        places = np.arange(min(0, shift), max(ours, theirs + shift))
        pairs = one.likelihood[:, places.clip(0, ours - 1)]
        pairs = pairs * other.likelihood[:, (places - shift).clip(0, theirs - 1)]
        row[:] = pairs.max(1)
    return Fit(found.T, Cells((offset - theirs) * width, width, len(shifts)))


def proportion_interval(failed: int, sessions: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share, of one rate by itself."""
    found: Any = scipy_stats.binomtest(failed, sessions).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)
