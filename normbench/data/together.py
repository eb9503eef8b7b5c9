"""Training batches of several sessions side by side: each its own order and augmentation, one gathering."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from normbench.data.loading import TrainPart
from normbench.data.resident import Resident
from normbench.seeds import Seeds


def batches_of(
    part: TrainPart, sessions: Sequence[Seeds], epoch: int, start_step: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches of one session, or of several: x (N, sessions · C, H, W) and y (N, sessions).

    Each session's part of a batch is what `TrainPart.batches` gives it alone.
    """
    if len(sessions) == 1:
        yield from part.batches(sessions[0], epoch, start_step)
    elif isinstance(part.source, Resident) and not part.source.augment.any:
        orders = torch.stack([part.order(seeds, epoch) for seeds in sessions], 1)  # (n, sessions)
        rows = torch.split(orders, part.batch_size)[start_step : part.steps_per_epoch]
        for at, (x, y) in zip(rows, part.source.plain([at.flatten() for at in rows]), strict=True):
            yield side_by_side(part, x, at.shape[1]), y.view(at.shape)
    else:
        streams = [part.batches(seeds, epoch, start_step) for seeds in sessions]
        for batches in zip(*streams, strict=True):
            x = torch.stack([x for x, _ in batches], 1).flatten(0, 1)
            yield side_by_side(part, x, len(sessions)), torch.stack([y for _, y in batches], 1)


def side_by_side(part: TrainPart, x: Tensor, sessions: int) -> Tensor:
    """(N · sessions, C, H, W), a sample's sessions in a row → (N, sessions · C, H, W) in the asked format."""
    wide = x.reshape(-1, sessions * x.shape[1], *x.shape[2:])
    return wide.contiguous(memory_format=part.source.normalize.memory_format)
