"""Suites of whole sessions in processes of their own: `naive`, against the plain loop; `session`, on CUDA."""

import json
from collections.abc import Iterator
from functools import partial

from normbench.bench import commands
from normbench.bench.bench import Bench
from normbench.bench.interleaved import CannotRun, Ready, Sample, take_turns
from normbench.bench.naive import Pictures
from normbench.bench.record import Group

ACCURACY = 0.93
OURS = ["precision=bf16", "channels_last=true"]


def against_naive(bench: Bench) -> Iterator[Group]:
    """One group: the plain loop, our session as plain, and with everything on."""
    keys, width = bench.of("naive"), 4 if bench.quick else 64
    size = 16 if bench.quick else keys["batch_size"]
    images, stride = (4 * size if bench.quick else keys["images"]), keys["stride"]
    _, origin = Pictures.found(bench.values["data_dir"], 1)
    mbn = ["norm=mbn", f"stride={stride}"]
    shared, real = (size, images, width), origin == "CIFAR-10"
    sides = {
        "naive": lambda: Ready(partial(naive, bench, stride, *shared)),
        "session, bf16, channels-last, fused mbn": lambda: Ready(
            partial(session, bench, [*mbn, "norm.impl=fused", *OURS], real, *shared)
        ),
        "session, bf16, channels-last, obn": lambda: Ready(
            partial(session, bench, ["norm=obn", *OURS], real, *shared)
        ),
        "session, fp32, NCHW, readable mbn": lambda: Ready(
            partial(session, bench, [*mbn, "norm.impl=reference"], real, *shared)
        ),
    }
    case = {"model": "resnet9", "width": width, "batch_size": size, "images": images, "data": origin}
    note = (
        f"`training`: an image of the second of two epochs of {images} images, augmentation included; "
        "`command`: of both epochs, with start-up and all that a session writes. The plain loop's DataLoader "
        f"has num_workers={keys['workers']}."
    )
    yield Group("naive", case, "image", "naive", take_turns(sides, bench.process_rounds), note=note)


def naive(bench: Bench, stride: int, size: int, images: int, width: int) -> Sample:
    """The plain loop, a fresh process."""
    values = bench.values
    wall_s, said = commands.run(
        "normbench.bench.naive", "--images", str(images), "--batch-size", str(size), "--epochs", "2",
        "--stride", str(stride), "--width", str(width), "--workers", str(bench.of("naive")["workers"]),
        "--threads", str(values["threads"] or 0), "--device", values["device"],
        "--data-dir", values["data_dir"],
    )  # fmt: skip
    told = json.loads(said.splitlines()[-1])
    return {"training": told["epochs_s"][-1] / told["images"], "command": wall_s / (2 * told["images"])}


def session(bench: Bench, overrides: list[str], real: bool, size: int, images: int, width: int) -> Sample:
    """One of our sessions, a fresh process."""
    data = ["dataset=cifar10", f"dataset.train_subset={images}"]
    if not real:
        data = ["dataset=synthetic", f"dataset.train_size={images}", "dataset.augment.crop=4",
                "dataset.augment.flip=0.5"]  # fmt: skip
    done = commands.train(
        "model=resnet9", f"model.width={width}", *data, "dataset.test_subset=64", f"batch.size={size}",
        "dataset.drop_last=true", "epochs=2", "optim.lr=1e-3", *overrides, *bench.words,
    )  # fmt: skip
    trained = images // size * size
    return {"training": done.sessions[0].epochs_s[-1] / trained, "command": done.wall_s / (2 * trained)}


def to_the_end(bench: Bench) -> Iterator[Group]:
    """One group: CIFAR-10 to the accuracy that counts, one session and thirty; takes a CUDA device."""
    sides = {
        "24 epochs": lambda: Ready(partial(full, bench, 1)),
        "30 sessions": lambda: Ready(partial(full, bench, 30)),
    }
    if bench.device.type != "cuda" or bench.quick:
        sides = dict.fromkeys(sides, needs_cuda)
    case = {"model": "resnet9", "dataset": "cifar10", "batch_size": 512, "epochs": 24}
    note = (
        "fused mbn s=4, bf16, channels-last; a time counts only where the mean test accuracy is 0.93 or more."
    )
    yield Group("session", case, "command", "24 epochs", take_turns(sides, 1), note=note)


def needs_cuda() -> Ready:
    """In place of a side that would train for hours."""
    raise CannotRun("needs a CUDA device, and a run that is not quick")


def full(bench: Bench, sessions: int) -> Sample:
    """So many whole sessions in one command: seconds of the training clock and of the command."""
    done = commands.train(
        "model=resnet9", "dataset=cifar10", "batch=bs512", "epochs=24", "norm=mbn", "stride=4",
        "norm.impl=fused", *OURS, f"session=range({sessions})", *bench.words,
    )  # fmt: skip
    accuracy = sum(float(s.row["test_acc"]) for s in done.sessions) / len(done.sessions)
    if accuracy < ACCURACY:
        raise CannotRun(f"test accuracy {accuracy:.4f}, below {ACCURACY}: its time does not count")
    return {"training": sum(sum(s.epochs_s) for s in done.sessions), "command": done.wall_s}
