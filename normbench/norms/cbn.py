"""Cross-iteration batch norm: the batches before count too, carried over to today's weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from normbench.norms.base import PlainBatchNorm, kept, per_channel, require_spread, widen
from normbench.values import int_from, positive_int

Feeding = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class CrossIterationBatchNorm(PlainBatchNorm):
    """Batch norm over the last few batches, so that a small batch is normalized as if it were a large one.

        y = (x - mean) / sqrt(square - mean² + eps) * weight + bias
        mean = avg mean_b,    square = avg square_b
        mean_b = m_b + ∂m_b/∂w · (w - w_b),    square_b = q_b + ∂q_b/∂w · (w - w_b)

    avg over this batch and up to window - 1 before it, all weighted alike. m_b and q_b are batch b's mean and
    mean square over its samples and all spatial axes, measured when the weight of the convolution or linear
    layer before the norm was w_b; today it is w. That first-order step is exact for the mean. Where
    square_b < mean_b², batch b is left out, channel by channel. Gradients flow through this batch alone.
    Evaluation uses the running moments, which average the single batches' own.

    Args:
        num_features: channels C.
        fed_by: the convolution or linear layer whose output the norm gets as it is, which `place_norms`
            finds; None where there is none, and earlier moments then count as they were measured.
        window: batches that count, this one included; 1 is batch norm.
        burn_in: steps of plain batch norm at the start; their batches are remembered.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked (); past_mean, past_var
        (window−1, C), without the feeding layer's bias, batch b in row b mod (window−1); where the norm is
        fed, past_weight, slope_mean, slope_var (window−1, *its weight's shape).
    Raises: ValueError — another channel count or rank; one value per channel in training; fed by something
        else than a convolution or linear layer with C outputs.
    Source: Yao, Cao, Zheng, Huang and Lin, Cross-Iteration Batch Normalization, arXiv 2002.05712, and their
        code (GitHub, Howal/Cross-iterationBatchNorm: window=4, burn_in=8 for detection).
        Differs from the source in: the paper raises a square_b below mean_b² to it, their code, as here,
        leaves the batch out; their code divides by sd + eps and remembers no batch of the burn-in. The
        feeding layer's bias is carried over too; of a parametrized weight, the weight that acts.
    """

    past_mean: Tensor
    past_var: Tensor
    past_weight: Tensor
    slope_mean: Tensor
    slope_var: Tensor
    fed_by: Feeding | None

    def __init__(
        self,
        num_features: int,
        fed_by: nn.Module | None = None,
        *,
        window: int = 4,
        burn_in: int = 0,
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
        self.window = positive_int("window", window)
        self.burn_in = int_from("burn_in", burn_in, 0)
        self.received: Tensor | None = None  # the feeding layer's input, from its call to this layer's
        object.__setattr__(self, "fed_by", fed_by)  # no submodule: the model holds it already
        for name in ("past_mean", "past_var"):
            self.register_buffer(name, torch.zeros(self.window - 1, num_features))
        if fed_by is not None:
            if not isinstance(fed_by, Feeding) or len(fed_by.weight) != num_features:
                wanted = f"a convolution or linear layer with num_features={num_features} outputs"
                raise ValueError(f"fed_by must be {wanted}, got {fed_by!r}")
            for name in ("past_weight", "slope_mean", "slope_var"):
                self.register_buffer(name, torch.zeros(self.window - 1, *fed_by.weight.shape))
            fed_by.register_forward_pre_hook(self.receive)

    def receive(self, feeding: nn.Module, args: tuple[Any, ...]) -> None:
        if self.training and self.window > 1:
            self.received = args[0].detach()

    def by_batch(self, x: Tensor) -> Tensor:
        count = require_spread(x, x)
        mean, var = self.batch_stats(x)
        past_mean, past_var, counts = self.recall()
        self.remember(x.detach(), mean.detach(), var.detach())
        self.track(mean, var, count)
        batches = 1 + counts.sum(0)
        middle = (mean + past_mean.sum(0)) / batches
        # var + (mean - middle)² on average: the same as the mean square less middle², without its rounding
        spread = var + (mean - middle).square() + (past_var + counts * (past_mean - middle).square()).sum(0)
        return self.normalize(x, middle, spread / batches)

    @torch.no_grad()
    def recall(self) -> tuple[Tensor, Tensor, Tensor]:
        """Earlier batches' mean and variance under today's weights, and 1 where they count; (window−1, C)."""
        mean, var = widen(self.past_mean), widen(self.past_var)
        if self.fed_by is not None:
            change = widen(self.fed_by.weight) - widen(self.past_weight)  # (window−1, C, …)
            step = (widen(self.slope_mean) * change).flatten(2).sum(2)
            # q + ∂q·Δ - (m + ∂m·Δ)², since ∂var = ∂q - 2m ∂m
            var = var + (widen(self.slope_var) * change).flatten(2).sum(2) - step.square()
            mean = mean + step + self.offset()
        seen = self.num_batches_tracked
        filled = torch.arange(self.window - 1, device=seen.device) < seen
        counts = (filled & (seen >= self.burn_in)).unsqueeze(1) & (var >= 0)
        zeros = torch.zeros_like(mean)  # not a product: what is left out may be infinite
        return (
            kept(torch.where(counts, mean, zeros)),
            kept(torch.where(counts, var, zeros)),
            kept(counts.to(mean.dtype)),
        )

    @torch.no_grad()
    def remember(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """Write this batch over the oldest."""
        if self.window == 1:
            return
        row = (self.num_batches_tracked % (self.window - 1)).view(1)

        def write(past: Tensor, new: Tensor) -> None:
            past.index_copy_(0, row, new.to(past.dtype).unsqueeze(0))

        write(self.past_mean, mean - self.offset())
        write(self.past_var, var)
        if self.fed_by is not None:
            by_mean, by_var = self.slopes(x, mean, self.fed_by)
            write(self.slope_mean, by_mean)
            write(self.slope_var, by_var)
            write(self.past_weight, self.fed_by.weight)

    def offset(self) -> Tensor | float:
        """What the feeding layer adds to every mean, (C,)."""
        bias = None if self.fed_by is None else self.fed_by.bias
        return 0.0 if bias is None else widen(bias)

    def slopes(self, x: Tensor, mean: Tensor, layer: Feeding) -> tuple[Tensor, Tensor]:
        """∂mean_c/∂w_c and ∂var_c/∂w_c for every channel c, each shaped as the feeding layer's weight."""
        received, self.received = self.received, None
        if received is None:  # x came from elsewhere: its moments stay as they are
            return torch.zeros_like(self.slope_mean[0]), torch.zeros_like(self.slope_var[0])
        n = x.numel() // x.shape[1]
        values = widen(received).to(x.dtype)
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        # the mean's slope is the same for all channels of a group
        evenly = x.new_full((x.shape[0], groups, *x.shape[2:]), 1 / n)
        by_mean = weight_gradient(layer, values, evenly).repeat_interleave(x.shape[1] // groups, 0)
        return by_mean, weight_gradient(layer, values, (x - per_channel(mean, x)) * (2 / n))


def weight_gradient(layer: Feeding, x: Tensor, upstream: Tensor) -> Tensor:
    """Σ upstream · ∂output/∂weight of a layer that got `x`, (K, in / groups, *) for K channels upstream.

    The running graph could tell it too, but under torch.compile its backward runs only once, and in mixed
    precision it would round.
    """
    if isinstance(layer, nn.Linear):  # a convolution of one position
        return conv_weight_gradient(x.unsqueeze(2), (1,), upstream.unsqueeze(2)).squeeze(2)
    padding: int | tuple[int, ...] = 0
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        padding = layer.padding
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    return conv_weight_gradient(
        x, layer.kernel_size, upstream, layer.stride, padding, layer.dilation, layer.groups
    )


def conv_weight_gradient(
    x: Tensor,
    kernel_size: tuple[int, ...],
    upstream: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    function: Callable[..., Tensor] = (conv1d_weight, conv2d_weight, conv3d_weight)[x.ndim - 3]
    shape = (upstream.shape[1], x.shape[1] // groups, *kernel_size)
    return function(x, shape, upstream, stride, padding, dilation, groups)
