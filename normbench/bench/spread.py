"""The middle of some numbers, for times and their ratios."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        """Of at least one number."""
        if len(numbers) == 1:
            return cls(numbers[0], numbers[0], numbers[0])
        cuts = statistics.quantiles(numbers, n=5, method="inclusive")
        return cls(statistics.median(numbers), cuts[0], cuts[-1])

    @classmethod
    def of_ratio(cls, of: Sequence[float], over: Sequence[float]) -> "Spread":
        """Of the rounds' own ratios: both sides of each were measured within one round."""
        return cls.of([a / b for a, b in zip(of, over, strict=False)])
