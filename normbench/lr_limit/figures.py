"""Figures of a search: failure curves, the trials in order, the range test; equal SVG for equal trials."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from scipy.special import expit

from normbench.figures import (
    CYCLE,
    INK,
    SOFT,
    WIDTH,
    aside,
    blank,
    colour_of,
    entitle,
    explain,
    grid,
    head,
    keys,
    legend,
    quiet,
    save_all,
    wrapped,
)
from normbench.lr_limit.curve import LEVEL, proportion_interval
from normbench.lr_limit.limits import Searched
from normbench.lr_limit.page import percent, span, value_words
from normbench.lr_limit.record import Range
from normbench.lr_limit.trial import Chance

SHARES = np.array(
    [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]
)  # at which the band is drawn
TRAINED, FAILED, LINE = CYCLE[1], CYCLE[2], "#aaaaaa"
SMOOTH = 0.9  # of the range test's running mean


def draw(folder: Path, arms: Sequence[Searched], ranges: Sequence[Range], chance: Chance) -> list[Path]:
    """Write every figure there is data for; returns their paths."""
    figures = {"failure-curves": curves_figure(arms), "search": search_figure(arms)}
    if ranges:
        figures["range-test"] = range_figure(arms, ranges, chance)
    return save_all(figures, folder)


def curves_figure(arms: Sequence[Searched]) -> Figure:
    """A panel per arm on one axis of rates: what share failed, the logistic curve, its band, the limit."""
    figure = blank(0.5 + 1.75 * len(arms))
    panels = figure.subplots(len(arms), sharex=True, squeeze=False)[:, 0]
    for i, (axes, arm) in enumerate(zip(panels, arms, strict=True)):
        draw_curve(axes, arm, colour_of(i))
    in_numbers(panels[-1].xaxis)
    panels[-1].set_xlabel("learning rate")
    aside(figure, "sessions that failed (fraction)")
    n = len(arms[0].sessions)
    entitle(figure, "How large can the learning rate be?", f"n = {n} sessions at every rate")
    hollow = " Hollow: rates too small to learn, left out of the fit."
    explain(
        figure,
        f"Points: what failed at a rate, with Wilson's {percent(LEVEL)} interval of each by itself. Curve: "
        "logistic in the log rate, fitted to the sessions' own limits; band: the "
        f"{percent(LEVEL)} interval of the rate at each probability. Diamond and bar: the rate at which half "
        "fail." + (hollow if any(arm.too_small for arm in arms) else ""),
    )
    return figure


def draw_curve(axes: Axes, arm: Searched, color: str) -> None:
    """One arm's points, curve, band and limit."""
    on_rates(axes)
    rates = np.geomspace(min(arm.seen) / 1.5, max(arm.seen) * 1.5, 800)
    m = arm.fit.quantile().value
    bands = [arm.fit.quantile(share).exp() for share in SHARES]
    low, high = ([min(max(edge, rates[0]), rates[-1]) for edge in ends]
                 for ends in zip(*((band.low, band.high) for band in bands), strict=True))  # fmt: skip
    axes.fill_betweenx(SHARES, low, high, color=color, alpha=0.16, linewidth=0, label="band")
    if math.isfinite(m):
        axes.plot(rates, expit((np.log(rates) - m) / arm.scale), color=color, linewidth=1.8, label="curve")
    for rate, there in arm.seen.items():
        share, alone = there.failed / there.sessions, proportion_interval(there.failed, there.sessions)
        axes.plot([rate, rate], alone, color=LINE, linewidth=1.2, zorder=2)
        inside = "white" if rate in arm.too_small else SOFT
        axes.plot([rate], [share], "o", color=SOFT, markerfacecolor=inside, markersize=4.5, zorder=3)
    if math.isfinite(m):
        ends = [max(arm.limit.low, rates[0]), min(arm.limit.high, rates[-1])]
        axes.plot(ends, [0.5, 0.5], color=INK, linewidth=2.2, zorder=4, label="interval")
        axes.plot([arm.limit.value], [0.5], "D", color=INK, markeredgecolor="white", markersize=6.5, zorder=5)
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([0, 0.5, 1])
    words = f"{arm.name}: half fail at {value_words(arm.limit)} ({percent(LEVEL)} {span(arm.limit)})"
    head(axes, wrapped(words, 90), color=color, fontsize=9.5, fontweight="bold")


def search_figure(arms: Sequence[Searched]) -> Figure:
    """A panel per arm: every trial in the order of the rates, with what they narrowed down."""
    figure, panels = grid([arm.name for arm in arms], WIDTH, height=2.6, share="y", most=2)
    for i, (axes, arm) in enumerate(zip(panels, arms, strict=True)):
        draw_search(axes, arm, colour_of(i))
    aside(figure, "learning rate")
    entitle(figure, "The search, rate by rate", f"n = {len(arms[0].sessions)} sessions at each")
    explain(
        figure,
        "Blue dots: sessions that trained; orange crosses: sessions that failed. The line goes from rate to "
        "rate in the order of the search: outwards, halving, then around the limit. Grey band: the limit's "
        f"{percent(LEVEL)} interval.",
    )
    return figure


def draw_search(axes: Axes, arm: Searched, color: str) -> None:
    """One arm's trials."""
    axes.grid(visible=False, axis="x")
    axes.set_yscale("log")
    rates, n = list(arm.order), len(arm.sessions)
    places = np.arange(1, len(rates) + 1)
    axes.plot(places, rates, color=LINE, linewidth=0.8, zorder=1)
    low, high = max(arm.limit.low, min(rates) / 2), min(arm.limit.high, max(rates) * 2)
    axes.axhspan(low, high, color="#e8e8e8", linewidth=0, zorder=0, label="interval")
    apart = (np.arange(n) - (n - 1) / 2) * min(0.12, 0.7 / n)
    for place, rate in zip(places, rates, strict=True):
        failed = np.array([trial.failed for trial in arm.order[rate]], bool)
        x, y = place + apart, np.full(n, rate)
        axes.plot(x[~failed], y[~failed], "o", color=TRAINED, markersize=3.2, markeredgewidth=0)
        axes.plot(x[failed], y[failed], "x", color=FAILED, markersize=3.8, markeredgewidth=1.1)
    in_numbers(axes.yaxis)
    axes.set_xticks(places)
    axes.set_xlabel("rates in the order tried")
    head(axes, wrapped(arm.name, 40), color=color, fontsize=9.5, fontweight="bold")


def range_figure(arms: Sequence[Searched], ranges: Sequence[Range], chance: Chance) -> Figure:
    """Training loss against a rate that grows step by step, a line per arm, with each arm's limit below."""
    figure = blank(3.5)
    axes = figure.subplots()
    on_rates(axes)
    top = 1.6 * chance.loss
    limits = {arm.name: arm.limit for arm in arms}
    names = [arm.name for arm in arms]
    places = [names.index(r.arm) if r.arm in names else len(names) + i for i, r in enumerate(ranges)]
    for place, found in zip(places, ranges, strict=True):
        color = colour_of(place)
        rates, losses = np.array(found.rates[: len(found.losses)]), np.array(found.losses)
        axes.plot(rates, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(rates, smoothed(losses), color=color, linewidth=1.8, label=found.arm)
        if found.arm in limits and 0 < limits[found.arm].value < math.inf:
            axes.plot([limits[found.arm].value], [0.03 * top], "^", color=color, markersize=7, clip_on=False)
    axes.axhline(chance.loss, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate("guessing", (1.0, chance.loss), (-2, 4), xycoords=axes.get_yaxis_transform(),
                  textcoords="offset points", ha="right", fontsize=8, color=SOFT)  # fmt: skip
    axes.set_ylim(0, top)
    in_numbers(axes.xaxis)
    axes.set_xlabel("learning rate, growing with every step")
    axes.set_ylabel("training loss (nats)", fontsize=9, color=INK)
    legend(figure, keys([found.arm for found in ranges], places))
    entitle(figure, "Learning-rate range test", f"one run of {len(ranges[0].rates)} steps an arm, session 0")
    explain(
        figure,
        f"Pale: each batch; bold: running mean ({SMOOTH:g}). A line that stops early had a loss that was "
        "not finite. Triangles: the rate at which half of the sessions fail when every step has that rate.",
    )
    return figure


def smoothed(losses: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "list[float]":
    """The running mean, corrected for its start."""
    mean, out = 0.0, []
    for step, loss in enumerate(losses, start=1):
        mean = SMOOTH * mean + (1 - SMOOTH) * float(loss)
        out.append(mean / (1 - SMOOTH**step))
    return out


def on_rates(axes: Axes) -> None:
    """A log axis of rates."""
    quiet(axes, "both")
    axes.set_xscale("log")


def in_numbers(axis: Axis) -> None:
    """0.1, 0.2, 0.5, 1 in place of powers of ten; over more than three decades the ones alone."""
    low, high = axis.get_data_interval()
    subs = (1, 2, 5) if low > 0 and high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
