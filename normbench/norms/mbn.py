"""Modified batch norm: measure a part of the activations, every s-th row and column, normalize everything."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from normbench.norms.base import laid_out_as
from normbench.norms.fusable import FusableBatchNorm
from normbench.values import flag, one_of, positive_int


class MBN(FusableBatchNorm):
    """Batch norm whose statistics come from 1/stride² of the map, to save the time of measuring all of it.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and var (÷n) over the batch and all spatial axes of x[..., ::stride, ::stride], every spatial axis
    strided, or of another sample of x; gradients flow through them. A map smaller than the stride gives its
    first row and column.

    Args:
        num_features: channels C.
        stride: step of the statistics sample, ≥ 1; on (N, C) it acts with sample=batch only.
        sample: what is measured. stride: every stride-th position along every spatial axis; rows: along the
            first spatial axis only; batch: every stride-th sample, its whole map; random: as many positions
            as stride has, drawn for each batch from torch's global generator without replacement, the same
            for all samples and channels; where that is every position nothing is drawn.
        affine_impl: how scale and shift are computed: depthwise (a 1×1 depthwise convolution, as published)
            or vector (multiply and add); equal results, other kernels. The fused operator has its own.
        train_affine: False freezes weight and bias, which is what the 2019 runs did.
        impl: reference, plain torch; fused, one operator (see `normbench.kernels`); auto, that operator
            where device, dtype and sample have one, else plain torch; the manifest says which ran.
        eps: added to the variance, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: False leaves weight and bias None.
        track_running_stats: False keeps no running statistics and uses the batch's in evaluation too.
        stored_var: which variance enters running_var: unbiased, ÷(n−1), or biased, ÷n; n is the sample's.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_var (C,) by stored_var, num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one sampled value per channel; RuntimeError —
        impl=fused where no kernel can run.
    Source: nrajmalwar, Modified-Batch-Normalization (GitHub), `MBatchNorm.py` and PartC; its samples are
        sample=stride, the others are for comparison.
        Differs from the source in: it runs (the published class returned from the fused path before it);
        weight and bias are (C,) vectors, not kernels; torch's eps and momentum; channels first;
        the source stored the ÷n variance (stored_var=biased).
    """

    def __init__(
        self,
        num_features: int,
        *,
        stride: int = 1,
        sample: str = "stride",
        affine_impl: str = "depthwise",
        train_affine: bool = True,
        impl: str = "auto",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        stored_var: str = "unbiased",
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
        self.stride = positive_int("stride", stride)
        self.sample = one_of("sample", sample, ("stride", "rows", "batch", "random"))
        self.affine_impl = one_of("affine_impl", affine_impl, ("depthwise", "vector"))
        self.train_affine = flag("train_affine", train_affine)
        if self.sample == "random" and impl == "fused":
            raise ValueError("impl=fused measures no sample=random; use impl=auto or reference")
        if not train_affine:
            self.requires_grad_(False)

    def steps(self, x: Tensor) -> tuple[int, ...] | None:
        """Every `stride`-th along the axes that `sample` names; a drawn sample has no steps."""
        if self.sample == "random":
            return None
        strided = {"stride": range(1, x.ndim - 1), "rows": range(1, x.ndim - 1)[:1], "batch": (0,)}[
            self.sample
        ]
        return tuple(self.stride if axis in strided else 1 for axis in range(x.ndim - 1))

    def measured(self, x: Tensor) -> Tensor:
        """The part of x that statistics are taken from; for stride (N, C, H, W) → (N, C, ⌈H/s⌉, ⌈W/s⌉)."""
        spatial = range(2, x.ndim)
        if self.sample == "random":
            positions = math.prod(x.shape[2:])
            wanted = math.prod([math.ceil(size / self.stride) for size in x.shape[2:]])
            if wanted == positions:
                return x
            drawn = torch.randperm(positions, device=x.device)[:wanted]
            return x.flatten(2).index_select(2, drawn)
        strided = {"stride": spatial, "rows": spatial[:1], "batch": (0,)}[self.sample]
        return x[tuple(slice(None, None, self.stride if axis in strided else 1) for axis in range(x.ndim))]

    def scale_and_shift(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None or self.affine_impl == "vector":
            return super().scale_and_shift(x)
        conv = (F.conv1d, F.conv1d, F.conv2d, F.conv3d)[x.ndim - 2]
        values = x.unsqueeze(-1) if x.ndim == 2 else x
        kernel = self.weight.to(x.dtype).view((-1,) + (1,) * (values.ndim - 1))  # (C, 1, 1, 1) for maps
        # autocast, which the meta device does not have, would round the normalized values and the weights
        exact = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with exact:
            y = conv(values, kernel, self.bias.to(x.dtype), groups=self.num_features)
        return y.view(x.shape) if x.ndim == 2 else laid_out_as(y, x)  # some kernels answer in another format
