"""The sentence that a report opens with: every arm under its verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normbench.stats.analysis import Analysis, Group
from normbench.stats.comparison import Comparison
from normbench.stats.metrics import Metric
from normbench.stats.tables import some
from normbench.stats.verdicts import DIFFERENT, EQUIVALENT, INCONCLUSIVE, NOT_COMPARABLE

ORDER = (DIFFERENT, EQUIVALENT, INCONCLUSIVE, NOT_COMPARABLE)
MOST_ARMS = 12
SPELT_OUT = 6  # groups × metrics; of more only the numbers of arms are said
WORDS = {"test_acc": "test accuracy", "epoch_time_s": "time per epoch", "total_time_s": "time per session",
         "test_loss": "test loss", "peak_memory_mib": "peak memory"}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """One verdict and the arms that have it, in words."""

    verdict: str
    within: str
    arms: Sequence[str]


@dataclass(frozen=True)
class Clause:
    """What is said of one metric of one group: `In test accuracy against obn`, verdict by verdict."""

    opening: str
    said: Sequence[Said]

    def __str__(self) -> str:
        return f"{self.opening} " + ", ".join(
            f"{s.verdict}{s.within}: {', '.join(s.arms)}" for s in self.said
        )


@dataclass(frozen=True)
class Finding:
    """The finding: a warning that comes first where an A/A control differs, then the clauses."""

    warning: str
    clauses: Sequence[Clause]

    def __str__(self) -> str:
        text = "; ".join(map(str, self.clauses))
        text = text[:1].upper() + text[1:]
        return f"{self.warning} {text}.".strip() if text else "No arm is compared with another."


def finding_of(analysis: Analysis) -> Finding:
    """The finding of an analysis, verdicts as `stats` gave them."""
    tables = [(g, m, rows) for g in analysis.groups for m in analysis.metrics if (rows := analysis.of(g, m))]
    brief = len(tables) > SPELT_OUT
    clauses = [clause(group, metric, rows, brief) for group, metric, rows in tables]
    differ = [f"{c.baseline} and {c.treatment} in {c.metric}" for c in analysis.distrusted]
    warning = f"Trust no verdict here: one op under two names differs ({some(differ)})." if differ else ""
    return Finding(warning, clauses)


def clause(group: Group, metric: Metric, rows: Sequence[Comparison], brief: bool) -> Clause:
    """One table as part of a sentence."""
    where = f"{group.title}: " if group.title else ""
    what = WORDS.get(metric.name, metric.name)
    said = []
    for verdict in ORDER:
        if alike := [c for c in rows if c.verdict == verdict]:
            names = [spoken(c, group, metric) for c in alike]
            more = [f"and {len(names) - MOST_ARMS} more"] if len(names) > MOST_ARMS else []
            counted = [f"{len(alike)} of {len(rows)} arms"]
            said.append(
                Said(verdict, within(alike) or why(alike), counted if brief else [*names[:MOST_ARMS], *more])
            )
    lost = diverged(group, group.baseline, metric)
    return Clause(f"{where}{what} against {group.baseline}{f' ({lost})' if lost else ''}:", said)


def within(alike: Sequence[Comparison]) -> str:
    """`within ±0.005` where that is what makes them equivalent."""
    margins = sorted({c.margin for c in alike if c.verdict == EQUIVALENT and not c.identical})
    return f" within ±{' and ±'.join(f'{m:.3g}' for m in margins)}" if margins else ""


def why(alike: Sequence[Comparison]) -> str:
    """` (too few sessions)` where that is what keeps all of them from being compared."""
    obstacles = {c.obstacle.partition(":")[0] for c in alike if c.verdict == NOT_COMPARABLE}
    return f" ({obstacles.pop()})" if len(obstacles) == 1 and all(obstacles) else ""


def diverged(group: Group, arm: str, metric: Metric) -> str:
    """`3 of 10 diverged`: what accuracies and losses are worth then; nothing where none did."""
    rows = group.arms[arm].rows
    lost = int((rows["status"] == "diverged").sum()) if "status" in rows else 0
    return f"{lost} of {len(rows)} diverged" if lost and not metric.is_time else ""


def spoken(c: Comparison, group: Group, metric: Metric) -> str:
    """`gn (+0.012)`, `mbn (identical)`, `nn (3 of 10 diverged)`, `nn` where nothing is worth saying."""
    name = c.treatment if c.baseline == group.baseline else f"{c.treatment} against {c.baseline}"
    details = [difference(c, metric), diverged(group, c.treatment, metric)]
    return f"{name} ({', '.join(filter(None, details))})" if any(details) else name


def difference(c: Comparison, metric: Metric) -> str:
    """`+0.012`, `−0.3 s`, `identical`; nothing where no difference was found."""
    if c.identical:
        return "identical"
    if c.verdict != DIFFERENT or not math.isfinite(c.diff):
        return ""
    unit = " s" if metric.name.endswith("_s") else " MiB" if metric.name.endswith("_mib") else ""
    return f"{c.diff:+.2g}".replace("-", "−") + unit
