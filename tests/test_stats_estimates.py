"""Every number against SciPy, statsmodels or a case worked by hand, and what must never matter."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats
from scipy.stats import multivariate_normal, nct, norm
from statsmodels.stats.oneway import anova_oneway
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from normbench.stats import estimates, planning, sequential, series, survival
from normbench.stats.analysis import share_letters, welch_anova
from normbench.stats.survival import Reached
from normbench.values import Refused

TIGHT = {"rel": 1e-9, "abs": 1e-12}


def samples(n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0.93, 0.002, n), rng.normal(0.931, 0.004, m)


def test_welch_by_hand() -> None:
    estimate = estimates.welch(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 4.0, 6.0, 8.0]))
    assert estimate.diff == 2.5
    assert estimate.se == pytest.approx(math.sqrt(5 / 12 + 20 / 12), **TIGHT)
    assert estimate.t == pytest.approx(math.sqrt(3), **TIGHT)
    assert estimate.df == pytest.approx((25 / 12) ** 2 / ((5 / 12) ** 2 / 3 + (20 / 12) ** 2 / 3), **TIGHT)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 7), (5, 5), (30, 11)])
def test_welch_and_student_are_scipys(n: int, m: int) -> None:
    x, y = samples(n, m)
    ours, theirs = estimates.welch(x, y), scipy_stats.ttest_ind(y, x, equal_var=False)
    low, high = ours.interval(0.1)
    between = theirs.confidence_interval(0.9)
    assert (ours.t, ours.df, ours.p) == pytest.approx((theirs.statistic, theirs.df, theirs.pvalue), **TIGHT)
    assert (low, high) == pytest.approx((between.low, between.high), **TIGHT)
    assert estimates.student(x, y).p == pytest.approx(scipy_stats.ttest_ind(y, x).pvalue, **TIGHT)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_paired_test_is_scipys(n: int) -> None:
    x, y = samples(n, n)
    ours, theirs = estimates.paired(x, y), scipy_stats.ttest_rel(y, x)
    between = theirs.confidence_interval()
    assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), **TIGHT)
    assert ours.interval(0.05) == (pytest.approx(between.low, **TIGHT), pytest.approx(between.high, **TIGHT))


@pytest.mark.parametrize("margin", [0.0005, 0.003, 0.01])
def test_equivalence_is_statsmodels(margin: float) -> None:
    x, y = samples(12, 9)
    assert estimates.welch(x, y).tost(margin) == pytest.approx(
        ttost_ind(y, x, -margin, margin, usevar="unequal")[0], **TIGHT
    )
    x, y = samples(12, 12)
    assert estimates.paired(x, y).tost(margin) == pytest.approx(
        ttost_paired(y, x, -margin, margin)[0], **TIGHT
    )


def test_hedges_g_by_hand() -> None:
    g = estimates.hedges_g(np.array([0.0, 2.0]), np.array([1.0, 3.0]))
    assert g == pytest.approx(1 / math.sqrt(2) / math.sqrt(math.pi), **TIGHT)  # J(2) = Γ(1) / Γ(1/2)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (30, 30), (4, 20)])
def test_the_detectable_difference_is_found_four_times_in_five(n: int, m: int) -> None:
    estimate = estimates.welch(*samples(n, m))
    shift, limit = estimate.detectable(0.05) / estimate.se, scipy_stats.t.isf(0.025, estimate.df)
    power = nct.sf(limit, estimate.df, shift) + nct.cdf(-limit, estimate.df, shift)
    assert power == pytest.approx(0.8, abs=1e-9)


def test_the_bootstrap_is_scipys_and_repeats() -> None:
    x, y = samples(9, 12)
    theirs = scipy_stats.bootstrap(
        (y, x), lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis), n_resamples=999, batch=1000,
        method="BCa", rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    ours = estimates.bca(x, y, False, 0.05, seed=3, resamples=999)
    assert ours == (pytest.approx(theirs.low, **TIGHT), pytest.approx(theirs.high, **TIGHT))
    assert estimates.bca(x, y, False, 0.05, seed=4, resamples=999) != ours
    assert all(math.isnan(end) for end in estimates.bca(x[:2], y, False, 0.05))


def test_rank_tests_are_scipys() -> None:
    x, y = samples(7, 9)
    name, p = estimates.rank_test(x, y, False)
    assert (name, p) == ("mann_whitney", pytest.approx(scipy_stats.mannwhitneyu(y, x, method="exact").pvalue))
    x, y = samples(9, 9)
    name, p = estimates.rank_test(x, y, True)
    assert (name, p) == ("wilcoxon", pytest.approx(scipy_stats.wilcoxon(y - x, method="exact").pvalue))


def test_rank_tests_with_ties() -> None:
    x, y = np.array([1.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 2.0, 2.0])
    assert estimates.rank_test(x, x, True) == ("wilcoxon", 1.0)
    assert estimates.rank_test(np.ones(3), np.ones(4), False) == ("mann_whitney", 1.0)
    assert 0 < estimates.rank_test(x, y, False)[1] <= 1
    assert 0 < estimates.rank_test(x, y, True)[1] <= 1


def test_lag1_is_the_correlation_of_successive_values() -> None:
    x = np.cumsum(samples(30, 1)[0] - 0.93)
    assert series.lag1(x) == pytest.approx(np.corrcoef(x[1:], x[:-1])[0, 1], **TIGHT)
    r, n = float(series.lag1(x[:10])), 10
    assert series.corrected_lag1(x[:10]) == pytest.approx(min((r + 1 / n) / (1 - 4 / n), 0.999), **TIGHT)


def test_the_effective_number_is_the_exact_variance_of_an_ar1_mean() -> None:
    x = samples(12, 1, seed=5)[0] + np.linspace(0, 0.002, 12)
    rho, n = float(series.corrected_lag1(x)), 12
    assert 0.1 < rho < 0.9
    k = np.arange(n)
    correlations = rho ** np.abs(k[:, None] - k[None, :])
    assert series.effective_n(x) == pytest.approx(n * n / correlations.sum(), **TIGHT)
    ess = float(series.effective_n(x))
    expected = ((x - x.mean()) ** 2).sum() / (n * (1 - 1 / ess))
    assert series.spread_of(x, np.asarray(ess)) == pytest.approx(expected, **TIGHT)


def test_serial_tests_without_correlation_are_the_plain_ones() -> None:
    zigzag = np.array([1.0, 2.0] * 6) + np.arange(12) * 1e-3
    other = zigzag[::-1] + 0.3
    assert series.effective_n(zigzag) == 12
    ours, plain = estimates.welch_serial(zigzag, other), estimates.welch(zigzag, other)
    assert (ours.se, ours.df) == (pytest.approx(plain.se, **TIGHT), pytest.approx(plain.df, **TIGHT))


def test_welchs_anova_is_statsmodels() -> None:
    arms = [samples(5 + i, 1, seed=i)[0] + i * 1e-3 for i in range(4)]
    theirs = anova_oneway(arms, use_var="unequal")
    ours = welch_anova(arms, is_time=False)
    assert ours is not None
    assert (ours.f, ours.df_between, ours.df_within, ours.p) == pytest.approx(
        (theirs.statistic, theirs.df[0], theirs.df[1], theirs.pvalue), **TIGHT
    )


def test_letters_join_the_longest_runs_that_are_not_told_apart() -> None:
    assert share_letters(3, set()) == ["a", "a", "a"]
    assert share_letters(3, {(0, 1), (0, 2), (1, 2)}) == ["a", "b", "c"]
    assert share_letters(4, {(0, 2), (0, 3)}) == ["a", "ab", "b", "b"]


def test_looks_have_the_published_bounds() -> None:
    levels = sequential.nominal_levels(0.05, (0.2, 0.4, 0.6, 0.8, 1.0))
    bounds = [norm.isf(p / 2) for p in levels]
    assert bounds == pytest.approx([4.8769, 3.3569, 2.6803, 2.2898, 2.0310], abs=2e-4)  # Lan & DeMets
    assert sequential.nominal_levels(0.05, (1.0,)) == pytest.approx((0.05,), **TIGHT)
    assert sequential.nominal_levels(0.05, (1.0,), two_sided=False) == pytest.approx((0.05,), **TIGHT)


def test_two_looks_cross_as_often_as_the_normal_distribution_says() -> None:
    fractions = (0.5, 1.0)
    first, second = (norm.isf(p) for p in sequential.nominal_levels(0.05, fractions, two_sided=False))
    together = multivariate_normal(cov=[[1, math.sqrt(0.5)], [math.sqrt(0.5), 1]])
    assert 1 - together.cdf([first, second]) == pytest.approx(0.05, abs=1e-6)


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4), st.sampled_from([0.01, 0.05, 0.2]), st.booleans()
)
@settings(max_examples=25, deadline=None)
def test_the_sequential_p_is_below_alpha_when_a_look_crossed_its_bound(
    ps: list[float], alpha: float, two_sided: bool
) -> None:
    fractions = tuple((k + 1) / 4 for k in range(len(ps)))
    levels = sequential.levels(alpha, fractions, two_sided)
    if any(abs(p - level) < 1e-4 * level for p, level in zip(ps, levels, strict=True)):
        return
    crossed = any(p < level for p, level in zip(ps, levels, strict=True))
    assert (sequential.sequential_p(ps, fractions, two_sided) < alpha) == crossed


def test_looks_must_rise_to_the_planned_end() -> None:
    assert sequential.Looks.every(5, 12, 12).at == (5, 10, 12)
    assert sequential.Looks.every(5, 30, 14).at == (5, 10)
    with pytest.raises(Refused, match="must rise"):
        sequential.Looks(30, (10, 5))


def test_a_plan_is_statsmodels() -> None:
    effect = 0.001 / 0.0018
    assert planning.power_of_difference(200, 0.25, 0.05, False) == TTestIndPower().power(0.25, 200, 0.05)
    exact = TTestIndPower().solve_power(effect, alpha=0.05, power=0.8)
    assert planning.sessions_for_difference(0.0018, 0.001) == math.ceil(exact) == 52
    exact = TTestPower().solve_power(effect, alpha=0.05, power=0.8)
    assert planning.sessions_for_difference(0.0018, 0.001, is_paired=True) == math.ceil(exact)


@pytest.mark.parametrize("is_paired", [False, True])
def test_a_plan_for_equivalence_takes_the_fewest_sessions(is_paired: bool) -> None:
    n = planning.sessions_for_equivalence(1.0, 0.7, is_paired=is_paired)
    assert n is not None
    assert planning.power_of_equivalence(n, 0.7, 0.05, is_paired) >= 0.8
    assert planning.power_of_equivalence(n - 1, 0.7, 0.05, is_paired) < 0.8


def test_tiny_and_huge_effects_have_plans_too() -> None:
    assert planning.sessions_for_difference(1.0, 50.0) == 2
    assert planning.sessions_for_difference(1.0, 1e-9) is None
    near, far = (planning.sessions_for_difference(1.0, e) for e in (1.001e-3, 0.999e-3))
    assert near is not None and far is not None
    assert far / near == pytest.approx((1.001 / 0.999) ** 2, rel=1e-4)


def test_the_upper_sd_is_the_chi_square_limit() -> None:
    expected = 2.0 * math.sqrt(4 / scipy_stats.chi2.ppf(0.2, 4))
    assert planning.upper_sd(2.0, 5) == pytest.approx(expected, **TIGHT)


def test_the_restricted_mean_without_censoring_is_the_mean() -> None:
    x = np.random.default_rng(0).exponential(size=9)
    mean, se = survival.restricted_mean(Reached(x, np.ones(9, bool)), horizon=100.0)
    assert (mean, se) == (pytest.approx(x.mean(), **TIGHT), pytest.approx(x.std() / 3, **TIGHT))


def test_the_restricted_mean_by_hand() -> None:
    arm = Reached(np.array([1.0, 2.0, 3.0]), np.array([True, False, True]))
    mean, _ = survival.restricted_mean(arm, horizon=3.0)
    assert mean == pytest.approx(1 + 2 * 2 / 3, **TIGHT)  # S is 1 up to 1, then 2/3


def test_log_rank_scores_are_scipys_numerator() -> None:
    rng = np.random.default_rng(1)
    time, reached = rng.exponential(size=20).round(1) + 0.1, rng.random(20) < 0.7
    scores = survival.log_rank_scores(Reached(time, reached))
    assert scores.sum() == pytest.approx(0, abs=1e-12)
    sides = [
        scipy_stats.CensoredData.right_censored(time[half], ~reached[half])
        for half in (slice(10), slice(10, 20))
    ]
    statistic = scipy_stats.logrank(*sides).statistic
    times, events, at_risk = survival.steps_of(Reached(time, reached))
    first = np.array([(time[:10] >= t).sum() for t in times])
    spare = np.where(at_risk > 1, at_risk - 1, 1)
    variance = (events * first * (at_risk - first) * (at_risk - events) / at_risk**2 / spare).sum()
    assert abs(scores[:10].sum()) / math.sqrt(variance) == pytest.approx(abs(statistic), **TIGHT)


def test_log_rank_is_exact_for_few_sessions() -> None:
    slow = Reached(np.array([5.0, 6.0, 7.0, 8.0]), np.ones(4, bool))
    fast = Reached(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4, bool))
    assert survival.log_rank(slow, fast, False) == pytest.approx(2 / 70)
    assert survival.log_rank(slow, fast, True) == pytest.approx(2 / 16)
    never = Reached(np.full(4, 9.0), np.zeros(4, bool))
    assert survival.log_rank(never, never, False) == 1.0
    assert survival.log_rank(slow, fast, False, inflation=4.0) > 0.2


GRID = st.integers(-500, 500).map(lambda i: i / 64)
SERIES = arrays(np.float64, st.integers(3, 12), elements=GRID)


@given(SERIES, SERIES, st.integers(-64, 64), st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_shifting_and_scaling_change_no_test(x: np.ndarray, y: np.ndarray, shift: int, scale: float) -> None:
    n = min(x.size, y.size)
    for test, a, b in [
        (estimates.welch, x, y), (estimates.student, x, y), (estimates.paired, x[:n], y[:n]),
        (estimates.welch_serial, x, y), (estimates.paired_serial, x[:n], y[:n]),
    ]:  # fmt: skip
        plain, moved = test(a, b), test(a * scale + shift, b * scale + shift)
        assert moved.diff == pytest.approx(scale * plain.diff, rel=1e-9, abs=1e-9)
        assert moved.p == pytest.approx(plain.p, rel=1e-6, abs=1e-12, nan_ok=True)


@given(SERIES, SERIES)
@settings(max_examples=60, deadline=None)
def test_swapping_the_arms_turns_the_difference_round(x: np.ndarray, y: np.ndarray) -> None:
    n = min(x.size, y.size)
    for test, a, b in [
        (estimates.welch, x, y),
        (estimates.paired, x[:n], y[:n]),
        (estimates.welch_serial, x, y),
    ]:
        one, other = test(a, b), test(b, a)
        assert one.diff == pytest.approx(-other.diff, **TIGHT)
        assert one.p == pytest.approx(other.p, rel=1e-9, abs=1e-12, nan_ok=True)
        assert one.tost(0.5) == pytest.approx(other.tost(0.5), rel=1e-9, abs=1e-12, nan_ok=True)


@given(SERIES, SERIES, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_sessions_matters_to_times_alone(x: np.ndarray, y: np.ndarray, random: object) -> None:
    order = list(range(x.size))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert estimates.welch(x[order], y).p == pytest.approx(estimates.welch(x, y).p, rel=1e-9, nan_ok=True)
    n = min(x.size, y.size)
    pairs = [i for i in order if i < n]
    assert estimates.paired(x[pairs], y[pairs]).p == pytest.approx(
        estimates.paired(x[:n], y[:n]).p, rel=1e-9, nan_ok=True
    )
