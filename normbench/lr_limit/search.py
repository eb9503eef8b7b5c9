"""Which rate to try next: a pure function of what was seen, so a search that was killed goes on by itself.

Rates lie on a grid, `rate = start · resolution^k`; k is called a place. At every place all sessions are run.

    bracket   outwards from the start in strides of about a factor 4, until a place where less than half of
              the sessions fail has a place above it where half or more do. At too small a rate a short
              session learns nothing either, so where the start fails both sides are looked at, the lower
              one first; not above a place where half of the sessions or more had a loss that is not finite.
    bisect    halve the stride between the two until they are neighbours
    widen     from the lower of the two down, and from the upper one up, in steps of 1, 2, 4, … until no
              session fails there, or all do: so that the curve between has sessions on it
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

STRIDE = 4.0  # of the bracket, as a factor


class Seen(NamedTuple):
    """How many of a place's sessions failed, and how many of them because their loss was not finite."""

    sessions: int
    failed: int
    non_finite: int

    @property
    def fails(self) -> bool:
        """Whether half of them or more failed."""
        return 2 * self.failed >= self.sessions

    @property
    def explodes(self) -> bool:
        """Whether half of them or more were lost to infinity."""
        return 2 * self.non_finite >= self.sessions


class Step(NamedTuple):
    """A place to try, and why: bracket, bisect or widen."""

    place: int
    purpose: str


@dataclass(frozen=True)
class Grid:
    """Where the search may go.

    Args:
        start: the first rate, place 0.
        resolution: ratio of neighbouring rates, > 1; the limit is searched until its ends are neighbours.
        lowest, highest: rates below and above which it does not go.
    """

    start: float
    resolution: float
    lowest: float
    highest: float

    def rate(self, place: int) -> float:
        """The rate of a place, to 12 digits: equal on every machine, and as it is written."""
        return float(f"{self.start * self.resolution**place:.12g}")

    @property
    def stride(self) -> int:
        """Places from one rate of the bracket to the next: a power of two, about a factor STRIDE."""
        return int(2 ** max(0, math.ceil(math.log2(math.log(STRIDE) / math.log(self.resolution)))))

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest place."""
        scale, slack = math.log(self.resolution), 1e-9
        low = math.ceil(math.log(self.lowest / self.start) / scale - slack)
        return low, math.floor(math.log(self.highest / self.start) / scale + slack)


def next_step(seen: Mapping[int, Seen], grid: Grid) -> Step | None:
    """The place to try next; None where the search is done."""
    low, high = grid.ends
    lower = max((place for place, there in seen.items() if not there.fails), default=None)
    if lower is None:
        place = outwards(seen, grid)
        return None if place is None else Step(place, "bracket")
    upper = min((place for place in seen if place > lower), default=None)
    if upper is None:
        place = min(lower + grid.stride, high)
        return None if place == lower else Step(place, "bracket")
    if upper - lower > 1:
        return Step((lower + upper) // 2, "bisect")
    for first, sign in ((lower, -1), (upper, 1)):
        place = widened(seen, first, sign, (low, high))
        if place is not None:
            return Step(place, "widen")
    return None


def outwards(seen: Mapping[int, Seen], grid: Grid) -> int | None:
    """The next place while none has trained: by turns below and above what was seen, nearest to the start."""
    low, high = grid.ends
    too_high = min((place for place, there in seen.items() if there.explodes), default=high + 1)
    for distance in range(0, max(-low, high) + grid.stride, grid.stride):
        for place in dict.fromkeys((max(-distance, low), min(distance, high))):
            if place not in seen and place < too_high:
                return place
    return None


def widened(seen: Mapping[int, Seen], first: int, sign: int, ends: tuple[int, int]) -> int | None:
    """The next place in steps of 1, 2, 4, … from `first`; None where the curve has come to its end.

    Down, that is where none fails, or more fail than before: rates too small to learn. Up, where all do.
    """
    there, step = seen[first], 1
    while there.failed != (0 if sign < 0 else there.sessions):
        place = min(max(first + sign * step, ends[0]), ends[1])
        if place not in seen:
            return place
        if place == first or place in ends or (sign < 0 and seen[place].failed > there.failed):
            return None
        there, step = seen[place], 2 * step
    return None
