"""Mixtures of moments: their ends are the norms that they mix; SparsestMax is a projection."""

import itertools
import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from layers import activations, build, options
from torch import Tensor, nn

from normbench.formulas import formula_of, options_of, state_of
from normbench.formulas.mixing import sparsestmax as sparsestmax_formula
from normbench.norms.bin import BatchInstanceNorm
from normbench.norms.bn import BatchNorm
from normbench.norms.group import InstanceNorm, LayerNorm
from normbench.norms.switchable import SparseSwitchableNorm, SwitchableNorm, sparsestmax

SHAPES = [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5)]
FULL = math.sqrt(2 / 3)


def assert_is_its_formula(norm: nn.Module, shape: tuple[int, ...]) -> None:
    """Two batches, then evaluation: output and state."""
    for seed, training in ((1, True), (2, True), (3, False)):
        x, state = activations(shape, seed=seed), state_of(norm)
        y = norm.train(training)(x)
        expected, changed = formula_of(norm)(x.numpy(), state, options_of(norm), training)
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
        for key, value in state_of(norm).items():
            np.testing.assert_allclose(value, changed.get(key, state[key]), rtol=1e-9, atol=1e-9, err_msg=key)


def assert_learns(name: str, **changes: object) -> None:
    """30 steps on the weights below the norm alone: its gradient is all they get."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, 5, generator=generator)
    labels = (x[:, 0] * x[:, 1] > 0).long()
    below, above = nn.Linear(5, 16), nn.Linear(16, 2)
    norm = instantiate(options(name) | changes)(16)
    with torch.no_grad():
        for tensor in (*below.parameters(), *above.parameters()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    optimizer = torch.optim.SGD(below.parameters(), lr=1)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(above(norm(below(x)).relu()), labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def assert_stays_finite(name: str, shape: tuple[int, ...] = (6, 6, 4, 3), **changes: object) -> None:
    """Huge, small, constant and rounded inputs: output, gradients and evaluation."""
    for scale, dtype in itertools.product((1e4, 1.0, 1e-4), (torch.float32, torch.bfloat16, torch.float16)):
        x = activations(shape, seed=2)
        x[:, 0] = 0.7
        x[:, 2] = x[:, 1]
        x = x * scale if dtype != torch.float16 else x * min(scale, 1e3)
        x = x.to(dtype).requires_grad_()
        norm = build(name, shape[1], torch.float32, **changes)
        y = norm(x)
        y.backward(activations(shape, dtype, seed=4))
        where = f"{name} {scale} {dtype}"
        assert y.isfinite().all() and x.grad.isfinite().all(), where
        assert all(p.grad.isfinite().all() for p in norm.parameters()), where
        assert all(buffer.isfinite().all() for buffer in norm.buffers()), where
        assert norm.eval()(x).isfinite().all(), where
        assert norm(x[:0]).shape == (0, *shape[1:]), where


def copy_affine(norm: nn.Module, other: nn.Module) -> None:
    other.load_state_dict({k: v for k, v in norm.state_dict().items() if k in other.state_dict()})


@pytest.mark.parametrize("make", [SwitchableNorm, SparseSwitchableNorm])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("part", "other"), [(0, InstanceNorm), (1, LayerNorm), (2, BatchNorm)])
def test_a_mixture_of_one_is_that_norm(part, other, shape, make):
    if part == 0 and len(shape) == 2:
        return  # no instance part there, see below
    norm, alone = (
        build("switchable", 6) if make is SwitchableNorm else build("sparse_switchable", 6),
        other(6),
    )
    with torch.no_grad():
        for logits in (norm.mean_weight, norm.var_weight):
            logits.fill_(0)
            logits[part] = 1e3
    alone.double()
    copy_affine(norm, alone)
    for seed in (1, 2, 3):
        x, z = (activations(shape, seed=seed).requires_grad_() for _ in range(2))
        y, expected = norm(x), alone(z)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        y.backward(upstream := activations(shape, seed=9)), expected.backward(upstream)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-9)
    x = activations(shape, seed=4)
    torch.testing.assert_close(norm.eval()(x), alone.eval()(x), rtol=1e-10, atol=1e-10)


def test_shares_of_means_and_variances_are_apart():
    x = activations((4, 6, 5, 3))
    norm = SwitchableNorm(6, affine=False, eps=0).double()
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([0, 0, 1e3]))
        norm.var_weight.copy_(torch.tensor([1e3, 0, 0]))
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["switchable", "sparse_switchable"])
def test_a_part_of_single_values_is_left_out(name, shape):
    x = activations(shape)
    norm, other = build(name, 6), build(name, 6)
    with torch.no_grad():
        other.mean_weight[0], other.var_weight[0] = -5, 70
    y = norm(x)
    assert torch.equal(y, other(x))
    y.square().sum().backward()
    assert norm.mean_weight.grad[0] == 0 and norm.mean_weight.grad[1] != 0
    single = build(name, 1)  # neither instance nor layer: batch norm
    batch = BatchNorm(1).double()
    copy_affine(single, batch)
    x = activations((8, 1))
    torch.testing.assert_close(single(x), batch(x))


def test_moments_survive_a_large_mean():
    """Pooled from the instances' own spread and never as E x² − (E x)², in which float32 loses all."""
    x = torch.randn(8, 6, 5, 3, generator=torch.Generator().manual_seed(0)) + 3000
    norm = SwitchableNorm(6)
    torch.testing.assert_close(norm(x), norm.double()(x.double()).float(), rtol=1e-3, atol=1e-3)


def simplex(steps: int) -> Tensor:
    """Points all over the simplex of three parts, its edges and corners included."""
    a, b = torch.meshgrid(*(torch.arange(steps + 1, dtype=torch.float64) / steps,) * 2, indexing="ij")
    points = torch.stack([a, b, 1 - a - b], -1).flatten(0, 1)
    return points[points[:, 2] > -1e-9]


@pytest.mark.parametrize("radius", [0, 0.1, 0.3, 0.41, 0.5, 0.7, 0.8, FULL])
def test_sparsestmax_is_the_nearest_point_allowed(radius):
    grid = simplex(240)
    allowed = grid[(grid - 1 / 3).norm(dim=1) >= radius - 1e-9]
    draws = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for logits in draws * torch.linspace(0.05, 2, 40, dtype=torch.float64).unsqueeze(1):
        p = sparsestmax(logits, torch.tensor(radius, dtype=torch.float64))
        assert p.min() >= 0 and (p.sum() - 1).abs() < 1e-12
        assert (p - 1 / 3).norm() >= radius - 1e-9
        assert (p - logits).norm() <= (allowed - logits).norm(dim=1).min() + 1e-9
        np.testing.assert_allclose(p.numpy(), sparsestmax_formula(logits.numpy(), radius), atol=1e-9)


def test_sparsestmax_without_a_radius_is_sparsemax():
    """Martins and Astudillo, arXiv 1602.02068: max(z − τ, 0) with the τ that makes the sum one."""
    for parts in (1, 2, 3, 5):
        for logits in torch.randn(20, parts, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
            low, high = logits.min() - 1, logits.max()
            for _ in range(80):
                tau = (low + high) / 2
                low, high = (tau, high) if (logits - tau).clamp(min=0).sum() > 1 else (low, tau)
            p = sparsestmax(logits, torch.zeros((), dtype=torch.float64))
            torch.testing.assert_close(p, (logits - low).clamp(min=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparsestmax_chooses_one_at_the_full_radius(dtype):
    for parts in (2, 3):
        full = torch.tensor(math.sqrt(1 - 1 / parts), dtype=dtype)
        for logits in torch.randn(50, parts, generator=torch.Generator().manual_seed(3), dtype=dtype) * 0.1:
            assert torch.equal(sparsestmax(logits, full), torch.eye(parts, dtype=dtype)[logits.argmax()])


def test_sparsestmax_breaks_ties_by_order_and_keeps_a_gradient():
    for logits, winner in (([1.0, 1, 1], 0), ([0.2, 0.7, 0.7], 1), ([0.7, 0.2, 0.7], 0)):
        z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        assert sparsestmax(z, torch.tensor(FULL, dtype=torch.float64)).argmax() == winner
        p = sparsestmax(z, torch.tensor(0.2, dtype=torch.float64))
        p[winner].backward()
        assert z.grad.isfinite().all() and z.grad[winner] > 0
        assert abs((p - 1 / 3).norm() - 0.2) < 1e-12 or (p - 1 / 3).norm() > 0.2


@pytest.mark.parametrize("radius", [0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("logits", [(0.3, 0.25, 0.5), (0.9, 0.1, 0.4), (1.3, 0.9, -0.5), (2.5, 0.1, 0.2)])
def test_gradient_of_sparsestmax(logits, radius):
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(radius, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: sparsestmax(z, fixed), (z,))


def test_the_radius_grows_with_the_batches():
    norm = SparseSwitchableNorm(6, radius_steps=4, affine=False).double()
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([0.5, 0.3, 0.6]))
        norm.var_weight.copy_(torch.tensor([0.2, 0.9, 0.8]))
    for step in range(6):
        radius = FULL * min(1, step / 4)
        for logits in (norm.mean_weight, norm.var_weight):
            assert (norm.switch(logits.detach()) - 1 / 3).norm() >= radius - 1e-7
        norm(activations((4, 6, 5, 3), seed=step))
    x = activations((4, 6, 5, 3))
    mean = norm.running_mean.view(1, -1, 1, 1)  # the largest logits: BN's mean and LN's variance
    std = (x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm.eval()(x), (x - mean) / std)


@pytest.mark.parametrize("shape", [(8, 6), (5, 6, 7), (4, 6, 5, 3), (6, 6, 1, 1), (7, 1)], ids=str)
def test_formulas_hold_for_every_option(shape):
    for given in ({}, {"momentum": None, "eps": 1e-2}, {"affine": False}):
        assert_is_its_formula(build("switchable", shape[1], **given), shape)
        for steps in (1, 2, 3):
            norm = build("sparse_switchable", shape[1], radius_steps=steps, **given)
            assert_is_its_formula(norm, shape)
    for given in (
        {"momentum": None},
        {"track_running_stats": False, "stored_var": "biased"},
        {"stored_var": "biased", "eval_bessel": True, "affine": False},
    ):
        norm = BatchInstanceNorm(shape[1], **given).double()
        with torch.no_grad():
            norm.gate.copy_(torch.linspace(-0.3, 1.4, shape[1]))
        assert_is_its_formula(norm, shape)


@pytest.mark.parametrize("name", ["switchable", "sparse_switchable"])
def test_learns_and_stays_finite(name):
    assert_learns(name)
    assert_stays_finite(name)
    assert_stays_finite(name, shape=(7, 6))


def test_the_logits_of_a_fresh_layer_learn():
    for norm in (SwitchableNorm(6), SparseSwitchableNorm(6)):
        norm(activations((4, 6, 5, 3), torch.float32)).square().mul(torch.rand(4, 6, 5, 3)).sum().backward()
        assert norm.mean_weight.grad.abs().min() > 0 and norm.var_weight.grad.abs().min() > 0


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=r"radius_steps must be an int ≥ 1, got"):
        SparseSwitchableNorm(6, radius_steps=steps)
