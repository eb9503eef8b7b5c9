"""Mixtures of instance, layer and batch moments: all three by softmax, or in the end one by SparsestMax."""

import math

import torch
from torch import Tensor, nn

from normbench.norms.base import PlainBatchNorm, kept, per_channel, require_spread
from normbench.values import positive_int

Moments = tuple[Tensor, Tensor]  # mean and ÷n variance


def of_instances(x: Tensor) -> Moments:
    """Over the spatial axes of each sample and channel, (N, C, 1, …)."""
    axes = list(range(2, x.ndim))
    if not axes:
        return x, torch.zeros_like(x)
    mean = x.mean(axes, keepdim=True)
    return mean, (x - mean).square().mean(axes, keepdim=True)


def pooled(moments: Moments, axis: int) -> Moments:
    """The moments of equal parts taken together: exact, as the parts' own spread and that of their means."""
    means, variances = moments
    mean = means.mean(axis, keepdim=True)
    return mean, variances.mean(axis, keepdim=True) + (means - mean).square().mean(axis, keepdim=True)


def sparsestmax(logits: Tensor, radius: Tensor) -> Tensor:
    """The point of the simplex nearest to `logits` (K,) among those `radius` or farther from its centre.

    On the face of the k largest logits it is the face's centre plus the logits' offsets from their mean,
    stretched where that is too near; it lies on the largest face where this leaves no part negative. At
    radius 0 this is sparsemax, at sqrt((K − 1) / K) one part holds all. Of equal logits the first counts as
    larger.
    """
    parts = len(logits)
    values, order = (logits - logits.max()).sort(descending=True, stable=True)  # so that equals are exactly 0
    rounding = 4 * torch.finfo(values.dtype).eps
    point = torch.eye(parts, dtype=values.dtype, device=values.device)[0]
    for k in range(2, parts + 1):
        offset = values[:k] - values[:k].mean()
        length = torch.linalg.vector_norm(offset)
        nearness = 1 / k - 1 / parts  # the squared distance between the face's centre and the simplex's
        missing = (radius.square() - nearness).clamp(min=0).sqrt()
        towards_first = torch.full_like(offset, -1 / k)
        towards_first[0] += 1
        stretched = torch.where(
            length > rounding,
            offset * (missing / length.clamp(min=rounding)).clamp(min=1),
            offset + towards_first * (missing / math.sqrt(1 - 1 / k)),
        )
        on_face = nn.functional.pad(1 / k + stretched, (0, parts - k))
        point = torch.where(on_face[k - 1] > rounding, on_face, point)
    return point[order.argsort()]


class SwitchableNorm(PlainBatchNorm):
    """Learns for each layer how much of instance, layer and batch norm's moments to normalize with.

        y = (x - mean) / sqrt(var + eps) * weight + bias
        mean = Σ softmax(mean_weight)_k mean_k,   var = Σ softmax(var_weight)_k var_k,   k = IN, LN, BN

    mean_k and var_k (÷n) over the spatial axes of each sample and channel (IN), over channels and spatial
    axes of each sample (LN), over the batch and spatial axes (BN; running moments in evaluation). A mixture
    of variances is not the variance about the mixed mean. A part that would measure a single value has no
    spread and is left out, with its softmax over the rest: IN on (N, C) and 1×1 maps, there LN if C is 1.

    Args:
        num_features: channels C.
        eps: added to the mixed variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: parameters mean_weight, var_weight (3,), ones at start: IN, LN, BN alike; of BN running_mean (C,),
        running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: Luo, Ren, Peng, Zhang and Li, Differentiable Learning-to-Normalize via Switchable Normalization,
        arXiv 1806.10779; switchablenorms/Switchable-Normalization (GitHub).
        Differs from the source in: variances are ÷n as in the paper, its code divides IN's by n−1; running
        averages, where the paper averages batches with the trained weights after training.
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
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))

    def shares(self, x: Tensor) -> Moments:
        """The shares of the parts, in the means and in the variances; a part of single values has none."""
        positions = x.shape[2:].numel()
        first = 0 if positions > 1 else 1 if positions * x.shape[1] > 1 else 2
        dtype = torch.promote_types(self.mean_weight.dtype, torch.float32)
        mean, var = (self.switch(weight[first:].to(dtype)) for weight in (self.mean_weight, self.var_weight))
        return nn.functional.pad(mean, (first, 0)), nn.functional.pad(var, (first, 0))

    def switch(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)

    def by_batch(self, x: Tensor) -> Tensor:
        count = require_spread(x, x)
        shares = self.shares(x)  # before `track` counts this batch
        instance = of_instances(x)
        batch = pooled(instance, 0)
        self.track(batch[0].flatten(), batch[1].flatten(), count)
        return self.mixed(x, shares, instance, batch)

    def by_running(self, x: Tensor) -> Tensor:
        batch = per_channel(self.running_mean, x), per_channel(self.running_var, x)
        return self.mixed(x, self.shares(x), of_instances(x), batch)

    def mixed(self, x: Tensor, shares: Moments, instance: Moments, batch: Moments) -> Tensor:
        parts = (instance, pooled(instance, 1), batch)
        mean, var = (
            shares[i][0] * parts[0][i] + shares[i][1] * parts[1][i] + shares[i][2] * parts[2][i]
            for i in (0, 1)
        )
        return (x - mean) * (var + self.eps).rsqrt()


class SparseSwitchableNorm(SwitchableNorm):
    """Switchable norm that ends with one part: one norm's means and one norm's variances.

        y = (x - mean) / sqrt(var + eps) * weight + bias
        mean = Σ p_k mean_k, p = SparsestMax(mean_weight, r)
        var = Σ q_k var_k, q = SparsestMax(var_weight, r)
        SparsestMax(z, r) = argmin |p - z|² over p ≥ 0, Σ p = 1, |p - (1/K, …, 1/K)| ≥ r
        r = sqrt((K - 1) / K) · min(1, t / radius_steps)

    with the moments of `SwitchableNorm`, k = IN, LN, BN and K = 3; where a part would measure single values K
    is smaller. Step t counts from 0: the batches tracked before this one, in evaluation all of them. At the
    full radius one share is 1 and the others are 0, and no gradient moves them any more.

    Args:
        num_features: channels C.
        radius_steps: batches after which one part is chosen, ≥ 1.
        eps: added to the mixed variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: parameters mean_weight, var_weight (3,), ones at start: IN, LN, BN alike; of BN running_mean (C,),
        running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training.
    Source: Shao, Meng, Li, Zhang, Li, Wang and Luo, SSN: Learning Sparse Switchable Normalization via
        SparsestMax, arXiv 1903.03793; switchablenorms/Sparse_SwitchNorm (GitHub).
        Differs from the source in: the radius grows by steps given in advance, its code lets it reach 1 as
        training ends, past the full radius of 0.82; equal logits, at which its code stays in the centre, are
        told apart by their order; its code clips and later drops the gradient of the logits and gives them a
        tenth of the learning rate; variances are ÷n.
    """

    def __init__(
        self,
        num_features: int,
        *,
        radius_steps: int = 1000,
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
        self.radius_steps = positive_int("radius_steps", radius_steps)

    def switch(self, logits: Tensor) -> Tensor:
        opened = (self.num_batches_tracked.to(logits.dtype) / self.radius_steps).clamp(max=1)
        return sparsestmax(logits, kept(opened * math.sqrt(1 - 1 / len(logits))))
