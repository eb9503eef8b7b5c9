"""Batches of a model's input from a CSV, a folder of pictures or a part of a data set, as in training."""

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from normbench import device as machine
from normbench.config import Config
from normbench.data.loading import EvalPart, load
from normbench.data.options import DatasetOptions
from normbench.data.reading import one_line
from normbench.data.resident import Normalizer
from normbench.data.streamed import resized
from normbench.predict.images import Chunk, Folder
from normbench.values import Refused

Batches = Iterator[tuple[Tensor, Tensor | None]]  # x (n, C, H, W) on the device; labels (n,), there or here


@dataclass(frozen=True)
class Place:
    """Where batches appear, how large they are, and the session whose normalisation they get."""

    config: Config
    device: torch.device
    batch_size: int

    @property
    def options(self) -> DatasetOptions:
        """Of the session's data set."""
        return DatasetOptions.from_mapping(self.config.dataset)

    def normalizer(self) -> Normalizer:
        """Training's."""
        return Normalizer(self.options, self.device, self.config.channels_last)


def of_table(chunks: Iterable[Chunk], place: Place) -> Batches:
    """A CSV's images, whose values are from 0 to 255."""
    normalize = place.normalizer()
    for values, labels in chunks:
        x = torch.from_numpy(values.astype(np.float32)).to(place.device)
        yield normalize(x), None if labels is None else torch.from_numpy(labels)


def of_folder(folder: Folder, resize: str | None, place: Place) -> Batches:
    """A folder's pictures, resized by that rule; without one they must have the model's size."""
    options, normalize = replace(place.options, resize=resize), place.normalizer()
    with ThreadPoolExecutor(machine.share()) as readers:  # Pillow leaves Python free while it decodes
        for start in range(0, len(folder.files), place.batch_size):
            at = slice(start, start + place.batch_size)
            with warnings.catch_warnings():  # of damaged EXIF in whole pictures
                warnings.simplefilter("ignore")
                images = list(readers.map(lambda file: picture(folder, file, options), folder.files[at]))
            labels = None if folder.labels is None else torch.from_numpy(folder.labels[at])
            yield normalize(torch.from_numpy(np.stack(images)).to(place.device)), labels


def picture(folder: Folder, file: str, options: DatasetOptions) -> npt.NDArray[np.uint8]:
    """One picture (C, H, W), by `options.resize` where that is given.

    Raises: Refused — no picture, more than 8 bits a value, or not of the model's size.
    """
    path, (channels, height, width) = folder.root / file, options.shape
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            image: Image.Image = opened.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise Refused(f"{path} cannot be read as an image ({one_line(error)})") from error
    if mode.startswith(("I", "F")):
        raise Refused(f"{path} has more than 8 bits a value (Pillow's mode {mode}); convert it first")
    if options.resize is not None:
        image = resized(image, options, None)
    elif image.size != (width, height):
        raise Refused(
            f"{path} is {image.width} wide and {image.height} high, not {width} and {height}, and training "
            "resized nothing; choose --resize squash or --resize center_crop"
        )
    values = np.asarray(image)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)


def of_split(values: dict[str, Any], split: str, data_dir: str, place: Place) -> Batches:
    """The batches of a data set's training, validation or test part, in the files' order, not augmented."""
    data = load(
        DatasetOptions.from_mapping(values),
        data_dir=data_dir,
        device=place.device,
        batch_size=1,  # of training, which is not asked for
        eval_batch_size=place.batch_size,
        seed=place.config.seed,
        channels_last=place.config.channels_last,
    )
    train = EvalPart(data.train.source, data.train.index, place.batch_size)
    part = {"train": train, "val": data.val, "test": data.test}[split]
    if part is None:
        raise RuntimeError(f"split={split} was not refused")
    yield from part.batches()
