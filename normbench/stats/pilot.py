"""How many sessions a study needs, by the spread that a pilot of it showed."""

import math
from collections.abc import Iterator, Mapping, Sequence

from normbench.stats.analysis import analyse
from normbench.stats.comparison import Options, sd
from normbench.stats.inputs import choose_metrics, read
from normbench.stats.metrics import Metric
from normbench.stats.planning import Question, upper_sd
from normbench.values import Refused

CONFIDENCE = 0.8


def sessions_needed(
    pilot: str,
    options: Options,
    differences: Mapping[str, float],
    baseline: str | None,
    by: Sequence[str],
    comparisons: int | None,
    everything: bool,
) -> Iterator[str]:
    """A line per arm and metric: the sd that the pilot showed, and the sessions it asks for.

    A pilot knows the sd but roughly, so a second count takes the sd's upper limit at 80 % confidence.
    """
    names = list(dict.fromkeys([*differences, *options.margins]))
    metrics = [Metric.of(name) for name in names]
    sessions = read([pilot], metrics, by, everything)
    metrics = choose_metrics(sessions, metrics)
    analysis = analyse(sessions, metrics, options, baseline, by)
    tests = comparisons or max(1, len(analysis.comparisons))
    for group in analysis.groups:
        for metric in metrics:
            for c in analysis.of(group, metric):
                if c.identical:
                    yield f"{metric.name}, {c.treatment} against {c.baseline}: {c.reason}; nothing to plan"
                    continue
                if c.estimate is None or not c.estimate.se > 0:
                    raise Refused(
                        f"{pilot}: {c.treatment}'s {metric.name} shows no sd ({c.reason}); add sessions"
                    )
                n = c.pairs or min(c.n_baseline, c.n_treatment)
                spread = float(c.estimate.se) * math.sqrt(n if c.pairs else n / 2)
                of = "paired differences" if c.pairs else "sessions"
                who = f"{metric.name}, {c.treatment} against {c.baseline}"
                margin = (
                    options.margins[metric.name].beside(c.mean_baseline)
                    if metric.name in options.margins
                    else None
                )
                yield from lines(
                    who, of, spread, n, bool(c.pairs), options, differences.get(metric.name), margin, tests
                )
            if len(group.arms) == 1:
                x = group.arms[group.baseline].values(metric.name)
                if not sd(x) > 0:
                    raise Refused(f"{pilot}: {x.size} sessions show no sd of {metric.name}; add sessions")
                margin = (
                    options.margins[metric.name].beside(float(x.mean()))
                    if metric.name in options.margins
                    else None
                )
                who = f"{metric.name}, {group.baseline}"
                yield from lines(
                    who,
                    "sessions",
                    sd(x),
                    x.size,
                    False,
                    options,
                    differences.get(metric.name),
                    margin,
                    tests,
                )


def lines(
    who: str,
    of: str,
    spread: float,
    n: int,
    is_paired: bool,
    options: Options,
    difference: float | None,
    margin: float | None,
    tests: int,
) -> Iterator[str]:
    """What one spread asks for, as it is and at its upper limit."""
    high = upper_sd(spread, n, CONFIDENCE)
    yield f"{who}: sd {spread:.3g} of {n} {of}; below {high:.3g} with {CONFIDENCE:.0%} confidence"
    for at in (spread, high):
        question = Question(
            at, options.alpha, options.power, difference, margin, comparisons=tests, paired_sd=is_paired
        )
        yield from (f"  {line}" for line in question.describe())
