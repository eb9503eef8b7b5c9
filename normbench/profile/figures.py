"""A profile's figures, drawn from its JSON: bars per layer and arm, roofline, shares, theirs over ours."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normbench.bench.spread import Spread
from normbench.plan import write_whole
from normbench.profile import groups
from normbench.profile.compare import Series
from normbench.profile.record import Body, step_rows
from normbench.stats.figures import CYCLE, INK, SOFT, blank, explain, quiet

PASSES = ("forward", "backward")
THEIRS = {"MBN": "D", "OBN": "s"}  # markers


def of(body: Body, theirs: Sequence[Series]) -> dict[str, Figure]:
    """Every figure that there is data for, by name."""
    found = {"layers-model": bars(body, in_model=True), "steps": steps(body)}
    if body["alone"]:
        found |= {"layers-alone": bars(body, in_model=False), "roofline": roofline(body)}
    if theirs:
        found["compare"] = compared(body, theirs)
    return found


def save(figure: Figure, path: Path) -> None:
    """Write an SVG whole or not at all; equal figures are equal bytes."""
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "normbench"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    write_whole(path, image.getvalue())


def bars(body: Body, in_model: bool) -> Figure:
    """Time of every layer, a bar an arm, a panel a pass, with the 20th and 80th percentile."""
    shown, arms = groups.shown(body), body["arms"]
    figure = blank(5.6)
    panels = figure.subplots(2, sharex=True)
    for axes, which in zip(panels, PASSES, strict=True):
        for i, arm in enumerate(arms):
            times = [
                groups.in_model(arm, one.layers, which)
                if in_model
                else groups.alone(body, arm, one.layers, which)
                for one in shown
            ]
            draw_bars(axes, times, i, len(arms), arm["arm"])
        quiet(axes, "y")
        axes.set_ylabel(f"{which} (ms)", fontsize=9, color=INK)
        axes.set_ylim(bottom=0)
    name_layers(panels[-1], shown)
    panels[0].legend(**legend(len(arms)))
    place = "inside the running step" if in_model else "alone"
    title(figure, f"{body['model']}: norm layers {place}, {setting(body)}")
    many = "Layers of one shape are added up. " if len(shown) < len(arms[0]["layers"]) else ""
    explain(
        figure,
        f"{many}Bars: medians of {len(arms[0]['step_s'])} rounds; lines: 20th to 80th percentile.",
        relu_note(body),
    )
    return figure


def draw_bars(axes: Axes, times: Sequence[Sequence[float]], place: int, arms: int, name: str) -> None:
    """One arm's bars, beside those of the others."""
    width = 0.82 / arms
    x = np.arange(len(times)) + (place - (arms - 1) / 2) * width
    spreads = [Spread.of(own) if own else Spread(0, 0, 0) for own in times]
    heights = np.array([s.median for s in spreads]) * 1e3
    below = heights - np.array([s.p20 for s in spreads]) * 1e3
    above = np.array([s.p80 for s in spreads]) * 1e3 - heights
    color = CYCLE[place % len(CYCLE)]
    axes.bar(x, heights, width * 0.92, color=color, label=name)
    axes.errorbar(x, heights, [below, above], fmt="none", ecolor=INK, elinewidth=0.7, capsize=0)


def roofline(body: Body) -> Figure:
    """Bytes per second that layers alone have to move, over the size of their input, under a copy's."""
    figure = blank(4.6)
    axes = figure.subplots()
    copies: dict[int, list[float]] = {}
    for group in body["alone"]:
        size = group["tensor_bytes"]
        copies.setdefault(size, []).extend(2 * size / seconds / 1e9 for seconds in group["copy_s"])
    sizes = sorted(copies)
    x, roofs = [size / 2**20 for size in sizes], [Spread.of(copies[size]) for size in sizes]
    axes.fill_between(x, [s.p20 for s in roofs], [s.p80 for s in roofs], color="#e4e4e4", linewidth=0)
    axes.plot(x, [s.median for s in roofs], color=SOFT, linewidth=1.6, marker="_", markersize=9)
    arms = body["arms"]
    for i, arm in enumerate(arms):
        shift = 1.035 ** (i - (len(arms) - 1) / 2)
        for which, inside in (("forward", CYCLE[i % len(CYCLE)]), ("backward", "white")):
            points = list(rates(body, arm, which))
            axes.plot([p[0] * shift for p in points], [p[1] for p in points], "o", markersize=5.5,
                      color=CYCLE[i % len(CYCLE)], markerfacecolor=inside, markeredgewidth=1.2)  # fmt: skip
    quiet(axes, "both")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("size of the layer's input (MiB)")
    axes.set_ylabel("bytes that have to move, per second (GB/s)", fontsize=9, color=INK)
    handles = [Line2D([], [], color=SOFT, linewidth=1.6, label="a copy: the roof")]
    handles += [
        Line2D([], [], marker="o", linestyle="", color=CYCLE[i % len(CYCLE)], label=arm["arm"])
        for i, arm in enumerate(arms)
    ]
    handles.append(
        Line2D(
            [], [], marker="o", linestyle="", color=SOFT, markerfacecolor="white", label="hollow: backward"
        )
    )
    axes.legend(handles=handles, **legend(len(handles)))
    title(figure, f"{body['model']}: norm layers under the memory's roof, {setting(body)}")
    explain(
        figure,
        "Norm layers compute little per byte, so memory is their roof. A point is a layer alone (layers that "
        "are alike share one); bytes are the least that its algorithm has to move. Above the roof, a cache "
        "has held what is counted as moved twice.",
    )
    return figure


def rates(body: Body, arm: Body, which: str) -> set[tuple[float, float]]:
    """MiB of the input and GB/s, of every layer alone that was measured."""
    found = set()
    sizes = {likeness: group["tensor_bytes"] for group in body["alone"] for likeness in group["layers"]}
    for place, layer in enumerate(arm["layers"]):
        times, moved = groups.alone(body, arm, [place], which), layer[f"{which}_bytes"]
        if times and moved:
            found.add((sizes[layer["alike"]] / 2**20, moved / Spread.of(times).median / 1e9))
    return found


def steps(body: Body) -> Figure:
    """The norms' share of every arm's step, by layers and by difference."""
    rows = list(step_rows(body))
    figure = blank(1.5 + 0.55 * len(rows))
    axes = figure.subplots()
    for i, row in enumerate(rows):
        for how, shift, color in (("layers", -0.19, CYCLE[1]), ("difference", 0.19, CYCLE[5])):
            name = f"norm_share_by_{how}"
            share, low, high = (100 * row[f"{name}{end}"] for end in ("", "_p20", "_p80"))
            axes.barh(i + shift, share, 0.34, color=color, label=f"by {how}" if i == 0 else None)
            axes.plot([low, high], [i + shift] * 2, color=INK, linewidth=0.9)
    quiet(axes, "x")
    axes.axvline(0, color=SOFT, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlabel("share of the step (%)")
    axes.legend(**legend(2))
    title(figure, f"{body['model']}: what norms take of a training step, {setting(body)}")
    explain(
        figure,
        "By layers: their times inside the step. By difference: the step less the step without norms. Lines: "
        f"20th to 80th percentile of {rows[0]['rounds']} rounds.",
        "By layers is less the ReLU that layers have inside." if relu_note(body) else "",
    )
    return figure


def compared(body: Body, theirs: Sequence[Series]) -> Figure:
    """Their layers over ours as parts of all norm time, and both totals against their own first arm's."""
    shown, arms = groups.shown(body), body["arms"]
    figure = blank(8.2)
    panels = figure.subplots(3, height_ratios=(1, 1, 0.9))
    for axes, which in zip(panels[:2], PASSES, strict=True):
        for i, arm in enumerate(arms):
            times = [groups.in_model(arm, one.layers, which) for one in shown]
            whole = sum(Spread.of(own).median for own in times if own)
            draw_bars(axes, [[s / whole / 10 for s in own] for own in times], i, len(arms), arm["arm"])
            width = 0.82 / len(arms)
            for one in (one for one in theirs if one.stride == arm["stride"]):
                parts = [sum(one.times_s[which][place] for place in s.layers) for s in shown]
                x = np.arange(len(shown)) + (i - (len(arms) - 1) / 2) * width
                axes.plot(x, 100 * np.array(parts) / sum(parts), THEIRS.get(one.arm, "o"), color="white",
                          markeredgecolor=INK, markersize=4.5, markeredgewidth=0.9)  # fmt: skip
        quiet(axes, "y")
        axes.set_ylabel(f"{which}: part of\nall norm time (%)", fontsize=9, color=INK)
        axes.set_ylim(bottom=0)
        name_layers(axes, shown)
    draw_totals(panels[2], body, theirs)
    handles = panels[0].get_legend_handles_labels()[0]
    names = sorted({one.arm for one in theirs})
    handles = [*handles, *(
        Line2D([], [], marker=THEIRS.get(name, "o"), linestyle="", color="white", markeredgecolor=INK,
               label=f"theirs: {name}") for name in names
    )]  # fmt: skip
    panels[0].legend(handles=handles, **legend(len(handles)))
    title(figure, f"{body['model']}: ours under another table's times, {setting(body)}")
    explain(
        figure,
        "Bars: ours inside the step; marks: theirs at the same stride. Machines differ, so layers are parts "
        "of all norm time, and totals are against each table's smallest stride.",
    )
    return figure


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
            color = CYCLE[(1, 0, 2, 3, 4)[i % 5]]
            axes.plot(strides, values, style, marker=marker, color=color, markersize=5, linewidth=1.4,
                      label=f"{name}, {which}")  # fmt: skip
    quiet(axes, "both")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({s for lines in (*ours.values(), *others.values()) for s in lines}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stride")
    axes.set_ylabel("all norm layers,\nagainst smallest stride", fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False, ncols=2)


def name_layers(axes: Axes, shown: Sequence[groups.Shown]) -> None:
    """Layers along the x axis."""
    slanted = len(shown) > 9
    axes.set_xticks(
        range(len(shown)),
        [f"{one.name}\n{one.shape}" for one in shown],
        rotation=45 if slanted else 0,
        ha="right" if slanted else "center",
        fontsize=7 if slanted else 7.5,
    )
    axes.tick_params(axis="x", length=0, labelsize=7 if slanted else 7.5)
    axes.set_xlim(-0.6, len(shown) - 0.4)


def legend(entries: int) -> dict[str, Any]:
    """Above the panel, in one or more lines."""
    return {"fontsize": 8, "frameon": False, "ncols": min(entries, 6), "loc": "lower left",
            "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2, "handlelength": 1.2}  # fmt: skip


def title(figure: Figure, text: str) -> None:
    """What is shown."""
    figure.suptitle(text.replace("$", r"\$"), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)


def setting(body: Body) -> str:
    """`batch 32, fp32, EPYC`: what all arms share."""
    parts = []
    for key, say in (("batch_size", "batch {}"), ("precision", "{}")):
        values = {arm[key] for arm in body["arms"]}
        parts += [say.format(*values)] if len(values) == 1 else []
    parts.append("CUDA" if body["machine"]["device"].startswith("cuda") else "CPU")
    return ", ".join(parts)


def relu_note(body: Body) -> str:
    """A sentence where layers have ReLU inside."""
    inside = any(layer["relu_inside"] for arm in body["arms"] for layer in arm["layers"])
    return "Fused layers before a ReLU have it inside, and in their time." if inside else ""
