"""Range batch norm: the range of a channel in place of its standard deviation."""

import math

import torch
from torch import Tensor

from normbench.norms.base import PlainBatchNorm
from normbench.values import positive_int


def scaled_range(x: Tensor, axes: list[int]) -> Tensor:
    """(max - min) / sqrt(2 ln n) over the n values along `axes`."""
    n = math.prod([x.shape[axis] for axis in axes])
    return (x.amax(axes) - x.amin(axes)) / math.sqrt(2 * math.log(n))


class RangeBatchNorm(PlainBatchNorm):
    """Batch norm by the largest and the smallest value, which low precision spoils less than sums of squares.

        y = (x - mean) / sqrt(s² + eps) * weight + bias,   s = (max(x) - min(x)) / sqrt(2 ln n)

    over the n values of a channel, batch and all spatial axes. Of normal activations s is 1.6 to 2 times the
    standard deviation for n ≥ 100, which weight has to make up for. With num_chunks a channel's values, in
    the order of samples, then positions, are cut into that many chunks whose sizes differ by at most one,
    and s is the average of theirs, each with its own n. Evaluation uses the running mean and s².

    Args:
        num_features: channels C.
        num_chunks: chunks of the batch whose ranges are averaged, ≥ 1.
        eps: added to s², ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) of s², not rescaled, num_batches_tracked ().
    Raises: ValueError — another channel count or rank; in training a chunk with one value.
    Source: Banner, Hubara, Hoffer and Soudry, Scalable Methods for 8-bit Training of Neural Networks,
        arXiv 1805.11046, section 3; eladhoffer, quantized.pytorch (GitHub), `RangeBN`: num_chunks=16.
        Differs from the source in: nothing is quantized; eps is added to s² under the root and the running
        average is of s², so that the layer takes batch norm's state; equal extremes share the gradient.
        The authors' code, not their paper, also multiplies s by 0.54, which makes it the standard deviation.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_chunks: int = 1,
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
        self.num_chunks = positive_int("num_chunks", num_chunks)

    def batch_stats(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(sample.ndim) if axis != 1]
        if sample.numel() < 2 * self.num_features * self.num_chunks:
            shape = tuple(sample.shape)
            raise ValueError(
                f"num_chunks={self.num_chunks} needs two values per channel in each chunk, got {shape}"
            )
        if self.num_chunks == 1:
            return sample.mean(axes), scaled_range(sample, axes).square()
        chunks = sample.transpose(0, 1).flatten(1).tensor_split(self.num_chunks, dim=1)  # each (C, n)
        s = torch.stack([scaled_range(chunk, [1]) for chunk in chunks]).mean(0)
        return sample.mean(axes), s.square()
