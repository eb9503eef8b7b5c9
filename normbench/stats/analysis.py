"""A whole command: arms by group, comparisons against the baseline as one family, verdicts, ranking."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.oneway import anova_generic

from normbench.stats.arms import Arm, pairing
from normbench.stats.comparison import Comparison, Options, compare
from normbench.stats.inputs import ENDED, Sessions, labels_of
from normbench.stats.metrics import Metric
from normbench.stats.primary import choose_test, flat
from normbench.stats.series import Floats, effective_n, spread_of
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
        return [self.baseline, *sorted((label for label in self.arms if label != self.baseline), key=natural)]


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
    family = max(1, len(pairs) * len(metrics))
    comparisons = []
    for group, b, t, control in pairs:
        for metric in metrics:
            made = compare(group.arms[b], group.arms[t], metric, options, family, control)
            made.group = group.name
            comparisons.append(made)
    correct(comparisons)
    analysis = Analysis(sessions, metrics, options, groups, comparisons)
    judge(analysis)
    for group in groups:
        if len(group.arms) > 2:
            for metric in metrics:
                rank(group, metric, options)
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
    positions = rows.groupby(rows["key"].astype(str), sort=False, observed=True).indices
    most = max(len(at) for at in positions.values())
    arms = {}
    for key, at in positions.items():
        expected = sessions.expected.get(str(key), most)
        label, order = labels[str(key)], np.asarray(place[at], np.intp)
        images = sessions.images.get(str(key), {})
        arms[label] = Arm(label, str(key), rows.iloc[at], order, places, expected, images)
    return arms


def natural(label: str) -> list[tuple[bool, int, str]]:
    """A key that puts stride2 before stride10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", label)]


def choose_baseline(labels: Sequence[str], wanted: str | None) -> str:
    """The arm asked for, else batch norm where there is one, else the first of the inputs."""
    norms = {label: label.split("-")[0].lower() for label in labels}
    if wanted is None:
        usual = [label for norm in ("obn", "torch_bn", "bn") for label in labels if norms[label] == norm]
        return (usual or list(labels))[0]
    found = [n for n in labels if n == wanted] or [n for n in labels if norms[n] == wanted.lower()]
    if len(found) != 1:
        problem = "several arms match" if found else "no such arm"
        hint = "" if found else nearest(wanted, labels)
        raise Refused(f"baseline {wanted!r}: {problem}{hint}; there are {', '.join(labels)}")
    return found[0]


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
    """Holm's correction: over all tests of a difference, and over all tests of a margin."""
    for plain, corrected in (("p", "p_holm"), ("tost_p", "tost_p_holm")):
        tested = [c for c in comparisons if not math.isnan(getattr(c, plain))]
        if tested:
            adjusted = multipletests([getattr(c, plain) for c in tested], method="holm")[1]
            for c, p in zip(tested, adjusted, strict=True):
                setattr(c, corrected, float(p))


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


def rank(group: Group, metric: Metric, options: Options) -> None:
    """The omnibus test and the ranking of one metric, over arms with enough sessions."""
    if metric.is_until:
        return
    values = {label: x for label, arm in group.arms.items() if (x := arm.values(metric.name)).size >= FEWEST}
    if len(values) < 3:
        return
    omnibus = welch_anova(list(values.values()), metric.is_time)
    if omnibus:
        group.omnibus[metric.name] = omnibus
    order = sorted(values, key=lambda label: -metric.better * float(values[label].mean()))
    told_apart = differing_pairs([group.arms[label] for label in order], metric, options)
    letters = share_letters(len(order), told_apart)
    group.ranking[metric.name] = [
        Ranked(label, float(values[label].mean()), letters[i]) for i, label in enumerate(order)
    ]


def welch_anova(arms: Sequence[Floats], is_time: bool) -> Omnibus | None:
    """Welch's ANOVA, for times with effective sessions; None where an arm has no spread or too few."""
    if any(flat(x) for x in arms):
        return None
    n = [float(effective_n(x)) if is_time else float(x.size) for x in arms]
    if is_time and min(n) < FEWEST_EFFECTIVE:
        return None
    variances = [
        float(spread_of(x, np.asarray(m))) if is_time else float(x.var(ddof=1))
        for x, m in zip(arms, n, strict=True)
    ]
    result: Any = anova_generic(
        np.array([x.mean() for x in arms]), np.array(variances), np.array(n), use_var="unequal"
    )
    return Omnibus(float(result.statistic), float(result.df[0]), float(result.df[1]), float(result.pvalue))


def differing_pairs(arms: Sequence[Arm], metric: Metric, options: Options) -> set[tuple[int, int]]:
    """Which pairs of arms differ, by the comparisons' own test and Holm's correction over all pairs."""
    pairs, ps = [], []
    for i, one in enumerate(arms):
        for j in range(i + 1, len(arms)):
            is_paired, _ = pairing(one, arms[j], metric)
            x, y = one.by_place(metric.name), arms[j].by_place(metric.name)
            both = ~np.isnan(x) & ~np.isnan(y)
            x, y = (x[both], y[both]) if is_paired else (one.values(metric.name), arms[j].values(metric.name))
            if flat(y - x) if is_paired else flat(x) and flat(y):
                continue
            test, _ = choose_test(is_paired, metric.is_time)
            pairs.append((i, j))
            ps.append(float(test(x, y).p))
    if not ps:
        return set()
    rejected = multipletests(ps, alpha=options.alpha, method="holm")[0]
    return {pair for pair, reject in zip(pairs, rejected, strict=True) if reject}


def share_letters(n: int, told_apart: set[tuple[int, int]]) -> list[str]:
    """Letters along a ranking: one for each longest run of arms of which no two are told apart."""
    runs: list[tuple[int, int]] = []
    for start in range(n):
        end = start
        while end + 1 < n and not any((k, end + 1) in told_apart for k in range(start, end + 1)):
            end += 1
        if not runs or end > runs[-1][1]:
            runs.append((start, end))
    letters = [""] * n
    for i, (start, end) in enumerate(runs):
        for k in range(start, end + 1):
            letters[k] += chr(ord("a") + i) if i < 26 else f"({i + 1})"
    return letters


def ended(rows: pd.DataFrame) -> int:
    """Sessions with a result."""
    return int(rows["status"].isin(ENDED).sum()) if "status" in rows else len(rows)
