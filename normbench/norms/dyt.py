"""Dynamic tanh and its kin: a learned squashing in place of statistics."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.norms.base import Norm, widen
from normbench.values import above_zero, flag, number_from, one_of


def isru(x: Tensor) -> Tensor:
    """The inverse square root unit."""
    return x * (x.square() + 1).rsqrt()


SQUASHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "isru": isru,
    "erf": torch.erf,
    "hardtanh": F.hardtanh,
}


class DyT(Norm):
    """Squashes activations by tanh, or its like, with one learned slope; it measures nothing at all.

        y = f(alpha · x + s) * weight + bias

    element by element, in training and evaluation alike; alpha and s are learned numbers.

    Args:
        num_features: channels C.
        function: f: tanh (DyT), erf (Derf with shift=true), isru, u / sqrt(1 + u²), or hardtanh, u within
            [-1, 1].
        alpha: the slope's start; one number for the layer, always trained.
        shift: learn s, which starts at 0; False leaves it out.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none; the parameters slope () and offset () beside weight and bias.
    Raises: ValueError — another channel count or rank.
    Source: Zhu, Chen, He, LeCun and Liu, Transformers without Normalization, arXiv 2503.10622; Chen, Lu, Zhu,
        Sun and Liu, Stronger Normalization-Free Transformers, arXiv 2512.10938 (Derf, and with shift=true
        their isru and their clipped line).
        Differs from the source in: nothing.
    """

    def __init__(
        self,
        num_features: int,
        *,
        function: str = "tanh",
        alpha: float = 0.5,
        shift: bool = False,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.function = one_of("function", function, SQUASHINGS)
        self.alpha = number_from("alpha", alpha, 0)
        self.shift = flag("shift", shift)
        self.slope = nn.Parameter(torch.tensor(self.alpha))
        self.offset = nn.Parameter(torch.tensor(0.0)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        u = self.slope * widen(x)
        if self.offset is not None:
            u = u + self.offset
        return self.scale_and_shift(SQUASHINGS[self.function](u)).to(x.dtype)


class DyISRU(Norm):
    """Root mean square norm element by element: the other channels' energy is one learned number.

        y = sqrt(C) · x / sqrt(beta + x²) * weight + bias

    element by element, in training and evaluation alike; beta is a learned number that stands for the sum of
    x² over the other channels.

    Args:
        num_features: channels C.
        beta: its start, > 0; one number for the layer, always trained; null starts at C, where activations
            of size one stay about as they are.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none; the parameter slope (), 1/sqrt(beta), beside weight and bias.
    Raises: ValueError — another channel count or rank.
    Source: Stollenwerk, On the Mathematical Relationship Between Layer Normalization and Dynamic Activation
        Functions, arXiv 2503.21708.
        Differs from the source in: beta is learned through 1/sqrt(beta), the slope of `DyT`, so that it stays
        positive; the paper trains no network and names no start.
    """

    def __init__(
        self,
        num_features: int,
        *,
        beta: float | None = None,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.beta = float(num_features) if beta is None else above_zero("beta", beta)
        self.slope = nn.Parameter(torch.tensor(self.beta**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        y = isru(self.slope * widen(x)) * math.sqrt(self.num_features)
        return self.scale_and_shift(y).to(x.dtype)
