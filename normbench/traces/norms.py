"""Norm layers on a traced step: the moments they measured, their state, and the gradients before the update.

    with watch.step(epoch, step):       hooks on the chosen layers, where the step is to be traced
        train_step(…)                   calls watch.take() between gradients and update
    for samples in watch.drain(): …     off the clock: what was seen since, on the CPU

On the clock a traced step costs the dispatch mode inside the chosen layers and two copies on the device;
nothing waits for it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normbench.building import norm_layers_of
from normbench.rules import Interval
from normbench.traces.choosing import channels_of, norm_names, width_of
from normbench.traces.moments import Moments

TRACES_AN_EPOCH = 10
FEWEST_STEPS = 20  # from one traced step to the next
HELD = ("running_mean", "running_var", "weight", "bias")


def steps_between(every: Interval | None, steps_per_epoch: int) -> int:
    """From one traced step to the next; None is ten an epoch, and never more than one step in 20."""
    if every is None:
        return max(FEWEST_STEPS, steps_per_epoch // TRACES_AN_EPOCH)
    return every.count * (steps_per_epoch if every.unit == "epochs" else 1)


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
    values: NDArray[np.float32]


@dataclass
class Taken:
    """What all layers had on one traced step: a vector on the device, of `contents` in turn.

    `contents` are (layer, quantity); `batch_std` is still the variance, gradients are still scaled.
    """

    epoch: int
    step: int
    scale: float
    contents: tuple[tuple[str, str], ...]
    values: Tensor


class NormWatch:
    """Watches the chosen norm layers of a setting's model on the steps that are to be traced.

    Args:
        model: the one that trains: a pack's, or one session's.
        one: of one session: its names and widths are what the options speak of.
        options: `traces`.
        every: from one traced step to the next.
        seats: sessions side by side in the model.
        hooked: whether the model runs as it is; a compiled one calls no hooks, so its moments stay unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        one: nn.Module,
        options: Mapping[str, Any],
        *,
        every: int,
        seats: int,
        hooked: bool,
    ) -> None:
        layers = norm_layers_of(model)
        self.layers = {name: layers[name] for name in norm_names(one, options)}
        self.channels = {name: list(range(width_of(one, name))) for name in self.layers}
        self.shown = {
            name: channels_of(options["channels"], len(all_of_it), name)
            for name, all_of_it in self.channels.items()
        }
        self.every, self.seats, self.hooked, self.moments = every, seats, hooked, Moments()
        self.places: dict[tuple[tuple[str, str], ...], Tensor] = {}  # of the shown channels, on the device
        self.measured: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self.now: tuple[int, int] | None = None
        self.taken: list[Taken] = []  # the shown channels of each traced step
        self.latest: Taken | None = None  # every channel

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
            self.moments.leave()  # where what ended the step is no Exception, no hook was called
            for handle in handles:
                handle.remove()

    def hook(self) -> list[RemovableHandle]:
        """Have `moments` watch each layer while its forward pass runs."""
        moments = self.moments

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            moments.enter(args[0])

        def leave(name: str) -> Any:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                moments.leave()
                self.measured[name] = moments.mean, moments.var

            return note

        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(enter))
            handles.append(layer.register_forward_hook(leave(name), always_call=True))
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
        there = [
            (name, key, value)
            for name, layer in self.layers.items()
            for key, value in self.seen(name, layer)
            if value is not None
        ]
        contents = tuple((name, key) for name, key, _ in there)
        whole = torch.cat([value.reshape(-1) for *_, value in there]) if there else torch.empty(0)
        if contents not in self.places:
            places = torch.tensor(self.places_of(contents), dtype=torch.long, device=whole.device)
            self.places[contents] = places
        shown = whole.index_select(0, self.places[contents])
        self.taken.append(Taken(*self.now, scale, contents, shown))
        self.latest = Taken(*self.now, scale, contents, whole)

    def seen(self, name: str, layer: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
        """Every quantity of a layer, one number a channel; None where it has no such thing."""
        width = self.seats * len(self.channels[name])
        mean, var = self.measured.get(name, (None, None))
        yield "batch_mean", fitting(mean, width)
        yield "batch_std", fitting(var, width)
        for key in HELD:
            tensor = fitting(held(layer, key), width)
            yield key, tensor
            if key in ("weight", "bias"):
                yield f"{key}_grad", None if tensor is None else tensor.grad

    def places_of(self, contents: tuple[tuple[str, str], ...]) -> list[int]:
        """Where in a step's vector the shown channels lie."""
        places, at = [], 0
        for name, _ in contents:
            width = len(self.channels[name])
            for seat in range(self.seats):
                places += [at + seat * width + channel for channel in self.shown[name]]
            at += self.seats * width
        return places

    def clear(self) -> None:
        """Forget what an earlier session left."""
        self.taken, self.latest = [], None

    def drain(self) -> tuple[list[Sample], list[Sample]]:
        """What was seen since the last time, and the latest traced step's with all channels; on the CPU."""
        taken = [sample for each in self.taken for sample in self.samples(each, self.shown)]
        latest = list(self.samples(self.latest, self.channels)) if self.latest else []
        self.clear()
        return taken, latest

    def samples(self, taken: Taken, channels: Mapping[str, list[int]]) -> Iterator[Sample]:
        """A step's vector, layer by layer."""
        whole, at = taken.values.float().cpu().numpy(), 0
        for name in self.layers:
            keys = [key for layer, key in taken.contents if layer == name]
            shape = len(keys), self.seats, len(channels[name])
            values = whole[at : at + math.prod(shape)].reshape(shape)
            at += values.size
            for key, own in zip(keys, values, strict=True):
                if key == "batch_std":
                    own[:] = np.sqrt(own.clip(0))
                elif key.endswith("_grad"):
                    own /= taken.scale
            yield Sample(taken.epoch, taken.step, name, keys, channels[name], values)


def held(layer: nn.Module, key: str) -> Tensor | None:
    """A layer's own parameter or buffer of that name, else the only one of a module inside it, as strangers'
    may lie there."""
    for modules in ([layer], layer.modules()):
        found = [own[key] for part in modules for own in (part._parameters, part._buffers) if key in own]
        distinct = {id(tensor): tensor for tensor in found if tensor is not None}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
    return None


def fitting(tensor: Tensor | None, width: int) -> Tensor | None:
    """A tensor that holds one number a channel."""
    return tensor if isinstance(tensor, Tensor) and tensor.numel() == width else None
