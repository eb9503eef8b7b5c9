"""Matplotlib's figures as SVG: one file each to keep, and two to stand in a page, for a desk and a telephone.

What stands in a page takes its colours from the page's style, so that dark and light suit, and its title
and caption are the page's text. Every text stays text.
"""

import io
import math
import multiprocessing
import re
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from normbench.plan import write_whole
from normbench.stats.figures import WIDTH

PHONE = 4.0  # inches
MARGIN = 4.0  # points around what is cropped
FONTS = re.compile(r"'DejaVu Sans'(?:, *(?:'[^']*'|[\\w-]+))*")
UNUSED_ID = re.compile(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|[A-Z]\w*)_\d+"')
COLOUR = re.compile(r"#([0-9a-f]{6})(?=[;\"])")
Makes = Callable[[float], Figure | None]


@dataclass(frozen=True)
class Drawing:
    """A figure in a page.

    Args:
        name: its file's, without the ending; unique in the page.
        title, caption: what is shown and how to read it, in words.
        alt: what it shows, for who does not see it.
        wide, narrow: the SVG elements; safe to stand in HTML.
        file: where it was saved.
    """

    name: str
    title: str
    caption: str
    alt: str
    wide: str
    narrow: str
    file: Path


@dataclass(frozen=True)
class Sketch:
    """A figure that is still to be drawn.

    Args:
        name: its file's, without the ending.
        make: draws it so many inches wide; None where there is nothing to draw.
        alt: what it shows, in words; the title is put before it.
    """

    name: str
    make: Makes
    alt: str


def drawings_of(sketches: Sequence[Sketch], folder: Path, at_once: int) -> list[Drawing | None]:
    """Draw all of them, so many at once where the system can fork: matplotlib takes a second for each."""
    if at_once < 2 or len(sketches) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [drawing_of(sketch, folder) for sketch in sketches]
    with warnings.catch_warnings():
        # Python 3.12 warns where threads run: those of linear algebra, which drawing does not use
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = multiprocessing.get_context("fork").Pool(
            min(at_once, len(sketches)), inherit, (sketches, folder)
        )
    with pool:
        return pool.map(draw_inherited, range(len(sketches)), chunksize=1)


INHERITED: list[tuple[Sketch, Path]] = []


def inherit(sketches: Sequence[Sketch], folder: Path) -> None:
    """In a forked process: what there is to draw, as it lies in memory; Ctrl-C is for the one that forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    INHERITED[:] = [(sketch, folder) for sketch in sketches]


def draw_inherited(place: int) -> Drawing | None:
    """One of them."""
    return drawing_of(*INHERITED[place])


def drawing_of(sketch: Sketch, folder: Path) -> Drawing | None:
    """Draw a figure, and save it as `folder/<name>.svg`; None where there is nothing to draw."""
    name, make = sketch.name, sketch.make
    figure = make(WIDTH)
    if figure is None:
        return None
    texts = {text.get_gid(): text for text in figure.findobj(Text) if text.get_gid() in ("title", "caption")}
    title, caption = (
        str(texts[gid].get_label()) if gid in texts and texts[gid].get_text() else ""
        for gid in ("title", "caption")
    )
    alt = f"{title}. {sketch.alt}"
    file = folder / f"{name}.svg"
    text = svg_of(figure, name)
    write_whole(file, text)
    small = make(PHONE)
    if small is None:
        raise ValueError(f"{name}: there is something to draw, though nothing in a narrow figure")
    wide = in_page(text, figure, "wide", alt)
    narrow = in_page(svg_of(small, f"{name}-narrow"), small, "narrow", alt)
    return Drawing(name, title, caption, alt, wide, narrow, file)


def svg_of(figure: Figure, name: str) -> str:
    """The figure as an SVG file; `name` makes the ids in it its own."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.patch.set_gid("paper")
        if engine := figure.get_layout_engine():
            engine.execute(figure)  # savefig would draw everything once more to come to this
            figure.set_layout_engine("none")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.S)
    text = in_tags(FONTS, "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif", text)
    return re.sub(r"[ \t]+(?=\n)|^[ \t]+", "", in_tags(UNUSED_ID, "", text), flags=re.M)


def in_tags(pattern: re.Pattern[str], by: str, text: str) -> str:
    """Replace in the tags only: what a label says stays as it is."""
    return re.sub(r"<[^>]*>", lambda tag: pattern.sub(by, tag[0]), text)


def in_page(text: str, figure: Figure, size: str, alt: str) -> str:
    """The SVG element alone, in the page's colours, without title and caption."""
    height = 72 * float(figure.get_figheight())
    top, bottom = 0.0, height
    for part in figure.findobj(Text):
        if part.get_gid() in ("title", "caption") and part.get_text():
            box = part.get_window_extent()
            low, high = (height * (1 - y / figure.bbox.height) for y in (box.y0, box.y1))
            if part.get_gid() == "title":
                top = max(top, math.floor(low - MARGIN / 2))
            else:
                bottom = min(bottom, math.ceil(high + MARGIN / 2))
            text = re.sub(rf'<g id="{part.get_gid()}">.*?</g>', "", text, flags=re.S)
    width = 72 * float(figure.get_figwidth())
    body = re.sub(r'<g id="paper">.*?</g>', "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.S)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.S)
    body = in_tags(COLOUR, r"var(--c\1)", body)
    shown = f'viewBox="0 {top:g} {width:g} {bottom - top:g}" role="img" aria-label="{escape(alt)}"'
    head = f'<svg class="{size}" {shown}>'
    return head + re.sub(r"\n+", "\n", body)
