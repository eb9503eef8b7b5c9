"""The figures' shared look: nothing lies over anything else, and equal figures are equal files."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from normbench.figures import (
    CYCLE,
    PHONE,
    WIDTH,
    banded,
    entitle,
    explain,
    grid,
    keys,
    lay_out,
    legend,
    safe_stem,
    short,
    svg_of,
    words_of,
)

ARMS = [f"mbn-stride{i}-with-a-long-name" for i in range(9)]


def made(width: float, letters: str = "") -> Figure:
    """Nine arms in one panel each, with everything around them."""
    figure, panels = grid([f"{arm} $x$ {letters}" for arm in ARMS], width)
    x = np.arange(300.0)
    for place, axes in enumerate(panels):
        banded(axes, x, np.where(x == 7, np.inf, x), [(x - 1, x + 1)], place)
    legend(figure, keys(ARMS))
    entitle(figure, "what a reader sees of all of these arms together in one figure", "n = 3", "a=1")
    explain(figure, "How to read it, in so many words that two lines are needed." * 3)
    return figure


@pytest.mark.parametrize("width", [WIDTH, PHONE])
def test_title_legend_panels_and_caption_lie_below_each_other(width: float) -> None:
    figure = made(width)
    height = figure.get_figheight()
    lay_out(figure)
    words = words_of(figure)
    boxes = [
        words["title"].get_window_extent(), figure.legends[0].get_window_extent(),
        figure.axes[0].get_tightbbox(), figure.axes[-1].get_tightbbox(), words["caption"].get_window_extent(),
    ]  # fmt: skip
    assert all(box is not None and box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes)
    title, keyed, top, bottom, caption = (box for box in boxes if box is not None)
    assert title.y0 >= keyed.y1 and keyed.y0 >= top.y1 and bottom.y0 >= caption.y1
    assert keyed.x1 <= figure.bbox.width and title.x1 <= figure.bbox.width
    grown = figure.get_figheight()
    assert grown > height + 0.8  # what stands around the panels takes none of their height
    lay_out(figure)
    assert figure.get_figheight() == grown
    assert (
        words["title"].get_label().startswith("a=1, what a reader")
        and "(n = 3)" in words["title"].get_label()
    )


def test_equal_figures_are_equal_files_with_their_words_as_text() -> None:
    text = svg_of(made(WIDTH, "正規化"), "one")  # letters that matplotlib's font lacks
    assert text == svg_of(made(WIDTH, "正規化"), "one") and "<metadata" not in text
    texts = [node.text for node in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert "$x$ 正規化" in " ".join(filter(None, texts)) and "DejaVu Sans" in text
    assert {color for color in CYCLE if color in text} == set(CYCLE)


def test_numbers_on_axes_are_short() -> None:
    assert [short(x) for x in (0.25, -0.02, 2e-6, -1e12, 1.0)] == ["0.25", "−0.02", "2e−6", "−1e12", "1"]


def test_names_of_files_are_safe_and_no_two_are_one() -> None:
    assert safe_stem(["", "a/b <c>", "x"]) == "a-b-c-x"
    assert safe_stem(["A b"], {"a-b", "a-b-2"}) == "A-b-3"
