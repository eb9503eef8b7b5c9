"""Decided yet? What a sweep asks after every few sessions, so that it launches none for arms already settled.

    decision = decided(Path("outputs/mbn_stride"), Looks.every(5, planned=30, done=10), margins={...})
    decision.open            the settings that need more sessions
    decision.settled         setting → verdict, for those that need none

Every look spends part of alpha (`sequential`), so asking often does not find more than there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from normbench.stats.analysis import analyse
from normbench.stats.comparison import Margin, Options
from normbench.stats.inputs import choose_metrics, read
from normbench.stats.metrics import Metric
from normbench.stats.sequential import Looks
from normbench.stats.verdicts import DIFFERENT, EQUIVALENT


@dataclass(frozen=True)
class Decision:
    """Which treatments need more sessions; the baseline needs them as long as any does."""

    settled: Mapping[str, str]
    open: Sequence[str]

    def __bool__(self) -> bool:
        """Whether everything is decided."""
        return not self.open


def decided(
    study: Path,
    looks: Looks,
    metrics: Sequence[str] = ("test_acc",),
    margins: Mapping[str, Margin] | None = None,
    alpha: float = 0.05,
    baseline: str | None = None,
) -> Decision:
    """The state of a study after the looks so far, the last of them at the sessions there are now.

    A treatment is settled when every metric is "different" or "equivalent"; once settled, its later
    sessions need not be run, and `looks.stopped` says at how many it ended. After the planned sessions
    nothing is open.
    """
    asked = [Metric.of(name) for name in metrics]
    sessions = read([str(study)], asked, (), everything=False)
    options = Options(alpha=alpha, margins=margins or {}, looks=looks, resamples=0)
    analysis = analyse(sessions, choose_metrics(sessions, asked), options, baseline)
    verdicts: dict[str, list[str]] = {}
    for group in analysis.groups:
        for c in analysis.comparisons:
            verdicts.setdefault(group.arms[c.treatment].key.rpartition("/")[2], []).append(c.verdict)
    settled = {
        key: DIFFERENT if DIFFERENT in words else EQUIVALENT
        for key, words in verdicts.items()
        if all(word in (DIFFERENT, EQUIVALENT) for word in words)
    }
    at_the_end = bool(looks.at) and looks.at[-1] == looks.planned
    return Decision(settled, [] if at_the_end else [key for key in verdicts if key not in settled])
