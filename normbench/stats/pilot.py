"""How many sessions a study needs, by the spread that a pilot of it showed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from normbench.stats.analysis import Analysis, analyse
from normbench.stats.comparison import Comparison, Options, sd
from normbench.stats.inputs import choose_metrics, read
from normbench.stats.metrics import Metric
from normbench.stats.planning import Question, upper_sd
from normbench.stats.verdicts import FEWEST_TIMES
from normbench.values import Refused

CONFIDENCE = 0.8


@dataclass(frozen=True)
class Spread:
    """What a pilot's n sessions, or pairs of them, showed of one metric."""

    metric: Metric
    of: str
    sd: float
    n: int
    is_paired: bool
    mean: float

    def lines(
        self, difference: float | None, margin: float | None, options: Options, tests: int
    ) -> Iterator[str]:
        """The sessions needed at this sd, and at its upper limit: a pilot knows the sd but roughly."""
        high = upper_sd(self.sd, self.n, CONFIDENCE)
        kind = "paired differences" if self.is_paired else "sessions"
        limit = f"below {high:.3g} with {CONFIDENCE:.0%} confidence"
        yield f"{self.metric.name}, {self.of}: sd {self.sd:.3g} of {self.n} {kind}; {limit}"
        for at in (self.sd, high):
            question = Question(at, options.alpha, options.power, difference, margin,
                                comparisons=tests, paired_sd=self.is_paired)  # fmt: skip
            yield from (f"  {line}" for line in question.describe())
        if self.metric.is_time:
            yield f"  a time needs at least {FEWEST_TIMES} sessions an arm to be compared at all"


def sessions_needed(
    pilot: str,
    options: Options,
    differences: Mapping[str, float],
    baseline: str | None,
    by: Sequence[str],
    comparisons: int | None,
    everything: bool,
) -> Iterator[str]:
    """What to run for each arm and metric, a few lines each; Refused where the pilot shows no spread."""
    asked = [Metric.of(name) for name in dict.fromkeys([*differences, *options.margins])]
    sessions = read([pilot], asked, by, everything)
    analysis = analyse(sessions, choose_metrics(sessions, asked), options, baseline, by)
    tests = max(1, len(analysis.comparisons)) if comparisons is None else comparisons
    for spread in spreads(analysis, pilot):
        name = spread.metric.name
        margin = options.margins[name].beside(spread.mean) if name in options.margins else None
        yield from spread.lines(differences.get(name), margin, options, tests)


def spreads(analysis: Analysis, pilot: str) -> Iterator[Spread]:
    """The spread behind every comparison, or of a single arm's sessions."""
    for group in analysis.groups:
        for metric in analysis.metrics:
            for c in analysis.of(group, metric):
                if not c.identical:
                    yield spread_of(c, metric, pilot)
            if len(group.arms) == 1:
                x = group.arms[group.baseline].values(metric.name)
                if not sd(x) > 0:
                    raise Refused(f"{pilot}: {x.size} sessions show no sd of {metric.name}; add sessions")
                yield Spread(metric, group.baseline, sd(x), x.size, False, float(x.mean()))


def spread_of(c: Comparison, metric: Metric, pilot: str) -> Spread:
    """The sd that makes the comparison's standard error, as the sessions are worth."""
    of = f"{c.treatment} against {c.baseline}"
    if c.obstacle or c.estimate is None or not c.estimate.se > 0:
        raise Refused(f"{pilot}: {metric.name} of {of} shows no sd: {c.reason}")
    n = c.pairs or min(c.n_baseline, c.n_treatment)
    spread = float(c.estimate.se) * math.sqrt(n if c.pairs else n / 2)
    return Spread(metric, of, spread, n, bool(c.pairs), c.mean_baseline)
