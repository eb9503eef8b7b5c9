"""Norms that measure each sample by itself: group norm, and its two ends, layer norm and instance norm."""

from torch import Tensor

from normbench.norms.base import Norm, widen
from normbench.values import number_from, positive_int


def normalize_groups(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over each sample's groups of channels; a group of one value stays."""
    if x.numel() == x.shape[0] * num_groups:
        return x  # no spread to divide by, and centring would erase the signal
    centred = x - group_mean(x, num_groups)
    return centred * (group_mean(centred.square(), num_groups) + eps).rsqrt()


def group_mean(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, *) → (N, C, 1, …): the mean over its sample's group, on every channel of the group."""
    n, c = x.shape[:2]
    means = x.mean(list(range(2, x.ndim))) if x.ndim > 2 else x  # first per channel: no copy of channels-last
    groups = means.reshape(n, num_groups, c // num_groups).mean(-1, keepdim=True)
    return groups.expand(n, num_groups, c // num_groups).reshape((n, c) + (1,) * (x.ndim - 2))


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`, both ≥ 1."""
    return next(k for k in range(min(most, number), 0, -1) if number % k == 0)


def grouping(num_features: int, num_groups: int | None, channels_per_group: int) -> tuple[int, int]:
    """How many groups, of how many channels: as many as asked for, else of the largest size that divides."""
    size = largest_divisor(num_features, positive_int("channels_per_group", channels_per_group))
    groups = num_features // size if num_groups is None else positive_int("num_groups", num_groups)
    if num_features % groups:
        raise ValueError(f"num_groups={groups} does not divide num_features={num_features}")
    return groups, num_features // groups


class GroupNorm(Norm):
    """Normalizes groups of channels of each sample, so that the batch size does not matter.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the channels of a group and all spatial axes, per sample.

    Args:
        num_features: channels C.
        num_groups: groups G, dividing C; None derives them from channels_per_group.
        channels_per_group: without num_groups, groups have the largest divisor of C up to this many.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none.
    Raises: ValueError — another channel count or rank; num_groups does not divide num_features.
    Source: Wu and He, Group Normalization, arXiv 1803.08494; HarmanDotpy,
        Normalizations-in-Deep-Learning (GitHub): groups of 4 channels.
        Differs from the source in: a group of one value passes through; the study ignored num_groups.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = None,
        channels_per_group: int = 4,
        eps: float = 1e-5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.eps = number_from("eps", eps, 0)
        self.num_groups, self.channels_per_group = grouping(num_features, num_groups, channels_per_group)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.scale_and_shift(normalize_groups(widen(x), self.num_groups, self.eps)).to(x.dtype)


class LayerNorm(Norm):
    """Normalizes each sample over everything it holds, so that the batch size does not matter.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the channels and all spatial axes, per sample.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none.
    Raises: ValueError — another channel count or rank.
    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450; HarmanDotpy,
        Normalizations-in-Deep-Learning (GitHub).
        Differs from the source in: weight and bias per channel, as in the study, where the paper has one
        per element; a sample of one value passes through.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.eps = number_from("eps", eps, 0)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.scale_and_shift(normalize_groups(widen(x), 1, self.eps)).to(x.dtype)


class InstanceNorm(Norm):
    """Normalizes each channel of each sample over its map, which removes a picture's contrast.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over all spatial axes, per sample and channel, in training and evaluation alike.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none.
    Raises: ValueError — another channel count or rank.
    Source: Ulyanov, Vedaldi and Lempitsky, Instance Normalization, arXiv 1607.08022; HarmanDotpy,
        Normalizations-in-Deep-Learning (GitHub).
        Differs from the source in: on (N, C) and on 1×1 maps, where torch refuses, only weight and bias
        act; no running statistics, which the study kept and never used.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.eps = number_from("eps", eps, 0)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = normalize_groups(widen(x), self.num_features, self.eps)
        return self.scale_and_shift(y).to(x.dtype)
