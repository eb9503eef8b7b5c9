"""Probability integral transform: known distributions out, order kept, ties shared, the whole gradient."""

import math

import numpy as np
import pytest
import torch
from layers import activations, build
from scipy import stats
from test_norms_mixtures import assert_is_its_formula, assert_learns, assert_stays_finite
from torch import Tensor

from normbench.norms.pit import ProbabilityIntegralTransform

TARGETS = ["uniform", "gaussian"]
REACH = {"uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)), "gaussian": stats.norm()}
LAWS = {"normal": stats.norm(3, 0.2), "exponential": stats.expon(), "t3": stats.t(3), "bimodal": None}


def draws(law: str, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    if LAWS[law] is None:
        values = rng.normal(size=shape) + np.where(rng.random(shape) < 0.3, 0, 5)
    else:
        values = LAWS[law].rvs(shape, random_state=rng)
    return torch.from_numpy(np.ascontiguousarray(values))


def transform(num_features: int, target: str, **options: object) -> ProbabilityIntegralTransform:
    return ProbabilityIntegralTransform(num_features, target=target, **({"affine": False} | options)).double()


def uniform_to(target: str, level: Tensor, num_quantiles: int) -> Tensor:
    """What a value at this level becomes."""
    if target == "uniform":
        return math.sqrt(12) * (level - 0.5)
    inset = math.sin(math.pi / 4 / (num_quantiles - 1)) ** 2
    return torch.special.ndtri(inset + (1 - 2 * inset) * level)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_large_batch_leaves_in_the_target_distribution(target, law):
    norm = transform(3, target, momentum=None)
    batches = [norm(draws(law, (64, 3, 8, 8), seed)) for seed in range(4)]
    fresh = norm.eval()(draws(law, (64, 3, 8, 8), 9))
    for y in (*batches, fresh):
        for channel in y.transpose(0, 1).flatten(1):
            assert stats.kstest(channel.numpy(), REACH[target].cdf).pvalue > 0.01
            assert abs(channel.mean()) < 0.05 and abs(channel.var() - 1) < 0.08
    assert abs(batches[0].mean()) < 0.005


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_order_is_kept(target, training):
    norm = transform(2, target)
    norm(draws("t3", (200, 2), 1))
    x = draws("t3", (300, 2), 2)
    x[50:90] = x[:40].round()  # ties among them
    y = norm.train(training)(x)
    for c in range(2):
        order = x[:, c].argsort()
        rises, steps = y[order, c].diff(), x[order, c].diff()
        assert rises.min() >= -1e-12
        assert rises[steps == 0].abs().max() < 1e-12
        inside = (steps > 1e-3) & (y[order[1:], c] < y[:, c].max()) & (y[order[:-1], c] > y[:, c].min())
        assert rises[inside].min() > 0


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_shape_of_a_distribution_counts(target):
    x = draws("exponential", (150, 2), 3)
    y = transform(2, target)(x)
    torch.testing.assert_close(transform(2, target)(1e3 * x - 7), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform(2, target)(1e-5 * x + 3), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(transform(2, target)(-x), -y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3, 7, 40, 333])
@pytest.mark.parametrize("num_quantiles", [3, 8, 33])
def test_stored_quantiles_are_those_of_the_batch(num_quantiles, count):
    norm = transform(2, "uniform", num_quantiles=num_quantiles, momentum=1)
    x = draws("normal", (count, 2), 4)
    y = norm(x)
    levels = torch.sin(torch.linspace(0, math.pi / 2, num_quantiles, dtype=torch.float64)) ** 2
    torch.testing.assert_close(norm.running_quantiles, torch.quantile(x, levels, dim=0).T)
    torch.testing.assert_close(norm.eval()(x), y)  # one batch is its own distribution
    assert y.min() >= -math.sqrt(3) - 1e-12 and y.max() <= math.sqrt(3) + 1e-12


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("target", TARGETS)
def test_ties_get_the_middle_of_their_levels(target, eps):
    x = torch.tensor([0.0] * 50 + [1.0] * 30 + [2.5] * 20, dtype=torch.float64).unsqueeze(1)
    k = 32
    levels = torch.sin(torch.linspace(0, math.pi / 2, k, dtype=torch.float64)) ** 2
    quantiles = torch.quantile(x[:, 0], levels)
    y = transform(1, target, eps=eps)(x.requires_grad_())
    for value in (0.0, 1.0, 2.5):
        spanned = levels[quantiles == value]
        middle = uniform_to(target, (spanned.min() + spanned.max()) / 2, k)
        torch.testing.assert_close(y[x == value], middle.expand(int((x == value).sum())), rtol=0, atol=3e-4)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
def test_running_quantiles_that_nearly_coincide_are_still_a_tie(target):
    """Zeros of a ReLU: the quantiles of the start fade from the running ones and never quite leave them."""
    norm = transform(1, target)
    for seed in range(150):
        x = draws("normal", (400, 1), seed).sub(3).relu()
        y = norm(x)
    assert (norm.running_quantiles[:, :10].diff() != 0).any()
    torch.testing.assert_close(norm.eval()(x)[x == 0][:1], y[x == 0][:1], rtol=0, atol=0.1)
    assert norm(x)[x == 0].max() < -0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_a_constant_channel_sits_in_the_middle(target, training):
    norm = transform(2, target, momentum=1)
    x = torch.full((6, 2, 3), 0.7, dtype=torch.float64)
    x[:, 1] = activations((6, 1, 3))[:, 0]
    norm(x)
    y = norm.train(training)(x.requires_grad_())
    y.square().sum().backward()
    assert (y[:, 0] == 0).all() and (x.grad[:, 0] == 0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.7, -300.0])
def test_a_channel_that_stays_constant_ends_in_the_middle_of_evaluation_too(value):
    norm = ProbabilityIntegralTransform(1)
    x = torch.full((6, 1), value)
    for _ in range(300):
        assert norm.train()(x).abs().max() < 1e-6
    assert norm.eval()(x).abs().max() < 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_quantiles", [3, 6, 11])
@pytest.mark.parametrize("shape", [(40, 2), (6, 2, 5), (3, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_is_whole(target, shape, num_quantiles, training):
    norm = transform(2, target, num_quantiles=num_quantiles, momentum=1)
    norm(draws("normal", shape, 6))
    norm.train(training)
    x = draws("normal", shape, 5).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {k: b.clone() for k, b in norm.named_buffers()}, (x,))

    assert torch.autograd.gradcheck(forward, (x,))
    if training:  # no affine map of a channel changes its output
        (grad,) = torch.autograd.grad(forward(x), x, draws("normal", shape, 7))
        rows, slopes = (t.transpose(0, 1).flatten(1) for t in (x.detach(), grad))
        scale = slopes.abs().sum(1)
        assert (slopes.sum(1) / scale).abs().max() < 1e-9
        assert ((slopes * rows).sum(1) / scale).abs().max() < 1e-9
        if math.prod(shape) // 2 > 2 * num_quantiles:
            assert (slopes.abs() > 1e-3).float().mean() > 0.4


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_eps_bounds_the_slope_where_values_nearly_coincide(eps):
    x = draws("normal", (400, 1), 8)
    x[:200] = 3 + 1e-13 * x[:200]
    for training in (True, False):
        norm = transform(1, "uniform", eps=eps, momentum=1)
        norm(x)
        probe = torch.linspace(2, 4, 400, dtype=torch.float64).unsqueeze(1)
        probe[100:300] = 3 + 1e-9 * probe[100:300]
        probe = (probe if not training else x.clone()).requires_grad_()
        y = norm.train(training)(probe)
        y.sum().backward()
        limit = math.sqrt(12) / (eps * (x.max() - x.min()))
        assert probe.grad.abs().max() <= (limit if not training else 400 * limit)


def test_a_fresh_layer_holds_the_standard_normal():
    norm = ProbabilityIntegralTransform(2, target="gaussian", eps=0).eval()
    knots = norm.running_quantiles
    torch.testing.assert_close(norm(knots.T), knots.T, rtol=1e-5, atol=1e-5)
    assert knots.shape == (2, 32) and 3 < knots.max() < 3.5
    x = torch.linspace(-2.5, 2.5, 101).unsqueeze(1).expand(-1, 2)
    torch.testing.assert_close(norm(x), x, rtol=0, atol=0.06)
    uniform = ProbabilityIntegralTransform(2, target="uniform").eval()
    torch.testing.assert_close(uniform(x), math.sqrt(12) * (torch.special.ndtr(x) - 0.5), rtol=0, atol=0.02)
    assert (uniform(torch.full((1, 2), 99.0)) == math.sqrt(12) / 2).all()


@pytest.mark.parametrize(
    "shape", [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5), (200, 6), (2, 6)], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_formulas_hold_for_every_option(target, shape):
    for options in (
        {"momentum": None, "num_quantiles": 5},
        {"eps": 1e-3, "affine": False},
        {"num_quantiles": 64, "momentum": 0.3},
        {"num_quantiles": 3},
    ):
        assert_is_its_formula(build(f"pit_{target}", 6, **options), shape)


@pytest.mark.parametrize("target", TARGETS)
def test_learns_and_stays_finite(target):
    assert_learns(f"pit_{target}")
    assert_stays_finite(f"pit_{target}")
    assert_stays_finite(f"pit_{target}", shape=(9, 6), eps=0)


def test_a_diverged_batch_gives_nan_and_no_error():
    x = activations((4, 6, 5, 3))
    x[0, 0, 0, 0] = torch.nan
    y = build("pit_gaussian", 6)(x)
    assert y[0, 0, 0, 0].isnan() and y[:, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "normal"}, "target must be one of uniform, gaussian, got 'normal'"),
        ({"num_quantiles": 2}, "num_quantiles must be an int ≥ 3, got 2"),
        ({"eps": -1e-5}, "eps must be a number ≥ 0, got -1e-05"),
    ],
    ids=str,
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        ProbabilityIntegralTransform(6, **options)
