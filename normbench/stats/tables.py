"""An analysis as text: for a terminal, a pipe, Markdown, LaTeX, and as data."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from normbench.plan import write_whole
from normbench.results import finite
from normbench.stats.analysis import Analysis, Group
from normbench.stats.comparison import Comparison, binomial_se, images_of, sd
from normbench.stats.metrics import Metric
from normbench.stats.verdicts import DIFFERENT, EQUIVALENT, INCONCLUSIVE, NOT_COMPARABLE, shown_p

NAMED_AT_MOST = 8
COLORS = {DIFFERENT: "bold magenta", EQUIVALENT: "bold green", INCONCLUSIVE: "yellow"}
COLUMNS = tuple(f.name for f in fields(Comparison) if not f.metadata.get("inside"))


@dataclass(frozen=True)
class Page:
    """One table for reading: a title, a header, rows of texts, lines below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: Sequence[str]
    verdicts: Sequence[str]


def opening(analysis: Analysis, where: str) -> list[str]:
    """What was found against what was expected, who diverged or failed, and how alpha is shared."""
    sessions, rows = analysis.sessions, analysis.sessions.rows
    counts = rows["status"].value_counts() if "status" in rows else {"ok": len(rows)}
    states = ", ".join(f"{n:,} {status}" for status, n in counts.items() if n)
    plan = (
        ""
        if sessions.expected
        else " (no plan beside them; as many expected of every arm as the largest has)"
    )
    lines = [f"{where}: {len(rows):,} of {sessions.planned:,} sessions: {states}{plan}"]
    if sessions.missing:
        lines.append(f"missing: {some(sessions.missing)}")
    if "status" in rows and (rows["status"] != "ok").any():
        for status in ("diverged", "failed", "interrupted"):
            if names := names_of(analysis, status):
                lines.append(f"{status}: {some(names)}")
    if not any(arm.ended.any() for group in analysis.groups for arm in group.arms.values()):
        lines.append("no session has ended")
    baselines = ", ".join(dict.fromkeys(group.baseline for group in analysis.groups))
    shared = f"shared by {analysis.family} tests (Holm)" if analysis.family > 1 else "for one test"
    lines.append(f"baseline {baselines}; alpha {analysis.options.alpha:g} {shared}")
    for c in analysis.distrusted:
        place = ", ".join(f"{k}={v}" for k, v in c.group.items()) or "here"
        pair = f"{c.baseline} and {c.treatment}"
        lines.append(f"DISTRUST every verdict {place}: {pair} are one op, and {c.metric} differs")
    return lines


def names_of(analysis: Analysis, status: str) -> list[str]:
    """The sessions with this status, by arm and number, with their errors."""
    names = []
    for group in analysis.groups:
        for label, arm in group.arms.items():
            if "status" not in arm.rows:
                continue
            rows = arm.rows[arm.rows["status"] == status]
            errors = rows["error"] if "error" in rows else [None] * len(rows)
            numbers = rows["session"] if "session" in rows else range(len(rows))
            for number, error in zip(numbers, errors, strict=True):
                names.append(f"{label} s{number:g}" + (f" ({error})" if isinstance(error, str) else ""))
    return names


def some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - NAMED_AT_MOST:,} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


def pages(analysis: Analysis) -> list[Page]:
    """One page per group and metric, the A/A control's row first."""
    return [page(analysis, group, metric) for group in analysis.groups for metric in analysis.metrics]


def page(analysis: Analysis, group: Group, metric: Metric) -> Page:
    """The arms of one group in one metric."""
    rows = analysis.of(group, metric)
    own = baseline_of(analysis, group, metric, rows)
    floor = not math.isnan(own[-1]) or any(not math.isnan(c.binomial_se_treatment) for c in rows)
    level = f"{100 * (1 - analysis.options.alpha):g} % interval"
    header = ["arm", "n", "mean", "sd", *(["test-set se"] if floor else []), "diff", level, "p (Holm)"]
    texts = [[*own_numbers(group.baseline, own, metric, floor), "", "", "", ""]]
    after = decimals(rows, metric)
    for c in rows:
        against = "" if c.baseline == group.baseline else f" against {c.baseline}"
        name = f"{c.treatment}{against}" + (" (A/A control)" if c.control else "")
        own = (c.n_treatment, c.mean_treatment, c.sd_treatment, c.binomial_se_treatment)
        p = "" if math.isnan(c.p_holm) else f"{c.p_holm:.2g}"
        numbers = own_numbers(name, own, metric, floor)
        texts.append([*numbers, signed(c.diff, after), between(c, after), p, c.verdict])
    below = [f"{c.treatment}: {c.verdict}: {c.reason}" for c in rows]
    if ranking := group.ranking.get(metric.name):
        places = ", ".join(f"{r.label} ({r.letters})" for r in ranking)
        below.append(f"best first: {places}; arms that share a letter are not told apart")
    if omnibus := group.omnibus.get(metric.name):
        statistic = f"F({omnibus.df_between:.0f}, {omnibus.df_within:.1f}) = {omnibus.f:.3g}"
        below.append(f"any difference among all arms (Welch's ANOVA): {statistic}, p {shown_p(omnibus.p)}")
    title = " ".join(filter(None, [group.title, metric.name, "against", group.baseline]))
    return Page(title, [*header, "verdict"], texts, below, ["", *(c.verdict for c in rows)])


Own = tuple[int, float, float, float]


def baseline_of(analysis: Analysis, group: Group, metric: Metric, rows: Sequence[Comparison]) -> Own:
    """The baseline's n, mean, sd and floor; they stand in each of its comparisons."""
    for c in rows:
        if c.baseline == group.baseline:
            return c.n_baseline, c.mean_baseline, c.sd_baseline, c.binomial_se_baseline
    arm = group.arms[group.baseline]
    x = arm.values(metric.name)
    mean = float(x.mean()) if x.size else math.nan
    images = images_of(arm, metric, analysis.options) if metric.is_accuracy else None
    return x.size, mean, sd(x), binomial_se(mean, images)


def own_numbers(name: str, own: Own, metric: Metric, floor: bool) -> list[str]:
    """What an arm's row says of the arm alone."""
    n, mean, spread, se = own
    numbers = [number(mean, metric), number(spread, metric), *([number(se, metric)] if floor else [])]
    return [name, f"{n:,}", *numbers]


def is_fraction(metric: Metric) -> bool:
    """Accuracies and F1 are read with four decimals."""
    return metric.name.endswith(("_acc", "_f1"))


def number(value: float, metric: Metric) -> str:
    """A value for reading; empty where there is none."""
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if is_fraction(metric) else f"{value:.4g}"


def decimals(rows: Sequence[Comparison], metric: Metric) -> int:
    """As many as show two figures of the narrowest interval's half width; of fractions at least four."""
    least = 4 if is_fraction(metric) else 0
    halves = [
        (c.ci_high - c.ci_low) / 2 for c in rows if c.ci_high > c.ci_low and c.verdict != NOT_COMPARABLE
    ]
    sizes = halves or [abs(c.diff) for c in rows if c.diff]
    finite = [size for size in sizes if math.isfinite(size)]
    return max([least, *(1 - math.floor(math.log10(size)) for size in finite)])


def signed(value: float, places: int) -> str:
    """A difference for reading."""
    return "" if math.isnan(value) else f"{value:+.{places}f}"


def between(c: Comparison, places: int) -> str:
    """An interval for reading; none of arms that are not comparable."""
    if math.isnan(c.ci_low) or c.verdict == NOT_COMPARABLE:
        return ""
    return f"{signed(c.ci_low, places)} to {signed(c.ci_high, places)}"


def text(analysis: Analysis, where: str, console: Console) -> str:
    """All tables as this console shows them: framed and coloured on a terminal, plain in a pipe."""
    terminal = console.is_terminal
    with console.capture() as captured:
        for line in opening(analysis, where):
            style = "bold red" if terminal and line.startswith("DISTRUST") else None
            console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
        for p in pages(analysis):
            console.print()
            console.print(framed(p) if terminal else plain(p))
            for line in p.below:
                console.print(f"  {line}", highlight=False, markup=False, soft_wrap=not terminal)
    shown = captured.get()
    return shown if terminal else "\n".join(line.rstrip() for line in shown.splitlines()) + "\n"


def framed(p: Page) -> RichTable:
    """A page for a terminal: the verdict in its colour, long intervals on two lines where it is narrow."""
    table = RichTable(
        title=Text(p.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, header_style=""
    )
    table.padding, table.pad_edge, table.collapse_padding = (0, 1), False, True
    whole = {"n", "mean", "sd", "diff", "verdict"} | (
        {"arm"} if max(len(r[0]) for r in p.rows) <= 20 else set()
    )
    for column in p.header:
        table.add_column(column, justify=side(column), overflow="fold", no_wrap=column in whole)
    for row, verdict in zip(p.rows, p.verdicts, strict=True):
        table.add_row(*map(escape, row[:-1]), Text(row[-1], style=COLORS.get(verdict, "")))
    return table


def plain(p: Page) -> RichTable:
    """A page for a pipe: columns aligned by spaces."""
    table = RichTable(
        title=Text(p.title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in p.header:
        table.add_column(column, justify=side(column), no_wrap=True)
    for row in p.rows:
        table.add_row(*map(escape, row))
    return table


def side(column: str) -> Literal["left", "right"]:
    """Words to the left, numbers to the right."""
    return "left" if column in ("arm", "verdict") else "right"


def plain_console(width: int = 400) -> Console:
    """A console for pipes and files: nothing is cut or wrapped."""
    return Console(width=width, force_terminal=False, no_color=True)


def markdown(analysis: Analysis, where: str) -> str:
    """The tables for a README."""
    parts = ["\n".join(opening(analysis, where))]
    for p in pages(analysis):
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in [p.header, *p.rows]]
        lines.insert(
            1, "|" + "|".join("---" if c in ("arm", "verdict", "ranks") else "---:" for c in p.header) + "|"
        )
        parts.append("\n".join([f"**{p.title}**", "", *lines, "", *(f"- {line}" for line in p.below)]))
    return "\n\n".join(parts) + "\n"


LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "–": "--", "<": r"$<$", ">": r"$>$", "≥": r"$\ge$"},
}


def tex(text: str) -> str:
    """A text with LaTeX's own signs escaped."""
    return "".join(LATEX.get(c, c) for c in text)


def latex(analysis: Analysis, where: str) -> str:
    """The tables for a paper, one `tabular` each, with booktabs' rules."""
    parts = ["\n".join(f"% {line}" for line in opening(analysis, where))]
    for p in pages(analysis):
        spec = "".join(side(c)[0] for c in p.header)
        body = [" & ".join(map(tex, row)) + r" \\" for row in p.rows]
        notes = [f"% {line}" for line in p.below]
        parts.append("\n".join([rf"\begin{{tabular}}{{{spec}}} % {p.title}", r"\toprule",
                                " & ".join(map(tex, p.header)) + r" \\", r"\midrule", *body, r"\bottomrule",
                                r"\end{tabular}", *notes]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def csv_text(analysis: Analysis) -> str:
    """comparisons.csv; the `--by` columns come first."""
    by = list(analysis.groups[0].name) if analysis.groups else []
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*by, *COLUMNS])
    for c in analysis.comparisons:
        writer.writerow([*(c.group[b] for b in by), *(cell(getattr(c, column)) for column in COLUMNS)])
    return file.getvalue()


def cell(value: Any) -> Any:
    """Nothing for what is not a number."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def json_text(analysis: Analysis, where: str) -> str:
    """Everything as data; null for what is not a number."""
    rows = analysis.sessions.rows
    body = {
        "inputs": where,
        "sessions_found": len(rows),
        "sessions_expected": analysis.sessions.planned,
        "missing": analysis.sessions.missing,
        "not_ok": {status: names_of(analysis, status) for status in ("diverged", "failed", "interrupted")},
        "alpha": analysis.options.alpha,
        "tests": analysis.family,
        "control_differs": [[c.baseline, c.treatment, c.metric] for c in analysis.distrusted],
        "groups": [
            {
                "by": dict(group.name),
                "baseline": group.baseline,
                "arms": list(group.arms),
                "omnibus": {name: vars(test) for name, test in group.omnibus.items()},
                "ranking": {name: [vars(r) for r in ranked] for name, ranked in group.ranking.items()},
            }
            for group in analysis.groups
        ],
        "comparisons": [
            {**c.group, **{column: getattr(c, column) for column in COLUMNS}} for c in analysis.comparisons
        ],
    }
    return json.dumps(finite(body), indent=1, ensure_ascii=False)


def write(analysis: Analysis, folder: Path) -> Path:
    """Write comparisons.csv; returns its path."""
    path = folder / "comparisons.csv"
    write_whole(path, csv_text(analysis))
    return path
