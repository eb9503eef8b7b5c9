"""Batch norms that one operator can compute as well as plain torch can."""

from torch import Tensor

from normbench import kernels
from normbench.norms.base import PlainBatchNorm, kept, require_spread
from normbench.values import one_of

IMPLS = ("auto", "reference", "fused")


class FusableBatchNorm(PlainBatchNorm):
    """Batch norm in plain torch or by `normbench.kernels`, as `impl` says: override `steps` for a sample.

    `layer(x, relu=True)` is relu(layer(x)), in the operator where that runs.
    """

    def __init__(
        self,
        num_features: int,
        *,
        impl: str,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        stored_var: str,
        train_weight: bool,
        train_bias: bool,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            stored_var=stored_var,
            train_weight=train_weight,
            train_bias=train_bias,
        )
        self.impl = one_of("impl", impl, IMPLS)

    def steps(self, x: Tensor) -> tuple[int, ...] | None:
        """At which steps the batch and each spatial axis are measured; None where it is no grid."""
        return (1,) * (x.ndim - 1)

    def running_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance that evaluation uses."""
        return self.running_mean, self.running_var

    def by_running(self, x: Tensor) -> Tensor:
        return self.normalize(x, *self.running_moments(x))

    def fused(self, x: Tensor) -> bool:
        """Whether the operator computes x.

        Raises: RuntimeError — impl=fused, and there is none.
        """
        if self.impl == "reference" or x.is_meta or not x.numel():
            return False
        why = kernels.missing(x.device.type, x.dtype)
        if why and self.impl == "fused":
            raise RuntimeError(f"impl=fused: {why}; use impl=auto or reference")
        return not why and self.steps(x) is not None

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        self.check(x)
        if not self.fused(x):
            y = super().forward(x)
            return y.relu() if relu else y
        if not self.training and self.track_running_stats:
            mean, var = self.running_moments(x)
            return kernels.normalized(x, kept(mean), kept(var), self.weight, self.bias, self.eps, relu)
        count = require_spread(self.measured(x), x)
        y, mean, var = kernels.batch_norm(x, self.weight, self.bias, self.steps(x) or (), self.eps, relu)
        if self.track_running_stats:
            self.track(mean.detach(), var.detach(), count)
        return y
