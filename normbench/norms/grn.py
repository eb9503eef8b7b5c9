"""Global response norm: channels compete for the whole map."""

import torch
from torch import Tensor, nn

from normbench.norms.base import Norm, widen
from normbench.values import number_from


class GlobalResponseNorm(Norm):
    """Scales each channel by its share of the sample's energy, so that channels do not all say the same.

        y = x + (x · n) * weight + bias,    n = g / (mean(g) + eps)

    g the root of the sum of x² over all spatial axes, per sample and channel; its mean over the channels.
    Training and evaluation are alike.

    Args:
        num_features: channels C.
        eps: added to the mean, ≥ 0.
        affine: learn weight and bias, which both start at zero, so that y = x; False leaves both None and is
            a weight of one and a bias of zero.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes; on (N, C) g is |x|.
    State: none.
    Raises: ValueError — another channel count or rank.
    Source: Woo et al., ConvNeXt V2, arXiv 2301.00808.
        Differs from the source in: nothing.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.eps = number_from("eps", eps, 0)
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        size = wide.abs()
        if x.ndim > 2:
            size = torch.linalg.vector_norm(wide, dim=list(range(2, x.ndim)), keepdim=True)
        share = size / (size.mean(1, keepdim=True) + self.eps)
        return (wide + self.scale_and_shift(wide * share)).to(x.dtype)
