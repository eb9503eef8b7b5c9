"""Filter response norm with its thresholded activation."""

import torch
from torch import Tensor, nn

from normbench.norms.base import Norm, per_channel, widen
from normbench.values import flag, number_from


class FilterResponseNorm(Norm):
    """Divides each channel of each sample by its root mean square, and cuts below at a learned threshold.

        y = max(x / sqrt(mean(x²) + eps) * weight + bias, tau)

    the mean over all spatial axes, per sample and channel, in training and evaluation alike. The threshold
    is the activation: use model.activation=none. Directly before a ReLU, which is flat where it cuts, tau
    never leaves its start, zero.

    Args:
        num_features: channels C.
        tlu: cut at the threshold; False leaves tau None, and the activation to the model.
        eps: added to the mean square, ≥ 0.
        learned_eps: start of a learned number whose absolute value is added to eps, ≥ 0; null adds none. The
            paper starts it at 1e-4 where maps are 1×1, whose response is little else than a sign.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes; on (N, C) each value is divided by its own size.
    State: none; the parameters tau (C,), zeros, and more_eps () beside weight and bias.
    Raises: ValueError — another channel count or rank.
    Source: Singh and Krishnan, Filter Response Normalization Layer, arXiv 1911.09737.
        Differs from the source in: nothing.
    """

    def __init__(
        self,
        num_features: int,
        *,
        tlu: bool = True,
        eps: float = 1e-6,
        learned_eps: float | None = None,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.tlu = flag("tlu", tlu)
        self.eps = number_from("eps", eps, 0)
        self.learned_eps = None if learned_eps is None else number_from("learned_eps", learned_eps, 0)
        self.tau = nn.Parameter(torch.zeros(num_features)) if tlu else None
        self.more_eps = None if learned_eps is None else nn.Parameter(torch.tensor(self.learned_eps))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        power = wide.square()
        if x.ndim > 2:
            power = power.mean(list(range(2, x.ndim)), keepdim=True)
        eps = self.eps if self.more_eps is None else self.eps + widen(self.more_eps).abs()
        y = self.scale_and_shift(wide * (power + eps).rsqrt())
        return (y if self.tau is None else torch.maximum(y, per_channel(self.tau, y))).to(x.dtype)
