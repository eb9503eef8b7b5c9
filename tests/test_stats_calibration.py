"""The statistics keep their targets in a small calibration, and docs/calibration.csv is a whole one."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
IDENTITY = ["question", "data", "arms", "n", "method", "target"]


@pytest.fixture(scope="module")
def calibrate() -> ModuleType:
    """scripts/calibrate.py."""
    spec = importlib.util.spec_from_file_location("calibrate", ROOT / "scripts" / "calibrate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate"] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    """docs/calibration.csv, as text."""
    return pd.read_csv(ROOT / "docs" / "calibration.csv", dtype=str, keep_default_na=False)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["false positives", "coverage", "equivalence", "times", "looks", "power"])
def test_the_methods_keep_their_targets(calibrate: ModuleType, key: str) -> None:
    questions = [question for question in calibrate.QUESTIONS if question.key == key]
    cells = calibrate.simulate(questions, 2000)[key]
    assert any(cell.target for cell in cells)
    assert [cell for cell in cells if cell.outcome == "fail"] == []


@pytest.mark.slow
def test_naive_methods_miss_them(calibrate: ModuleType) -> None:
    x, y = calibrate.times(calibrate.OWN, 2000, 30)
    found = calibrate.estimates.welch(x, y).p < calibrate.ALPHA
    assert calibrate.count(found, "", False, 30, "Welch", ceiling=0.06).outcome == "fail"


@pytest.mark.parametrize(
    ("hits", "target", "outcome"),
    [
        (560, {"ceiling": 0.05}, "fail"),  # bounds 0.0507 to 0.0616
        (550, {"ceiling": 0.05}, "pass"),  # 0.0498 to 0.0606
        (0, {"ceiling": 0.0}, "pass"),
        (9440, {"floor": 0.95}, "fail"),
        (9460, {"floor": 0.95}, "pass"),
        (450, {"floor": 0.04, "ceiling": 0.05}, "pass"),
        (5000, {}, "shown"),
    ],
)
def test_a_cell_is_judged_by_its_bounds(
    calibrate: ModuleType, hits: int, target: dict[str, float], outcome: str
) -> None:
    assert calibrate.Cell("", "", 5, "", 10_000, hits, **target).outcome == outcome


def test_the_committed_table_has_the_scripts_cells(calibrate: ModuleType, committed: pd.DataFrame) -> None:
    now = calibrate.frame(calibrate.simulate(calibrate.QUESTIONS, 20)).astype(str)
    cells = [list(table[IDENTITY].itertuples(index=False, name=None)) for table in (committed, now)]
    assert set(cells[0]) ^ set(cells[1]) == set() and len(cells[0]) == len(cells[1])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["false positives", "times"])
def test_the_committed_rates_are_still_the_methods_rates(
    calibrate: ModuleType, committed: pd.DataFrame, key: str
) -> None:
    questions = [question for question in calibrate.QUESTIONS if question.key == key]
    now = calibrate.frame(calibrate.simulate(questions, 10_000))["rate"].to_numpy()
    assert committed[committed["question"] == key]["rate"].to_numpy(float) == pytest.approx(now, abs=0.01)


def test_no_committed_cell_misses_its_target(committed: pd.DataFrame) -> None:
    assert committed[committed["outcome"] == "fail"].to_dict("records") == []
    fewer = committed["question"] == "log-rank"
    assert set(committed[~fewer]["studies"]) == {"10000"}
