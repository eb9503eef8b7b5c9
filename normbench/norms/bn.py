"""Batch norm written in plain torch: the twin that other readable layers are timed against."""

from torch import Tensor

from normbench.norms.base import require_spread
from normbench.norms.fusable import FusableBatchNorm
from normbench.values import flag


class BatchNorm(FusableBatchNorm):
    """Batch norm in plain torch, so that a hand-written idea is not timed against a fused kernel only.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the batch and all spatial axes in training, the running ones in evaluation.

    Args:
        num_features: channels C.
        impl: reference, plain torch; fused, one operator (see `normbench.kernels`); auto, that operator where
            device and dtype have one, else plain torch; the manifest says which ran.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        track_running_stats: False keeps no running statistics and uses the batch's in evaluation too.
        stored_var: which variance enters running_var: unbiased, ÷(n−1), or biased, ÷n.
        eval_bessel: as_run only: evaluation multiplies the variance by m/(m−1), m = N × positions of the
            evaluated batch, so a sample's output depends on how many others it came with.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) by stored_var, num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured
        or eval_bessel counts it; RuntimeError — impl=fused where no kernel can run.
    Source: Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167; HarmanDotpy,
        Normalizations-in-Deep-Learning (GitHub): stored_var=biased with eval_bessel=true.
        Differs from the source in: nothing by default; the study also kept the graph of every batch
        alive in its running statistics, here they are detached.
    """

    def __init__(
        self,
        num_features: int,
        *,
        impl: str = "reference",
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
            impl=impl,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            stored_var=stored_var,
            train_weight=train_weight,
            train_bias=train_bias,
        )
        self.eval_bessel = flag("eval_bessel", eval_bessel)

    def running_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.eval_bessel:
            return super().running_moments(x)
        count = require_spread(x, x)
        return self.running_mean, self.running_var * (count / (count - 1))
