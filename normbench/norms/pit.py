"""Probability integral transform: every channel's values become uniform, or Gaussian, by their rank."""

import math

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, require_spread
from normbench.norms.rows import from_rows, to_rows
from normbench.values import int_from, one_of


class ProbabilityIntegralTransform(PlainBatchNorm):
    """Maps each channel through its own distribution function, so that all channels are distributed alike.

        y = √12 (F(x) - ½) * weight + bias                    uniform, on [-√3, √3]
        y = Φ⁻¹(a + (1 - 2a) F(x)) * weight + bias            gaussian
        F(x) = (F₀(x - h) + F₀(x + h)) / 2,   h = max(eps · (q_{K-1} - q_0), 8u · max |q_k|)
        F₀ linear between F₀(q_k) = p_k, 0 below q_0, 1 above q_{K-1};   p_k = sin²(½π k / (K - 1)), a = p_½

    q_k is the channel's quantile at level p_k, k = 0 … K−1, over the batch and all spatial axes in training,
    linear between order statistics; evaluation uses the running quantiles. The levels are closer together at
    both ends, where a line fits a tail badly; a keeps Φ⁻¹ off 0 and 1 by half a step. Values tied within h
    get the middle of the levels that they span, a constant channel ½; u is the precision of the values, in
    evaluation that of the running quantiles. No step counts as narrower than h: F is no steeper than 1 / h.

    The gradient is the whole one, through x and through the quantiles, which are order statistics. It tells
    how a value moves among its neighbours between two quantiles; with fewer values per channel than quantiles
    the output is little more than a rank, which no small step changes, and the gradient is near zero.

    Args:
        num_features: channels C.
        target: uniform or gaussian, both with mean 0 and, in large batches, variance near 1.
        num_quantiles: K, ≥ 3.
        eps: share of the channel's range within which values count as tied, ≥ 0.
        momentum: weight of the new batch in the running quantiles, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_quantiles (C, K), at the start Φ⁻¹(a + (1 - 2a) p_k), those of N(0, 1) kept finite;
        num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: the transform of statistics; as a layer Ness, CDF Normalization for Controlling the Distribution
        of Hidden Nodes, PMLR 163, 2022.
        Differs from the source in: only the idea is theirs; this distribution function, its gradient and its
        running quantiles are made here.
    """

    running_quantiles: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        target: str = "uniform",
        num_quantiles: int = 32,
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
        self.target = one_of("target", target, ("uniform", "gaussian"))
        self.num_quantiles = int_from("num_quantiles", num_quantiles, 3)
        self.inset = math.sin(math.pi / 4 / (num_quantiles - 1)) ** 2  # a
        del self.running_mean, self.running_var
        normal = torch.special.ndtri(self.inset + (1 - 2 * self.inset) * self.levels())
        self.register_buffer("running_quantiles", normal.float().expand(num_features, -1).clone())

    def levels(self, device: torch.device | None = None) -> Tensor:
        """p_k, in float64 for the places in a large batch."""
        steps = torch.arange(self.num_quantiles, dtype=torch.float64, device=device)
        return (steps * (math.pi / 2 / (self.num_quantiles - 1))).sin().square()

    def quantiles(self, rows: Tensor) -> Tensor:
        """(C, n) → (C, K), in float64 as all that follows: a narrow step is steep."""
        ordered, last = rows.sort(dim=1).values, rows.shape[1] - 1
        places = self.levels(rows.device) * last
        below = places.floor().clamp(max=last - 1).long()
        lower, upper = ordered[:, below].double(), ordered[:, below + 1].double()
        return torch.lerp(lower, upper, places - below)  # of a tie the tie

    def transform(self, rows: Tensor, quantiles: Tensor, precision: float) -> Tensor:
        rounding = 8 * precision * quantiles.detach().abs().amax(1, keepdim=True)
        h = torch.maximum(self.eps * (quantiles[:, -1:] - quantiles[:, :1]), rounding)
        levels = self.levels(rows.device) - 0.5
        below = polygon(rows - h, quantiles, levels, h, right=False)
        above = polygon(rows + h, quantiles, levels, h, right=True)
        centred = ((below + above) / 2).to(rows.dtype)
        if self.target == "uniform":
            return math.sqrt(12) * centred
        return math.sqrt(2) * torch.erfinv((2 - 4 * self.inset) * centred)

    def by_batch(self, x: Tensor) -> Tensor:
        require_spread(x, x)
        rows = to_rows(x)
        quantiles = self.quantiles(rows)
        with torch.no_grad():
            self.blend(quantiles=quantiles)
        return from_rows(self.transform(rows, quantiles, torch.finfo(x.dtype).eps), x)

    def by_running(self, x: Tensor) -> Tensor:
        stored = self.running_quantiles
        return from_rows(self.transform(to_rows(x), stored.double(), torch.finfo(stored.dtype).eps), x)


def polygon(x: Tensor, quantiles: Tensor, levels: Tensor, narrowest: Tensor, right: bool) -> Tensor:
    """The levels of (C, n) values between (C, K) quantiles; at a jump that of its left or its right end."""
    low, high = quantiles[:, :-1], quantiles[:, 1:]
    rises = high > low  # a search ends beside a tie, and within one only at either end of all quantiles
    least = torch.finfo(x.dtype).tiny ** 0.5  # whose square, which the gradient divides by, is above zero
    width = torch.where(rises, torch.maximum(high - low, narrowest).clamp(min=least), 1)
    slope = torch.where(rises, levels.diff() / width, 0)
    middle = torch.where(rises, (levels[:-1] + levels[1:]) / 2, levels[1:] if right else levels[:-1])

    step = torch.searchsorted(quantiles.detach().contiguous(), x.detach().contiguous(), right=right) - 1
    step = step.clamp(0, len(levels) - 2)
    at = (low + high) / 2
    level = middle.gather(1, step) + slope.gather(1, step) * (x - at.gather(1, step))
    return torch.clamp(level, levels[step], levels[step + 1])
