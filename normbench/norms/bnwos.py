"""Batch norm without synchronization: every device's share of the batch is normalized by itself."""

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, require_spread
from normbench.values import int_from, positive_int


class BNWoS(PlainBatchNorm):
    """Batch norm as data-parallel training runs it, in one process: each chunk has its own statistics.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over each chunk of the batch and all spatial axes in training; evaluation never
    splits and uses the running moments.

    Args:
        num_features: channels C.
        num_devices: chunks that the batch is split into, in order, sizes differing by at most one.
        stats_device: the chunk whose statistics are tracked, counted from 0.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; in training a batch below num_devices, or a chunk
        with one value per channel.
    Source: enhuiz's batch-norm study (GitHub), BNWoS: num_devices=2, stats_device=0, eps=0.
        Differs from the source in: the default eps; a batch that does not divide is split all the same.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_devices: int = 2,
        stats_device: int = 0,
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
        self.num_devices = positive_int("num_devices", num_devices)
        self.stats_device = int_from("stats_device", stats_device, 0)
        if stats_device >= num_devices:
            raise ValueError(f"stats_device must be below num_devices={num_devices}, got {stats_device}")

    def by_batch(self, x: Tensor) -> Tensor:
        if x.shape[0] < self.num_devices:
            raise ValueError(f"num_devices={self.num_devices} needs as many samples, got {tuple(x.shape)}")
        chunks = x.tensor_split(self.num_devices)
        counts = [require_spread(chunk, x) for chunk in chunks]
        moments = [self.batch_stats(chunk) for chunk in chunks]
        self.track(*moments[self.stats_device], counts[self.stats_device])
        return torch.cat([self.normalize(chunk, *m) for chunk, m in zip(chunks, moments, strict=True)])
