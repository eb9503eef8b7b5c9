"""Layers that measure each sample by itself or nothing, and EvoNorm-B0: against torch, timm, each other."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layers import activations, build
from scipy import integrate, special, stats
from timm.layers import LayerNorm2d
from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dS0
from timm.layers.filter_response_norm import FilterResponseNormTlu2d
from timm.layers.grn import GlobalResponseNorm as TimmGlobalResponseNorm
from torch import Tensor, nn

from normbench.formulas import formula_of, options_of, state_of
from normbench.norms.divisive import DivisiveNorm
from normbench.norms.dyt import DyISRU, DyT
from normbench.norms.evonorm import EvoNormB0, EvoNormS0
from normbench.norms.frn import FilterResponseNorm
from normbench.norms.grn import GlobalResponseNorm
from normbench.norms.group import GroupNorm, InstanceNorm, LayerNorm
from normbench.norms.ln_elementwise import ElementwiseLayerNorm
from normbench.norms.lrn import LocalResponseNorm
from normbench.norms.pono import PositionalNorm
from normbench.norms.proxy import ProxyNorm
from normbench.norms.rms import RMSNorm

SHAPES = [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5)]
NAMES = ["ln_elementwise", "pono", "lrn", "divisive", "frn", "evonorm_s0", "evonorm_b0", "grn", "proxy"]
NAMES += ["dyt", "derf", "dyisru"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def filled(norm: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, every parameter away from one and zero, the same for the same name."""
    generator = torch.Generator().manual_seed(seed)
    norm = norm.double()
    with torch.no_grad():
        for _, parameter in sorted(norm.named_parameters()):
            parameter.copy_(0.2 + 0.6 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    return norm


def take(ours: nn.Module, other: nn.Module, **names: str) -> None:
    """Ours with the other's parameters, those of another name by `ours=theirs`."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs[names.get(name, name)].view(parameter.shape))


def assert_same(ours: nn.Module, other: nn.Module, x: Tensor, **names: str) -> None:
    """Output, the input's and every parameter's gradient."""
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y, expected = ours(a), other(b)
    close(y, expected)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    ours.zero_grad(), other.zero_grad()
    y.backward(upstream), expected.backward(upstream)
    close(a.grad, b.grad)
    theirs = dict(other.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, theirs[names.get(name, name)].grad.view(parameter.shape))


# timm takes FRN's and EvoNorm's statistics in float32 whatever the input
TWINS = {
    "pono": (PositionalNorm, {}, lambda: LayerNorm2d(6, eps=1e-5), torch.float64),
    "frn": (FilterResponseNorm, {}, lambda: FilterResponseNormTlu2d(6, eps=1e-6), torch.float32),
    "evonorm_s0": (EvoNormS0, {"num_groups": 2}, lambda: EvoNorm2dS0(6, groups=2), torch.float32),
    "evonorm_s0, 6 groups": (EvoNormS0, {}, lambda: EvoNorm2dS0(6, groups=6), torch.float32),
    "evonorm_b0": (EvoNormB0, {"eps": 1e-3}, lambda: EvoNorm2dB0(6), torch.float32),
    "grn": (GlobalResponseNorm, {}, lambda: TimmGlobalResponseNorm(6, channels_last=False), torch.float64),
}


@pytest.mark.parametrize("twin", TWINS)
def test_is_timms_layer(twin):
    layer, options, make_timms, dtype = TWINS[twin]
    names = {"v1": "v"} if twin.startswith("evonorm") else {}
    ours, timms = layer(6, **options), make_timms()
    theirs = dict(timms.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs[names.get(name, name)]), f"{name} starts elsewhere"
    ours, timms = ours.to(dtype), filled(timms).to(dtype)
    take(ours, timms, **names)
    for training, seed in ((True, 1), (True, 2), (False, 3)):
        ours.train(training), timms.train(training)
        assert_same(ours, timms, activations((4, 6, 5, 3), dtype, seed), **names)
    if twin == "evonorm_b0":
        close(ours.running_var, timms.running_var)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ln_elementwise_is_torchs_layer_norm(shape):
    ours = ElementwiseLayerNorm(6, spatial_shape=shape[2:]).double()
    torchs = filled(nn.LayerNorm(shape[1:]))
    assert ours.weight.shape == ours.bias.shape == shape[1:]
    take(ours, torchs)
    assert_same(ours, torchs, activations(shape))
    bare = ElementwiseLayerNorm(6, spatial_shape=shape[2:], affine=False)
    assert_same(bare, LayerNorm(6, affine=False), activations(shape))


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_ln_elementwise_keeps_the_memory_format(shape):
    ours = filled(ElementwiseLayerNorm(6, spatial_shape=shape[2:]))
    x = activations(shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    y = ours(x.contiguous(memory_format=last))
    assert y.is_contiguous(memory_format=last) and ours(x).is_contiguous()
    close(y, ours(x))


def test_ln_elementwise_refuses_another_map_by_name():
    ours = ElementwiseLayerNorm(6, spatial_shape=(5, 3))
    with pytest.raises(
        ValueError, match=r"^spatial_shape=\(5, 3\) needs \(N, 6, 5, 3\), got \(4, 6, 3, 5\)$"
    ):
        ours(torch.zeros(4, 6, 3, 5))
    with pytest.raises(ValueError, match=r"^spatial_shape=\(5, 3\) needs \(N, 6, 5, 3\), got \(4, 6\)$"):
        ours(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"^spatial_shape=\(\) needs \(N, 6\), got \(4, 6, 1\)$"):
        ElementwiseLayerNorm(6)(torch.zeros(4, 6, 1))
    with pytest.raises(ValueError, match=r"^spatial_shape must be an int ≥ 1, got 0$"):
        ElementwiseLayerNorm(6, spatial_shape=(5, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"size": 2, "alpha": 0.3, "beta": 1.5, "k": 2.0}, {"size": 9}], ids=str
)
def test_lrn_is_torchs_function(shape, options):
    ours = LocalResponseNorm(6, **options)
    x = activations(shape)
    map_of_one = x.view(*shape, 1) if len(shape) == 2 else x
    arguments = [getattr(ours, key) for key in ("size", "alpha", "beta", "k")]
    close(ours(x), F.local_response_norm(map_of_one, *arguments).view(shape))


def test_alexnets_lrn_sums_the_squares():
    x = activations((2, 7, 3, 3)) * 20
    energy = F.conv3d(x.square().unsqueeze(1), torch.ones(1, 1, 5, 1, 1, dtype=x.dtype), padding=(2, 0, 0))
    close(LocalResponseNorm(7, alpha=5e-4, k=2.0)(x), x / (2 + 1e-4 * energy.squeeze(1)) ** 0.75)


def test_pono_is_layer_norm_of_each_position():
    assert_same(filled(PositionalNorm(6)), filled(LayerNorm(6)), activations((8, 6)))
    x = activations((4, 6, 5, 3))
    rows = x.movedim(1, -1).reshape(-1, 6)
    close(PositionalNorm(6)(x).movedim(1, -1).reshape(-1, 6), LayerNorm(6)(rows))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divisive_norm_lies_between_pono_and_layer_norm(shape):
    x = activations(shape)
    point = DivisiveNorm(6, summation_window=1, suppression_window=1, sigma=0.1, affine=False).double()
    close(point(x), PositionalNorm(6, eps=float(point.smoother.detach() ** 2), affine=False)(x))
    whole = DivisiveNorm(6, summation_window=13, suppression_window=13, sigma=0.1, affine=False).double()
    close(whole(x), LayerNorm(6, eps=float(whole.smoother.detach() ** 2), affine=False)(x))


def test_divisive_norm_sees_its_fields_and_no_further():
    norm = DivisiveNorm(2, summation_window=3, suppression_window=5).double()
    x = activations((1, 2, 11)).requires_grad_()
    reach = 1 + 2  # of the energy: a window of 5 around means of 3
    norm(x)[..., 5].sum().backward()
    assert (x.grad[..., 5 - reach : 6 + reach] != 0).all()
    assert not x.grad[..., : 5 - reach].any() and not x.grad[..., 6 + reach :].any()
    assert DivisiveNorm(2, train_sigma=False).smoother.requires_grad is False


def test_frn_divides_by_the_root_mean_square_and_cuts():
    x = activations((4, 6, 5, 3))
    norm = FilterResponseNorm(6, eps=0.0, affine=False, tlu=False)
    close(norm(x).square().mean((2, 3)), torch.ones(4, 6, dtype=x.dtype))
    close(norm(x * 37), norm(x))
    centred = x - x.mean((2, 3), keepdim=True)
    close(FilterResponseNorm(6, eps=1e-5, tlu=False)(centred), InstanceNorm(6)(x))
    close(FilterResponseNorm(6)(x), FilterResponseNorm(6, tlu=False)(x).relu())  # tau starts at zero


def test_frn_learns_its_threshold_unless_a_relu_follows():
    x = activations((4, 6, 5, 3))
    for follow, learns in ((lambda y: y, True), (F.relu, False)):
        norm = FilterResponseNorm(6).double()
        follow(norm(x)).sum().backward()
        assert bool(norm.tau.grad.any()) is learns


def test_frn_learns_the_size_of_eps():
    norm = FilterResponseNorm(6, learned_eps=1e-4).double()
    x = activations((8, 6)) / 30
    close(norm(x), (x / (x.square() + norm.more_eps.detach() + 1e-6).sqrt()).relu())
    norm(x).sum().backward()
    assert norm.more_eps.grad < 0
    assert FilterResponseNorm(6).more_eps is None


def test_evonorm_s0_takes_the_most_groups_that_divide():
    assert [EvoNormS0(c).num_groups for c in (64, 120, 48, 6, 7)] == [32, 30, 24, 6, 7]


def test_evonorm_s0_without_its_gate_is_half_a_group_norm():
    norm = EvoNormS0(6, num_groups=3).double()
    nn.init.zeros_(norm.v1)  # sigmoid(0) = ½
    x = activations((4, 6, 5, 3))
    centred = x - x.view(4, 3, 30).mean(2).repeat_interleave(2, 1)[..., None, None]
    close(norm(centred) * 2, GroupNorm(6, num_groups=3)(x))


def test_evonorm_b0_of_one_sample_adds_a_rectified_value_to_its_deviation():
    norm = filled(EvoNormB0(6))
    x = activations((1, 6, 5, 3))
    std = (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    view = (1, 6, 1, 1)
    expected = x / (std + (norm.v1.view(view) * x).relu()) * norm.weight.view(view) + norm.bias.view(view)
    close(norm(x), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grn_starts_as_the_identity_and_favours_the_strong(shape):
    x = activations(shape)
    norm = GlobalResponseNorm(6, eps=0.0)
    assert torch.equal(norm(x), x)
    nn.init.ones_(norm.weight)
    gain = norm(x) / x - 1
    close(gain.mean(1), torch.ones_like(gain[:, 0]))  # shares of the energy's root
    close(norm(x * 37), norm(x) * 37)
    close(GlobalResponseNorm(6, eps=0.0, affine=False)(x), norm(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_proxy_norm_of_the_identity_is_its_norm(shape):
    x = activations(shape)
    norm = ProxyNorm(6, activation="identity", proxy_eps=0.0).double()
    close(norm(x), LayerNorm(6)(x))
    view = (1, 6) + (1,) * (len(shape) - 2)
    shifted = (LayerNorm(6)(x) - filled(norm).proxy_mean.view(view)) / (1 + norm.proxy_scale.view(view))
    close(norm(x), shifted)
    grouped = ProxyNorm(6, activation="identity", proxy_eps=0.0, num_groups=2).double()
    close(grouped(x), GroupNorm(6, num_groups=2)(x))


ACTIVATIONS = {
    "relu": lambda u: np.maximum(u, 0),
    "gelu": lambda u: u * special.ndtr(u),
    "silu": lambda u: u * special.expit(u),
}


def gaussian_mean(value, kink):
    """The integral of value(t) over a standard normal t, split where the value bends."""
    return integrate.quad(lambda t: value(t) * stats.norm.pdf(t), -12, 12, points=[kink], limit=200)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_proxy_moments_are_those_of_the_gaussian(activation):
    f, errors = ACTIVATIONS[activation], []
    for count in (256, 1024, 4096):
        norm = filled(ProxyNorm(4, activation=activation, num_quantiles=count))
        with torch.no_grad():
            norm.bias.copy_(torch.tensor([-0.8, -0.1, 0.2, 0.7]))
            norm.weight.copy_(torch.tensor([0.3, 1.0, 1.6, -0.5]))
            mean, var = norm.proxy_moments(torch.float64)
        worst = 0.0
        for c in range(4):
            names = ("proxy_mean", "proxy_scale", "weight", "bias")
            center, widening, weight, bias = (state_of(norm)[name][c] for name in names)
            spread = 1 + widening

            gain, middle = weight * spread, weight * center + bias
            kink = -middle / gain
            m = gaussian_mean(lambda t, a=gain, b=middle: f(a * t + b), kink)
            v = gaussian_mean(lambda t, a=gain, b=middle, m=m: (f(a * t + b) - m) ** 2, kink)
            scale = math.sqrt(v + norm.proxy_eps)
            worst = max(worst, abs(mean[c] - m) / scale, abs(var[c] - v) / scale**2)
        errors.append(worst)
    assert errors[0] < 1e-2 and errors[2] < 1e-3
    assert all(later < earlier / 2 for earlier, later in pairwise(errors))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_proxy_norm_normalizes_gaussian_activations(activation):
    """What the layer is for: Gaussian channels come out with mean 0 and variance 1, as from batch norm."""
    norm = filled(ProxyNorm(3, activation=activation, proxy_eps=0.0, num_quantiles=4096))
    normal = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    channels = torch.stack([normal] * 3)  # one sample, which layer norm leaves a standard normal
    with torch.no_grad():
        norm.proxy_mean.zero_(), norm.proxy_scale.zero_()
        y = norm(channels.unsqueeze(0))
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(3, dtype=y.dtype), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.var((0, 2)), torch.ones(3, dtype=y.dtype), atol=2e-3, rtol=0)


def test_proxy_norm_keeps_its_quantiles_out_of_checkpoints_and_can_freeze_its_proxy():
    norm = ProxyNorm(6, train_proxy=False)
    assert sorted(norm.state_dict()) == ["bias", "proxy_mean", "proxy_scale", "weight"]
    norm(activations((4, 6, 5, 3), torch.float32)).square().sum().backward()
    assert norm.proxy_mean.grad is None and norm.proxy_scale.grad is None


def test_the_squashings_agree_to_first_order_and_stay_within_one():
    x = activations((4, 6, 5, 3))
    for function in ("tanh", "isru", "erf", "hardtanh"):
        norm = DyT(6, function=function).double()
        slope = norm(x * 1e-7) / (x * 1e-7)
        expected = 0.5 * (2 / math.sqrt(math.pi) if function == "erf" else 1.0)
        torch.testing.assert_close(slope, torch.full_like(slope, expected))
        assert norm(x * 1e3).abs().max() <= 1


def test_derf_shifts_what_it_squashes():
    norm = DyT(6, function="erf", shift=True).double()
    with torch.no_grad():
        norm.offset.fill_(0.3)
    x = activations((4, 6, 5, 3))
    close(norm(x), torch.special.erf(0.5 * x + 0.3))
    assert DyT(6).offset is None


def test_dyisru_is_rms_norm_where_beta_is_the_other_channels_energy():
    x = torch.tensor([[3.0, -3.0, 3.0, 3.0]], dtype=torch.float64)
    norm = DyISRU(4, beta=3 * 9.0).double()
    torch.testing.assert_close(norm(x), RMSNorm(4, eps=0.0)(x), rtol=1e-6, atol=0)  # its start is a float32
    x = activations((4, 6, 5, 3))
    norm = DyISRU(6).double()
    assert norm.beta == 6.0 and norm(x * 1e3).abs().max() < math.sqrt(6)
    kin = DyT(6, function="isru").double()
    nn.init.constant_(kin.slope, norm.slope.item())
    close(norm(x), kin(x) * math.sqrt(6))


OPTIONS = [
    (LocalResponseNorm, {"size": 4, "alpha": 0.7, "beta": 1.3, "k": 0.4}),
    (DivisiveNorm, {"summation_window": 1, "suppression_window": 3}),
    (DivisiveNorm, {"summation_window": 7, "suppression_window": 3, "affine": False}),
    (FilterResponseNorm, {"tlu": False, "learned_eps": 0.1, "eps": 1e-2}),
    (EvoNormS0, {"num_groups": 2, "eps": 1e-2}),
    (EvoNormB0, {"momentum": None, "eps": 1e-2}),
    (EvoNormB0, {"momentum": 0.3, "affine": False}),
    (GlobalResponseNorm, {"eps": 0.3, "affine": False}),
    (ProxyNorm, {"activation": "gelu", "num_groups": 2, "num_quantiles": 7}),
    (ProxyNorm, {"activation": "silu", "affine": False, "proxy_eps": 0.5}),
    (ProxyNorm, {"activation": "identity", "eps": 0.1}),
    (DyT, {"function": "isru", "shift": True}),
    (DyT, {"function": "hardtanh", "alpha": 0.9}),
    (DyT, {"function": "erf"}),
    (DyISRU, {"beta": 0.3}),
    (GroupNorm, {"num_groups": 2}),
    (RMSNorm, {"over": "sample"}),
]


@pytest.mark.parametrize("layer, options", OPTIONS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_is_in_the_formula(layer, options, shape):
    norm = filled(layer(6, **options))
    for seed, training in ((1, True), (2, True), (3, False)):
        x, state = activations(shape, seed=seed), state_of(norm)
        y = norm.train(training)(x)
        expected, changed = formula_of(norm)(x.numpy(), state, options_of(norm), training)
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
        for key, value in changed.items():
            np.testing.assert_allclose(state_of(norm)[key], value, rtol=1e-9, err_msg=key)


HARD = {
    "huge": lambda shape: activations(shape) * 1e4,
    "tiny": lambda shape: activations(shape) * 1e-4,
    "zero": lambda shape: torch.zeros(shape),
    "constant": lambda shape: torch.full(shape, 3.7),
    "a dead channel": lambda shape: activations(shape) * (torch.arange(shape[1]) > 0).view(1, -1, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 6, 5, 3), (1, 6, 5, 3), (4, 1, 5, 3), (4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_hard_inputs_stay_finite(name, shape, dtype):
    for kind, make in HARD.items():
        norm = build(name, shape[1], torch.float32, spatial_shape=shape[2:])
        reach = 2e4 if dtype == torch.float16 else math.inf  # outputs have to fit float16 too
        x = make(shape).clamp(-reach, reach).to(dtype).requires_grad_()
        for training in (True, False):
            y = norm.train(training)(x)
            y.float().sum().backward()
            assert y.isfinite().all(), kind
        assert x.grad.isfinite().all(), kind
        assert all(p.grad is None or p.grad.isfinite().all() for p in norm.parameters()), kind


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_passes(name, shape):
    norm = build(name, 6, torch.float32, spatial_shape=shape[2:]).eval()
    empty = torch.zeros(0, *shape[1:], requires_grad=True)
    y = norm(empty)
    y.sum().backward()
    assert y.shape == empty.grad.shape == empty.shape
    if name != "evonorm_b0":
        assert norm.train()(empty).shape == empty.shape


def test_single_values_are_left_to_the_affine():
    for norm in (PositionalNorm(1), DivisiveNorm(1, summation_window=1)):
        x = activations((4, 1, 5, 3))
        close(filled(norm)(x), x * norm.weight + norm.bias)
    for norm in (ElementwiseLayerNorm(1), DivisiveNorm(1)):
        x = activations((4, 1))
        close(filled(norm)(x), x * norm.weight + norm.bias)
    x = activations((4, 6))
    close(EvoNormS0(6).double()(x), F.silu(x))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LocalResponseNorm(6, size=0), "size must be an int ≥ 1, got 0"),
        (lambda: LocalResponseNorm(6, k=0), "k must be a number > 0, got 0"),
        (lambda: LocalResponseNorm(6, beta=-1), "beta must be a number ≥ 0, got -1"),
        (
            lambda: DivisiveNorm(6, summation_window=4),
            "summation_window must be odd, to have a middle, got 4; use 3 or 5",
        ),
        (lambda: DivisiveNorm(6, sigma=0), "sigma must be a number > 0, got 0"),
        (lambda: FilterResponseNorm(6, learned_eps=-1), "learned_eps must be a number ≥ 0, got -1"),
        (lambda: ProxyNorm(6, num_groups=4), "num_groups=4 does not divide num_features=6"),
        (lambda: ProxyNorm(6, num_quantiles=1), "num_quantiles must be an int ≥ 2, got 1"),
        (
            lambda: ProxyNorm(6, activation="rulu"),
            "activation must be one of relu, gelu, silu, identity, got 'rulu'; did you mean 'relu'?",
        ),
        (lambda: DyT(6, function="tan"), "function must be one of .* did you mean 'tanh'"),
        (lambda: DyISRU(6, beta=0), "beta must be a number > 0, got 0"),
    ],
)
def test_a_bad_value_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        make()
