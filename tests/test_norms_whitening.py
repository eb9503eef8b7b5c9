"""Whitening: the output's covariance is the identity, with the whole gradient, whatever the eigenvalues."""

import pytest
import torch
from layers import activations, build
from test_norms_mixtures import assert_is_its_formula, assert_learns, assert_stays_finite
from torch import Tensor

from normbench.norms.bn import BatchNorm
from normbench.norms.whitening import DecorrelatedBatchNorm, InverseRoot

NAMES = ["dbn", "dbn_cholesky", "dbn_group", "iternorm"]
METHODS = [("zca", None), ("cholesky", None), ("newton", 40)]
SHAPES = [(17, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5)]


def correlated(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Neighbouring channels share most of what they say."""
    x = activations(shape, seed=seed)
    return x + 2 * x.roll(1, 1) - 0.5 * x.roll(2, 1)


def covariance(y: Tensor, groups: int = 1) -> Tensor:
    """÷n, of each group of channels: (groups, g, g)."""
    rows = y.transpose(0, 1).flatten(1).unflatten(0, (groups, -1))
    return torch.stack([torch.cov(group, correction=0).view(len(group), -1) for group in rows])


def whitening(num_features: int, **options: object) -> DecorrelatedBatchNorm:
    return DecorrelatedBatchNorm(num_features, **({"affine": False} | options)).double()


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize(("method", "iterations"), METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_is_white(shape, method, iterations, groups):
    norm = whitening(6, method=method, iterations=iterations, num_groups=groups, eps=0, momentum=1)
    x = correlated(shape)
    y = norm(x)
    eye = torch.eye(6 // groups, dtype=y.dtype).expand(groups, -1, -1)
    torch.testing.assert_close(covariance(y, groups), eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(y.transpose(0, 1).flatten(1).mean(1), torch.zeros(6).double())
    n = x.numel() // 6  # the same batch by its own running covariance, which is ÷(n−1)
    torch.testing.assert_close(norm.eval()(x), y * ((n - 1) / n) ** 0.5, rtol=1e-8, atol=1e-8)


def test_each_method_has_its_matrix():
    x = correlated((40, 4))
    centred = x - x.mean(0)
    matrix = {}
    for method, iterations in METHODS:
        y = whitening(4, method=method, iterations=iterations, num_groups=1, eps=0)(x)
        matrix[method] = torch.linalg.lstsq(centred, y).solution.T
    torch.testing.assert_close(matrix["zca"], matrix["zca"].T)
    torch.testing.assert_close(matrix["newton"], matrix["zca"])
    torch.testing.assert_close(matrix["cholesky"], matrix["cholesky"].tril())
    turn = matrix["cholesky"] @ matrix["zca"].inverse()
    torch.testing.assert_close(turn @ turn.T, torch.eye(4).double())


def test_newton_comes_closer_with_every_iteration():
    x = correlated((40, 4))
    zca = whitening(4, num_groups=1)(x)
    errors = [
        (whitening(4, method="newton", iterations=t, num_groups=1)(x) - zca).norm().item()
        for t in (1, 3, 5, 7, 9)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize(("method", "iterations"), METHODS)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}], ids=str)
def test_single_channels_are_batch_norm(options, method, iterations):
    norm, batch = (
        DecorrelatedBatchNorm(
            6, method=method, iterations=iterations, channels_per_group=1, **options
        ).double(),
        BatchNorm(6, **options).double(),
    )
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.7, 1.6, 6)), norm.bias.copy_(torch.linspace(1.1, -0.4, 6))
        batch.weight.copy_(norm.weight), batch.bias.copy_(norm.bias)
    for seed in (1, 2, 3):
        x, z = (activations((4, 6, 5, 3), seed=seed).requires_grad_() for _ in range(2))
        y, expected = norm(x), batch(z)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        y.backward(upstream := activations((4, 6, 5, 3), seed=9)), expected.backward(upstream)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm.running_mean, batch.running_mean)
    torch.testing.assert_close(norm.running_cov.flatten(), batch.running_var)
    x = activations((4, 6, 5, 3), seed=4)
    torch.testing.assert_close(norm.eval()(x), batch.eval()(x), rtol=1e-9, atol=1e-9)


HADAMARD = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
EQUAL = {
    "all eigenvalues equal": HADAMARD,
    "two of three equal": HADAMARD * torch.tensor([1, 1, 3.0]),
    "rank one": HADAMARD[:, :1] * torch.tensor([1.0, 2, -1]),
    "fewer values than channels": activations((2, 3)),
    "no spread": torch.full((4, 3), 0.7, dtype=torch.float64),
}


@pytest.mark.parametrize(("method", "iterations"), [*METHODS[:2], ("newton", 4)])
@pytest.mark.parametrize("x", EQUAL.values(), ids=EQUAL)
def test_gradient_where_eigenvalues_coincide(x, method, iterations):
    def forward(x: Tensor) -> Tensor:
        return whitening(3, method=method, iterations=iterations, num_groups=1, eps=0.1)(x)

    assert torch.autograd.gradcheck(forward, (x.clone().requires_grad_(),))


def test_autograd_through_eigenvectors_would_not_do():
    """Why InverseRoot writes its gradient out: through eigh it is lost where eigenvalues coincide."""
    ours, naive = (torch.eye(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    upstream = activations((3, 3))
    InverseRoot.apply(ours, torch.zeros(1, 1, dtype=torch.float64)).backward(upstream)
    torch.testing.assert_close(ours.grad, -(upstream + upstream.T) / 4)
    values, vectors = torch.linalg.eigh(naive)
    ((vectors * values.rsqrt()) @ vectors.T).backward(upstream)
    assert not naive.grad.isfinite().all()


def test_a_second_derivative_is_refused_and_not_wrong():
    x = correlated((9, 3)).requires_grad_()
    (grad,) = torch.autograd.grad(whitening(3)(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("method", ["zca", "cholesky"])
def test_too_few_values_need_eps(method):
    norm = whitening(6, method=method, num_groups=2, eps=0)
    with pytest.raises(ValueError, match=r"eps=0 needs more values per channel than a group's 3 channels"):
        norm(activations((3, 6)))
    assert norm.num_batches_tracked == 0
    assert norm(activations((4, 6))).isfinite().all()
    few = whitening(6, method=method, num_groups=2)(activations((3, 6)))
    spectrum = torch.linalg.eigvalsh(covariance(few, 2))  # rank 2 of 3: what the batch shows is whitened
    torch.testing.assert_close(spectrum, torch.tensor([[0, 1, 1.0]] * 2).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_diverged_batch_gives_nan_and_no_error(name):
    norm = build(name, 6)
    x = activations((4, 6, 5, 3))
    x[0, 0, 0, 0] = torch.inf
    assert norm(x)[:, 0].isnan().any()
    assert norm.eval()(activations((4, 6, 5, 3)))[:, 0].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_good_as_its_input(name):
    """One channel is nearly another; a covariance in float32 would lose the difference."""
    x = torch.randn(64, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + 0.02 * x[:, 1]
    single, double = build(name, 4, torch.float32), build(name, 4)
    for norm_training in (True, False):
        y, expected = single.train(norm_training)(x), double.train(norm_training)(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_learns_and_stays_finite(name):
    assert_learns(name)
    assert_stays_finite(name)
    assert_stays_finite(name, shape=(4, 6))  # rank-deficient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "iterations"), [*METHODS[:2], ("newton", 3)])
def test_formulas_hold_for_every_option(shape, method, iterations):
    for options in (
        {"num_groups": 1, "momentum": None},
        {"channels_per_group": 5, "eps": 1e-2, "affine": False},
        {"num_groups": 2, "channels_per_group": 64},
    ):
        norm = build("dbn", 6, method=method, iterations=iterations, **({"num_groups": None} | options))
        assert_is_its_formula(norm, shape)
    assert build("dbn", 6, num_groups=None, channels_per_group=5).running_cov.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "pca"}, "method must be one of zca, cholesky, newton, got 'pca'"),
        ({"method": "zac"}, "did you mean 'zca'"),
        ({"iterations": 5}, "iterations belongs to method=newton, got iterations=5, method=zca"),
        ({"method": "newton"}, "iterations belongs to method=newton, got iterations=None, method=newton"),
        ({"method": "newton", "iterations": 0}, "iterations must be an int ≥ 1, got 0"),
        ({"num_groups": 4}, "num_groups=4 does not divide num_features=6"),
        ({"channels_per_group": 0}, "channels_per_group must be an int ≥ 1, got 0"),
    ],
    ids=str,
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        DecorrelatedBatchNorm(6, **options)
