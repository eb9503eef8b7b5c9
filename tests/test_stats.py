"""The door: what it reads, what it prints and writes, what it refuses, and the numbers others published."""

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from normbench.identity import short_names
from normbench.plan import Plan
from normbench.results import COLUMNS
from normbench.stats import __main__ as door
from normbench.stats import tables
from normbench.stats.sequential import Looks

ROOT = Path(__file__).parents[1]
OBN, MBN = (str(ROOT / "docs" / "published" / f"resnet50_{name}.csv") for name in ("obn", "mbn"))
TABLE_HEAD = """
    metric baseline treatment n_baseline n_treatment n_expected diverged_baseline diverged_treatment
    fisher_p mean_baseline sd_baseline mean_treatment sd_treatment diff ci_low ci_high bca_low bca_high
    welch_t welch_df welch_p student_p paired_t paired_p paired_r rank_test rank_p p_holm hedges_g margin
    tost_p min_detectable n_needed lag1_baseline lag1_treatment lag1_diff ess_baseline ess_treatment
    ess_diff ess_p test p looks verdict reason
""".split()  # noqa: SIM905
Row = dict[str, str]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["stats", *arguments])
    door.main()


def comparisons(folder: Path = Path()) -> list[Row]:
    with (folder / "comparisons.csv").open() as file:
        return list(csv.DictReader(file))


def number(row: Row, column: str) -> float:
    return float(row[column])


def session(study: Path, arm: str, n: int, acc: float | None, order: int = 0, **changed: object) -> None:
    """One finished session's folder, as training leaves it."""
    folder = study / f"{arm}-hash" / f"s{n}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    row = {
        "study": study.name, "setting": f"{arm}-hash", "arm": arm, "session": n, "seed": 0, "status": "ok",
        "model": "lenet", "dataset": "digits", "norm": arm.split("-")[0], "batch_size": 128,
        "precision": "fp32", "hostname": "here", "device_name": "cpu", "test_acc": acc,
        "epoch_time_s": 1.0 + 0.01 * (7 * n % 5), "launch_order": order, **changed,
    }  # fmt: skip
    body = {"row": {c: row.get(c) for c in COLUMNS}, "images": {"train": 1400, "val": None, "test": 397}}
    (folder / "session.json").write_text(json.dumps(body))


def curve(study: Path, arm: str, n: int, accuracies: Sequence[float], seconds: float = 2.0) -> None:
    """A session's epochs.csv."""
    lines = ["epoch,step,train_loss,test_acc,epoch_time_s"]
    lines += [f"{i},{10 * i},0.5,{acc},{seconds}" for i, acc in enumerate(accuracies, start=1)]
    (study / f"{arm}-hash" / f"s{n}" / "epochs.csv").write_text("\n".join(lines) + "\n")


def two_arms(study: Path, sessions: int = 12, shift: float = 0.0, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for n in range(sessions):
        shared, noise = 0.9 + 0.01 * rng.standard_normal(), 0.002 * rng.standard_normal(2)
        session(study, "obn", n, shared + noise[0], order=2 * n)
        session(study, "mbn-stride4", n, shared + noise[1] + shift, order=2 * n + 1,
                epoch_time_s=1.5 + 0.01 * (3 * n % 7))  # fmt: skip


def test_the_published_sessions_give_the_numbers_that_were_worked_out_from_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(monkeypatch, f"OBN={OBN}", f"MBN={MBN}", "--margin", "test_acc=0.01")
    acc, time = comparisons()
    assert (acc["metric"], time["metric"]) == ("test_acc", "total_time_s")
    assert number(acc, "welch_t") == pytest.approx(0.0092, abs=5e-5)
    assert number(acc, "welch_df") == pytest.approx(57.55, abs=5e-3)
    assert number(acc, "welch_p") == pytest.approx(0.9927, abs=5e-5)
    assert number(acc, "tost_p") == pytest.approx(0.089, abs=5e-4)
    assert number(acc, "hedges_g") == pytest.approx(0.0023, abs=5e-5)
    assert (acc["test"], acc["paired_t"]) == ("Welch", "")  # a file without seeds has no pairs
    assert number(time, "diff") == pytest.approx(10.283, abs=5e-4)
    assert number(time, "welch_t") == pytest.approx(5.650, abs=5e-4)
    assert number(time, "welch_df") == pytest.approx(45.03, abs=5e-3)
    assert number(time, "welch_p") == pytest.approx(1.03e-6, abs=5e-9)
    assert number(time, "student_p") == pytest.approx(5.1e-7, abs=5e-9)
    assert number(time, "hedges_g") == pytest.approx(1.44, abs=5e-3)
    assert number(time, "lag1_treatment") == pytest.approx(0.78, abs=5e-3)
    assert time["verdict"] == "not comparable" and "lag-1 autocorrelation 0.78" in time["reason"]
    run(monkeypatch, f"OBN={OBN}", f"MBN={MBN}", "--margin", "test_acc=0.02", "--margin", "total_time_s=2%")
    acc, time = comparisons()
    assert number(acc, "tost_p") == pytest.approx(0.004, abs=5e-4)
    assert acc["verdict"] == "equivalent"
    assert number(time, "margin") == pytest.approx(0.02 * number(time, "mean_baseline"))
    run(monkeypatch, f"OBN={OBN}", f"MBN={MBN}", "--metric", "test_acc")
    assert number(comparisons()[0], "min_detectable") == pytest.approx(0.021, abs=5e-4)


def test_the_test_sets_size_is_a_floor_under_the_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, f"OBN={OBN}", f"MBN={MBN}", "--test-images", "500")
    assert number(comparisons()[0], "binomial_se_baseline") == pytest.approx(0.0180, abs=5e-5)
    assert "test-set se" in capsys.readouterr().out


def test_a_folder_is_read_with_its_counts_and_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_arms(Path("st"), shift=0.01)
    run(monkeypatch, "st", "--margin", "test_acc=0.005")
    said = capsys.readouterr().out
    assert "st: 24 of 24 sessions: 24 ok" in said
    assert "test_acc against obn" in said and "mbn-stride4: different: higher by 0.0" in said
    acc, time = comparisons(Path("st"))
    assert acc["test"] == "paired t" and number(acc, "paired_r") > 0.9
    assert number(acc, "p") == number(acc, "paired_p") < number(acc, "welch_p")
    assert number(acc, "binomial_se_baseline") == pytest.approx(math.sqrt(0.9 * 0.1 / 397), rel=0.1)
    assert time["test"] == "paired t (ess)" and time["verdict"] == "different"
    assert list(acc)[: len(TABLE_HEAD)] == TABLE_HEAD


def test_a_rows_numbers_are_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    two_arms(Path("st"), shift=0.001)
    for n in (0, 1, 2):
        path = Path(f"st/mbn-stride4-hash/s{n}/session.json")
        path.write_text(path.read_text().replace('"ok"', '"diverged"'))
    run(monkeypatch, "st")
    acc, time = comparisons(Path("st"))
    rows = pd.read_csv("st/results.csv")
    x, y = (
        rows[rows["arm"] == arm].sort_values("session")["test_acc"].to_numpy()
        for arm in ("obn", "mbn-stride4")
    )
    paired, welch = scipy_stats.ttest_rel(y, x), scipy_stats.ttest_ind(y, x, equal_var=False)
    low, high = paired.confidence_interval()
    expected = {
        "mean_baseline": x.mean(), "sd_treatment": y.std(ddof=1), "diff": (y - x).mean(), "ci_low": low,
        "ci_high": high, "welch_t": welch.statistic, "welch_df": welch.df, "welch_p": welch.pvalue,
        "student_p": scipy_stats.ttest_ind(y, x).pvalue, "paired_t": paired.statistic,
        "paired_p": paired.pvalue, "paired_r": scipy_stats.pearsonr(x, y).statistic, "p": paired.pvalue,
        "rank_p": scipy_stats.wilcoxon(y - x).pvalue,
        "fisher_p": scipy_stats.fisher_exact([[0, 12], [3, 9]]).pvalue,
        "lag1_diff": np.corrcoef((y - x)[1:], (y - x)[:-1])[0, 1],
        "drift_baseline": scipy_stats.spearmanr(np.arange(12), x).statistic,
        "p_holm": max(min(1, 2 * min(number(acc, "p"), number(time, "p"))), number(acc, "p")),
    }  # fmt: skip
    assert {name: number(acc, name) for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_pairs_are_decided_from_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    two_arms(Path("st"))
    for path in Path("st/mbn-stride4-hash").glob("*/session.json"):
        path.write_text(path.read_text().replace('"batch_size": 128', '"batch_size": 16'))
    run(monkeypatch, "st", "--metric", "test_acc")
    (acc,) = comparisons(Path("st"))
    assert acc["test"] == "Welch" and acc["paired_t"] == ""


def test_times_on_other_hardware_are_not_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    two_arms(Path("st"))
    for path in Path("st/mbn-stride4-hash").glob("*/session.json"):
        path.write_text(path.read_text().replace('"device_name": "cpu"', '"device_name": "T4"'))
    run(monkeypatch, "st")
    acc, time = comparisons(Path("st"))
    assert acc["verdict"] == "inconclusive"
    assert time["verdict"] == "not comparable" and "device_name differs: T4 against cpu" in time["reason"]
    assert time["p"] == "" and "shared" not in time["reason"]


def test_by_splits_and_without_it_data_sets_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for dataset in ("digits", "mnist"):
        for n in range(4):
            session(Path("st"), f"obn-{dataset}", n, 0.9 + n / 100, dataset=dataset)
            session(Path("st"), f"mbn-{dataset}", n, 0.9 + n / 50, dataset=dataset)
    run(monkeypatch, "st", "--by", "dataset", "--metric", "test_acc", "--format", "md")
    rows = comparisons(Path("st"))
    assert [(r["dataset"], r["baseline"], r["treatment"]) for r in rows] == [
        ("digits", "obn", "mbn"), ("mnist", "obn", "mbn"),
    ]  # fmt: skip
    assert "**dataset=digits test_acc against obn**" in capsys.readouterr().out
    run(monkeypatch, "st", "--baseline", "obn-digits", "--metric", "test_acc")
    verdicts = {r["treatment"]: r["verdict"] for r in comparisons(Path("st"))}
    assert verdicts["mbn-mnist"] == "not comparable" and verdicts["mbn-digits"] == "inconclusive"


def test_failed_and_diverged_sessions_are_named_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(8):
        session(Path("st"), "obn", n, 0.9 + n / 1000)
        session(Path("st"), "nn", n, 0.1, status="diverged" if n < 7 else "ok")
    session(Path("st"), "obn", 8, None, status="failed", error="OSError: disk")
    run(monkeypatch, "st", "--metric", "test_acc")
    said = capsys.readouterr().out
    assert "17 of 18 sessions: 9 ok, 7 diverged, 1 failed" in said
    assert "diverged: nn s0, nn s1" in said and "failed: obn s8 (OSError: disk)" in said
    (row,) = comparisons(Path("st"))
    assert (row["diverged_baseline"], row["diverged_treatment"], row["n_treatment"]) == ("0", "7", "8")
    assert number(row, "fisher_p") == pytest.approx(0.0014, abs=5e-5)
    assert "7 diverged against 0 (a different rate; Fisher, Holm: p = 0.0014)" in row["reason"]


def test_missing_sessions_are_counted_against_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_arms(Path("st"), sessions=3)
    arms = [{"setting": f"{arm}-hash", "arm": arm, "config_hash": "", "choices": {}, "values": {"out": "."}}
            for arm in ("obn", "mbn-stride4")]  # fmt: skip
    planned = [{"arm": a, "session": n, "seed": 0, "launch_order": 0} for n in range(5) for a in (0, 1)]
    Path("st/plan-0.json").write_text(json.dumps({"study": "st", "arms": arms, "sessions": planned}))
    run(monkeypatch, "st")
    said = capsys.readouterr().out
    assert "st: 6 of 10 sessions: 6 ok\n" in said
    assert "missing: obn-hash/s3, mbn-stride4-hash/s3, obn-hash/s4, mbn-stride4-hash/s4" in said
    assert comparisons(Path("st"))[0]["n_expected"] == "5"
    shutil.rmtree("st/mbn-stride4-hash")
    run(monkeypatch, "st")
    assert "st: 3 of 10 sessions: 3 ok\n" in capsys.readouterr().out


def test_the_control_comes_first_and_its_failure_flags_every_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for n in range(10):
        session(Path("st"), "gn", n, 0.9 + 0.001 * rng.standard_normal())
        session(Path("st"), "obn", n, 0.9 + 0.001 * rng.standard_normal())
        session(Path("st"), "torch_bn", n, 0.95 + 0.001 * rng.standard_normal())
    run(monkeypatch, "st", "--baseline", "gn", "--metric", "test_acc")
    said = capsys.readouterr().out
    rows = comparisons(Path("st"))
    assert [(r["baseline"], r["treatment"], r["control"]) for r in rows] == [
        ("obn", "torch_bn", "True"), ("gn", "obn", "False"), ("gn", "torch_bn", "False"),
    ]  # fmt: skip
    assert "DISTRUST every verdict here: obn and torch_bn are one op, and test_acc differs" in said
    assert all("distrust this" in r["reason"] for r in rows)
    assert said.index("torch_bn against obn (A/A control)") < said.index("\nobn ")


def test_metrics_from_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for n in range(10):
        wobble = 0.01 * rng.random(4)
        for arm, late in (("obn", 0.0), ("nn", 0.2)):
            session(Path("st"), arm, n, 0.9)
            curve(Path("st"), arm, n, np.array([0.5, 0.7, 0.9, 0.85]) - late + wobble)
    names = ["best_acc", "last_acc", "auc_acc", "epochs_to_acc=0.8", "time_to_acc=0.8"]
    run(monkeypatch, "st", *(word for name in names for word in ("--metric", name)))
    rows = {r["metric"]: r for r in comparisons(Path("st"))}
    assert number(rows["best_acc"], "mean_baseline") == pytest.approx(0.905, abs=0.01)
    assert number(rows["last_acc"], "mean_baseline") == pytest.approx(0.855, abs=0.01)
    assert number(rows["auc_acc"], "mean_baseline") == pytest.approx((0.6 + 0.8 + 0.875) / 3, abs=0.01)
    reach = rows["epochs_to_acc=0.8"]
    assert (number(reach, "mean_baseline"), number(reach, "mean_treatment")) == (3.0, 4.0)
    assert reach["test"] == "log-rank within pairs" and reach["verdict"] == "different"
    assert "10 of 10 against 0 of 10 sessions never got there" in reach["reason"]
    assert number(rows["time_to_acc=0.8"], "mean_baseline") == 6.0


def test_looking_early_spends_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    two_arms(Path("st"), sessions=10, shift=0.0016)
    run(monkeypatch, "st", "--metric", "test_acc")
    (whole,) = comparisons(Path("st"))
    run(monkeypatch, "st", "--metric", "test_acc", "--look-every", "5", "--planned", "30")
    (early,) = comparisons(Path("st"))
    assert (whole["looks"], early["looks"]) == ("", "5, 10 of 30")
    assert number(whole, "p") < 0.05 < number(early, "p")
    assert (whole["verdict"], early["verdict"]) == ("different", "inconclusive")


def test_json_latex_and_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two_arms(Path("st"))
    run(monkeypatch, "st", "--json")
    body = json.loads(capsys.readouterr().out)
    assert (body["sessions_found"], body["sessions_expected"], body["tests"]) == (24, 24, 2)
    assert [c["metric"] for c in body["comparisons"]] == ["test_acc", "epoch_time_s"]
    assert body["comparisons"][0]["margin"] is None
    run(monkeypatch, "st", "--format", "latex")
    said = capsys.readouterr().out
    assert r"\begin{tabular}{lrrrrrrrl}" in said and r"95 \% interval" in said and r"\bottomrule" in said
    run(monkeypatch, "st", "--format", "md")
    assert "| arm | n | mean | sd | test-set se | diff | 95 % interval |" in capsys.readouterr().out


def test_a_terminal_gets_frames_and_colours_and_a_pipe_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_arms(Path("st"), shift=0.01)
    run(monkeypatch, "st")
    assert "─" not in capsys.readouterr().out
    monkeypatch.setattr(tables, "plain_console", lambda: __import__("rich.console").console.Console(
        force_terminal=True, width=100))  # fmt: skip
    run(monkeypatch, "st")
    said = capsys.readouterr().out
    assert "─" in said and "\x1b[1;35mdifferent" in said


def test_three_arms_have_an_omnibus_test_and_a_ranking(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for n in range(6):
        for arm, mean in (("obn", 0.9), ("gn", 0.9005), ("nn", 0.8)):
            session(Path("st"), arm, n, mean + 0.001 * rng.standard_normal())
    run(monkeypatch, "st", "--metric", "test_acc")
    said = capsys.readouterr().out
    assert "best first: gn (a), obn (a), nn (b); arms that share a letter are not told apart" in said
    assert "any difference among all arms (Welch's ANOVA): F(2, " in said


def test_a_glob_and_a_results_csv_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    two_arms(Path("st"))
    run(monkeypatch, "st", "--out", "a")
    run(monkeypatch, "st/results.csv", "--out", "b")
    run(monkeypatch, "s*/results.csv", "--out", "c")
    texts = {(Path(name) / "comparisons.csv").read_text() for name in "abc"}
    assert len(texts) == 1


def test_the_order_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    two_arms(Path("st"))
    run(monkeypatch, "st")
    head, *lines = Path("st/results.csv").read_text().splitlines()
    Path("r.csv").write_text("\n".join([head, *reversed(lines)]) + "\n")
    run(monkeypatch, "r.csv", "--out", "r")
    for one, other in zip(comparisons(Path("st")), comparisons(Path("r")), strict=True):
        assert {k: one[k] for k in ("p", "diff", "lag1_baseline", "verdict")} == {
            k: other[k] for k in ("p", "diff", "lag1_baseline", "verdict")
        }


def test_a_plan_says_how_many_sessions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--plan", "--sd", "0.0018", "--difference", "0.001")
    assert "difference of 0.001 at sd 0.0018: 52 sessions an arm (Welch's t" in capsys.readouterr().out
    two_arms(Path("st"))
    run(monkeypatch, "--plan", "st", "--difference", "0.001", "--margin", "epoch_time_s=10%")
    said = capsys.readouterr().out
    assert "test_acc, mbn-stride4 against obn: sd 0.00" in said and "of 12 paired differences" in said
    assert "epoch_time_s, mbn-stride4 against obn: sd" in said and "show equivalence within ±0.10" in said


def test_labels_drop_the_words_that_all_arms_share() -> None:
    arms = {"s1": "obn-resnet9-digits", "s2": "mbn-stride4-resnet9-digits"}
    assert short_names(arms) == {"s1": "obn", "s2": "mbn-stride4"}
    assert short_names({"s1": "obn-resnet9", "s2": "obn-resnet9"}) == {"s1": "s1", "s2": "s2"}
    assert short_names({"s1": "obn-resnet9"}) == {"s1": "obn-resnet9"}
    assert short_names({"s1": "bn-a-b", "s2": "bn-a-c"}) == {"s1": "bn-b", "s2": "bn-c"}


FILES = {
    "status.csv": "arm,session,seed,test_acc,status\nobn,0,0,0.9,OK\n",
    "nameless.csv": "arm,session,seed,test_acc\nobn,0,0,0.9\n,1,0,0.9\n",
    "huge.csv": "arm,session,seed,test_acc\nobn,0,0,1e160\n",
    "hundred.csv": "arm,session,seed,test_acc\nobn,0,0,90.5\n",
    "zero.csv": "arm,x\nobn,1\nobn,-1\nmbn,2\nmbn,3\n",
    "text.csv": "arm,session,seed,test_acc\nobn,0,0,0.9\nmbn,0,0,high\n",
    "twice.csv": "arm,session,seed,test_acc\nobn,0,0,0.9\nobn,0,0,0.8\n",
    "armless.csv": "session,test_acc\n0,0.9\n",
    "short.csv": "Model No.,Accuracy\nModel-0,0.9\n",
    "percent.csv": "Model No.,Time(s),Accuracy\nModel-0,1,90.5\n",
    "again.csv": "Model No.,Time(s),Accuracy\nModel-0,1,0.9\nModel-0,1,0.8\n",
    "none.csv": "arm,session,seed,test_acc\n",
    "empty.csv": "",
    "binary.csv": "\x00\x01\x02",
    "bare.csv": "arm,session\nobn,1\n",
    "torn.csv": 'arm,session,seed,test_acc\nobn,0,0,"0.9\n',
}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["void"], "no sessions under void"),
        (["st", "--baseline", "obm"], "baseline 'obm': no such arm; did you mean 'obn'?"),
        (["st", "--metric", "test_ac"], "did you mean 'test_acc'?"),
        (["st", "--metric", "hostname"], "no such column of numbers"),
        (["st", "--metric", "time_to_acc"], "give the accuracy to reach"),
        (["st", "--metric", "time_to_acc=93"], "give the accuracy to reach"),
        (["st", "--metric", "auc_acc"], "no session has an epochs.csv"),
        (["st", "--metric", "test_acc=1"], "only time_to_acc and epochs_to_acc take a value"),
        (["st", "--margin", "test_acc=0"], "a margin is a number above 0"),
        (["st", "--margin", "test_acc=-1%"], "a margin is a number above 0"),
        (["st", "--margin", "test_acc=nan"], "a margin is a number above 0"),
        (["st", "--margin", "0.01"], "name the metric, like test_acc=0.01"),
        (["st", "--margin", "test_ac=0.01"], "did you mean 'test_acc'?"),
        (["st", "--alpha", "5"], "--alpha must lie between 0 and 1, got 5"),
        (["st", "--by", "datset"], "--by datset: st/results.csv has no such column; did you mean 'dataset'?"),
        (["st", "--look-every", "5"], "--look-every and --planned go together"),
        (["st", "--look-every", "5", "--planned", "0"], "--planned must be an int ≥ 1, got 0"),
        (["st", "--sd", "1"], "--sd belongs to planning; add --plan"),
        (["--plan"], "--plan needs --sd"),
        (["--plan", "--sd", "1"], "--plan needs --difference"),
        (["--plan", "--sd", "-1", "--difference", "1"], "--sd must be a number above 0, got -1"),
        (["--plan", "--sd", "1", "--difference", "x"], "--difference must be a number above 0, got 'x'"),
        (["--plan", "st", "--difference", "0.1"], "st: "),
        (["a=nowhere.csv"], "a=nowhere.csv: no file nowhere.csv"),
        (["a=ok.csv", "a=ok2.csv"], "two files have one name: a"),
        (["text.csv"], "text.csv, line 3: test_acc='high' is not a number"),
        (["twice.csv"], "session 0 of obn is there twice"),
        (["armless.csv"], "armless.csv: no column 'arm'"),
        (["x=short.csv"], "short.csv: no column 'Time(s)'"),
        (["x=percent.csv"], "percent.csv, line 2: Accuracy=90.5 must be a fraction"),
        (["x=again.csv"], "again.csv: session Model-0 is there twice"),
        (["none.csv"], "none.csv has no rows"),
        (["empty.csv"], "empty.csv is not a CSV file"),
        (["binary.csv"], "binary.csv"),
        (["bare.csv"], "no metric: the rows have neither test_acc nor a time"),
        (["torn.csv"], "torn.csv"),
        (["status.csv"], "status.csv, line 2: status='OK' is none of ok, diverged, failed, interrupted"),
        (["nameless.csv"], "nameless.csv, line 3: arm is empty"),
        (["huge.csv"], "huge.csv, line 2: test_acc=1e+160 is out of any range"),
        (["hundred.csv"], "test_acc=90.5 must be a fraction from 0 to 1"),
        (
            ["zero.csv", "--metric", "x", "--margin", "x=2%"],
            "a margin of 0.02 of the baseline's mean, which is 0",
        ),
        (["obn=ok.csv", "st"], "two arms are called 'obn'"),
        (["st", "--metric", "seed"], "no such column of numbers"),
        (["st", "--metric", "key"], "no such column of numbers"),
        (["st", "--baseline", "[/red]"], "baseline '[/red]': no such arm"),
        (["st", "--power", "0.04"], "--power=0.04 must lie above --alpha=0.05"),
        (["st", "--alpha", "1e-320"], "--alpha must lie between"),
        (["st", "--seed", "-1"], "--seed must be an int ≥ 0"),
        (["--plan", "--sd", "1", "--difference", "1", "--json"], "--json does nothing with --plan"),
        (
            ["--plan", "--sd", "1", "--difference", "1", "--baseline", "x"],
            "--baseline does nothing with --plan",
        ),
        (
            ["--plan", "--sd", "1", "--difference", "1", "--comparisons", "0"],
            "--comparisons must be an int ≥ 1",
        ),
        (["--plan", "st", "--difference", "1", "--difference", "2"], "test_acc has two"),
        (["damaged"], "is no plan; remove it to make it again"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session(Path("st"), "obn", 0, 0.9)
    Path("void").mkdir()
    session(Path("damaged"), "obn", 0, 0.9)
    Path("damaged/plan-0.json").write_text("{}")
    for name, text in FILES.items():
        Path(name).write_text(text)
    for name in ("ok.csv", "ok2.csv"):
        Path(name).write_text("Model No.,Time(s),Accuracy\nModel-0,1,0.9\n")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert line in said and said.count("\n") == 1 and said.startswith("normbench stats: ")


def test_looks_that_were_kept_cannot_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_arms(Path("st"), sessions=10, shift=0.0016)
    arms = [{"setting": f"{arm}-hash", "arm": arm, "config_hash": "", "choices": {}, "values": {"out": "."}}
            for arm in ("obn", "mbn-stride4")]  # fmt: skip
    planned = [{"arm": a, "session": n, "seed": 0, "launch_order": 0} for n in range(30) for a in (0, 1)]
    Path("st/plan-0.json").write_text(json.dumps({"study": "st", "arms": arms, "sessions": planned}))
    plan = Plan.newest(Path("st"))
    assert plan is not None
    Looks(30, (5, 10)).write(plan.path.with_name(plan.path.name.replace("plan", "looks")))
    for more in ([], ["--all"]):
        run(monkeypatch, "st", "--metric", "test_acc", *more)
        (row,) = comparisons(Path("st"))
        assert (row["looks"], row["verdict"]) == ("5, 10 of 30", "inconclusive")
    with pytest.raises(SystemExit):
        run(monkeypatch, "st", "--look-every", "10", "--planned", "10")
    assert "was looked at after 5, 10 of 30 sessions" in capsys.readouterr().err


def test_diverged_sessions_reach_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(10):
        session(Path("st"), "obn", n, 0.9)
        curve(Path("st"), "obn", n, [0.5, 0.6, 0.7, 0.85, 0.9 - n / 1000])
        cut = n < 6
        session(Path("st"), "nn", n, 0.1 if cut else 0.9, status="diverged" if cut else "ok")
        curve(Path("st"), "nn", n, [0.5] if cut else [0.5, 0.6, 0.85, 0.9, 0.9 - n / 1000])
    run(monkeypatch, "st", "--metric", "epochs_to_acc=0.8", "--metric", "auc_acc")
    reach, auc = comparisons(Path("st"))
    assert number(reach, "mean_baseline") == 4.0 and number(reach, "mean_treatment") == pytest.approx(4.2)
    assert (
        reach["verdict"] == "inconclusive"
        and "6 of 10 against 0 of 10 sessions never got there" in reach["reason"]
    )
    assert number(auc, "mean_treatment") < 0.4 < number(auc, "mean_baseline")


def test_studies_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for study in ("one", "two"):
        for n in range(3):
            session(Path(study), "obn", n, 0.9 + n / 100)
            session(Path(study), "mbn", n, 0.9 + n / 50)
        run(monkeypatch, study)
    head, *lines = Path("one/results.csv").read_text().splitlines()
    Path("both.csv").write_text(
        "\n".join([head, *lines, *Path("two/results.csv").read_text().splitlines()[1:]]) + "\n"
    )
    run(monkeypatch, "both.csv", "--by", "study", "--metric", "test_acc")
    assert [r["study"] for r in comparisons()] == ["one", "two"]


def test_a_pipe_that_closes_early_loses_nothing(tmp_path: Path) -> None:
    two_arms(tmp_path / "st")
    command = f"{sys.executable} -m normbench.stats st | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "st" / "comparisons.csv").is_file()


@pytest.mark.slow
def test_a_million_rows_fit(tmp_path: Path) -> None:
    arms, sessions = 40, 25_000
    rng = np.random.default_rng(0)
    shared = rng.normal(0.9, 0.002, sessions)
    with (tmp_path / "big.csv").open("w") as file:
        file.write("arm,session,seed,model,dataset,batch_size,status,test_acc,epoch_time_s\n")
        for arm in range(arms):
            acc, time = shared + rng.normal(0, 0.001, sessions), rng.normal(11, 0.1, sessions)
            file.writelines(
                f"norm{arm},{n},0,resnet9,cifar10,512,ok,{acc[n]:.6f},{time[n]:.6f}\n"
                for n in range(sessions)
            )
    # VmHWM, not ru_maxrss, which begins with what the process that forked this one held
    command = "import runpy, sys; sys.argv = ['stats', 'big.csv']; "
    command += "runpy.run_module('normbench.stats', run_name='__main__'); "
    command += "status = open('/proc/self/status').read(); "
    command += "print('MiB', int(status.partition('VmHWM:')[2].split()[0]) // 1024)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "1,000,000 of 1,000,000 sessions" in done.stdout
    assert int(done.stdout.rpartition("MiB ")[2]) < 2048
    assert len(comparisons(tmp_path)) == 78
