"""Norm layers called alone as training calls them: inputs that take turns, the bytes they move, a copy.

units    reads and writes of the whole tensor that a layer needs at least, forward / backward:
         2 / 3 where it has to see nothing before it writes;
         2 + f / 3 + 2f where it has to see a share f of the tensor first: batch norm 3 / 5;
         ReLU behind it, eager, 2 / 3 more
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normbench.bench.interleaved import Clock, Ready, Sample, repeats

PASSES = ("forward", "backward", "forward+backward")
RING_BYTES = {"cpu": 2**27, "cuda": 2**28}  # inputs take turns, so that no cache has the next one


def units_of_sample(forward: float, backward: float | None = None) -> tuple[float, float]:
    """Of a layer that sees such a share of the tensor before it writes; None: in both passes alike."""
    return 2 + forward, 3 + 2 * (forward if backward is None else backward)


def plus(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Units of two layers, one behind the other."""
    return a[0] + b[0], a[1] + b[1]


BATCH_NORM, RELU = units_of_sample(1), (2.0, 3.0)


class Ring:
    """Inputs and gradients of one shape, made off the clock, that take turns over all sides.

    Args:
        shape, dtype, layout, device: of the inputs; gradients have `gradient_dtype`, None for the same.
        single: one pair only, where nothing is said about speed.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        layout: torch.memory_format,
        device: torch.device,
        gradient_dtype: torch.dtype | None = None,
        single: bool = False,
    ) -> None:
        self.clock = Clock(device)
        self.tensor_bytes = math.prod(shape) * dtype.itemsize
        pairs = min(64, math.ceil(RING_BYTES[device.type] / (2 * self.tensor_bytes)))
        generator = torch.Generator().manual_seed(0)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for _ in range(1 if single else pairs):
            x, dy = (
                torch.randn(tuple(shape), generator=generator)
                .to(device, kind)
                .contiguous(memory_format=layout)
                for kind in (dtype, gradient_dtype or dtype)
            )
            self.pairs.append((x.requires_grad_(), dy))
        self.at = itertools.cycle(self.pairs)

    def next(self) -> tuple[Tensor, Tensor]:
        """An input, and the gradient of its output."""
        return next(self.at)


class Calls:
    """Training calls of one layer; `count` of them are a sample."""

    def __init__(self, forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], ring: Ring) -> None:
        self.forward, self.parameters, self.ring = forward, list(parameters), ring
        self.count, self.warm = 1, False

    def calibrate(self, sample_s: float) -> None:
        """Let a sample last so long; what is repeated, or runs on CUDA, takes an uncounted call first."""
        self.count = repeats(self.once, self.ring.clock, sample_s)
        self.warm = self.count > 1 or self.ring.clock.device.type == "cuda"

    def once(self) -> tuple[Any, Any, Any]:
        """One forward and backward pass; the marks before, between and after."""
        mark, (x, dy) = self.ring.clock.mark, self.ring.next()
        begin = mark()
        y = self.forward(x)
        between = mark()
        gradients = torch.autograd.grad(y, [x, *self.parameters], dy, allow_unused=True)
        end = mark()
        del y, gradients
        return begin, between, end

    def measure(self) -> Sample:
        """Seconds of a call, by pass; what is quick takes a call first that is not counted."""
        if self.warm:
            self.once()
        marks = [self.once() for _ in range(self.count)]
        clock = self.ring.clock
        clock.wait()
        forward = sum(clock.seconds(begin, between) for begin, between, _ in marks) / self.count
        backward = sum(clock.seconds(between, end) for _, between, end in marks) / self.count
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def copying(ring: Ring, sample_s: float) -> Ready:
    """A side that reads and writes the tensor once."""
    target, clock = torch.empty_like(ring.next()[0], requires_grad=False), ring.clock

    def once() -> tuple[Any, Any]:
        x = ring.next()[0].detach()
        begin = clock.mark()
        target.copy_(x)
        return begin, clock.mark()

    count = repeats(once, clock, sample_s)

    def measure() -> Sample:
        marks = [once() for _ in range(count)]
        clock.wait()
        return {"copy": sum(clock.seconds(begin, end) for begin, end in marks) / count}

    return Ready(measure, bytes_moved={"copy": 2.0 * ring.tensor_bytes})
