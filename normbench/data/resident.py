"""Images held in memory on the device: a batch is gathered, augmented and normalised there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normbench.data.augment import (
    Share,
    in_memory,
    nhwc,
    random_crop,
    random_cutout,
    random_flip,
    sent,
    taken,
)
from normbench.data.options import Augment, DatasetOptions
from normbench.data.reading import Images
from normbench.seeds import Seeds

Own = Callable[[int], slice]  # where this process's share of a batch of so many images lies


class Normalizer:
    """uint8 (N, C, H, W) → float32 (x/255 - mean)/std, channels last if asked.

    What is channels last already is seen as rows of W·C numbers, which are faster to normalise than C by C.
    """

    def __init__(self, options: DatasetOptions, device: torch.device, channels_last: bool) -> None:
        # with mean 0 and std 1 this divides by 255, exactly as torchvision's ToTensor
        channels, _, width = options.shape
        self.mean, self.std = (
            (torch.tensor(values, dtype=torch.float64) * 255).float().expand(channels).to(device)
            for values in (options.mean, options.std)
        )
        self.row_mean, self.row_std = (values.repeat(width) for values in (self.mean, self.std))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32, memory_format=self.memory_format)
        if nhwc(x):
            in_memory(x).flatten(2).sub_(self.row_mean).div_(self.row_std)
            return x
        return x.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])


@dataclass(frozen=True)
class Resident:
    """Batches from images in memory; `rows` are the images of each batch, (n,) int64 on the CPU."""

    data: Images
    augment: Augment
    normalize: Normalizer

    @property
    def labels(self) -> Tensor:
        """Of all images, (N,)."""
        return self.data.labels

    def augmented(
        self, rows: Sequence[Tensor], seeds: Seeds, epoch: int, first_step: int, own: Own
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches; the random numbers of step s come from the key ("augment", epoch, s)."""
        augment = self.augment
        for step, whole in enumerate(rows, first_step):
            share = Share(len(whole), own(len(whole)))
            images, labels = self._gather(whole[share.at])
            generator = seeds.generator("augment", epoch, step)
            if augment.crop:
                images = random_crop(images, augment.crop, augment.crop_padding, generator, share)
            if augment.flip:
                images = random_flip(images, augment.flip, generator, share)
            x = self.normalize(images)
            if augment.cutout:
                x = random_cutout(x, augment.cutout, augment.cutout_p, generator, share)
            yield x, labels

    def plain(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as they are, only normalised."""
        for at in rows:
            images, labels = self._gather(at)
            yield self.normalize(images), labels

    def _gather(self, at: Tensor) -> tuple[Tensor, Tensor]:
        at = sent(at, self.data.images.device)
        return taken(self.data.images, at), self.data.labels.index_select(0, at)
