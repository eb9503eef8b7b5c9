"""Batch norm over all processes of a data-parallel run: every rank's share of the batch counts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normbench.norms.base import PlainBatchNorm, per_channel


class _Joined(torch.autograd.Function):
    """A tensor's sum over all processes, on each of them; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return joined(grad)


def joined(own: Tensor) -> Tensor:
    """`own` added up over all processes of the default group; every one of them has to call it."""
    total: Tensor = _Joined.apply(own)
    return total


_apart: list[bool] = []


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let layers measure their own share, while the other processes may be doing something else."""
    _apart.append(True)
    try:
        yield
    finally:
        _apart.pop()


def processes() -> int:
    """How many processes train together; one where there is no process group."""
    if _apart:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SyncBatchNorm(PlainBatchNorm):
    """Batch norm over the batches of all processes, so that splitting a batch changes nothing.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the processes' batches together and all spatial axes in training; evaluation uses
    the running moments. Shares may differ in size, and all but one may be empty. x's gradient is that of the
    sum of the processes' losses. In one process, with a process group or without, it is `bn`. Evaluation
    never waits for other processes; with track_running_stats=False it measures its own share.

    Args:
        num_features: channels C.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        track_running_stats: False keeps no running statistics and uses the batch's in evaluation too.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) ÷(n−1), num_batches_tracked (), equal in all processes.
    Raises: ValueError — another channel count or rank; one value per channel in all processes together when
        the batch is measured.
    Source: Peng et al., MegDet, arXiv 1711.07240, cross-GPU batch normalization; `torch.nn.SyncBatchNorm`.
        Differs from the source in: torch's takes CUDA tensors only and combines the variances of the shares;
        here every device takes one path of two passes, sums first, then squares about the joined mean,
        which was tried on CPUs (gloo) only.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            train_weight=train_weight,
            train_bias=train_bias,
        )

    def by_batch(self, x: Tensor) -> Tensor:
        if processes() == 1 or x.is_meta or not self.training:
            return super().by_batch(x)
        mean, var, count = self.joined_stats(x)
        if self.track_running_stats:
            with torch.no_grad():
                self.blend(mean=mean, var=var * (count / (count - 1)))
        return self.normalize(x, mean, var)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def joined_stats(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and ÷n variance (C,) over all processes, and over how many values () they were taken."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        own = x.numel() // x.shape[1]
        sums = torch.cat([x.sum(axes).double(), x.new_tensor([own], dtype=torch.float64)])
        total = joined(sums)
        count = total[-1].detach()  # float64: exact
        if own < 2 and count < 2:  # a share of two settles it without waiting for the device
            raise ValueError(
                "batch statistics need more than one value per channel, "
                f"got {tuple(x.shape)} here and {int(count)} in {processes()} processes"
            )
        mean = (total[:-1] / count).to(x.dtype)
        squares = (x - per_channel(mean, x)).square().sum(axes)
        return mean, (joined(squares.double()) / count).to(x.dtype), count
