"""Figures of an analysis: every session, the differences with their margin, times in launch order.

Each `…_figure` draws one metric of one group and returns a matplotlib `Figure`, or None where there is
nothing to draw; `draw` saves them all as PNG files. Heights grow with the number of arms. In a narrow figure
the rows' names and words stand above them and not beside them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from normbench.figures import (
    BAND,
    FAINT,
    INK,
    NARROW,
    SOFT,
    WIDTH,
    aside,
    below,
    blank,
    colour_of,
    entitle,
    explain,
    grid,
    head,
    is_narrow,
    quiet,
    safe_stem,
    save_png,
    spoken,
    wrapped,
)
from normbench.stats.analysis import Analysis, Group
from normbench.stats.arms import Arm, Match
from normbench.stats.comparison import Comparison
from normbench.stats.metrics import Metric
from normbench.stats.series import Floats, lag1, variance_and_worth
from normbench.stats.survival import Reached
from normbench.stats.tables import between, decimals, number, signed
from normbench.stats.verdicts import (
    DIFFERENT,
    EQUIVALENT,
    FEWEST,
    FEWEST_EFFECTIVE,
    INCONCLUSIVE,
    NOT_COMPARABLE,
)

MOST_POINTS = 500
MOST_JOINED = 40
FAR = 4.0

DIVERGED = "#d55e00"
LOOKS = {  # colour and marker
    DIFFERENT: ("#d55e00", "D"),
    EQUIVALENT: ("#007a5a", "s"),
    INCONCLUSIVE: ("#666666", "o"),
    NOT_COMPARABLE: ("#666666", "X"),
}


def draw(analysis: Analysis, folder: Path) -> list[Path]:
    """Save every figure there is data for under `folder/figures`; returns their paths."""
    written: list[Path] = []
    for group in analysis.groups:
        for metric in analysis.metrics:
            for kind, make in KINDS.items():
                figure = make(analysis, group, metric, WIDTH)
                if figure is not None:
                    name = file_name(group, metric, kind, {path.name.lower() for path in written})
                    written.append(save_png(figure, folder / "figures" / name))
    return written


def file_name(group: Group, metric: Metric, kind: str, taken: set[str]) -> str:
    """`cifar10-128-test_acc-sessions.png`; numbered where a name that is safe for files is taken."""
    values = [f"{v:g}" if isinstance(v, float) else str(v) for v in group.name.values()]
    return f"{safe_stem((*values, metric.name, kind), {Path(name).stem for name in taken})}.png"


def sessions_figure(analysis: Analysis, group: Group, metric: Metric, width: float = WIDTH) -> Figure | None:
    """Every session as a point, each arm's mean and interval above them; few pairs are joined by lines."""
    arms = arms_of(group)
    sizes = [arm.values(metric.name).size for arm in arms]
    if metric.is_until or not any(sizes):
        return None
    floor = floor_of(analysis, group, metric)
    names = [name_in(width, arm.label) for arm in arms]
    if floor:
        names.append(name_in(width, "test set alone,", "±1 standard error"))
    figure = blank(0.7 + len(names) * row_height(names, width), width)
    axes = figure.subplots()
    heights = np.random.default_rng(0).uniform(-0.12, 0.26, arms[0].places)
    for row, arm in enumerate(arms):
        color = colour_of(row)
        draw_points(axes, arm, metric, row + heights[arm.place], color)
        draw_mean(axes, arm.values(metric.name), metric, analysis.options.alpha, row, color)
    joined = [draw_pairs(axes, *two, metric, row + heights) for row, two in enumerate(pairwise(arms))]
    if floor:
        mean, se = floor
        axes.plot([mean - se, mean + se], [len(arms)] * 2, "|-", color=SOFT, markersize=8, label="floor")
        beside(axes, len(arms), [(f"±{number(se, metric)}", SOFT)])
    as_rows(axes, names)
    axes.set_xlabel(wrapped(with_unit(metric), 80))
    entitle(figure, f"{metric.name} of the sessions", spoken(sizes, "an arm"), group.title)
    worth = f" by effective sessions, if {FEWEST_EFFECTIVE:g} or more" if metric.is_time else ""
    explain(
        figure,
        f"Diamond and bar: mean and its {level_of(analysis)} t interval{worth}.",
        "Lines join sessions with equal random numbers." if any(joined) else "",
        "Lowest bar: how far the choice of test images alone moves an accuracy (binomial)." if floor else "",
        "Crosses: sessions that diverged." if any(diverged(arm, metric).any() for arm in arms) else "",
        thinned(sizes),
    )
    return figure


def differences_figure(
    analysis: Analysis, group: Group, metric: Metric, width: float = WIDTH
) -> Figure | None:
    """A forest plot: every comparison's difference and interval, the margin's band, the verdict's word."""
    rows = analysis.of(group, metric)
    if not any(math.isfinite(c.diff) for c in rows):
        return None
    names = [row_name(c, group, width) for c in rows]
    figure = blank(0.7 + len(names) * row_height(names, width), width)
    axes = figure.subplots()
    axes.axvline(0, color=SOFT, linewidth=0.8, zorder=1)
    low, high = scale_of(rows)
    for row, c in enumerate(rows):
        color, marker = LOOKS.get(c.verdict, LOOKS[INCONCLUSIVE])
        if math.isfinite(c.margin):
            draw_band(axes, c.margin, row)
        if has_interval(c):
            shown = np.clip([c.ci_low, c.ci_high], low, high)
            axes.plot(shown, [row, row], color=color, linewidth=1.8, label="interval")
        inside = color if has_interval(c) else "white"
        if low <= c.diff <= high:
            axes.plot([c.diff], [row], marker, color=color, markerfacecolor=inside, markersize=7,
                      label="difference")  # fmt: skip
        least, most = reach(c)
        if least < low:
            axes.plot([low + 0.02 * (high - low)], [row], "<", color=color, markersize=8, label="beyond")
        if most > high:
            axes.plot([high - 0.02 * (high - low)], [row], ">", color=color, markersize=8, label="beyond")
        beside(axes, row, [(c.verdict, color), (difference_words(c, metric), SOFT)])
    as_rows(axes, names)
    if math.isfinite(low):
        axes.set_xlim(low, high)
    axes.set_xlabel(wrapped(f"difference in {with_unit(metric)}", 80))
    paired = all(c.pairs for c in rows)
    sizes = [n for c in rows for n in ([c.pairs] if paired else [c.n_baseline, c.n_treatment])]
    counts = spoken(sizes, "pairs of sessions" if paired else "sessions an arm")
    entitle(figure, f"{metric.name} against {group.baseline}", counts, group.title)
    margins = sorted(c.margin for c in rows if math.isfinite(c.margin))
    ends = dict.fromkeys(f"±{margin:.3g}" for margin in (*margins[:1], *margins[-1:]))
    explain(
        figure,
        f"Bars: {level_of(analysis)} interval of the difference, each by itself."
        if any(map(has_interval, rows))
        else "",
        f"Band: differences that count as none ({' to '.join(ends)})." if ends else "",
        "Arrows: beyond the scale, as far as the numbers say." if math.isfinite(low) else "",
        "Hollow: no interval." if not all(map(has_interval, rows)) else "",
        f"Verdicts: Holm's correction over {analysis.family} tests." if analysis.family > 1 else "",
    )
    return figure


def order_figure(analysis: Analysis, group: Group, metric: Metric, width: float = WIDTH) -> Figure | None:
    """Times against launch order, a panel per arm; all panels span as many seconds, so drifts compare."""
    arms = arms_of(group)
    sizes = [arm.values(metric.name).size for arm in arms]
    if metric.is_until or not metric.is_time or not any(sizes):
        return None
    figure = blank(0.4 + (1.4 if len(arms) <= 4 else 1.0) * len(arms), width)
    panels = figure.subplots(len(arms), sharex=True, squeeze=False)[:, 0]
    orders, words = launch_orders(arms)
    span = max(float(np.ptp(arm.values(metric.name))) for arm, n in zip(arms, sizes, strict=True) if n)
    for i, (axes, arm, order) in enumerate(zip(panels, arms, orders, strict=True)):
        draw_order(axes, arm, metric, order, colour_of(i), span)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panels[-1].set_xlabel(words)
    aside(figure, with_unit(metric))
    entitle(
        figure, f"{with_unit(metric)} in the order of launch", spoken(sizes, "sessions an arm"), group.title
    )
    explain(
        figure, "Dashed: the arm's mean. All panels have one scale, each centred on its arm.", thinned(sizes)
    )
    return figure


def reached_figure(analysis: Analysis, group: Group, metric: Metric, width: float = WIDTH) -> Figure | None:
    """What fraction of all sessions had reached the target when, a panel per treatment.

    Where training always ends at one time this is 1 − Kaplan–Meier; where ends scatter, Kaplan–Meier's curve
    would jump on the last few sessions, far above the fraction that ever got there.
    """
    if not metric.is_until:
        return None
    arms = {arm.label: reached(arm, metric) for arm in arms_of(group)}
    sizes = [arm.time.size for arm in arms.values()]
    if not any(sizes):
        return None
    baseline = arms[group.baseline]
    shown = list(arms)[1:] or [group.baseline]
    titles = [f"{label}: {counted(arms[label])}" for label in shown]
    figure, panels = grid(titles, width, height=2.4 if len(shown) <= 3 else 1.9, most=3)
    for axes, label in zip(panels, shown, strict=True):
        draw_steps(axes, baseline, colour_of(0), "baseline")
        if label != group.baseline:
            draw_steps(axes, arms[label], colour_of(list(arms).index(label)), "treatment")
    panels[0].set(ylim=(-0.03, 1.03), xlim=(0, None))
    below(panels, "training time (s)" if metric.is_time else "epochs")
    aside(figure, "sessions that reached it (fraction)")
    what = f"{'time' if metric.is_time else 'epochs'} to test accuracy {metric.target:g}"
    entitle(figure, what, spoken(sizes, "sessions an arm"), group.title)
    grey = f"Grey: {group.baseline}, {counted(baseline)}." if len(arms) > 1 else ""
    missed = any(not arm.reached.all() for arm in arms.values())
    explain(figure, grey, "Circles: sessions that ended without it." if missed else "")
    return figure


Draws = Callable[[Analysis, Group, Metric, float], Figure | None]
KINDS: Mapping[str, Draws] = {
    "sessions": sessions_figure,
    "differences": differences_figure,
    "order": order_figure,
    "reached": reached_figure,
}


def arms_of(group: Group) -> list[Arm]:
    """The arms in the tables' order, the baseline first."""
    return [group.arms[label] for label in group.order()]


def interval(x: Floats, metric: Metric, alpha: float) -> tuple[float, float]:
    """The 1 − alpha t interval of a mean, for times by effective sessions; NaN where too few."""
    if x.size < FEWEST:
        return math.nan, math.nan
    variance, n = variance_and_worth(x, metric.is_time)
    if metric.is_time and n < FEWEST_EFFECTIVE:
        return math.nan, math.nan
    half = float(scipy_stats.t.isf(alpha / 2, n - 1)) * math.sqrt(variance / n)
    return float(x.mean()) - half, float(x.mean()) + half


def floor_of(analysis: Analysis, group: Group, metric: Metric) -> tuple[float, float] | None:
    """The baseline's mean, and the standard error that its test set's size alone gives; None if unknown."""
    for c in analysis.of(group, metric):
        if c.baseline == group.baseline and math.isfinite(c.binomial_se_baseline):
            return c.mean_baseline, c.binomial_se_baseline
    return None


def diverged(arm: Arm, metric: Metric) -> NDArray[np.bool_]:
    """Which of the sessions with a value diverged."""
    known = arm.rows[metric.name].notna().to_numpy()
    if "status" not in arm.rows:
        return np.zeros(int(known.sum()), bool)
    return np.asarray((arm.rows["status"] == "diverged").to_numpy(bool)[known])


def evenly(n: int) -> NDArray[np.intp]:
    """At most MOST_POINTS of n positions, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(np.intp)


def launch_orders(arms: Sequence[Arm]) -> tuple[list[Floats], str]:
    """Each arm's x values and their name: `launch_order` where it rises along every arm, else positions."""
    if all("launch_order" in arm.rows for arm in arms):
        orders = [arm.rows["launch_order"].to_numpy(float) for arm in arms]
        if all(np.isfinite(order).all() and (np.diff(order) > 0).all() for order in orders):
            return orders, "launch order"
    return [np.arange(len(arm.rows), dtype=float) for arm in arms], "position within the arm"


def reached(arm: Arm, metric: Metric) -> Reached:
    """When the sessions with a curve reached the target, or were last found without it."""
    time = arm.rows[metric.name].to_numpy(float)
    known = ~np.isnan(time)
    return Reached(time[known], arm.rows[f"{metric.name} reached"].to_numpy(bool)[known])


def has_interval(c: Comparison) -> bool:
    """Whether there is an interval, and one worth showing."""
    return math.isfinite(c.ci_low) and math.isfinite(c.ci_high) and c.verdict != NOT_COMPARABLE


def reach(c: Comparison) -> tuple[float, float]:
    """From where to where a comparison's row reaches."""
    return (min(c.ci_low, c.diff), max(c.ci_high, c.diff)) if has_interval(c) else (c.diff, c.diff)


def scale_of(rows: Sequence[Comparison]) -> tuple[float, float]:
    """The ends of a forest plot's scale where at most half of the rows would squash the others.

    A row is left to an arrow where it reaches FAR times as far from 0 as all that reach less; −∞ to ∞ where
    none does.
    """
    known = sorted((c for c in rows if math.isfinite(c.diff)), key=lambda c: max(map(abs, reach(c))))
    margin = max((c.margin for c in rows if math.isfinite(c.margin)), default=0.0)
    for i in range((len(known) + 1) // 2, len(known)):
        widest = max(margin, *(max(map(abs, reach(c))) for c in known[:i]))
        if max(map(abs, reach(known[i]))) > FAR * widest > 0:
            ends = [end for c in known[:i] for end in reach(c)]
            low, high = min(-margin, *ends), max(margin, *ends)
            return low - 0.08 * (high - low), high + 0.08 * (high - low)
    return -math.inf, math.inf


def draw_points(axes: Axes, arm: Arm, metric: Metric, heights: Floats, color: str) -> None:
    """An arm's sessions; of too many, evenly by rank, so that the extremes stay."""
    column = arm.rows[metric.name].to_numpy(float)
    known = np.flatnonzero(~np.isnan(column))
    x, y, lost = column[known], heights[known], diverged(arm, metric)
    if not x.size:
        return
    kept = np.argsort(x, kind="stable")[evenly(x.size)]
    size = 4.5 if x.size <= 100 else 2.5
    for chosen, marker, paint in ((kept[~lost[kept]], "o", color), (kept[lost[kept]], "x", DIVERGED)):
        if chosen.size:
            axes.plot(x[chosen], y[chosen], marker, color=paint, alpha=0.55, markersize=size,
                      markeredgewidth=0 if marker == "o" else 1.2, label=arm.label)  # fmt: skip


def draw_mean(axes: Axes, x: Floats, metric: Metric, alpha: float, row: int, color: str) -> None:
    """Above an arm's sessions their mean, its interval where there is one, and both in words beside."""
    if not x.size:
        beside(axes, row, [("no value", SOFT)])
        return
    mean, y = float(x.mean()), row - 0.3
    low, high = interval(x, metric, alpha)
    if math.isfinite(low):
        axes.plot([low, high], [y, y], color=color, linewidth=1.8, zorder=4, label="interval")
    axes.plot([mean], [y], "D", color=color, markersize=5, zorder=5, markeredgecolor="white", label="mean")
    missing = "" if math.isfinite(low) else ", no interval"
    beside(axes, row, [(f"mean {number(mean, metric)}, n = {x.size:,}{missing}", SOFT)])


def draw_pairs(axes: Axes, one: Arm, other: Arm, metric: Metric, heights: Floats) -> bool:
    """Join the sessions of two neighbouring arms that share random numbers; whether any were."""
    x, y = one.by_place(metric.name), other.by_place(metric.name)
    both = ~np.isnan(x) & ~np.isnan(y)
    if both.sum() > MOST_JOINED or not Match.of(one, other, metric).is_paired:
        return False
    ends = np.stack([np.stack([x, heights], axis=1), np.stack([y, heights + 1], axis=1)], axis=1)[both]
    axes.add_collection(LineCollection(list(ends), colors=FAINT, linewidths=0.7, zorder=1))
    return True


def draw_band(axes: Axes, margin: float, row: int) -> None:
    """The differences of one row that count as none."""
    axes.add_patch(Rectangle((-margin, row - 0.5), 2 * margin, 1, facecolor=BAND, linewidth=0, zorder=0,
                             antialiased=False, label="margin"))  # fmt: skip


def draw_order(axes: Axes, arm: Arm, metric: Metric, order: Floats, color: str, span: float) -> None:
    """One arm's times in order, around the middle of their range."""
    quiet(axes, "y")
    column = arm.rows[metric.name].to_numpy(float)
    known = ~np.isnan(column)
    x, y = order[known], column[known]
    longest = 48 if is_narrow(axes) else 96
    if not y.size:
        head(axes, wrapped(f"{arm.label}: no value", longest), color=color)
        axes.set_yticks([])
        return
    kept = evenly(y.size)
    axes.axhline(float(y.mean()), color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.plot(x[kept], y[kept], "o-" if y.size <= 100 else "o", color=color, linewidth=0.8,
              markersize=4 if y.size <= 100 else 2, label=arm.label)  # fmt: skip
    r = float(lag1(y))
    words = "no autocorrelation can be told" if math.isnan(r) else f"lag-1 autocorrelation {r:.2f}"
    head(axes, wrapped(f"{arm.label}: {words}", longest), color=color)
    if span > 0:
        middle = float(y.max() + y.min()) / 2
        axes.set_ylim(middle - 0.6 * span, middle + 0.6 * span)


def draw_steps(axes: Axes, arm: Reached, color: str, label: str) -> None:
    """The fraction that had reached the target, and a circle where a session ended without it."""
    if not arm.time.size:
        return
    times, counts = np.unique(arm.time[arm.reached], return_counts=True)
    heights = np.concatenate([[0.0], np.cumsum(counts) / arm.time.size])
    end = float(arm.time.max())
    x, y = [0.0, *times, end], [*heights, heights[-1]]
    axes.step(x, y, where="post", color=color, linewidth=1.6, label=label)
    missed = np.unique(arm.time[~arm.reached])
    if missed.size:
        at = heights[np.searchsorted(times, missed, side="right")]
        axes.plot(
            missed, at, "o", color=color, markerfacecolor="white", markersize=4, label="ended without it"
        )


def row_height(names: Sequence[str], width: float) -> float:
    """Inches for a row of points, or for the longest name; in a narrow figure for both and the words."""
    lines = max(name.count("\n") + 1 for name in names)
    return 0.75 + 0.15 * lines if width < NARROW else max(0.52, 0.08 + 0.15 * lines)


def name_in(width: float, *parts: str) -> str:
    """A row's name: parts below each other, or in one line where that runs above the row."""
    if width < NARROW:
        return wrapped(" ".join(filter(None, parts)), 40)
    return "\n".join(wrapped(part) for part in parts if part)


def as_rows(axes: Axes, names: Sequence[str]) -> None:
    """Named rows from the top down."""
    quiet(axes, "x")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=7)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    if is_narrow(axes):
        axes.set_yticks(range(len(names)), [""] * len(names))
        axes.set_ylim(len(names) - 0.6, -1.0)
        axes.locator_params(axis="x", nbins=5)
        for row, name in enumerate(names):
            above(axes, row, name, INK, line=1)


def beside(axes: Axes, row: int, lines: Sequence[tuple[str, str]]) -> None:
    """Words in their colours to the right of a row, the first of two in bold; where it is narrow, above."""
    if is_narrow(axes):
        above(axes, row, *lines[-1], line=0)
        for text, color in lines[:-1]:
            above(axes, row, text, color, line=1, right=True)
        return
    for i, (text, color) in enumerate(lines):
        up = (len(lines) - 1) / 2 - i
        axes.annotate(text, (1.0, row), (10, 11 * up), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", va="center", fontsize=8.5, color=color,
                      fontweight="bold" if len(lines) > 1 and i == 0 else "normal")  # fmt: skip


def above(axes: Axes, row: int, text: str, color: str, line: int, right: bool = False) -> None:
    """A text above a row, so many lines up: on the left, or on the right in bold."""
    axes.annotate(text, (float(right), row - 0.36), (0, 1 + 12 * line), xycoords=axes.get_yaxis_transform(),
                  textcoords="offset points", va="bottom", ha="right" if right else "left", fontsize=8.5,
                  color=color, fontweight="bold" if right else "normal")  # fmt: skip


def with_unit(metric: Metric) -> str:
    """`test_acc (fraction)`."""
    name = metric.name
    if name.endswith(("_acc", "_f1")):
        unit = "fraction"
    elif name == "images_per_s":
        unit = "images/s"
    elif metric.is_until or name.endswith("_s"):
        unit = "s" if metric.is_time else "epochs"
    else:
        unit = {"loss": "nats", "mib": "MiB"}.get(name.rpartition("_")[2], "")
    return f"{name} ({unit})" if unit else name


def level_of(analysis: Analysis) -> str:
    """`95 %`."""
    return f"{100 * (1 - analysis.options.alpha):g} %"


def thinned(sizes: Sequence[int]) -> str:
    """A sentence where not every session is drawn."""
    return f"At most {MOST_POINTS} points an arm are drawn." if max(sizes) > MOST_POINTS else ""


def counted(arm: Reached) -> str:
    """`28 of 30 reached it`."""
    return f"{int(arm.reached.sum()):,} of {arm.time.size:,} reached it"


def difference_words(c: Comparison, metric: Metric) -> str:
    """A difference and its interval in numbers."""
    if not math.isfinite(c.diff):
        return "no interval"
    if c.identical:
        return f"identical in all {c.pairs:,} pairs"
    places = decimals([c], metric)
    return f"{signed(c.diff, places)}, " + (between(c, places) if has_interval(c) else "no interval")


def row_name(c: Comparison, group: Group, width: float) -> str:
    """The treatment, the baseline where it is another, and whether they are one op twice."""
    against = "" if c.baseline == group.baseline else f"against {c.baseline}"
    return name_in(width, c.treatment, against, "(A/A control)" if c.control else "")
