"""Batch renormalization, with clips (`brnc`) and without (`brn`)."""

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, kept, per_channel, require_spread
from normbench.values import int_from, number_from, one_of


class BatchRenorm(PlainBatchNorm):
    """Batch norm corrected towards the running statistics, so that training and evaluation agree.

        y = ((x - mean) / s * r + d) * weight + bias,    s = sqrt(var + eps), S = sqrt(running_var + eps)
        r = s / S within [1/r_max, r_max],   d = (mean - running_mean) / S within [-d_max, d_max]

    mean and var (÷n) over the batch and all spatial axes; r and d carry no gradient. Evaluation uses the
    running moments. Step t counts from 0: the batches tracked before this one.

    Args:
        num_features: channels C.
        r_max: largest r, ≥ 1; None does not clip.
        d_max: largest |d|, ≥ 0; None does not clip.
        warmup_steps: steps of plain batch norm (r = 1, d = 0) at the start.
        r_max_step: step at which the clip of r, growing linearly from 1 since warmup_steps, reaches r_max;
            0 puts r_max in force as soon as warm-up ends.
        d_max_step: the same for d, from 0 to d_max.
        stats_timing: pre takes r and d from the running statistics before this batch, post after.
        eps: added to the variances, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training; a ramp without
        its clip, or one that ends before warm-up does.
    Source: Ioffe, Batch Renormalization, arXiv 1702.03275; enhuiz's batch-norm study (GitHub), BRN and
        BRNC: stats_timing=post, eps=0, and for BRNC r_max=3, d_max=5 from the first step.
        Differs from the source in: the paper averages standard deviations, here variances; clips and
        warm-up are off unless asked for.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | None = None,
        d_max: float | None = None,
        warmup_steps: int = 0,
        r_max_step: int = 0,
        d_max_step: int = 0,
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
        self.r_max = None if r_max is None else number_from("r_max", r_max, 1)
        self.d_max = None if d_max is None else number_from("d_max", d_max, 0)
        self.warmup_steps = int_from("warmup_steps", warmup_steps, 0)
        self.r_max_step = self._ramp_end("r_max", r_max, r_max_step)
        self.d_max_step = self._ramp_end("d_max", d_max, d_max_step)
        self.stats_timing = one_of("stats_timing", stats_timing, ("pre", "post"))

    def _ramp_end(self, clip: str, limit: float | None, step: int) -> int:
        if int_from(f"{clip}_step", step, 0) and limit is None:
            raise ValueError(f"{clip}_step={step} is a ramp to {clip}, which is null; set {clip}")
        if 0 < step <= self.warmup_steps:
            raise ValueError(f"{clip}_step must be 0 or > warmup_steps={self.warmup_steps}, got {step}")
        return step

    def opened(self, end: int) -> Tensor:
        """How far the clips are open at this step: 0 in warm-up, 1 from step `end` on."""
        step = self.num_batches_tracked
        if end == 0:
            return (step >= self.warmup_steps).to(self.running_mean.dtype)
        return ((step - self.warmup_steps) / (end - self.warmup_steps)).clamp(0, 1)

    def by_batch(self, x: Tensor) -> Tensor:
        count = require_spread(x, x)
        mean, var = self.batch_stats(x)
        r_open, d_open = self.opened(self.r_max_step), self.opened(self.d_max_step)
        if self.stats_timing == "post":
            self.track(mean, var, count)
        r, d = self.correction(mean, var, r_open, d_open)
        if self.stats_timing == "pre":
            self.track(mean, var, count)
        return self.normalize(x, mean, var) * per_channel(r, x) + per_channel(d, x)

    @torch.no_grad()
    def correction(self, mean: Tensor, var: Tensor, r_open: Tensor, d_open: Tensor) -> tuple[Tensor, Tensor]:
        running_std = (self.running_var + self.eps).sqrt()
        r = (var + self.eps).sqrt() / running_std
        d = (mean - self.running_mean) / running_std
        if self.r_max is None:
            r = torch.where(r_open > 0, r, torch.ones_like(r))
        else:
            limit = (1 + r_open * (self.r_max - 1)).to(r.dtype)
            r = r.clamp(limit.reciprocal(), limit)
        if self.d_max is None:
            d = torch.where(d_open > 0, d, torch.zeros_like(d))
        else:
            limit = (d_open * self.d_max).to(d.dtype)
            d = d.clamp(-limit, limit)
        return kept(r), kept(d)
