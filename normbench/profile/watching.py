"""Times of norm layers inside the running step: marks set by hooks where a layer is entered and left.

The backward pass of a layer lasts from the moment its output's gradient is complete until its input's is, so
that gradients of its parameters and sums within it are counted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normbench.bench.interleaved import Clock

Span = list[Any]  # the marks at its two ends; one where it was not left


@dataclass(frozen=True)
class Seen:
    """How a layer was called inside the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format
    relu: bool  # inside it
    output_dtype: torch.dtype


@dataclass
class Watch:
    """What was marked of one model's layers; `spans` holds layer → pass → its calls."""

    clock: Clock
    spans: dict[str, dict[str, list[Span]]] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)

    def seconds(self, steps: int) -> dict[str, dict[str, float]]:
        """Layer → pass → seconds of a step, of so many; a pass that did not end is left out. After `wait`."""
        found: dict[str, dict[str, float]] = {}
        for name, passes in self.spans.items():
            found[name] = {
                which: sum(self.clock.seconds(*span) for span in spans) / steps
                for which, spans in passes.items()
                if spans and all(len(span) == 2 for span in spans)
            }
        return found

    def enter(self, name: str) -> None:
        """A forward pass begins."""
        span: Span = []
        self.spans.setdefault(name, {"forward": [], "backward": []})["forward"].append(span)
        span.append(self.clock.mark())

    def leave(self, name: str, x: Tensor, y: Tensor) -> None:
        """A forward pass ends; its backward pass will be marked."""
        self.spans[name]["forward"][-1].append(self.clock.mark())
        if not (x.requires_grad and y.requires_grad):
            return
        span: Span = []
        self.spans[name]["backward"].append(span)

        def mark(gradient: Tensor) -> None:
            span.append(self.clock.mark())

        y.register_hook(mark)  # type: ignore[no-untyped-call]
        x.register_hook(mark)  # type: ignore[no-untyped-call]


@contextmanager
def watched(layers: Mapping[str, nn.Module], clock: Clock) -> Iterator[Watch]:
    """Mark the passes of these layers meanwhile."""
    watch = Watch(clock)

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        watch.enter(name)

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        x: Tensor = args[0]
        watch.leave(name, x, y)
        watch.seen[name] = Seen(tuple(x.shape), x.dtype, layout_of(x), bool(kwargs.get("relu")), y.dtype)

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(layer.register_forward_hook(partial(leave, name), with_kwargs=True))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched_relus(model: nn.Module, layers: Mapping[str, nn.Module], clock: Clock) -> Iterator[Watch]:
    """Mark the eager ReLU that gets a norm layer's output as it is, by that layer's name."""
    watch = Watch(clock)
    handed_on: list[tuple[str, Tensor]] = []  # by the norm layer that ran last
    running: list[str] = []

    def hand_on(name: str, module: nn.Module, args: Any, y: Tensor) -> None:
        handed_on[:] = [(name, y)]

    def enter(module: nn.Module, args: Any) -> None:
        name = next((made_by for made_by, y in handed_on if y is args[0]), "")
        running.append(name)
        if name:
            watch.enter(name)

    def leave(module: nn.Module, args: Any, y: Tensor) -> None:
        name = running.pop()
        if name:
            watch.leave(name, args[0], y)

    handles = [layer.register_forward_hook(partial(hand_on, name)) for name, layer in layers.items()]
    for module in model.modules():
        if type(module) is nn.ReLU:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        yield watch
    finally:
        handed_on.clear()
        for handle in handles:
            handle.remove()


def odd_share(layers: Mapping[str, nn.Module], step: Callable[[], object]) -> float:
    """The share of a step's values at norm layers' outputs, gradients included, whose arithmetic has a speed
    of its own: not finite, or denormal in float32."""
    least, counts = torch.finfo(torch.float32).tiny, [0, 0]

    def count(values: Tensor) -> None:
        size = values.detach().abs()
        odd = ~size.isfinite()
        if size.dtype != torch.float16:  # computed in float32
            odd |= (size > 0) & (size < least)
        counts[0] += int(odd.sum())
        counts[1] += odd.numel()

    def leave(module: nn.Module, args: Any, y: Tensor) -> None:
        count(y)
        if y.requires_grad:
            y.register_hook(count)  # type: ignore[no-untyped-call]

    handles = [layer.register_forward_hook(leave) for layer in layers.values()]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return counts[0] / max(counts[1], 1)


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last where it is that and nothing else."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
