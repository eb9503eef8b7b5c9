"""How the numbers of a report were made, in words; what stands between backticks is shown as code."""

from normbench.report.finding import WORDS
from normbench.stats.analysis import Analysis
from normbench.stats.verdicts import NOT_COMPARABLE

Terms = list[tuple[str, str]]

GENERAL: Terms = [
    (
        "Pairing",
        "Sessions with one seed and session number start from equal weights in every layer they share and "
        "see equal batches and augmentation in one order, whatever the norm.",
    ),
    (
        "Order",
        "Arms of a session run next to each other, in an order shuffled by seed, so that a drift of the "
        "machine hits all alike; `launch_order` is a session's place.",
    ),
    (
        "The clock",
        "`epoch_time_s` is the median over a session's epochs of the training steps alone, the device "
        "synchronized on both sides; evaluation, logging, checkpoints and warm-up stay outside.",
    ),
    (
        "Accuracy",
        "`test_acc` is that of the last evaluation, or with `select=best_val` of the one best on held-out "
        "training data. The best on the test set is never the headline.",
    ),
    (
        "What ran",
        "Operators are those that the dispatcher saw in one training step of a session. An option is "
        "without effect where its default gives equal bits by equal operators; a parameter never "
        "moved where its bits are those of the start.",
    ),
    (
        "Learning curves",
        "From every session's `epochs.csv`, those that still run too: of each epoch the median, the 20 % and "
        "80 % quantile, the smallest and the largest of the sessions that have it.",
    ),
]
FILES = "`comparisons.csv` has every column, `results.csv` a row per session."
LAYERS = "medians of interleaved rounds, with the 20 % and 80 % quantile; it has every round's times."
TRACES = (
    "The values that the layers themselves used, written to `traces/*.csv` while a session trained; of every "
    "session that has them. A look, not evidence."
)
VERDICTS = (
    "The first that holds: not comparable (too few sessions, other data; for times other hardware or "
    "versions); different (the corrected p is below alpha); equivalent (identical in all sessions, or"
    " both one-sided tests against the margin are below alpha); inconclusive (all else, with the "
    "sessions that would settle it)."
)


def of_comparison(analysis: Analysis) -> Terms:
    """The choices of this comparison: tests, margins, error rate."""
    options, terms = analysis.options, []
    for metric in analysis.metrics:
        rows = [c for c in analysis.comparisons if c.metric == metric.name]
        tests = list(dict.fromkeys(c.test for c in rows if c.test and c.verdict != NOT_COMPARABLE))
        margins = sorted({c.margin for c in rows if metric.name in options.margins})
        said = f"Decided by: {', '.join(tests)}. " if tests else "No test decides. "
        if margins:
            said += f"Margin: ±{' and ±'.join(f'{m:.3g}' for m in margins)}."
        else:
            said += "No margin was given, so only identical arms are equivalent."
        terms.append((f"{WORDS.get(metric.name, metric.name)} ({metric.name})", said))
    shared = f"Holm's correction over {analysis.family} tests" if analysis.family > 1 else "one test"
    spent = ""
    if options.looks:
        at = ", ".join(map(str, options.looks.at)) or "none yet"
        spent = f" Looked at after {at} of {options.looks.planned} sessions: alpha is spent over the looks."
    terms.append(
        (
            "Error rate",
            f"alpha {options.alpha:g} for all findings of a kind, by {shared}; intervals are "
            f"{100 * (1 - options.alpha):g} %, each by itself. Power {options.power:g} for what is found. "
            f"Bootstrap: {options.resamples:,} resamples, seed {options.seed}.{spent}",
        )
    )
    return [*terms, ("Verdicts", VERDICTS)]
