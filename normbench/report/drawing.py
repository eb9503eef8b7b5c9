"""Matplotlib's figures as SVG: one file each to keep, and two to stand in a page, for a desk and a telephone.

What stands in a page takes its colours from the page's style, so that dark and light suit, and its title
and caption are the page's text. Every text stays text.
"""

import gc
import math
import multiprocessing
import re
import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from normbench.figures import PHONE, WIDTH, Sketch, any_letters, in_tags, svg_of, words_of
from normbench.plan import write_whole

MARGIN = 4.0  # points around what is cropped
Job = tuple[str, Sketch, Path]
ID = re.compile(r' id="([^"]*)"')
COLOUR = re.compile(r"#([0-9a-f]{6})(?=[;\"])")


@dataclass(frozen=True)
class Drawing:
    """A figure in a page.

    Args:
        name: its file's, without the ending; unique in the page.
        title, caption: what is shown and how to read it, in words.
        alt: what it shows, for who does not see it.
        wide, narrow: the SVG elements; safe to stand in HTML.
        file: where it was saved.
        folded: whether it is opened by who wants it.
    """

    name: str
    title: str
    caption: str
    alt: str
    wide: str
    narrow: str
    file: Path
    folded: bool


def drawings_of(named: Mapping[str, Sketch], folder: Path, at_once: int) -> list[Drawing | None]:
    """Draw all of them under their names, so many at once where the system can fork."""
    jobs = [(name, sketch, folder) for name, sketch in named.items()]
    gc.freeze()  # what is there stays, and the collector need not look at it for every figure
    if at_once < 2 or len(jobs) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [drawing_of(*job) for job in jobs]
    with warnings.catch_warnings():
        # Python 3.12 warns where threads run: those of linear algebra, which drawing does not use
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = multiprocessing.get_context("fork").Pool(min(at_once, len(jobs)), inherit, (jobs,))
    with pool:
        return pool.map(draw_inherited, range(len(jobs)), chunksize=1)


INHERITED: list[Job] = []


def inherit(jobs: Sequence[Job]) -> None:
    """In a forked process: what there is to draw, as it lies in memory; Ctrl-C is for the one that forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    INHERITED[:] = jobs


def draw_inherited(place: int) -> Drawing | None:
    """One of them."""
    return drawing_of(*INHERITED[place])


def drawing_of(name: str, sketch: Sketch, folder: Path) -> Drawing | None:
    """Draw a figure, and save it as `folder/<name>.svg`; None where there is nothing to draw."""
    figure = sketch.make(WIDTH)
    if figure is None:
        return None
    words = {gid: str(text.get_label()) for gid, text in words_of(figure).items()}
    title, caption = (words.get(gid, "") for gid in ("title", "caption"))
    alt = f"{title}. {sketch.alt}"
    file = folder / f"{name}.svg"
    text = svg_of(figure, name)
    write_whole(file, text)
    small = sketch.make(PHONE)
    if small is None:
        raise ValueError(f"{name}: there is something to draw, though nothing in a narrow figure")
    wide = in_page(text, figure, "wide", alt)
    narrow = in_page(svg_of(small, f"{name}-narrow"), small, "narrow", alt)
    return Drawing(name, title, caption, alt, wide, narrow, file, sketch.folded)


def in_page(text: str, figure: Figure, size: str, alt: str) -> str:
    """The SVG element alone, in the page's colours, without title and caption."""
    height = 72 * float(figure.get_figheight())
    top, bottom = 0.0, height
    for gid, part in words_of(figure).items():
        with any_letters():
            box = part.get_window_extent()
        low, high = (height * (1 - y / figure.bbox.height) for y in (box.y0, box.y1))
        if gid == "title":
            top = math.floor(low + MARGIN / 2)
        else:
            bottom = math.ceil(high - MARGIN / 2)
        text = re.sub(rf'<g id="{gid}">.*?</g>', "", text, flags=re.S)
    width = 72 * float(figure.get_figwidth())
    body = re.sub(r'<g id="paper">.*?</g>', "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.S)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.S)
    body = in_tags(COLOUR, r"var(--c\1)", body)
    meant = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = in_tags(ID, lambda found: found[0] if found[1] in meant else "", body)
    shown = f'viewBox="0 {top:g} {width:g} {bottom - top:g}" role="img" aria-label="{escape(alt)}"'
    head = f'<svg class="{size}" {shown}>'
    return head + re.sub(r"\n+", "\n", body)
