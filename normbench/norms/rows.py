"""One row of values per channel, and back to the shape and the memory format that they came from."""

from torch import Tensor

from normbench.norms.base import laid_out_as


def to_rows(x: Tensor) -> Tensor:
    """(N, C, *) → (C, N · positions); no copy of channels-last maps."""
    return x.transpose(0, 1).flatten(1)


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """(C, N · positions) → the shape and memory format of `x`."""
    return laid_out_as(rows.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1), x)
