"""Figures of traces, from the CSV files: statistics over steps, quantiles and peaks over epochs.

Each `…_figure` takes frames by label, an arm's or a session's, as `read` gives them, and returns a matplotlib
`Figure`, or None where there is nothing to draw. Of several sessions the mean is drawn, and a band from the
least to the greatest.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normbench.identity import short_names
from normbench.plan import write_whole
from normbench.results import session_names
from normbench.stats.figures import CYCLE, INK, explain, quiet, wrapped

MOST_LAYERS = 4  # side by side; more would be too narrow to read
MOST_LINES = 6
COLORS = CYCLE[1:]
PANELS = {  # column → how a reader calls it, and the column drawn dashed beside it
    "batch_mean": ("mean", "running_mean"),
    "batch_std": ("std", "running_std"),
    "weight": ("weight (γ)", None),
    "bias": ("bias (β)", None),
    "weight_grad": ("gradient of γ", None),
    "bias_grad": ("gradient of β", None),
}
QUANTILE_BANDS = (("q01", "q99", 0.18), ("q20", "q80", 0.4))
Frames = Mapping[str, pd.DataFrame]
T = TypeVar("T")


def read(study: Path, kind: str) -> dict[str, pd.DataFrame]:
    """One kind of trace of a study's sessions, by arm: the file's columns and `session`, its folder's name.

    Args:
        kind: norms, features or logits.
    Returns: an arm without such a file is not there; a file that cannot be read is passed over.
    """
    parts: dict[str, list[pd.DataFrame]] = {}
    for name in session_names(study):
        setting, session = name.split("/")
        try:
            frame = pd.read_csv(study / name / "traces" / f"{kind}.csv")
        except (OSError, ValueError):  # none, or half a line of one that is being written
            continue
        parts.setdefault(setting, []).append(frame.assign(session=session))
    labels = short_names({setting: setting.rpartition("-")[0] for setting in parts})
    return {labels[setting]: pd.concat(frames, ignore_index=True) for setting, frames in parts.items()}


def norms_figure(frame: pd.DataFrame, title: str) -> Figure | None:
    """One arm or session: mean, std, γ and β of the traced channels of each layer over the steps."""
    lines = by_rank(frame)
    note = "" if len(lines) < 2 else "Lines are the traced channels of each layer, in their order."
    return grid(lines, f"{title}: norm layers", note)


def norms_by_arm_figure(frames: Frames) -> Figure | None:
    """Several arms beside each other: the last traced channel of each layer over the steps."""
    lines = {label: last_channel(frame) for label, frame in frames.items()}
    return grid(lines, "Norm layers by arm", "Of each layer its last traced channel.")


def by_rank(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The first, second, … traced channel of every layer."""
    if frame.empty:
        return {}
    rank = frame.groupby("layer")["channel"].rank("dense").astype(int)
    same = bool((frame.groupby(rank)["channel"].nunique() == 1).all())
    lines = {}
    for place in spread(sorted(rank.unique()), MOST_LINES):
        own = frame[rank == place]
        lines[f"channel {own['channel'].iloc[0]}" if same else f"traced channel {place}"] = own
    return lines


def last_channel(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each layer the rows of its last traced channel."""
    return frame[frame["channel"] == frame.groupby("layer")["channel"].transform("max")]


def grid(lines: Frames, title: str, note: str) -> Figure | None:
    """Quantities downwards, layers across, a line a label over the steps."""
    lines = {label: with_running_std(frame) for label, frame in lines.items() if len(frame)}
    every = pd.concat(lines.values()) if lines else pd.DataFrame()
    panels = [name for name in PANELS if name in every and every[name].notna().any()]
    if not panels:
        return None
    there = [
        layer
        for layer in dict.fromkeys(every["layer"])
        if every.loc[every["layer"] == layer, panels].notna().any(axis=None)
    ]
    layers = spread(there, MOST_LAYERS)
    figure = Figure(figsize=(2.0 + 2.7 * len(layers), 1.2 + 1.55 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(layers), sharex=True, squeeze=False)
    for column, layer in enumerate(layers):
        axes[0, column].set_title(wrapped(layer, 34), fontsize=9.5, color=INK, loc="left")
        axes[-1, column].set_xlabel("step", fontsize=9)
        for row, name in enumerate(panels):
            dashed = PANELS[name][1]
            for color, (label, frame) in zip(colors(len(lines)), lines.items(), strict=True):
                own = frame[frame["layer"] == layer]
                line(axes[row, column], own, "step", name, color, label)
                if dashed:
                    line(axes[row, column], own, "step", dashed, color, None)
            finish(axes[row, column])
    for row, name in enumerate(panels):
        axes[row, 0].set_ylabel(PANELS[name][0], fontsize=9, color=INK)
    head(figure, title, axes[0, 0], len(lines))
    running = "Solid: of the batch; dashed: running." if {"batch_mean", "batch_std"} & set(panels) else ""
    left_out = f"{len(layers)} of {len(there)} layers." if len(there) > len(layers) else ""
    explain(figure, note, running, of_sessions(every), left_out)
    return figure


def features_figure(frames: Frames, title: str = "Quantiles of the features") -> Figure | None:
    """Arms or sessions downwards, layers across: the 1 to 99 % and 20 to 80 % bands over the epochs."""
    frames = {label: frame[frame["q20"].notna()] for label, frame in frames.items()}
    frames = {label: frame for label, frame in frames.items() if len(frame)}
    if not frames:
        return None
    every = pd.concat(frames.values())
    there = list(dict.fromkeys(every["layer"]))
    layers = spread(there, MOST_LAYERS)
    figure = Figure(figsize=(2.0 + 2.7 * len(layers), 1.3 + 1.7 * len(frames)), layout="constrained")
    axes = figure.subplots(len(frames), len(layers), sharex=True, sharey="col", squeeze=False)
    for row, (label, frame) in enumerate(frames.items()):
        axes[row, 0].set_ylabel(wrapped(label, 24), fontsize=9, color=INK)
        for column, layer in enumerate(layers):
            at = axes[row, column]
            mean = frame[frame["layer"] == layer].groupby("step").mean(numeric_only=True)
            for low, high, alpha in QUANTILE_BANDS:
                at.fill_between(
                    mean["epoch"], mean[low], mean[high], color=COLORS[0], alpha=alpha, linewidth=0
                )
            for name in ("q20", "q80"):
                at.plot(mean["epoch"], mean[name], color=COLORS[0], linewidth=1.1, **marked(mean))
            finish(at)
            if row == 0:
                at.set_title(wrapped(layer, 34), fontsize=9.5, color=INK, loc="left")
    for at in axes[-1]:
        at.set_xlabel("epoch", fontsize=9)
    head(figure, title, axes[0, 0], 1)
    part = "validation" if set(every["part"]) == {"val"} else "test"
    left_out = f"{len(layers)} of {len(there)} layers." if len(there) > len(layers) else ""
    bands = f"Dark: 20 to 80 % of the values over the {part} set; light: 1 to 99 %."
    explain(figure, bands, "Means of the sessions' quantiles." if sessions_of(every) > 1 else "", left_out)
    return figure


def logits_figure(frames: Frames, title: str = "The largest logit of an image") -> Figure | None:
    """One panel, a line an arm or session: the mean over images at each epoch, the 20 to 80 % band."""
    frames = {label: frame[frame["peak_mean"].notna()] for label, frame in frames.items()}
    frames = {label: frame for label, frame in frames.items() if len(frame)}
    if not frames:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for color, (label, frame) in zip(colors(len(frames)), frames.items(), strict=True):
        mean = frame.groupby("step").mean(numeric_only=True)
        axes.fill_between(
            mean["epoch"], mean["peak_q20"], mean["peak_q80"], color=color, alpha=0.15, linewidth=0
        )
        axes.plot(
            mean["epoch"], mean["peak_mean"], color=color, linewidth=1.4, label=wrapped(label), **marked(mean)
        )
    finish(axes)
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_ylabel("logit", fontsize=9, color=INK)
    head(figure, title, axes, len(frames))
    explain(
        figure,
        "Line: mean over the images; band: 20 to 80 % of them.",
        of_sessions(pd.concat(frames.values()), ""),
    )
    return figure


def line(axes: Axes, frame: pd.DataFrame, x: str, y: str, color: str, label: str | None) -> None:
    """The sessions' mean of y, with a band from least to greatest; dashed and plain without a label."""
    known = frame[frame[y].notna()]
    if known.empty:
        return
    by_step = known.groupby(x)[y].agg(["mean", "min", "max"])
    style: dict[str, Any]
    style = {"linewidth": 1.3, **marked(by_step)} if label else {"linewidth": 1.0, "linestyle": (0, (4, 2))}
    axes.plot(by_step.index, by_step["mean"], color=color, label=wrapped(label) if label else None, **style)
    if label and sessions_of(known) > 1:
        axes.fill_between(by_step.index, by_step["min"], by_step["max"], color=color, alpha=0.15, linewidth=0)


def with_running_std(frame: pd.DataFrame) -> pd.DataFrame:
    """The running variance's root, to lie over the batch's std."""
    return frame.assign(running_std=np.sqrt(frame["running_var"].clip(lower=0)))


def marked(frame: pd.DataFrame) -> dict[str, Any]:
    """Few points are shown as such; one alone is no line."""
    return {"marker": "o", "markersize": 3} if len(frame) < 12 else {}


def finish(axes: Axes) -> None:
    """The shared look."""
    quiet(axes, "y")
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=5, integer=True)


def head(figure: Figure, title: str, axes: Axes, lines: int) -> None:
    """The title, and a legend where there is more than one line."""
    figure.suptitle(wrapped(title, 80), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    if lines > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=INK)


def colors(count: int) -> list[str]:
    """One a line, again from the first where there are more."""
    return [COLORS[i % len(COLORS)] for i in range(count)]


def spread(items: Sequence[T], most: int) -> list[T]:
    """All of some items, or `most` of them, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def sessions_of(frame: pd.DataFrame) -> int:
    """How many sessions' rows a frame holds."""
    return int(frame["session"].nunique()) if "session" in frame else 1


def of_sessions(frame: pd.DataFrame, band: str = "; band: least to greatest") -> str:
    """What a line is where there are several sessions."""
    n = sessions_of(frame)
    return f"Mean of {n} sessions{band}." if n > 1 else ""


def figures_of(study: Path, session: str | None = None) -> dict[str, Figure]:
    """Every figure there is data for, by a name that is safe for files.

    Args:
        session: of this one alone, `s3`; None: of all of an arm together.
    """
    norms, features, logits = (read(study, kind) for kind in ("norms", "features", "logits"))
    if session:
        norms, features, logits = (
            {label: own for label, frame in frames.items() if len(own := frame[frame["session"] == session])}
            for frames in (norms, features, logits)
        )
    drawn: dict[str, Figure | None] = {
        f"{label}-norms": norms_figure(frame, label) for label, frame in norms.items()
    }
    if len(norms) > 1:
        drawn["arms-norms"] = norms_by_arm_figure(norms)
    drawn["arms-features"] = features_figure(features)
    drawn["arms-logits"] = logits_figure(logits)
    ending = f"-{session}" if session else ""
    return {f"traces-{name}{ending}": figure for name, figure in drawn.items() if figure is not None}


def svg_of(figure: Figure) -> str:
    """The figure as SVG, the same text every time."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "normbench"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw(study: Path, session: str | None = None) -> list[Path]:
    """Save every figure as SVG under `study/figures`; returns their paths."""
    paths = []
    for name, figure in figures_of(study, session).items():
        path = study / "figures" / f"{name.replace('/', '_')}.svg"
        write_whole(path, svg_of(figure))
        paths.append(path)
    return paths
