"""Each rule of the four verdicts, and a defined outcome for every degenerate sample."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normbench.plan import Plan, write_json
from normbench.stats.analysis import Analysis, analyse
from normbench.stats.comparison import Comparison, Margin, Options
from normbench.stats.inputs import Sessions, choose_metrics, read
from normbench.stats.metrics import Metric
from normbench.stats.sequential import Looks
from normbench.stats.stopping import decided

NAN = float("nan")
QUICK = Options(resamples=99)
Values = Sequence[float]


def rows_of(arms: Mapping[str, Values], metric: str, pairs: bool) -> pd.DataFrame:
    """Sessions interleaved in launch order; with `pairs` they share random numbers."""
    rows = [
        {"key": arm, "id": arm, "session": float(n), "launch_order": float(n), "status": "ok", metric: value}
        for arm, values in arms.items() for n, value in enumerate(values)
    ]  # fmt: skip
    frame = pd.DataFrame(rows).sort_values("launch_order", kind="stable", ignore_index=True)
    return frame.assign(seed=0.0, model="lenet", dataset="digits", batch_size=16.0) if pairs else frame


def judged(
    arms: Mapping[str, Values],
    metric: str = "test_acc",
    pairs: bool = False,
    options: Options = QUICK,
    **columns: object,
) -> Analysis:
    return analyse(Sessions(rows_of(arms, metric, pairs)), [Metric.of(metric)], options)


def one(baseline: Values, treatment: Values, **how: Any) -> Comparison:
    return judged({"obn": baseline, "mbn": treatment}, **how).comparisons[0]


def normal(n: int, mean: float = 0.9, seed: int = 0, sd: float = 0.001) -> np.ndarray:
    return mean + sd * np.random.default_rng(seed).standard_normal(n)


def within(margin: float, **more: Any) -> Options:
    return Options(margins={"test_acc": Margin(margin), "epoch_time_s": Margin(margin)}, resamples=99, **more)


def test_a_clear_difference_is_different() -> None:
    c = one(normal(10), normal(10, 0.91, 1))
    assert c.verdict == "different" and c.reason.startswith("higher by 0.0") and "p < 1e-6" in c.reason


def test_a_difference_within_the_margin_is_still_different_and_says_so() -> None:
    c = one(normal(30), normal(30, 0.902, 1), options=within(0.01))
    assert c.verdict == "different" and "though within the margin of ±0.01" in c.reason


def test_no_difference_within_the_margin_is_equivalent() -> None:
    c = one(normal(30), normal(30, seed=1), options=within(0.002))
    assert c.verdict == "equivalent" and c.reason.startswith("within ±0.002")


def test_without_a_margin_no_difference_found_is_never_equal() -> None:
    c = one(normal(30), normal(30, seed=1))
    assert c.verdict == "inconclusive" and "these sessions find" in c.reason
    assert c.n_needed > 30 and f"about {c.n_needed:,.0f} an arm" in c.reason


def test_a_wide_interval_within_no_margin_is_inconclusive() -> None:
    c = one(normal(5), normal(5, seed=1), options=within(0.0002))
    assert c.verdict == "inconclusive" and "would show equivalence within ±0.0002" in c.reason


def test_what_only_holds_alone_is_not_different_after_holm() -> None:
    options = Options(resamples=99)
    alone = one(normal(8), normal(8, 0.9013, 6), options=options)
    assert 0.005 < alone.p < 0.05 and alone.verdict == "different"
    arms = {
        "obn": normal(8),
        **{f"x{i}": normal(8, seed=10 + i) for i in range(9)},
        "mbn": normal(8, 0.9013, 6),
    }
    c = next(c for c in judged(arms, options=options).comparisons if c.treatment == "mbn")
    assert c.p == alone.p and c.p_holm == pytest.approx(10 * c.p)
    assert c.verdict == "inconclusive" and "p = 0.018 (Holm over 10 tests: 0.18)" in c.reason


def test_pairs_identical_in_all_sessions_are_equivalent_without_a_margin() -> None:
    x = normal(6)
    c = one(x, x, pairs=True)
    assert (c.verdict, c.reason, c.p) == ("equivalent", "identical in all 6 sessions", 1.0)


def test_a_few_identical_sessions_prove_nothing() -> None:
    x = normal(4)
    assert one(x, x, pairs=True).verdict == "inconclusive"


def test_equal_values_without_pairs_prove_nothing() -> None:
    x = normal(6)
    assert one(x, x).verdict == "inconclusive"


@pytest.mark.parametrize(("n", "m"), [(0, 5), (1, 5), (5, 1), (1, 1)])
def test_one_session_is_not_comparable(n: int, m: int) -> None:
    c = one(normal(n) if n else [NAN], normal(m))
    assert c.verdict == "not comparable"
    assert f"too few sessions: {m} against {n}, 2 an arm needed" in c.reason
    assert math.isnan(c.p) and math.isnan(c.welch_p)


def test_two_sessions_are_enough_for_a_test() -> None:
    c = one([0.5, 0.51], [0.9, 0.91])
    assert c.verdict == "different" and math.isnan(c.bca_low)
    assert c.p == c.welch_p


def test_arms_that_never_vary_are_judged_by_permutation() -> None:
    c = one([0.9] * 5, [0.8] * 5)
    assert (c.test, c.p) == ("exact permutation", pytest.approx(2 / 252))
    assert (
        c.verdict == "different" and math.isnan(c.ci_low) and math.isnan(c.welch_p) and math.isnan(c.hedges_g)
    )
    assert one([0.9] * 2, [0.8] * 2).verdict == "inconclusive"
    assert one([0.9] * 5, [0.8] * 5, pairs=True).p == 2 / 32
    assert one([0.9] * 5, [0.9] * 5).p == 1.0
    assert one([0.9] * 5, [0.9] * 5, options=within(0.01)).verdict == "equivalent"
    assert one([0.9] * 2, [0.9] * 2, options=within(0.01)).verdict == "inconclusive"


def test_one_arm_without_spread_is_no_obstacle() -> None:
    c = one([0.9] * 6, normal(6, 0.95))
    assert c.verdict == "different" and c.test == "Welch"


def test_pairs_that_differ_by_a_constant_are_judged_by_permutation() -> None:
    x = normal(8)
    c = one(x, x + 0.125, pairs=True)
    assert c.test == "exact permutation" and c.p == 2 / 2**8 and c.verdict == "different"
    assert math.isnan(c.paired_t)


def test_missing_values_are_left_out_and_forbid_equivalence() -> None:
    x, y = normal(30), normal(30, seed=1)
    y[3] = NAN
    c = one(x, y, options=within(0.005))
    assert (c.n_baseline, c.n_treatment, c.verdict) == (30, 29, "inconclusive")
    assert "but 1 ended sessions have no value" in c.reason


def test_pairs_with_a_missing_partner_are_left_out() -> None:
    x, y = normal(10), normal(10, 0.91, 1)
    x[2] = NAN
    c = one(x, y, pairs=True)
    assert (
        c.test == "paired t"
        and c.reason.startswith("higher")
        and "by the 9 sessions that both arms have" in c.reason
    )
    keep = np.arange(10) != 2
    assert c.diff == pytest.approx((y - x)[keep].mean())


def test_arms_that_share_few_sessions_are_not_paired() -> None:
    x, y = normal(10), normal(10, seed=1)
    x[:7], y[8:] = NAN, NAN
    assert one(x, y, pairs=True).test == "Welch"


def test_times_need_ten_sessions() -> None:
    c = one(normal(9, 1.0), normal(9, 2.0, 1), metric="epoch_time_s")
    assert c.verdict == "not comparable" and "9 times cannot show" in c.reason and math.isnan(c.p_holm)
    assert one(normal(10, 1.0, 1), normal(10, 2.0, 2), metric="epoch_time_s").verdict == "different"


def test_times_that_drift_are_not_called_different() -> None:
    trend = np.linspace(0, 1, 30)
    c = one(normal(30, 1.0), 1.0 + trend, metric="epoch_time_s")
    assert c.welch_p < 1e-6 and c.verdict == "not comparable"
    assert "lag-1 autocorrelation 1.00" in c.reason and c.ess_treatment < 3


def test_a_drift_that_both_arms_share_is_taken_out_by_pairs() -> None:
    drift = 10 + np.cumsum(np.random.default_rng(0).standard_normal(30))
    x, y = drift + normal(30, 0.0, 1, 0.1), drift + normal(30, 0.3, 2, 0.1)
    c = one(x, y, metric="epoch_time_s", pairs=True)
    assert c.verdict == "different" and c.test == "paired t (ess)" and c.lag1_diff < 0.4 < c.lag1_baseline
    assert one(x, y, metric="epoch_time_s").verdict == "not comparable"


@pytest.mark.slow
@pytest.mark.parametrize("column", ["device_name", "precision", "torch_version", "pack", "threads", "slots"])
def test_what_times_depend_on_must_agree(column: str) -> None:
    rows = rows_of({"obn": normal(10, 1.0), "mbn": normal(10, 2.0, 1)}, "epoch_time_s", pairs=True)
    values = ("a", "b") if column in ("device_name", "precision", "torch_version") else (1.0, 2.0)
    rows[column] = np.where(rows["key"] == "obn", values[0], values[1]) if values[0] == "a" else np.where(
        rows["key"] == "obn", *values)  # fmt: skip
    (c,) = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).comparisons
    assert c.verdict == "not comparable" and f"{column} differs" in c.reason
    rows[column] = None
    (c,) = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).comparisons
    assert c.verdict == "different"


def test_pairs_on_different_hosts_do_not_take_drift_out() -> None:
    rows = rows_of({"obn": normal(10, 1.0), "mbn": normal(10, 2.0, 1)}, "epoch_time_s", pairs=True)
    rows["hostname"] = np.where(rows["key"] == "obn", "one", "two")
    (c,) = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).comparisons
    assert c.test == "Welch (ess)" and "pairs ran on different hosts" in c.reason


def test_a_control_that_agrees_flags_nothing() -> None:
    arms = {"obn": normal(10), "torch_bn": normal(10, seed=1), "mbn": normal(10, 0.91, 2)}
    analysis = judged(arms)
    assert [c.control for c in analysis.comparisons] == [True, False]
    assert not analysis.distrusted and "distrust" not in " ".join(c.reason for c in analysis.comparisons)


def test_controls_are_matched_by_everything_but_the_norm() -> None:
    arms = {f"{norm}-{size}": normal(4, seed=i) for i, (norm, size) in enumerate(
        [("obn", "bs2"), ("obn", "bs16"), ("torch_bn", "bs16")])}  # fmt: skip
    controls = [(c.baseline, c.treatment) for c in judged(arms).comparisons if c.control]
    assert controls == [("obn-bs16", "torch_bn-bs16")]


def test_diverged_sessions_stay_in_the_mean() -> None:
    rows = rows_of({"obn": [0.9, 0.91, 0.92], "nn": [0.9, 0.1, 0.91]}, "test_acc", pairs=False)
    rows.loc[(rows["key"] == "nn") & (rows["session"] == 1), "status"] = "diverged"
    (c,) = analyse(Sessions(rows), [Metric("test_acc")], QUICK).comparisons
    assert c.mean_treatment == pytest.approx(1.91 / 3)
    assert c.diverged_treatment == 1 and "1 diverged against 0 (no different rate shown" in c.reason


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([0.9, 0.91, 0.92, NAN, 0.9000000001]), min_size=1, max_size=12),
    st.lists(st.sampled_from([0.9, 0.91, 0.95, NAN]), min_size=1, max_size=12),
    st.sampled_from(["test_acc", "epoch_time_s"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_every_sample_has_a_verdict_and_no_warning(
    x: Values, y: Values, metric: str, pairs: bool, looking: bool
) -> None:
    looks = Looks.every(3, 12, max(len(x), len(y))) if looking else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = one(x, y, metric=metric, pairs=pairs, options=within(0.01, looks=looks))
        swapped = one(y, x, metric=metric, pairs=pairs, options=within(0.01, looks=looks))
    assert c.verdict in ("different", "equivalent", "inconclusive", "not comparable") and c.reason
    assert c.verdict == swapped.verdict
    assert math.isnan(c.p) or 0 <= c.p <= 1
    if not math.isnan(c.diff):
        assert c.diff == pytest.approx(-swapped.diff, abs=1e-12)


def test_decided_yet(tmp_path: Path) -> None:
    study = tmp_path / "st"
    study.mkdir()
    rows = rows_of(
        {"obn": normal(10), "far": normal(10, 0.95, 1), "near": normal(10, 0.9002, 2)}, "test_acc", pairs=True
    )
    rows.assign(setting=rows["key"], arm=rows["key"]).drop(columns=["key", "id"]).to_csv(
        study / "results.csv", index=False
    )
    early = decided(study, Looks.every(5, planned=30, done=10))
    assert early.settled == {"far": "different"} and list(early.open) == ["near"] and not early
    end = decided(study, Looks.every(5, planned=10, done=10))
    assert end and not end.open
    close = decided(study, Looks.every(5, planned=10, done=10), margins={"test_acc": Margin(0.01)})
    assert close.settled == {"far": "different", "near": "equivalent"}


def test_naive_looks_would_have_stopped_where_bounds_do_not() -> None:
    x, y = normal(10), normal(10, 0.9009, 0)
    naive = one(x, y, pairs=True)
    held = one(x, y, pairs=True, options=Options(resamples=99, looks=Looks(30, (5, 10))))
    assert naive.p < 0.05 < held.p and held.looks == "5, 10 of 30"
    assert one(x, y, pairs=True, options=Options(resamples=99, looks=Looks(30, ()))).p == 1.0


def test_a_stopped_arm_is_complete(tmp_path: Path) -> None:
    study = tmp_path / "st"
    for arm, n in (("obn", 6), ("mbn", 4)):
        for session in range(n):
            folder = study / arm / f"s{session}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text("{}")
            row = {"setting": arm, "arm": arm, "session": session, "seed": 0, "status": "ok",
                   "launch_order": session, "test_acc": 0.9 + session / 1000}  # fmt: skip
            write_json(folder / "session.json", {"row": row})
    arms = [
        {"setting": a, "arm": a, "config_hash": "", "choices": {}, "values": {"out": str(tmp_path)}}
        for a in ("obn", "mbn")
    ]
    planned = [{"arm": a, "session": n, "seed": 0, "launch_order": 0} for n in range(6) for a in (0, 1)]
    write_json(study / "plan-1.json", {"study": "st", "arms": arms, "sessions": planned})
    sessions = read([str(study)], None, (), everything=False)
    assert (sessions.planned, sessions.missing) == (12, ["mbn/s4", "mbn/s5"])
    plan = Plan.newest(study)
    assert plan is not None
    Looks(6, (2, 4, 6), {"mbn": 4}).write(plan.path.with_name(plan.path.name.replace("plan", "looks")))
    sessions = read([str(study)], None, (), everything=False)
    assert (sessions.planned, sessions.missing, sessions.looks) == (10, [], Looks(6, (2, 4, 6), {"mbn": 4}))
    (c,) = analyse(
        sessions, choose_metrics(sessions, None), Options(resamples=0, looks=sessions.looks)
    ).comparisons
    assert c.looks == "2, 4 of 6" and c.n_expected == 4


def test_a_target_that_nobody_reached_is_no_equivalence() -> None:
    rows = rows_of({"obn": [3.0] * 12, "mbn": [3.0] * 12}, "epochs_to_acc=0.9", pairs=True)
    rows["epochs_to_acc=0.9 reached"] = False
    options = Options(margins={"epochs_to_acc=0.9": Margin(0.5)})
    (c,) = analyse(Sessions(rows), [Metric.of("epochs_to_acc=0.9")], options).comparisons
    assert (c.verdict, c.p, c.tost_p) == ("inconclusive", 1.0, 1.0)
    assert "12 of 12 against 12 of 12 sessions never got there" in c.reason


def test_looks_hold_for_times_to_a_target_too() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(
        {"obn": rng.integers(3, 9, 10), "mbn": rng.integers(5, 11, 10)}, "epochs_to_acc=0.9", pairs=True
    )
    rows["epochs_to_acc=0.9 reached"] = True
    metric = [Metric.of("epochs_to_acc=0.9")]
    (plain,) = analyse(Sessions(rows), metric, QUICK).comparisons
    (held,) = analyse(Sessions(rows), metric, Options(looks=Looks(30, (5, 10)))).comparisons
    assert plain.p < 0.1 < held.p and held.looks == "5, 10 of 30"


def test_arms_are_listed_as_a_person_counts() -> None:
    arms = {name: normal(3, seed=i) for i, name in enumerate(["mbn-stride10", "obn", "mbn-stride2", "mbn"])}
    assert judged(arms).groups[0].order() == ["obn", "mbn", "mbn-stride2", "mbn-stride10"]


def test_times_that_never_vary_are_not_comparable() -> None:
    c = one([12.0] * 10, [13.0] * 10, metric="epoch_time_s")
    assert c.verdict == "not comparable" and "no spread" in c.reason


def test_pairs_on_different_machines_are_not_comparable() -> None:
    rows = rows_of({"obn": normal(20, 1.0, 1), "mbn": normal(20, 2.0, 2)}, "epoch_time_s", pairs=True)
    rows["device_name"] = np.where((rows["session"] + (rows["key"] == "mbn")) % 2 == 0, "A100", "V100")
    (c,) = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).comparisons
    assert c.verdict == "not comparable" and "device_name varies within the arms: A100, V100" in c.reason
    rows["device_name"] = np.where(rows["session"] % 2 == 0, "A100", "V100")
    (c,) = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).comparisons
    assert "device_name" not in c.reason


def test_arms_on_hosts_of_their_own_or_in_blocks_come_with_a_caution() -> None:
    rows = rows_of({"obn": normal(20, 1.0, 1), "mbn": normal(20, 2.0, 2)}, "epoch_time_s", pairs=False)
    rows["hostname"] = np.where(rows["key"] == "obn", "one", "two")
    rows["launch_order"] += 100 * (rows["key"] == "mbn")
    (c,) = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).comparisons
    assert "each arm ran on hosts of its own" in c.reason and "one after the other" in c.reason


def test_identical_arms_that_learn_nothing_are_pointed_out() -> None:
    c = one([0.1] * 6, [0.1] * 6, pairs=True)
    assert c.verdict == "equivalent" and "which all have one value: does anything learn?" in c.reason


def test_what_is_not_measured_forbids_identical() -> None:
    x = normal(6)
    x[2] = NAN
    assert one(x, x, pairs=True).verdict == "inconclusive"


def test_arms_that_cannot_be_compared_are_not_ranked() -> None:
    arms = {
        name: normal(12, mean, i) for i, (name, mean) in enumerate([("obn", 1.0), ("gn", 2.0), ("ln", 3.0)])
    }
    rows = rows_of(arms, "epoch_time_s", pairs=False)
    rows["device_name"] = rows["key"].map({"obn": "A100", "gn": "V100", "ln": "T4"})
    group = analyse(Sessions(rows), [Metric("epoch_time_s")], QUICK).groups[0]
    assert not group.ranking and not group.omnibus


def test_who_looks_early_gets_no_ranking() -> None:
    arms = {name: normal(5, 0.9, i) for i, name in enumerate(("obn", "gn", "ln"))}
    assert judged(arms).groups[0].ranking
    group = judged(arms, options=Options(resamples=0, looks=Looks(30, (5,)))).groups[0]
    assert not group.ranking and not group.omnibus


def test_arms_without_spread_are_ranked_by_permutation() -> None:
    group = judged({"obn": [0.9] * 5, "gn": [0.5] * 5, "ln": [0.1] * 5}).groups[0]
    assert [(r.label, r.letters) for r in group.ranking["test_acc"]] == [
        ("obn", "a"),
        ("gn", "b"),
        ("ln", "c"),
    ]


def test_a_failed_sessions_value_is_no_result() -> None:
    rows = rows_of({"obn": [0.9, 0.91, 0.92], "nn": [0.9, 0.1, 0.91]}, "test_acc", pairs=False)
    rows.loc[(rows["key"] == "nn") & (rows["session"] == 1), "status"] = "failed"
    sessions = Sessions(rows)
    (c,) = analyse(sessions, choose_metrics(sessions, None), QUICK).comparisons
    assert (c.n_treatment, c.mean_treatment, c.unmeasured) == (2, pytest.approx(0.905), 0)


def test_divergence_makes_no_arm_faster() -> None:
    rows = rows_of(
        {"obn": normal(12, 60.0, 1), "nn": [*normal(10, 60.0, 2), 1.0, 2.0]}, "total_time_s", pairs=False
    )
    rows.loc[rows["total_time_s"] < 3, "status"] = "diverged"
    sessions = Sessions(rows)
    (c,) = analyse(sessions, choose_metrics(sessions, None), QUICK).comparisons
    assert c.n_treatment == 10 and c.mean_treatment > 59


def test_rates_of_divergence_are_corrected_over_treatments() -> None:
    arms = {"obn": normal(6), **{f"x{i}": normal(6, seed=i) for i in range(1, 5)}}
    rows = rows_of(arms, "test_acc", pairs=False)
    rows.loc[(rows["key"] == "x1") & (rows["session"] < 5), "status"] = "diverged"
    c = analyse(Sessions(rows), [Metric("test_acc")], QUICK).comparisons[0]
    assert c.fisher_p == pytest.approx(0.0152, abs=1e-4) and c.fisher_holm == pytest.approx(4 * c.fisher_p)
    assert "no different rate shown" in c.reason


def test_the_last_look_sees_everything_though_a_session_is_missing() -> None:
    x, y = normal(12), normal(12, 0.91, 1)
    y[3] = NAN
    c = one(x, y, pairs=True, options=Options(resamples=99, looks=Looks(12, (6, 12))))
    assert c.looks == "6, 12 of 12" and c.verdict == "different"
    assert c.ci_low < c.diff < c.ci_high


def test_times_worth_too_few_sessions_are_not_ranked() -> None:
    trend = np.linspace(0, 1, 30)
    arms = {name: normal(30, 1.0 + i, i) + trend for i, name in enumerate(("obn", "gn", "ln"))}
    analysis = judged(arms, "epoch_time_s")
    assert {c.verdict for c in analysis.comparisons} == {"not comparable"}
    assert not analysis.groups[0].ranking and not analysis.groups[0].omnibus
