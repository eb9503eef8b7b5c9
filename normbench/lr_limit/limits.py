"""From trials to limits: the sessions' own, the rate at which half of them fail, and the ratios of arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from normbench.lr_limit.curve import LEVEL, Fit, Interval, contradicts, fit_differences, fit_limits
from normbench.lr_limit.record import Trial
from normbench.lr_limit.search import Grid, Seen

LARGER, SMALLER, OPEN = "larger", "smaller", "inconclusive"


class Searched:
    """An arm after its search.

    Args:
        name: the arm's short name.
        trials: in the order in which they were run; every session at every rate.
        grid: of the rates.
    """

    def __init__(self, name: str, trials: Sequence[Trial], grid: Grid) -> None:
        self.name, self.trials, self.grid = name, trials, grid

    @cached_property
    def order(self) -> dict[float, list[Trial]]:
        """The trials by rate, the rates in the order in which they were tried."""
        found: dict[float, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(trial.rate, []).append(trial)
        return found

    @cached_property
    def seen(self) -> dict[float, Seen]:
        """What was seen at each rate, by rising rate."""
        return {rate: seen_in(self.order[rate]) for rate in sorted(self.order)}

    @property
    def trains(self) -> bool:
        """Whether at some rate less than half of the sessions failed; else there is no limit to fit."""
        return not all(there.fails for there in self.seen.values())

    @cached_property
    def base(self) -> float:
        """From which rate on a failure says that the rate is too large.

        The lowest; where below the rate with fewest failures (the largest of several) half of the sessions or
        more failed at another, rates down there are too small to learn, and it is the one with fewest.
        """
        best = min(self.seen, key=lambda rate: (self.seen[rate].failed, -rate))
        too_small = any(rate < best and there.fails for rate, there in self.seen.items())
        return best if too_small and self.trains else min(self.seen)

    @cached_property
    def sessions(self) -> dict[int, dict[float, bool]]:
        """By session: whether it failed at each rate from `base` on."""
        found: dict[int, dict[float, bool]] = {}
        for trial in self.trials:
            if trial.rate >= self.base:
                found.setdefault(trial.session, {})[trial.rate] = bool(trial.failed)
        return {session: found[session] for session in sorted(found)}

    @cached_property
    def fit(self) -> Fit:
        """The curve of all sessions."""
        known = [failed if self.trains else {} for failed in self.sessions.values()]
        return fit_limits(known, self.base, max(self.seen), math.log(self.grid.resolution))

    @cached_property
    def limit(self) -> Interval:
        """The rate at which half of the sessions fail; 0 and inf: not bounded by the trials."""
        return self.fit.quantile(0.5).exp()

    @cached_property
    def scale(self) -> float:
        """s of the curve, in log rate."""
        return self.fit.scale()

    @property
    def trained_to(self) -> float | None:
        """The largest rate up to which, from `base` on, every session trained; None where there is none."""
        fails = [rate for rate in self.seen if rate >= self.base and self.seen[rate].failed]
        trains = [r for r in self.seen if self.base <= r < min(fails, default=math.inf)]
        return max(trains, default=None)

    @property
    def fails_from(self) -> float | None:
        """The smallest rate from which on every session failed; None where there is none."""
        found = None
        for rate in sorted(self.seen, reverse=True):
            if self.seen[rate].failed < self.seen[rate].sessions or rate < self.base:
                break
            found = rate
        return found

    @property
    def contradicting(self) -> int:
        """How many sessions trained at a rate above one at which they failed."""
        return sum(map(contradicts, self.sessions.values()))

    @property
    def too_small(self) -> list[float]:
        """The rates below `base` at which sessions failed: they learned too little."""
        return [rate for rate, there in self.seen.items() if rate < self.base and there.failed]


@dataclass(frozen=True)
class Ratio:
    """An arm's limit as a multiple of the baseline's, by the sessions' own ratios; the interval's level."""

    baseline: str
    interval: Interval
    level: float

    @property
    def verdict(self) -> str:
        """larger, smaller, or inconclusive where the interval holds 1."""
        if self.interval.low > 1:
            return LARGER
        return SMALLER if self.interval.high < 1 else OPEN


def ratios(arms: Sequence[Searched]) -> Mapping[str, Ratio]:
    """Every arm but the first against the first, at a level that holds for all together (Bonferroni)."""
    baseline, *others = arms
    level = 1 - (1 - LEVEL) / max(1, len(others))
    return {arm.name: ratio(baseline, arm, level) for arm in others}


def ratio(baseline: Searched, arm: Searched, level: float = LEVEL) -> Ratio:
    """Paired by session: the logistic distribution of the sessions' log ratios, its middle and interval."""
    return Ratio(baseline.name, fit_differences(arm.fit, baseline.fit).quantile(0.5, level).exp(), level)


def seen_in(trials: Sequence[Trial]) -> Seen:
    """How many of these failed, and how."""
    return Seen(len(trials), sum(t.failed for t in trials), sum(t.reason == "non_finite" for t in trials))
