"""Ghost batch norm: a large batch normalized as if it were several small ones."""

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, require_spread
from normbench.values import positive_int


class GhostBatchNorm(PlainBatchNorm):
    """Batch norm over consecutive parts of the batch, to keep the noise of small batches in large ones.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over each ghost batch and all spatial axes in training; evaluation uses the running
    moments. A batch of N samples is split into max(1, N // ghost_batch_size) parts whose sizes differ by at
    most one, so no part is smaller than asked for where the batch allows it.

    Args:
        num_features: channels C.
        ghost_batch_size: samples in a part, ≥ 1.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; in training a part with one value per channel.
    Source: Hoffer, Hubara and Soudry, Train longer, generalize better, arXiv 1705.08741.
        Differs from the source in: the parts' moments are averaged and enter the running ones once a batch,
        where the source enters them one after the other, which makes momentum depend on the batch size.
    """

    def __init__(
        self,
        num_features: int,
        *,
        ghost_batch_size: int = 16,
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
        self.ghost_batch_size = positive_int("ghost_batch_size", ghost_batch_size)

    def by_batch(self, x: Tensor) -> Tensor:
        parts = x.tensor_split(max(1, x.shape[0] // self.ghost_batch_size))
        counts = [require_spread(part, x) for part in parts]
        moments = [self.batch_stats(part) for part in parts]
        mean = torch.stack([m for m, _ in moments]).mean(0)
        unbiased = [var * (n / (n - 1)) for (_, var), n in zip(moments, counts, strict=True)]
        with torch.no_grad():
            self.blend(mean=mean, var=torch.stack(unbiased).mean(0))
        return torch.cat([self.normalize(part, *m) for part, m in zip(parts, moments, strict=True)])
