"""Dynamic tanh: a learned squashing in place of statistics."""

import torch
from torch import Tensor, nn

from normbench.norms.base import Norm, widen
from normbench.values import number_from


class DyT(Norm):
    """Squashes activations by tanh with one learned slope; it measures nothing at all.

        y = tanh(alpha · x) * weight + bias

    element by element, in training and evaluation alike.

    Args:
        num_features: channels C.
        alpha: the slope's start; one number for the layer, always trained.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none; the parameter slope () beside weight and bias.
    Raises: ValueError — another channel count or rank.
    Source: Zhu, Chen, He, LeCun and Liu, Transformers without Normalization, arXiv 2503.10622.
        Differs from the source in: nothing.
    """

    def __init__(
        self,
        num_features: int,
        *,
        alpha: float = 0.5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.alpha = number_from("alpha", alpha, 0)
        self.slope = nn.Parameter(torch.tensor(self.alpha))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        return self.scale_and_shift(torch.tanh(self.slope * wide)).to(x.dtype)
