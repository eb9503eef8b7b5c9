"""L1 batch norm: the mean absolute deviation in place of the standard deviation."""

import math

from torch import Tensor

from normbench.norms.base import PlainBatchNorm, per_channel


class L1BatchNorm(PlainBatchNorm):
    """Batch norm without squares and roots over the batch, for low precision and simple hardware.

        y = (x - mean) / sqrt(s² + eps) * weight + bias,   s = sqrt(π/2) · mean|x - mean|

    means over the batch and all spatial axes; s is the standard deviation of normal activations.

    Args:
        num_features: channels C.
        eps: added to s², ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) of s², not rescaled, num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel when the batch is measured.
    Source: Hoffer, Banner, Golan and Soudry, Norm matters, arXiv 1803.01814, section 4; Wu et al., L1-Norm
        Batch Normalization, arXiv 1802.09769.
        Differs from the source in: eps is added to s² under the root, as in batch norm, and the running
        average is of s², so that the layer takes batch norm's state.
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
            stored_var="biased",
            train_weight=train_weight,
            train_bias=train_bias,
        )

    def batch_stats(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(sample.ndim) if axis != 1]
        mean = sample.mean(axes)
        deviation = (sample - per_channel(mean, sample)).abs().mean(axes)
        return mean, deviation.square() * (math.pi / 2)
