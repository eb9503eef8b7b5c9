"""Which inputs a layer takes, and whether shape, dtype and memory format come back."""

import copy
import itertools

import torch
from torch import Tensor, nn

from normbench.audit.findings import Broken, Doubtful, require
from normbench.audit.subject import (
    Subject,
    activations,
    after,
    back,
    call,
    distance,
    first_line,
    measures_batches,
    outcome,
)

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def step(layer: nn.Module, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Output and input gradient of one training step; `scale` is the upstream gradient's size."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(layer, x, training=True)
    back(y, activations(tuple(y.shape), seed=9).mul(scale).to(y.dtype))
    require(x.grad is not None, "no gradient reaches the input")
    assert x.grad is not None
    return y, x.grad


def ranks(subject: Subject) -> str:
    """(N, C) to (N, C, D, H, W), odd sizes, and what is done with what the layer was not built for."""
    odd_sizes = [subject.shape(*shape) for shape in ((7, 0, 1, 9), (3, 0, 3, 1), (5, 0, 1))]
    for shape in [*subject.shapes, *odd_sizes]:
        if len(shape) not in map(len, subject.shapes):
            continue
        layer = subject.build(shape=shape)
        for training in (True, False):
            y = call(layer, activations(shape), training)
            require(y.shape == shape, f"{shape} in, {tuple(y.shape)} out")
            require(bool(y.isfinite().all()), f"{shape}: output not finite")
    said = []
    refused = [shape for shape in subject.all_shapes if shape not in subject.shapes]
    if refused:
        error = subject.refusal(refused[0])
        assert error is not None
        works = " and ".join(f"{len(shape)}-d" for shape in subject.shapes)
        said.append(f"takes {works} inputs only: {refused[0]} ends in {first_line(error)}")
    odd = [shape for shape in wrong_shapes(subject) if accepts(subject, shape)]
    if odd:
        said.append(f"takes {odd[0]}, though it was built for {subject.num_features} channels")
    if said:
        raise Doubtful("; ".join(said))
    return "takes (N, C) to (N, C, D, H, W), odd sizes and 1×1 maps; other channels and ranks are refused"


def wrong_shapes(subject: Subject) -> list[tuple[int, ...]]:
    """What the layer was not built for."""
    c = subject.num_features
    return [(4, c + 1, *subject.maps[2:]), (4, c - 1)]


def accepts(subject: Subject, shape: tuple[int, ...]) -> bool:
    """Whether the layer answers to a shape it was not built for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for training in (True, False):
        try:
            call(subject.build(), x, training)
        except (ValueError, RuntimeError, IndexError, AssertionError):
            return False
    return True


def dtypes(subject: Subject) -> str:
    """float64, float32, bfloat16 and float16 come back as they went in, with float64's values."""
    for shape in subject.shapes:
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)):
            exact, layer = subject.build(shape=shape), subject.build(torch.float32, shape=shape)
            x = activations(shape, dtype)
            for training in (True, False):
                y = call(layer, x, training)
                require(y.dtype == dtype, f"{dtype} in, {y.dtype} out")
                off = distance(y, call(exact, x.double(), training))
                require(off <= tolerance, f"{dtype} {shape}: off by {off:.1e} of the largest value")
    return "float32, bfloat16 and float16 come back as they went in and agree with float64"


def half_parameters(subject: Subject) -> str:
    """A layer turned to float16 as a whole trains on float16."""
    y, gradient = step(subject.build(torch.float16), activations(subject.maps, torch.float16))
    require(y.dtype == torch.float16, f"float16 in, {y.dtype} out")
    require(bool(y.isfinite().all() and gradient.isfinite().all()), "output or gradient not finite")
    return "parameters and input in float16: finite output and gradient"


def memory_format(subject: Subject) -> str:
    """Contiguous and channels-last both come back as they went in, with equal values."""
    for shape in [s for s in subject.shapes if len(s) in FORMATS]:
        for training in (True, False):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                layer = after(
                    subject.build(torch.float64 if dtype == torch.float64 else torch.float32, shape=shape),
                    0 if training else 2,
                    shape,
                )
                x = activations(shape, dtype)
                plain = outcome(layer, x, training)
                if not plain.is_contiguous():
                    raise Doubtful(f"{shape}: a contiguous input comes back strided")
                last = FORMATS[len(shape)]
                y = outcome(layer, x.contiguous(memory_format=last), training)
                if not y.is_contiguous(memory_format=last):
                    raise Doubtful(f"{shape}: a channels-last input comes back in another memory format")
                tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2}.get(dtype, subject.tolerance)
                require(distance(y, plain) <= tolerance, f"{shape}: channels-last gives other values")
    return "contiguous and channels-last come back as they went in, with equal values"


def small_batches(subject: Subject) -> str:
    """One sample, no sample, one channel, one value per channel."""
    said = [one_sample(subject), no_sample(subject), one_channel(subject), one_value(subject)]
    return "; ".join(said)


def one_sample(subject: Subject) -> str:
    layer = after(subject.build(), 2, subject.maps)
    x = activations(subject.shape(1, 0, *subject.maps[2:]))
    require(bool(outcome(layer, x, False).isfinite().all()), "one sample in evaluation: not finite")
    try:
        y = outcome(layer, x, True)
    except ValueError as error:
        return f"one sample is refused in training ({str(error).splitlines()[0]})"
    require(bool(y.isfinite().all()), "one sample in training: not finite")
    return "one sample passes"


def no_sample(subject: Subject) -> str:
    layer = after(subject.build(), 2, subject.maps)
    empty = torch.zeros((0, *subject.maps[1:]), dtype=torch.float64, requires_grad=True)
    try:
        y = call(layer, empty, training=False)
    except Exception as error:
        raise Doubtful(f"an empty batch fails in evaluation: {first_line(error)}") from error
    require(y.shape == empty.shape, f"an empty batch comes back as {tuple(y.shape)}")
    try:
        back(call(layer, empty, training=True), torch.zeros_like(empty))
    except ValueError:
        return "an empty batch passes in evaluation and is refused in training"
    except Exception as error:
        raise Doubtful(f"an empty batch fails in training: {first_line(error)}") from error
    for key, value in layer.state_dict().items():
        if not value.isfinite().all():
            raise Doubtful(f"an empty batch in training makes {key} nan")
    return "an empty batch passes"


def one_channel(subject: Subject) -> str:
    shape = (8, 1, *subject.maps[2:])
    try:
        narrow = subject.build(shape=shape)
        call(copy.deepcopy(narrow), activations(shape), training=True)
    except (ValueError, AssertionError) as error:
        return f"one channel is refused ({first_line(error)})"
    for training in (True, False):
        y = call(narrow, activations(shape), training)
        require(bool(y.isfinite().all()), f"one channel, training={training}: not finite")
    return "one channel passes"


def one_value(subject: Subject) -> str:
    x = activations(subject.shape(1, 0, 1, 1))
    layer = subject.build(shape=tuple(x.shape))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    said = "one value per channel passes"
    try:
        y = call(layer, x, training=True)
    except ValueError as error:
        require(len(str(error)) > 20, f"one value per channel: {first_line(error)!r} explains nothing")
        said = "one value per channel is refused in training"
        for key, value in layer.state_dict().items():
            if not torch.equal(value, state[key]):
                raise Doubtful(f"{said}, but has changed {key} by then") from error
    else:
        require(bool(y.isfinite().all()), "one value per channel: output not finite")
        if measures_batches(layer):
            raise Doubtful("one value per channel is measured in training, though it has no spread")
    try:
        y = call(layer, x, training=False)
    except ValueError as error:
        raise Doubtful(
            f"one value per channel is refused in evaluation: {str(error).splitlines()[0]}"
        ) from error
    require(bool(y.isfinite().all()), "one value per channel in evaluation: not finite")
    return said


def constant_channels(subject: Subject) -> str:
    """A channel without spread, and all zeros: finite output and gradient."""
    for training in (True, False):
        for what, dtype in itertools.product(("constant channels", "zeros"), (torch.float64, torch.float32)):
            x = torch.zeros(subject.maps, dtype=dtype)
            if what != "zeros":
                x += activations(subject.maps, dtype)[:1, :, :1, :1]
            layer = subject.build(dtype)
            if not training:
                for _ in range(100):
                    call(layer, x, training=True)
            x = x.requires_grad_()
            y = call(layer, x, training)
            back(y)
            mode = "training" if training else "evaluation after 100 such batches"
            require(bool(y.isfinite().all()), f"{what}: output not finite in {mode}; is eps zero?")
            assert x.grad is not None
            require(bool(x.grad.isfinite().all()), f"{what}: gradient not finite in {mode}; is eps zero?")
            for name, p in layer.named_parameters():
                if p.grad is not None and not p.grad.isfinite().all():
                    raise Broken(f"{what}: gradient of {name} not finite in {mode}")
    return "constant channels and zeros give finite outputs and gradients"


def extremes(subject: Subject) -> str:
    """Values 10⁴ times larger and smaller, in float32, float16 and bfloat16."""
    worst = 0.0
    for scale in (1e4, 1e-4):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = activations(subject.maps) * scale
            x = x.clamp(-6e4, 6e4).to(dtype)
            layer, exact = subject.build(torch.float32), subject.build()
            upstream = min(1.0, scale)  # the gradient of a normalized value grows as the value shrinks
            y, gradient = step(layer, x, upstream)
            expected, slope = step(exact, x.double(), upstream)
            limit = torch.finfo(dtype).max
            for what, values, right in (("output", y, expected), ("gradient", gradient, slope)):
                most = right.abs().max().item()
                if not values.isfinite().all() and most < limit:
                    raise Broken(
                        f"values × {scale:g} in {dtype}: {what} not finite, exact one up to {most:.3g}"
                    )
            require(
                bool(call(layer, x, training=False).isfinite().all() or expected.abs().max() >= limit),
                f"values × {scale:g} in {dtype}: not finite in evaluation",
            )
            if dtype == torch.float32:
                worst = max(worst, distance(y, expected))
    if not worst <= 1e-2:
        raise Doubtful(f"values × 10^±4 in float32: off by {worst:.1e} of the largest value")
    return f"values × 10^±4 stay finite in float32, float16 and bfloat16; float32 off by {worst:.0e}"
