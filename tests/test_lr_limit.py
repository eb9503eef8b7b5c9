"""The largest learning rate that still trains: the search, the curve, the trials, the door."""

import csv
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit

from normbench import cli
from normbench.lr_limit import curve, figures, page
from normbench.lr_limit import trial as trials
from normbench.lr_limit.curve import (
    Cells,
    Fit,
    contradicts,
    fit_differences,
    fit_limits,
    likelihood_of,
    log_likelihood,
    proportion_interval,
)
from normbench.lr_limit.limits import ratio
from normbench.lr_limit.search import Grid, Seen, next_step
from normbench.lr_limit.trial import Chance, Outcome, judged

GRID = Grid(start=0.1, resolution=1.2, lowest=1e-5, highest=1e4)
STEP = math.log(1.2)


def search(
    failed: Callable[[float], int], grid: Grid = GRID, sessions: int = 8, finite: bool = True
) -> dict[int, Seen]:
    """All places that the search tries where so many of its sessions fail at a rate."""
    seen: dict[int, Seen] = {}
    while step := next_step(seen, grid):
        assert step.place not in seen and grid.ends[0] <= step.place <= grid.ends[1]
        count = failed(grid.rate(step.place))
        seen[step.place] = Seen(sessions, count, 0 if finite else count)
    return seen


@pytest.mark.parametrize("limit", [3e-5, 0.02, 0.0999, 0.1, 0.7, 40.0, 9000.0])
def test_the_search_ends_with_neighbours_around_the_limit(limit: float) -> None:
    seen = search(lambda rate: 8 if rate > limit else 0)
    lower = max(place for place, there in seen.items() if not there.failed)
    assert GRID.rate(lower) <= limit < GRID.rate(lower + 1) and lower + 1 in seen
    assert len(seen) <= 6 + 2 * abs(math.log(limit / 0.1)) / (8 * STEP)  # both sides, then halves


def test_around_a_gradual_limit_it_tries_rates_until_none_and_all_fail() -> None:
    seen = search(lambda rate: round(8 / (1 + (0.5 / rate) ** 3)))
    counts = [seen[place].failed for place in sorted(seen)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 8
    assert sum(0 < count < 8 for count in counts) >= 4


def test_where_the_start_is_too_small_to_learn_it_looks_above_too() -> None:
    seen = search(lambda rate: 0 if 0.8 < rate < 6 else 8)
    trained = [GRID.rate(place) for place, there in seen.items() if not there.failed]
    assert trained and 6 / 1.2 < max(trained) < 6


def test_nothing_is_tried_above_a_rate_that_explodes() -> None:
    seen = search(lambda rate: 8, finite=False)
    assert max(seen) == 0 and min(seen) == GRID.ends[0]


def test_it_ends_at_the_highest_rate_where_nothing_fails_and_tries_both_ends_where_all_does() -> None:
    assert max(search(lambda rate: 0)) == GRID.ends[1]
    seen = search(lambda rate: 8)
    assert (min(seen), max(seen)) == GRID.ends


def test_the_search_ends_whatever_it_sees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        search(lambda rate: int(rng.integers(0, 9)), finite=bool(rng.integers(2)))


@pytest.mark.parametrize("resolution", [1.01, 1.1, 1.2, 2.0, 4.0, 10.0])
def test_the_brackets_stride_is_a_power_of_two_near_a_factor_4(resolution: float) -> None:
    stride = Grid(0.1, resolution, 1e-5, 1e4).stride
    assert stride & (stride - 1) == 0 and (stride == 1 or 4 <= resolution**stride < 16.1)


def fit(sessions: list[dict[float, bool]]) -> Fit:
    """Of sessions that were all tried at the rates of the first."""
    return fit_limits(sessions, min(sessions[0]), max(sessions[0]), STEP)


def sharp(*limits: int) -> list[dict[float, bool]]:
    """Sessions that train at every place up to their limit and fail at every one above, at places 0 to 20."""
    return [{1.2**k: k > limit for k in range(21)} for limit in limits]


def test_a_sessions_trials_are_as_likely_as_the_integral_over_its_limit_says() -> None:
    failed = {1.0: False, 1.2: True, 1.44: False, 1.728: True}
    cells = Cells(-2.0, 0.02, 250)
    m, s, w = 0.2, 0.3, 0.15

    def at(limit: float) -> float:
        chances = [expit((math.log(rate) - limit) / w) for rate in failed]
        return float(np.prod([p if bad else 1 - p for p, bad in zip(chances, failed.values(), strict=True)]))

    truth, _ = quad(lambda x: at(m + s * x) * expit(x) * expit(-x), -40, 40, points=(-2, 2))
    found = log_likelihood(
        likelihood_of([failed], cells, w), next(cells.shares(np.array([m]), np.array([s])))
    )
    assert found == pytest.approx([math.log(truth)], abs=1e-3)
    certain = fit([{1.0: False, 1.2: True}])  # the cells between the two rates alone
    assert certain.likelihood.tolist() == [[0] * 16 + [1] * 4 + [0] * 16]


def test_with_one_rate_a_session_it_is_logistic_regression() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(3)
    x = rng.normal(0.4, 0.8, 60)
    failed = rng.random(60) < 1 / (1 + np.exp(-(x - 0.3) / 0.4))
    a, b = sm.Logit(failed.astype(float), sm.add_constant(x)).fit(disp=False).params
    sessions = [{math.exp(v): bool(bad)} for v, bad in zip(x, failed, strict=True)]
    found = fit_limits(sessions, math.exp(min(x)), math.exp(max(x)), STEP)
    assert found.quantile().value == pytest.approx(-a / b, abs=0.03)  # to a part of a cell
    assert found.scale() == pytest.approx(1 / b, rel=0.12)  # of a grid of scales
    at_90 = found.quantile(0.9)
    assert at_90.value == pytest.approx(-a / b + math.log(9) / b, abs=0.05)
    assert at_90.low < at_90.value < at_90.high


def test_complete_separation_gives_the_gap_and_no_more() -> None:
    same = fit(sharp(*[10] * 8))
    found = same.quantile()
    assert same.within == 0 and not any(map(contradicts, sharp(10)))
    assert (found.low, found.high) == pytest.approx((10 * STEP, 11 * STEP), abs=STEP / 10)
    assert found.value == pytest.approx(10.5 * STEP, abs=STEP / 20)
    assert same.quantile(0.9).high > 11 * STEP  # how steep it is nobody has seen


def test_chance_within_sessions_is_no_spread_between_them() -> None:
    torn = [{1.2**k: bool((k + i) % 2) if 9 <= k <= 12 else k > 10 for k in range(21)} for i in range(8)]
    assert all(map(contradicts, torn))
    found = fit(torn)
    assert found.within > STEP / 4 and found.quantile().low > 8 * STEP and found.quantile().high < 13 * STEP
    assert fit(sharp(4, 6, 8, 10, 11, 12, 14, 16)).within == 0


def test_two_sessions_give_a_wide_interval_and_one_gives_none() -> None:
    two, eight = (fit(sharp(*limits)).quantile() for limits in ([8, 11], [8, 11] * 4))
    assert two.high - two.low > 2 * (eight.high - eight.low)
    one = fit(sharp(10)).quantile()
    assert (one.low, one.high) == (-math.inf, math.inf)


def test_limits_that_no_rate_bounds_are_infinite_not_invented() -> None:
    found = fit(sharp(*[20] * 8)).quantile()
    assert found.value == found.high == math.inf and found.low == pytest.approx(20 * STEP, abs=STEP / 2)
    found = fit(sharp(*[-1] * 8)).quantile()
    assert found.value == found.low == -math.inf and found.high == pytest.approx(0, abs=STEP / 2)
    four = fit(sharp(*[20] * 4)).quantile()  # that the median of a population is lower has p = 1/16
    assert (four.low, four.high) == (-math.inf, math.inf)
    nothing = fit_limits([{}] * 8, 1.0, 2.0, STEP)
    assert (nothing.quantile().low, nothing.quantile().high) == (-math.inf, math.inf)
    assert math.isnan(nothing.scale())


def test_ratios_pair_sessions_so_that_what_they_share_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    coarsely(monkeypatch)
    shared = [2, 3, 5, 6, 8, 9, 12, 12]
    one, other = fit(sharp(*[k + 5 for k in shared])), fit(sharp(*shared))
    found = fit_differences(one, other).quantile()
    assert (found.low, found.high) == pytest.approx((4 * STEP, 6 * STEP), abs=STEP / 4)
    same = fit_differences(one, one).quantile()
    assert same.low < 0 < same.high and same.value == pytest.approx(0, abs=STEP / 10)
    open_ended = fit_differences(fit(sharp(*[20] * 8)), other).quantile()
    assert open_ended.high == math.inf and open_ended.low > 8 * STEP
    both = fit_differences(fit(sharp(*[20] * 8)), fit(sharp(*[20] * 8))).quantile()
    assert (both.low, both.high) == (-math.inf, math.inf)


@pytest.fixture(scope="module")
def calibrate() -> ModuleType:
    """scripts/calibrate_lr_limit.py."""
    path = Path(__file__).parents[1] / "scripts" / "calibrate_lr_limit.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_intervals_hold_as_often_as_they_say(
    monkeypatch: pytest.MonkeyPatch, calibrate: ModuleType
) -> None:
    coarsely(monkeypatch)
    limit, both, *_ = calibrate.simulate(calibrate.logistic(0.1), 0.3, True, 6, 40)
    assert limit.sum() >= 34 and both.sum() >= 34  # of 40 at 0.95: fewer in one of 300 runs


def coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of a tenth of the time, whose last digits are not asked for."""
    for constant, value in (("POINTS", 300), ("SCALES", 12), ("COARSE", 6)):
        monkeypatch.setattr(curve, constant, value)


def test_wilsons_interval_of_a_share() -> None:
    assert proportion_interval(0, 8) == pytest.approx((0, 0.3244), abs=1e-3)


def test_an_arm_that_trains_nowhere_has_no_limit_and_none_is_invented(
    monkeypatch: pytest.MonkeyPatch, calibrate: ModuleType
) -> None:
    coarsely(monkeypatch)
    rng, grid = np.random.default_rng(0), Grid(1.0, 1.2, 0.02, 50.0)
    never, some, always = (calibrate.search(np.full(8, at), 0.1, rng, grid) for at in (-99.0, 0.0, 99.0))
    assert (never.limit.low, never.limit.high) == (0, math.inf) and never.too_small == []
    assert never.fails_from == min(never.seen) and never.trained_to is None
    found = ratio(some, never)
    assert found.verdict == "inconclusive" and page.value_words(found.interval) == "-"
    said = page.sentences(never, found)
    assert "at none of" in said[0] and "do not bound the ratio" in said[1] and len(said) == 2
    assert always.limit.value == always.limit.high == math.inf and 35 < always.limit.low < 50
    assert page.span(always.limit).startswith("above ")
    assert page.comparison("always", ratio(some, always)).startswith(
        "always tolerates a larger rate than arm"
    )


def test_what_differs_beside_the_norm_is_said() -> None:
    same = page.parameters(["obn", "nn"], [(100, 8), (100, 0)], bias=False)
    assert "every arm has the same 100; with model.bias=false nn has no bias" in same
    assert page.parameters(["obn", "nn"], [(100, 8), (100, 0)], bias=True).endswith("the same 100")
    assert page.parameters(["a", "b"], [(100, 8), (90, 8)], bias=True).startswith("other networks")


CHANCE = Chance(loss=2.3, acc=0.1, bound=0.13, part="test", images=360)


@pytest.mark.parametrize(
    ("losses", "loss", "acc", "reason"),
    [([2.3] * 8 + [1.0] * 2, 1.0, 0.5, ""), ([1.0] * 8 + [2.3] * 2, 1.0, 0.5, "loss"),
     ([1.0] * 10, 9.0, 0.13, "accuracy"), ([1.0] * 10, 9.0, 0.14, ""),
     ([1.0] * 10, math.nan, 0.5, "non_finite"),
     ([1.0], 1.0, 0.5, "")],
)  # fmt: skip
def test_what_counts_as_failure(losses: list[float], loss: float, acc: float, reason: str) -> None:
    assert judged(losses, loss, acc, CHANCE).reason == reason


TINY = ["model.width=2", "model.n=1", "dataset.train_subset=96", "dataset.test_subset=64", "steps=6"]


def lr_limit(monkeypatch: pytest.MonkeyPatch, *arguments: str, fails: int = 0) -> None:
    """Run the door in this process, by one thread unless told."""
    threads = [] if any(argument.startswith("threads=") for argument in arguments) else ["threads=1"]
    monkeypatch.setattr(sys, "argv", ["lr_limit", *TINY, *threads, *arguments])
    if not fails:
        cli.run("lr_limit")
        return
    with pytest.raises(SystemExit) as ended:
        cli.run("lr_limit")
    assert ended.value.code == fails


def rows_of(path: Path, *but: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in but} for row in csv.DictReader(file)]


TIMES = ("wall_s", "finished_at", "made_at")
HERE = Path("outputs/lr_limit/here")


@pytest.mark.slow
def test_a_trial_is_the_session_that_train_runs(
    monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any]
) -> None:
    lr_limit(monkeypatch, "norm=obn", "sessions=2", "name=here", "resolution=4", "highest=0.5", "lowest=0.05",
             "range.steps=20")  # fmt: skip
    found = [row for row in rows_of(HERE / "trials.csv") if row["rate"] == "0.1"]
    train(
        *TINY,
        "threads=1",
        "model=resnet_cifar",
        "batch=bs16",
        "optim/schedule=constant",
        "session=1,0",
        "tensorboard=false",
    )
    rows = {row["session"]: row for row in rows_of(Path("outputs/adhoc/results.csv"))}
    assert [row["session"] for row in found] == ["0", "1"]
    for row in found:
        assert row["eval_acc"] == rows[row["session"]]["test_acc"]
        assert row["eval_loss"] == rows[row["session"]]["test_loss"]
    losses = [float(row["train_loss"]) for row in rows_of(HERE / "range.csv")]
    assert 10 <= len(losses) <= 20 and all(map(math.isfinite, losses))


@pytest.mark.slow
def test_a_rate_that_explodes_ends_its_trial_and_the_model_serves_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared: list[object] = []
    from normbench import preparing

    prepare = preparing.prepare
    monkeypatch.setattr(preparing, "prepare", lambda config: prepared.append(config) or prepare(config))
    wide = [
        "sessions=2",
        "name=here",
        "resolution=4",
        "range.steps=null",
        "optim.lr=1e6",
        "highest=1e8",
        "lowest=1e-2",
    ]
    lr_limit(monkeypatch, "norm=nn", *wide)
    assert len(prepared) == 1
    rows = rows_of(HERE / "trials.csv")
    first = [row for row in rows if row["rate"] == "1000000.0"]
    assert {row["reason"] for row in first} == {"non_finite"} and all(int(row["steps"]) < 6 for row in first)
    assert float(max(rows, key=lambda row: float(row["rate"]))["rate"]) == 1e6
    last = rows[-1]  # what a diverged session left behind is gone: the trial by itself gives the same
    lr_limit(monkeypatch, "norm=nn", "sessions=2", "name=alone", "resolution=4", "range.steps=null",
             f"optim.lr={last['rate']}", f"highest={float(last['rate']) * 1.01}",
             f"lowest={float(last['rate']) * 0.99}")  # fmt: skip
    alone = rows_of(Path("outputs/lr_limit/alone/trials.csv"))
    assert [alone[1][key] for key in ("rate", "final_loss", "eval_loss")] == [
        last[key] for key in ("rate", "final_loss", "eval_loss")
    ]


class Faked:
    """Trials that fail above a limit of their session's own, without training; Ctrl-C after some."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, float]] = []
        self.stop_after: int | None = None

    def trial(self, ready: Any, seeds: Any, rate: float, chance: Chance) -> Outcome:
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt
        self.ran.append((seeds.session, rate))
        limit = (0.8 if ready == "nn" else 9.0) * 1.3**seeds.session
        return Outcome("loss", 6, 3.0, 3.0, 0.1) if rate > limit else Outcome("", 6, 1.0, 1.0, 0.9)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    coarsely(monkeypatch)
    fake = Faked()
    monkeypatch.setattr(trials, "run_trial", fake.trial)
    monkeypatch.setattr(trials, "range_test", lambda ready, seeds, rates: [2.0] * len(rates))
    monkeypatch.setattr("normbench.preparing.prepare", lambda config: config.choices["norm"])
    return fake


@pytest.mark.slow
def test_the_door_finds_the_limits_and_says_them(
    monkeypatch: pytest.MonkeyPatch, faked: Faked, capsys: pytest.CaptureFixture[str]
) -> None:
    lr_limit(monkeypatch, "norm=obn,nn", "sessions=4", "name=here")
    said = capsys.readouterr().out
    obn, nn = rows_of(HERE / "limits.csv")
    truth = math.exp(np.mean([math.log(9.0 * 1.3**i) for i in range(4)]))
    assert float(obn["limit_low"]) < truth < float(obn["limit_high"]) and obn["ratio"] == ""
    assert float(obn["limit"]) == pytest.approx(truth, rel=0.15)
    assert float(nn["ratio_low"]) < 0.8 / 9 < float(nn["ratio_high"]) and nn["verdict"] == "smaller"
    assert float(nn["ratio_high"]) / float(nn["ratio_low"]) < 1.2**2.5  # pairs: their spread is the grid's
    assert "obn tolerates a larger rate than nn: " in said and "obn: half of 4 sessions fail at " in said
    assert "a session fails at a rate if a loss is not finite" in said and "they differ in norm\n" in said
    assert "beside the norms' own parameters (obn 84, nn 0) every arm has the same 1,342" in said
    rows = rows_of(HERE / "trials.csv")
    assert len(rows) == len(faked.ran) == int(obn["trials"]) + int(nn["trials"])
    assert {row["session"] for row in rows} == {"0", "1", "2", "3"}
    for name in ("failure-curves", "search", "range-test"):
        assert ElementTree.parse(HERE / f"{name}.svg").getroot().tag.endswith("svg")
    drawn = (HERE / "failure-curves.svg").read_bytes()

    faked.ran.clear()
    lr_limit(monkeypatch, "norm=obn,nn", "sessions=4", "name=here")
    assert not faked.ran and (HERE / "failure-curves.svg").read_bytes() == drawn
    monkeypatch.setattr(figures, "draw", lambda *given: [])
    lr_limit(monkeypatch, "norm=obn,nn", "sessions=5", "name=here")
    assert {session for session, _ in faked.ran} >= {4}
    assert len(faked.ran) < len(rows)
    lr_limit(monkeypatch, "norm=nn", "sessions=2", "name=here", "seed=1", "range.steps=10")
    counts = Counter((row["arm"], row["seed"]) for row in rows_of(HERE / "range.csv"))
    assert counts == {("obn", "0"): 200, ("nn", "0"): 200, ("nn", "1"): 10}


def test_a_killed_search_goes_on_and_ends_with_equal_results(
    monkeypatch: pytest.MonkeyPatch, faked: Faked
) -> None:
    monkeypatch.setattr(figures, "draw", lambda *given: [])
    command = ["norm=obn,nn", "sessions=3", "name=here"]
    lr_limit(monkeypatch, *command)
    limits, whole = rows_of(HERE / "limits.csv", *TIMES), rows_of(HERE / "trials.csv", *TIMES)
    for path in HERE.iterdir():
        path.unlink()
    faked.ran.clear()
    faked.stop_after = 7
    lr_limit(monkeypatch, *command, fails=130)
    assert len(faked.ran) == 7 and not (HERE / "limits.csv").exists()
    with (HERE / "trials.csv").open("a") as file:
        file.write("obn,abc")  # cut off in a row
    faked.stop_after = None
    lr_limit(monkeypatch, *command)
    assert len(faked.ran) == len(whole)
    assert rows_of(HERE / "trials.csv", *TIMES) == whole and rows_of(HERE / "limits.csv", *TIMES) == limits
    assert not list(HERE.glob("claim-*"))


def test_what_does_not_fit_is_refused_and_kept(
    monkeypatch: pytest.MonkeyPatch, faked: Faked, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "draw", lambda *given: [])
    command = ["norm=obn", "sessions=2", "name=here"]
    lr_limit(monkeypatch, *command)
    limits, table = (HERE / "limits.csv").read_bytes(), (HERE / "trials.csv").read_text()

    def refused(words: str, *more: str) -> None:
        capsys.readouterr()
        lr_limit(monkeypatch, *command, *more, fails=2)
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
        assert (HERE / "limits.csv").read_bytes() == limits

    refused("has trials with threads 1, here it is 2; give threads=1 or another name=", "threads=2")
    (HERE / "trials.csv").write_text(table.replace(",bracket,", ",bracket,,", 1))
    refused("is damaged")
    (HERE / "trials.csv").write_text("session,rate\n")
    refused("is no table of trials")
    (HERE / "trials.csv").write_text(table)
    from normbench import claim

    monkeypatch.setattr(claim, "take", lambda folder, row: None)
    refused("another process searches there")


def test_an_error_of_a_layer_is_one_line_and_keeps_the_trials(
    monkeypatch: pytest.MonkeyPatch, faked: Faked, capsys: pytest.CaptureFixture[str]
) -> None:
    run_trial = trials.run_trial

    def broken(ready: Any, seeds: Any, rate: float, chance: Chance) -> Outcome:
        if len(faked.ran) == 3:
            raise RuntimeError("my layer is broken")
        return run_trial(ready, seeds, rate, chance)

    monkeypatch.setattr(trials, "run_trial", broken)
    lr_limit(monkeypatch, "norm=obn", "sessions=2", "name=here", fails=1)
    said = capsys.readouterr().err
    assert said.startswith("obn: RuntimeError: my layer is broken; more in") and said.count("\n") == 1
    assert len(rows_of(HERE / "trials.csv")) == 3 and "broken" in (HERE / "failure.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("optim.lr=0.1,1", "optim.lr is where that starts"), ("sessions=4,8", "sessions is one for all arms"),
     ("model=resnet_cifar,resnet9", "arms share model"), ("norm=obn,obn", "two arms are one setting"),
     ("lowest=1", "must rise"), ("range.low=200", "must be below range.high=10"),
     ("session=0", "did you mean 'sessions'?"), ("resolution=1", "resolution must be a number"),
     ("epochs=2", "exclude each other"), ("name=a/b", "name must be a word"),
     ("optim=sgd,adam", "optim.lr is one for all arms, got 0.1 (sgd) and 0.001 (adam)"),
     ("optim.label_smoothing=0,0.1", "optim.label_smoothing is one for all arms"),
     ("dataset.val_fraction=0.001", "no accuracy is two standard errors above chance")],
)  # fmt: skip
def test_slips_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    lr_limit(monkeypatch, *arguments.split(), fails=2)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not Path("outputs").exists()
