"""Whether the values are right: by the declared formula, in float64, by differences, cast, compiled."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from normbench.audit.findings import Broken, Doubtful, require
from normbench.audit.subject import Subject, activations, after, back, call, distance, first_line, seeded
from normbench.formulas import formula_of, options_of, state_of

DIRECTIONS = 4  # in which derivatives are compared
COMPILED = 1e-4  # what fusing may do to float32, relative to the largest value
OTHERS = ((7, 5), (3, 7, 1, 9), (5, 1, 3), (2, 3, 5, 5), (9, 4, 3, 3))  # odd sizes, other widths
WRONG = 0.7  # a gap, relative to the larger, that no statistics held constant explain


def formula(subject: Subject) -> str:
    """Three training batches with running state, then evaluation, against the declared formula."""
    declared = formula_of(subject.build())
    if declared is None:
        return "none declared; a static method `formula` would be compared with the layer in float64"
    worst = 0.0
    others = [shape for shape in OTHERS if subject.refusal(shape) is None]
    for shape in [*subject.shapes, *others]:
        layer = subject.build(shape=shape)
        for seed, training in ((1, True), (2, True), (3, True), (4, False)):
            x = activations(shape, seed=seed)
            state = state_of(layer)
            y = call(layer, x, training)
            with seeded():
                options = {**subject.options, **options_of(layer)}
                expected, changed = declared(x.numpy(), state, options, training)
            where = f"{shape} batch {seed}" if training else f"{shape} evaluation"
            off = distance(y, torch.from_numpy(np.asarray(expected)))
            require(off <= subject.tolerance, f"{where}: off by {off:.1e} of the largest value")
            worst = max(worst, off)
            for key, value in state_of(layer).items():
                wanted = changed.get(key, state[key])
                off = distance(torch.from_numpy(value), torch.from_numpy(np.asarray(wanted, dtype=float)))
                require(off <= subject.tolerance, f"{where}: {key} off by {off:.1e}")
                worst = max(worst, off)
    return f"outputs and state are the declared formula's, to {worst:.0e} in float64"


def exactness(subject: Subject) -> str:
    """float32 against the layer's own float64, on ordinary values and on a large mean."""
    off = {}
    for name, shift in (("ordinary values", 0.0), ("a mean of 1000", 1000.0)):
        x = activations(subject.maps) + shift
        layer, exact = subject.build(torch.float32), subject.build()
        y = call(layer, x.float(), training=True)
        expected = call(exact, x.float().double(), training=True)
        off[name] = distance(y, expected)
    if not off["ordinary values"] <= 1e-4:
        raise Broken(f"float32 is off by {off['ordinary values']:.1e} of the largest value")
    if not off["a mean of 1000"] <= 2e-2:
        raise Doubtful(f"float32 on values around 1000 is off by {off['a mean of 1000']:.1e} of the largest; "
                       "was the variance taken as E[x²] − E[x]²?")  # fmt: skip
    return "float32 off by " + ", ".join(f"{v:.0e} on {k}" for k, v in off.items())


def gradients(subject: Subject) -> str:
    """Derivatives in random directions by autograd and by differences, in training and evaluation."""
    for shape in subject.shapes:
        for training in (True, False):
            layer = after(subject.build(shape=shape), 0 if training else 2, shape)
            steps, allowed = ((1e-6, 1e-7), 1e-5) if subject.in_float64 else ((1e-2,), 5e-2)
            off, what = worst_direction(layer, activations(shape), training, steps)
            mode = "training" if training else "evaluation"
            require(
                off <= WRONG, f"the gradient of {what} in {mode} is not that of the output (off by {off:.2g})"
            )
            if not off <= allowed:
                raise Doubtful(
                    f"the gradient of {what} in {mode} is not that of the output (off by {off:.2g}): "
                    "part of it is held constant"
                )
    return "gradients of the input and of every parameter are those of the output, by finite differences"


def worst_direction(layer: nn.Module, x: Tensor, training: bool, steps: Sequence[float]) -> tuple[float, str]:
    """The largest relative gap between autograd's derivative and that by differences, and of what.

    The closest of several steps counts: a kink of the output may lie within one.
    """
    upstream = activations(tuple(x.shape), seed=9)
    twin = copy.deepcopy(layer)
    x = x.clone().requires_grad_()
    twin.zero_grad()
    back(call(twin, x, training), upstream)
    analytic = {"the input": x.grad} | {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    worst = (0.0, "the input")
    generator = torch.Generator().manual_seed(5)
    for name, gradient in analytic.items():
        if gradient is None:
            continue
        directions = torch.randn((DIRECTIONS, *gradient.shape), generator=generator, dtype=torch.float64)
        exact = (directions * gradient).reshape(DIRECTIONS, -1).sum(1)
        gaps = []
        for h in steps:
            numeric = torch.tensor(
                [
                    moved(layer, x, training, name, h * d, upstream)
                    - moved(layer, x, training, name, -h * d, upstream)
                    for d in directions
                ],
                dtype=torch.float64,
            ) / (2 * h)
            size = max(numeric.norm().item(), exact.norm().item(), 1e-3)
            gaps.append((numeric - exact).norm().item() / size)
        worst = max(worst, (min(gaps), name))
    return worst


@torch.no_grad()
def moved(layer: nn.Module, x: Tensor, training: bool, name: str, by: Tensor, upstream: Tensor) -> float:
    """The output against `upstream` where the input, or a parameter of a copy, is moved."""
    other, z = copy.deepcopy(layer), x.detach().clone()
    (z if name == "the input" else dict(other.named_parameters())[name]).add_(by)
    return (call(other, z, training) * upstream).sum().item()


def autocast(subject: Subject) -> str:
    """Under bfloat16 autocast: dtype, values and state as without."""
    for dtype in (torch.float32, torch.bfloat16):
        layer, plain = subject.build(torch.float32), subject.build(torch.float32)
        x = activations(subject.maps, dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(layer, x, training=True)
        require(y.dtype == dtype, f"{dtype} in, {y.dtype} out")
        expected = call(plain, x, training=True)
        off = distance(y, expected)
        if not off <= 1e-5:
            raise Doubtful(f"autocast changes the output by {off:.1e} of the largest value")
        back(y)
        back(expected)
        kept = dict(plain.named_buffers())
        for key, buffer in layer.named_buffers():
            require(buffer.dtype == kept[key].dtype, f"autocast turns {key} to {buffer.dtype}")
            require(torch.equal(buffer, kept[key]), f"autocast changes {key}")
    return "under bfloat16 autocast: dtype, values and running state as without"


def compiles(subject: Subject, backend: str) -> str:
    """torch.compile as one graph: outputs, gradients and state of three training steps, then evaluation."""
    torch.compiler.reset()
    layer = subject.build(torch.float32).train()
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    def close(what: str, a: Tensor, b: Tensor) -> None:
        off = distance(a, b)
        require(off <= COMPILED, f"{backend}: {what} off by {off:.1e}")

    try:
        for seed in range(3):
            x = activations(subject.maps, torch.float32, seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                y, gradient = compiled_step(compiled, x)
                torch.manual_seed(seed)
                expected, wanted = compiled_step(plain, x)
            close("output", y, expected)
            close("input gradient", gradient, wanted)
        for (name, p), twin in zip(layer.named_parameters(), plain.parameters(), strict=True):
            if p.grad is not None and twin.grad is not None:
                gap = (p.grad - twin.grad).abs().max().item()
                if gap > COMPILED:  # else it may be what rounding left of a sum of zero
                    close(f"gradient of {name}", p.grad, twin.grad)
        for key, value in layer.state_dict().items():
            close(key, value, plain.state_dict()[key])
        layer.eval()
        plain.eval()
        close("evaluation", compiled(x), plain(x))
    except Broken:
        raise
    except Exception as error:
        raise Doubtful(f"{backend}: {first_line(error)[:160]}") from error
    finally:
        torch.compiler.reset()
    return (
        f"one graph ({backend}), with equal outputs, gradients and state over three steps, and in evaluation"
    )


def compiled_step(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of one training step, without touching the generator."""
    x = x.clone().requires_grad_()
    y = layer(x)
    back(y)
    assert x.grad is not None
    return y, x.grad
