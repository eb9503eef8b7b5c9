"""EvoNorms: norm and activation in one formula, found by evolution; S0 by sample, B0 by batch."""

import torch
from torch import Tensor, nn

from normbench.norms.base import Norm, PlainBatchNorm, per_channel, widen
from normbench.norms.group import group_mean, largest_divisor
from normbench.values import number_from, positive_int


def group_std(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """(N, C, *) → (N, C, 1, …): sqrt(var + eps) over each sample's groups of channels."""
    centred = x - group_mean(x, num_groups)
    return (group_mean(centred.square(), num_groups) + eps).sqrt()


class EvoNormS0(Norm):
    """A swish over the standard deviation of a group of channels: norm and activation in one.

        y = x · sigmoid(v1 · x) / sqrt(var + eps) * weight + bias

    var (÷n) over the channels of a group and all spatial axes, per sample, in training and evaluation alike.
    It is an activation too: use model.activation=none.

    Args:
        num_features: channels C.
        num_groups: the most groups; there are as many as the largest divisor of C up to it.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none; the parameter v1 (C,), ones, beside weight and bias.
    Raises: ValueError — another channel count or rank.
    Source: Liu, Brock, Simonyan and Le, Evolving Normalization-Activation Layers, arXiv 2004.02967, and the
        authors' listing (32 groups, eps 1e-5).
        Differs from the source in: a group of one value is not divided, it has no spread; num_groups need
        not divide C.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.eps = number_from("eps", eps, 0)
        self.num_groups = largest_divisor(num_features, positive_int("num_groups", num_groups))
        self.v1 = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        y = wide * torch.sigmoid(wide * per_channel(self.v1, wide))
        if x.numel() != x.shape[0] * self.num_groups:
            y = y / group_std(wide, self.num_groups, self.eps)
        return self.scale_and_shift(y).to(x.dtype)


class EvoNormB0(PlainBatchNorm):
    """Divides by the batch's standard deviation or by the sample's and the value itself, if that is more.

        y = x / max(sqrt(var + eps), v1 · x + sqrt(own + eps)) * weight + bias

    var (÷n) over the batch and all spatial axes in training, the running one in evaluation; own (÷n) over the
    spatial axes, per sample and channel. It is an activation too: use model.activation=none.

    Args:
        num_features: channels C.
        eps: added to both variances, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes; on (N, C) own is zero.
    State: running_mean (C,), which is kept and not used, running_var (C,) ÷(n−1), num_batches_tracked (); the
        parameter v1 (C,), ones, beside weight and bias.
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured.
    Source: Liu, Brock, Simonyan and Le, Evolving Normalization-Activation Layers, arXiv 2004.02967, and the
        authors' listing (eps 1e-5).
        Differs from the source in: running_var averages the unbiased variance, the listing's the biased one.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            train_weight=train_weight,
            train_bias=train_bias,
        )
        self.v1 = nn.Parameter(torch.ones(num_features))

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        of_batch = per_channel((var + self.eps).sqrt(), x)
        of_sample = x * per_channel(self.v1, x) + group_std(x, self.num_features, self.eps)
        return x / torch.maximum(of_batch, of_sample)
