"""The comparison table: hand-worked numbers, SciPy as oracle, counts of what was planned."""

import json
from pathlib import Path

import pytest
from scipy import stats as scipy_stats

from normbench import stats
from normbench.identity import short_names
from normbench.results import COLUMNS


def test_difference_and_interval_are_welchs() -> None:
    a, b = [0.9, 0.92, 0.94, 0.91], [0.88, 0.89, 0.93]
    row = stats.compare("test_acc", "mbn", a, b)
    oracle = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (row.n, row.mean) == (4, pytest.approx(0.9175))
    assert row.diff == pytest.approx(0.9175 - 0.9)
    assert (row.ci_low, row.ci_high) == (pytest.approx(oracle.low), pytest.approx(oracle.high))


def test_small_and_constant_samples_have_no_interval() -> None:
    assert stats.compare("test_acc", "mbn", [0.9], [0.8, 0.9]).ci_low is None
    same = stats.compare("test_acc", "mbn", [0.9, 0.9], [0.9, 0.9])
    assert (same.diff, same.ci_low, same.sd) == (0.0, None, 0.0)
    assert stats.compare("test_acc", "obn", [0.9, 0.8], None).diff is None


def test_labels_drop_the_words_that_all_arms_share() -> None:
    arms = {"s1": "obn-resnet9-digits", "s2": "mbn-stride4-resnet9-digits"}
    assert short_names(arms) == {"s1": "obn", "s2": "mbn-stride4"}
    assert short_names({"s1": "obn-resnet9", "s2": "obn-resnet9"}) == {"s1": "s1", "s2": "s2"}
    assert short_names({"s1": "obn-resnet9"}) == {"s1": "obn-resnet9"}
    assert short_names({"s1": "bn-a-b", "s2": "bn-a-c"}) == {"s1": "bn-b", "s2": "bn-c"}


def session(study: Path, arm: str, number: int, acc: float) -> None:
    folder = study / f"{arm}-hash" / f"s{number}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    row = {
        "study": study.name,
        "setting": f"{arm}-hash",
        "arm": arm,
        "session": number,
        "seed": 0,
        "status": "ok",
        "hostname": "here",
        "test_acc": acc,
        "epoch_time_s": 1.0 + number / 10,
        "launch_order": number,
    }
    (folder / "session.json").write_text(json.dumps({"row": {c: row.get(c) for c in COLUMNS}}))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["stats", *arguments])
    stats.main()


def test_the_door_prints_a_row_per_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        session(tmp_path / "st", "obn", number, 0.9 + number / 100)
        session(tmp_path / "st", "mbn-stride4", number, 0.8 + number / 100)
    run(monkeypatch, "st")
    said = capsys.readouterr().out
    assert "st: 6 of 6 sessions: 6 ok" in said
    assert "test_acc against obn" in said and "mbn-stride4" in said and "-0.1000" in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "no sessions under nowhere"),
        (["st", "--baseline", "obm"], "did you mean 'obn'?"),
        (["st", "--metric", "test_ac"], "did you mean 'test_acc'?"),
        (["st", "--metric", "hostname"], "no such column of numbers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session(tmp_path / "st", "obn", 0, 0.9)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
