"""How often lr_limit's 95 % intervals hold, by simulated sessions whose limits are known.

    python scripts/calibrate_lr_limit.py [--searches 500] [--sessions 3 8 16]

Every search is the door's own: rates chosen by what was seen, limits and ratio fitted (on half as many
points, which widens an interval by 1 % at most). Prints a row for each kind of limits; about 0.2 s a search.
"""

import argparse
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from normbench.lr_limit import curve
from normbench.lr_limit.curve import Interval
from normbench.lr_limit.limits import Searched, ratio
from normbench.lr_limit.search import Grid, Seen, next_step

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Floats]


def logistic(s: float) -> Draw:
    """Log limits around 0."""
    return lambda rng, n: s * rng.logistic(size=n)


def skewed(s: float) -> Draw:
    """Gumbel's, with its median at 0."""
    return lambda rng, n: s * (rng.gumbel(size=n) + math.log(math.log(2)))


def heavy(s: float) -> Draw:
    """Student's with 2 degrees of freedom."""
    return lambda rng, n: s * rng.standard_t(2, n)


# what the limits are like, scale within a session, whether a session's limits go with it from arm to arm
CASES: list[tuple[str, Draw, float, bool]] = [
    ("all alike, no chance", logistic(0), 0, False),
    ("logistic 0.1", logistic(0.1), 0, False),
    ("logistic 0.4, shared by arms", logistic(0.4), 0, True),
    ("all alike, chance 0.1", logistic(0), 0.1, False),
    ("all alike, chance 0.3", logistic(0), 0.3, False),
    ("logistic 0.3, shared, chance 0.1", logistic(0.3), 0.1, True),
    ("logistic 0.3, chance 0.3", logistic(0.3), 0.3, False),
    ("skewed 0.3, chance 0.1", skewed(0.3), 0.1, False),
    ("heavy tails 0.15, chance 0.05", heavy(0.15), 0.05, False),
]


GRID = Grid(start=0.1, resolution=1.2, lowest=1e-5, highest=1e4)


def search(limits: Floats, within: float, rng: np.random.Generator, grid: Grid = GRID) -> Searched:
    """The door's search among sessions with these log limits."""
    seen, trials = dict[int, Seen](), list[Any]()
    while step := next_step(seen, grid):
        above = math.log(grid.rate(step.place)) - limits
        failed = rng.random(len(limits)) < expit(above / within) if within else above > 0
        seen[step.place] = Seen(len(limits), int(failed.sum()), 0)
        trials += [SimpleNamespace(session=i, rate=grid.rate(step.place), failed=int(bad),
                                   reason="loss" if bad else "") for i, bad in enumerate(failed)]  # fmt: skip
    return Searched("arm", trials, grid)


def holds(found: Interval, truth: float) -> bool:
    """Whether the interval holds e^truth."""
    return found.low <= math.exp(truth) <= found.high


def simulate(draw: Draw, within: float, shared: bool, sessions: int, searches: int) -> list[Floats]:
    """Of every search: whether limit's and ratio's interval held, high/low of both, trials of an arm."""
    rng, rows = np.random.default_rng(0), list[list[float]]()
    for _ in range(searches):
        middle, apart = math.log(0.1) + rng.uniform(0, 3), rng.uniform(-1.6, 1.6)
        own = draw(rng, sessions)
        base = search(middle + own, within, rng)
        other = search(middle + apart + (own if shared else draw(rng, sessions)), within, rng)
        found = [base.limit, ratio(base, other).interval]
        widths = [each.high / each.low if each.low else math.inf for each in found]
        rows.append([holds(found[0], middle), holds(found[1], apart), *widths, len(base.trials)])
    return list(np.array(rows).T)


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--searches", type=int, default=500)
    parser.add_argument("--sessions", type=int, nargs="+", default=[3, 8, 16])
    options = parser.parse_args()
    curve.POINTS, curve.SCALES, curve.COARSE = 400, 24, 10
    print("| sessions | log limits | limit's interval held (high/low) | ratio's | trials of an arm |")
    print("|---|---|---|---|---|")
    for sessions in options.sessions:
        for name, draw, within, shared in CASES:
            limit, both, wide, wider, trials = simulate(draw, within, shared, sessions, options.searches)
            held = [f"{each.mean():.3f} (× {np.median(size):.2g})"
                    for each, size in ((limit, wide), (both, wider))]  # fmt: skip
            print(f"| {sessions} | {name} | {' | '.join(held)} | {trials.mean():.0f} |", flush=True)


if __name__ == "__main__":
    main()
