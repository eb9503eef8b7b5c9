"""Extended batch norm: a mean per channel, one standard deviation for all."""

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm


class ExtendedBatchNorm(PlainBatchNorm):
    """Batch norm whose standard deviation comes from all channels together, to be steady in small batches.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean per channel, over the batch and all spatial axes; var (÷n) one number, over channels, batch and all
    spatial axes, about the mean of them all. Evaluation uses the running ones.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), n the values of all channels: one number C times, so
        that the layer takes and gives batch norm's state; num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: Luo, Zhan, Wang and Gao, Extended Batch Normalization, arXiv 2003.05569.
        Differs from the source in: nothing known; its "standard deviation along the (N, C, H, W) dimensions"
        is read as that of all values about their one mean, so the spread between channel means counts.
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

    def batch_stats(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        mean, within = super().batch_stats(sample)
        # channels are equally large: the variance of all is that within channels and that between them
        between = (mean - mean.mean()).square()
        return mean, (within + between).mean().expand(self.num_features)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        super().track(mean, var, count * self.num_features)
