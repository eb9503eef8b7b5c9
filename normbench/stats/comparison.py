"""One arm against another in one metric: every number of a row of comparisons.csv."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from normbench.stats import estimates, survival
from normbench.stats.arms import Arm, Match
from normbench.stats.estimates import Estimate, still
from normbench.stats.metrics import Metric
from normbench.stats.planning import sessions_for_difference, sessions_for_equivalence
from normbench.stats.primary import Primary, choose_test
from normbench.stats.sequential import Looks, levels, sequential_p
from normbench.stats.series import Floats, drift, effective_n, has_spread, lag1
from normbench.stats.verdicts import FEWEST, FEWEST_EFFECTIVE, FEWEST_IDENTICAL, FEWEST_TIMES
from normbench.values import Refused

NAN = math.nan


@dataclass(frozen=True)
class Margin:
    """The largest difference that still counts as none: an amount, or a part of the baseline's mean."""

    amount: float
    relative: bool = False

    @classmethod
    def of(cls, text: str, where: str) -> "Margin":
        """`0.005` or `2%`."""
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = NAN
        if not (math.isfinite(number) and number > 0):
            raise Refused(f"{where}: a margin is a number above 0, or a percentage like 2%, got {text!r}")
        return cls(number / 100, True) if text.endswith("%") else cls(number)

    def beside(self, baseline_mean: float) -> float:
        """The margin in the metric's unit; Refused where a part of nothing leaves none."""
        if not self.relative:
            return self.amount
        if baseline_mean == 0:
            raise Refused(f"a margin of {self.amount:.3g} of the baseline's mean, which is 0; give an amount")
        return abs(baseline_mean) * self.amount


@dataclass(frozen=True)
class Options:
    """What a person chose before looking."""

    alpha: float = 0.05
    power: float = 0.8
    margins: Mapping[str, Margin] = field(default_factory=dict)
    looks: Looks | None = None
    test_images: int | None = None
    resamples: int = 9999
    seed: int = 0


@dataclass
class Comparison:
    """One row of comparisons.csv, and after `control` what its verdict was made from."""

    metric: str
    baseline: str
    treatment: str
    n_baseline: int = 0
    n_treatment: int = 0
    n_expected: int = 0
    diverged_baseline: int = 0
    diverged_treatment: int = 0
    fisher_p: float = NAN
    mean_baseline: float = NAN
    sd_baseline: float = NAN
    mean_treatment: float = NAN
    sd_treatment: float = NAN
    diff: float = NAN
    ci_low: float = NAN
    ci_high: float = NAN
    bca_low: float = NAN
    bca_high: float = NAN
    welch_t: float = NAN
    welch_df: float = NAN
    welch_p: float = NAN
    student_p: float = NAN
    paired_t: float = NAN
    paired_p: float = NAN
    paired_r: float = NAN
    rank_test: str = ""
    rank_p: float = NAN
    p_holm: float = NAN
    hedges_g: float = NAN
    margin: float = NAN
    tost_p: float = NAN
    min_detectable: float = NAN
    n_needed: float = NAN
    lag1_baseline: float = NAN
    lag1_treatment: float = NAN
    lag1_diff: float = NAN
    ess_baseline: float = NAN
    ess_treatment: float = NAN
    ess_diff: float = NAN
    ess_p: float = NAN
    test: str = ""
    p: float = NAN
    looks: str = ""
    verdict: str = ""
    reason: str = ""
    tost_p_holm: float = NAN
    drift_baseline: float = NAN
    drift_treatment: float = NAN
    binomial_se_baseline: float = NAN
    binomial_se_treatment: float = NAN
    control: bool = False
    obstacle: str = field(default="", metadata={"inside": True})
    identical: bool = field(default=False, metadata={"inside": True})
    unmeasured: int = field(default=0, metadata={"inside": True})
    pairs: int = field(default=0, metadata={"inside": True})
    repeats: str = field(default="", metadata={"inside": True})
    fisher_holm: float = field(default=NAN, metadata={"inside": True})
    group: Mapping[str, Any] = field(default_factory=dict, metadata={"inside": True})
    estimate: Estimate | None = field(default=None, metadata={"inside": True})


def compare(match: Match, options: Options, family: int = 1, control: bool = False) -> Comparison:
    """Everything but Holm's correction and the verdict; `family` is the number of tests the command makes."""
    b, t, metric = match.b, match.t, match.metric
    c = Comparison(metric.name, b.label, t.label, control=control)
    x, y = match.sides()
    count_sessions(c, b, t)
    describe(c, b, t, metric, options)
    c.pairs = x.size if match.is_paired else 0
    c.repeats = also(match.note, match.caution())
    c.obstacle = shut_out = match.obstacle()
    if min(x.size, y.size) < FEWEST:
        return c
    if metric.is_until:
        describe_until(c, *match.reached())
    else:
        usual_tests(c, match)
        c.bca_low, c.bca_high = estimates.bca(
            x, y, match.is_paired, options.alpha, options.seed, options.resamples
        )
        whole = x.size >= FEWEST_IDENTICAL and not c.unmeasured and not match.note
        c.identical = match.is_paired and whole and np.array_equal(x, y)
    series(c, match)
    primary = Primary.of(match, seed=options.seed)
    conclude(c, primary, match, options, family)
    if options.looks:
        look(c, match, options, options.looks)
    if shut_out:
        c.p = c.tost_p = NAN
    return c


def also(*words: str) -> str:
    """What there is to say, on one line."""
    return "; ".join(filter(None, words))


def conclude(c: Comparison, primary: Primary, match: Match, options: Options, family: int) -> None:
    """What the primary test says, what it could have found, and how many sessions would settle it."""
    estimate = primary.estimate
    c.estimate, c.test, c.p, c.diff = estimate, primary.name, primary.p, float(estimate.diff)
    if c.metric in options.margins:
        c.margin = options.margins[c.metric].beside(c.mean_baseline)
        c.tost_p = primary.tost(c.margin)
    if primary.flat:
        return
    c.ci_low, c.ci_high = (float(end) for end in estimate.interval(options.alpha))
    alpha, is_paired = options.alpha / family, match.is_paired
    c.min_detectable = estimate.detectable(alpha, options.power)
    n = c.pairs if is_paired else min(c.n_baseline, c.n_treatment)
    spread = float(estimate.se) * math.sqrt(n if is_paired else n / 2)  # of sessions worth what these are
    if abs(c.diff) < c.margin:
        needed = sessions_for_equivalence(spread, c.margin, alpha, options.power, is_paired)
    else:
        needed = sessions_for_difference(spread, c.diff, alpha, options.power, is_paired)
    c.n_needed = math.inf if needed is None else max(needed, n + 1)


def look(c: Comparison, match: Match, options: Options, looks: Looks) -> None:
    """Replace p, tost_p and the interval by those that hold over all looks so far.

    A look after n sessions sees the first n places, whatever became of their sessions.
    """
    seen = looks.up_to(match.last_place)
    fewest = FEWEST_TIMES if match.metric.is_time else FEWEST
    primaries = [
        Primary.of(match, n, options.seed) if min(side.size for side in match.sides(n)) >= fewest else None
        for n in seen.at
    ]
    c.p = sequential_p([primary.p if primary else 1.0 for primary in primaries], seen.fractions)
    if not math.isnan(c.margin):
        tosts = [primary.tost(c.margin) if primary else 1.0 for primary in primaries]
        c.tost_p = sequential_p(tosts, seen.fractions, two_sided=False)
    c.looks = f"{', '.join(map(str, seen.at)) or 'none yet'} of {looks.planned}"
    c.ci_low = c.ci_high = NAN
    if primaries and (last := primaries[-1]) and not last.flat:
        level = levels(options.alpha, seen.fractions)[-1]
        c.ci_low, c.ci_high = (float(end) for end in last.estimate.interval(level))


def count_sessions(c: Comparison, b: Arm, t: Arm) -> None:
    """How many there are, how many diverged, and whether the rates of divergence differ."""
    c.n_baseline, c.n_treatment = b.values(c.metric).size, t.values(c.metric).size
    c.n_expected = t.expected
    c.diverged_baseline, c.diverged_treatment = b.count("diverged"), t.count("diverged")
    c.unmeasured = b.unmeasured(c.metric) + t.unmeasured(c.metric)
    ended = [int(arm.ended.sum()) for arm in (b, t)]
    if min(ended) > 0:
        counts = [
            [c.diverged_baseline, ended[0] - c.diverged_baseline],
            [c.diverged_treatment, ended[1] - c.diverged_treatment],
        ]
        c.fisher_p = float(scipy_stats.fisher_exact(np.array(counts)).pvalue)


def describe(c: Comparison, b: Arm, t: Arm, metric: Metric, options: Options) -> None:
    """Means, sds, and what of an accuracy's spread the size of the test set alone would give."""
    x, y = b.values(metric.name), t.values(metric.name)
    c.mean_baseline, c.mean_treatment = (float(side.mean()) if side.size else NAN for side in (x, y))
    c.sd_baseline, c.sd_treatment = sd(x), sd(y)
    if metric.is_accuracy:
        c.binomial_se_baseline = binomial_se(c.mean_baseline, images_of(b, metric, options))
        c.binomial_se_treatment = binomial_se(c.mean_treatment, images_of(t, metric, options))


def images_of(arm: Arm, metric: Metric, options: Options) -> int | None:
    """How many images the metric was measured on, as far as is known."""
    told = options.test_images if metric.part == "test" else None
    return told or arm.images.get(metric.part)


def describe_until(c: Comparison, one: survival.Reached, other: survival.Reached) -> None:
    """Restricted means in place of means, and a word on sessions that never got there."""
    horizon = survival.horizon_of(one, other)
    c.mean_baseline, c.mean_treatment = (survival.restricted_mean(a, horizon)[0] for a in (one, other))
    c.sd_baseline = c.sd_treatment = NAN
    c.repeats = also(never_reached(one, other), c.repeats)


def sd(x: Floats) -> float:
    """Standard deviation with divisor n − 1; NaN below two values."""
    return float(x.std(ddof=1)) if x.size > 1 else NAN


def binomial_se(accuracy: float, images: int | None) -> float:
    """√(p (1 − p) / images): how much a score on so many images varies by the choice of images."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images) if images else NAN


def series(c: Comparison, match: Match) -> None:
    """What the order of the sessions says; a time worth fewer than three sessions is an obstacle."""
    metric, is_paired = match.metric, match.is_paired
    px, py = match.series()
    x, y = (px, py) if metric.is_until else (match.b.values(c.metric), match.t.values(c.metric))
    c.lag1_baseline, c.lag1_treatment = float(lag1(x)), float(lag1(y))
    c.ess_baseline, c.ess_treatment = float(effective_n(x)), float(effective_n(y))
    drifts = {c.baseline: drift(x), c.treatment: drift(y)}
    c.drift_baseline, c.drift_treatment = (rho for rho, _ in drifts.values())
    c.repeats = also(c.repeats, drift_words(drifts, metric))
    worth = match.worth()
    if is_paired:
        c.lag1_diff, c.ess_diff = worth[0].lag1, worth[0].sessions
    test, _ = choose_test(is_paired, is_time=True)
    c.ess_p = NAN if still(px, py, is_paired) else float(test(px, py).p)
    if not metric.is_time or c.obstacle:
        return
    words = [str(w) for w in worth if w.sessions < 0.9 * w.n]
    if min(w.sessions for w in worth) < FEWEST_EFFECTIVE:
        c.obstacle = f"too few independent times: {'; '.join(words)}, {FEWEST_EFFECTIVE:g} needed"
    else:
        c.repeats = also(c.repeats, *words)


def drift_words(drifts: Mapping[str, tuple[float, float]], metric: Metric) -> str:
    """A word where values follow the launch order; in an accuracy a sign that sessions are not fresh."""
    limit = 0.05 if metric.is_time else 0.01
    found = [f"{arm} {rho:+.2f}" for arm, (rho, p) in drifts.items() if p < limit]
    ask = "" if metric.is_time else ": does every session start afresh?"
    return f"drift with launch order (rank correlation {', '.join(found)}){ask}" if found else ""


def usual_tests(c: Comparison, match: Match) -> None:
    """The tests a reader may look for, whatever decides; NaN where arms without spread leave none."""
    x, y = (arm.values(c.metric) for arm in (match.b, match.t))
    px, py = match.sides()
    if not still(x, y, is_paired=False):
        welch = estimates.welch(x, y)
        c.welch_t, c.welch_df, c.welch_p = float(welch.t), float(welch.df), float(welch.p)
        c.student_p = float(estimates.student(x, y).p)
        c.hedges_g = estimates.hedges_g(x, y)
    if match.is_paired and not still(px, py, is_paired=True):
        paired = estimates.paired(px, py)
        c.paired_t, c.paired_p = float(paired.t), float(paired.p)
    if match.is_paired and px.size > 2 and has_spread(px) and has_spread(py):
        c.paired_r = float(np.corrcoef(px, py)[0, 1])
    c.rank_test, c.rank_p = estimates.rank_test(px, py, match.is_paired)


def never_reached(one: survival.Reached, other: survival.Reached) -> str:
    """A word on sessions that ended before they got there."""
    missed = [int((~side.reached).sum()) for side in (other, one)]
    if not any(missed):
        return ""
    return f"{missed[0]} of {other.time.size} against {missed[1]} of {one.time.size} sessions never got there"
