"""Suite `loader`: CIFAR's crop, flip and normalisation, batched on tensors against PIL, image by image."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from normbench.bench.bench import Bench
from normbench.bench.interleaved import Clock, Ready, Sample, take_turns
from normbench.bench.naive import Pictures
from normbench.bench.record import Group
from normbench.data.loading import load
from normbench.data.options import DatasetOptions
from normbench.seeds import Seeds


def groups(bench: Bench) -> Iterator[Group]:
    """One group: images a second, ready for the model, of each way."""
    keys = bench.of("loader")
    size, workers = int(keys["batch_size"]), int(keys["workers"])
    images = 4 * size if bench.quick else 8 * size
    pictures, origin = Pictures.found(bench.values["data_dir"], images)
    sides = {
        "batched on tensors": partial(batched, bench, pictures, size),
        "PIL per sample": partial(per_sample, pictures, size),
        f"PIL in a DataLoader, num_workers={workers}": partial(in_loader, pictures, size, workers),
    }
    case = {"images": origin, "batch_size": size, "sample": images}
    note = "A sample is so many images, ready for the model: cropped, flipped, float32, normalised."
    if workers:
        note += f" The DataLoader has {workers} processes beside this one: more cores than the others."
    yield Group("loader", case, "image", "PIL per sample", take_turns(sides, bench.rounds), note=note)


def batched(bench: Bench, pictures: Pictures, size: int) -> Ready:
    """What a session does: uint8 tensors on the device, a whole batch at once."""
    values = bench.session(["dataset=synthetic", "model=resnet9"]).dataset
    augment = values["augment"] | {"crop": 4, "flip": 0.5}
    options = DatasetOptions.from_mapping(values | {"train_size": len(pictures), "augment": augment})
    data = load(options, data_dir="", device=bench.device, batch_size=size, eval_batch_size=size, seed=0)
    epochs = iter(range(1, 1_000_000))

    def walk() -> int:
        return sum(len(y) for _, y in data.train.batches(Seeds(0, 0), next(epochs)))

    walk()
    return timed(walk, bench.device)


def per_sample(pictures: Pictures, size: int) -> Ready:
    """What a Dataset does, without a DataLoader around it."""
    order = torch.split(torch.randperm(len(pictures)), size)

    def walk() -> int:
        return sum(len(default_collate([pictures[int(i)] for i in at])[1]) for at in order)

    return timed(walk, torch.device("cpu"))


def in_loader(pictures: Pictures, size: int, workers: int) -> Ready:
    """The same through a DataLoader; its workers stay from epoch to epoch."""
    loader: DataLoader[Any] = DataLoader(
        pictures, size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def walk() -> int:
        return sum(len(y) for _, y in loader)

    walk()
    return timed(walk, torch.device("cpu"))


def timed(walk: Callable[[], int], device: torch.device) -> Ready:
    """Seconds of an image, of an epoch that `walk` makes and counts."""
    clock = Clock(device)

    def measure() -> Sample:
        clock.wait()
        begin = clock.mark()
        images = walk()
        end = clock.mark()
        clock.wait()
        return {"image": clock.seconds(begin, end) / images}

    return Ready(measure)
