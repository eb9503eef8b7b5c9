"""The confusion matrix as a figure: counts, shaded by their share of the true class."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from normbench.figures import BAND, CYCLE, INK, SOFT, blank, entitle

COUNTED = 20  # classes up to which every cell says its count
NAMED = 40  # classes up to which every class is named
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", BAND, CYCLE[1], "#003a5c"])


def confusion_figure(confusion: npt.NDArray[np.int64], names: Sequence[str], title: str) -> Figure:
    """A matrix of counts (classes, classes), a row a true class, a column a predicted one."""
    count = len(names)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(max(0.42 * count, 3.2), 9.0)
    figure = blank(side + 0.7, side + 2.0)
    axes = figure.subplots()
    # a power lifts the few confusions above white
    image = axes.imshow(shares, cmap=SHADES, norm=mpl.colors.PowerNorm(0.5, 0, 1), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"], color=SOFT)
    bar.set_label("share of the true class", color=SOFT)
    bar.outline.set_visible(False)
    if count <= COUNTED:
        for (row, column), n in np.ndenumerate(confusion):
            if n:
                ink = "white" if shares[row, column] > 0.3 else INK
                axes.text(column, row, f"{n:,}", ha="center", va="center", color=ink, fontsize=8)
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#eeeeee", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    if count <= NAMED:
        long = max(map(len, names)) > 2
        axes.set_xticks(range(count), names, rotation=90 if long else 0, color=SOFT, parse_math=False)
        axes.set_yticks(range(count), names, color=SOFT, parse_math=False)
    axes.tick_params(which="major", length=0)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.spines[:].set_visible(False)
    entitle(figure, title)
    return figure
