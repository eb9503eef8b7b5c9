"""A plain training loop, as the studies' notebooks have it: what a session has to beat.

    python -m normbench.bench.naive --images 512 --batch-size 128 --epochs 2

One process per session. Images pass through PIL and torchvision's transforms one by one in a DataLoader;
ResNet9 in float32, contiguous; batch norm in readable tensor operations; torch's SGD as it comes; the loss is
asked for at every step. Kept honest: nothing here is slower than a reader would write it, it runs under the
same allocator and with as many threads, and its first epoch, which warms up, is not counted.
"""

import argparse
import json
import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from normbench import device as machine
from normbench.bench.allocator import tuned
from normbench.models.resnet9 import ResNet9
from normbench.norms.mbn import MBN

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Pictures(Dataset[tuple[Tensor, int]]):
    """CIFAR-sized pictures that are cropped, flipped and normalised one by one."""

    def __init__(self, pictures: npt.NDArray[np.uint8], labels: list[int]) -> None:
        self.pictures, self.labels = pictures, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    @classmethod
    def found(cls, data_dir: str, images: int) -> "tuple[Pictures, str]":
        """The first of CIFAR-10's training images where it is there, else made up; and which it was."""
        try:
            real = datasets.CIFAR10(data_dir, train=True, download=False)
        except RuntimeError:
            generator = np.random.default_rng(0)
            made_up = generator.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
            return cls(made_up, [i % 10 for i in range(images)]), "made up, CIFAR's size"
        return cls(real.data[:images], real.targets[:images]), "CIFAR-10"

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pictures[index])), self.labels[index]


def make_model(stride: int, width: int, device: torch.device) -> nn.Module:
    """ResNet9 with the readable layer."""
    norm = partial(MBN, stride=stride, impl="reference")
    model = ResNet9(in_channels=3, num_classes=10, image_size=(32, 32), norm=norm, width=width)
    return model.to(device).train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """torch's SGD, with its defaults for how it computes."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One update; its loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], device: torch.device
) -> float:
    """Every image once; seconds."""
    began = time.perf_counter()
    for x, y in loader:
        train_step(model, optimizer, x.to(device), y.to(device))
    return time.perf_counter() - began


def main() -> None:
    """Train as many epochs as asked and print their seconds as JSON."""
    parser = argparse.ArgumentParser(prog="normbench.bench.naive", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="of the DataLoader")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", default="data")
    given = parser.parse_args()
    allocator, device = tuned(), machine.pick(given.device)
    machine.use_threads(given.threads)
    torch.manual_seed(0)
    pictures, origin = Pictures.found(given.data_dir, given.images)
    loader: DataLoader[Any] = DataLoader(
        pictures, given.batch_size, shuffle=True, num_workers=given.workers, drop_last=True
    )
    model = make_model(given.stride, given.width, device)
    optimizer = make_optimizer(model)
    epochs_s = [train_epoch(model, optimizer, loader, device) for _ in range(given.epochs)]
    images = len(loader) * given.batch_size
    print(json.dumps({"epochs_s": epochs_s, "images": images, "data": origin, "allocator": allocator}))


if __name__ == "__main__":
    main()
