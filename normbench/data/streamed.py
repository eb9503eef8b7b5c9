"""Images read from files while training, by worker processes whose number changes nothing but the speed."""

import contextlib
import signal
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normbench.data.augment import cutout_holes, fill_holes, random_crop, random_flip, random_resized_box
from normbench.data.kept import Kept, room_for
from normbench.data.options import DatasetOptions
from normbench.data.reading import Files, one_line
from normbench.data.resident import Normalizer, Own
from normbench.seeds import Seeds
from normbench.values import Refused

STOPS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
_Key = tuple[Seeds | None, int, int]  # whose random numbers (None: no augmentation), epoch, image
_Sample = tuple[Tensor, Tensor, int]  # image (C, H, W) uint8, hole (4,), label


class _Decoded(Dataset[_Sample | str]):
    """One image by its key, decoded, resized and augmented; a message where the file is no image."""

    def __init__(self, files: Files, options: DatasetOptions) -> None:
        self.files = files
        self.options = options

    def __getitem__(self, key: _Key) -> _Sample | str:
        seeds, epoch, index = key
        generator = None if seeds is None else seeds.generator("augment", epoch, index)
        kept = self.kept(augmented=generator is not None)
        image = None if kept is None else kept.get(index)
        if image is None:
            picture = self._read(index)
            if isinstance(picture, str):
                return picture
            picture = resized(picture, self.options, generator)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            if kept is not None:
                kept.put(index, image)
        images = image[None]  # a batch of one
        hole = torch.zeros(1, 4, dtype=torch.int64)
        if generator is not None:
            images, hole = self._augmented(images, hole, generator)
        return images[0].contiguous(), hole[0], int(self.files.labels[index])

    def kept(self, augmented: bool) -> Kept | None:
        """Where images of the model's size are kept; none for those that are cut at random first."""
        options, resize = self.options, self.options.resize
        if resize == "random_resized_crop":
            if augmented:
                return None
            resize = "center_crop"
        name = (self.files.root, self.files.paths[0], len(self.files.paths), resize, options.shape)
        return room_for(name, len(self.files.paths), options.shape, options.cache)

    def _read(self, index: int) -> Image.Image | str:
        path = self.files.path(index)
        try:
            with warnings.catch_warnings():  # ImageNet holds whole pictures with damaged EXIF
                warnings.simplefilter("ignore")
                with Image.open(path) as file:
                    return file.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            return f"dataset={self.options.name}: {path} cannot be read as an image ({one_line(error)})"

    def _augmented(self, images: Tensor, hole: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        augment = self.options.augment
        if augment.crop:
            images = random_crop(images, augment.crop, augment.crop_padding, generator)
        if augment.flip:
            images = random_flip(images, augment.flip, generator)
        if augment.cutout:
            _, height, width = self.options.shape
            hole = cutout_holes(1, height, width, augment.cutout, augment.cutout_p, generator)
        return images, hole


def resized(picture: Image.Image, options: DatasetOptions, generator: torch.Generator | None) -> Image.Image:
    """The picture at the model's size, by `options.resize`; bilinear with antialiasing, as Pillow does it."""
    _, height, width = options.shape
    bilinear = Image.Resampling.BILINEAR
    if options.resize == "squash":
        return picture.resize((width, height), bilinear)
    if options.resize == "random_resized_crop" and generator is not None:
        box = random_resized_box(picture.height, picture.width, generator)
        return picture.crop(box).resize((width, height), bilinear)
    scale = max(height / picture.height, width / picture.width) * 256 / 224
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), bilinear)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _collated(samples: list[_Sample | str]) -> tuple[Tensor, Tensor, Tensor] | str:
    """Images, holes and labels of a batch, or the first sample's message that something is wrong."""
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        good.append(sample)
    images, holes, labels = zip(*good, strict=True)
    return torch.stack(images), torch.stack(holes), torch.tensor(labels)


def _ignore_signals(worker: int) -> None:
    """Stop requests are for the training process, which ends its workers itself."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Stop requests wait meanwhile; a process made meanwhile never gets any, from its first moment on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class Streamed:
    """Batches from image files; `rows` are the images of each batch, (n,) int64."""

    files: Files
    options: DatasetOptions
    normalize: Normalizer
    device: torch.device

    @property
    def labels(self) -> Tensor:
        """Of all images, (N,)."""
        return self.files.labels

    def augmented(
        self, rows: Sequence[Tensor], seeds: Seeds, epoch: int, first_step: int, own: Own
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches; the random numbers of image i come from the key ("augment", epoch, i)."""
        shares = (whole[own(len(whole))] for whole in rows)
        return self._batches([[(seeds, epoch, index) for index in at.tolist()] for at in shares])

    def plain(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as they are, only resized and normalised."""
        return self._batches([[(None, 0, index) for index in at.tolist()] for at in rows])

    def _batches(self, keys: list[list[_Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._raw(keys):
            if isinstance(batch, str):
                raise Refused(batch)
            images, holes, labels = (part.to(self.device, non_blocking=True) for part in batch)
            x = self.normalize(images)
            yield (fill_holes(x, holes) if self.options.augment.cutout else x), labels

    def _raw(self, keys: list[list[_Key]]) -> Iterator[tuple[Tensor, Tensor, Tensor] | str]:
        """The DataLoader's batches, by fresh workers, so that several epochs may be read side by side."""
        images = _Decoded(self.files, self.options)
        wanted = [key for batch in keys for key in batch]
        kept = images.kept(augmented=any(seeds for seeds, *_ in wanted))  # before the workers that share it
        all_kept = kept is not None and bool(kept.there[[index for *_, index in wanted]].all())
        workers = 0 if all_kept else self.options.workers
        with warnings.catch_warnings():
            # Python's word on fork beside threads (the workers use none of them), torch's on few cores
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*")
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                images,
                batch_sampler=keys,
                num_workers=workers,
                collate_fn=_collated,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_ignore_signals,
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                generator=torch.Generator(),  # else it draws from torch's global numbers
            )
            with _held_back():
                return iter(loader)
