"""Batch norm on running statistics in training too: renormalization's forward without its gradient."""

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, kept, require_spread
from normbench.values import one_of


class BNRS(PlainBatchNorm):
    """Normalizes with running statistics while training, to show what batch gradients are needed for.

        y = (x - running_mean) / sqrt(running_var + eps) * weight + bias

    running moments over the batches so far; no gradient flows through them.

    Args:
        num_features: channels C.
        stats_timing: pre uses the running statistics before this batch enters them, post after.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: enhuiz's batch-norm study (GitHub), BNRS: stats_timing=post, eps=0.
        Differs from the source in: the default timing pre and the default eps.
    """

    def __init__(
        self,
        num_features: int,
        *,
        stats_timing: str = "pre",
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
        self.stats_timing = one_of("stats_timing", stats_timing, ("pre", "post"))

    def by_batch(self, x: Tensor) -> Tensor:
        count = require_spread(x, x)
        with torch.no_grad():
            mean, var = self.batch_stats(x)
        if self.stats_timing == "post":
            self.track(mean, var, count)
        y = self.normalize(x, kept(self.running_mean), kept(self.running_var))
        if self.stats_timing == "pre":
            self.track(mean, var, count)
        return y
