"""Figures of traces: statistics and parameters over the steps, quantiles and peaks over the evaluations.

Each `…_figure` draws so many inches wide and returns a matplotlib `Figure`, or None where there is nothing to
draw; `norm_sketches` and `output_sketches` list all that there are.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normbench.figures import (
    SOFT,
    WIDTH,
    Floats,
    Sketch,
    banded,
    below,
    entitle,
    explain,
    grid,
    keys,
    legend,
    safe_stem,
    save_svg,
    spoken,
)
from normbench.traces.reading import Tables, Traces, arms_of, read_traces

QUANTITIES = {
    "batch_mean": "batch mean", "batch_std": "batch std",
    "running_mean": "running mean", "running_var": "running variance",
    "weight": "weight (γ)", "bias": "bias (β)", "weight_grad": "gradient of γ", "bias_grad": "gradient of β",
}  # fmt: skip
OVERLAID = {"batch_mean": "running_mean", "batch_std": "running_std"}  # what lies dashed over it
QUANTILES = ("q01", "q20", "q80", "q99")
PEAKS = tuple(f"peak_{q}" for q in QUANTILES)
MOST_LAYERS = 4
MOST_CHANNELS = 6
MOST_BANDS = 4  # over each other in a panel
FAR = 6.0  # times as wide as is usual: a scale ends before it
Table = pd.DataFrame
Span = tuple[float, float]
T = TypeVar("T")


def norm_sketches(traces: Traces, group: str = "", most_arms: int | None = None) -> Iterator[Sketch]:
    """Every layer with the arms beside each other; then arm by arm, so many of them, its channels."""
    for layer in layers_of(traces.norms):
        tables = of_layer(traces.norms, layer)
        make = partial(norms_figure, traces.arms, tables, layer, group)
        yield Sketch((group, "traces-norms", layer), make, ending(tables, list(QUANTITIES)))
    for arm, table in list(traces.norms.items())[:most_arms]:
        for layer in layers_of({arm: table}):
            own = of_layer({arm: table}, layer)
            make = partial(channels_figure, own[arm], arm, layer, group)
            parts = (group, "traces-norms", layer, arm)
            yield Sketch(parts, make, ending(own, list(QUANTITIES)), folded=True)


def output_sketches(traces: Traces, group: str = "") -> Iterator[Sketch]:
    """Every watched layer's values, and the logits."""
    for layer in layers_of(traces.features):
        tables = of_layer(traces.features, layer)
        make = partial(quantiles_figure, traces.arms, tables, f"values of {layer}", QUANTILES, "", group)
        yield Sketch((group, "traces-features", layer), make, ending(tables, QUANTILES))
    if traces.logits:
        what, columns = "the largest logit of an image", ("peak_mean", *PEAKS)
        make = partial(quantiles_figure, traces.arms, traces.logits, what, PEAKS, columns[0], group)
        yield Sketch((group, "traces-logits"), make, ending(traces.logits, columns))


def draw(study: Path, session: str | None, notices: list[str]) -> list[Path]:
    """Save every figure as SVG under `study/figures`, of one session alone where it is named: `s3`."""
    traces = read_traces(arms_of(study, session), notices)
    paths: dict[str, Path] = {}
    for sketch in chain(norm_sketches(traces), output_sketches(traces)):
        if (figure := sketch.make(WIDTH)) is not None:
            name = safe_stem([*sketch.parts, *([session] if session else [])], paths)
            paths[name.lower()] = save_svg(figure, study / "figures" / f"{name}.svg")
    return list(paths.values())


def layers_of(tables: Tables) -> list[str]:
    """The layers in their order, a few spread evenly where there are many."""
    return spread(list(dict.fromkeys(layer for t in tables.values() for layer in t["layer"].unique())),
                  MOST_LAYERS)  # fmt: skip


def of_layer(tables: Tables, layer: str) -> dict[str, Table]:
    """Every arm's rows of one layer; arms that have none are not there."""
    found = {arm: table[table["layer"] == layer] for arm, table in tables.items()}
    return {arm: table for arm, table in found.items() if len(table)}


def norms_figure(arms: Sequence[str], tables: Tables, layer: str, group: str = "", width: float = WIDTH
                 ) -> Figure | None:  # fmt: skip
    """A norm layer over the steps, a panel a quantity: arms beside each other, all channels together."""
    shown = [c for c in QUANTITIES if any(t[c].notna().any() for t in tables.values())]
    if not shown:
        return None
    figure, panels = grid([QUANTITIES[c] for c in shown], width, share="x")
    cut: dict[str, None] = {}
    with_bands = len(tables) <= MOST_BANDS
    for axes, column in zip(panels, shown, strict=True):
        spans = {}
        for i, (arm, table) in enumerate(tables.items()):
            if table[column].notna().any():
                x, y = over_steps(table, column)
                bands = [(y[:, 0], y[:, 2])] if with_bands else []
                banded(axes, x, y[:, 1], bands, arms.index(arm), pale=0.3 / (1 + len(tables)),
                       linewidth=width_of(i, len(tables)))  # fmt: skip
                spans[arm] = span_of(y if with_bands else y[:, 1])
        cut |= dict.fromkeys(end_scale(axes, spans))
        axes.locator_params(axis="y", nbins=4)
    below(panels, "step")
    legend(figure, keys(list(tables), [arms.index(arm) for arm in tables]))
    channels = max(table["channel"].nunique() for table in tables.values())
    counts = f"{counted(tables.values())}, {channels} channels"
    entitle(figure, f"norm layer {layer} over training", counts, group)
    band = "; band: their middle 60 %" if with_bands else ""
    explain(figure, f"Line: median of channels and sessions{band}.", beyond(cut))
    return figure


def channels_figure(table: Table, arm: str, layer: str, group: str = "", width: float = WIDTH
                    ) -> Figure | None:  # fmt: skip
    """One arm's norm layer over the steps, a line a channel: the sessions' mean, from least to greatest."""
    table = table.assign(running_std=np.sqrt(table["running_var"].clip(lower=0)))
    there = [c for c in (*QUANTITIES, "running_std") if table[c].notna().any()]
    shown = [c for c in QUANTITIES if c in there and c not in ("running_mean", "running_var")]
    if not shown:
        return None
    figure, panels = grid([QUANTITIES[c].removeprefix("batch ") for c in shown], width, share="x", most=3)
    channels = spread(sorted(table["channel"].unique()), MOST_CHANNELS)
    for axes, column in zip(panels, shown, strict=True):
        for place, channel in enumerate(channels, start=1):
            own = table[table["channel"] == channel]
            x, (mean, low, high) = of_sessions(own, column)
            banded(axes, x, mean, [(low, high)] if own["session"].nunique() > 1 else [], place, linewidth=1.3)
            if OVERLAID.get(column) in there:
                x, (mean, _, _) = of_sessions(own, OVERLAID[column])
                banded(axes, x, mean, [], place, linewidth=1, linestyle=(0, (4, 2)))
        axes.locator_params(axis="y", nbins=4)
    below(panels, "step")
    places = range(1, 1 + len(channels))
    legend(figure, keys([f"channel {int(channel)}" for channel in channels], places))
    entitle(figure, f"norm layer {layer} of {arm}, channel by channel", counted([table]), group)
    several = table["session"].nunique() > 1
    explain(
        figure,
        "Lines: means of the sessions; bands: from the least to the greatest." if several else "",
        "Dashed: running." if any(OVERLAID.get(column) in there for column in shown) else "",
    )
    return figure


def quantiles_figure(arms: Sequence[str], tables: Tables, what: str, columns: Sequence[str], middle: str,
                     group: str = "", width: float = WIDTH) -> Figure | None:  # fmt: skip
    """The 1, 20, 80 and 99 % quantiles of something at every evaluation, a panel an arm.

    Args:
        middle: the column of a line through them; "" for none.
    """
    tables = {arm: table[table[columns[1]].notna()] for arm, table in tables.items()}
    tables = {arm: table for arm, table in tables.items() if len(table)}
    if not tables:
        return None
    by = evaluations(tables.values())
    figure, panels = grid(list(tables), width)
    lines = {arm: at_evaluations(table, by, [*columns, middle] if middle else columns)
             for arm, table in tables.items()}  # fmt: skip
    first = next(iter(lines))
    for axes, (arm, (x, y)) in zip(panels, lines.items(), strict=True):
        place = arms.index(arm)
        line = y[4] if middle else None
        banded(axes, x, line, [(y[0], y[3]), (y[1], y[2])], place)
        for edge in [] if middle else [y[1], y[2]]:
            banded(axes, x, edge, [], place, linewidth=1)
        for edge in [] if arm == first else [lines[first][1][4]] if middle else lines[first][1][1:3]:
            axes.plot(lines[first][0], edge, color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
    cut = end_scale(panels[0], {arm: span_of(y.T) for arm, (_, y) in lines.items()})
    below(panels, by)
    parts = {str(part) for table in tables.values() for part in table["part"].unique()}
    said = {"val": "validation", "test": "test"}
    images = " and ".join(sorted(said.get(part, part) for part in parts))
    entitle(figure, what, f"{images} images, {counted(tables.values())}", group)
    dashed = f"Dashed: the {'mean' if middle else 'middle 60 %'} of {first}." if len(lines) > 1 else ""
    several = any(table["session"].nunique() > 1 for table in tables.values())
    explain(
        figure,
        "Line: mean over the images." if middle else "",
        "Darker band: from the 20 % to the 80 % quantile; paler: from 1 % to 99 %.",
        "All are medians of the sessions." if several else "",
        dashed,
        beyond(cut),
    )
    return figure


def over_steps(table: Table, column: str) -> tuple[Floats, Floats]:
    """Steps, and the 20, 50 and 80 % quantiles of channels and sessions: (steps,) and (steps, 3)."""
    known = table[table[column].notna()]
    found = known.groupby("step")[column].quantile(np.array([0.2, 0.5, 0.8])).unstack()
    return found.index.to_numpy(float), found.to_numpy(float)


def of_sessions(table: Table, column: str) -> tuple[Floats, Floats]:
    """Steps, and the mean, least and greatest of the sessions: (steps,) and (3, steps)."""
    found = table[table[column].notna()].groupby("step")[column].agg(["mean", "min", "max"])
    return found.index.to_numpy(float), found.to_numpy(float).T


def at_evaluations(table: Table, by: str, columns: Sequence[str]) -> tuple[Floats, Floats]:
    """Evaluations, and the sessions' median of each column: (evaluations,) and (columns, evaluations)."""
    found = table.groupby(by)[list(columns)].median()
    return found.index.to_numpy(float), found.to_numpy(float).T


def evaluations(tables: Iterable[Table]) -> str:
    """What tells evaluations apart: the epoch, or the step where one epoch has several."""
    return "step" if any(t.duplicated(["session", "epoch"]).any() for t in tables) else "epoch"


def span_of(values: Floats) -> Span:
    """The least and the greatest that is finite; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)


def end_scale(axes: Axes, spans: Mapping[str, Span]) -> list[str]:
    """End the y axis where the usual arms do; returns those that go far beyond."""
    widths = {arm: high - low for arm, (low, high) in spans.items() if math.isfinite(high - low)}
    usual = FAR * float(np.median(list(widths.values()))) if widths else 0.0
    cut = [arm for arm, size in widths.items() if size > usual > 0]
    if cut:
        low = min(spans[arm][0] for arm in widths if arm not in cut)
        high = max(spans[arm][1] for arm in widths if arm not in cut)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    return cut


def beyond(cut: Iterable[str]) -> str:
    """A sentence where a scale ends before some arms do."""
    names = ", ".join(cut)
    return f"Scales end where those of most arms do; beyond: {names}." if names else ""


def width_of(place: int, count: int) -> float:
    """Points: the first lines are the widest, so that equal ones that lie over them leave them seen."""
    return 1.3 if count == 1 else 2.8 - 1.7 * place / (count - 1)


def spread(items: Sequence[T], most: int) -> list[T]:
    """All of some items, or `most` of them, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def counted(tables: Iterable[Table]) -> str:
    """`n = 3 sessions an arm`, or which session it is."""
    names = [set(table["session"]) for table in tables]
    if max(map(len, names)) > 1:
        return spoken([len(own) for own in names], "sessions an arm" if len(names) > 1 else "sessions")
    every = set.union(*names)
    return f"session {every.pop()}" if len(every) == 1 else "one session an arm"


def ending(tables: Tables, columns: Sequence[str]) -> str:
    """The last traced values, in words; of several channels and sessions their median."""
    said = []
    for arm, table in tables.items():
        last = table[table["step"] == table["step"].max()]
        values = [f"{c} {last[c].median():.3g}" for c in columns if last[c].notna().any()]
        said += [f"{arm} {', '.join(values)}"] if values else []
    return "At the end: " + "; ".join(said)
