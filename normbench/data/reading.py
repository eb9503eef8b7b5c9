"""Reads the files, once per process: whole sets into uint8 tensors, folder sets into lists of paths."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normbench.data.options import DatasetOptions
from normbench.values import Refused

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Images:
    """Decoded images (N, C, H, W) uint8 and their labels (N,) int64, on one device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Files:
    """Images: `paths` (N,) are bytes relative to `root`, not objects, so that forked workers share them."""

    root: str
    paths: npt.NDArray[np.bytes_]
    labels: Tensor

    def path(self, index: int) -> str:
        """Full path of one image."""
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))


_cache: dict[tuple[object, ...], tuple[Any, Any]] = {}


def read_images(
    options: DatasetOptions, data_dir: str, device: torch.device, channels_last: bool = False
) -> tuple[Images, Images]:
    """Training and test images on the device; one copy for a process's sessions and settings of a format."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    name = options.name
    if name == "synthetic":
        key: tuple[object, ...] = (options.shape, options.num_classes, options.train_size, options.test_size)
    else:
        key = () if name == "digits" else (_root(data_dir),)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    key = (name, device, memory_format, *key)
    if key not in _cache:
        if name == "synthetic":
            parts = _synthetic(options)
        elif name == "digits":
            parts = _digits()
        else:
            parts = _torchvision(options, data_dir)
        train, test = (
            Images(part.images.to(device, memory_format=memory_format), part.labels.to(device))
            for part in parts
        )
        _cache[key] = train, test
    train, test = _cache[key]
    return train, test


def list_files(options: DatasetOptions, data_dir: str) -> tuple[Files, Files]:
    """Training and test files of a folder set, classes in name order and files in name order within them."""
    folder = _folder_of(options, data_dir)
    if (options.name, folder) not in _cache:
        _cache[options.name, folder] = _listed(options, data_dir, folder)
    train, test = _cache[options.name, folder]
    _check_found(options, folder, train, test)
    return train, test


def one_line(error: BaseException) -> str:
    """The first line of an error, or its class name when it has no text."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _root(data_dir: str) -> Path:
    return Path(data_dir).expanduser().resolve()


def _synthetic(options: DatasetOptions) -> tuple[Images, Images]:
    """A fixed mean image per class (0..95) plus uniform noise (0..159), the labels evenly mixed."""
    means = torch.randint(
        0, 96, (options.num_classes, *options.shape), dtype=torch.uint8, generator=_fixed_generator(0)
    )

    def part(size: int, generator: torch.Generator) -> Images:
        labels = torch.randperm(size, generator=generator) % options.num_classes
        noise = torch.randint(0, 160, (size, *options.shape), dtype=torch.uint8, generator=generator)
        return Images(noise.add_(means[labels]), labels)

    return part(options.train_size, _fixed_generator(1)), part(options.test_size, _fixed_generator(2))


def _fixed_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _digits() -> tuple[Images, Images]:
    """scikit-learn's 1797 digits, 0..16 scaled to 0..255.

    They come without a split: the first 1437 of numpy's default_rng(0).permutation(1797) are ours for
    training, the other 360 for testing, both in that order.
    """
    from sklearn.datasets import load_digits

    bunch, order = load_digits(), np.random.default_rng(0).permutation(1797)
    images = torch.from_numpy(np.rint(bunch.images[order] * 255 / 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    return Images(images[:1437], labels[:1437]), Images(images[1437:], labels[1437:])


def _torchvision(options: DatasetOptions, data_dir: str) -> tuple[Images, Images]:
    from torchvision import datasets

    reader, folder_name = {
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
    }[options.name]
    root = _root(data_dir)
    folder = root / folder_name

    def part(train: bool, size: int) -> Images:
        read = reader(str(root), train=train, download=options.download)
        images = torch.as_tensor(read.data)
        # MNIST is (N, H, W), CIFAR (N, H, W, C)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(read.targets, dtype=torch.int64)
        if images.shape != (size, *options.shape) or labels.shape != (size,):
            raise ValueError(f"{tuple(images.shape)} images, {tuple(labels.shape)} labels")
        if labels.min() < 0 or labels.max() >= options.num_classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
        return Images(images.contiguous(), labels)

    def both() -> tuple[Images, Images]:
        return part(True, options.train_size), part(False, options.test_size)

    return _reading(options, folder, both)


def _folder_of(options: DatasetOptions, data_dir: str) -> Path:
    names = {"160px": "imagenette2-160", "320px": "imagenette2-320", "full": "imagenette2"}
    return _root(data_dir) / ("imagenet" if options.size is None else names[options.size])


def _listed(options: DatasetOptions, data_dir: str, folder: Path) -> tuple[Files, Files]:
    from torchvision import datasets

    if options.name == "imagenet" and not all((folder / part).is_dir() for part in ("train", "val")):
        raise Refused(
            f"dataset=imagenet: no class folders under {folder}/train and {folder}/val; put them there or "
            "set data_dir (or NORMBENCH_DATA); ImageNet is never downloaded"
        )

    def part(split: str) -> tuple[Files, list[str]]:
        listing = datasets.ImageFolder(str(folder / split))
        paths = [os.fsencode(os.path.relpath(path, folder)) for path, _ in listing.samples]
        return Files(str(folder), np.array(paths), torch.tensor(listing.targets)), listing.classes

    def both() -> tuple[Files, Files]:
        if options.download and not folder.exists():
            datasets.Imagenette(str(_root(data_dir)), size=options.size, download=True)
        (train, train_classes), (test, test_classes) = part("train"), part("val")
        if train_classes != test_classes:
            odd = sorted(set(train_classes) ^ set(test_classes))
            raise ValueError(f"class folders not in both train and val: {', '.join(odd[:3])}")
        return train, test

    return _reading(options, folder, both)


def _reading(options: DatasetOptions, folder: Path, read: Callable[[], _Read]) -> _Read:
    """What `read` returns; whatever stops it becomes one line that says where the files should be."""
    found = folder.is_dir() and any(folder.iterdir())
    if not found and not options.download:
        raise Refused(
            f"dataset={options.name}: no files under {folder}; set data_dir (or NORMBENCH_DATA), or "
            "dataset.download=true"
        )
    try:
        return read()
    except Exception as error:
        if not found:
            raise Refused(
                f"dataset={options.name}: the download to {folder} failed ({one_line(error)})"
            ) from error
        cure = (
            "put them there again" if options.name == "imagenet" else "delete it, then dataset.download=true"
        )
        raise Refused(
            f"dataset={options.name}: files under {folder} are incomplete or damaged "
            f"({one_line(error)}); {cure}"
        ) from error


def _check_found(options: DatasetOptions, folder: Path, train: Files, test: Files) -> None:
    """A folder set must hold what the configuration says, so that a part of it never passes for the whole."""
    found = {
        "num_classes": int(train.labels.max()) + 1,
        "train_size": len(train.labels),
        "test_size": len(test.labels),
    }
    wrong = {key: value for key, value in found.items() if getattr(options, key) != value}
    if wrong:
        expected = ", ".join(f"{key} {getattr(options, key)}" for key in wrong)
        cure = " ".join(f"dataset.{key}={value}" for key, value in wrong.items())
        raise Refused(
            f"dataset={options.name}: files under {folder} do not match {expected}; "
            f"if they are meant, set {cure}"
        )
