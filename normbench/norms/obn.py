"""torch's own fused batch norm: the baseline, under two names (`obn`, `torch_bn`) an A/A control."""

import torch
import torch.nn.functional as F
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, require_spread


class FusedBatchNorm(PlainBatchNorm):
    """Batch norm by torch's single fused operator, the layer that a new idea has to beat.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the batch and all spatial axes in training, the running ones in evaluation.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        track_running_stats: False keeps no running statistics and uses the batch's in evaluation too.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured.
    Source: Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167; `torch.nn.functional.batch_norm`.
        Differs from the source in: one class for all ranks, where torch has 1d, 2d and 3d.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            train_weight=train_weight,
            train_bias=train_bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if self.track_running_stats and not self.training:
            return self.fused(x, self.running_mean, self.running_var, training=False)
        require_spread(x, x)
        if not self.track_running_stats:
            return self.fused(x, None, None, training=True)
        if self.momentum is not None:
            self.num_batches_tracked.add_(1)
            return self.fused(x, self.running_mean, self.running_var, training=True, momentum=self.momentum)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = self.fused(x, mean, var, training=True, momentum=1.0)  # the average's weight stays a tensor
        self.blend(mean=mean, var=var)
        return y

    def fused(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, *, training: bool, momentum: float = 0.0
    ) -> Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, training, momentum, self.eps)
