"""Looking before the end without paying for it in false findings: alpha spending.

Each look may spend part of alpha. With the O'Brien–Fleming-like spending function of Lan & DeMets (1983)
one tail has spent 2 − 2Φ(z_{a/2}/√t) of its a by the fraction t of the planned sessions: next to nothing
early, nearly all of it at the end. A two-sided test spends alpha/2 in each tail, an equivalence test alpha
in its one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from normbench.plan import read_json, write_json
from normbench.stats.series import Floats
from normbench.values import Refused

SMALLEST = 1e-10
ALLOWANCE = (
    0.95  # of alpha, where there are several looks: t tests of few sessions cross normal bounds too often
)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(160)


@dataclass(frozen=True)
class Looks:
    """After how many sessions arms were looked at, how many each was to have, and which arms stopped when."""

    planned: int
    at: tuple[int, ...]
    stopped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.at), self.at, strict=False))
        if not rising or (self.at and self.at[-1] > self.planned):
            raise Refused(
                f"looks after {list(self.at)} sessions must rise and end by the planned {self.planned}"
            )

    @classmethod
    def every(cls, step: int, planned: int, done: int) -> "Looks":
        """Looks after each `step` sessions and at the planned end, as far as the `done` ones go."""
        at = sorted({*range(step, planned, step), planned})
        return cls(planned, tuple(n for n in at if n <= done))

    @property
    def fractions(self) -> tuple[float, ...]:
        """Part of the planned sessions seen at each look."""
        return tuple(n / self.planned for n in self.at)

    def up_to(self, sessions: int) -> "Looks":
        """The looks that an arm of so many sessions has seen."""
        return replace(self, at=tuple(n for n in self.at if n <= sessions))

    def write(self, path: Path) -> None:
        """Keep the looks beside the plan."""
        write_json(path, {"planned": self.planned, "at": list(self.at), "stopped": dict(self.stopped)})

    @classmethod
    def read(cls, path: Path) -> "Looks":
        """The looks of one file."""
        body = read_json(path)
        try:
            return cls(int(body["planned"]), tuple(body["at"]), dict(body["stopped"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{path} does not say what was looked at") from error


def spent(tail: float, fraction: float) -> float:
    """How much of one tail's error may be gone by this fraction of the sessions."""
    return float(2 * ndtr(ndtri(tail / 2) / math.sqrt(fraction)))


@lru_cache(maxsize=4096)
def nominal_levels(alpha: float, fractions: tuple[float, ...], two_sided: bool = True) -> tuple[float, ...]:
    """The p value that each look must go below, so that all looks together err at most alpha.

    Armitage, McPherson & Rowe's recursion: the density of the sum of increments among studies not yet
    stopped, carried from look to look by Gauss–Legendre quadrature.
    """
    tail = alpha / 2 if two_sided else alpha
    levels: list[float] = []
    before, gone = 0.0, 0.0
    at, mass = np.zeros(1), np.ones(1)  # where the studies still open are, and how many
    for fraction in fractions:
        step = math.sqrt(fraction - before)
        target = spent(tail, fraction) - gone

        def crossing(
            bound: float, at: Floats = at, mass: Floats = mass, step: float = step, target: float = target
        ) -> float:
            return float((mass * ndtr((at - bound) / step)).sum()) - target

        bound = float(brentq(crossing, -10.0, 40.0, xtol=1e-13))
        levels.append(float(ndtr(-bound / math.sqrt(fraction))) * (2 if two_sided else 1))
        low = -bound if two_sided else -9.0 * math.sqrt(fraction)
        nodes = low + (bound - low) * (NODES + 1) / 2
        gaps = (nodes[:, None] - at[None, :]) / step
        density = np.exp(-gaps * gaps / 2) @ mass / (step * math.sqrt(2 * math.pi))
        at, mass = nodes, density * WEIGHTS * (bound - low) / 2
        before, gone = fraction, spent(tail, fraction)
    return tuple(levels)


def levels(alpha: float, fractions: tuple[float, ...], two_sided: bool = True) -> tuple[float, ...]:
    """The p value of a t test that each look must go below: the bounds of a little less than alpha.

    By the bounds of alpha itself, six looks at 5 to 30 normal sessions err 0.0525 times (500,000 simulated).
    """
    return nominal_levels(alpha * (1.0 if fractions == (1.0,) else ALLOWANCE), fractions, two_sided)


def sequential_p(ps: Sequence[float], fractions: Sequence[float], two_sided: bool = True) -> float:
    """One p value for all looks so far: the smallest alpha whose bounds some look has crossed.

    It is below alpha exactly when a look crossed the bounds of alpha, so Holm's correction takes it as it
    is. No smaller than 1e-10.
    """
    smallest = 1.0
    for k, p in enumerate(ps):
        seen = tuple(fractions[: k + 1])

        def gap(log_alpha: float, seen: tuple[float, ...] = seen, p: float = p) -> float:
            return levels(float(f"{math.exp(log_alpha):.10g}"), seen, two_sided)[-1] - p

        low, high = math.log(SMALLEST), math.log(min(smallest, 0.999))
        if gap(high) <= 0:
            continue
        smallest = SMALLEST if gap(low) >= 0 else math.exp(brentq(gap, low, high, xtol=1e-6))
    return smallest
