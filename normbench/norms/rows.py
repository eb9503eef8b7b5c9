"""One row of values per channel, and back to the shape and the memory format that they came from."""

import torch
from torch import Tensor


def to_rows(x: Tensor) -> Tensor:
    """(N, C, *) → (C, N · positions); no copy of channels-last maps."""
    return x.transpose(0, 1).flatten(1)


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """(C, N · positions) → the shape and memory format of `x`."""
    y = rows.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and x.is_contiguous(memory_format=last):
        return y.contiguous(memory_format=last)
    return y.contiguous()
