"""What a weight is made of: the form in which a model's convolutions and linear layers train theirs."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from normbench.norms.base import widen
from normbench.values import one_of

WEIGHTS = ("none", "standardized", "scaled", "weight_norm")
EPS = 1e-6  # timm's
# torch's names of parameters, behind their layer's
RAW = ("weight", "parametrizations.weight.original", "parametrizations.weight.original1")
GAIN, G = GAINS = ("parametrizations.weight.0.gain", "parametrizations.weight.original0")


def reparametrize(model: nn.Module, weight: str) -> None:
    """Let every convolution and linear layer train its weight in this form, but the last, the classifier.

        none           the weight itself
        standardized   (w - mean) / sqrt(var + eps), see `Standardized`
        scaled         gain * (w - mean) / sqrt(fan_in * (var + eps)), see `Scaled`
        weight_norm    g * v / ‖v‖, torch.nn.utils.parametrizations.weight_norm

    mean, ÷n var and ‖·‖ are an output channel's, over its fan_in values; w and v start as the drawn weight,
    g as ‖v‖, gain as 1, both one per output channel and exempt from weight decay as biases are. To be called
    before `place_norms`: what a norm layer holds stays as it is.

    Standardized weights have a standard deviation of one, so each layer magnifies its input √fan_in times
    and a norm is meant to follow. The other forms stand without one.

    Raises: ValueError — another name, or a layer with one value per output channel, which has no spread and
        no direction.
    Source: weight_norm: Salimans and Kingma, Weight Normalization, arXiv 1602.07868. Differs from the source
        in: g starts as the drawn weight's norm, not from a first batch's moments.
    """
    one_of("weight", weight, WEIGHTS)
    if weight == "none":
        return
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}
    for name, layer in list(layers.items())[:-1]:
        if layer.weight[0].numel() < 2:
            raise ValueError(
                f"weight={weight} needs more than one value per output channel, got "
                f"{tuple(layer.weight.shape)} in {name}; use weight=none or a wider model"
            )
        if weight == "weight_norm":
            weight_norm(layer)
        else:
            form = Standardized() if weight == "standardized" else Scaled(layer.weight)
            register_parametrization(layer, "weight", form)


def standardize(raw: Tensor) -> Tensor:
    """(out, *) → the same, in at least float32: mean 0 and ÷n variance 1 over all axes but the first."""
    wide, axes = widen(raw), tuple(range(1, raw.ndim))
    centred = wide - wide.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + EPS).rsqrt()


class Standardized(nn.Module):
    """Weight standardization: every output channel's weights have mean 0 and variance 1.

        w → (w - mean) / sqrt(var + eps)

    Shape: (out, *) → (out, *), dtype and memory format kept.
    Source: Qiao, Wang, Liu, Shen and Yuille, Weight Standardization, arXiv 1903.10520; timm's StdConv2d,
        whose eps it has. Differs from the authors' code in: that divides by the ÷(n-1) standard deviation
        + 1e-5.
    """

    def forward(self, raw: Tensor) -> Tensor:
        return standardize(raw).to(raw.dtype)


class Scaled(nn.Module):
    """Scaled weight standardization: variance 1/fan_in, so that a layer keeps its input's variance.

        w → gain * (w - mean) / sqrt(fan_in * (var + eps))

    Args:
        like: the weight; `gain` (out,) is learned and starts at one.
    Shape: (out, *) → (out, *), dtype and memory format kept.
    Source: Brock, De and Smith, arXiv 2101.08692; Brock, De, Smith and Simonyan, arXiv 2102.06171 (NF-Nets);
        timm's ScaledStdConv2d, whose eps it has. Differs from the papers in: no constant gain for the
        nonlinearity, which the learned one has to find; eps (theirs: fan_in * var is 1e-4 at least).
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(len(like), dtype=like.dtype, device=like.device))

    def forward(self, raw: Tensor) -> Tensor:
        scale = widen(self.gain) * raw[0].numel() ** -0.5
        weight: Tensor = standardize(raw) * scale.view(-1, *(1,) * (raw.ndim - 1))
        return weight.to(raw.dtype)


def raw_weight(layer: nn.Module) -> nn.Parameter:
    """The values that a layer's weight is made from: w or v, or the weight itself."""
    return next(parameter for name, parameter in layer.named_parameters() if name in RAW)


def gains_of(layer: nn.Module) -> Iterator[nn.Parameter]:
    """What scales a layer's output channels beside its raw weight: gain or g, or nothing."""
    return (parameter for name, parameter in layer.named_parameters() if name in GAINS)


@torch.no_grad()
def start_gains(layer: nn.Module) -> None:
    """Write a layer's gains in place, as they start beside the raw weight that stands there."""
    own = dict(layer.named_parameters())
    if GAIN in own:
        own[GAIN].fill_(1)
    if G in own:
        own[G].copy_(torch.norm_except_dim(raw_weight(layer), 2, 0))
