"""Memorized batch norm: evaluation by the moments of the last batches, all alike."""

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm
from normbench.values import positive_int


class MemorizedBatchNorm(PlainBatchNorm):
    """Batch norm that evaluates by the last batches pooled, all alike, and by nothing older.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the batch and all spatial axes in training; evaluation uses those of the last
    `window` batches taken together: the average of their means m, and the average of var + m² less the square
    of that mean, which is the ÷n variance of all their values where the batches are equally large. Of fewer
    batches so far it uses those; of none, mean 0 and var 1.

    Args:
        num_features: channels C.
        window: batches that evaluation looks back on, ≥ 1.
        eps: added to the variance, ≥ 0.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: memory_mean and memory_var (window, C) ÷n, batch t in row t mod window; what they pool to,
        running_mean (C,) and running_var (C,); num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: Guo et al., Double Forward Propagation for Memorized Batch Normalization, arXiv 2010.04947 (AAAI
        2018); Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv 2105.07576 (precise batch norm).
        Differs from the source in: Guo et al. train by the memorized statistics as well and forward every
        batch twice, here training is batch norm and only evaluation remembers; precise batch norm measures
        the batches anew with the final weights, here their moments are those of the weights they met.
    """

    memory_mean: Tensor
    memory_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            affine=affine,
            stored_var="biased",
            train_weight=train_weight,
            train_bias=train_bias,
        )
        self.window = positive_int("window", window)
        self.register_buffer("memory_mean", torch.zeros(window, num_features))
        self.register_buffer("memory_var", torch.zeros(window, num_features))

    def blend(self, **measured: Tensor) -> None:
        mean, var = measured["mean"], measured["var"]
        row = (self.num_batches_tracked % self.window).view(1)
        self.memory_mean.index_copy_(0, row, mean.to(self.memory_mean.dtype)[None])
        self.memory_var.index_copy_(0, row, var.to(self.memory_var.dtype)[None])
        self.num_batches_tracked.add_(1)
        known = self.num_batches_tracked.clamp(max=self.window)
        rows = torch.arange(self.window, device=known.device) < known
        share = (rows.to(self.running_mean.dtype) / known)[:, None]  # (window, 1)
        self.running_mean.copy_((share * self.memory_mean).sum(0))
        # E[var + m²] - E[m]² is E[var + (m - E[m])²], which does not cancel where means are large
        spread = self.memory_var + (self.memory_mean - self.running_mean).square()
        self.running_var.copy_((share * spread).sum(0))
