"""The Triton kernels against the C++ ones in float64, on CPU tensors in Triton's interpreter."""

import torch
from torch import Tensor

from normbench.kernels import cpu, cuda

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
CASES: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool, bool, bool]] = [
    # shape, steps, dtype, channels last, relu, affine
    ((40, 6), (1,), torch.float32, False, True, True),
    ((4, 6, 9), (1, 2), torch.float32, False, False, True),
    ((3, 5, 9, 7), (1, 1, 1), torch.float32, False, True, True),
    ((3, 5, 9, 7), (1, 2, 2), torch.float32, False, True, True),
    ((3, 5, 9, 7), (1, 2, 2), torch.float32, True, True, True),
    ((3, 5, 9, 7), (2, 1, 1), torch.bfloat16, True, False, True),
    ((4, 5, 9, 7), (1, 4, 1), torch.float16, True, True, False),
    ((4, 5, 9, 7), (1, 4, 4), torch.bfloat16, False, True, False),
    ((2, 3, 33, 40), (1, 4, 4), torch.float32, False, False, True),
    ((2, 3, 4, 5, 6), (1, 2, 2, 2), torch.float32, True, True, True),
    ((4, 130, 3, 3), (1, 1, 1), torch.float32, True, True, True),
    ((4, 130, 3, 3), (1, 2, 2), torch.float16, True, False, True),
]


def laid(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=LAST[x.ndim]) if last else x


def wrong(
    shape: tuple[int, ...], steps: tuple[int, ...], dtype: torch.dtype, last: bool, relu: bool, affine: bool
) -> list[str]:
    """What differs in one case: measured and given moments, both passes, equal bits twice."""
    torch.manual_seed(0)
    x, dy = (laid(t.to(dtype), last) for t in (2 * torch.randn(shape) + 3, torch.randn(shape)))
    w, b = (torch.randn(shape[1]), torch.randn(shape[1])) if affine else (None, None)
    exact = [None if t is None else t.double() for t in (x, w, b)]
    y, mean, var = cuda.forward(x, w, b, None, None, steps, 1e-5, relu)
    checked = {"forward": ((y, mean, var), cpu.forward(*exact, None, None, steps, 1e-5, relu))}
    for name, every in (("measured", steps), ("given", ())):
        got = cuda.backward(dy, x, w, b, mean, var, every, 1e-5, relu)
        doubled = cpu.backward(dy.double(), *exact, mean.double(), var.double(), every, 1e-5, relu)
        checked[name] = got, doubled
    found = [
        f"{name}: {shape} {steps} {dtype}"
        for name, (got, wanted) in checked.items()
        for a, b in zip(got, wanted, strict=True)
        if not (a.double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()
    ]
    twice = cuda.backward(dy, x, w, b, mean, var, (), 1e-5, relu)
    if not all(torch.equal(a, b) for a, b in zip(checked["given"][0], twice, strict=True)):
        found.append(f"not deterministic: {shape}")
    half = [None if t is None else t.bfloat16() for t in (w, b, mean, var)]  # model.bfloat16()'s
    wide = [None if t is None else t.float() for t in half]
    narrowed, widened = (cuda.backward(dy, x, *own, (), 1e-5, relu) for own in (half, wide))
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(narrowed, widened, strict=True)):
        found.append(f"moments in bfloat16: {shape}")
    if not torch.equal(cuda.forward(x, w, b, mean, var, (), 1e-5, relu)[0], y):
        found.append(f"given moments: {shape}")
    return found


mistakes = [line for case in CASES for line in wrong(*case)]
print(*mistakes, sep="\n", end="\n" if mistakes else "")
print(f"{len(CASES)} cases, {len(mistakes)} wrong")
