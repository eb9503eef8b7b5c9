"""Batch norm as one operator, ReLU inside or not: C++ on the CPU, Triton on CUDA.

Two operators, both with fake tensors and autograd, so that autocast, torch.compile, CUDA graphs and
DistributedDataParallel take them as they take torch's own; the backward is a third, without a derivative.

    normbench::batch_norm   x measured at every `steps`-th position, then normalized: y, mean, var
    normbench::normalized   x by moments that are given: y

Their readable twin is `normbench.norms.base.PlainBatchNorm`; tests hold the kernels to it in float64.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from normbench.kernels import cpu

DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(device_type: str, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for such tensors, or None."""
    if dtype not in DTYPES.get(device_type, ()):
        return f"{device_type} kernels take no {str(dtype).removeprefix('torch.')}"
    return cpu.missing() if device_type == "cpu" else _triton_missing()


def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def _moments_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def channels_last(x: Tensor) -> bool:
    """Whether the C values of a position lie together; where a map is one position both readings are one."""
    if x.ndim == 2:
        return True
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last)


def _dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels last, else a contiguous copy."""
    return x if channels_last(x) and x.ndim > 2 else x.contiguous()


def _as(dy: Tensor, x: Tensor) -> Tensor:
    """dy in the memory format of the dense x."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return dy.contiguous(memory_format=last) if last and channels_last(x) else dy.contiguous()


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, steps: Sequence[int], eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x by the moments of its sample: y = (x - mean) / sqrt(var + eps) * weight + bias, then ReLU.

    Args:
        x: (N, C, *), 0 to 3 spatial axes.
        weight, bias: (C,), or None for 1 and 0.
        steps: of N and of each spatial axis, ≥ 1: positions 0, step, 2·step, … are measured.
        eps: added to var.
        relu: whether negative y become 0.
    Returns: y, like x; mean and var (÷n) of the sample, (C,), at least float32, without gradients.
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.normbench.batch_norm(x, weight, bias, steps, eps, relu)
    return found


def normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """x (N, C, *) by given moments (C,), which get no gradients; the rest as in `batch_norm`."""
    y: Tensor = torch.ops.normbench.normalized(x, mean, var, weight, bias, eps, relu)
    return y


torch.library.define(
    "normbench::batch_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, int[] steps, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "normbench::normalized",
    "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu) -> Tensor",
)
torch.library.define(
    "normbench::batch_norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, int[] steps, float eps, "
    "bool relu) -> (Tensor, Tensor, Tensor)",
)


def _backend(x: Tensor) -> Any:
    if x.device.type == "cpu":
        return cpu
    from normbench.kernels import cuda

    return cuda


def _measure(x: Tensor, weight: Any, bias: Any, steps: Any, eps: float, relu: bool) -> Any:
    return _backend(x).forward(_dense(x), weight, bias, None, None, steps, eps, relu)


def _normalize(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float, relu: bool) -> Any:
    return _backend(x).forward(_dense(x), weight, bias, mean, var, (), eps, relu)[0]


def _differentiate(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, steps: Any, eps: float, relu: bool
) -> Any:
    x = _dense(x)
    return _backend(x).backward(_as(dy, x), x, weight, bias, mean, var, steps, eps, relu)


def _fake_measured(
    x: Tensor, weight: Any, bias: Any, steps: Any, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    moments = x.new_empty((x.shape[1],), dtype=_moments_dtype(x))
    return torch.empty_like(_dense(x)), moments, torch.empty_like(moments)


def _fake_given(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, eps: float, relu: bool) -> Tensor:
    return torch.empty_like(_dense(x))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Any, steps: Any, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty((x.shape[1],), dtype=_moments_dtype(x))
    return torch.empty_like(_dense(x)), dweight, torch.empty_like(dweight)


def _keep_for_measured(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.steps, ctx.eps, ctx.relu = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)


def _keep_for_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, ctx.eps, ctx.relu = inputs
    ctx.steps = ()
    # running moments may be updated in place before the backward
    ctx.save_for_backward(x, weight, bias, mean.clone(), var.clone())


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.normbench.batch_norm_backward(
        dy, x, weight, bias, mean, var, ctx.steps, ctx.eps, ctx.relu
    )
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )


def _backward_of_measured(ctx: Any, dy: Tensor, *others: Any) -> tuple[Any, ...]:
    return (*_gradients(ctx, dy), None, None, None)


def _backward_of_given(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = _gradients(ctx, dy)
    return dx, None, None, dweight, dbias, None, None


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError("the fused batch norm has no second derivative; use impl=reference")


torch.library.impl("normbench::batch_norm", ("cpu", "cuda"), _measure)
torch.library.impl("normbench::normalized", ("cpu", "cuda"), _normalize)
torch.library.impl("normbench::batch_norm_backward", ("cpu", "cuda"), _differentiate)
torch.library.register_fake("normbench::batch_norm", _fake_measured)
torch.library.register_fake("normbench::normalized", _fake_given)
torch.library.register_fake("normbench::batch_norm_backward", _fake_backward)
torch.library.register_autograd(
    "normbench::batch_norm", _backward_of_measured, setup_context=_keep_for_measured
)
torch.library.register_autograd("normbench::normalized", _backward_of_given, setup_context=_keep_for_given)
torch.library.register_autograd("normbench::batch_norm_backward", _no_second_derivative)
