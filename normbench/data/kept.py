"""Decoded images kept in memory that loading processes share: each file is decoded once, where all fit."""

import contextlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from normbench.device import slots

SHARE = 0.5  # of the memory that is free, divided by the slots of this machine


@dataclass(frozen=True)
class Kept:
    """uint8 images (N, C, H, W) and which of them are there (N,); forked workers fill what all then read."""

    images: Tensor
    there: Tensor

    @classmethod
    def of(cls, count: int, shape: tuple[int, int, int]) -> "Kept":
        """Room for so many; takes no memory before it is filled."""
        images = torch.frombuffer(mmap.mmap(-1, bytes_of(count, shape)), dtype=torch.uint8)
        there = torch.frombuffer(mmap.mmap(-1, count), dtype=torch.bool)
        return cls(images.view(count, *shape), there)

    def get(self, index: int) -> Tensor | None:
        """One image (C, H, W), or None where it has to be decoded yet; not to be written to."""
        return self.images[index] if self.there[index] else None

    def put(self, index: int, image: Tensor) -> None:
        """Keep one; two workers that come together write the same bytes."""
        self.images[index] = image
        self.there[index] = True


_kept: dict[tuple[object, ...], Kept | None] = {}  # None: it did not fit


def room_for(
    key: tuple[object, ...], count: int, shape: tuple[int, int, int], wanted: bool | None
) -> Kept | None:
    """The process's store of that name, which its sessions and settings share; None where there is none.

    Whether it fits is decided once: it is asked for with every image, by loading processes too.

    Args:
        wanted: True always, False never, None where all fit into SHARE of the free memory.
    """
    if wanted is False:
        return None
    if key not in _kept or (wanted and _kept[key] is None):
        promised = sum(kept.images.numel() for kept in _kept.values() if kept)
        fits = promised + bytes_of(count, shape) <= SHARE * free_memory()
        _kept[key] = Kept.of(count, shape) if wanted or fits else None
    return _kept[key]


def bytes_of(count: int, shape: tuple[int, int, int]) -> int:
    """What so many decoded images take."""
    channels, height, width = shape
    return count * channels * height * width


def free_memory() -> float:
    """Bytes that this slot of the machine may take, by the system and by its control group; 0 if unknown."""
    free = 0.0
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
        free = min(free, limit - used)
    return free / slots()
