"""The look that all figures share: palette, panels, bands, legend, title, caption, and SVG of equal bytes.

A figure is made so many inches wide: WIDTH for a desk, PHONE for a telephone; below NARROW its panels and
words are arranged for the latter. The height that `blank` gets is that of the panels; title, legend and
caption are put around them when it is saved.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from numpy.typing import NDArray

from normbench.plan import write_whole

DPI = 150
WIDTH, NARROW, PHONE = 8.0, 6.0, 4.0  # inches
TALLEST = 400.0  # inches; Agg draws fewer than 2¹⁶ pixels
EDGE = 0.08  # inches around title, legend and caption

INK, SOFT, FAINT, BAND = "#222222", "#666666", "#dddddd", "#d9eaf7"
CYCLE = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b37a00", "#56b4e9",
         "#8450b3")  # after Okabe and Ito  # fmt: skip
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))  # a ninth arm has the first's colour
MARKS = "osD^v"
MOST_STEPS = 120  # points of a line

FONTS = re.compile(r"'DejaVu Sans'(?:, *(?:'[^']*'|[\w-]+))*")
UNUSED_ID = re.compile(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|[A-Z]\w*)_\d+"')
Floats = NDArray[np.float64]
Makes = Callable[[float], Figure | None]


@dataclass(frozen=True)
class Sketch:
    """A figure that is still to be drawn.

    Args:
        parts: the words of its file's name.
        make: draws it so many inches wide; None where there is nothing to draw.
        alt: what it shows, in words; the title is put before it.
        folded: in a page it is opened by who wants it.
    """

    parts: Sequence[str]
    make: Makes
    alt: str
    folded: bool = False


# --- palette: an arm has one colour everywhere, by its place in the tables, the baseline's is grey


def colour_of(place: int) -> str:
    """An arm's colour."""
    return CYCLE[place % len(CYCLE)]


def style_of(place: int) -> Any:
    """An arm's dashes."""
    return STYLES[place // len(CYCLE) % len(STYLES)]


def mark_of(place: int) -> str:
    """An arm's marker."""
    return MARKS[place // len(CYCLE) % len(MARKS)]


# --- axes


def blank(height: float, width: float = WIDTH) -> Figure:
    """An empty figure whose panels are so many inches high."""
    return Figure(figsize=(width, min(height, TALLEST)), dpi=DPI, layout="constrained", facecolor="white")


def is_narrow(axes: Axes) -> bool:
    """Whether the figure is for a telephone."""
    return axes.get_figure(root=True).get_figwidth() < NARROW  # type: ignore[union-attr]


def quiet(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    """A pale grid and no frame."""
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.grid(axis=grid, color=FAINT, linewidth=0.5)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=9)
        axis.get_offset_text().set(color=INK, fontsize=8.5)


def head(axes: Axes, words: str, **look: Any) -> None:
    """A panel's own title, above it on the left."""
    axes.set_title(words, loc="left", y=1.0, **{"fontsize": 9, "color": INK, **look})


def grid(titles: Sequence[str], width: float, height: float = 1.75,
         share: Literal["x", "y", "xy"] = "xy", most: int = 4) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure of titled panels, each so many inches high; at most `most` side by side, two where narrow."""
    n = len(titles)
    columns = min(n, 2 if width < NARROW else most)
    if width >= NARROW and n > most:  # rows of equal length
        columns = min(range(most, most // 2, -1), key=lambda c: (-n % c, -c))
    lines = math.ceil(n / columns)
    figure = blank(0.35 + height * lines, width)
    spots = figure.subplots(lines, columns, sharex="x" in share, sharey="y" in share, squeeze=False).ravel()
    for i, axes in enumerate(spots):
        if i >= n:
            axes.remove()
            continue
        quiet(axes, "both")
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.locator_params(axis="y", nbins=5)
        # not matplotlib's, whose common factor would lie on the title
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        if i >= n - columns:
            axes.tick_params(labelbottom=True)
        head(axes, wrapped(titles[i], int(11 * width / columns)))
    return figure, list(spots[:n])


def short(value: float) -> str:
    """`0.25`, `2e−6`."""
    return f"{value:.6g}".replace("e-0", "e-").replace("e+", "e").replace("e0", "e").replace("-", "−")


def below(axes: Sequence[Axes], words: str) -> None:
    """Name the x axis of the lowest panels; steps and epochs are whole."""
    columns = len({round(a.get_position().x0, 3) for a in axes})
    if words in ("step", "epoch", "epochs"):
        axes[0].locator_params(axis="x", integer=True)
    for a in axes[-columns:]:
        a.set_xlabel(words, fontsize=8.5)


# --- lines


def thin(n: int) -> NDArray[np.intp]:
    """At most MOST_STEPS of n positions, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_STEPS)).round().astype(np.intp))


def banded(axes: Axes, x: Floats, line: Floats | None, bands: Sequence[tuple[Floats, Floats]], place: int,
           pale: float = 0.13, **look: Any) -> None:  # fmt: skip
    """A line and the bands around it, the widest first and palest; what is not finite is a gap."""
    kept = thin(x.size)
    for i, (low, high) in enumerate(bands):
        there = np.isfinite(low[kept]) & np.isfinite(high[kept])
        if there.any():
            axes.fill_between(x[kept], low[kept], high[kept], where=there, color=colour_of(place),
                              alpha=pale * (1 + i), linewidth=0)  # fmt: skip
    if line is not None:
        y = np.where(np.isfinite(line), line, np.nan)[kept]
        marker = "o" if np.isfinite(y).sum() == 1 else ""
        shown = {"color": colour_of(place), "linestyle": style_of(place), "linewidth": 1.5, **look}
        axes.plot(x[kept], y, marker=marker, markersize=3.5, **shown)


# --- words


def wrapped(text: str, width: int = 28) -> str:
    """A text in lines of at most `width`, broken behind hyphens where it can be; `$` is no formula."""
    return textwrap.fill(text, width).replace("$", r"\$")


def spoken(sizes: Sequence[int], unit: str) -> str:
    """`n = 10 sessions an arm`, `n = 28 to 30 sessions an arm`."""
    low, high = min(sizes), max(sizes)
    return f"n = {low:,} {unit}" if low == high else f"n = {low:,} to {high:,} {unit}"


def entitle(figure: Figure, what: str, counts: str = "", group: str = "") -> None:
    """The title: what is shown, of which group, and n."""
    words = ", ".join(filter(None, [group, f"{what} ({counts})" if counts else what]))
    shown = wrapped(words, int(11 * figure.get_figwidth()))
    figure.text(0.01, 1, shown, ha="left", va="top", fontsize=11, fontweight="bold", color=INK,
                gid="title", label=words)  # fmt: skip


def explain(figure: Figure, *sentences: str) -> None:
    """How to read it, below."""
    words = " ".join(filter(None, sentences))
    shown = wrapped(words, int(16 * figure.get_figwidth()))
    figure.text(0.01, 0, shown, ha="left", va="bottom", fontsize=8, color=SOFT, gid="caption",
                label=words)  # fmt: skip


def aside(figure: Figure, words: str) -> None:
    """What the y axes of all panels show."""
    figure.supylabel(wrapped(words, 40), fontsize=9, color=INK).set_gid("side")


def words_of(figure: Figure) -> dict[str, Text]:
    """What `entitle` and `explain` have set, as `title` and `caption`; the labels are unbroken."""
    found = {str(text.get_gid()): text for text in figure.texts if text.get_text()}
    return {name: found[name] for name in ("title", "caption") if name in found}


def keys(labels: Sequence[str], places: Sequence[int] | None = None, boxes: bool = False) -> list[Artist]:
    """The legend's entries for arms at these places: lines, or boxes for bars and points."""
    made: list[Artist] = []
    for place, label in zip(range(len(labels)) if places is None else places, labels, strict=True):
        line = {"marker": "s", "markersize": 6, "linestyle": "", "markeredgewidth": 0} if boxes else {
            "linestyle": style_of(place), "linewidth": 2}  # fmt: skip
        made.append(key(label, color=colour_of(place), **line))
    return made


def key(label: str, **look: Any) -> Artist:
    """One entry of a legend."""
    return Line2D([], [], label=wrapped(label, 34), **look)


def legend(figure: Figure, entries: Sequence[Artist]) -> None:
    """Under the title, in as many columns as there is room for."""
    names = [str(entry.get_label()) for entry in entries]
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, min(len(names), int(figure.get_figwidth() * 12 / (longest + 6))))
    figure.legend(handles=list(entries), loc="upper left", bbox_to_anchor=(0, 1), ncols=columns,
                  frameon=False, fontsize=8.5, labelcolor=INK, handlelength=1.6, columnspacing=1.4,
                  borderpad=0, borderaxespad=0)  # fmt: skip


# --- files


def lay_out(figure: Figure) -> None:
    """Put title and legend above the panels and the caption below, the figure as much higher; once."""
    engine = figure.get_layout_engine()
    if not isinstance(engine, ConstrainedLayoutEngine):
        return
    words, boxes = words_of(figure), figure.legends
    title, caption = ([words[name]] if name in words else [] for name in ("title", "caption"))
    # inches
    tall = {part: part.get_window_extent().height / figure.dpi for part in (*title, *boxes, *caption)}
    over = sum(tall[part] for part in (*title, *boxes)) + EDGE * (1.4 * len(title) + 1.7 * len(boxes))
    under = sum(tall[part] + EDGE for part in caption)
    height = figure.get_figheight() + over + under
    figure.set_figheight(height)
    at = height - EDGE
    for part in title:
        part.set_y(at / height)
        at -= tall[part] + EDGE
    for box in boxes:
        box.set_bbox_to_anchor((0.01, at / height), figure.transFigure)
        at -= tall[box] + EDGE
    for part in caption:
        part.set_y(EDGE / height)
    for text in figure.texts:
        if text.get_gid() == "side":
            text.set_y((under + height - over) / 2 / height)
    engine.set(rect=(0, under / height, 1, 1 - (over + under) / height))
    engine.execute(figure)
    figure.set_layout_engine("none")


def svg_of(figure: Figure, name: str) -> str:
    """The figure as an SVG file, text as text, the same for equal figures; `name` makes its ids its own."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), any_letters():
        lay_out(figure)
        figure.patch.set_gid("paper")
        canvas: Any = FigureCanvasSVG(figure)  # by savefig everything would be drawn twice
        canvas.print_svg(file, metadata={"Date": None, "Creator": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.S)
    text = in_tags(FONTS, "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif", text)
    return re.sub(r"[ \t]+(?=\n)|^[ \t]+", "", in_tags(UNUSED_ID, "", text), flags=re.M)


@contextmanager
def any_letters() -> Iterator[None]:
    """No warning where the font that matplotlib measures by lacks letters; text is shown by the reader's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        yield


def in_tags(pattern: re.Pattern[str], by: str | Callable[[re.Match[str]], str], text: str) -> str:
    """Replace in the tags only: what a label says stays as it is."""
    return re.sub(r"<[^>]*>", lambda tag: pattern.sub(by, tag[0]), text)


def save_svg(figure: Figure, path: Path) -> Path:
    """Write an SVG whole or not at all."""
    write_whole(path, svg_of(figure, path.stem))
    return path


def save_png(figure: Figure, path: Path) -> Path:
    """Write a PNG whole or not at all."""
    image = io.BytesIO()
    lay_out(figure)
    figure.savefig(image, format="png", dpi=figure.dpi)
    write_whole(path, image.getvalue())
    return path


def save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Every figure as `<folder>/<name>.svg`."""
    return [save_svg(figure, folder / f"{name}.svg") for name, figure in figures.items()]


def safe_stem(parts: Sequence[str], taken: Collection[str] = ()) -> str:
    """A file's name without its ending: words of letters and digits, numbered where it is taken."""
    words = [re.sub(r"[^\w.+]+", "-", part)[:60].strip("-.") for part in parts]
    stem = "-".join(filter(None, words))
    name, copy = stem, 1
    while name.lower() in taken:
        copy += 1
        name = f"{stem}-{copy}"
    return name
