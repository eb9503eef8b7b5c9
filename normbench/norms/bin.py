"""Batch-instance norm: a learned gate per channel between batch norm and instance norm."""

import torch
from torch import Tensor, nn

from normbench.norms.base import per_channel
from normbench.norms.bn import BatchNorm
from normbench.norms.group import normalize_groups
from normbench.values import flag


class BatchInstanceNorm(BatchNorm):
    """Mixes batch norm and instance norm per channel, to keep a picture's style where it helps.

        y = (gate * BN(x) + (1 - gate) * IN(x)) * weight + bias

    BN over the batch and all spatial axes (running moments in evaluation), IN over the spatial axes of each
    sample. The gate (C,) starts at 1 and is clamped into [0, 1] at the start of every training forward.

    Args:
        num_features: channels C.
        train_gate: False freezes the gate at 1, as published, which is batch norm.
        eps: added to both variances, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        track_running_stats: False keeps no running statistics and uses the batch's in evaluation too.
        stored_var: which variance enters running_var: unbiased, ÷(n−1), or biased, ÷n.
        eval_bessel: as_run only: evaluation multiplies BN's variance by m/(m−1), see `BatchNorm`.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: gate (C,); of BN running_mean (C,), running_var (C,) by stored_var, num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured.
    Source: Nam and Kim, Batch-Instance Normalization, arXiv 1805.07925; HarmanDotpy,
        Normalizations-in-Deep-Learning (GitHub): train_gate=false.
        Differs from the source in: the study made a new gate in every forward, which no optimizer held;
        IN leaves (N, C) and 1×1 maps as they are; the paper also gives the gate a larger learning rate.
    """

    def __init__(
        self,
        num_features: int,
        *,
        train_gate: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        stored_var: str = "unbiased",
        eval_bessel: bool = False,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            stored_var=stored_var,
            eval_bessel=eval_bessel,
            train_weight=train_weight,
            train_bias=train_bias,
        )
        self.train_gate = flag("train_gate", train_gate)
        self.gate = nn.Parameter(torch.ones(num_features), requires_grad=train_gate)

    def mix(self, x: Tensor, batch_normed: Tensor) -> Tensor:
        # a copy, so that a second forward's clamp leaves the first one's backward valid
        gate = per_channel(self.gate.clamp(0, 1) if not self.training else self.gate.clone(), x)
        return gate * batch_normed + (1 - gate) * normalize_groups(x, self.num_features, self.eps)

    def by_batch(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.gate.clamp_(0, 1)
        return self.mix(x, super().by_batch(x))

    def by_running(self, x: Tensor) -> Tensor:
        return self.mix(x, super().by_running(x))
