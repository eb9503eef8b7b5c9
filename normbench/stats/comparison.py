"""One arm against another in one metric: which sessions, which test, every number of comparisons.csv."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from normbench.stats import estimates, survival
from normbench.stats.estimates import ROUNDING, Estimate
from normbench.stats.metrics import Metric
from normbench.stats.planning import sessions_for_difference, sessions_for_equivalence
from normbench.stats.sequential import Looks, sequential_p
from normbench.stats.series import Floats, drift, effective_n, lag1
from normbench.stats.verdicts import FEWEST, FEWEST_EFFECTIVE, FEWEST_TIMES
from normbench.values import Refused

NAN = math.nan
SAME_NUMBERS = (
    "model",
    "dataset",
    "batch_size",
)  # with equal seed and session: equal weights, batches, augmentation
SAME_MACHINE = ("device_name", "precision", "torch_version", "pack", "threads", "slots")


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
        """The margin in the metric's unit."""
        return abs(baseline_mean) * self.amount if self.relative else self.amount


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
class Arm:
    """One arm's sessions in the order they were run. `place` is each session's row in what arms share."""

    label: str
    key: str
    rows: pd.DataFrame
    place: NDArray[np.intp]
    places: int
    expected: int
    images: Mapping[str, int] = field(default_factory=dict)
    _known: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    def values(self, metric: str) -> Floats:
        """The metric's values, in order, without missing ones."""
        column = self.rows[metric].to_numpy(float)
        return np.asarray(column[~np.isnan(column)])

    def by_place(self, metric: str) -> Floats:
        """The metric of every session that any arm of the group has; NaN where this arm has none."""
        values = np.full(self.places, NAN)
        values[self.place] = self.rows[metric].to_numpy(float)
        return values

    def known(self, column: str) -> list[Any]:
        """The different values that a column is known to have."""
        if column not in self._known:
            values = list(self.rows[column].dropna().unique()) if column in self.rows else []
            self._known[column] = sorted(values, key=str)
        return self._known[column]

    @cached_property
    def numbered(self) -> bool:
        """Whether every session says its seed and number."""
        return {"seed", "session"} <= set(self.rows) and not self.rows[["seed", "session"]].isna().any(
            axis=None
        )

    @cached_property
    def hosts(self) -> NDArray[np.object_]:
        """The host of every place, None where it is not known."""
        hosts = np.full(self.places, None, dtype=object)
        if "hostname" in self.rows:
            names = self.rows["hostname"].astype(object)
            hosts[self.place] = names.where(names.notna(), None).to_numpy()
        return hosts

    def count(self, status: str) -> int:
        """Sessions that ended so."""
        return (
            int((self.rows["status"] == status).sum())
            if "status" in self.rows
            else len(self.rows) * (status == "ok")
        )

    def repeats_random_numbers_of(self, other: "Arm") -> bool:
        """Whether equal (seed, session) means equal random numbers: by the rows, never assumed."""
        same = all(self.known(column) == other.known(column) for column in SAME_NUMBERS)
        return self.numbered and other.numbered and same


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
    group: Mapping[str, Any] = field(default_factory=dict, metadata={"inside": True})
    estimate: Estimate | None = field(default=None, metadata={"inside": True})


@dataclass(frozen=True)
class Primary:
    """The test that decides: its name, its estimate, and p values that hold for arms without spread too."""

    name: str
    estimate: Estimate
    p: float
    flat: bool
    scale: float

    def tost(self, margin: float) -> float:
        """p of "the difference is the margin or more"."""
        if not self.flat:
            return float(self.estimate.tost(margin))
        return self.p if abs(float(self.estimate.diff)) > ROUNDING * self.scale else 0.0

    @classmethod
    def of(cls, x: Floats, y: Floats, is_paired: bool, is_time: bool) -> "Primary":
        """`x` the baseline's, `y` the treatment's sessions; at least two of each."""
        test, name = choose_test(is_paired, is_time)
        estimate = test(x, y)
        scale = float(max(np.abs(x).max(), np.abs(y).max()))
        sides = (y - x,) if is_paired else (x, y)
        flat = all(float(np.ptp(side)) <= ROUNDING * scale for side in sides)
        if not flat:
            return cls(name, estimate, float(estimate.p), flat, scale)
        same = abs(float(estimate.diff)) <= ROUNDING * scale
        p = 1.0 if same else estimates.permutation_p(x.size, y.size, is_paired)
        return cls("exact permutation", estimate, p, flat, scale)


def choose_test(is_paired: bool, is_time: bool) -> tuple[Callable[[Floats, Floats], Estimate], str]:
    """Welch's or the paired t; with effective numbers of sessions for times."""
    if is_time:
        return (
            (estimates.paired_serial, "paired t (ess)")
            if is_paired
            else (estimates.welch_serial, "Welch (ess)")
        )
    return (estimates.paired, "paired t") if is_paired else (estimates.welch, "Welch")


def compare(
    b: Arm, t: Arm, metric: Metric, options: Options, family: int = 1, control: bool = False
) -> Comparison:
    """Everything but Holm's correction and the verdict; `family` is the number of tests the command makes."""
    c = Comparison(metric.name, b.label, t.label, control=control)
    x, y = b.values(metric.name), t.values(metric.name)
    count_sessions(c, b, t, x, y, metric)
    describe(c, b, t, x, y, metric, options)
    is_paired, reason = pairing(b, t, metric)
    places = ~np.isnan(b.by_place(metric.name)) & ~np.isnan(t.by_place(metric.name)) if is_paired else None
    px, py = (b.by_place(metric.name)[places], t.by_place(metric.name)[places]) if is_paired else (x, y)
    c.pairs = len(px) if is_paired else 0
    c.obstacle = shut_out = obstacle(b, t, metric, is_paired) or too_few(metric, px, py)
    c.repeats = reason
    if min(px.size, py.size) < FEWEST:
        return c
    if metric.is_until:
        compare_until(c, b, t, metric, options, is_paired, places)
        if shut_out:
            c.p = c.tost_p = NAN
        return c
    series(c, x, y, px, py, is_paired, metric)
    usual_tests(c, x, y, px, py, is_paired)
    primary = Primary.of(px, py, is_paired, metric.is_time)
    c.estimate, c.test = primary.estimate, primary.name
    c.diff = float(primary.estimate.diff)
    if not primary.flat:
        c.ci_low, c.ci_high = (float(end) for end in primary.estimate.interval(options.alpha))
    c.identical = is_paired and bool(np.array_equal(px, py)) and px.size == max(x.size, y.size)
    c.bca_low, c.bca_high = estimates.bca(px, py, is_paired, options.alpha, options.seed, options.resamples)
    if metric.name in options.margins:
        c.margin = options.margins[metric.name].beside(c.mean_baseline)
        c.tost_p = primary.tost(c.margin) if abs(c.diff) < c.margin else max(0.5, primary.tost(c.margin))
    c.p = primary.p
    if options.looks:
        look(c, px, py, is_paired, metric, options.looks)
    plan_more(c, primary, is_paired, options, family)
    if shut_out:
        c.p = c.tost_p = NAN
    return c


def count_sessions(c: Comparison, b: Arm, t: Arm, x: Floats, y: Floats, metric: Metric) -> None:
    """How many there are, how many diverged, and whether the rates of divergence differ."""
    c.n_baseline, c.n_treatment, c.n_expected = x.size, y.size, t.expected
    c.diverged_baseline, c.diverged_treatment = b.count("diverged"), t.count("diverged")
    ended = [arm.count("ok") + arm.count("diverged") for arm in (b, t)]
    c.unmeasured = sum(ended) - x.size - y.size
    if min(ended) > 0:
        counts = [[c.diverged_baseline, ended[0] - c.diverged_baseline],
                  [c.diverged_treatment, ended[1] - c.diverged_treatment]]  # fmt: skip
        c.fisher_p = float(scipy_stats.fisher_exact(np.array(counts)).pvalue)


def describe(c: Comparison, b: Arm, t: Arm, x: Floats, y: Floats, metric: Metric, options: Options) -> None:
    """Means, sds, and what of an accuracy's spread the size of the test set alone would give."""
    if x.size:
        c.mean_baseline = float(x.mean())
    if y.size:
        c.mean_treatment = float(y.mean())
    c.sd_baseline, c.sd_treatment = sd(x), sd(y)
    if metric.is_accuracy:
        told = options.test_images if metric.part == "test" else None
        c.binomial_se_baseline = binomial_se(c.mean_baseline, told or b.images.get(metric.part))
        c.binomial_se_treatment = binomial_se(c.mean_treatment, told or t.images.get(metric.part))


def sd(x: Floats) -> float:
    """Standard deviation with divisor n − 1; NaN below two values."""
    return float(x.std(ddof=1)) if x.size > 1 else NAN


def binomial_se(accuracy: float, images: int | None) -> float:
    """√(p (1 − p) / images): how much a score on so many images varies by the choice of images."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images) if images and accuracy == accuracy else NAN


def pairing(b: Arm, t: Arm, metric: Metric) -> tuple[bool, str]:
    """Whether sessions are compared in pairs, and a word where some have no partner."""
    if not t.repeats_random_numbers_of(b):
        return False, ""
    x, y = b.by_place(metric.name), t.by_place(metric.name)
    both = ~np.isnan(x) & ~np.isnan(y)
    whole = int(min((~np.isnan(x)).sum(), (~np.isnan(y)).sum()))
    most = int(max((~np.isnan(x)).sum(), (~np.isnan(y)).sum()))
    if both.sum() < max(FEWEST, whole / 2):
        return False, ""
    if metric.is_time and not same_hosts(b, t, both):
        return False, "pairs ran on different hosts, so each arm's own series decides"
    return True, "" if both.sum() == most else f"by the {both.sum()} sessions that both arms have"


def same_hosts(b: Arm, t: Arm, both: NDArray[np.bool_]) -> bool:
    """Whether the two sessions of each pair ran on one host, as far as is known."""
    if b.known("hostname") == t.known("hostname") and len(b.known("hostname")) <= 1:
        return True
    return bool(np.all(b.hosts[both] == t.hosts[both]))


def obstacle(b: Arm, t: Arm, metric: Metric, is_paired: bool) -> str:
    """Why the arms cannot be compared at all; empty where they can."""
    for column in ("dataset", *(SAME_MACHINE if metric.is_time else ())):
        one, other = b.known(column), t.known(column)
        if one and other and one != other:
            cure = "; use --by dataset" if column == "dataset" else ""
            return f"{column} differs: {listed(other)} against {listed(one)}{cure}"
        if len(one) > 1 and column != "dataset" and not is_paired:
            return f"{column} varies within the arms: {listed(one)}"
    return ""


def listed(values: Sequence[Any]) -> str:
    """Values on one line, whole numbers without a point."""
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def too_few(metric: Metric, x: Floats, y: Floats) -> str:
    """Why so many sessions say nothing; empty where they do."""
    n = min(x.size, y.size)
    if n < FEWEST:
        return f"too few sessions: {y.size} against {x.size}, {FEWEST} an arm needed"
    if metric.is_time and n < FEWEST_TIMES:
        return (
            f"too few sessions: {n} times cannot show how much they repeat themselves, {FEWEST_TIMES} needed"
        )
    return ""


def series(
    c: Comparison, x: Floats, y: Floats, px: Floats, py: Floats, is_paired: bool, metric: Metric
) -> None:
    """What the order of the sessions says; a time worth fewer than three sessions is an obstacle."""
    c.lag1_baseline, c.lag1_treatment = float(lag1(x)), float(lag1(y))
    c.ess_baseline, c.ess_treatment = float(effective_n(x)), float(effective_n(y))
    drifts = {c.baseline: drift(x), c.treatment: drift(y)}
    c.drift_baseline, c.drift_treatment = (rho for rho, _ in drifts.values())
    c.repeats = "; ".join(filter(None, [c.repeats, drift_words(drifts, metric)]))
    if is_paired:
        c.lag1_diff, c.ess_diff = float(lag1(py - px)), float(effective_n(py - px, estimates.CAUTION))
    test, _ = choose_test(is_paired, is_time=True)
    flat = np.ptp(py - px) == 0 if is_paired else np.ptp(px) == 0 and np.ptp(py) == 0
    c.ess_p = NAN if flat else float(test(px, py).p)
    if not metric.is_time or c.obstacle:
        return
    used = {"the differences": (c.lag1_diff, c.ess_diff, px.size)} if is_paired else {
        c.baseline: (c.lag1_baseline, c.ess_baseline, px.size),
        c.treatment: (c.lag1_treatment, c.ess_treatment, py.size),
    }  # fmt: skip
    words = [f"{name}: lag-1 autocorrelation {r:.2f}, {n} sessions worth {ess:.1f}"
             for name, (r, ess, n) in used.items() if ess < 0.9 * n]  # fmt: skip
    if min(ess for _, ess, _ in used.values()) < FEWEST_EFFECTIVE:
        c.obstacle = f"too few independent times: {'; '.join(words)}, {FEWEST_EFFECTIVE:g} needed"
    else:
        c.repeats = "; ".join(filter(None, [c.repeats, *words]))


def drift_words(drifts: Mapping[str, tuple[float, float]], metric: Metric) -> str:
    """A word where values follow the launch order; in an accuracy a sign that sessions are not fresh."""
    limit = 0.05 if metric.is_time else 0.01
    found = [f"{arm} {rho:+.2f}" for arm, (rho, p) in drifts.items() if p < limit]
    ask = "" if metric.is_time else ": does every session start afresh?"
    return f"drift with launch order (rank correlation {', '.join(found)}){ask}" if found else ""


def usual_tests(c: Comparison, x: Floats, y: Floats, px: Floats, py: Floats, is_paired: bool) -> None:
    """The tests a reader may look for, whatever decides; NaN where arms without spread leave none."""
    if min(x.size, y.size) >= FEWEST and not (flat(x) and flat(y)):
        welch = estimates.welch(x, y)
        c.welch_t, c.welch_df, c.welch_p = float(welch.t), float(welch.df), float(welch.p)
        c.student_p = float(estimates.student(x, y).p)
        c.hedges_g = estimates.hedges_g(x, y)
    if is_paired and not flat(py - px):
        paired = estimates.paired(px, py)
        c.paired_t, c.paired_p = float(paired.t), float(paired.p)
    if is_paired and px.size > 2 and not (flat(px) or flat(py)):
        c.paired_r = float(np.corrcoef(px, py)[0, 1])
    c.rank_test, c.rank_p = estimates.rank_test(px, py, is_paired)


def flat(x: Floats) -> bool:
    """Whether nothing varies but by rounding."""
    return float(np.ptp(x)) <= ROUNDING * float(np.abs(x).max())


def look(c: Comparison, px: Floats, py: Floats, is_paired: bool, metric: Metric, looks: Looks) -> None:
    """Replace p and tost_p by those that hold over all looks so far, each on the sessions it saw."""
    seen = looks.up_to(min(px.size, py.size))
    fewest = FEWEST_TIMES if metric.is_time else FEWEST
    ps, tosts = [], []
    for n in seen.at:
        primary = Primary.of(px[:n], py[:n], is_paired, metric.is_time) if n >= fewest else None
        ps.append(primary.p if primary else 1.0)
        inside = primary is not None and abs(float(primary.estimate.diff)) < c.margin
        tosts.append(primary.tost(c.margin) if primary and inside else 1.0)
    c.p = sequential_p(ps, seen.fractions)
    if c.margin == c.margin:
        c.tost_p = sequential_p(tosts, seen.fractions, two_sided=False)
    c.looks = f"{', '.join(map(str, seen.at)) or 'none yet'} of {looks.planned}"


def plan_more(c: Comparison, primary: Primary, is_paired: bool, options: Options, family: int) -> None:
    """The smallest difference these sessions find, and how many sessions would settle an open question."""
    if primary.flat:
        return
    estimate = primary.estimate
    c.min_detectable = estimate.detectable(options.alpha, options.power)
    n = min(c.n_baseline, c.n_treatment) if not is_paired else c.pairs
    sd_one = float(estimate.se) * math.sqrt(
        n if is_paired else n / 2
    )  # as many sessions as now, worth what they are
    alpha = options.alpha / family
    if c.margin == c.margin and abs(c.diff) < c.margin:
        needed = sessions_for_equivalence(sd_one, c.margin, alpha, options.power, is_paired)
    elif c.diff != 0:
        needed = sessions_for_difference(sd_one, c.diff, alpha, options.power, is_paired)
    else:
        needed = None
    c.n_needed = math.inf if needed is None else max(needed, n + 1)


def compare_until(
    c: Comparison,
    b: Arm,
    t: Arm,
    metric: Metric,
    options: Options,
    is_paired: bool,
    places: NDArray[np.bool_] | None,
) -> None:
    """Times to a target: restricted means, the log-rank test, and for seconds the series' own repetition."""
    sides = []
    for arm in (b, t):
        column = arm.rows[metric.name].to_numpy(float)
        there = arm.rows[f"{metric.name} reached"].to_numpy(bool)
        if places is not None:
            time, reached = np.full(arm.places, NAN), np.zeros(arm.places, bool)
            time[arm.place], reached[arm.place] = column, there
            sides.append(survival.Reached(time[places], reached[places]))
        else:
            sides.append(survival.Reached(column[~np.isnan(column)], there[~np.isnan(column)]))
    one, other = sides
    horizon = survival.horizon_of(one, other)
    (c.mean_baseline, se_b), (c.mean_treatment, se_t) = (survival.restricted_mean(a, horizon) for a in sides)
    c.sd_baseline = c.sd_treatment = NAN
    inflation = 1.0
    x, y = np.minimum(one.time, horizon), np.minimum(other.time, horizon)
    if metric.is_time:
        series(c, x, y, x, y, is_paired, metric)
        worth = [c.ess_diff] if is_paired else [c.ess_baseline, c.ess_treatment]
        inflation = max(1.0, *(n / ess for n, ess in zip((x.size, y.size), worth, strict=False)))
    c.diff = c.mean_treatment - c.mean_baseline
    se = math.sqrt((se_b**2 + se_t**2) * inflation)
    c.test = "log-rank" + (" (ess)" if metric.is_time else "") + (", within pairs" if is_paired else "")
    c.p = survival.log_rank(one, other, is_paired, inflation, options.seed)
    c.identical = is_paired and bool(np.array_equal(x, y) and np.array_equal(one.reached, other.reached))
    missed = [int((~a.reached).sum()) for a in (other, one)]
    if any(missed):
        counts = f"{missed[0]} of {other.time.size} against {missed[1]} of {one.time.size}"
        never = f"{counts} sessions never got there"
        c.repeats = "; ".join(filter(None, [never, c.repeats]))
    if se > 0:
        half = se * float(scipy_stats.norm.isf(options.alpha / 2))
        c.ci_low, c.ci_high = c.diff - half, c.diff + half
        c.min_detectable = se * float(
            scipy_stats.norm.isf(options.alpha / 2) + scipy_stats.norm.isf(1 - options.power)
        )
        if metric.name in options.margins:
            c.margin = options.margins[metric.name].beside(c.mean_baseline)
            c.tost_p = float(scipy_stats.norm.sf((c.margin - abs(c.diff)) / se))
        sd_one = se * math.sqrt(min(x.size, y.size) / 2)
        needed = sessions_for_difference(sd_one, c.diff, options.alpha, options.power) if c.diff else None
        c.n_needed = math.inf if needed is None else max(needed, min(x.size, y.size) + 1)
