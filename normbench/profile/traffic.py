"""How much of its input a norm layer has to see before it can write: found by changing inputs, not by name.

In f units, see `normbench.bench.calls`. A layer whose output depends on other samples has to see the batch
first, or the part of it that the output's gradient reaches, and read its input again to write. One that stays
within a sample is granted a cache that holds the sample. Along a row that is contiguous in memory no position
can be skipped, since memory is read in longer pieces: channels first, f counts rows.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normbench.bench.calls import units_of_sample

SAMPLES = 16  # at most, of the batch that is probed


def units_of(
    layer: nn.Module, shape: Sequence[int], device: torch.device, layout: torch.memory_format
) -> tuple[float, float] | None:
    """Units that the layer moves at least in forward and backward at inputs (N, C, *); None where it cannot
    be told: it does not take float32."""
    samples = min(max(shape[0], 2), SAMPLES)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((samples, *shape[1:]), generator=generator).to(device).contiguous(memory_format=layout)
    try:
        y, gradient = one_output(layer, x)
        if y is None:
            return 0.0, 0.0
        mates = x.clone()
        mates[1:] = 3 * mates[1:] + 1
        other, _ = one_output(layer, mates)
    except (ValueError, TypeError, RuntimeError):
        return None
    by_gradient = share_reached(gradient, layout == torch.channels_last)
    depends = other is not None and not torch.allclose(y[0], other[0], rtol=1e-5, atol=1e-6)
    return units_of_sample(by_gradient or float(depends), by_gradient)


def one_output(layer: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """A fresh copy's output, None where that is its input, and d(one value of the first sample)/dx."""
    twin, x = copy.deepcopy(layer).float().train(), x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        y: Tensor = twin(x)
    if y is x:
        return None, torch.zeros_like(x)
    last = (0, 0, *(-1 for _ in x.shape[2:]))  # strided samples begin at the other end
    (gradient,) = torch.autograd.grad(y[last], x, allow_unused=True)
    return y.detach(), torch.zeros_like(x) if gradient is None else gradient


def share_reached(gradient: Tensor, channels_last: bool) -> float:
    """The share of the tensor's memory that one output's gradient reaches; 0 where that is its own sample."""
    reached = (gradient != 0).any(1).flatten(1) if gradient.ndim > 2 else (gradient != 0).any(1, keepdim=True)
    if not reached[1:].any():
        return 0.0
    reached[0, -1] = reached[1:, -1].any()  # not what it got from its own input
    if gradient.ndim > 2 and not channels_last:
        reached = reached.reshape(len(reached), -1, gradient.shape[-1]).any(-1)
    return float(reached.float().mean())
