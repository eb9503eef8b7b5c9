"""How often the statistics err, by simulated studies whose truth is known.

    python scripts/calibrate.py [--studies 10000] [--out docs]

Writes calibration.md and calibration.csv; about two minutes on one core. The methods are the package's own
functions, and so are the naive ones beside them. Exit code 1 if a cell misses its target.
"""

import argparse
import gc
import platform
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from scipy.signal import lfilter
from statsmodels.stats.multitest import multipletests

from normbench.stats import estimates, planning
from normbench.stats.primary import choose_test
from normbench.stats.sequential import Looks, levels
from normbench.stats.series import Floats, effective_n
from normbench.stats.survival import Reached, log_rank
from normbench.stats.verdicts import FEWEST_EFFECTIVE, FEWEST_TIMES

Flags = NDArray[np.bool_]

ALPHA = 0.05
SEED = 20
SESSIONS = (5, 10, 30)
SHAPES = {
    "normal": scipy_stats.norm(),
    "beta": scipy_stats.beta(93, 7),
    "exponential": scipy_stats.expon(),
    "lognormal": scipy_stats.lognorm(1),
}
RHO = 0.8
CEILING_OF_TIMES = {5: 0.0, 10: 0.10, 30: 0.06}
DRIFT = 3.0
ARMS = 7
PLANNED = (10, 30)
EFFECTS = (4.0, 3.0, 2.0, 1.0, 0.5)
PROMISE = 0.03
RESAMPLES = 999
CENSORED = 0.3
OF_LOG_RANK = 1000

OWN, SHARED, INDEPENDENT = f"AR(1) = {RHO}", f"shared AR(1) = {RHO}", "independent"
SPREADS = "normal, treatment"
SPENDING, EVERY_LOOK, ONE_LOOK = "alpha spending", "naive: p < 0.05 at any look", "one look, at the end"


@dataclass(frozen=True)
class Cell:
    """The rate at which something happened in simulated studies, and what it is held to, if anything."""

    data: str
    arms: str
    n: int
    method: str
    studies: int
    hits: int
    floor: float | None = None
    ceiling: float | None = None
    note: str = ""

    @property
    def rate(self) -> float:
        """Share of the studies."""
        return self.hits / self.studies

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Clopper and Pearson's: each holds the true rate with 99 %."""
        interval = scipy_stats.binomtest(self.hits, self.studies).proportion_ci(0.98, method="exact")
        return float(interval.low), float(interval.high)

    @property
    def room(self) -> float:
        """How far the bound that decides is within the target; below 0 where it misses it."""
        low, high = self.bounds
        above = np.inf if self.floor is None else high - self.floor
        below = np.inf if self.ceiling is None else self.ceiling - low
        return float(min(above, below))

    @property
    def target(self) -> str:
        """`≤ 0.05`, `≥ 0.95`, `0.04 to 0.05`, or nothing."""
        if self.floor is None:
            return "" if self.ceiling is None else f"≤ {self.ceiling:g}"
        return f"≥ {self.floor:g}" if self.ceiling is None else f"{self.floor:.3g} to {self.ceiling:.3g}"

    @property
    def outcome(self) -> str:
        """pass, fail or shown."""
        return "shown" if not self.target else "pass" if self.room >= 0 else "fail"

    def row(self) -> dict[str, object]:
        """The cell in calibration.csv."""
        low, high = (round(bound, 5) for bound in self.bounds)
        return {
            "data": self.data, "arms": self.arms, "n": self.n, "method": self.method, "studies": self.studies,
            "rate": round(self.rate, 5), "low": low, "high": high, "target": self.target,
            "outcome": self.outcome, "note": self.note,
        }  # fmt: skip


def count(hits: Flags | np.bool_, data: str, is_paired: bool, n: int, method: str, **target: Any) -> Cell:
    """The cell of one flag per study."""
    return Cell(data, arms_word(is_paired), n, method, hits.size, int(hits.sum()), **target)


def arms_word(is_paired: bool) -> str:
    """`paired` or `unpaired`."""
    return "paired" if is_paired else "unpaired"


Cells = Sequence[Cell]


@dataclass(frozen=True)
class Question:
    """One table: what it asks, the cells that answer, and what a reader should take from them."""

    key: str
    title: str
    simulate: Callable[[int], Iterator[Cell]]
    lesson: Callable[[Cells], str]
    across: str = "n"


# --- data: standard deviation 1 per session and mean 0, whatever the shape


def generator(*words: object) -> np.random.Generator:
    """Random numbers of one cell, the same whatever other cells there are."""
    return np.random.default_rng([SEED, zlib.crc32(" ".join(map(str, words)).encode())])


def draw(shape: str, rng: np.random.Generator, size: tuple[int, ...]) -> Floats:
    """Values with mean 0 and sd 1."""
    law: Any = SHAPES[shape]
    return np.asarray((law.rvs(size, random_state=rng) - law.mean()) / law.std())


def sample(
    shape: str, is_paired: bool, studies: int, n: int, rng: np.random.Generator, arms: int = 2
) -> Floats:
    """(arms, studies, n). Pairs share half of their variance, so that their differences have sd 1 too."""
    own = draw(shape, rng, (arms, studies, n))
    return (own + draw(shape, rng, (studies, n))) / np.sqrt(2) if is_paired else own


def series(rng: np.random.Generator, size: tuple[int, ...]) -> Floats:
    """Stationary AR(1) along the last axis, mean 0 and sd 1."""
    steps = rng.standard_normal(size)
    steps[..., 1:] *= np.sqrt(1 - RHO**2)
    return np.asarray(lfilter([1.0], [1.0, -RHO], steps, axis=-1))


def times(data: str, studies: int, n: int) -> Floats:
    """(2, studies, n): the times of two arms without a difference."""
    rng = generator("times", data, n)
    if data == OWN:
        return series(rng, (2, studies, n))
    drift = DRIFT * series(rng, (studies, n)) if data == SHARED else 0.0
    return np.asarray(drift + rng.standard_normal((2, studies, n)))


def worth(x: Floats, y: Floats, is_paired: bool) -> Floats:
    """The fewest effective sessions that the test of these times uses."""
    if is_paired:
        return effective_n(y - x, estimates.CAUTION)
    return np.minimum(effective_n(x), effective_n(y))


def comparable(x: Floats, y: Floats, is_paired: bool) -> Flags:
    """Which studies of times the rules let through to a test."""
    return np.asarray((worth(x, y, is_paired) >= FEWEST_EFFECTIVE) & (x.shape[-1] >= FEWEST_TIMES))


# --- questions


def false_positives(studies: int) -> Iterator[Cell]:
    """No difference, independent sessions."""
    for shape in SHAPES:
        for is_paired in (False, True):
            test, name = choose_test(is_paired, is_time=False)
            for n in SESSIONS:
                x, y = sample(shape, is_paired, studies, n, generator("false", shape, is_paired, n))
                floor = 0.04 if shape == "normal" else None
                found = test(x, y).p < ALPHA
                yield count(found, shape, is_paired, n, name, floor=floor, ceiling=ALPHA)


def of_false_positives(cells: Cells) -> str:
    """What the table shows."""
    skewed = [c for c in cells if c.data != "normal"]
    return f"""
        Where both arms have one shape, no shape makes either test err more often than {most(cells)}: the
        difference of two such arms is symmetric. Strong skew makes the tests stricter, down to
        {least(skewed)}.
    """


def coverage(studies: int) -> Iterator[Cell]:
    """A difference of 1, independent sessions: how often the interval holds it."""
    for shape in SHAPES:
        for is_paired in (False, True):
            test, name = choose_test(is_paired, is_time=False)
            for n in SESSIONS:
                x, y = sample(shape, is_paired, studies, n, generator("interval", shape, is_paired, n))
                low, high = test(x, y + 1).interval(ALPHA)
                held = (low <= 1) & (high >= 1)
                yield count(held, shape, is_paired, n, f"t interval, {name}", floor=1 - ALPHA)
                low, high = bootstrapped(x, y + 1, is_paired, generator("resamples", shape, is_paired, n))
                yield count((low <= 1) & (high >= 1), shape, is_paired, n, "BCa bootstrap")


def bootstrapped(x: Floats, y: Floats, is_paired: bool, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The call of `estimates.bca` along an axis; each hundred studies share their resampled places."""

    def difference(*samples: Floats, axis: int = -1) -> Floats:
        means = [part.mean(axis=axis) for part in samples]
        return np.asarray(means[0] if is_paired else means[0] - means[1])

    ends = []
    for start in range(0, len(x), 100):
        part = slice(start, start + 100)
        sides = (y[part] - x[part],) if is_paired else (y[part], x[part])
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", scipy_stats.DegenerateDataWarning)
            result: Any = scipy_stats.bootstrap(
                sides, difference, axis=-1, method="BCa", confidence_level=1 - ALPHA, vectorized=True,
                n_resamples=RESAMPLES, rng=rng,
            )  # fmt: skip
        ends.append(result.confidence_interval)
    return np.concatenate([end.low for end in ends]), np.concatenate([end.high for end in ends])


def of_coverage(cells: Cells) -> str:
    """What the table shows."""
    bca, t = ([c for c in cells if c.method.startswith(word)] for word in ("BCa", "t interval"))
    by_n = "; ".join(f"n={n}: {between(only(bca, n=n))}" for n in SESSIONS)
    return f"""
        The 95 % interval should hold the true difference in 0.95 of the studies; the t intervals do in
        {between(t)}. The bootstrap's ({RESAMPLES} resamples here) do in fewer ({by_n}), so they are
        given for comparison and decide nothing.
    """


def equivalence(studies: int) -> Iterator[Cell]:
    """A difference exactly as large as the margin, 1."""
    for shape in SHAPES:
        for is_paired in (False, True):
            test, name = choose_test(is_paired, is_time=False)
            for n in SESSIONS:
                x, y = sample(shape, is_paired, studies, n, generator("margin", shape, is_paired, n))
                claimed = test(x, y + 1).tost(1.0) < ALPHA
                yield count(claimed, shape, is_paired, n, f"TOST, {name}", ceiling=ALPHA)
    for is_paired in (False, True):
        test, name = choose_test(is_paired, is_time=True)
        for n in SESSIONS:
            x, y = times(OWN, studies, n)
            claimed = (test(x, y + 1).tost(1.0) < ALPHA) & comparable(x, y, is_paired)
            ceiling = CEILING_OF_TIMES[n]
            yield count(claimed, f"times: {OWN}", is_paired, n, f"TOST, {name}", ceiling=ceiling)
            if n >= FEWEST_TIMES:
                plain, name_of_plain = choose_test(is_paired, is_time=False)
                claimed = plain(x, y + 1).tost(1.0) < ALPHA
                yield count(claimed, f"times: {OWN}", is_paired, n, f"naive: TOST, {name_of_plain}")


def of_equivalence(cells: Cells) -> str:
    """What the table shows."""
    sessions, in_times = ([c for c in ours(cells) if (c.data in SHAPES) == flag] for flag in (True, False))
    return f"""
        A true difference as large as the margin (here one sd) is called equivalent in at most
        {most(sessions)} of the studies, and in at most {most(in_times)} where times repeat themselves;
        taken for independent, such times are called equivalent in {between(naive(cells))}.
    """


def false_findings_in_times(studies: int) -> Iterator[Cell]:
    """No difference, times in the order of measurement; a finding must also pass the rules."""
    for data in (OWN, SHARED, INDEPENDENT):
        for is_paired in (False, True):
            if data == SHARED and not is_paired:
                continue
            test, name = choose_test(is_paired, is_time=True)
            for n in SESSIONS:
                x, y = times(data, studies, n)
                found, allowed = test(x, y).p < ALPHA, comparable(x, y, is_paired)
                ceiling = min(ALPHA, CEILING_OF_TIMES[n]) if data == INDEPENDENT else CEILING_OF_TIMES[n]
                yield count(found & allowed, data, is_paired, n, name, ceiling=ceiling)
                if data == OWN:
                    yield count(found, data, is_paired, n, f"{name} without the rules")
    for data, is_paired, is_time in (
        (OWN, False, False), (OWN, True, False),
        (SHARED, False, False), (SHARED, True, False), (SHARED, False, True),
    ):  # fmt: skip
        test, name = choose_test(is_paired, is_time)
        for n in SESSIONS:
            found = test(*times(data, studies, n)).p < ALPHA
            yield count(found, data, is_paired, n, f"naive: {name}")


def of_times(cells: Cells) -> str:
    """What the table shows."""
    own, shared = only(cells, data=OWN), only(cells, data=SHARED, arms="unpaired")
    unruled = [c for c in own if c.method.endswith("rules") and c.n == 5]
    unpaired, pairs = (
        [only(own, method=m, n=n) for n in (10, 30)] for m in ("Welch (ess)", "paired t (ess)")
    )
    return f"""
        Plain t tests of times that repeat themselves err in {between(naive(own))} of the studies. With
        effective sessions the paired test errs in {most(pairs[0])} at n=10 and {most(pairs[1])} at n=30,
        the unpaired one in {most(unpaired[0])} and {most(unpaired[1])}. Below {FEWEST_TIMES} sessions a
        time is not comparable by rule, since five cannot show how alike they are: without the rules
        {between(unruled)}. Where arms share a drift, unpaired tests find next to nothing
        ({between(shared)}), and few true differences either: see the next table.
    """


def what_caution_costs(studies: int) -> Iterator[Cell]:
    """A difference of one sd of the noise, and how many studies of times are let through at all."""
    for data in (OWN, SHARED, INDEPENDENT):
        for is_paired in (False, True):
            for n in (10, 30):
                x, y = times(data, studies, n)
                test, name = choose_test(is_paired, is_time=True)
                allowed = comparable(x, y, is_paired)
                found = (test(x, y + 1).p < ALPHA) & allowed
                yield count(~allowed, data, is_paired, n, f"{name}: not comparable")
                yield count(found, data, is_paired, n, f"{name}: different")
                if data != OWN:
                    plain, name = choose_test(is_paired, is_time=False)
                    yield count(plain(x, y + 1).p < ALPHA, data, is_paired, n, f"naive: {name}: different")


def of_costs(cells: Cells) -> str:
    """What the table shows."""
    shared, alone = (only(cells, data=data, n=30) for data in (SHARED, OWN))
    unpaired = [c for c in only(shared, arms="unpaired") if c.method.endswith("different")]
    return f"""
        The true difference is one sd of the noise. Of 30 pairs that share a drift, the paired test finds
        it in {most(only(shared, method="paired t (ess): different"))} of the studies, unpaired tests in
        {between(unpaired)}. Where each arm drifts by itself, most studies are not comparable even at
        n=30: {most(only(alone, method="Welch (ess): not comparable"))} unpaired,
        {most(only(alone, method="paired t (ess): not comparable"))} paired.
    """


def cautions(studies: int) -> Iterator[Cell]:
    """The paired test of times with more or less added to the correlation of the differences."""
    for caution in (0.0, estimates.CAUTION, 0.5, 1.0):
        method = f"caution {caution:g}" + (" (ours)" if caution == estimates.CAUTION else "")
        with mock.patch.object(estimates, "CAUTION", caution):
            for data, difference in ((OWN, 0), (INDEPENDENT, 0), (INDEPENDENT, 1)):
                for n in (10, 30):
                    x, y = times(data, studies, n)
                    y = y + difference
                    found = (estimates.paired_serial(x, y).p < ALPHA) & comparable(x, y, is_paired=True)
                    yield count(found, f"{data}, {difference or 'nothing'} apart", True, n, method)


def of_cautions(cells: Cells) -> str:
    """What the table shows."""
    chosen, none = f"caution {estimates.CAUTION:g} (ours)", "caution 0"

    def rate(difference: int, n: int, method: str) -> str:
        data = f"{INDEPENDENT}, 1 apart" if difference else f"{OWN}, nothing apart"
        return most(only(cells, data=data, n=n, method=method))

    return f"""
        Caution adds standard errors to the estimated correlation of paired differences. Without it, times
        that repeat themselves err in {rate(0, 10, none)} at n=10 and {rate(0, 30, none)} at n=30, with
        {estimates.CAUTION:g} standard errors in {rate(0, 10, chosen)} and {rate(0, 30, chosen)}. What it
        costs is power where times are independent: {rate(1, 10, chosen)} instead of {rate(1, 10, none)} at
        n=10, {rate(1, 30, chosen)} instead of {rate(1, 30, none)} at n=30.
    """


def family(studies: int) -> Iterator[Cell]:
    """Any of six equal treatments called different from the baseline."""
    gc.collect()
    gc.freeze()  # multipletests collects garbage at every call: 50 ms where much is alive, nothing so
    for shape in ("normal", "exponential"):
        for is_paired in (False, True):
            test, name = choose_test(is_paired, is_time=False)
            for n in SESSIONS:
                arms = sample(shape, is_paired, studies, n, generator("family", shape, is_paired, n), ARMS)
                p = test(arms[0], arms[1:]).p
                holm = np.array([multipletests(ps, method="holm")[1].min() for ps in p.T])
                yield count(holm < ALPHA, shape, is_paired, n, f"{name}, Holm", ceiling=ALPHA)
                yield count(p.min(axis=0) < ALPHA, shape, is_paired, n, f"naive: {name}")
    gc.unfreeze()


def of_family(cells: Cells) -> str:
    """What the table shows."""
    return f"""
        {ARMS} equal arms, {ARMS - 1} tests against one baseline: some test finds a difference in
        {between(naive(cells))} of the studies, and with Holm's correction in {between(ours(cells))}.
    """


def looking_early(studies: int) -> Iterator[Cell]:
    """Looks after every five sessions: no difference, a difference of the margin, power, and times."""
    for shape in SHAPES:
        for is_paired in (False, True):
            for n in PLANNED:
                x, y = sample(shape, is_paired, studies, n, generator("looks", shape, is_paired, n))
                equal, apart = p_at_looks(x, y, is_paired), p_at_looks(x, y + 1, is_paired, margin=1.0)
                yield from looked(equal, True, f"{shape}, no difference: different", is_paired, n, ALPHA)
                yield from looked(apart, False, f"{shape}, a margin apart: equivalent", is_paired, n, ALPHA)
    for is_paired in (False, True):
        n, effect = PLANNED[-1], 0.55 if is_paired else 0.75
        x, y = sample("normal", is_paired, studies, n, generator("looks", "power", is_paired))
        apart, equal = p_at_looks(x, y + effect, is_paired), p_at_looks(x, y, is_paired, margin=effect)
        yield from looked(apart, True, f"normal, {effect:g} apart: different", is_paired, n)
        yield from looked(equal, False, f"normal, margin {effect:g}: equivalent", is_paired, n)
    for data in (INDEPENDENT, OWN):
        for is_paired in (False, True):
            yield from looked_at_times(data, is_paired, studies)


def looks_of(planned: int, two_sided: bool) -> tuple[Sequence[int], Floats]:
    """The sessions seen at each look, and the p that each must go below: (looks, 1)."""
    looks = Looks.every(5, planned, planned)
    return looks.at, np.array(levels(ALPHA, looks.fractions, two_sided))[:, None]


def p_at_looks(x: Floats, y: Floats, is_paired: bool, margin: float | None = None) -> Floats:
    """(looks, studies): p of the difference, or of the margin, on the sessions that each look saw."""
    test, _ = choose_test(is_paired, is_time=False)
    seen = [test(x[:, :n], y[:, :n]) for n in looks_of(x.shape[-1], True)[0]]
    return np.array([e.p if margin is None else e.tost(margin) for e in seen])


def looked(
    p: Floats, two_sided: bool, data: str, is_paired: bool, planned: int, ceiling: float | None = None
) -> Iterator[Cell]:
    """By the spending bounds, naively at every look, and with one look."""
    at, levels = looks_of(planned, two_sided)
    crossed = p < levels
    stopped = np.where(crossed.any(axis=0), np.array(at)[crossed.argmax(axis=0)], planned)
    note = f"{stopped.mean():.1f} sessions on average"
    yield count(crossed.any(axis=0), data, is_paired, planned, SPENDING, ceiling=ceiling, note=note)
    yield count((p < ALPHA).any(axis=0), data, is_paired, planned, EVERY_LOOK)
    yield count(p[-1] < ALPHA, data, is_paired, planned, ONE_LOOK)


def looked_at_times(data: str, is_paired: bool, studies: int) -> Iterator[Cell]:
    """Times: no look below ten sessions, and no finding at a look where they are worth fewer than three."""
    n = PLANNED[-1]
    test, _ = choose_test(is_paired, is_time=True)
    at, levels = looks_of(n, two_sided=True)
    x, y = times(data, studies, n)
    seen = [(x[:, :k], y[:, :k]) for k in at]
    p = np.array([test(*part).p if len(part[0][0]) >= FEWEST_TIMES else np.ones(studies) for part in seen])
    allowed = np.array([comparable(*part, is_paired) for part in seen])
    crossed = np.logical_or.accumulate(p < levels)
    what, ceiling = f"times, {data}, no difference: different", ALPHA if data == INDEPENDENT else None
    yield count((crossed & allowed).any(axis=0), what, is_paired, n, SPENDING, ceiling=ceiling)
    yield count(((p < ALPHA) & allowed).any(axis=0), what, is_paired, n, EVERY_LOOK)
    yield count((p[-1] < ALPHA) & allowed[-1], what, is_paired, n, ONE_LOOK)


def of_looks(cells: Cells) -> str:
    """What the table shows."""
    spending, one = (only(cells, method=method) for method in (SPENDING, ONE_LOOK))
    held = [c for c in spending if c.target]
    every = [c for c in only(cells, method=EVERY_LOOK, n=PLANNED[-1]) if c.data in {h.data for h in held}]
    found, fixed = ([c for c in part if c.data.endswith(" apart: different")] for part in (spending, one))
    early, once = ([c for c in part if OWN in c.data] for part in (spending, one))
    used = " and ".join(f"{c.note.split()[0]} ({c.arms})" for c in found)
    return f"""
        The target binds alpha spending. Stopping at the first p below {ALPHA:g} of {PLANNED[-1]} sessions
        errs in {between(every)} of the studies; with alpha spent over the looks, all looks together err
        in {between(held)}. A real difference is found in {between(found)} of the studies instead of
        {between(fixed)}, after {used} sessions on average instead of {PLANNED[-1]}. Times that repeat
        themselves err in {between(early)} instead of {between(once)} when looked at early: no target is
        set for them, and they are better looked at once.
    """


def power(studies: int) -> Iterator[Cell]:
    """Normal data with as many sessions as `--plan` asks for a power of 0.8."""
    for is_paired in (False, True):
        test, name = choose_test(is_paired, is_time=False)
        for effect in EFFECTS:
            for words, sessions, promised, shift in (
                (f"difference {effect:g} sd", planning.sessions_for_difference,
                 planning.power_of_difference, effect),
                (f"margin {effect:g} sd, no difference", planning.sessions_for_equivalence,
                 planning.power_of_equivalence, 0.0),
            ):  # fmt: skip
                n = sessions(1.0, effect, ALPHA, 0.8, is_paired)
                if n is None:
                    raise RuntimeError(f"no plan for {words}")
                x, y = sample("normal", is_paired, studies, n, generator("power", words, is_paired))
                estimate = test(x, y + shift)
                found = (estimate.p if shift else estimate.tost(effect)) < ALPHA
                promise = promised(n, effect, ALPHA, is_paired)
                yield count(found, words, is_paired, n, name if shift else f"TOST, {name}",
                            floor=promise - PROMISE, ceiling=min(promise + PROMISE, 1.0),
                            note=f"promised {promise:.3f}")  # fmt: skip


def of_power(cells: Cells) -> str:
    """What the table shows."""
    off = {c: abs(c.rate - float(c.note.split()[-1])) for c in cells}
    return f"""
        With the sessions that `--plan` asks for, power is within {max(off.values()):.3f} of what it
        promised, and within {max(gap for c, gap in off.items() if c.n >= 5):.3f} from five sessions on.
        Effects are in sds of a session or, where paired, of a difference.
    """


def unequal(studies: int) -> Iterator[Cell]:
    """No difference of the means, but of the shapes or spreads."""
    for data, scale, share in (
        (f"{SPREADS}: 3 × sd, half the sessions", 3.0, 2),
        (f"{SPREADS}: sd / 3, half the sessions", 1 / 3, 2),
        (f"{SPREADS}: 3 × sd", 3.0, 1),
    ):
        for n in SESSIONS:
            x, y = sample("normal", False, studies, n, generator("unequal", data, n))
            yield from welch_and_student(x, scale * y[:, : n // share], data)
    for one, other, sign in (
        ("normal", "exponential", 1), ("normal", "lognormal", 1), ("exponential", "exponential", -1),
    ):  # fmt: skip
        data = f"{one} against {other}{', mirrored' if sign < 0 else ''}"
        for n in SESSIONS:
            rng = generator("unequal", data, n)
            x, y, both = (draw(shape, rng, (studies, n)) for shape in (one, other, "normal"))
            yield from welch_and_student(x, sign * y, data)
            found = estimates.paired(both + x, both + sign * y).p < ALPHA
            yield count(found, data, True, n, "paired t")


def welch_and_student(x: Floats, y: Floats, words: str) -> Iterator[Cell]:
    """Both tests of the same studies."""
    yield count(estimates.welch(x, y).p < ALPHA, words, False, x.shape[-1], "Welch")
    yield count(estimates.student(x, y).p < ALPHA, words, False, x.shape[-1], "naive: Student")


def of_unequal(cells: Cells) -> str:
    """What the table shows."""
    spreads, shapes = ([c for c in cells if c.data.startswith(SPREADS) == is_in] for is_in in (True, False))
    welch, student = ([c for c in part(spreads) if c.n > 5] for part in (ours, naive))
    few, many = (between(ours(only(shapes, n=n))) for n in (5, 30))
    return f"""
        Unequal spreads are why Welch's test decides and not Student's: from n=10 on Welch's errs in
        {between(welch)} of the studies, Student's in {between(student)}. Where the arms differ in shape
        but not in their means, our tests err in {few} at n=5 and in {many} at n=30: with a handful of
        sessions, an unlike shape can look like a difference. Nothing here is held to a target. Half of 5
        sessions is 2.
    """


def log_ranks(studies: int) -> Iterator[Cell]:
    """Exponential times to a target with the same law in both arms, all given up at one time."""
    studies = min(studies, OF_LOG_RANK)
    horizon = float(SHAPES["exponential"].isf(CENSORED))
    for is_paired in (False, True):
        for n in (5, 10):
            z = sample("normal", is_paired, studies, n, generator("log-rank", is_paired, n))
            ends = SHAPES["exponential"].isf(SHAPES["normal"].sf(z))
            arms = [[Reached(np.minimum(t, horizon), t < horizon) for t in arm] for arm in ends]
            pairs = list(zip(*arms, strict=True))
            ours = np.array([log_rank(one, other, is_paired) for one, other in pairs])
            theirs = np.array([chi_square(one, other) for one, other in pairs])
            name = "log-rank, permutation" + (" within pairs" if is_paired else "")
            data = f"exponential, {CENSORED:.0%} censored"
            yield count(ours < ALPHA, data, is_paired, n, name, ceiling=ALPHA)
            yield count(theirs < ALPHA, data, is_paired, n, "naive: log-rank, SciPy's chi-square")


def chi_square(one: Reached, other: Reached) -> float:
    """SciPy's approximation."""
    x, y = (scipy_stats.CensoredData.right_censored(arm.time, ~arm.reached) for arm in (one, other))
    return float(scipy_stats.logrank(x, y).pvalue)


def of_log_ranks(cells: Cells) -> str:
    """What the table shows."""
    unpaired, pairs = (only(naive(cells), arms=arms) for arms in ("unpaired", "paired"))
    least_p = estimates.permutation_p(5, 5, is_paired=True)
    return f"""
        {cells[0].studies:,} studies a cell. Permutations err in {between(ours(cells))} of them, SciPy's
        chi-square approximation in {between(unpaired)}, and in {between(pairs)} where it ignores that
        sessions are paired. Five pairs find nothing, whatever they hold: their least p is {least_p:g}.
    """


QUESTIONS = (
    Question("false positives", "A difference where there is none", false_positives, of_false_positives),
    Question("coverage", "The 95 % interval", coverage, of_coverage),
    Question("equivalence", "Equivalence where the difference is the margin", equivalence, of_equivalence),
    Question("times", "Times: a difference where there is none", false_findings_in_times, of_times),
    Question("times, power", "Times: what that costs", what_caution_costs, of_costs),
    Question("times, caution", "Times: how much caution", cautions, of_cautions, across="method"),
    Question("family", "Seven arms", family, of_family),
    Question("looks", "Looking every five sessions", looking_early, of_looks, across="method"),
    Question("power", "Power as planned", power, of_power, across=""),
    Question("unequal", "Unequal spreads and shapes", unequal, of_unequal),
    Question("log-rank", "Time to a target", log_ranks, of_log_ranks),
)


# --- figures for the prose, and the tables


def only(cells: Cells, **wanted: object) -> list[Cell]:
    """The cells whose fields have these values."""
    return [c for c in cells if all(getattr(c, name) == value for name, value in wanted.items())]


def naive(cells: Cells) -> list[Cell]:
    """The cells of methods that decide no verdict."""
    return [c for c in cells if c.method.startswith("naive")]


def ours(cells: Cells) -> list[Cell]:
    """The others."""
    return [c for c in cells if not c.method.startswith("naive")]


def most(cells: Cells) -> str:
    """The highest rate."""
    return f"{max(c.rate for c in cells):.3f}"


def least(cells: Cells) -> str:
    """The lowest rate."""
    return f"{min(c.rate for c in cells):.3f}"


def between(cells: Cells) -> str:
    """`0.041 to 0.052`."""
    low, high = least(cells), most(cells)
    return low if low == high else f"{low} to {high}"


def shown(cell: Cell) -> str:
    """The rate, in bold where it misses its target."""
    return f"**{cell.rate:.3f}**" if cell.outcome == "fail" else f"{cell.rate:.3f}"


def table(cells: Cells, across: str) -> Iterator[list[str]]:
    """One column for each value of the field `across`, or one line for each cell."""
    columns = list(dict.fromkeys(getattr(c, across) for c in cells)) if across else ["rate"]
    fields = [name for name in ("data", "arms", "n", "method") if name != across]
    notes = any(c.note for c in cells)
    yield [*fields, *(f"n={x}" if across == "n" else x for x in columns), "target", *[""] * notes]
    for place in dict.fromkeys(tuple(getattr(c, name) for name in fields) for c in cells):
        line = only(cells, **dict(zip(fields, place, strict=True)))
        by_column = {getattr(c, across) if across else "rate": c for c in line}
        rates = [shown(by_column[x]) if x in by_column else "" for x in columns]
        target = " / ".join(dict.fromkeys(c.target for c in line if c.target))
        yield [*map(str, place), *rates, target, *["; ".join(c.note for c in line if c.note)] * notes]


def markdown(lines: Iterator[list[str]]) -> str:
    """A table."""
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def wrapped(text: str) -> str:
    """A paragraph as it is kept in a file."""
    return textwrap.fill(" ".join(text.split()), 110, break_long_words=False, break_on_hyphens=False)


Results = dict[str, list[Cell]]


def page(results: Results, studies: int) -> str:
    """calibration.md."""
    cells = [cell for found in results.values() for cell in found]
    held = sorted((c for c in cells if c.target), key=lambda c: c.room)
    missed = sum(c.outcome == "fail" for c in held)
    low, high = Cell("", "", 0, "", studies, round(ALPHA * studies)).bounds
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "statsmodels"))
    beta: Any = SHAPES["beta"]
    about = [
        """How often the tests, intervals and rules of `normbench.stats` are wrong, counted in simulated
        studies whose truth is known. `python scripts/calibrate.py` simulates them again and
        writes this page and [calibration.csv](calibration.csv), which has the bounds of every
        rate.""",
        f"""A rate is a share of {studies:,} studies where no other number is given (alpha {ALPHA:g}, seed
        {SEED}; Python {platform.python_version()}, {versions}). A ceiling (≤) is kept if the
        lower 99 % bound of the rate is not above it, a floor (≥) if the upper bound is not below
        it (Clopper and Pearson's; {low:.4f} and {high:.4f} for a rate of {ALPHA:g}). Of
        {len(cells)} rates {len(held)} have a target, and
        {f"{missed} miss it" if missed else "all keep it"}. Those in **bold** miss theirs; those
        without a target are shown for comparison. Methods marked *naive* decide no verdict.""",
        f"""Sessions have sd 1, and both arms one shape: normal, beta(93, 7) (like accuracies with mean
        {beta.mean():.2f} and sd {beta.std():.3f}), exponential, or lognormal (sigma 1). Pairs
        share half of their variance. Times are AR(1) series in each arm, or share an AR(1) drift
        of {DRIFT:g} sds of the noise, or are independent and normal; *(ess)* marks the tests that
        count effective sessions.""",
    ]
    parts = ["# How often the statistics err", *map(wrapped, about)]
    for question in QUESTIONS:
        found = results[question.key]
        parts += [
            f"## {question.title}",
            wrapped(question.lesson(found)),
            markdown(table(found, question.across)),
        ]
    nearest = [["cell", "rate", "99 % bounds", "target"]] + [
        [f"{c.data}, {c.arms}, n={c.n}: {c.method}", shown(c), "{:.4f} to {:.4f}".format(*c.bounds), c.target]
        for c in [c for c in held if c.ceiling != 0][:10]
    ]
    parts += ["## Nearest to their targets", markdown(iter(nearest))]
    return "\n\n".join(parts) + "\n"


def frame(results: Results) -> pd.DataFrame:
    """calibration.csv."""
    return pd.DataFrame([{"question": key} | c.row() for key, cells in results.items() for c in cells])


def simulate(questions: Sequence[Question], studies: int) -> Results:
    """The cells of each question."""
    results: Results = {}
    for question in questions:
        start = time.monotonic()
        cells = results[question.key] = list(question.simulate(studies))
        missed = sum(c.outcome == "fail" for c in cells)
        took = time.monotonic() - start
        print(f"{question.key}: {len(cells)} cells, {missed} miss their target, {took:.0f} s", flush=True)
    return results


def main() -> int:
    """Simulate, write, and say what missed its target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=10_000, help="simulated studies a cell")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the two files")
    chosen = parser.parse_args()
    results = simulate(QUESTIONS, chosen.studies)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "calibration.md").write_text(page(results, chosen.studies), encoding="utf-8")
    frame(results).to_csv(chosen.out / "calibration.csv", index=False)
    missed = [(key, c) for key, cells in results.items() for c in cells if c.outcome == "fail"]
    for key, c in missed:
        print(f"missed: {key}: {c.data}, {c.arms}, n={c.n}, {c.method}: {c.rate:.4f}, target {c.target}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
