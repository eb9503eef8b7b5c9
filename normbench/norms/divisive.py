"""Divisive normalization: each position is normalized by what lies around it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.norms.base import Norm, widen
from normbench.values import above_zero, flag, positive_int


def local_mean(x: Tensor, window: int) -> Tensor:
    """(N, C, *) → (N, 1, *): the mean over all channels and those positions of a window that the map has."""
    mean = x.mean(1, keepdim=True)
    for axis in range(2, x.ndim):  # a window is a product of its sides, and so is its mean
        line = mean.transpose(axis, -1)
        flat = line.reshape(-1, 1, line.shape[-1])
        pooled = F.avg_pool1d(flat, window, stride=1, padding=window // 2, count_include_pad=False)
        mean = pooled.view(line.shape).transpose(axis, -1)
    return mean


class DivisiveNorm(Norm):
    """Normalizes every position by the mean and the energy around it, as neurons in the cortex seem to.

        y = v / sqrt(energy + smoother²) * weight + bias,    v = x - mean

    mean over all channels of a window around the position (its summation field); energy the mean of v² over
    all channels of another (its suppression field). At an edge both hold the part that lies on the map.

    Args:
        num_features: channels C.
        summation_window: odd side of the summation field, ≥ 1; 1 is the position alone.
        suppression_window: odd side of the suppression field, ≥ 1.
        sigma: the smoother's start, > 0; one number for the layer.
        train_sigma: False keeps the smoother at sigma.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes; on (N, C) both fields are all channels.
    State: none; the parameter smoother () beside weight and bias.
    Raises: ValueError — another channel count or rank; an even window.
    Source: Ren, Liao, Urtasun, Sinz and Zemel, Normalizing the Normalizers, arXiv 1611.04520; renmengye,
        div-norm (GitHub): on CIFAR-10 ResNet-32 learned sigma from 0.5, the smaller network kept it there
        (train_sigma=false), and neither had an affine (affine=false).
        Differs from the source in: at an edge the authors' code averages zeros in; on (N, C) it takes windows
        of neighbouring units; the sparse regularizer on v (DN*) belongs to a loss; a field of one value
        passes through.
    """

    def __init__(
        self,
        num_features: int,
        *,
        summation_window: int = 5,
        suppression_window: int = 5,
        sigma: float = 0.5,
        train_sigma: bool = True,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.summation_window = _odd("summation_window", summation_window)
        self.suppression_window = _odd("suppression_window", suppression_window)
        self.sigma = above_zero("sigma", sigma)
        self.train_sigma = flag("train_sigma", train_sigma)
        self.smoother = nn.Parameter(torch.tensor(self.sigma), requires_grad=train_sigma)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.scale_and_shift(self.normalize(widen(x))).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        alone = self.summation_window == 1 or all(size == 1 for size in x.shape[2:])
        if self.num_features == 1 and alone:
            return x  # centring would erase the signal
        centred = x - local_mean(x, self.summation_window)
        energy = local_mean(centred.square(), self.suppression_window)
        return centred * (energy + widen(self.smoother).square()).rsqrt()


def _odd(key: str, value: int) -> int:
    if positive_int(key, value) % 2 == 0:
        raise ValueError(f"{key} must be odd, to have a middle, got {value}; use {value - 1} or {value + 1}")
    return value
