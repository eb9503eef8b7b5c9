"""A whole command: arms by group, comparisons against the baseline as one family, verdicts, ranking."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.oneway import anova_generic

from normbench.stats.arms import Arm, Match
from normbench.stats.comparison import Comparison, Options, compare
from normbench.stats.inputs import Sessions, labels_of
from normbench.stats.metrics import Metric
from normbench.stats.order import choose_baseline, in_order
from normbench.stats.primary import Primary
from normbench.stats.series import Floats, has_spread, variance_and_worth
from normbench.stats.verdicts import DIFFERENT, FEWEST, FEWEST_EFFECTIVE, decide
from normbench.values import Refused, nearest

CONTROL = ("obn", "torch_bn")  # one op under two names


@dataclass(frozen=True)
class Omnibus:
    """Welch's analysis of variance: whether any arm's mean differs from any other's."""

    f: float
    df_between: float
    df_within: float
    p: float


@dataclass(frozen=True)
class Ranked:
    """An arm's place: arms that share a letter are not told apart."""

    label: str
    mean: float
    letters: str


@dataclass
class Group:
    """The arms compared with each other: all, or those that agree in the `--by` columns."""

    name: Mapping[str, Any]
    arms: dict[str, Arm]
    baseline: str
    omnibus: dict[str, Omnibus] = field(default_factory=dict)
    ranking: dict[str, list[Ranked]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """`dataset=cifar10, batch_size=128`; empty without --by."""
        return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.name.items())

    def order(self) -> list[str]:
        """The baseline, then the others by name."""
        return in_order(self.arms, self.baseline)


@dataclass
class Analysis:
    """What a command found."""

    sessions: Sessions
    metrics: Sequence[Metric]
    options: Options
    groups: list[Group]
    comparisons: list[Comparison]

    @property
    def family(self) -> int:
        """How many tests share alpha."""
        return sum(not math.isnan(c.p) for c in self.comparisons)

    @property
    def distrusted(self) -> list[Comparison]:
        """Controls that differ, though they are the same op twice."""
        return [c for c in self.comparisons if c.control and c.verdict == DIFFERENT]

    def of(self, group: Group, metric: Metric) -> list[Comparison]:
        """The comparisons of one table, controls first."""
        chosen = [c for c in self.comparisons if c.group == group.name and c.metric == metric.name]
        return sorted(chosen, key=lambda c: not c.control)


def analyse(
    sessions: Sessions,
    metrics: Sequence[Metric],
    options: Options,
    baseline: str | None = None,
    by: Sequence[str] = (),
) -> Analysis:
    """Every arm against its group's baseline in every metric, as one family of tests."""
    groups = [
        Group(name, arms, choose_baseline(list(arms), baseline))
        for name, rows in split(sessions.rows, by)
        if (arms := arms_of(sessions, rows))
    ]
    pairs = [(group, b, t, control) for group in groups for b, t, control in pairs_of(group)]
    tests = [
        (group, Match.of(group.arms[b], group.arms[t], metric), control)
        for group, b, t, control in pairs
        for metric in metrics
    ]
    family = max(1, sum(not match.obstacle() for _, match, _ in tests))
    comparisons = []
    for group, match, control in tests:
        made = compare(match, options, family, control)
        made.group = group.name
        comparisons.append(made)
    correct(comparisons)
    analysis = Analysis(sessions, metrics, options, groups, comparisons)
    judge(analysis)
    rank(analysis)
    return analysis


def split(rows: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[Mapping[str, Any], pd.DataFrame]]:
    """Rows by the values of the `by` columns."""
    for column in by:
        if column not in rows:
            raise Refused(f"--by {column}: no such column{nearest(column, list(rows.columns))}")
    if not by:
        yield {}, rows
        return
    for values, part in rows.groupby(list(by), observed=True, dropna=False, sort=True):
        yield dict(zip(by, values if isinstance(values, tuple) else (values,), strict=True)), part


def arms_of(sessions: Sessions, rows: pd.DataFrame) -> dict[str, Arm]:
    """The arms of a group by label, each with its sessions in order."""
    rows = rows.reset_index(drop=True)
    identity = [c for c in ("seed", "session") if c in rows]
    place = (
        rows.groupby(identity, sort=False, dropna=False).ngroup().to_numpy()
        if identity
        else np.arange(len(rows))
    )
    places = int(place.max()) + 1
    labels = labels_of(rows)
    twice = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    if twice:
        name = min(twice)
        raise Refused(
            f"two arms are called {name!r}; give files other names, or compare within each study: --by study"
        )
    positions = rows.groupby(rows["key"].astype(str), sort=False, observed=True).indices
    most = max(len(at) for at in positions.values())
    arms = {}
    for key, at in positions.items():
        expected = sessions.expected.get(str(key), most)
        label, order = labels[str(key)], np.asarray(place[at], np.intp)
        images = sessions.images.get(str(key), {})
        arms[label] = Arm(label, str(key), rows.iloc[at], order, places, expected, images)
    return arms


def pairs_of(group: Group) -> Iterator[tuple[str, str, bool]]:
    """(baseline, treatment, whether they are an A/A control): controls first."""
    controls = controls_of(list(group.arms))
    for one, other in controls:
        yield (other, one, True) if group.baseline == other else (one, other, True)
    for label in group.order()[1:]:
        if not any({label, group.baseline} == set(pair) for pair in controls):
            yield group.baseline, label, False


def controls_of(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of arms that are one op under two names: obn and torch_bn, all else equal."""
    first, second = CONTROL
    parts = {label: label.lower().partition("-") for label in labels}
    twins = {tail: label for label, (norm, _, tail) in parts.items() if norm == second}
    return [
        (label, twins[tail]) for label, (norm, _, tail) in parts.items() if norm == first and tail in twins
    ]


def correct(comparisons: Sequence[Comparison]) -> None:
    """Holm's correction: over all tests of a difference, all of a margin, all of rates of divergence."""
    for plain, corrected in (("p", "p_holm"), ("tost_p", "tost_p_holm")):
        tested = [c for c in comparisons if not math.isnan(getattr(c, plain))]
        for c, p in zip(tested, holm([getattr(c, plain) for c in tested]), strict=True):
            setattr(c, corrected, p)
    rates = {pair_of(c): c.fisher_p for c in comparisons if not math.isnan(c.fisher_p)}
    adjusted = dict(zip(rates, holm(list(rates.values())), strict=True))
    for c in comparisons:
        c.fisher_holm = adjusted.get(pair_of(c), math.nan)


def pair_of(c: Comparison) -> tuple[str, str, str]:
    """Which arms are compared, whatever the metric."""
    return str(c.group), c.baseline, c.treatment


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number."""
    return [float(p) for p in multipletests(ps, method="holm")[1]] if ps else []


def judge(analysis: Analysis) -> None:
    """Give every comparison its verdict; where a control differs, every reason says so."""
    for c in analysis.comparisons:
        verdict = decide(c, analysis.options.alpha, analysis.family)
        c.verdict, c.reason = verdict.word, verdict.reason
    broken = analysis.distrusted
    for c in analysis.comparisons:
        wrong = [x for x in broken if x.group == c.group]
        if wrong:
            names = ", ".join(f"{x.baseline} against {x.treatment} in {x.metric}" for x in wrong)
            c.reason += f"; distrust this: one op under two names differs ({names})"


def rank(analysis: Analysis) -> None:
    """Omnibus tests and rankings, where every arm can be compared with every other and nobody looked early.

    Pairs are judged by the comparisons' own test, with Holm's correction over all pairs of all rankings.
    """
    if analysis.options.looks:
        return
    rankings: list[tuple[Group, Metric, dict[str, float], dict[tuple[int, int], float]]] = []
    for group in analysis.groups:
        for metric in analysis.metrics:
            values = {label: arm.values(metric.name) for label, arm in group.arms.items()}
            if len(values) < 3 or metric.is_until or not all(x.size for x in values.values()):
                continue
            means = {label: float(x.mean()) for label, x in values.items()}
            order = sorted(means, key=means.__getitem__, reverse=metric.better > 0)
            best_first = {label: means[label] for label in order}
            arms = [group.arms[label] for label in best_first]
            pairs = itertools.combinations(range(len(arms)), 2)
            matches = {(i, j): Match.of(arms[i], arms[j], metric) for i, j in pairs}
            if not all(comparable(match) for match in matches.values()):
                continue
            if omnibus := welch_anova(list(values.values()), metric.is_time):
                group.omnibus[metric.name] = omnibus
            ps = {pair: Primary.of(match).p for pair, match in matches.items()}
            rankings.append((group, metric, best_first, ps))
    adjusted = iter(holm([p for *_, ps in rankings for p in ps.values()]))
    for group, metric, best_first, ps in rankings:
        apart = {pair for pair in ps if next(adjusted) < analysis.options.alpha}
        letters = share_letters(len(best_first), apart)
        group.ranking[metric.name] = [
            Ranked(label, mean, letters[i]) for i, (label, mean) in enumerate(best_first.items())
        ]


def comparable(match: Match) -> bool:
    """Whether nothing keeps two arms from being ranked: rule 1 of the verdicts."""
    if match.obstacle():
        return False
    return not match.metric.is_time or min(w.sessions for w in match.worth()) >= FEWEST_EFFECTIVE


def welch_anova(arms: Sequence[Floats], is_time: bool) -> Omnibus | None:
    """Welch's ANOVA, for times with effective sessions; None where an arm has no spread or too few."""
    if any(x.size < FEWEST or not has_spread(x) for x in arms):
        return None
    variances, n = zip(*(variance_and_worth(x, is_time) for x in arms), strict=True)
    if is_time and min(n) < FEWEST_EFFECTIVE:
        return None
    result: Any = anova_generic(
        np.array([x.mean() for x in arms]), np.array(variances), np.array(n), use_var="unequal"
    )
    return Omnibus(float(result.statistic), float(result.df[0]), float(result.df[1]), float(result.pvalue))


def share_letters(n: int, apart: set[tuple[int, int]]) -> list[str]:
    """Letters for n ranked arms: two arms share one exactly when they are not told apart.

    Insert and absorb (Piepho 2004): begin with one column of all arms, split it at every pair told apart, and
    drop columns that others hold.
    """
    columns = [frozenset(range(n))]
    for i, j in sorted(apart):
        split = [part for c in columns for part in ((c - {i}, c - {j}) if {i, j} <= c else (c,))]
        unique = list(dict.fromkeys(split))
        columns = [c for c in unique if not any(c < other for other in unique)]
    letters = [""] * n
    for number, column in enumerate(sorted(columns, key=sorted)):
        for k in column:
            letters[k] += chr(ord("a") + number) if number < 26 else f"({number + 1})"
    return letters
