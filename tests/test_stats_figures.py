"""The figures: which files there are, and that what is drawn is what was computed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import stats as scipy_stats

from normbench import figures as look
from normbench.stats.analysis import Analysis, analyse
from normbench.stats.comparison import Margin, Options
from normbench.stats.figures import (
    MOST_POINTS,
    differences_figure,
    draw,
    order_figure,
    reached_figure,
    scale_of,
    sessions_figure,
)
from normbench.stats.inputs import choose_metrics, read
from normbench.stats.metrics import Metric

ACC, EPOCH = Metric("test_acc"), Metric("epoch_time_s")
UNTIL = Metric.of("time_to_acc=0.93")


def rows_of(arms: Mapping[str, float], sessions: int = 12, **columns: Any) -> pd.DataFrame:
    """Sessions launched in turns, each arm's accuracy shifted; sessions share their random part."""
    draws = np.random.default_rng(7)
    shared = draws.normal(0, 0.01, sessions)
    rows = [
        {"arm": arm, "session": s, "seed": 0, "status": "ok", "model": "lenet", "dataset": "digits",
         "batch_size": 32, "test_acc": 0.9 + shift + shared[s] + draws.normal(0, 0.002),
         "epoch_time_s": 5 + 10 * shift + draws.normal(0, 0.05), "launch_order": s * len(arms) + i}
        for s in range(sessions) for i, (arm, shift) in enumerate(arms.items())
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def analysed(
    folder: Path,
    rows: pd.DataFrame,
    asked: Sequence[Metric] | None = None,
    by: Sequence[str] = (),
    **options: Any,
) -> Analysis:
    """What the door makes of the rows, by its own functions."""
    path = folder / "rows.csv"
    rows.to_csv(path, index=False)
    sessions = read([str(path)], asked, by, False)
    return analyse(sessions, choose_metrics(sessions, asked), Options(resamples=0, **options), None, by)


def shown(figure: Figure | None) -> Figure:
    """The figure, laid out as for saving."""
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def drawn(figure: Figure, label: str, panel: int = 0) -> list[tuple[list[float], list[float]]]:
    """(x, y) of every line with the label."""
    lines = [line for line in figure.axes[panel].lines if line.get_label() == label]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def words(figure: Figure) -> str:
    """All texts of a figure, in one line."""
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]  # type: ignore[attr-defined]
    return " ".join(" ".join(found).split())


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels: what is tested is not how long compression takes."""
    assert look.DPI == 150
    monkeypatch.setattr(look, "DPI", 40)


def test_each_metric_has_its_files_and_no_other(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, rows_of({"obn": 0, "mbn": 0.01}))
    written = draw(analysis, tmp_path / "out")
    assert [path.name for path in written] == [
        "test_acc-sessions.png", "test_acc-differences.png",
        "epoch_time_s-sessions.png", "epoch_time_s-differences.png", "epoch_time_s-order.png",
    ]  # fmt: skip
    assert sorted(written) == sorted((tmp_path / "out" / "figures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_groups_have_safe_and_different_file_names(tmp_path: Path) -> None:
    rows = pd.concat([rows_of({"obn": 0, "mbn": 0.01}, dataset=name) for name in ("a/b", "a b", "../C")])
    rows["session"] = range(len(rows))
    analysis = analysed(tmp_path, rows, [ACC], ["dataset"])
    names = [path.relative_to(tmp_path / "figures").name for path in draw(analysis, tmp_path)]
    kinds = ("sessions.png", "differences.png", "sessions-2.png", "differences-2.png")
    assert sorted(names) == sorted(
        [f"a-b-test_acc-{kind}" for kind in kinds] + [f"C-test_acc-{kind}" for kind in kinds[:2]]
    )
    assert "dataset=a/b" in words(shown(differences_figure(analysis, analysis.groups[2], ACC)))


def test_the_forest_holds_differences_intervals_and_the_margin(tmp_path: Path) -> None:
    arms = {"obn": 0.0, "torch_bn": 0.0, "mbn-stride2": 0.03, "mbn-stride4": 0.001}
    analysis = analysed(tmp_path, rows_of(arms), margins={"test_acc": Margin(0.01, relative=True)})
    group = analysis.groups[0]
    rows = analysis.of(group, ACC)
    figure = shown(differences_figure(analysis, group, ACC))
    assert drawn(figure, "difference") == [([c.diff], [row]) for row, c in enumerate(rows)]
    assert drawn(figure, "interval") == [([c.ci_low, c.ci_high], [i, i]) for i, c in enumerate(rows)]
    bands = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert [(band.get_x(), band.get_x() + band.get_width()) for band in bands] == [
        (pytest.approx(-c.margin), pytest.approx(c.margin)) for c in rows
    ]
    assert figure.axes[0].get_yticklabels()[0].get_text() == "torch_bn\n(A/A control)"
    said = words(figure)
    assert "different" in said and "equivalent" in said and "n = 12 pairs of sessions" in said
    assert "difference in test_acc (fraction)" in said
    markers = {c.verdict: line.get_marker() for c, line in zip(rows, points(figure), strict=True)}
    assert len(set(markers.values())) == len(markers) == 2


def test_a_row_far_off_is_an_arrow_and_the_others_stay_readable(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, rows_of({"obn": 0.0, "mbn": 0.01, "gn": -0.01, "nn": -0.7}), [ACC])
    rows = analysis.of(analysis.groups[0], ACC)
    figure = shown(differences_figure(analysis, analysis.groups[0], ACC))
    low, high = figure.axes[0].get_xlim()
    assert -0.1 < low < high < 0.1 and len(points(figure)) == 2
    ((x, y),) = drawn(figure, "beyond")
    assert rows[y[0]].treatment == "nn" and low < x[0] < low / 2
    assert "Arrows: beyond the scale" in words(figure) and "-0.7" in words(figure)
    near = analysed(tmp_path, rows_of({"obn": 0.0, "mbn": -0.2, "nn": -0.7}), [ACC])
    assert scale_of(near.of(near.groups[0], ACC)) == (-math.inf, math.inf)


def points(figure: Figure) -> list[Any]:
    """The forest's points."""
    return [line for line in figure.axes[0].lines if line.get_label() == "difference"]


def test_a_comparison_without_an_interval_is_hollow_and_says_so(tmp_path: Path) -> None:
    rows = rows_of({"obn": 0, "mbn": 0, "one": 0, "none": 0})
    rows.loc[rows["arm"] == "mbn", "test_acc"] = rows.loc[rows["arm"] == "obn", "test_acc"].to_numpy()
    rows.loc[(rows["arm"] == "one") & (rows["session"] > 0), "test_acc"] = math.nan
    rows.loc[rows["arm"] == "none", "test_acc"] = math.nan
    analysis = analysed(tmp_path, rows, [ACC])
    figure = shown(differences_figure(analysis, analysis.groups[0], ACC))
    assert drawn(figure, "interval") == [] and drawn(figure, "difference")[0] == ([0.0], [0])
    assert {point.get_markerfacecolor() for point in points(figure)} == {"white"}
    assert "identical in all 12 pairs" in words(figure)
    assert words(figure).count("not comparable no interval") == 2
    figure = shown(sessions_figure(analysis, analysis.groups[0], ACC))
    assert "no value" in words(figure) and "n = 1, no interval" in words(figure)


def test_sessions_means_and_intervals(tmp_path: Path) -> None:
    rows = rows_of({"obn": 0, "mbn": 0.01})
    rows.loc[3, "status"] = "diverged"
    analysis = analysed(tmp_path, rows, test_images=500)
    group = analysis.groups[0]
    figure = shown(sessions_figure(analysis, group, ACC))
    x, y = (group.arms[label].values("test_acc") for label in ("obn", "mbn"))
    points_of_mbn = np.concatenate([line[0] for line in drawn(figure, "mbn")])
    assert sorted(points_of_mbn) == sorted(y) and len(drawn(figure, "mbn")) == 2
    assert [mean for (mean,), _ in drawn(figure, "mean")] == [x.mean(), y.mean()]
    low, high = scipy_stats.t.interval(0.95, 11, x.mean(), scipy_stats.sem(x))
    assert drawn(figure, "interval")[0][0] == [pytest.approx(low), pytest.approx(high)]
    se = math.sqrt(x.mean() * (1 - x.mean()) / 500)
    assert drawn(figure, "floor")[0][0] == [pytest.approx(x.mean() - se), pytest.approx(x.mean() + se)]
    (pairs,) = figure.axes[0].collections
    ends = np.array([np.asarray(path.vertices)[:, 0] for path in pairs.get_paths()])
    assert sorted(map(tuple, ends)) == sorted(zip(x, y, strict=True))
    assert "n = 12 an arm" in words(figure) and "test_acc (fraction)" in words(figure)


def test_unpaired_and_many_sessions_are_not_joined(tmp_path: Path) -> None:
    unpaired = analysed(tmp_path, rows_of({"obn": 0, "mbn": 0}).drop(columns="seed"))
    assert not shown(sessions_figure(unpaired, unpaired.groups[0], ACC)).axes[0].collections
    many = analysed(tmp_path, rows_of({"obn": 0, "mbn": 0}, 41))
    assert not shown(sessions_figure(many, many.groups[0], ACC)).axes[0].collections


def test_a_time_that_repeats_itself_has_no_interval(tmp_path: Path) -> None:
    rows = rows_of({"obn": 0, "mbn": 0})
    rows.loc[rows["arm"] == "mbn", "epoch_time_s"] = np.linspace(5, 6, 12)
    analysis = analysed(tmp_path, rows)
    group = analysis.groups[0]
    sessions = shown(sessions_figure(analysis, group, EPOCH))
    assert len(drawn(sessions, "interval")) == 1 and len(drawn(sessions, "mean")) == 2
    forest = shown(differences_figure(analysis, group, EPOCH))
    assert drawn(forest, "interval") == [] and "not comparable +" in words(forest)


def test_order_follows_launch_order(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, rows_of({"obn": 0, "mbn": 0.01}))
    group = analysis.groups[0]
    figure = shown(order_figure(analysis, group, EPOCH))
    for panel, label in enumerate(("obn", "mbn")):
        values = group.arms[label].values("epoch_time_s").tolist()
        assert drawn(figure, label, panel) == [([2.0 * s + panel for s in range(12)], values)]
    c = analysis.of(group, EPOCH)[0]
    assert f"obn: lag-1 autocorrelation {c.lag1_baseline:.2f}" in words(figure)
    assert f"mbn: lag-1 autocorrelation {c.lag1_treatment:.2f}" in words(figure)
    spans = [float(np.ptp(axes.get_ylim())) for axes in figure.axes]
    assert spans[0] == pytest.approx(spans[1]) and "launch order" in words(figure)
    assert len({line.get_color() for axes in figure.axes for line in axes.lines[1:]}) == 2
    assert order_figure(analysis, group, ACC) is None


@pytest.mark.parametrize("change", [{"launch_order": 0}, {"launch_order": None}, None])
def test_without_a_rising_launch_order_positions_are_drawn(
    change: Mapping[str, Any] | None, tmp_path: Path
) -> None:
    rows = rows_of({"obn": 0, "mbn": 0.01})
    rows = rows.drop(columns="launch_order") if change is None else rows.assign(**change)
    rows.loc[(rows["arm"] == "mbn") & (rows["session"] == 4), "epoch_time_s"] = math.nan
    analysis = analysed(tmp_path, rows, [EPOCH])
    figure = shown(order_figure(analysis, analysis.groups[0], EPOCH))
    assert drawn(figure, "mbn", 1)[0][0] == [s for s in range(12) if s != 4]
    assert "position within the arm" in words(figure)


def test_nothing_to_draw_is_no_file(tmp_path: Path) -> None:
    rows = rows_of({"obn": 0, "mbn": 0})
    empty = analysed(tmp_path, rows.assign(test_acc=math.nan), [ACC])
    assert draw(empty, tmp_path) == [] and not (tmp_path / "figures").exists()
    alone = analysed(tmp_path, rows[rows["arm"] == "obn"], [ACC])
    assert [path.name for path in draw(alone, tmp_path)] == ["test_acc-sessions.png"]


def study_with_curves(folder: Path) -> None:
    """Three sessions an arm: obn reaches 0.93 after 2, 3, 3 epochs of 10 s, mbn once after 3, ln never."""
    curves = {
        "obn": [(0.5, 0.94, 0.95), (0.5, 0.9, 0.95), (0.6, 0.8, 0.93)],
        "mbn": [(0.5, 0.6, 0.93), (0.5, 0.6, 0.7), (0.5, 0.6, 0.7)],
        "ln": [(0.5, 0.6, 0.7)] * 3,
    }
    for arm, sessions in curves.items():
        for s, accuracies in enumerate(sessions):
            at = folder / arm / f"s{s}"
            at.mkdir(parents=True)
            curve = pd.DataFrame({"epoch": [1, 2, 3], "step": [5, 10, 15], "test_acc": accuracies})
            curve.assign(epoch_time_s=10.0).to_csv(at / "epochs.csv", index=False)


def test_times_to_a_target_are_steps(tmp_path: Path) -> None:
    study_with_curves(tmp_path)
    rows = rows_of({"obn": 0, "mbn": 0, "ln": 0}, 3)
    analysis = analysed(tmp_path, rows, [UNTIL, Metric.of("epochs_to_acc=0.93")])
    group = analysis.groups[0]
    figure = shown(reached_figure(analysis, group, UNTIL))
    third = pytest.approx(1 / 3)
    assert drawn(figure, "baseline", 1) == [([0, 20, 30, 30], [0, third, 1, 1])]
    assert drawn(figure, "treatment", 1) == [([0, 30, 30], [0, third, third])]
    assert drawn(figure, "treatment", 0) == [([0, 30], [0, 0])]
    assert drawn(figure, "ended without it", 0) == [([30], [0])]
    said = words(figure)
    assert "mbn: 1 of 3 reached it" in said and "Grey: obn, 3 of 3" in said and "training time (s)" in said
    assert sessions_figure(analysis, group, UNTIL) is None and order_figure(analysis, group, UNTIL) is None
    names = {path.name for path in draw(analysis, tmp_path)}
    assert {"time_to_acc-0.93-reached.png", "epochs_to_acc-0.93-reached.png"} <= names
    assert not any("sessions" in name or "order" in name or "=" in name for name in names)


def test_a_label_is_no_formula_and_may_be_long(tmp_path: Path) -> None:
    arms = {"obn": 0, "mbn-a$b$_" + "-".join(["option1.5"] * 12): 0.01, "x" * 90: 0}
    analysis = analysed(tmp_path, rows_of(arms), [EPOCH])
    assert len(draw(analysis, tmp_path)) == 3


@pytest.mark.slow
def test_forty_arms_of_many_sessions(tmp_path: Path) -> None:
    few = analysed(tmp_path, rows_of({"obn": 0, "mbn": 0}), [EPOCH])
    group = few.groups[0]
    times = np.random.default_rng(1).normal(5, 0.1, 25_000)
    many = pd.DataFrame({"epoch_time_s": times, "launch_order": np.arange(25_000.0), "status": "ok"})
    place = np.arange(25_000, dtype=np.intp)
    for label in ("obn", *(f"mbn-stride{i}" for i in range(39))):
        group.arms[label] = replace(group.arms["obn"], label=label, rows=many, place=place, places=25_000)
    del group.arms["mbn"]
    sessions, order = (make(few, group, EPOCH) for make in (sessions_figure, order_figure))
    assert sessions is not None and order is not None
    look.save_png(sessions, tmp_path / "sessions.png")
    for figure, panel in ((sessions, 0), (order, 10)):
        ((x, y),) = drawn(figure, "mbn-stride9", panel)
        assert len(x) == MOST_POINTS and f"At most {MOST_POINTS} points" in words(figure)
    assert (min(drawn(sessions, "obn")[0][0]), max(drawn(sessions, "obn")[0][0])) == (
        times.min(),
        times.max(),
    )
    assert (x[0], x[-1]) == (0, 24_999) and x == sorted(x) and y[-1] == times[-1]
    assert sessions.get_figheight() > 20 and "n = 25,000 an arm" in words(sessions)
