"""Each layer against torch, against another layer, or against its formula written out; all in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.norms.bin import BatchInstanceNorm
from normbench.norms.bn import BatchNorm
from normbench.norms.bnrs import BNRS
from normbench.norms.bnwos import BNWoS
from normbench.norms.brn import BatchRenorm
from normbench.norms.dyt import DyT
from normbench.norms.ghost import GhostBatchNorm
from normbench.norms.group import GroupNorm, InstanceNorm, LayerNorm
from normbench.norms.l1 import L1BatchNorm
from normbench.norms.mbn import MBN
from normbench.norms.none import NoNorm
from normbench.norms.obn import FusedBatchNorm
from normbench.norms.partial import MeanOnlyBatchNorm, VarianceOnlyBatchNorm
from normbench.norms.rms import RMSNorm

SHAPES = [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5)]
MAPS = SHAPES[1:]
TORCH_BN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def activations(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Mean and sd away from zero and one, and different in every channel."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return x * (0.5 + 0.3 * channel) + 0.7 - 0.2 * channel


def set_up(norm: nn.Module) -> nn.Module:
    """In float64, weight and bias away from one and zero."""
    norm = norm.double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.7, 1.6, len(norm.weight)))
        norm.bias.copy_(torch.linspace(1.1, -0.4, len(norm.bias)))
    return norm


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def view(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.ndim - 2))


def assert_same(ours: nn.Module, other: nn.Module, shape: tuple[int, ...], gradients: bool = True) -> None:
    """Three training batches (output, gradients, running statistics), then evaluation."""
    set_up(ours), set_up(other)
    for seed in (1, 2, 3):
        x, z = (activations(shape, seed).requires_grad_() for _ in range(2))
        y, expected = ours(x), other(z)
        close(y, expected)
        if gradients:
            upstream = activations(shape, seed + 10)
            y.backward(upstream), expected.backward(upstream)
            close(x.grad, z.grad)
            close(ours.weight.grad, other.weight.grad)
            close(ours.bias.grad, other.bias.grad)
    theirs = dict(other.named_buffers())
    for key, buffer in ours.named_buffers():
        close(buffer, theirs[key])
    ours.eval(), other.eval()
    x, z = (activations(shape, 4).requires_grad_() for _ in range(2))
    y, expected = ours(x), other(z)
    close(y, expected)
    y.backward(upstream := activations(shape, 14)), expected.backward(upstream)
    close(x.grad, z.grad)


OPTIONS = [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"track_running_stats": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [FusedBatchNorm, BatchNorm, MBN, BatchInstanceNorm])
def test_is_torchs_batch_norm(norm, shape, options):
    extra = {"train_gate": False} if norm is BatchInstanceNorm else {}
    assert_same(norm(6, **options, **extra), TORCH_BN[len(shape)](6, **options), shape)


@pytest.mark.parametrize("norm", [FusedBatchNorm, BatchNorm, MBN, BNRS, BatchRenorm, BNWoS])
def test_loads_the_state_of_torchs_batch_norm(norm):
    torchs = set_up(nn.BatchNorm2d(6))
    torchs(activations((4, 6, 5, 3)))
    ours = norm(6).double()
    ours.load_state_dict(torchs.state_dict())
    x = activations((4, 6, 5, 3), 1)
    close(ours.eval()(x), torchs.eval()(x))


class Functional(nn.Module):
    """A torch function of (x, weight, bias) as a module."""

    def __init__(self, function, num_features: int = 6) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_in_is_torchs_instance_norm(shape):
    torchs = Functional(lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias, eps=1e-5))
    assert_same(InstanceNorm(6), torchs, shape)
    assert_same(InstanceNorm(6), GroupNorm(6, num_groups=6), shape)


@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 1), (3, 6, 1, 1)], ids=str)
def test_in_leaves_single_values_to_the_affine(shape):
    for norm in (InstanceNorm(6), GroupNorm(6, num_groups=6)):
        plain = Functional(lambda x, weight, bias: x * view(weight, x) + view(bias, x))
        assert_same(norm, plain, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ln_and_gn_are_torchs_group_norm(shape):
    assert_same(LayerNorm(6), nn.GroupNorm(1, 6), shape)
    assert_same(GroupNorm(6, num_groups=1), LayerNorm(6), shape)
    assert_same(GroupNorm(6, num_groups=2), nn.GroupNorm(2, 6), shape)
    assert_same(GroupNorm(6), nn.GroupNorm(2, 6), shape)  # 3 is the largest divisor of 6 up to 4
    assert_same(GroupNorm(6, channels_per_group=2, eps=0.1), nn.GroupNorm(3, 6, eps=0.1), shape)


@pytest.mark.parametrize(("channels", "groups"), [(64, 16), (32, 8), (16, 4), (7, 7), (6, 2), (3, 1), (1, 1)])
def test_gn_groups_follow_from_channels_per_group(channels, groups):
    assert GroupNorm(channels).num_groups == groups


def test_gn_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"^num_groups=6 does not divide num_features=64$"):
        GroupNorm(64, num_groups=6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mbn_of_stride_1_is_bn_by_both_affines(shape):
    for affine_impl in ("depthwise", "vector"):
        assert_same(MBN(6, affine_impl=affine_impl), BatchNorm(6), shape)
    assert_same(MBN(6, stride=2), MBN(6, stride=2, affine_impl="vector"), shape)


@pytest.mark.parametrize("stored_var", ["unbiased", "biased"])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_mbn_measures_every_stride_th_position(shape, stride, stored_var):
    norm = set_up(MBN(6, stride=stride, stored_var=stored_var))
    x = activations(shape)
    values = x.numpy()
    picked = values[(slice(None), slice(None)) + (slice(None, None, stride),) * (x.ndim - 2)]
    assert picked.size < values.size or stride == 1
    axes = (0, *range(2, x.ndim))
    mean, var = picked.mean(axes), picked.var(axes)
    shaped = (1, 6) + (1,) * (x.ndim - 2)
    expected = (values - mean.reshape(shaped)) / np.sqrt(var.reshape(shaped) + 1e-5)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = expected * weight.reshape(shaped) + bias.reshape(shaped)
    close(norm(x), torch.from_numpy(expected))
    n = picked.size // 6
    stored = var * n / (n - 1) if stored_var == "unbiased" else var
    close(norm.running_mean, torch.from_numpy(0.1 * mean))
    close(norm.running_var, torch.from_numpy(0.9 + 0.1 * stored))


@pytest.mark.parametrize("affine_impl", ["depthwise", "vector"])
@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 2, 3, 5), (2, 2, 3, 2, 3)], ids=str)
def test_mbn_gradient_flows_through_the_sample(shape, affine_impl):
    norm = set_up(MBN(2, stride=2, affine_impl=affine_impl))
    inputs = [activations(shape), norm.weight, norm.bias]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(forward, [t.detach().clone().requires_grad_() for t in inputs])


def test_mbn_options():
    assert_same(MBN(6, stride=4), BatchNorm(6), (8, 6))  # no map, nothing to stride
    frozen = MBN(6, train_affine=False)
    assert not frozen.weight.requires_grad and not frozen.bias.requires_grad
    with pytest.raises(ValueError, match=r"got \(1, 6, 1, 1\) sampled from \(1, 6, 4, 4\)$"):
        MBN(6, stride=4)(torch.zeros(1, 6, 4, 4))
    with pytest.raises(ValueError, match="stride must be an int ≥ 1, got 0"):
        MBN(6, stride=0)
    with pytest.raises(ValueError, match="impl must be one of auto, reference, fused, got 'fussed'"):
        MBN(6, impl="fussed")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("timing", ["pre", "post"])
def test_brn_and_bnrs_share_the_forward(timing, shape):
    ours, other = BatchRenorm(6, stats_timing=timing), BNRS(6, stats_timing=timing)
    assert_same(ours, other, shape, gradients=False)


@pytest.mark.parametrize("timing", ["pre", "post"])
@pytest.mark.parametrize("options", [{"r_max": 1, "d_max": 0}, {"warmup_steps": 3}], ids=str)
def test_brn_held_shut_is_bn(options, timing):
    assert_same(BatchRenorm(6, stats_timing=timing, **options), BatchNorm(6), (4, 6, 5, 3))


def renormed(x, norm, mean_run, var_run, r_max, d_max):
    """The published formula in autograd's own terms; r and d are constants."""
    axes = (0, *range(2, x.ndim))
    mean, var = x.mean(axes), x.var(axes, correction=0)
    with torch.no_grad():
        r = torch.sqrt((var + norm.eps) / (var_run + norm.eps))
        d = (mean - mean_run) / torch.sqrt(var_run + norm.eps)
        if r_max is not None:
            r = r.clamp(1 / r_max, r_max)
        if d_max is not None:
            d = d.clamp(-d_max, d_max)
    y = (x - view(mean, x)) / view(torch.sqrt(var + norm.eps), x) * view(r, x) + view(d, x)
    return y * view(norm.weight, x) + view(norm.bias, x)


@pytest.mark.parametrize("limits", [(None, None), (3.0, 5.0), (1.2, 0.1)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("timing", ["pre", "post"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_brn_is_its_formula_with_r_and_d_constant(shape, timing, eps, limits):
    """With post and eps=0 this is the published layer."""
    r_max, d_max = limits
    norm = set_up(BatchRenorm(6, r_max=r_max, d_max=d_max, stats_timing=timing, eps=eps))
    mean_run, var_run = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for seed in (1, 2, 3):
        x, z = (activations(shape, seed).requires_grad_() for _ in range(2))
        twin = copy.deepcopy(norm)
        axes = (0, *range(2, x.ndim))
        new_mean = 0.9 * mean_run + 0.1 * x.detach().mean(axes)
        new_var = 0.9 * var_run + 0.1 * x.detach().var(axes, correction=1)
        seen = (mean_run, var_run) if timing == "pre" else (new_mean, new_var)
        y, expected = norm(x), renormed(z, twin, *seen, r_max, d_max)
        close(y, expected)
        upstream = activations(shape, seed + 10)
        norm.weight.grad = norm.bias.grad = twin.weight.grad = twin.bias.grad = None
        y.backward(upstream), expected.backward(upstream)
        close(x.grad, z.grad)
        close(norm.weight.grad, twin.weight.grad)
        mean_run, var_run = new_mean, new_var
        close(norm.running_mean, mean_run)
        close(norm.running_var, var_run)


@pytest.mark.parametrize("timing", ["pre", "post"])
def test_bnrs_sends_no_gradient_through_statistics(timing):
    norm = set_up(BNRS(6, stats_timing=timing, eps=0.0))
    x = activations((4, 6, 5, 3)).requires_grad_()
    before = norm.running_var.clone()
    y = norm(x)
    upstream = activations((4, 6, 5, 3), 10)
    y.backward(upstream)
    var = before if timing == "pre" else norm.running_var
    close(x.grad, upstream * view(norm.weight.detach() / var.sqrt(), x))


def test_brn_ramp_opens_the_clips_step_by_step():
    norm = BatchRenorm(6, r_max=3, d_max=5, warmup_steps=2, r_max_step=6, d_max_step=4)
    opened = []
    for _ in range(8):
        opened.append((norm.opened(norm.r_max_step).item(), norm.opened(norm.d_max_step).item()))
        norm(activations((4, 6, 5, 3)).float())
    r_limit = [1 + 2 * r for r, _ in opened]
    d_limit = [5 * d for _, d in opened]
    assert r_limit == [1, 1, 1, 1.5, 2, 2.5, 3, 3]
    assert d_limit == [0, 0, 0, 2.5, 5, 5, 5, 5]
    held = BatchRenorm(6, r_max=3, warmup_steps=2)
    steps = []
    for _ in range(4):
        steps.append(held.opened(held.r_max_step).item())
        held(activations((4, 6, 5, 3)).float())
    assert steps == [0, 0, 1, 1]


@pytest.mark.parametrize("timing", ["pre", "post"])
def test_brn_ramp_acts_on_the_output(timing):
    norm = set_up(BatchRenorm(6, r_max=3, d_max=5, r_max_step=10, d_max_step=10, stats_timing=timing))
    for step in range(12):
        x = activations((4, 6, 5, 3), step) * 8
        twin = copy.deepcopy(norm)
        y = norm(x)
        seen = twin if timing == "pre" else norm
        share = min(step / 10, 1)
        stats = seen.running_mean, seen.running_var
        torch.testing.assert_close(
            y, renormed(x, norm, *stats, 1 + 2 * share, 5 * share), rtol=1e-6, atol=1e-6
        )


def test_brn_refuses_ramps_that_cannot_act():
    with pytest.raises(ValueError, match="r_max_step=5 is a ramp to r_max, which is null; set r_max"):
        BatchRenorm(6, r_max_step=5)
    with pytest.raises(ValueError, match="d_max_step must be 0 or > warmup_steps=5, got 5"):
        BatchRenorm(6, d_max=5, warmup_steps=5, d_max_step=5)
    with pytest.raises(ValueError, match=r"r_max must be a number ≥ 1, got 0\.5"):
        BatchRenorm(6, r_max=0.5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bnwos_of_one_device_is_bn(shape):
    assert_same(BNWoS(6, num_devices=1), BatchNorm(6), shape)


@pytest.mark.parametrize(("n", "devices", "sizes"), [(8, 2, [4, 4]), (5, 2, [3, 2]), (8, 3, [3, 3, 2])])
@pytest.mark.parametrize("device", [0, 1])
def test_bnwos_normalizes_chunks_alone(n, devices, sizes, device):
    norm = set_up(BNWoS(6, num_devices=devices, stats_device=device))
    x, z = (activations((n, 6, 3, 2)).requires_grad_() for _ in range(2))
    parts = z.split(sizes)
    expected = torch.cat([F.batch_norm(p, None, None, norm.weight, norm.bias, training=True) for p in parts])
    y = norm(x)
    close(y, expected)
    upstream = activations((n, 6, 3, 2), 10)
    y.backward(upstream), expected.backward(upstream)
    close(x.grad, z.grad)
    part = parts[device].detach()
    close(norm.running_mean, 0.1 * part.mean((0, 2, 3)))
    close(norm.running_var, 0.9 + 0.1 * part.var((0, 2, 3), correction=1))
    plain = set_up(BatchNorm(6))
    plain.load_state_dict(norm.state_dict())
    close(norm.eval()(x[:1]), plain.eval()(x[:1]))


def test_bnwos_refusals():
    with pytest.raises(ValueError, match=r"num_devices=2 needs as many samples, got \(1, 6, 3, 3\)$"):
        BNWoS(6)(torch.zeros(1, 6, 3, 3))
    with pytest.raises(ValueError, match=r"value per channel, got \(1, 6\) sampled from \(3, 6\)$"):
        BNWoS(6)(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="stats_device must be below num_devices=2, got 2"):
        BNWoS(6, stats_device=2)


@pytest.mark.parametrize("options", [{}, {"stored_var": "biased", "eval_bessel": True}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bin_with_its_gate_frozen_is_bn(shape, options):
    assert_same(BatchInstanceNorm(6, train_gate=False, **options), BatchNorm(6, **options), shape)


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_bin_mixes_by_its_gate(shape):
    norm = set_up(BatchInstanceNorm(6))
    with torch.no_grad():
        norm.gate.copy_(torch.tensor([-0.5, 0.0, 0.2, 0.7, 1.0, 1.4]))
    gate = norm.gate.detach().clamp(0, 1)
    x = activations(shape)
    instance = F.instance_norm(x)
    for training in (False, True):  # in evaluation the out-of-range gate is not yet clamped in place
        norm.train(training)
        batch = F.batch_norm(x, norm.running_mean.clone(), norm.running_var.clone(), training=training)
        mixed = view(gate, x) * batch + view(1 - gate, x) * instance
        close(norm(x), mixed * view(norm.weight, x) + view(norm.bias, x))
    close(norm.gate.detach(), gate)


def test_bin_gate_moves_and_stays_in_range():
    norm = BatchInstanceNorm(6)
    gate = norm.gate
    optimizer = torch.optim.SGD(norm.parameters(), lr=2.0)
    target = activations((4, 6, 5, 3), 20).float()
    for seed in range(20):
        optimizer.zero_grad()
        x = activations((4, 6, 5, 3), seed).float()
        (norm(x) - F.instance_norm(x)).square().mean().add((norm(x) * target).mean()).backward()
        assert norm.gate.grad.abs().sum() > 0
        optimizer.step()
    norm(x)
    assert norm.gate is gate and optimizer.param_groups[0]["params"][0] is not None
    assert any(parameter is gate for parameter in optimizer.param_groups[0]["params"])
    assert (gate < 1).any() and (gate >= 0).all() and (gate <= 1).all()


def test_bn_stores_the_biased_variance_when_asked():
    norm = BatchNorm(6, stored_var="biased").double()
    x = activations((4, 6, 5, 3))
    norm(x)
    close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=0))


def test_bn_eval_bessel_rescales_by_the_evaluated_batch():
    norm, honest = set_up(BatchNorm(6, eval_bessel=True)), set_up(BatchNorm(6))
    for layer in (norm, honest):
        layer(activations((4, 6, 5, 3)))
        layer.eval()
    for n in (1, 4):
        x = activations((n, 6, 5, 3), 1)
        m = n * 15
        rescaled = copy.deepcopy(honest)
        rescaled.running_var.mul_(m / (m - 1))
        close(norm(x), rescaled(x))
    with pytest.raises(ValueError, match="more than one value per channel"):
        norm(activations((1, 6)))


def test_batch_statistics_carry_no_graph():
    for norm in (BatchNorm(6), MBN(6), BatchRenorm(6), BNRS(6), BNWoS(6), BatchInstanceNorm(6)):
        norm(activations((4, 6, 5, 3)).float().requires_grad_())
        assert norm.running_mean.grad_fn is None and norm.running_var.grad_fn is None


def test_large_means_keep_their_precision():
    """A variance as E[x²] - E[x]² would lose every digit here."""
    x = activations((16, 6, 9, 9)) + 3000
    for norm in (BatchNorm(6), MBN(6), LayerNorm(6), GroupNorm(6), InstanceNorm(6)):
        exact = copy.deepcopy(norm).double()(x)
        torch.testing.assert_close(norm(x.float()).double(), exact, rtol=1e-2, atol=5e-3)


def test_nn_hands_its_input_back():
    x = activations((4, 6, 5, 3))
    assert NoNorm(6)(x) is x


@pytest.mark.parametrize(
    "wrong",
    [{"eps": -1}, {"momentum": 1.5}, {"affine": "False"}, {"stored_var": "unbaised"}, {"eval_bessel": 1}],
    ids=str,
)
def test_wrong_values_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BatchNorm(6, **wrong)


def by_formula(norm: nn.Module, shape: tuple[int, ...], formula) -> None:
    """Training output of one batch against NumPy: `formula(x, axes, view)` before weight and bias."""
    set_up(norm)
    x = activations(shape)
    values = x.numpy()
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    weight, bias = (p.detach().numpy().reshape(1, -1, *(1,) * (x.ndim - 2)) for p in (norm.weight, norm.bias))
    close(norm(x), torch.from_numpy(formula(values, axes) * weight + bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_ghost_batch_is_batch_norm(shape):
    assert_same(GhostBatchNorm(6, ghost_batch_size=shape[0]), BatchNorm(6), shape)


def test_ghost_batches_are_batch_norms_of_the_parts():
    ghost, one, other = (
        set_up(norm) for norm in (GhostBatchNorm(6, ghost_batch_size=4), BatchNorm(6), BatchNorm(6))
    )
    x = activations((9, 6, 5, 3))  # 5 and 4 samples
    close(ghost(x), torch.cat([one(x[:5]), other(x[5:])]))
    close(ghost.running_mean, (one.running_mean + other.running_mean) / 2)
    close(ghost.running_var, (one.running_var + other.running_var) / 2)
    assert ghost.num_batches_tracked == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves_of_batch_norm_by_their_formulas(shape):
    by_formula(MeanOnlyBatchNorm(6), shape, lambda x, axes: x - x.mean(axes, keepdims=True))
    by_formula(
        VarianceOnlyBatchNorm(6), shape, lambda x, axes: x / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centring_then_scaling_is_batch_norm(shape):
    mean, var, bn = MeanOnlyBatchNorm(6).double(), VarianceOnlyBatchNorm(6).double(), BatchNorm(6).double()
    x = activations(shape)
    close(var(mean(x)), bn(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l1_batch_norm_by_its_formula(shape):
    def formula(x, axes):
        centred = x - x.mean(axes, keepdims=True)
        s = np.sqrt(np.pi / 2) * np.abs(centred).mean(axes, keepdims=True)
        return centred / np.sqrt(s**2 + 1e-5)

    by_formula(L1BatchNorm(6), shape, formula)


def test_the_l1_deviation_of_normal_values_is_their_sd():
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    _, var = L1BatchNorm(1).double().batch_stats(x)
    assert var.item() == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_is_torchs_over_channels(shape):
    ours, theirs = set_up(RMSNorm(6, eps=1e-6, train_bias=False)), nn.RMSNorm(6, eps=1e-6).double()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        ours.bias.zero_()
    x, z = (activations(shape).requires_grad_() for _ in range(2))
    y, expected = ours(x), theirs(z.movedim(1, -1)).movedim(-1, 1)
    close(y, expected)
    upstream = activations(shape, 3)
    y.backward(upstream), expected.backward(upstream)
    close(x.grad, z.grad)
    close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_of_a_sample_and_pixel_norm_by_their_formulas(shape):
    def sample(x, axes):
        return x / np.sqrt((x**2).mean(tuple(range(1, x.ndim)), keepdims=True) + 1e-6)

    by_formula(RMSNorm(6, over="sample"), shape, sample)
    x = activations(shape)
    pixel = RMSNorm(6, eps=1e-8, affine=False)(x)
    values = x.numpy()
    close(pixel, torch.from_numpy(values / np.sqrt((values**2).mean(1, keepdims=True) + 1e-8)))
    torch.testing.assert_close(pixel.square().mean(1), torch.ones_like(pixel[:, 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_tanh_by_its_formula(shape):
    by_formula(DyT(6, alpha=0.3), shape, lambda x, axes: np.tanh(np.float32(0.3).astype(np.float64) * x))
    norm = DyT(6).double()
    norm(activations(shape)).square().sum().backward()
    assert norm.slope.grad.abs() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cumulative_batch_norm_is_torchs(shape):
    assert_same(BatchNorm(6, momentum=None), TORCH_BN[len(shape)](6, momentum=None), shape)
