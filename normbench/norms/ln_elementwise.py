"""Layer norm as published: a weight and a bias for every element of a sample."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.norms.base import Norm, widen
from normbench.values import number_from, positive_int

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class ElementwiseLayerNorm(Norm):
    """Layer norm with a weight and a bias per element, by torch's own kernel, for maps of one size.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the channels and all spatial axes, per sample.

    Args:
        num_features: channels C.
        spatial_shape: the map's size, (H, W) for images, () for (N, C); the model says it, not the YAML.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *spatial_shape) → the same, 0 to 3 spatial axes; weight and bias (C, *spatial_shape).
    State: none.
    Raises: ValueError — another channel count, rank or map size.
    Source: Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450; `torch.nn.functional.layer_norm`.
        Differs from the source in: a sample of one value passes through.
    """

    def __init__(
        self,
        num_features: int,
        *,
        spatial_shape: Sequence[int] = (),
        eps: float = 1e-5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.spatial_shape = tuple(positive_int("spatial_shape", size) for size in spatial_shape)
        self.eps = number_from("eps", eps, 0)
        if self.weight is not None and self.bias is not None:
            shape = (num_features, *self.spatial_shape)
            self.weight = nn.Parameter(torch.ones(shape), requires_grad=train_weight)
            self.bias = nn.Parameter(torch.zeros(shape), requires_grad=train_bias)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.shape[2:] != self.spatial_shape:
            needed = ", ".join(map(str, ("N", self.num_features, *self.spatial_shape)))
            raise ValueError(f"spatial_shape={self.spatial_shape} needs ({needed}), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        if x[0:1].numel() == 1:  # no spread to divide by, and centring would erase the signal
            return (wide if weight is None or bias is None else wide * weight + bias).to(x.dtype)
        if x.ndim > 3 and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]):
            # the same values in the order they lie in: the kernel knows no memory format
            weight, bias = (None if p is None else p.movedim(0, -1) for p in (weight, bias))
            wide = wide.movedim(1, -1)
            y = F.layer_norm(wide, wide.shape[1:], weight, bias, self.eps).movedim(-1, 1)
        else:
            y = F.layer_norm(wide, wide.shape[1:], weight, bias, self.eps)
        return y.to(x.dtype)
