"""The GPU's kernels, in Triton: the algorithm of `batch_norm.cpp` in three passes over memory.

    forward    measure the sample's parts → join them → apply to every position
    backward   sum over every position, writing dx off the sample → settle the sums → correct dx on the sample

A pass that adds up leaves one partial result per program in a workspace, and a small kernel adds those in
their order: no atomics, so equal inputs give equal bits. Programs work on tiles of (positions, channels); a
position p of x is the sample p // M and the place p % M of its map, so both memory formats are one kernel
with other strides. Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), as the tests
do; untested on CUDA.
"""

# Triton reads the kernels' annotations and arguments itself.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, type-arg"

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values of a tile
PROGRAMS_PER_PROCESSOR = 8


class Sampled(NamedTuple):
    """The grid of measured positions: its sizes along N, D, H, W and its steps."""

    n: int
    d: int
    h: int
    w: int
    step_n: int
    step_d: int
    step_h: int
    step_w: int

    @property
    def values(self) -> int:
        """Of a channel that are measured."""
        return self.n * self.d * self.h * self.w


@triton.jit
def _place(q, D, H, W, stride_n, stride_m, d, h, w, step_n, step_d, step_h, step_w):
    """Where in memory the q-th position of the sample's grid lies."""
    row = q // w
    n = (row // h // d * step_n).to(tl.int64)
    m = ((row // h % d * step_d) * H + row % h * step_h) * W + q % w * step_w
    return n * stride_n + m * stride_m


@triton.jit
def _measure(
    x, parts, C, count, each, D, H, W, stride_n, stride_m, stride_c,
    d, h, w, step_n, step_d, step_h, step_w, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean and squares about it of one split of the sample: parts[split] = (2, C)."""
    split = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    seen = 0.0
    for tile in range(each):
        q = (split * each + tile) * BP + tl.arange(0, BP)
        inside = (q < count)[:, None] & (c < C)[None, :]
        at = _place(q, D, H, W, stride_n, stride_m, d, h, w, step_n, step_d, step_h, step_w)
        v = tl.load(x + at[:, None] + c[None, :] * stride_c, mask=inside, other=0).to(tl.float32)
        here = tl.sum((q < count).to(tl.float32), 0)
        near = tl.sum(v, 0) / tl.maximum(here, 1.0)
        away = tl.where(inside, v - near[None, :], 0.0)
        share = here / tl.maximum(seen + here, 1.0)
        squares += tl.sum(away * away, 0) + (near - mean) * (near - mean) * seen * share
        mean += (near - mean) * share
        seen += here
    tl.store(parts + split * 2 * C + c, mean, mask=c < C)
    tl.store(parts + split * 2 * C + C + c, squares, mask=c < C)


@triton.jit
def _join(parts, mean, var, C, count, per_split, splits, BS: tl.constexpr, BC: tl.constexpr):
    """The moments (C,) of all splits together, var ÷n."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    inside = (s < splits)[:, None] & (c < C)[None, :]
    at = parts + s[:, None] * 2 * C + c[None, :]
    means = tl.load(at, mask=inside, other=0)
    squares = tl.load(at + C, mask=inside, other=0)
    n = tl.minimum(tl.maximum(count - s * per_split, 0), per_split).to(tl.float32)[:, None]
    whole = tl.sum(means * n, 0) / count
    away = tl.where(inside, means - whole[None, :], 0.0)
    tl.store(mean + c, whole, mask=c < C)
    tl.store(var + c, tl.sum(squares + n * away * away, 0) / count, mask=c < C)


@triton.jit
def _channel(weight, bias, mean, var, c, C, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What a channel's values are normalized by: mean, 1 / sqrt(var + eps), weight times that, bias."""
    center = tl.load(mean + c, mask=c < C, other=0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.load(var + c, mask=c < C, other=1).to(tl.float32) + eps)
    scale = inverse
    shift = tl.zeros_like(inverse)
    if HAS_WEIGHT:
        scale = inverse * tl.load(weight + c, mask=c < C, other=0).to(tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    return center, inverse, scale, shift


@triton.jit
def _apply(
    x, y, weight, bias, mean, var, C, P, M, stride_n, stride_m, stride_c, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) * scale + shift) of one tile."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    center, _, scale, shift = _channel(weight, bias, mean, var, c, C, eps, HAS_WEIGHT, HAS_BIAS)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = (p // M * stride_n + p % M * stride_m)[:, None] + c[None, :] * stride_c
    v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    v = (v - center[None, :]) * scale[None, :] + shift[None, :]
    if RELU:
        v = tl.where(v <= 0, 0.0, v)  # a NaN passes
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    dy, x, dx, weight, bias, mean, var, parts, C, P, M, H, W, each, stride_n, stride_m, stride_c,
    step_n, step_d, step_h, step_w, eps, SAMPLE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """S and Q of one split: parts[split] = (2, C); off the sample dx too. SAMPLE: none, some or all."""
    split = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    center, _, scale, shift = _channel(weight, bias, mean, var, c, C, eps, HAS_WEIGHT, HAS_BIAS)
    S = tl.zeros((BC,), tl.float32)
    Q = tl.zeros((BC,), tl.float32)
    for tile in range(each):
        p = (split * each + tile).to(tl.int64) * BP + tl.arange(0, BP)
        n = p // M
        m = p % M
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = (n * stride_n + m * stride_m)[:, None] + c[None, :] * stride_c
        away = tl.load(x + at, mask=inside, other=0).to(tl.float32) - center[None, :]
        g = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
        if RELU:
            g = tl.where(away * scale[None, :] + shift[None, :] <= 0, 0.0, g)
        S += tl.sum(g, 0)
        Q += tl.sum(tl.where(inside, g * away, 0.0), 0)
        if SAMPLE != "all":
            off = inside
            if SAMPLE == "some":
                on = (n % step_n == 0) & (m // W // H % step_d == 0) & (m // W % H % step_h == 0)
                off = inside & ~(on & (m % W % step_w == 0))[:, None]
            tl.store(dx + at, (g * scale[None, :]).to(dx.dtype.element_ty), mask=off)
    tl.store(parts + split * 2 * C + c, S, mask=c < C)
    tl.store(parts + split * 2 * C + C + c, Q, mask=c < C)


@triton.jit
def _settle(parts, var, dweight, dbias, C, splits, eps, BS: tl.constexpr, BC: tl.constexpr):
    """dweight = Q / sqrt(var + eps) and dbias = S, (C,), of all splits."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    inside = (s < splits)[:, None] & (c < C)[None, :]
    at = parts + s[:, None] * 2 * C + c[None, :]
    inverse = 1.0 / tl.sqrt(tl.load(var + c, mask=c < C, other=1).to(tl.float32) + eps)
    tl.store(dbias + c, tl.sum(tl.load(at, mask=inside, other=0), 0), mask=c < C)
    tl.store(dweight + c, tl.sum(tl.load(at + C, mask=inside, other=0), 0) * inverse, mask=c < C)


@triton.jit
def _correct(
    dy, x, dx, weight, bias, mean, var, dweight, dbias, C, count, D, H, W, stride_n, stride_m, stride_c,
    d, h, w, step_n, step_d, step_h, step_w, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = scale * (g - S / n - (x - mean) * Q / (n * (var + eps))) of one tile of the sample."""
    q = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    center, inverse, scale, shift = _channel(weight, bias, mean, var, c, C, eps, HAS_WEIGHT, HAS_BIAS)
    per_value = tl.load(dbias + c, mask=c < C, other=0) / count
    per_distance = tl.load(dweight + c, mask=c < C, other=0) * inverse / count
    inside = (q < count)[:, None] & (c < C)[None, :]
    place = _place(q, D, H, W, stride_n, stride_m, d, h, w, step_n, step_d, step_h, step_w)
    at = place[:, None] + c[None, :] * stride_c
    away = tl.load(x + at, mask=inside, other=0).to(tl.float32) - center[None, :]
    g = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    if RELU:
        g = tl.where(away * scale[None, :] + shift[None, :] <= 0, 0.0, g)
    v = (g - per_value[None, :] - away * per_distance[None, :]) * scale[None, :]
    tl.store(dx + at, v.to(dx.dtype.element_ty), mask=inside)


class Launch(NamedTuple):
    """How a tensor is cut into tiles."""

    sizes: tuple[int, int, int]  # D, H, W
    strides: tuple[int, int, int]  # of N, of a position of the map, of C
    positions: int  # of a tile
    channels: int  # of a tile
    channel_blocks: int


def _launch(x: Tensor) -> Launch:
    from normbench.kernels import channels_last

    c, sizes = x.shape[1], (*(1,) * (5 - x.ndim), *x.shape[2:])
    m = math.prod(sizes)
    last = channels_last(x) or m == 1
    channels = min(128, triton.next_power_of_2(c)) if last else 1
    strides = (m * c, c, 1) if last else (m * c, 1, m)
    d, h, w = sizes
    return Launch(
        (d, h, w), strides, (TILE if last else 1024) // channels, channels, triton.cdiv(c, channels)
    )


def _sampled(x: Tensor, steps: Sequence[int]) -> Sampled:
    gap = (1,) * (5 - x.ndim)
    sizes, every = (x.shape[0], *gap, *x.shape[2:]), (steps[0], *gap, *steps[1:])
    grid = [triton.cdiv(size, step) for size, step in zip(sizes, every, strict=True)]
    return Sampled(*grid, *every)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _splits(tiles: int, launch: Launch, device: torch.device) -> tuple[int, int]:
    """Into how many splits so many tiles are cut, and the tiles of each."""
    wanted = max(1, _processors(device) * PROGRAMS_PER_PROCESSOR // launch.channel_blocks)
    each = triton.cdiv(tiles, min(wanted, 1024))
    return triton.cdiv(tiles, each), each


def _reduction(splits: int, c: int) -> tuple[int, int, tuple[int]]:
    """Tile of the kernel that joins splits, (BS, BC), and its grid."""
    rows = triton.next_power_of_2(splits)
    channels = max(1, min(triton.next_power_of_2(c), 8192 // rows))
    return rows, channels, (triton.cdiv(c, channels),)


def _on_its_device(launch):
    """Triton launches on the current device, which need not be the first tensor's."""

    @functools.wraps(launch)
    def there(tensor, *args):
        with torch.cuda.device_of(tensor):  # nothing on the CPU
            return launch(tensor, *args)

    return there


@_on_its_device
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    steps: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var of a dense x; without `steps` mean and var are given and stay."""
    launch, c = _launch(x), x.shape[1]
    positions = x.numel() // c
    if mean is None or var is None:
        mean, var = x.new_empty(c, dtype=torch.float32), x.new_empty(c, dtype=torch.float32)
        grid = _sampled(x, steps)
        splits, each = _splits(triton.cdiv(grid.values, launch.positions), launch, x.device)
        parts = x.new_empty((splits, 2, c), dtype=torch.float32)
        _measure[(splits, launch.channel_blocks)](
            x, parts, c, grid.values, each, *launch.sizes, *launch.strides, *grid[1:],
            BP=launch.positions, BC=launch.channels,
        )  # fmt: skip
        rows, channels, blocks = _reduction(splits, c)
        _join[blocks](parts, mean, var, c, grid.values, each * launch.positions, splits, BS=rows, BC=channels)
    y = torch.empty_like(x)
    _apply[(triton.cdiv(positions, launch.positions), launch.channel_blocks)](
        x, y, weight, bias, mean, var, c, positions, math.prod(launch.sizes), *launch.strides, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, RELU=relu,
        BP=launch.positions, BC=launch.channels,
    )  # fmt: skip
    return y, mean, var


@_on_its_device
def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    steps: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, for dy as dense as x."""
    launch, c = _launch(x), x.shape[1]
    positions, (_, height, width) = x.numel() // c, launch.sizes
    dx, dweight = torch.empty_like(x), x.new_empty(c, dtype=torch.float32)
    dbias = torch.empty_like(dweight)
    options: dict[str, Any] = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "RELU": relu}
    tile = {"BP": launch.positions, "BC": launch.channels}
    every = (steps[0], *(1,) * (5 - x.ndim), *steps[1:]) if steps else (1, 1, 1, 1)
    splits, each = _splits(triton.cdiv(positions, launch.positions), launch, x.device)
    parts = x.new_empty((splits, 2, c), dtype=torch.float32)
    _sum[(splits, launch.channel_blocks)](
        dy, x, dx, weight, bias, mean, var, parts, c, positions, math.prod(launch.sizes), height, width, each,
        *launch.strides, *every, eps,
        SAMPLE="none" if not steps else "all" if max(every) == 1 else "some", **options, **tile,
    )  # fmt: skip
    rows, channels, blocks = _reduction(splits, c)
    _settle[blocks](parts, var, dweight, dbias, c, splits, eps, BS=rows, BC=channels)
    if steps:
        grid = _sampled(x, steps)
        _correct[(triton.cdiv(grid.values, launch.positions), launch.channel_blocks)](
            dy, x, dx, weight, bias, mean, var, dweight, dbias, c, grid.values, *launch.sizes,
            *launch.strides, *grid[1:], eps, **options, **tile,
        )  # fmt: skip
    return dx, dweight, dbias
