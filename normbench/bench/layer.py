"""Suite `layer`: norm layers alone, at the shapes that our models see, against torch's and against a copy.

units    as `normbench.bench.calls` counts them, with ReLU inside as without;
         f = share of the tensor that a sample touches: 1/s² in NHWC, 1/s in NCHW, where it skips whole rows
floor    a copy (2 units) of the same tensor, in the same round: forward 1.5, backward 2.5, both 4 copies
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normbench.bench.bench import Bench
from normbench.bench.calls import (
    BATCH_NORM,
    PASSES,
    RELU,
    Calls,
    Ring,
    copying,
    plus,
    units_of_sample,
)
from normbench.bench.interleaved import CannotRun, Ready, take_turns
from normbench.bench.record import Group
from normbench.models.dilated_cnn import DilatedCNN
from normbench.models.resnet9 import ResNet9
from normbench.models.resnet50 import ResNet50
from normbench.norms.bn import BatchNorm
from normbench.norms.mbn import MBN
from normbench.norms.obn import FusedBatchNorm

# model → its class, the image it sees, the batch on a CPU and on CUDA
MODELS: dict[str, tuple[Any, tuple[int, int, int], int, int]] = {
    "resnet9": (ResNet9, (3, 32, 32), 64, 512),
    "resnet50": (ResNet50, (3, 224, 224), 32, 256),
    "dilated_cnn": (DilatedCNN, (1, 28, 28), 128, 128),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}  # of outputs around 1, between a layer and its twin
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
FLOOR = {"forward": 1.5, "backward": 2.5, "forward+backward": 4.0}
BASELINE = "nn.BatchNorm2d"
LARGE = 2**23  # elements: 32 MiB in fp32, more than a CPU's caches keep between two passes
Shape = tuple[int, int, int, int]


def groups(bench: Bench) -> Iterator[Group]:
    """One group for every shape, layout, type, with and without ReLU."""
    keys = bench.of("layer")
    shapes = chosen_shapes(bench)
    for shape, layout, dtype, relu in itertools.product(shapes, keys["layout"], keys["dtype"], keys["relu"]):
        yield Case(bench, shape, shapes[shape], layout, dtype, relu).group()


def chosen_shapes(bench: Bench) -> dict[Shape, str]:
    """The distinct shapes that norm layers of the chosen models see, and who sees them; largest first.

    `some`: each model's largest tensor (of equal ones the one with most channels) and the smallest of all.
    """
    keys = bench.of("layer")
    seen: dict[Shape, list[str]] = {}
    largest: set[Shape] = set()
    for model in keys["model"]:
        own = dict.fromkeys(shapes_of(model, batch_of(bench, model)))
        largest.add(max(own, key=lambda s: (math.prod(s), s[1])))
        for shape in own:
            seen.setdefault(shape, []).append(model)
    smallest = min(seen, key=math.prod)
    if bench.quick:
        largest = set()
    if bench.quick or keys["shapes"] == "some":
        largest.add(smallest)
        seen = {shape: models for shape, models in seen.items() if shape in largest}
    in_order = sorted(seen, key=lambda s: (-math.prod(s), s))
    return {shape: ", ".join(seen[shape]) for shape in in_order}


def batch_of(bench: Bench, model: str) -> int:
    """The batch that `layer.batch_size` asks for, else the model's own."""
    given: int | None = bench.of("layer")["batch_size"]
    _, _, on_cpu, on_cuda = MODELS[model]
    usual = on_cuda if bench.device.type == "cuda" else on_cpu
    return given or (2 if bench.quick else usual)


def shapes_of(model: str, batch: int, **options: Any) -> list[Shape]:
    """What each of the model's norm layers sees, by building it without numbers."""
    cls, (channels, *size), _, _ = MODELS[model]
    found: list[Shape] = []

    def note(num_features: int, spatial_shape: tuple[int, int]) -> nn.Module:
        found.append((batch, num_features, *spatial_shape))
        return nn.Identity()

    with torch.device("meta"):
        cls(in_channels=channels, num_classes=10, image_size=tuple(size), norm=note, **options)
    return found


@dataclass(frozen=True)
class Layer:
    """One side: what makes the layer, the units it moves, and the readable twin of a fused one."""

    make: Callable[[], nn.Module]
    units: tuple[float, float]
    twin: Callable[[], nn.Module] | None = None
    dtype: str | None = None  # None: the case's


@dataclass(frozen=True)
class Case:
    """Everything that the sides of one group share."""

    bench: Bench
    shape: Shape
    seen_by: str
    layout: str
    dtype: str
    relu: bool

    def group(self) -> Group:
        """Measure all sides."""
        ring = self.ring(self.dtype)
        sides = {name: partial(self.ready, layer, ring) for name, layer in self.layers().items()}
        times = take_turns({"copy": partial(copying, ring, self.bench.sample_s), **sides}, self.bench.rounds)
        case = {
            "shape": list(self.shape),
            "layout": self.layout.upper(),
            "dtype": self.dtype,
            "relu": self.relu,
            "large": math.prod(self.shape) >= LARGE,
            "seen_by": self.seen_by,
        }
        pairs = ((name, control_of(name)) for name in times)
        controls = {name: control for name, control in pairs if control in times and control != name}
        return Group("layer", case, "call", BASELINE, times, controls, FLOOR)

    def layers(self) -> dict[str, Layer]:
        """Every side by its name; the readable ones and torch's own have ReLU behind them, not inside."""
        keys, channels = self.bench.of("layer"), self.shape[1]
        plain = plus(BATCH_NORM, RELU) if self.relu else BATCH_NORM
        layers = {
            BASELINE: Layer(partial(nn.BatchNorm2d, channels), plain),
            "obn": Layer(partial(FusedBatchNorm, channels), plain),
        }
        if self.bench.device.type == "cuda" and self.dtype == "bf16":
            # torch's fp16 goes through cuDNN, its bf16 does not: the faster of the two is to be beaten
            layers[f"{BASELINE} fp16"] = Layer(partial(nn.BatchNorm2d, channels), plain, dtype="fp16")
        samples = [
            (sample, stride)
            for sample, stride in itertools.product(keys["sample"], keys["stride"])
            if stride > 1 or sample == "stride"  # with stride 1 all samples are the whole
        ]
        bn, mbn = partial(BatchNorm, channels), partial(MBN, channels)
        if "reference" in keys["impl"]:
            layers["bn readable"] = Layer(bn, plain)
            for sample, stride in samples:
                units = self.units(stride, sample)
                make = partial(mbn, stride=stride, sample=sample, impl="reference")
                layers[named("readable", stride, sample)] = Layer(
                    make, plus(units, RELU) if self.relu else units
                )
        if "fused" in keys["impl"]:
            layers["bn fused"] = Layer(partial(bn, impl="fused"), BATCH_NORM, bn)
            for sample, stride in samples:
                make = partial(mbn, stride=stride, sample=sample)
                layers[named("fused", stride, sample)] = Layer(
                    partial(make, impl="fused"),
                    self.units(stride, sample),
                    partial(make, impl="reference"),
                )
        return layers

    def units(self, stride: int, sample: str) -> tuple[float, float]:
        """Forward and backward, of a layer whose statistics come from a sample."""
        if stride == 1:
            return BATCH_NORM
        squared = self.layout == "nhwc" and sample == "stride"
        f = 1 / stride**2 if squared else 1 / stride
        return units_of_sample(f)

    def ring(self, dtype: str) -> Ring:
        """What all sides are fed."""
        layout, device = LAYOUTS[self.layout], self.bench.device
        return Ring(self.shape, DTYPES[dtype], layout, device, single=self.bench.quick)

    def ready(self, layer: Layer, ring: Ring) -> Ready:
        """Build a layer, hold it against its twin, warm it up; CannotRun says what went wrong."""
        device = self.bench.device
        try:
            if layer.dtype is not None:
                ring = self.ring(layer.dtype)
            module = layer.make().to(device).train()
            forward = self.called(module, inside=layer.twin is not None)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if layer.twin is not None:
                    twin = self.called(layer.twin().to(device).train(), inside=False)
                    check_twin(forward, twin, ring, TOLERANCE[self.dtype])
                calls = Calls(forward, [p for p in module.parameters() if p.requires_grad], ring)
                calls.calibrate(self.bench.sample_s)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CannotRun(f"{type(error).__name__}: {first_line(error)}") from error
        moved = {part: units * ring.tensor_bytes for part, units in zip(PASSES, layer.units, strict=False)}
        moved[PASSES[2]] = sum(moved.values())
        return Ready(calls.measure, "; ".join(sorted({first_line(w.message) for w in said})), moved)

    def called(self, module: nn.Module, inside: bool) -> Callable[[Tensor], Tensor]:
        """The layer as a model calls it: alone, with ReLU inside it, or eager behind it."""
        if not self.relu:
            return module
        if inside:
            return partial(module, relu=True)
        return lambda x: F.relu(module(x))


def named(said: str, stride: int, sample: str) -> str:
    """`mbn fused s=4`, and the sample where it is another than every stride-th row and column."""
    return f"mbn {said} s={stride}" + ("" if sample == "stride" else f" {sample}")


def control_of(name: str) -> str:
    """`mbn fused s=4 rows` → `mbn fused s=1`, which is as fused and strides nothing."""
    words = name.split()
    return f"{words[0]} {words[1]} s=1" if words[0] == "mbn" else name


def check_twin(
    forward: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor], ring: Ring, tolerance: float
) -> None:
    """CannotRun where a fused layer is none, or has other numbers than its readable twin."""
    x, _ = ring.next()
    with torch.no_grad():
        with Operators() as seen:
            y = forward(x)
        if all(name.startswith(("aten.", "prim.")) for name in seen.names):
            raise CannotRun(f"not fused: it ran {', '.join(dict.fromkeys(seen.names[:5]))}")
        gap = float((y.float() - twin(x).float()).abs().max())
    if not gap <= tolerance:
        raise CannotRun(f"other numbers than its readable twin: off by {gap:.2g}")


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that ran meanwhile, by name, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def first_line(error: object) -> str:
    """A message's first line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
