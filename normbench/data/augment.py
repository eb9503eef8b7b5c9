"""Random changes to a batch of images, as pure functions of the images and a CPU generator.

Each function draws all its numbers at once, in the order its docstring says, on the CPU, so that equal keys
give equal images on every device. Sizes: N images, C channels, H rows, W columns.
Images that are a share of a batch draw the whole batch's numbers and keep their own.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class Share(NamedTuple):
    """Which of a batch's `total` images are meant: those `at`."""

    total: int
    at: slice


def all_of(images: Tensor) -> Share:
    """The images are the batch."""
    return Share(len(images), slice(None))


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers drawn on the CPU, on the device; a GPU fetches them from pinned memory, and nobody waits."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def pad(images: Tensor, padding: int, mode: str) -> Tensor:
    """(N, C, H, W) → (N, C, H + 2·padding, W + 2·padding), mode zero or reflect (padding < H, W)."""
    if mode == "zero":
        return functional.pad(images, [padding] * 4)
    if mode != "reflect":
        raise ValueError(f"mode must be zero or reflect, got {mode!r}")
    *_, height, width = images.shape
    for size in (height, width):
        if padding >= size:
            raise ValueError(f"padding must be below {size} with mode reflect, got {padding}")
    padded = functional.pad(images, [padding] * 4)  # torch's own reflection does not take uint8
    for dim, size in ((2, height), (3, width)):  # each row mirrored, then each column of what that gave
        inside = padded.narrow(dim, padding, size)
        padded.narrow(dim, 0, padding).copy_(inside.narrow(dim, 1, padding).flip(dim))
        after = inside.narrow(dim, size - 1 - padding, padding)
        padded.narrow(dim, padding + size, padding).copy_(after.flip(dim))
    return padded


def crop_at(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """The (height, width) window of each image whose upper left corner is (top, left), both (N,) int64.

    Keeps the memory format. On the CPU numpy copies whole windows, where torch would copy pixel by pixel.
    """
    if nhwc(images):
        windows = in_memory(images).unfold(1, height, 1).unfold(2, width, 1)
        windows = windows.permute(0, 1, 2, 4, 5, 3)  # (N, tops, lefts, height, width, C), a view
        return picked(windows, top, left).permute(0, 3, 1, 2)
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    return picked(windows.permute(0, 2, 3, 1, 4, 5), top, left)  # (N, tops, lefts, C, height, width)


def picked(windows: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """windows[i, top[i], left[i]] for every i."""
    if windows.device.type == "cpu" and windows.dtype != torch.bfloat16:  # which numpy has not
        each = np.arange(len(windows))
        return torch.from_numpy(windows.numpy()[each, top.numpy(), left.numpy()])
    sample = torch.arange(len(windows), device=windows.device)
    return windows[sample, sent(top, windows.device), sent(left, windows.device)]


def taken(images: Tensor, at: Tensor) -> Tensor:
    """Some of the images, by number (n,) on their device, in their memory format (index_select loses it)."""
    chosen = in_memory(images).index_select(0, at)
    return chosen.permute(0, 3, 1, 2) if nhwc(images) else chosen


def in_memory(images: Tensor) -> Tensor:
    """The images with their axes in the order in which they lie in memory, a view."""
    return images.permute(0, 2, 3, 1) if nhwc(images) else images


def nhwc(images: Tensor) -> bool:
    """Whether the images lie channels last, and not both ways at once."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def random_crop(
    images: Tensor, padding: int, mode: str, generator: torch.Generator, share: Share | None = None
) -> Tensor:
    """Pad every side, then cut each image back to its size at its own place: (N, C, H, W) → (N, C, H, W).

    Draws: N tops, then N lefts, each 0 … 2·padding. Zero padding is black before normalisation.
    """
    total, at = share or all_of(images)
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, total), generator=generator)[:, at]
    height, width = images.shape[2:]
    return crop_at(pad(images, padding, mode), tops, lefts, height, width)


def random_flip(images: Tensor, p: float, generator: torch.Generator, share: Share | None = None) -> Tensor:
    """Mirror each image left to right with probability p: (N, C, H, W) → (N, C, H, W). Draws: N uniforms."""
    total, at = share or all_of(images)
    chosen = sent((torch.rand(total, generator=generator)[at] < p).nonzero()[:, 0], images.device)
    lying, columns = in_memory(images), 2 if nhwc(images) else 3
    mirrored = lying.index_select(0, chosen).flip(columns)
    flipped = lying.clone().index_copy_(0, chosen, mirrored)
    return flipped.permute(0, 3, 1, 2) if nhwc(images) else flipped


def cutout_holes(
    num_images: int, height: int, width: int, side: int, p: float, generator: torch.Generator
) -> Tensor:
    """Square holes as (N, 4) int64 of top, left, bottom, right (ends excluded); all 0 where there is none.

    The centre is uniform over the image; what lies outside is lost, so a hole has at most side² pixels.
    Draws: N uniforms (a hole where below p), N rows, N columns.
    """
    chosen = torch.rand(num_images, generator=generator) < p
    row = torch.randint(0, height, (num_images,), generator=generator)
    column = torch.randint(0, width, (num_images,), generator=generator)
    top, left = row - side // 2, column - side // 2
    holes = torch.stack(
        [top.clamp(min=0), left.clamp(min=0), (top + side).clamp(max=height), (left + side).clamp(max=width)],
        1,
    )
    return holes * chosen[:, None]


def fill_holes(images: Tensor, holes: Tensor) -> Tensor:
    """`images` (N, C, H, W) with 0 inside each image's hole (N, 4); memory format kept."""
    top, left, bottom, right = sent(holes, images.device)[:, :, None].unbind(1)  # (N, 1) each
    row = torch.arange(images.shape[2], device=images.device)
    column = torch.arange(images.shape[3], device=images.device)
    in_rows = (row >= top) & (row < bottom)  # (N, H)
    in_columns = (column >= left) & (column < right)  # (N, W)
    hole = in_rows[:, :, None] & in_columns[:, None, :]  # (N, H, W)
    return images.clone().masked_fill_(hole[:, None], 0)  # masked_fill alone loses channels last


def random_cutout(
    images: Tensor, side: int, p: float, generator: torch.Generator, share: Share | None = None
) -> Tensor:
    """Put 0 into a square of an image with probability p: (N, C, H, W) → the same. Draws: cutout_holes'."""
    total, at = share or all_of(images)
    holes = cutout_holes(total, images.shape[2], images.shape[3], side, p, generator)
    return fill_holes(images, holes[at])


def random_resized_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random part of an image: 8-100 % of its area, sides 3:4 to 4:3.

    torchvision's RandomResizedCrop: the first of ten tries that fits, else the middle at the nearest legal
    ratio. Draws: 10 × 4 uniforms (area, ratio, top, left of each try), used or not.
    """
    low, high = 3 / 4, 4 / 3
    for area, ratio, top, left in torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist():
        area = height * width * (0.08 + area * 0.92)
        ratio = low * (high / low) ** ratio
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h
