"""Norm layers on a traced step: the moments they measured, their state, and the gradients before the update.

    with watch.step(epoch, step):       hooks on the chosen layers, where the step is to be traced
        train_step(…)                   calls watch.take() between gradients and update
    for samples in watch.drain(): …     off the clock: what was seen since, on the CPU

On the clock a traced step costs the dispatch mode inside the chosen layers and a few small copies on the
device; nothing waits for it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normbench.building import norm_layers_of
from normbench.rules import Interval
from normbench.traces.choosing import channels_of, norm_names, width_of
from normbench.traces.moments import Moments


@dataclass
class Sample:
    """What one layer showed on one traced step, of every seat.

    `values` (quantities, seats, channels); `quantities` are those of `tables.QUANTITIES` that the layer has.
    """

    epoch: int
    step: int
    layer: str
    quantities: list[str]
    channels: list[int]
    values: Tensor


class NormWatch:
    """Watches the chosen norm layers of a setting's model on the steps that are to be traced.

    Args:
        model: the one that trains: a pack's, or one session's.
        one: of one session: its names and widths are what the options speak of.
        options: `traces`.
        seats: sessions side by side in the model.
        hooked: whether the model runs as it is; a compiled one calls no hooks, so its moments stay unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        one: nn.Module,
        options: Mapping[str, Any],
        *,
        every: Interval,
        steps_per_epoch: int,
        seats: int,
        hooked: bool,
    ) -> None:
        layers = norm_layers_of(model)
        self.layers = {name: layers[name] for name in norm_names(one, options)}
        self.widths = {name: width_of(one, name) for name in self.layers}
        self.channels = {
            name: channels_of(options["channels"], width, name) for name, width in self.widths.items()
        }
        self.places: dict[str, Tensor] = {}  # the channels as an index, on the device
        self.every = every.count * (steps_per_epoch if every.unit == "epochs" else 1)
        self.seats, self.hooked, self.moments = seats, hooked, Moments() if hooked else None
        self.measured: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.now: tuple[int, int] | None = None
        self.samples: list[Sample] = []
        self.whole: list[Sample] = []  # of the latest traced step, with every channel

    def due(self, step: int) -> bool:
        """Whether to trace this step: the first, and every so many."""
        return step == 1 or step % self.every == 0

    @contextlib.contextmanager
    def step(self, epoch: int, step: int) -> Iterator[None]:
        """Around a training step; hooks are there on a step that is traced, and on no other."""
        if not self.due(step):
            yield
            return
        self.now, self.measured = (epoch, step), {}
        handles = self.hook() if self.hooked else []
        try:
            yield
        finally:
            self.now = None
            for handle in handles:
                handle.remove()

    def hook(self) -> list[RemovableHandle]:
        """Have `moments` watch each layer while its forward pass runs."""
        moments = self.moments
        if moments is None:
            return []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            moments.enter(args[0])
            moments.__enter__()  # type: ignore[no-untyped-call]

        def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
            moments.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            moments.leave()
            self.measured[name] = moments.mean, moments.var

        def named(name: str) -> Any:
            return lambda module, args, output: leave(name, module, args, output)

        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(enter))
            handles.append(layer.register_forward_hook(named(name), always_call=True))
        return handles

    @property
    def looking(self) -> bool:
        """Whether the step that runs is traced."""
        return self.now is not None

    @torch.no_grad()
    def take(self, scale: float = 1.0) -> None:
        """After the backward pass and before the update: copy what the layers have.

        Args:
            scale: of the loss: gradients are divided by it.
        """
        if self.now is None:
            return
        self.whole = []
        for name, layer in self.layers.items():
            seen = {key: value for key, value in self.seen(name, layer, scale) if value is not None}
            flat = [value.reshape(-1).float() for value in seen.values()]
            values = torch.stack(flat) if flat else torch.empty(0)
            values = values.view(len(seen), self.seats, self.widths[name])
            self.whole.append(Sample(*self.now, name, list(seen), list(range(self.widths[name])), values))
            if name not in self.places:
                self.places[name] = torch.tensor(self.channels[name], device=values.device)
            part = values.index_select(-1, self.places[name])
            self.samples.append(Sample(*self.now, name, list(seen), self.channels[name], part))

    def seen(self, name: str, layer: nn.Module, scale: float) -> Iterator[tuple[str, Tensor | None]]:
        """Every quantity of a layer, one number a channel; None where it has no such thing."""
        width = self.seats * self.widths[name]
        mean, var = (fitting(each, width) for each in self.measured.get(name, (None, None)))
        yield "batch_mean", mean
        yield "batch_std", None if var is None else var.float().clamp_min(0).sqrt()
        own = [*layer.named_buffers(), *layer.named_parameters()]
        for key in ("running_mean", "running_var", "weight", "bias"):
            # a stranger's may lie in a module inside it
            there = [tensor for path, tensor in own if path.rpartition(".")[2] == key]
            tensor = fitting(there[0] if len(there) == 1 else None, width)
            yield key, tensor
            if key in ("weight", "bias"):
                yield f"{key}_grad", None if tensor is None or tensor.grad is None else tensor.grad / scale

    def clear(self) -> None:
        """Forget what an earlier session left."""
        self.samples, self.whole = [], []

    def drain(self) -> tuple[list[Sample], list[Sample]]:
        """What was seen since the last time, and the latest traced step's with all channels; on the CPU."""
        samples, whole = self.samples, self.whole
        self.clear()
        for sample in (*samples, *whole):
            sample.values = sample.values.cpu()
        return samples, whole


def fitting(tensor: Tensor | None, width: int) -> Tensor | None:
    """A tensor that holds one number a channel."""
    return tensor if isinstance(tensor, Tensor) and tensor.numel() == width else None
