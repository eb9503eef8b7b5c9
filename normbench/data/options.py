"""The typed `dataset` part of the configuration: every value is judged here, before a file is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from normbench.values import (
    Refused,
    above_zero,
    below_one,
    flag,
    fraction,
    int_from,
    nearest,
    one_of,
    positive_int,
)

FOLDER_SETS = ("imagenette", "imagenet")

# shape, num_classes, train_size, test_size of the sets whose files admit one answer
_FIXED = {
    "cifar10": ((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": ((3, 32, 32), 100, 50_000, 10_000),
    "mnist": ((1, 28, 28), 10, 60_000, 10_000),
    "fashion_mnist": ((1, 28, 28), 10, 60_000, 10_000),
    "digits": ((1, 8, 8), 10, 1437, 360),
}
_NAMES = (*_FIXED, "synthetic", *FOLDER_SETS)
_NO_DOWNLOAD = {
    "digits": "it ships inside scikit-learn",
    "synthetic": "it is made up on the spot",
    "imagenet": "it is never downloaded; put its class folders under data_dir/imagenet/train and "
    "data_dir/imagenet/val",
}


@dataclass(frozen=True)
class Augment:
    """Random changes to training images, in this order; 0 switches one off.

    Args:
        crop: pixels of padding on each side before a random crop back to size.
        crop_padding: zero (black, before normalisation) or reflect (the edge row is not repeated).
        flip: probability of a left-right mirror image.
        cutout: side in pixels of a square hole, filled with 0 after normalisation.
        cutout_p: probability of the hole.
    """

    crop: int
    crop_padding: str
    flip: float
    cutout: int
    cutout_p: float

    @property
    def any(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.crop or self.flip or self.cutout)


@dataclass(frozen=True)
class DatasetOptions:
    """One data set, as conf/dataset/<name>.yaml spells it.

    Args:
        name: which data set.
        shape: (C, H, W) that the model sees; folder sets resize to it.
        num_classes: number of labels, 0 … num_classes - 1.
        train_size: images in the training files; synthetic makes as many, the others are checked against it.
        test_size: the same for the test files.
        mean: subtracted per channel, on the scale 0..1; one number serves all channels. 0 for none.
        std: divided by, after `mean`; 1 for none.
        val_fraction: part of the training set held out for validation, drawn from `seed` only.
        train_subset: how many of the remaining training images to use, drawn from `seed`; None for all.
        test_subset: the same for the test set.
        shuffle: a new order every epoch; otherwise the files' order.
        drop_last: leave out an epoch's last batch when it is not full.
        download: fetch missing files.
        augment: random changes to training images.
        resize: folder sets only. squash: straight to (H, W); center_crop: shorter side to 256/224 of it, then
            the middle; random_resized_crop: 8-100 % of the area, 3:4 to 4:3, in training (center_crop else).
        size: imagenette only: 160px, 320px or full.
        workers: processes that decode for folder sets; cannot change a result.
        cache: folder sets only. Keep images of the model's size in memory: true, false, or None for where
            they fit into half of what is free; cannot change a result. Random cuts are decoded every time.
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    train_size: int
    test_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    val_fraction: float
    train_subset: int | None
    test_subset: int | None
    shuffle: bool
    drop_last: bool
    download: bool
    augment: Augment
    resize: str | None
    size: str | None
    workers: int
    cache: bool | None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "DatasetOptions":
        """Options from a config mapping with exactly these keys; ValueError names the key and the cure."""
        _same_keys("dataset", values, cls)
        _same_keys("dataset.augment", values["augment"], Augment)
        name = one_of("dataset.name", values["name"], _NAMES)
        shape = _shape(values["shape"])
        options = cls(
            name=name,
            shape=shape,
            num_classes=int_from("dataset.num_classes", values["num_classes"], 2),
            train_size=positive_int("dataset.train_size", values["train_size"]),
            test_size=positive_int("dataset.test_size", values["test_size"]),
            mean=_per_channel("dataset.mean", values["mean"], fraction, shape[0]),
            std=_per_channel("dataset.std", values["std"], above_zero, shape[0]),
            val_fraction=below_one("dataset.val_fraction", values["val_fraction"]),
            train_subset=_optional_int("dataset.train_subset", values["train_subset"]),
            test_subset=_optional_int("dataset.test_subset", values["test_subset"]),
            shuffle=flag("dataset.shuffle", values["shuffle"]),
            drop_last=flag("dataset.drop_last", values["drop_last"]),
            download=flag("dataset.download", values["download"]),
            augment=_augment(values["augment"], shape),
            resize=_only_for(
                FOLDER_SETS,
                "resize",
                name,
                values["resize"],
                ("squash", "center_crop", "random_resized_crop"),
            ),
            size=_only_for(("imagenette",), "size", name, values["size"], ("160px", "320px", "full")),
            workers=int_from("dataset.workers", values["workers"], 0),
            cache=None if values["cache"] is None else flag("dataset.cache", values["cache"]),
        )
        options._check()
        return options

    @property
    def streamed(self) -> bool:
        """Whether images are read from files while training (else all are held in memory)."""
        return self.name in FOLDER_SETS

    @property
    def val_samples(self) -> int:
        """Images held out of the training set."""
        return round(self.train_size * self.val_fraction)

    @property
    def train_samples(self) -> int:
        """Images of one epoch (before drop_last)."""
        left = self.train_size - self.val_samples
        return left if self.train_subset is None else self.train_subset

    @property
    def test_samples(self) -> int:
        """Images that the test accuracy is taken over."""
        return self.test_size if self.test_subset is None else self.test_subset

    def _check(self) -> None:
        """What one value may be because of another."""
        if self.name in _FIXED:
            keys = ("shape", "num_classes", "train_size", "test_size")
            for key, expected in zip(keys, _FIXED[self.name], strict=True):
                if getattr(self, key) != expected:
                    shown = list(expected) if isinstance(expected, tuple) else expected
                    got = getattr(self, key)
                    got = list(got) if isinstance(got, tuple) else got
                    raise ValueError(f"dataset.{key} must be {shown} for {self.name}, got {got}")
        if self.streamed and self.shape[0] != 3:
            raise ValueError(f"dataset.shape must have 3 channels for {self.name}, got {list(self.shape)}")
        if not self.streamed and self.workers:
            raise ValueError(
                f"dataset.workers must be 0 for {self.name}, which is held in memory, got {self.workers}"
            )
        if not self.streamed and self.cache is not None:
            raise ValueError(
                f"dataset.cache must be null for {self.name}, which is held in memory, got {self.cache}"
            )
        if self.download and self.name in _NO_DOWNLOAD:
            raise Refused(f"dataset.download must be false for {self.name}: {_NO_DOWNLOAD[self.name]}")
        if self.val_fraction and not 0 < self.val_samples < self.train_size:
            raise ValueError(
                f"dataset.val_fraction={self.val_fraction:g} leaves no validation or no training images "
                f"of {self.train_size}"
            )
        for key, subset, available in (
            ("train_subset", self.train_subset, self.train_size - self.val_samples),
            ("test_subset", self.test_subset, self.test_size),
        ):
            if subset is not None and subset > available:
                raise ValueError(f"dataset.{key} must be an int from 1 to {available}, got {subset}")


def _same_keys(prefix: str, values: Any, owner: type) -> None:
    """ValueError for a key too many, a key missing, or no mapping at all."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix} must be a mapping, got {values!r}")
    known = [field.name for field in fields(owner)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown config key '{prefix}.{key}'{nearest(key, known)}")
    for key in known:
        if key not in values:
            raise ValueError(f"config key '{prefix}.{key}' is missing")


def _shape(value: Any) -> tuple[int, int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError(f"dataset.shape must be [channels, height, width], got {value!r}")
    channels, height, width = (positive_int(f"dataset.shape[{i}]", v) for i, v in enumerate(value))
    return channels, height, width


def _per_channel(key: str, value: Any, check: Any, channels: int) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or len(value) not in (1, channels):
        raise ValueError(
            f"{key} must be a list of {channels} numbers, or of one for all channels, got {value!r}"
        )
    return tuple(check(f"{key}[{i}]", v) for i, v in enumerate(value))


def _optional_int(key: str, value: Any) -> int | None:
    return None if value is None else positive_int(key, value)


def _augment(values: Mapping[str, Any], shape: tuple[int, int, int]) -> Augment:
    augment = Augment(
        crop=int_from("dataset.augment.crop", values["crop"], 0),
        crop_padding=one_of("dataset.augment.crop_padding", values["crop_padding"], ("zero", "reflect")),
        flip=fraction("dataset.augment.flip", values["flip"]),
        cutout=int_from("dataset.augment.cutout", values["cutout"], 0),
        cutout_p=fraction("dataset.augment.cutout_p", values["cutout_p"]),
    )
    smaller = min(shape[1:])
    if augment.crop_padding == "reflect" and augment.crop >= smaller:
        raise ValueError(
            f"dataset.augment.crop must be below {smaller}, the image's side, with crop_padding=reflect, "
            f"got {augment.crop}"
        )
    return augment


def _only_for(
    owners: tuple[str, ...], key: str, name: str, value: Any, allowed: tuple[str, ...]
) -> str | None:
    """One of `allowed` for the data sets that have this option, None for the others."""
    if name in owners:
        return one_of(f"dataset.{key}", value, allowed)
    if value is not None:
        raise ValueError(f"dataset.{key} must be null for {name}, got {value!r}; {', '.join(owners)} only")
    return None
