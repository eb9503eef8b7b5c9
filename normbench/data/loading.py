"""`load` turns dataset options into training, validation and test parts that yield batches on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from normbench.data.options import DatasetOptions
from normbench.data.reading import list_files, read_images
from normbench.data.resident import Normalizer, Own, Resident
from normbench.data.streamed import Streamed
from normbench.ranks import WHOLE, Cut
from normbench.seeds import Seeds
from normbench.values import int_from, positive_int


class _Source(Protocol):
    """Where batches come from: images in memory (Resident) or files (Streamed)."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def normalize(self) -> Normalizer: ...

    def augmented(
        self, rows: Sequence[Tensor], seeds: Seeds, epoch: int, first_step: int, own: Own
    ) -> Iterator[tuple[Tensor, Tensor]]: ...

    def plain(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class TrainPart:
    """The training images; `index` (n,) int64 are their places in the training files, ascending.

    `cut` says which share of every batch this process takes.
    """

    source: _Source
    index: Tensor
    batch_size: int
    shuffle: bool
    drop_last: bool
    cut: Cut = WHOLE

    @property
    def num_samples(self) -> int:
        """Images of one epoch, before drop_last."""
        return len(self.index)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        return steps_per_epoch(self.num_samples, self.batch_size, self.drop_last)

    def images_in(self, step: int) -> int:
        """Images of a step's batch, of all shares; an epoch's first step is 0."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def order(self, seeds: Seeds, epoch: int) -> Tensor:
        """The images of an epoch (n,) int64 in their order."""
        if not self.shuffle:
            return self.index
        return self.index[torch.randperm(len(self.index), generator=seeds.generator("order", epoch))]

    def batches(self, seeds: Seeds, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented x (N, C, H, W) float32 and y (N,) int64 of an epoch, from step `start_step` (first: 0).

        Order and augmentation depend on seeds, epoch and step only, so the rest of an interrupted epoch is
        the same as in a whole one, and the shares of a batch are together what one process would see.
        """
        if int_from("start_step", start_step, 0) > self.steps_per_epoch:
            raise ValueError(f"start_step must be an int from 0 to {self.steps_per_epoch}, got {start_step}")
        rows = torch.split(self.order(seeds, epoch), self.batch_size)[start_step : self.steps_per_epoch]
        return self.source.augmented(rows, seeds, epoch, start_step, self.cut.own)


@dataclass(frozen=True)
class EvalPart:
    """Images for evaluation; `index` (n,) int64 are their places in the files, ascending."""

    source: _Source
    index: Tensor
    batch_size: int

    @property
    def num_samples(self) -> int:
        """Images of one evaluation."""
        return len(self.index)

    @property
    def labels(self) -> Tensor:
        """All labels (n,) int64 in the order of `batches`, without reading an image; on the CPU."""
        return self.source.labels.cpu()[self.index]

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """x (N, C, H, W) float32 and y (N,) int64 in the files' order, not augmented, none left out.

        With `every` only one batch of so many, from the `first`: whole ones, so that their numbers stay.
        """
        return self.source.plain(torch.split(self.index, self.batch_size)[first::every])


@dataclass(frozen=True)
class Data:
    """A data set ready to train on; `val` is None without a `val_fraction`, `shape` is (C, H, W)."""

    train: TrainPart
    val: EvalPart | None
    test: EvalPart
    num_classes: int
    shape: tuple[int, int, int]


def steps_per_epoch(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Batches of one epoch; ValueError when drop_last leaves none."""
    if not drop_last:
        return -(-num_samples // batch_size)
    if num_samples < batch_size:
        raise ValueError(
            f"batch.size must be at most {num_samples}, the number of training images, with "
            f"dataset.drop_last=true, got {batch_size}"
        )
    return num_samples // batch_size


def load(
    options: DatasetOptions,
    *,
    data_dir: str,
    device: torch.device,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    channels_last: bool = False,
    cut: Cut = WHOLE,
) -> Data:
    """Open a data set.

    Args:
        options: which set and how.
        data_dir: folder that holds the sets, in torchvision's layout.
        device: where the batches appear; sets held in memory live there, once per process.
        batch_size: of training batches.
        eval_batch_size: of validation and test batches.
        seed: the experiment's; it alone chooses validation part and subsets, so all sessions share them.
        channels_last: memory format of x.
        cut: which share of every training batch this process takes.
    Raises:
        Refused — files are missing, damaged or not what the options say; the text is one line.
        ValueError — drop_last leaves no batch.
    """
    positive_int("batch_size", batch_size)
    positive_int("eval_batch_size", eval_batch_size)
    steps_per_epoch(options.train_samples, batch_size, options.drop_last)
    normalize = Normalizer(options, device, channels_last)
    train_source: _Source
    test_source: _Source
    if options.streamed:
        train_files, test_files = list_files(options, data_dir)
        train_source = Streamed(train_files, options, normalize, device)
        test_source = Streamed(test_files, options, normalize, device)
    else:
        train_images, test_images = read_images(options, data_dir, device, channels_last)
        train_source = Resident(train_images, options.augment, normalize)
        test_source = Resident(test_images, options.augment, normalize)
    train, val, test = _split(options, Seeds(seed, 0))
    return Data(
        train=TrainPart(train_source, train, batch_size, options.shuffle, options.drop_last, cut),
        val=EvalPart(train_source, val, eval_batch_size) if len(val) else None,
        test=EvalPart(test_source, test, eval_batch_size),
        num_classes=options.num_classes,
        shape=options.shape,
    )


def _split(options: DatasetOptions, seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the training, validation and test images, each ascending.

    With one seed a smaller subset is part of a larger one.
    """
    order = torch.arange(options.train_size)
    if options.val_samples:
        order = torch.randperm(options.train_size, generator=seeds.generator("split", options.name))
    val, train = order[: options.val_samples].sort().values, order[options.val_samples :].sort().values
    test = torch.arange(options.test_size)
    if options.train_subset is not None:
        chosen = torch.randperm(len(train), generator=seeds.generator("subset", options.name, "train"))
        train = train[chosen[: options.train_subset]].sort().values
    if options.test_subset is not None:
        chosen = torch.randperm(len(test), generator=seeds.generator("subset", options.name, "test"))
        test = test[chosen[: options.test_subset]].sort().values
    return train, val, test
