"""What was traced inside sessions: statistics and parameters of norm layers, features, logits.

Read from the first session of each arm that has `traces/`; a look inside one session, and no evidence
about an arm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normbench.report.panels import Floats, banded, below, colour_of, grid, legend
from normbench.report.study import ArmFiles
from normbench.stats.figures import entitle, explain

NORMS = {
    "batch_mean": "batch mean", "batch_std": "batch sd",
    "running_mean": "running mean", "running_var": "running variance",
    "weight": "weight", "bias": "bias", "weight_grad": "weight's gradient", "bias_grad": "bias's gradient",
}  # fmt: skip
QUANTILES = ("q01", "q20", "q80", "q99")
PEAKS = tuple(f"peak_{q}" for q in QUANTILES)
NEEDED = {
    "norms": ("step", "layer", "channel"),
    "features": ("epoch", "layer", *QUANTILES),
    "logits": ("epoch", *PEAKS),
}
TEXTS = ("layer", "part")
MOST_LAYERS = 3
Table = pd.DataFrame


@dataclass(frozen=True)
class Traces:
    """The traced tables by arm: `norms`, `features`, `logits`, and the session that each arm's are of."""

    norms: Mapping[str, Table]
    features: Mapping[str, Table]
    logits: Mapping[str, Table]
    sessions: Mapping[str, str]

    @property
    def empty(self) -> bool:
        """Whether nothing was traced."""
        return not (self.norms or self.features or self.logits)

    @property
    def source(self) -> str:
        """Which sessions they are of."""
        names = list(dict.fromkeys(self.sessions.values()))
        return f"Session {names[0]} of each arm." if len(names) == 1 else "One session of each arm."


def read_traces(arms: Sequence[ArmFiles], notices: list[str]) -> Traces:
    """The traces of every arm's first session that has any; a file that is none is a notice."""
    tables: dict[str, dict[str, Table]] = {name: {} for name in NEEDED}
    sessions = {}
    for arm in arms:
        folder = next((f / "traces" for f in arm.sessions if any((f / "traces").glob("*.csv"))), None)
        if folder is None:
            continue
        sessions[arm.label] = folder.parent.name
        for name, columns in NEEDED.items():
            table = read_table(folder / f"{name}.csv", columns, notices)
            if table is not None:
                tables[name][arm.label] = table
    return Traces(tables["norms"], tables["features"], tables["logits"], sessions)


def read_table(path: Path, columns: Sequence[str], notices: list[str]) -> Table | None:
    """One traced table; None where it is missing, has no row yet or cannot be read."""
    if not path.is_file():
        return None
    try:
        table = pd.read_csv(path)
        missing = [column for column in columns if column not in table]
        if missing:
            raise ValueError(f"no column {missing[0]!r}")
        for column in table.columns.difference(list(TEXTS)):
            table[column] = table[column].astype(float)
    except (ValueError, pd.errors.ParserError) as error:
        notices.append(f"{path} cannot be read: {str(error).splitlines()[0]}")
        return None
    if "layer" in table:
        table["layer"] = table["layer"].astype(str)
    return table if len(table) else None


def layers_of(tables: Mapping[str, Table]) -> list[str]:
    """The layers in their order; of more than three the first, middle and last."""
    found = list(dict.fromkeys(layer for table in tables.values() for layer in table["layer"].unique()))
    if len(found) <= MOST_LAYERS:
        return found
    return [found[0], found[len(found) // 2], found[-1]]


def of_layer(tables: Mapping[str, Table], layer: str) -> dict[str, Table]:
    """Every arm's rows of one layer."""
    return {arm: table[table["layer"] == layer] for arm, table in tables.items()}


def norms_figure(traces: Traces, layer: str, title: str, width: float) -> Figure | None:
    """A norm layer over the steps, a panel per quantity: the middle of its channels, arm by arm."""
    tables = of_layer(traces.norms, layer)
    shown = [c for c in NORMS if any(c in t and t[c].notna().any() for t in tables.values())]
    if not shown:
        return None
    figure, panels = grid([NORMS[column] for column in shown], width, share=False, extra=1.5)
    for axes, column in zip(panels, shown, strict=True):
        for place, table in enumerate(tables.values()):
            if column in table and table[column].notna().any():
                x, y = over(table, "step", column, (0.2, 0.5, 0.8))
                banded(axes, x, y[:, 1], [(y[:, 0], y[:, 2])], place, pale=0.2 / len(tables))
        axes.locator_params(axis="y", nbins=4)
    below(figure, panels, "step")
    legend(figure, list(tables), width)
    entitle(figure, title, f"norm layer {layer} over training", f"n = {channels_of(tables)}")
    explain(figure, f"{traces.source} Line: median of the channels; band: their middle 60 %.")
    return figure


def channels_of(tables: Mapping[str, Table]) -> str:
    """`64 channels`."""
    counts = [int(table["channel"].nunique()) for table in tables.values() if len(table)]
    return f"{max(counts)} channels"


def over(table: Table, by: str, column: str, quantiles: Sequence[float]) -> tuple[Floats, Floats]:
    """Steps, and the quantiles over all else: (steps,) and (steps, quantiles)."""
    found = table[table[column].notna()].groupby(by)[column].quantile(np.array(quantiles)).unstack()
    return found.index.to_numpy(float), found.to_numpy(float).reshape(-1, len(quantiles))


def features_figure(traces: Traces, layer: str, title: str, width: float) -> Figure | None:
    """Quantiles of a layer's output at every evaluation, a panel per arm."""
    tables = of_layer(traces.features, layer)
    return quantiles_figure(traces, tables, QUANTILES, f"values of {layer}", title, width)


def logits_figure(traces: Traces, title: str, width: float) -> Figure | None:
    """The largest logit of an image at every evaluation, a panel per arm."""
    return quantiles_figure(traces, traces.logits, PEAKS, "the largest logit of an image", title, width)


def quantiles_figure(traces: Traces, tables: Mapping[str, Table], columns: Sequence[str], what: str,
                     title: str, width: float) -> Figure | None:  # fmt: skip
    """The 1, 20, 80 and 99 % quantiles of something at every evaluation."""
    shown = {arm: table for arm, table in tables.items() if len(table)}
    if not shown:
        return None
    by = evaluations(shown)
    figure, panels = grid(list(shown), width)
    for axes, (arm, table) in zip(panels, shown.items(), strict=True):
        table = table.sort_values(by)
        x = table[by].to_numpy(float)
        q01, q20, q80, q99 = (table[q].to_numpy(float) for q in columns)
        color = colour_of(list(tables).index(arm))
        axes.fill_between(x, q01, q99, color=color, alpha=0.14, linewidth=0)
        axes.fill_between(x, q20, q80, color=color, alpha=0.3, linewidth=0)
        for values in (q20, q80):
            axes.plot(x, values, color=color, linewidth=1, marker="o" if x.size == 1 else "", markersize=3)
    below(figure, panels, by)
    parts = {str(part) for table in shown.values() if "part" in table for part in table["part"].unique()}
    entitle(figure, title, what, f"{', '.join(sorted(parts)) or 'evaluated'} images")
    explain(
        figure, traces.source, "Darker band: from the 20 % to the 80 % quantile; paler: from 1 % to 99 %."
    )
    return figure


def evaluations(tables: Mapping[str, Table]) -> str:
    """What tells evaluations apart: the epoch, or the step where one epoch has several."""
    several = any(table["epoch"].duplicated().any() for table in tables.values())
    return "step" if several and all("step" in table for table in tables.values()) else "epoch"


def traced_words(tables: Mapping[str, Table], columns: Sequence[str], by: str) -> str:
    """The last traced values, in words; of several channels their median."""
    said = []
    for arm, table in tables.items():
        last = table[table[by] == table[by].max()]
        values = [f"{c} {last[c].median():.3g}" for c in columns if c in last and last[c].notna().any()]
        said += [f"{arm} {', '.join(values)}"] if values else []
    return "At the end: " + "; ".join(said)
