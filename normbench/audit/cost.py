"""What a layer costs beside torch's fused batch norm, interleaved in one process."""

import statistics
import time

import torch
from torch import Tensor, nn

from normbench.audit.subject import Subject, activations, back
from normbench.norms.obn import FusedBatchNorm

SHAPE = (32, 64, 16, 16)
CALLS = 3


def cost(subject: Subject) -> str:
    """Forward and backward time relative to `obn`, by rounds that alternate."""
    median, low, high = ratio(subject, rounds=15)
    sizes, threads = "×".join(map(str, SHAPE)), torch.get_num_threads()
    return (
        f"{median:.2g} × obn ({low:.2g} to {high:.2g}, middle 60 % of 15 rounds), "
        f"forward and backward, {sizes} float32, threads={threads}"
    )


def ratio(subject: Subject, rounds: int) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of this layer's time over `obn`'s."""
    width = subject.num_features if needs_own_width(subject) else SHAPE[1]
    shape = (SHAPE[0], width, *SHAPE[2:])
    x = activations(shape, torch.float32).requires_grad_()
    upstream = activations(shape, torch.float32, seed=9)
    ours, baseline = subject.build(torch.float32, shape).train(), FusedBatchNorm(shape[1]).train()
    for layer in (ours, baseline):
        seconds(layer, x, upstream)
    ratios = [seconds(ours, x, upstream) / seconds(baseline, x, upstream) for _ in range(rounds)]
    cuts = statistics.quantiles(ratios, n=5)
    return statistics.median(ratios), cuts[0], cuts[-1]


def needs_own_width(subject: Subject) -> bool:
    """Whether the layer cannot be built for the usual width."""
    try:
        subject.build(torch.float32, SHAPE)
    except (ValueError, TypeError, RuntimeError):
        return True
    return False


def seconds(layer: nn.Module, x: Tensor, upstream: Tensor) -> float:
    """Of some training steps of the layer alone; gradients of earlier ones are dropped first."""
    x.grad = None
    layer.zero_grad()
    began = time.perf_counter()
    for _ in range(CALLS):
        back(layer(x), upstream)
    return time.perf_counter() - began
