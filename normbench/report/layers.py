"""A profile of norm layers, from its folder: times by layer, bytes against a copy, shares of a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from normbench.report.panels import below, colour_of, grid, legend, style_of
from normbench.stats.figures import INK, NARROW, SOFT, blank, entitle, explain, quiet, wrapped
from normbench.values import Refused

NEEDED = ("arm", "layer", "layer_index", "place", "forward_median_s", "forward_p20_s", "forward_p80_s",
          "backward_median_s", "backward_p20_s", "backward_p80_s")  # fmt: skip
MOST_BARS = 14  # layers; of more there are lines
PLACES = {"alone": "alone", "model": "inside the running model"}
STEPS = {"step_median_s": "step (s)", "without_norms_median_s": "without norms (s)",
         "norm_share_by_difference": "norms' share, by the difference",
         "norm_share_by_layers": "norms' share, by the layers", "agrees": "agree"}  # fmt: skip
TIMES = {"forward_median_s": "forward (ms)", "backward_median_s": "backward (ms)",
         "forward_gb_per_s": "forward (GB/s)", "backward_gb_per_s": "backward (GB/s)",
         "copy_gb_per_s": "a copy (GB/s)", "peak_memory_mib": "peak memory (MiB)",
         "share_of_step": "share of step"}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """A profile's tables: a row per arm, layer and place; a row per arm."""

    folder: Path
    layers: pd.DataFrame
    steps: pd.DataFrame | None

    @property
    def arms(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(self.layers["arm"]))

    @property
    def where(self) -> str:
        """On what it was measured."""
        row = self.layers.iloc[0]
        known = {c: str(row[c]) for c in self.layers.columns if pd.notna(row[c])}
        said = [known.get("model"), f"batch {known['batch_size']}" if "batch_size" in known else None,
                known.get("precision"), known.get("device_name"),
                f"threads {known['threads']}" if "threads" in known else None,
                f"torch {known['torch_version']}" if "torch_version" in known else None]  # fmt: skip
        return ", ".join(filter(None, said))


def profile_of(study: Path, given: Path | None, notices: list[str]) -> Profile | None:
    """The profile asked for, else the newest of the study's own; None where there is none.

    Raises: Refused where the one asked for cannot be read; another is a notice.
    """
    if given is not None:
        return read_profile(given)
    found = sorted((study / "profile").glob("*/layers.csv"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        return None
    try:
        return read_profile(found[-1].parent)
    except Refused as refused:
        notices.append(str(refused))
        return None


def check_profile(folder: Path) -> None:
    """Refuse a folder that holds no profile."""
    if not (folder / "layers.csv").is_file():
        raise Refused(f"--profile {folder}: no layers.csv there; give a folder that `profile` wrote")


def read_profile(folder: Path) -> Profile:
    """A profile's folder; Refused where layers.csv is not what `profile` writes."""
    check_profile(folder)
    layers, steps = read_csv(folder / "layers.csv"), None
    missing = [column for column in NEEDED if column not in layers]
    if missing:
        raise Refused(
            f"{folder / 'layers.csv'}: no column {missing[0]!r}; give a folder that `profile` wrote"
        )
    if layers.empty:
        raise Refused(f"{folder / 'layers.csv'} has no rows")
    numbers = [
        "layer_index",
        *(c for c in map(str, layers) if c.endswith(("_s", "_bytes", "_mib")) or c in TIMES),
    ]
    for column in numbers:
        layers[column] = pd.to_numeric(layers[column], errors="coerce")
    for column in ("arm", "layer", "place"):
        layers[column] = layers[column].astype(str)
    if (folder / "steps.csv").is_file():
        steps = read_csv(folder / "steps.csv")
    return Profile(folder, layers, steps if steps is not None and "arm" in steps else None)


def read_csv(path: Path) -> pd.DataFrame:
    """A table; Refused in one line where it is none."""
    try:
        return pd.read_csv(path)
    except (ValueError, pd.errors.ParserError) as error:
        raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def times_figure(profile: Profile, place: str, width: float) -> Figure | None:
    """Forward and backward time of every norm layer, arm beside arm."""
    rows = profile.layers[profile.layers["place"] == place]
    rows = rows[rows[["forward_median_s", "backward_median_s"]].notna().any(axis=1)]
    if rows.empty:
        return None
    layers = list(dict.fromkeys(rows.sort_values("layer_index")["layer"]))
    few = len(layers) <= MOST_BARS
    figure, panels = bars(layers, len(profile.arms), width) if few else curves(width)
    for axes, phase in zip(panels, ("forward", "backward"), strict=True):
        axes.set_title(phase, loc="left", y=1.0, fontsize=9.5, color=INK)
        for i, arm in enumerate(profile.arms):
            (bar_arm if few else line_arm)(
                axes, rows[rows["arm"] == arm], layers, phase, i, len(profile.arms)
            )
    if not few:
        panels[0].set_ylabel("ms", fontsize=9)
        below(figure, panels, "norm layer, in the model's order")
    legend(figure, profile.arms, width)
    entitle(figure, "", f"norm layers {PLACES.get(place, place)}", f"n = {len(layers)} layers")
    explain(figure, f"{profile.where}. Median time of a call, and from its 20 % to its 80 % quantile.",
            "" if few else "The scale is logarithmic.")  # fmt: skip
    return figure


def bars(layers: Sequence[str], arms: int, width: float) -> tuple[Figure, list[Axes]]:
    """Panels for horizontal bars: side by side, or where it is narrow below each other."""
    high = 0.16 + 0.085 * arms * len(layers) + 0.1 * len(layers)
    narrow = width < NARROW
    figure = blank(1.5 + high * (2 if narrow else 1) + 0.35 * narrow, width)
    panels = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True, squeeze=False).ravel()
    for axes in panels:
        quiet(axes, "x")
        axes.set_yticks(range(len(layers)), [wrapped(layer, 24) for layer in layers])
        axes.set_ylim(len(layers) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("ms", fontsize=8.5)
    return figure, list(panels)


def curves(width: float) -> tuple[Figure, list[Axes]]:
    """Panels for lines over many layers."""
    figure, panels = grid(["forward", "backward"], width, 2.4, 1.5, most=2)
    panels[0].set_yscale("log")
    for axes in panels:
        axes.minorticks_off()
    return figure, panels


def bar_arm(axes: Axes, rows: pd.DataFrame, layers: Sequence[str], phase: str, place: int, arms: int) -> None:
    """One arm's bars, each with a whisker."""
    thick = 0.8 / arms
    at = np.array([layers.index(layer) for layer in rows["layer"]], float) - 0.4 + thick * (place + 0.5)
    middle, low, high = (1e3 * rows[f"{phase}_{q}_s"].to_numpy(float) for q in ("median", "p20", "p80"))
    axes.barh(at, np.nan_to_num(middle), thick * 0.86, color=colour_of(place), linewidth=0)
    axes.hlines(at, low, high, color=INK, linewidth=0.8)


def line_arm(
    axes: Axes, rows: pd.DataFrame, layers: Sequence[str], phase: str, place: int, arms: int
) -> None:
    """One arm over the layers."""
    rows = rows.sort_values("layer_index")
    x = np.array([layers.index(layer) for layer in rows["layer"]], float)
    middle, low, high = (1e3 * rows[f"{phase}_{q}_s"].to_numpy(float) for q in ("median", "p20", "p80"))
    axes.fill_between(x, low, high, color=colour_of(place), alpha=0.18, linewidth=0)
    axes.plot(x, middle, style_of(place), color=colour_of(place), linewidth=1.2)


def roofline_figure(profile: Profile, width: float) -> Figure | None:
    """How fast every layer moves the bytes it must, against a copy of as many in the same run."""
    rows = profile.layers[profile.layers["place"] == "alone"]
    wanted = [f"{phase}_{what}" for phase in ("forward", "backward") for what in ("bytes", "gb_per_s")]
    if rows.empty or any(column not in rows for column in wanted) or rows[wanted].isna().all(axis=None):
        return None
    figure, panels = grid(["forward", "backward"], width, 2.7, 1.5, most=2)
    for axes, phase in zip(panels, ("forward", "backward"), strict=True):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=5))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        mib = rows[f"{phase}_bytes"] / 2**20
        if "copy_gb_per_s" in rows and rows["copy_gb_per_s"].notna().any():
            roof = rows["copy_gb_per_s"].groupby(mib).median()
            axes.plot(roof.index, roof.to_numpy(float), "_--", color=SOFT, linewidth=1.2)
        for i, arm in enumerate(profile.arms):
            of_arm = rows[rows["arm"] == arm]
            axes.plot(of_arm[f"{phase}_bytes"] / 2**20, of_arm[f"{phase}_gb_per_s"], "os^Dv"[i // 7 % 5],
                      color=colour_of(i), alpha=0.75, markersize=5, markeredgewidth=0)  # fmt: skip
        axes.set_ylim(0, None)
    panels[0].set_ylabel("GB/s", fontsize=9)
    below(figure, panels, "bytes the algorithm must move (MiB)")
    legend(figure, profile.arms, width)
    entitle(figure, "", "norm layers alone against a copy", f"n = {rows['layer'].nunique()} layers")
    point = "A point per layer: the bytes it must move by its median time. Dashed: a copy in the same run."
    explain(figure, f"{profile.where}. {point}")
    return figure


def times_words(profile: Profile, place: str) -> str:
    """Every arm's layers together, in words."""
    rows = profile.layers[profile.layers["place"] == place]
    sums = rows.groupby("arm", sort=False)[["forward_median_s", "backward_median_s"]].sum() * 1e3
    return "All layers together: " + "; ".join(
        f"{arm} {forward:.3g} ms forward, {backward:.3g} ms backward"
        for arm, (forward, backward) in zip(sums.index, sums.to_numpy(float), strict=True)
    )


def cell(value: object) -> str:
    """A value of a table."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def layer_rows(profile: Profile) -> tuple[list[str], list[list[str]]]:
    """layers.csv for reading: times in ms."""
    columns = [c for c in TIMES if c in profile.layers]
    head = [
        "layer",
        "arm",
        "where",
        *(["shape"] if "shape" in profile.layers else []),
        *(TIMES[c] for c in columns),
    ]
    rows = []
    for _, row in profile.layers.iterrows():
        shape = [str(row["shape"])] if "shape" in profile.layers else []
        values = [cell(1e3 * row[c] if c.endswith("median_s") else row[c]) for c in columns]
        rows.append([row["layer"], row["arm"], row["place"], *shape, *values])
    return head, rows


def step_rows(profile: Profile) -> tuple[list[str], list[list[str]]]:
    """steps.csv for reading."""
    if profile.steps is None:
        return [], []
    columns = [c for c in STEPS if c in profile.steps]
    rows = [[str(row["arm"]), *(cell(row[c]) for c in columns)] for _, row in profile.steps.iterrows()]
    return ["arm", *(STEPS[c] for c in columns)], rows
