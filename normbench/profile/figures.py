"""A profile's figures, drawn from its JSON: bars per layer and arm, roofline, shares, theirs over ours.

Each draws so many inches wide; `sketches` lists all that there is data for. `places` are the arms' in the
palette, so that a page which also shows sessions gives an arm one colour.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from normbench.bench.page import unit_of
from normbench.bench.spread import Spread
from normbench.figures import (
    CYCLE,
    FAINT,
    INK,
    NARROW,
    SOFT,
    WIDTH,
    Sketch,
    aside,
    below,
    blank,
    colour_of,
    entitle,
    explain,
    grid,
    head,
    is_narrow,
    key,
    keys,
    legend,
    mark_of,
    quiet,
    save_svg,
    wrapped,
)
from normbench.profile import groups
from normbench.profile.compare import Series
from normbench.profile.record import PASSES, Body, step_rows

THEIRS = {"MBN": "D", "OBN": "s"}  # markers
GOES_ON = "A line that ends at the edge goes on."
LONGEST = 1.5  # times the longest bar: where an axis ends, whatever a spread's line does
Places = Sequence[int]


def sketches(body: Body, theirs: Sequence[Series] = (), places: Places | None = None) -> Iterator[Sketch]:
    """Every figure that there is data for."""
    at = list(places or range(len(body["arms"])))
    yield Sketch(("layers-model",), partial(bars, body, at, True), sums(body, in_model=True))
    if body["alone"]:
        yield Sketch(("layers-alone",), partial(bars, body, at, False), sums(body, in_model=False))
        yield Sketch(("roofline",), partial(roofline, body, at), of_copies(body))
    yield Sketch(("steps",), partial(steps, body, at), shares(body))
    if theirs:
        yield Sketch(("compare",), partial(compared, body, theirs, at), "Theirs are marks over our bars.")


def draw(body: Body, theirs: Sequence[Series], folder: Path, *before: str) -> None:
    """Save every figure as SVG; `before` are words that its file's name begins with."""
    for sketch in sketches(body, theirs):
        if (figure := sketch.make(WIDTH)) is not None:
            save_svg(figure, folder / f"{'-'.join([*before, *sketch.parts])}.svg")


def bars(body: Body, places: Places, in_model: bool, width: float = WIDTH) -> Figure:
    """Time of every layer, a bar an arm, a panel a pass, with the 20th and 80th percentile."""
    shown, arms = groups.shown(body), body["arms"]
    find = groups.in_model if in_model else partial(groups.alone, body)
    figure, panels = layer_panels(shown, len(arms), width)
    clipped = False
    for axes, which in zip(panels, PASSES, strict=True):
        times = [[find(arm, one.layers, which) for one in shown] for arm in arms]
        clipped |= draw_bars(axes, times, places)
        head(axes, which, fontsize=9.5)
    legend(figure, keys([arm["arm"] for arm in arms], places, boxes=True))
    where = "inside the running step" if in_model else "alone"
    entitle(figure, f"norm layers of {body['model']} {where}", setting(body))
    explain(
        figure,
        "Layers of one shape are added up." if len(shown) < len(arms[0]["layers"]) else "",
        f"Bars: medians of {len(arms[0]['step_s'])} rounds; lines: 20th to 80th percentile.",
        GOES_ON if clipped else "",
        relu_note(body),
    )
    return figure


def layer_panels(shown: Sequence[groups.Shown], arms: int, width: float) -> tuple[Figure, list[Axes]]:
    """A panel a pass with a row a layer: side by side, or below each other where it is narrow."""
    narrow = width < NARROW
    names = named(shown, width)
    tall = len(shown) * row_height(names, arms)
    figure = blank(0.7 + tall if not narrow else 1.4 + 2 * tall, width)
    spots = figure.subplots(2 if narrow else 1, 1 if narrow else 2, sharey=True, squeeze=False).ravel()
    for axes in spots:
        name_rows(axes, names)
    return figure, list(spots)


def named(shown: Sequence[groups.Shown], width: float) -> list[str]:
    """The rows' names: a layer and its shape."""
    return [wrapped(f"{one.name} {one.shape}", 15 if width < NARROW else 24) for one in shown]


def row_height(names: Sequence[str], bars_each: int) -> float:
    """Inches for so many bars, or for the longest name."""
    return max(0.1 + 0.085 * bars_each, 0.06 + 0.13 * max(name.count("\n") + 1 for name in names))


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top down."""
    quiet(axes, "x")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.locator_params(axis="x", nbins=5)


def draw_bars(axes: Axes, times: Sequence[Sequence[Sequence[float]]], places: Places, unit: str = "") -> bool:
    """Every arm's bars, beside each other: (arms, layers, rounds); whether a spread's line is cut off."""
    spreads = [[Spread.of(own) if own else Spread(0, 0, 0) for own in arm] for arm in times]
    longest = max((s.median for arm in spreads for s in arm), default=0.0)
    scale, unit = (1.0, unit) if unit else unit_of(longest)
    thick = 0.82 / len(times)
    for i, (arm, place) in enumerate(zip(spreads, places, strict=True)):
        y = np.arange(len(arm)) + (i - (len(times) - 1) / 2) * thick
        axes.barh(y, [s.median / scale for s in arm], thick * 0.9, color=colour_of(place), linewidth=0)
        axes.hlines(y, [s.p20 / scale for s in arm], [s.p80 / scale for s in arm], color=INK, linewidth=0.7)
    farthest = max((s.p80 for arm in spreads for s in arm), default=0.0)
    if longest:
        axes.set_xlim(0, 1.04 * min(farthest, LONGEST * longest) / scale)
    axes.set_xlabel(unit, fontsize=8.5)
    return farthest > LONGEST * longest > 0


def roofline(body: Body, places: Places, width: float = WIDTH) -> Figure:
    """Bytes per second that layers alone have to move, over the size of their input, under a copy's."""
    figure, panels = grid(PASSES, width, 2.7, most=2)
    copies: dict[int, list[float]] = {}
    for group in body["alone"]:
        size = group["tensor_bytes"]
        copies.setdefault(size, []).extend(2 * size / seconds / 1e9 for seconds in group["copy_s"])
    sizes = sorted(copies)
    roofs = [Spread.of(copies[size]) for size in sizes]
    arms = body["arms"]
    for axes, which in zip(panels, PASSES, strict=True):
        axes.fill_between(sizes, [s.p20 for s in roofs], [s.p80 for s in roofs], color=FAINT, linewidth=0)
        axes.plot(sizes, [s.median for s in roofs], color=SOFT, linewidth=1.4, marker="_", markersize=9)
        for i, (arm, place) in enumerate(zip(arms, places, strict=True)):
            shift = 1.04 ** (i - (len(arms) - 1) / 2)  # so that points of one size stay beside each other
            points = sorted(rates(body, arm, which))
            axes.plot([size * shift for size, _ in points], [rate for _, rate in points], mark_of(place),
                      color=colour_of(place), alpha=0.85, markersize=5, markeredgewidth=0)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=4 if width < NARROW else 6))
        axes.xaxis.set_major_formatter(lambda value, _: in_bytes(value))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    below(panels, "size of the layer's input")
    aside(figure, "bytes that have to move (GB/s)")
    roof = key("a copy: the roof", color=SOFT, linewidth=1.4)
    legend(figure, [*keys([arm["arm"] for arm in arms], places, boxes=True), roof])
    entitle(figure, f"norm layers of {body['model']} alone, under the memory's roof", setting(body))
    explain(
        figure,
        "Norm layers compute little per byte, so memory is their roof. A point is a layer (those that are "
        "alike share one); bytes are the least that its algorithm has to move. Above the roof, a cache has "
        "held what is counted as moved twice. Grey band: 20th to 80th percentile of the copy.",
    )
    return figure


def in_bytes(value: float) -> str:
    """`512 KiB`."""
    return f"{value / 2**20:.3g} MiB" if value >= 2**20 else f"{value / 2**10:.3g} KiB"


def rates(body: Body, arm: Body, which: str) -> set[tuple[float, float]]:
    """Bytes of the input and GB/s, of every layer alone that was measured."""
    found = set()
    sizes = {likeness: group["tensor_bytes"] for group in body["alone"] for likeness in group["layers"]}
    for place, layer in enumerate(arm["layers"]):
        times, moved = groups.alone(body, arm, [place], which), layer[f"{which}_bytes"]
        if times and moved:
            found.add((float(sizes[layer["alike"]]), moved / Spread.of(times).median / 1e9))
    return found


def steps(body: Body, places: Places, width: float = WIDTH) -> Figure:
    """The norms' share of every arm's step, by layers and by difference."""
    rows = list(step_rows(body))
    names = [wrapped(row["arm"], 15 if width < NARROW else 24) for row in rows]
    figure = blank(0.6 + len(rows) * max(0.42, row_height(names, 2)), width)
    axes = figure.subplots()
    name_rows(axes, names)
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        for how, shift, inside in (("layers", -0.19, colour_of(place)), ("difference", 0.19, "white")):
            name = f"norm_share_by_{how}"
            share, low, high = (100 * row[f"{name}{end}"] for end in ("", "_p20", "_p80"))
            axes.barh(i + shift, share, 0.32, color=inside, edgecolor=colour_of(place), linewidth=1.1)
            axes.plot([low, high], [i + shift] * 2, color=INK, linewidth=0.9)
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_xlabel("share of the step (%)", fontsize=8.5)
    look = {"marker": "s", "markersize": 6.5, "linestyle": "", "color": SOFT}
    legend(figure, [key("by layers", **look), key("by difference", markerfacecolor="white", **look)])
    entitle(figure, f"what norms take of a training step of {body['model']}", setting(body))
    explain(
        figure,
        "By layers: their times inside the step, added up. By difference: the step less the step without "
        f"norms. Lines: 20th to 80th percentile of {rows[0]['rounds']} rounds.",
        "By layers is less the ReLU that layers have inside." if relu_note(body) else "",
    )
    return figure


def compared(body: Body, theirs: Sequence[Series], places: Places, width: float = WIDTH) -> Figure:
    """Their layers over ours as parts of all norm time, and both totals against their own first arm's."""
    shown, arms = groups.shown(body), body["arms"]
    names = named(shown, width)
    tall = 0.6 + len(shown) * row_height(names, len(arms))
    narrow = width < NARROW
    figure = blank((2 * tall if narrow else tall) + 2.6, width)
    beside = [["forward"], ["backward"]] if narrow else [["forward", "backward"]]
    rows: list[Any] = [*beside, ["all"] * len(beside[0])]
    spots = figure.subplot_mosaic(rows, height_ratios=[*[tall] * (len(rows) - 1), 2.4])
    clipped = False
    for which in PASSES:
        axes = spots[which]
        name_rows(axes, names)
        times = []
        for arm in arms:
            own = [groups.in_model(arm, one.layers, which) for one in shown]
            whole = sum(Spread.of(one).median for one in own if one)
            times.append([[100 * s / whole for s in one] for one in own])
        clipped |= draw_bars(axes, times, places, "part of all norm time (%)")
        farthest = axes.get_xlim()[1]
        for i, arm in enumerate(arms):
            for one in (one for one in theirs if one.stride == arm["stride"]):
                parts = [sum(one.times_s[which][place] for place in s.layers) for s in shown]
                y = np.arange(len(shown)) + (i - (len(arms) - 1) / 2) * 0.82 / len(arms)
                x = 100 * np.array(parts) / sum(parts)
                axes.plot(x, y, **theirs_look(one.arm))
                farthest = max(farthest, 1.04 * x.max())
        axes.set_xlim(0, farthest)
        head(axes, which, fontsize=9.5)
    if not narrow:
        spots["backward"].tick_params(labelleft=False)
    draw_totals(spots["all"], body, theirs)
    marks = [key(f"theirs: {name}", **theirs_look(name)) for name in sorted({one.arm for one in theirs})]
    legend(figure, [*keys([arm["arm"] for arm in arms], places, boxes=True), *marks])
    entitle(figure, f"ours under another table's times, {body['model']}", setting(body))
    explain(
        figure,
        "Bars: ours inside the step; marks: theirs at the same stride. Machines differ, so layers are parts "
        "of all norm time, and totals are against each table's smallest stride.",
        GOES_ON if clipped else "",
    )
    return figure


def theirs_look(arm: str) -> dict[str, Any]:
    """How an arm of another table is marked."""
    return {"marker": THEIRS.get(arm, "o"), "linestyle": "", "color": "white", "markeredgecolor": INK,
            "markersize": 4.5, "markeredgewidth": 0.9}  # fmt: skip


def draw_totals(axes: Axes, body: Body, theirs: Sequence[Series]) -> None:
    """Forward and backward of all norms by stride, each line against its own first point."""
    ours: dict[str, dict[int, dict[str, float]]] = {}
    for arm in body["arms"]:
        if arm["stride"] is not None:
            every = range(len(arm["layers"]))
            ours.setdefault(f"ours: {arm['norm']}", {})[arm["stride"]] = {
                which: Spread.of(groups.in_model(arm, every, which)).median for which in PASSES
            }
    others: dict[str, dict[int, dict[str, float]]] = {}
    for one in theirs:
        if one.stride is not None:
            totals = {which: sum(one.times_s[which]) for which in PASSES}
            others.setdefault(f"theirs: {one.arm}", {})[one.stride] = totals
    for i, (name, by_stride) in enumerate({**ours, **others}.items()):
        strides = sorted(by_stride)
        for which, style in (("forward", "-"), ("backward", "--")):
            first = by_stride[strides[0]][which]
            values = [by_stride[stride][which] / first for stride in strides]
            marker = "o" if name in ours else THEIRS.get(name.removeprefix("theirs: "), "o")
            axes.plot(strides, values, style, marker=marker, color=CYCLE[(1, 0, 2, 3, 4)[i % 5]],
                      markersize=5, linewidth=1.4, label=f"{name}, {which}")  # fmt: skip
    quiet(axes, "both")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({s for lines in (*ours.values(), *others.values()) for s in lines}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stride")
    axes.set_ylabel("all norm layers,\nagainst the smallest stride")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left", bbox_to_anchor=(0, 1),
                ncols=1 if is_narrow(axes) else 3)  # fmt: skip


def setting(body: Body) -> str:
    """`batch 32, fp32, CPU`: what all arms share."""
    parts = []
    for name, say in (("batch_size", "batch {}"), ("precision", "{}")):
        values = {arm[name] for arm in body["arms"]}
        parts += [say.format(*values)] if len(values) == 1 else []
    parts.append("CUDA" if body["machine"]["device"].startswith("cuda") else "CPU")
    return ", ".join(parts)


def relu_note(body: Body) -> str:
    """A sentence where layers have ReLU inside."""
    inside = any(layer["relu_inside"] for arm in body["arms"] for layer in arm["layers"])
    return "Fused layers before a ReLU have it inside, and in their time." if inside else ""


def sums(body: Body, in_model: bool) -> str:
    """All layers of every arm together, in words."""
    said = []
    for arm in body["arms"]:
        every = range(len(arm["layers"]))
        find = groups.in_model if in_model else partial(groups.alone, body)
        both = {which: find(arm, every, which) for which in PASSES}
        words = [f"{1e3 * Spread.of(own).median:.3g} ms {which}" for which, own in both.items() if own]
        said += [f"{arm['arm']} {', '.join(words)}"] if words else []
    return "All layers together: " + "; ".join(said)


def of_copies(body: Body) -> str:
    """How near a copy's rate each arm's layers come, in words."""
    said = []
    for arm in body["arms"]:
        for which in PASSES:
            found = [rate / copied for place, layer in enumerate(arm["layers"])
                     if (times := groups.alone(body, arm, [place], which)) and layer[f"{which}_bytes"]
                     and (copied := groups.copy_rate(body, arm, place))
                     and (rate := layer[f"{which}_bytes"] / Spread.of(times).median)]  # fmt: skip
            said += [f"{arm['arm']} {which} {min(found):.0%} to {max(found):.0%}"] if found else []
    return "Of a copy's rate: " + "; ".join(said)


def shares(body: Body) -> str:
    """Both shares of every arm, in words."""
    return "; ".join(
        f"{row['arm']} {row['norm_share_by_layers']:.1%} by layers, {row['norm_share_by_difference']:.1%} "
        "by difference"
        for row in step_rows(body)
    )
