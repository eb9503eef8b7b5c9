"""The layer under audit: how to build it, what to feed it, how to call it without side effects."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normbench.building import make
from normbench.models.placing import takes

SHAPES = ((8, 12), (5, 12, 7), (8, 12, 9, 7), (4, 12, 3, 4, 5))
NOT_OPTIONS = {"spatial_shape", "fed_by", "device", "dtype", "process_group"}  # not for a config to say


@dataclass(frozen=True)
class Subject:
    """A norm by its config: `values` as composed, `num_features` as chosen for the probing."""

    values: Mapping[str, Any]
    num_features: int

    @cached_property
    def make(self) -> Callable[..., nn.Module]:
        """The callable that a model would be given."""
        maker: Callable[..., nn.Module] = make(dict(self.values))
        return maker

    @cached_property
    def options(self) -> dict[str, Any]:
        """Every option of the constructor with the value it has here."""
        given = {k: v for k, v in self.values.items() if k not in ("_target_", "_partial_")}
        defaults = {
            name: p.default
            for name, p in self.signature.items()
            if p.default is not p.empty and name not in NOT_OPTIONS
        }
        return defaults | given

    @cached_property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        """The constructor's parameters after `num_features`."""
        try:
            parameters = inspect.signature(self.layer_class).parameters
        except ValueError:  # a builtin without a signature
            return {}
        return dict(list(parameters.items())[1:])

    @cached_property
    def layer_class(self) -> Callable[..., nn.Module]:
        """What `_target_` names."""
        named: Callable[..., nn.Module] = getattr(self.make, "func", self.make)
        return named

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        shape: tuple[int, ...] | None = None,
        *,
        fresh: bool = False,
        changes: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """A new layer for (N, C, *) inputs of this shape, with other options where `changes` says so.

        Unless `fresh`, its parameters are not at their start: ones and zeros would hide half the mistakes.
        """
        shape = shape or self.maps
        maker = make({**self.values, **changes}) if changes else self.make
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            layer: nn.Module = maker(shape[1], **self.told(shape))
        layer = layer.to(dtype)
        if not fresh:
            move_parameters(layer)
        return layer

    def told(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What a model would tell a layer that asks for the map it will see."""
        return {"spatial_shape": shape[2:]} if takes(self.make, "spatial_shape") else {}

    def shape(self, *shape: int) -> tuple[int, ...]:
        """The shape with this subject's channels."""
        return (shape[0], self.num_features, *shape[2:])

    @property
    def all_shapes(self) -> list[tuple[int, ...]]:
        """Inputs of 0 to 3 spatial axes."""
        return [self.shape(*shape) for shape in SHAPES]

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of them that the layer takes; what it does with the others, `ranks` says."""
        return [shape for shape in self.all_shapes if self.refusal(shape) is None]

    def refusal(self, shape: tuple[int, ...]) -> Exception | None:
        """What the layer raises on inputs of this shape, in training or evaluation."""
        try:
            layer = self.build(shape=shape)
            for training in (True, False):
                y = call(layer, activations(shape), training)
                if y.shape != shape:
                    return ValueError(f"the shape {tuple(y.shape)}")
        except Exception as error:
            return error
        return None

    @cached_property
    def in_float64(self) -> bool:
        """Whether float64 inputs stay float64 all the way through the layer."""
        layer, watch = self.build(), _Narrowing()  # type: ignore[no-untyped-call]
        with watch:
            call(layer, activations(self.maps), training=True)
        return not watch.narrowed

    @property
    def tolerance(self) -> float:
        """What rounding may do to values that are equal by the mathematics, relative to the largest."""
        return 1e-9 if self.in_float64 else 1e-5

    @property
    def maps(self) -> tuple[int, ...]:
        """The usual probe, (N, C, H, W)."""
        return self.shape(*SHAPES[2])


class _Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices an operator that answers in less than float64."""

    narrowed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        for tensor in answer if isinstance(answer, (tuple, list)) else (answer,):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
                self.narrowed = True
        return answer


@torch.no_grad()
def move_parameters(layer: nn.Module) -> None:
    """Every parameter to values from 0.2 to 0.8, the same for every layer of these sizes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(0.2 + 0.6 * values)


def activations(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values, mean and sd away from zero and one and different in neighbouring channels."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, var = (v.view(1, -1, *(1,) * (len(shape) - 2)) for v in population(shape[1]))
    return (x * var.sqrt() + mean).to(dtype)


def population(channels: int) -> tuple[Tensor, Tensor]:
    """The mean and variance that `activations` are drawn with, each (C,)."""
    channel = torch.arange(channels, dtype=torch.float64) % 7
    return 0.7 - 0.2 * channel, (0.5 + 0.3 * channel) ** 2


def call(layer: nn.Module, x: Tensor, training: bool | None = None) -> Tensor:
    """The output, by the same random numbers at every call."""
    if training is not None:
        layer.train(training)
    with seeded():
        y: Tensor = layer(x)
    return y


@contextmanager
def seeded() -> Iterator[None]:
    """The global generator at 0 inside, as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def after(layer: nn.Module, batches: int, shape: tuple[int, ...]) -> nn.Module:
    """The same layer, in training mode, after it has seen so many batches."""
    dtype = next((p.dtype for p in [*layer.parameters(), *layer.buffers()] if p.is_floating_point()), None)
    for seed in range(1, batches + 1):
        call(layer, activations(shape, dtype or torch.float64, seed), training=True)
    return layer


def outcome(layer: nn.Module, x: Tensor, training: bool) -> Tensor:
    """The output of a copy, so that the layer stays as it is."""
    return call(copy.deepcopy(layer), x, training)


def back(y: Tensor, upstream: Tensor | None = None) -> None:
    """Gradients of y, from a fixed upstream one unless given."""
    given = activations(tuple(y.shape), y.dtype, seed=9) if upstream is None else upstream
    y.backward(given)  # type: ignore[no-untyped-call]


def measures_batches(layer: nn.Module) -> bool:
    """Whether the layer keeps running statistics, by torch's name for their count."""
    return any(name.rpartition(".")[2] == "num_batches_tracked" for name, _ in layer.named_buffers())


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; nan where either is not finite."""
    a, b = a.detach().double(), b.detach().double()
    if a.numel() == 0:
        return 0.0
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("nan")
    largest = max(a.abs().max().item(), b.abs().max().item())
    return (a - b).abs().max().item() / largest if largest else 0.0


def first_line(error: BaseException) -> str:
    """`ValueError: what it says`, on one line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
