"""Moving average batch norm: statistics of several small batches, in the forward and in the backward."""

from typing import Any

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, kept, per_channel, require_spread
from normbench.values import int_from, number_from, positive_int


@torch.library.custom_op("normbench::remember", mutates_args={"memory"})
def _remember(values: Tensor, memory: Tensor, row: Tensor, pooled: Tensor) -> Tensor:
    """Write `values` (C,) into a row of `memory` (B, C), but for what is not finite.

    Answers the mean of the rows if `pooled`, else `values`.
    """
    row = row.view(1)
    memory.index_copy_(0, row, torch.where(values.isfinite(), values.to(memory.dtype), memory[row][0])[None])
    return torch.where(pooled, memory.mean(0, dtype=values.dtype), values)


@_remember.register_fake
def _(values: Tensor, memory: Tensor, row: Tensor, pooled: Tensor) -> Tensor:
    return torch.empty_like(values)


class _StandIn(torch.autograd.Function):
    """`pool` in place of `own`; the backward likewise puts the remembered gradient in place of its own.

    A gradient times `unit` is what `memory` holds.
    """

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, pool: Tensor, unit: Tensor, memory: Tensor, row: Tensor, pooled: Tensor
    ) -> Tensor:
        ctx.save_for_backward(unit, row, pooled)
        ctx.memory = memory  # not saved: the backward of another forward may write to it first
        return pool.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, row, pooled = ctx.saved_tensors
        return _remember(grad * unit, ctx.memory, row, pooled) / unit, None, None, None, None, None


class MABN(PlainBatchNorm):
    """Batch norm for small batches: its statistics, of activations and of gradients, average several batches.

        y = x / s * r * weight + bias,   s = sqrt(a + eps),   r = s / sqrt(running_var + eps)
        dx = (g - x / s * b) / s,   g = dy * weight * r

    a is the average of the last buffer_size batches' mean(x²) and b of their mean(g · x / s), means over the
    batch and all spatial axes. r, within [1/r_max, r_max], is a constant to the gradient and comes from the
    running average before this batch. Nothing is centred. For the first max(buffer_size, warmup_steps)
    batches a and b are the batch's own and r = 1, which makes dx the true gradient. A loss scale is part of
    g: after it changed, b averages both scales for buffer_size batches. Evaluation divides by
    sqrt(running_var + eps).

    Args:
        num_features: channels C.
        buffer_size: batches B that a and b average.
        warmup_steps: batches at the start with their own statistics, at least buffer_size.
        r_warmup_steps: batches at the start with r = 1, at least those of the warm-up.
        r_max: largest r, ≥ 1; None does not clip.
        eps: added to the mean squares, ≥ 0.
        momentum: weight of the new a in the running average, 0 to 1; None averages all alike.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), zeros, since nothing is centred, running_var (C,) of a, num_batches_tracked ();
        buffer_x2 and buffer_gz (B, C), batch t in row t mod B, the latter written in the backward.
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: Yan et al., Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization,
        arXiv 2001.06838; megvii-model, MABN (GitHub), `MABN.py`: buffer_size = simulated / real batch size.
        Differs from the source in: weight centralization, which stands in for centring, belongs to the
        convolution's weights and is not done here; a gradient that is not finite (fp16 overflow) leaves its
        row as it was; warm-up counts whole batches, the code's ends one earlier.
    """

    buffer_x2: Tensor
    buffer_gz: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        buffer_size: int = 16,
        warmup_steps: int = 100,
        r_warmup_steps: int = 1000,
        r_max: float | None = 5.0,
        eps: float = 1e-5,
        momentum: float | None = 0.02,
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
        self.buffer_size = positive_int("buffer_size", buffer_size)
        self.warmup_steps = int_from("warmup_steps", warmup_steps, 0)
        self.r_warmup_steps = int_from("r_warmup_steps", r_warmup_steps, 0)
        self.r_max = None if r_max is None else number_from("r_max", r_max, 1)
        self.register_buffer("buffer_x2", torch.zeros(buffer_size, num_features))
        self.register_buffer("buffer_gz", torch.zeros(buffer_size, num_features))

    def by_batch(self, x: Tensor) -> Tensor:
        count = require_spread(x, x)
        own = x.square().mean([axis for axis in range(x.ndim) if axis != 1])
        warm = max(self.buffer_size, self.warmup_steps)
        with torch.no_grad():
            step = self.num_batches_tracked
            row, pooled = kept(step % self.buffer_size), kept(step >= warm)
            a = _remember(own.detach(), self.buffer_x2, row, pooled)
            r = ((a + self.eps) / (self.running_var + self.eps)).sqrt()
            r = r if self.r_max is None else r.clamp(1 / self.r_max, self.r_max)
            r = kept(torch.where(step >= max(warm, self.r_warmup_steps), r, torch.ones_like(r)))
            self.blend(var=a)
            # y moves with a by -mean(g · x/s) · count / (2 s²): by what the gradient of a times this is b
            unit = (a + self.eps) * (-2 / count)
        a = _StandIn.apply(own, a, unit, self.buffer_gz, row, pooled)
        return x * per_channel((a + self.eps).rsqrt() * r, x)

    def by_running(self, x: Tensor) -> Tensor:
        return x * per_channel((self.running_var + self.eps).rsqrt(), x)
