"""Halves of batch norm: centring alone, and scaling alone."""

from torch import Tensor

from normbench.norms.base import PlainBatchNorm, per_channel


class MeanOnlyBatchNorm(PlainBatchNorm):
    """Batch norm that centres and does not scale: half the statistics, none of the division.

        y = (x - mean) * weight + bias

    mean over the batch and all spatial axes in training; evaluation uses the running one.

    Args:
        num_features: channels C.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), which is kept and not used, num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured.
    Source: Salimans and Kingma, Weight Normalization, arXiv 1602.07868, section 4.
        Differs from the source in: it stands alone, not with weight normalization; it has a weight
        (train_weight=false leaves it at one).
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, momentum=momentum, affine=affine, train_weight=train_weight, train_bias=train_bias
        )

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return x - per_channel(mean, x)


class VarianceOnlyBatchNorm(PlainBatchNorm):
    """Batch norm that scales and does not centre, to tell which half of it matters.

        y = x / sqrt(var + eps) * weight + bias

    var (÷n, about the mean) over the batch and all spatial axes; evaluation uses the running one.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), which is kept and not used, running_var (C,) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured.
    Source: the counterpart of mean-only batch norm; Ioffe and Szegedy, arXiv 1502.03167, without centring.
        Differs from the source in: the mean is not taken out, nothing else.
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

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return x * per_channel((var + self.eps).rsqrt(), x)
