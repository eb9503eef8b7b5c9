"""Learning curves: every arm's sessions over the epochs, as median, middle and range."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from normbench.csv_files import read_together
from normbench.figures import SOFT, Floats, banded, below, entitle, explain, grid, spoken
from normbench.report.study import ArmFiles
from normbench.stats.tables import some

SHOWN = {"test_acc": "test accuracy (fraction)", "val_acc": "validation accuracy (fraction)",
         "train_loss": "training loss (nats)"}  # fmt: skip
DECADE = 10.0  # a loss that falls by less is drawn on a linear scale
QUANTILES = (0.0, 0.2, 0.5, 0.8, 1.0)
Curves = Mapping[str, pd.DataFrame]


def read_curves(arms: Sequence[ArmFiles], notices: list[str]) -> Curves:
    """arm → the rows of all its sessions' epochs.csv, those that run too; a file that is none is a notice."""
    found = {}
    for arm in arms:
        files = {folder.name: folder / "epochs.csv" for folder in arm.sessions}
        table = read_together(files, ["epoch"], list(SHOWN), notices=notices)
        nothing = pd.DataFrame(columns=["epoch", "session", *SHOWN], dtype=float)
        found[arm.label] = nothing if table is None else table
    return found


def quantiles_of(table: pd.DataFrame, column: str) -> tuple[Floats, Floats]:
    """Epochs, and of each the sessions' quantiles: (epochs,) and (epochs, 5)."""
    if column not in table:
        return np.empty(0), np.empty((0, len(QUANTILES)))
    values = table[np.isfinite(table[column])]
    by_epoch = values.groupby("epoch")[column].quantile(list(QUANTILES)).unstack()
    return by_epoch.index.to_numpy(float), by_epoch.to_numpy(float).reshape(-1, len(QUANTILES))


def curves_figure(curves: Curves, column: str, title: str, width: float) -> Figure | None:
    """A panel per arm, the first arm's median in each; None where no session has the column."""
    lines = {arm: quantiles_of(table, column) for arm, table in curves.items()}
    shown = {arm: line for arm, line in lines.items() if line[0].size}
    if not shown:
        return None
    figure, panels = grid(list(shown), width)
    first, (x0, y0) = next(iter(shown.items()))
    for axes, (arm, (x, y)) in zip(panels, shown.items(), strict=True):
        place = list(curves).index(arm)
        banded(axes, x, y[:, 2], [(y[:, 0], y[:, 4]), (y[:, 1], y[:, 3])], place)
        if arm != first:
            axes.plot(x0, y0[:, 2], color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
    if column.endswith("_loss"):
        lowest = min(float(y.min()) for _, y in shown.values())
        highest = max(float(y.max()) for _, y in shown.values())
        if highest > DECADE * lowest > 0:
            panels[0].set_yscale("log")
            steps = (1, 2, 5) if highest < DECADE**2 * lowest else (1,)
            for axes in panels:
                axes.yaxis.set_major_locator(LogLocator(subs=steps))
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.minorticks_off()
    below(panels, "epoch")
    sizes = [curves[arm]["session"].nunique() for arm in shown]
    entitle(figure, f"{SHOWN[column]} over the epochs", spoken(sizes, "sessions an arm"), title)
    nothing = [arm for arm, table in curves.items() if arm not in shown and len(table)]
    grey = f" Dashed: the median of {first}." if len(shown) > 1 else ""
    explain(figure, f"Line: median of the sessions; darker band: the middle 60 %; paler: all of them.{grey}",
            "The scale is logarithmic." if panels[0].get_yscale() == "log" else "",
            f"No finite value: {some(nothing)}." if nothing else "")  # fmt: skip
    return figure


def curves_words(curves: Curves, column: str) -> str:
    """Where the curves end, in words."""
    ends = {arm: y[-1] for arm, table in curves.items() if (y := quantiles_of(table, column)[1]).size}
    return "At the last epoch: " + "; ".join(
        f"{arm} median {y[2]:.4g}, {y[0]:.4g} to {y[4]:.4g}" for arm, y in ends.items()
    )
