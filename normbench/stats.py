"""The door `python -m normbench.stats`: each arm of a study against a baseline.

    python -m normbench.stats outputs/adhoc --baseline obn

For every metric and arm: n, mean and standard deviation, the difference from the baseline and its 95 % Welch
interval. Sessions found against sessions planned are always said; failed and diverged ones are counted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy import stats as scipy_stats

from normbench.doors import one_line_errors
from normbench.identity import short_names
from normbench.plan import Plan
from normbench.results import rebuild, session_folders
from normbench.values import Refused, nearest

METRICS = ("test_acc", "epoch_time_s")


@dataclass(frozen=True)
class Comparison:
    """One arm's metric beside the baseline's; `diff` and its interval are None for the baseline itself."""

    metric: str
    arm: str
    n: int
    mean: float
    sd: float
    diff: float | None
    ci_low: float | None
    ci_high: float | None


def compare(metric: str, arm: str, values: Sequence[float], baseline: Sequence[float] | None) -> Comparison:
    """Mean, sd (ddof 1) and, against a baseline, the difference with Welch's 95 % interval.

    Without at least two values a side, and with no spread on either side, there is no interval.
    """
    sample = pd.Series(list(values), dtype=float)
    diff = low = high = None
    if baseline is not None:
        other = pd.Series(list(baseline), dtype=float)
        diff = float(sample.mean() - other.mean())
        if min(len(sample), len(other)) > 1 and sample.std() + other.std() > 0:
            interval = scipy_stats.ttest_ind(sample, other, equal_var=False).confidence_interval()
            low, high = float(interval.low), float(interval.high)
    sd = float(sample.std()) if len(sample) > 1 else float("nan")
    return Comparison(metric, arm, len(sample), float(sample.mean()), sd, diff, low, high)


def read(study: Path, everything: bool) -> tuple[pd.DataFrame, int]:
    """The study's rows and how many sessions were planned: of the newest plan, or of all."""
    if not any(session_folders(study)):
        raise Refused(f"no sessions under {study}; give a study's folder like outputs/adhoc")
    rows = pd.read_csv(rebuild(study))
    plan = None if everything else Plan.newest(study)
    if plan is None:
        return rows, len(rows)
    planned = {(plan.arms[s.arm].setting, s.seed, s.session) for s in plan.sessions}
    keys = zip(rows["setting"], rows["seed"], rows["session"], strict=True)
    return rows[[key in planned for key in keys]], len(planned)


def choose_baseline(names: Sequence[str], wanted: str | None) -> str:
    """The arm asked for, else obn where there is one, else the first."""
    if wanted is None:
        return next((n for n in names if n.split("-")[0] in ("obn", "torch_bn", "bn")), names[0])
    found = [n for n in names if n == wanted] or [n for n in names if n.split("-")[0] == wanted]
    if len(found) != 1:
        problem = "several arms match" if found else "no such arm"
        hint = nearest(wanted, names)
        raise Refused(f"baseline {wanted!r}: {problem}{hint}; there are {', '.join(names)}")
    return found[0]


def table_of(comparisons: Sequence[Comparison], baseline: str) -> Table:
    """The comparisons of one metric for reading."""
    table = Table(title=f"{comparisons[0].metric} against {baseline}", title_justify="left")
    for column in ("arm", "n", "mean", "sd", "difference", "95 % interval (Welch)"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for c in comparisons:
        between = "" if c.ci_low is None else f"{c.ci_low:+.4f} to {c.ci_high:+.4f}"
        table.add_row(c.arm, str(c.n), f"{c.mean:.4f}", "" if c.n < 2 else f"{c.sd:.4f}",
                      "" if c.diff is None else f"{c.diff:+.4f}", between)  # fmt: skip
    return table


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="normbench stats", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "study", type=Path, nargs="?", default=Path("outputs/adhoc"),
        help="a study's folder (default: outputs/adhoc)",
    )  # fmt: skip
    parser.add_argument("--baseline", help="the arm to compare with (default: obn where there is one)")
    parser.add_argument(
        "--metric", action="append", help=f"a column of results.csv (default: {', '.join(METRICS)})"
    )
    parser.add_argument("--all", action="store_true", help="every row, not only the newest plan's")
    with one_line_errors("stats"):
        report(parser.parse_args())


def report(arguments: argparse.Namespace) -> None:
    """Print one table per metric."""
    rows, planned = read(arguments.study, arguments.all)
    if rows.empty:
        raise Refused(f"0 of {planned} sessions under {arguments.study} have ended; train first")
    metrics = arguments.metric or METRICS
    for metric in metrics:
        if metric not in rows or not pd.api.types.is_numeric_dtype(rows[metric]):
            raise Refused(f"metric {metric!r}: no such column of numbers{nearest(metric, rows.columns)}")
    counts = ", ".join(f"{n} {status}" for status, n in rows["status"].value_counts().items())
    print(f"{arguments.study}: {len(rows)} of {planned} sessions: {counts}")
    labels = short_names(dict(zip(rows["setting"], rows["arm"], strict=True)))
    named = rows.assign(label=rows["setting"].map(labels))
    names = sorted(labels.values())
    baseline = choose_baseline(names, arguments.baseline)
    names = [baseline, *(n for n in names if n != baseline)]
    console = Console()
    for metric in metrics:
        values = {name: named[named["label"] == name][metric].dropna().tolist() for name in names}
        others = {name: None if name == baseline else values[baseline] for name in names}
        comparisons = [compare(metric, name, values[name], others[name]) for name in names]
        console.print(table_of(comparisons, baseline))


if __name__ == "__main__":
    main()
