"""What the report's own figures share: a grid of panels, a colour per arm, a line with its bands."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from normbench.stats.figures import CYCLE, INK, NARROW, blank, quiet, wrapped

Floats = NDArray[np.float64]
Style = Literal["-", "--", ":", "-."]
STYLES: tuple[Style, ...] = ("-", "--", ":", "-.")  # an eighth arm has the first's colour, and other dashes
MOST_STEPS = 120  # points of a line


def colour_of(place: int) -> str:
    """An arm's colour, by its place in the tables."""
    return CYCLE[place % len(CYCLE)]


def style_of(place: int) -> Style:
    """An arm's dashes."""
    return STYLES[place // len(CYCLE) % len(STYLES)]


def grid(titles: Sequence[str], width: float, height: float = 1.75, extra: float = 1.1, share: bool = True,
         most: int = 4) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure of titled panels, each so many inches high; at most `most` side by side, two where narrow."""
    n = len(titles)
    columns = min(n, 2 if width < NARROW else most)
    if width >= NARROW and n > most:  # rows of equal length
        columns = min(range(most, most // 2, -1), key=lambda c: (-n % c, -c))
    lines = math.ceil(n / columns)
    figure = blank(extra + height * lines, width)
    spots = figure.subplots(lines, columns, sharex=True, sharey=share, squeeze=False).ravel()
    for i, axes in enumerate(spots):
        if i >= n:
            axes.remove()
            continue
        quiet(axes, "both")
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        if i >= n - columns:
            axes.tick_params(labelbottom=True)
        axes.set_title(
            wrapped(titles[i], int(11 * width / columns)), loc="left", y=1.0, fontsize=9, color=INK
        )
    return figure, list(spots[:n])


def below(figure: Figure, axes: Sequence[Axes], words: str) -> None:
    """Name the x axis of the lowest panels."""
    columns = len({round(a.get_position().x0, 3) for a in axes})
    for a in axes[-columns:]:
        a.set_xlabel(words, fontsize=8.5)


def thin(n: int) -> NDArray[np.intp]:
    """At most MOST_STEPS of n positions, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_STEPS)).round().astype(np.intp))


def banded(axes: Axes, x: Floats, line: Floats, bands: Sequence[tuple[Floats, Floats]], place: int,
           pale: float = 0.13) -> None:  # fmt: skip
    """A line and the bands around it, the widest first and palest."""
    kept = thin(x.size)
    for i, (low, high) in enumerate(bands):
        axes.fill_between(x[kept], low[kept], high[kept], color=colour_of(place), alpha=pale * (1 + i),
                          linewidth=0)  # fmt: skip
    marker = "o" if kept.size == 1 else ""
    axes.plot(x[kept], line[kept], style_of(place), marker=marker, markersize=3.5, color=colour_of(place),
              linewidth=1.5)  # fmt: skip


def legend(figure: Figure, labels: Sequence[str], width: float) -> None:
    """The arms' colours, under the title."""
    handles = [
        Line2D([], [], color=colour_of(i), linestyle=style_of(i), linewidth=2) for i in range(len(labels))
    ]
    names = [wrapped(label, 34) for label in labels]
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, min(len(labels), int(width * 12 / (longest + 6))))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5,
                  labelcolor=INK, handlelength=1.6, columnspacing=1.4, borderaxespad=0.2)  # fmt: skip
