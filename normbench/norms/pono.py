"""Positional norm: layer norm of every position by itself, over the channels."""

from torch import Tensor

from normbench.norms.base import Norm, widen
from normbench.values import number_from


class PositionalNorm(Norm):
    """Normalizes the channels at each position, which takes a picture's structure out of the activations.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the channels, per sample and position, in training and evaluation alike.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none.
    Raises: ValueError — another channel count or rank.
    Source: Li, Wu, Weinberger and Belongie, Positional Normalization, arXiv 1907.04312.
        Differs from the source in: mean and sd are not handed on to a later layer (the moment shortcut); one
        channel alone passes through.
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
        return self.scale_and_shift(self.normalize(widen(x))).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        if self.num_features == 1:
            return x  # no spread to divide by, and centring would erase the signal
        centred = x - x.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
