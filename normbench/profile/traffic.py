"""The least bytes that a norm layer has to move: what it must see before it can write is found by probing it.

    forward    (1 + f) · x + y             x read, y written, and the share f of x that has to be seen first
    backward   (1 + g) · (x + dy) + dx     the same of what gradients of other values flow through

In tensors of one type that is 2 + f and 3 + 2g: 3 and 5 for batch norm, where f = g = 1. A layer whose output
depends on other samples has to see them, or the sample that its statistics come from, before it writes. One
that stays within a sample has f = g = 0: it is granted a cache that holds the sample. Along a row that is
contiguous in memory no position can be skipped, since memory is read in longer pieces: channels first, shares
are of rows.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SAMPLES = 16  # at most, of the batch that is probed


def bytes_of(
    layer: nn.Module,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: torch.memory_format,
    device: torch.device,
) -> tuple[int, int] | None:
    """Bytes that the layer moves at least in forward and backward; None where it cannot be told.

    Args:
        shape, layout: of its input (N, C, *).
        dtypes: of its input and of its output.
    """
    samples = min(max(shape[0], 2), SAMPLES)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((samples, *shape[1:]), generator=generator).to(device).contiguous(memory_format=layout)
    try:
        shares = shares_of(layer, x, layout == torch.channels_last)
    except (ValueError, TypeError, RuntimeError):  # it takes no float32, or not so few samples
        return None
    if shares is None:
        return 0, 0
    f, g = shares
    read, written = (torch.Size(shape).numel() * dtype.itemsize for dtype in dtypes)
    return round((1 + f) * read + written), round((1 + g) * (read + written) + read)


def shares_of(layer: nn.Module, x: Tensor, channels_last: bool) -> tuple[float, float] | None:
    """f and g of these inputs; None for a layer that hands its input on."""
    y, reached = probed(layer, x, 0)
    if y is None:
        return None
    others = reached.clone()
    others[0] = False  # its own sample's
    unseen = (~others).reshape(len(x), 1, *x.shape[2:]).expand_as(x).clone()
    unseen[0] = False
    hidden, _ = probed(layer, torch.where(unseen, 3 * x + 1, x), 0)
    assert hidden is not None
    more = not torch.allclose(y, hidden, rtol=1e-5, atol=1e-6)  # than gradients tell: ranks, detached moments
    g = 0.0
    if others.any():
        reached[0, -1] = others[:, -1].any()  # not what it got from its own input
        last = len(x) - 1
        if not torch.equal(others[1:last], probed(layer, x, last)[1][1:last]):
            reached = by_all(layer, x)  # each part of the batch by itself
        if x.ndim > 2 and not channels_last:
            reached = reached.reshape(len(x), -1, x.shape[-1]).any(-1)
        g = float(reached.float().mean())
    return 1.0 if more else g, g


def by_all(layer: nn.Module, x: Tensor) -> Tensor:
    """The positions (N, positions) that any sample's output reaches in other samples."""
    found = torch.zeros(len(x), x[0, 0].numel(), dtype=torch.bool, device=x.device)
    for sample in range(len(x)):
        reached = probed(layer, x, sample)[1]
        reached[sample] = False
        found |= reached
    return found


def probed(layer: nn.Module, x: Tensor, sample: int) -> tuple[Tensor | None, Tensor]:
    """A fresh copy's output (C,) at a sample's last position, None where the output is the input; and the
    positions (N, positions) of x that its gradient reaches."""
    twin, x = copy.deepcopy(layer).float().train(), x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(0)
        y: Tensor = twin(x)
    if y is x:
        return None, torch.zeros(0)
    values = y[sample].reshape(y.shape[1], -1)[:, -1]  # strided samples begin at the other end
    weights = torch.linspace(1, 2, len(values), device=x.device)
    (gradient,) = torch.autograd.grad((values * weights).sum(), x, allow_unused=True)
    reached = torch.zeros_like(x, dtype=torch.bool) if gradient is None else gradient != 0
    return values.detach(), reached.any(1).flatten(1) if x.ndim > 2 else reached.any(1, keepdim=True)
