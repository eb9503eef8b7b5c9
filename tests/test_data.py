"""Data sets: shapes, splits without a leak, equal keys → equal batches, augmentation, errors."""

import os
import re
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.nn import functional

from normbench.data import augment
from normbench.data.loading import Data, load, steps_per_epoch
from normbench.data.options import DatasetOptions
from normbench.data.streamed import _ignore_signals, resized
from normbench.data.together import batches_of
from normbench.seeds import Seeds
from normbench.values import Refused

CONF = Path(__file__).parents[1] / "conf" / "dataset"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
CPU = torch.device("cpu")
SEEDS = Seeds(0, 0)
REAL = {  # train and test size, images of each class in training, None where the classes differ in size
    "cifar10": (50_000, 10_000, 5000),
    "cifar100": (50_000, 10_000, 500),
    "mnist": (60_000, 10_000, None),
    "fashion_mnist": (60_000, 10_000, 6000),
}
MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def mapping(name: str, /, **changes: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(values, dict)
    for key, value in changes.items():
        if key in values["augment"]:
            values["augment"][key] = value
        else:
            values[key] = value
    return values  # type: ignore[return-value]


def options(name: str, /, **changes: Any) -> DatasetOptions:
    return DatasetOptions.from_mapping(mapping(name, **changes))


def opened(name: str, data_dir: object = "", batch_size: int = 128, seed: int = 0, **changes: Any) -> Data:
    chosen = options(name, **changes)
    return load(
        chosen, data_dir=str(data_dir), device=CPU, batch_size=batch_size, eval_batch_size=500, seed=seed
    )


def real_dir() -> str:
    folder = os.environ.get("NORMBENCH_DATA")
    assert folder, "set NORMBENCH_DATA to the folder of the unpacked data sets"
    return folder


def all_of(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def same(first: Iterable[tuple[Tensor, Tensor]], second: Iterable[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


def refused(*args: Any, **changes: Any) -> str:
    with pytest.raises(Refused) as error:
        opened(*args, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# options


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_is_accepted_and_has_the_same_keys(name: str) -> None:
    assert list(mapping(name)) == list(mapping("digits"))
    assert list(mapping(name)["augment"]) == list(mapping("digits")["augment"])
    assert options(name).name == name
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("digits", {"val_fraction": 1.0}, "dataset.val_fraction must be a number ≥ 0 and < 1, got 1.0"),
        ("digits", {"val_fraction": 0.0001}, "leaves no validation or no training images of 1437"),
        ("digits", {"flip": 1.5}, "dataset.augment.flip must be a number from 0 to 1, got 1.5"),
        ("digits", {"cutout": -1}, "dataset.augment.cutout must be an int ≥ 0, got -1"),
        ("digits", {"crop_padding": "zeros"}, "got 'zeros'; did you mean 'zero'?"),
        ("digits", {"crop": 8, "crop_padding": "reflect"}, "dataset.augment.crop must be below 8"),
        ("digits", {"shape": [3, 8, 8], "mean": [0.0], "std": [1.0]}, "must be [1, 8, 8] for digits"),
        ("digits", {"shape": 8}, "dataset.shape must be [channels, height, width], got 8"),
        ("digits", {"num_classes": 9}, "dataset.num_classes must be 10 for digits, got 9"),
        ("digits", {"train_size": 100}, "dataset.train_size must be 1437 for digits, got 100"),
        ("digits", {"train_subset": 1438}, "dataset.train_subset must be an int from 1 to 1437, got 1438"),
        ("digits", {"train_subset": 1200, "val_fraction": 0.2}, "an int from 1 to 1150, got 1200"),
        ("digits", {"test_subset": 0}, "dataset.test_subset must be an int ≥ 1, got 0"),
        ("digits", {"shuffle": "no"}, "dataset.shuffle must be true or false, got 'no'"),
        ("digits", {"workers": 2}, "dataset.workers must be 0 for digits, which is held in memory, got 2"),
        ("digits", {"resize": "squash"}, "dataset.resize must be null for digits, got 'squash'"),
        ("digits", {"name": "digit"}, "got 'digit'; did you mean 'digits'?"),
        ("digits", {"flips": 0.5}, "unknown config key 'dataset.flips'"),
        ("digits", {"augment": {"crop": 0}}, "config key 'dataset.augment.crop_padding' is missing"),
        ("digits", {"augment": None}, "dataset.augment must be a mapping, got None"),
        ("cifar10", {"mean": [0.5, 0.5]}, "dataset.mean must be a list of 3 numbers"),
        ("cifar10", {"std": [0.5, 0, 0.5]}, "dataset.std[1] must be a number > 0, got 0"),
        ("cifar10", {"size": "160px"}, "dataset.size must be null for cifar10, got '160px'"),
        ("imagenette", {"size": "160"}, "got '160'; did you mean '160px'?"),
        (
            "imagenet",
            {"resize": None},
            "dataset.resize must be one of squash, center_crop, random_resized_crop",
        ),
        (
            "imagenet",
            {"shape": [1, 64, 64], "mean": [0.0], "std": [1.0]},
            "must have 3 channels for imagenet",
        ),
        ("imagenet", {"download": True}, "data_dir/imagenet/train and data_dir/imagenet/val"),
        ("digits", {"download": True}, "it ships inside scikit-learn"),
        ("synthetic", {"download": True}, "it is made up on the spot"),
    ],
)
def test_a_bad_value_is_refused_by_its_dotted_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        options(name, **change)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_known_before_anything_is_opened() -> None:
    chosen = options("cifar10", val_fraction=0.2, test_subset=100)
    assert (chosen.train_samples, chosen.val_samples, chosen.test_samples) == (40_000, 10_000, 100)
    assert options("cifar10", train_subset=7).train_samples == 7
    assert not chosen.streamed and options("imagenet").streamed


# the real sets held in memory


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_set_has_its_published_size_labels_and_scale(name: str) -> None:
    data = opened(name, real_dir(), crop=0, flip=0.0, batch_size=1000)
    train_size, test_size, per_class = REAL[name]
    assert (data.train.num_samples, data.test.num_samples) == (train_size, test_size)
    total, square, labels = torch.zeros(()), torch.zeros(()), []
    for x, y in data.train.batches(SEEDS, 1):
        assert x.shape == (1000, *data.shape) and x.dtype == torch.float32 and y.dtype == torch.int64
        total, square = total + x.mean((0, 2, 3)), square + x.square().mean((0, 2, 3))
        labels.append(y)
    mean = total / data.train.steps_per_epoch
    std = (square / data.train.steps_per_epoch - mean.square()).sqrt()
    torch.testing.assert_close(mean, torch.zeros(data.shape[0]), atol=0.01, rtol=0)
    torch.testing.assert_close(std, torch.ones(data.shape[0]), atol=0.01, rtol=0)
    histogram = torch.bincount(torch.cat(labels)).tolist()
    assert histogram == (MNIST_TRAIN if per_class is None else [per_class] * data.num_classes)
    x, y = all_of(data.test.batches())
    assert x.shape == (test_size, *data.shape)
    assert len(y.unique()) == data.num_classes


@pytest.mark.data
def test_real_pixels_and_order_are_the_files_own() -> None:
    from torchvision.datasets import CIFAR10, MNIST

    for name, files in (("cifar10", CIFAR10), ("mnist", MNIST)):
        data = opened(name, real_dir(), mean=[0.0], std=[1.0])
        x, y = next(iter(data.test.batches()))
        read = files(real_dir(), train=False)
        for i in (0, 7, 499):
            expected = torch.from_numpy(np.atleast_3d(np.array(read[i][0]))).permute(2, 0, 1) / 255
            assert torch.equal(x[i], expected) and y[i] == read[i][1]


@pytest.mark.data
def test_training_changes_pixels_but_not_the_labels_order() -> None:
    crude = opened("cifar10", real_dir(), crop=0, flip=0.0, train_subset=256)
    changed = opened("cifar10", real_dir(), crop=4, flip=0.5, train_subset=256)
    assert not same(crude.train.batches(SEEDS, 1), changed.train.batches(SEEDS, 1))
    assert torch.equal(all_of(crude.train.batches(SEEDS, 1))[1], all_of(changed.train.batches(SEEDS, 1))[1])


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_damaged_files_are_one_line(name: str, tmp_path: Path) -> None:
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name)
    folder = folder or {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}[name]
    (tmp_path / folder).mkdir(parents=True)
    for path in (Path(real_dir()) / folder).iterdir():
        (tmp_path / folder / path.name).write_bytes(path.read_bytes()[:1000])
    message = refused(name, tmp_path)
    assert f"dataset={name}: files under {tmp_path / folder} are incomplete or damaged" in message
    assert "dataset.download=true" in message


# the built-in sets


def test_digits_are_1437_and_360_that_share_no_image() -> None:
    from sklearn.datasets import load_digits

    data = opened("digits", mean=[0.0], std=[1.0], shuffle=False)
    train, test = all_of(data.train.batches(SEEDS, 1)), all_of(data.test.batches())
    assert train[0].shape == (1437, 1, 8, 8) and test[0].shape == (360, 1, 8, 8)
    x, y = torch.cat([train[0], test[0]]), torch.cat([train[1], test[1]])
    bunch, order = load_digits(), np.random.default_rng(0).permutation(1797)
    assert sorted(order.tolist()) == list(range(1797))  # so each image is on one side only
    assert y.tolist() == bunch.target[order].tolist()
    torch.testing.assert_close(
        x[:, 0], torch.from_numpy(bunch.images[order] / 16).float(), atol=0.002, rtol=0
    )
    assert x.min() == 0 and x.max() == 1


def test_digits_are_normalised() -> None:
    x, _ = all_of(opened("digits").train.batches(SEEDS, 1))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01


def test_synthetic_has_any_shape_and_can_be_learnt() -> None:
    data = opened(
        "synthetic", shape=[2, 5, 7], mean=[0.5], std=[0.21], num_classes=7, train_size=700, test_size=99
    )
    x, y = all_of(data.train.batches(SEEDS, 1))
    assert x.shape == (700, 2, 5, 7) and y.bincount().tolist() == [100] * 7
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    means = torch.stack([x[y == label].mean(0) for label in range(7)])
    test_x, test_y = all_of(data.test.batches())
    guess = torch.cdist(test_x.flatten(1), means.flatten(1)).argmin(1)
    assert (guess == test_y).float().mean() > 0.9
    again = opened(
        "synthetic", shape=[2, 5, 7], mean=[0.5], std=[0.21], num_classes=7, train_size=70, test_size=99
    )
    assert same(data.test.batches(), again.test.batches())  # the size of one part does not change the other


def test_one_copy_serves_every_load_of_a_process() -> None:
    first, second = opened("digits"), opened("digits", val_fraction=0.1, flip=0.5)
    assert first.train.source.data.images.data_ptr() == second.train.source.data.images.data_ptr()
    assert first.test.source.data.images.data_ptr() == second.test.source.data.images.data_ptr()
    assert first.train.source.data.images.dtype == torch.uint8
    made = opened("synthetic"), opened("synthetic", train_size=2048)
    assert made[0].train.source.data.images.data_ptr() != made[1].train.source.data.images.data_ptr()


def test_using_batches_leaves_the_shared_copy_alone() -> None:
    before = opened("digits").train.source.data.images.clone()
    list(opened("digits", crop=2, flip=1.0, cutout=3, cutout_p=1.0).train.batches(SEEDS, 1))
    assert torch.equal(before, opened("digits").train.source.data.images)


# order, steps and splits


def test_an_epoch_holds_every_sample_once() -> None:
    data = opened("digits", val_fraction=0.1, batch_size=100)
    assert data.val is not None
    data.train.source.data.labels.copy_(torch.arange(1437))  # the labels become names of the images
    try:
        for epoch in (0, 1):
            y = all_of(data.train.batches(SEEDS, epoch))[1]
            assert y.sort().values.tolist() == data.train.index.tolist()
        assert all_of(data.val.batches())[1].tolist() == data.val.index.tolist()
    finally:
        data.train.source.data.labels.copy_(_digit_labels())


def _digit_labels() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().target[np.random.default_rng(0).permutation(1797)[:1437]])


def test_equal_seeds_give_equal_batches_and_other_sessions_others() -> None:
    changes = {"crop": 2, "flip": 0.5, "cutout": 3}
    first, second = opened("digits", **changes), opened("digits", **changes)
    assert same(first.train.batches(SEEDS, 3), second.train.batches(SEEDS, 3))
    assert not same(first.train.batches(SEEDS, 3), second.train.batches(SEEDS, 4))
    assert not same(first.train.batches(SEEDS, 3), second.train.batches(Seeds(0, 1), 3))
    assert not same(first.train.batches(SEEDS, 3), second.train.batches(Seeds(1, 0), 3))


def test_two_epochs_may_be_read_side_by_side() -> None:
    data = opened("digits", crop=2)
    pairs = list(zip(data.train.batches(SEEDS, 1), data.train.batches(Seeds(0, 1), 1), strict=True))
    assert same([a for a, _ in pairs], data.train.batches(SEEDS, 1))
    assert same([b for _, b in pairs], data.train.batches(Seeds(0, 1), 1))


@pytest.mark.parametrize("drop_last", [False, True])
def test_start_step_gives_the_tail_of_the_epoch(drop_last: bool) -> None:
    data = opened("digits", crop=2, flip=0.5, cutout=3, drop_last=drop_last)
    whole = list(data.train.batches(SEEDS, 2))
    for start in (0, 1, 5, len(whole)):
        assert same(whole[start:], data.train.batches(SEEDS, 2, start))
    with pytest.raises(ValueError, match="start_step must be an int from 0 to"):
        data.train.batches(SEEDS, 2, len(whole) + 1)


def test_the_last_batch_is_partial_or_left_out() -> None:
    kept, dropped = opened("digits", batch_size=100), opened("digits", batch_size=100, drop_last=True)
    assert [len(y) for _, y in kept.train.batches(SEEDS, 1)] == [100] * 14 + [37]
    assert [len(y) for _, y in dropped.train.batches(SEEDS, 1)] == [100] * 14
    assert (kept.train.steps_per_epoch, dropped.train.steps_per_epoch) == (15, 14)
    assert same(list(kept.train.batches(SEEDS, 1))[:14], dropped.train.batches(SEEDS, 1))
    assert opened("digits", batch_size=5000).train.steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"batch.size must be at most 1437.*drop_last=true, got 5000"):
        opened("digits", batch_size=5000, drop_last=True)
    assert (steps_per_epoch(10, 5, True), steps_per_epoch(11, 5, True), steps_per_epoch(11, 5, False)) == (
        2,
        2,
        3,
    )


def test_without_shuffle_the_files_order_is_kept() -> None:
    y = all_of(opened("digits", shuffle=False).train.batches(SEEDS, 9))[1]
    assert torch.equal(y, _digit_labels())
    assert not torch.equal(y, all_of(opened("digits").train.batches(SEEDS, 9))[1])


def test_validation_is_held_out_and_chosen_by_seed_alone() -> None:
    data = opened("digits", val_fraction=0.2)
    assert data.val is not None and opened("digits").val is None
    train, val = set(data.train.index.tolist()), set(data.val.index.tolist())
    assert len(val) == data.val.num_samples == round(1437 * 0.2)
    assert not train & val and train | val == set(range(1437))
    again, other = opened("digits", val_fraction=0.2), opened("digits", val_fraction=0.2, seed=1)
    assert again.val is not None and other.val is not None
    assert torch.equal(data.val.index, again.val.index)
    assert not torch.equal(data.val.index, other.val.index)
    # no session enters `load`, and augmentation does not touch validation images
    changed = opened("digits", val_fraction=0.2, crop=2, flip=1.0, cutout=4, cutout_p=1.0)
    assert changed.val is not None
    assert same(data.val.batches(), changed.val.batches())
    assert same(data.test.batches(), changed.test.batches())


def test_subsets_are_drawn_from_what_validation_leaves() -> None:
    data = opened("digits", val_fraction=0.2, train_subset=300, test_subset=50)
    larger = opened("digits", val_fraction=0.2, train_subset=400)
    whole = opened("digits", val_fraction=0.2)
    assert data.val is not None and whole.val is not None
    assert torch.equal(data.val.index, whole.val.index)
    assert (data.train.num_samples, data.test.num_samples) == (300, 50)
    assert (
        set(data.train.index.tolist()) <= set(larger.train.index.tolist()) <= set(whole.train.index.tolist())
    )
    assert torch.equal(data.test.labels, all_of(data.test.batches())[1]) and len(data.test.labels) == 50
    assert not torch.equal(data.train.index, opened("digits", train_subset=300, seed=1).train.index)


def test_channels_last_changes_the_layout_and_no_value() -> None:
    chosen = options("synthetic", crop=4, flip=0.5, cutout=8, train_size=200)
    plain, last = (
        load(chosen, data_dir="", device=CPU, batch_size=64, eval_batch_size=64, seed=0, channels_last=c)
        for c in (False, True)
    )
    for x, _ in (*last.train.batches(SEEDS, 1), *last.test.batches()):
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert all(x.is_contiguous() for x, _ in plain.train.batches(SEEDS, 1))
    assert same(plain.train.batches(SEEDS, 1), last.train.batches(SEEDS, 1))
    assert augment.nhwc(last.train.source.data.images)  # so that no batch is copied into the layout


def test_torchs_global_numbers_are_not_touched(tmp_path: Path) -> None:
    folders(tmp_path / "imagenet")
    data = opened("digits", crop=1, flip=0.5), opened("imagenet", tmp_path, **SMALL)
    before = torch.get_rng_state()
    for part in data:
        list(part.train.batches(SEEDS, 1))
        list(part.test.batches())
    assert torch.equal(before, torch.get_rng_state())


# augmentation


def batch(dtype: torch.dtype = torch.uint8, shape: tuple[int, ...] = (64, 3, 9, 7)) -> Tensor:
    images = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(1))
    return images.to(dtype)


def key(number: int = 0) -> torch.Generator:
    return SEEDS.generator("augment", number)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_padding_is_torchs(mode: str) -> None:
    expected = functional.pad(batch(torch.float64), [3] * 4, {"zero": "constant"}.get(mode, mode))
    assert torch.equal(augment.pad(batch(), 3, mode), expected.to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_random_crop_is_a_slice_of_the_padded_image(mode: str, dtype: torch.dtype) -> None:
    images, padding = batch(dtype), 3
    cropped = augment.random_crop(images, padding, mode, key())
    padded = augment.pad(images, padding, mode)
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, 64), generator=key()).tolist()
    for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        assert torch.equal(cropped[i], padded[i, :, top : top + 9, left : left + 7])
    assert set(tops) == set(lefts) == set(range(7))
    assert cropped.dtype == dtype and torch.equal(cropped, augment.random_crop(images, padding, mode, key()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_crop_and_flip_keep_the_layout_and_its_values(mode: str, dtype: torch.dtype) -> None:
    def changed(images: Tensor) -> Tensor:
        generator = key()
        return augment.random_flip(augment.random_crop(images, 3, mode, generator), 0.5, generator)

    plain, last = batch(dtype), batch(dtype).contiguous(memory_format=torch.channels_last)
    assert augment.nhwc(changed(last)) and changed(plain).is_contiguous()
    assert torch.equal(changed(plain), changed(last))


def test_crop_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="padding must be below 9"):
        augment.pad(batch(), 9, "reflect")
    with pytest.raises(ValueError, match="mode must be zero or reflect"):
        augment.pad(batch(), 1, "edge")


def test_flip_mirrors_left_and_right() -> None:
    assert torch.equal(augment.random_flip(batch(), 1.0, key()), torch.flip(batch(), [3]))
    assert torch.equal(augment.random_flip(batch(), 0.0, key()), batch())
    half = augment.random_flip(batch(shape=(4000, 1, 2, 2)), 0.5, key())
    flipped = (half != batch(shape=(4000, 1, 2, 2))).flatten(1).any(1).float().mean()
    assert 0.45 < flipped < 0.55


@pytest.mark.parametrize(("side", "p"), [(1, 0.5), (4, 0.5), (5, 1.0), (20, 0.25)])
def test_cutout_puts_zeros_into_one_square(side: int, p: float) -> None:
    images = batch(torch.float32, (4000, 2, 9, 7))
    result = augment.random_cutout(images, side, p, key())
    holes = augment.cutout_holes(4000, 9, 7, side, p, key())
    hole = result[:, 0] == 0  # no pixel was 0 before
    assert torch.equal(hole, result[:, 1] == 0)
    assert torch.equal(result[~hole[:, None].expand_as(result)], images[~hole[:, None].expand_as(images)])
    area = (holes[:, 2] - holes[:, 0]) * (holes[:, 3] - holes[:, 1])
    assert torch.equal(hole.sum((1, 2)), area) and area.max() <= side**2
    assert abs((area > 0).float().mean() - p) < 0.03
    for i in range(20):
        top, left, bottom, right = holes[i].tolist()
        assert hole[i, top:bottom, left:right].all()
    if side == 1:  # the centre is uniform over the image
        share = hole.float().mean(0) / p
        assert share.min() > 0.35 / 63 and share.max() < 1.7 / 63


def test_cutout_follows_normalisation() -> None:
    data = opened("digits", cutout=8, cutout_p=1.0)
    x, _ = all_of(data.train.batches(SEEDS, 1))
    assert ((x == 0).flatten(1).sum(1) >= 16).all()  # no grey is exactly the mean
    assert not (all_of(opened("digits").train.batches(SEEDS, 1))[0] == 0).any()


def test_zero_padding_is_black_before_normalisation() -> None:
    x, _ = all_of(opened("synthetic", crop=4).train.batches(SEEDS, 1))
    corner = x[:, :, 0, 0]
    assert ((corner == torch.tensor(-0.5 * 255).div(0.21 * 255)).all(1)).float().mean() > 0.5


def test_random_resized_box_lies_inside_and_has_the_stated_area_and_ratio() -> None:
    for i in range(300):
        left, top, right, bottom = augment.random_resized_box(120, 160, key(i))
        assert 0 <= left < right <= 160 and 0 <= top < bottom <= 120
        assert 0.079 < (right - left) * (bottom - top) / (120 * 160) <= 1
        assert 0.72 < (right - left) / (bottom - top) < 1.38
    assert augment.random_resized_box(10, 1000, key()) == (493, 0, 506, 10)  # nothing fits: the middle, 4:3


# folder sets


SMALL: dict[str, Any] = {
    "num_classes": 3,
    "train_size": 12,
    "test_size": 6,
    "shape": [3, 24, 20],
    "batch_size": 5,
    "workers": 0,
}


def folders(
    root: Path, classes: Iterable[str] = ("n01", "n02", "n03"), per_class: tuple[int, int] = (4, 2)
) -> None:
    """A folder set of noisy pictures of unequal sizes, JPEG and PNG, colour, grey and palette."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val"), per_class, strict=True):
        for shade, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (30 + 7 * i, 40 - 3 * i, 3)
                picture = Image.fromarray(random.integers(20 * shade, 20 * shade + 60, size, dtype=np.uint8))
                mode, suffix = [("RGB", "JPEG"), ("L", "JPEG"), ("P", "png"), ("RGB", "jpg")][i % 4]
                picture.convert(mode).save(root / split / name / f"{name}_{i}.{suffix}")


def workers_agree(name: str, data_dir: object, **changes: Any) -> Data:
    """Equal epochs by 0, 1 and 2 workers, augmented and plain, whole and resumed; the set of 0 workers."""
    changes |= {"crop": 2, "flip": 0.5, "cutout": 8, "val_fraction": 0.25}
    alone, one, two = (opened(name, data_dir, **(changes | {"workers": n})) for n in (0, 1, 2))
    epoch = list(alone.train.batches(SEEDS, 1))
    for other in (one, two):
        assert same(epoch, other.train.batches(SEEDS, 1))
        assert same(epoch[1:], other.train.batches(SEEDS, 1, 1))
    assert same(alone.test.batches(), two.test.batches())
    assert alone.val is not None and two.val is not None
    assert same(alone.val.batches(), two.val.batches())
    assert torch.equal(alone.val.labels, all_of(alone.val.batches())[1])
    assert not same(epoch, alone.train.batches(SEEDS, 2))
    assert not same(epoch, alone.train.batches(Seeds(0, 1), 1))
    return alone


@pytest.mark.parametrize("resize", ["squash", "center_crop", "random_resized_crop"])
def test_imagenet_streams_alike_with_any_number_of_workers(resize: str, tmp_path: Path) -> None:
    folders(tmp_path / "imagenet")
    data = workers_agree("imagenet", tmp_path, resize=resize, **SMALL)
    x, y = next(data.train.batches(SEEDS, 1))
    assert x.shape == (5, 3, 24, 20) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert all_of(data.test.batches())[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert [len(y) for _, y in data.train.batches(SEEDS, 1)] == [5, 4]


def test_a_pack_sees_of_files_what_each_session_sees_alone(tmp_path: Path) -> None:
    folders(tmp_path / "imagenet")
    changes = SMALL | {"crop": 2, "flip": 0.5, "cutout": 8}
    train = opened("imagenet", tmp_path, **changes).train
    sessions = [Seeds(0, session) for session in range(3)]
    for first in (0, 1):
        together = list(batches_of(train, sessions, 2, first))
        assert len(together) == 3 - first
        for seat, own in enumerate(sessions):
            apart = [(x[:, 3 * seat : 3 * seat + 3], y[:, seat]) for x, y in together]
            assert same(apart, train.batches(own, 2, first))


def test_imagenette_of_320_pixels_is_found_in_its_full_layout(tmp_path: Path) -> None:
    wnids = [f"n0{i}" for i in range(10)]
    folders(tmp_path / "imagenette2-320", wnids, (2, 1))
    changes: dict[str, Any] = {"size": "320px", "train_size": 20, "test_size": 10, "shape": [3, 32, 32]}
    data = workers_agree("imagenette", tmp_path, batch_size=8, **changes)
    assert all_of(data.test.batches())[1].tolist() == list(range(10))
    assert "imagenette2-160; set data_dir (or NORMBENCH_DATA)" in refused("imagenette", tmp_path)


@pytest.mark.parametrize("resize", ["squash", "center_crop", "random_resized_crop"])
@pytest.mark.parametrize("workers", [0, 2])
def test_kept_images_are_decoded_once_and_are_the_same(resize: str, workers: int, tmp_path: Path) -> None:
    folders(tmp_path / "imagenet")
    changes = SMALL | {"crop": 2, "flip": 0.5, "cutout": 8, "resize": resize, "workers": workers}
    decoded, kept = (opened("imagenet", tmp_path, **changes, cache=cache) for cache in (False, True))
    for epoch in (1, 2):
        assert same(decoded.train.batches(SEEDS, epoch), kept.train.batches(SEEDS, epoch))
        assert same(decoded.test.batches(), kept.test.batches())
    third = list(decoded.train.batches(SEEDS, 3))
    for file in tmp_path.rglob("*.*g"):
        file.write_bytes(b"")
    assert len(all_of(kept.test.batches())[1]) == 6
    if resize == "random_resized_crop":  # another part of the file in every epoch
        with pytest.raises(Refused, match="cannot be read as an image"):
            list(kept.train.batches(SEEDS, 3))
    else:
        assert same(third, kept.train.batches(SEEDS, 3))


def test_images_are_kept_only_where_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normbench.data import kept

    assert kept.free_memory() > 0
    monkeypatch.setattr(kept, "free_memory", lambda: 100.0)
    monkeypatch.setattr(kept, "_kept", {})
    assert kept.room_for((tmp_path, "a"), 5, (1, 3, 3), None) is not None
    assert kept.room_for((tmp_path, "b"), 1, (1, 3, 3), None) is None  # half is promised
    monkeypatch.setattr(kept, "_kept", {})
    assert kept.room_for((tmp_path, "b"), 6, (1, 3, 3), None) is None
    monkeypatch.setattr(kept, "free_memory", lambda: 1e9)
    assert kept.room_for((tmp_path, "b"), 6, (1, 3, 3), None) is None  # decided once
    assert kept.room_for((tmp_path, "b"), 6, (1, 3, 3), True) is not None
    assert kept.room_for((tmp_path, "c"), 6, (1, 3, 3), True) is not None
    assert kept.room_for((tmp_path, "a"), 5, (1, 3, 3), False) is None


@pytest.mark.data
def test_the_real_imagenette_sample_streams() -> None:
    changes: dict[str, Any] = {"train_size": 850, "test_size": 300, "shape": [3, 96, 96], "batch_size": 16}
    small = {"train_subset": 48, "test_subset": 32}
    data = workers_agree("imagenette", real_dir(), **changes, **small)
    x, y = all_of(data.train.batches(SEEDS, 1))
    assert x.shape == (48, 3, 96, 96) and y.min() >= 0 and y.max() < 10
    assert abs(x.mean()) < 0.5 and 0.7 < x.std() < 1.4
    full = opened("imagenette", real_dir(), **changes)
    assert (full.train.num_samples, full.test.num_samples) == (850, 300)


@pytest.mark.data
def test_a_part_of_imagenette_does_not_pass_for_the_whole() -> None:
    message = refused("imagenette", real_dir())
    assert "do not match train_size 9469, test_size 3925" in message
    assert "dataset.train_size=850 dataset.test_size=300" in message


def test_resizing_without_randomness_is_pillows(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    squashed = resized(picture, options("imagenette", shape=[3, 32, 40]), None)
    assert np.array_equal(squashed, picture.resize((40, 32), Image.Resampling.BILINEAR))
    middle = resized(picture, options("imagenette", shape=[3, 28, 28], resize="center_crop"), None)
    expected = picture.resize((48, 32), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    assert np.array_equal(middle, expected)
    # in evaluation a random crop becomes the centre crop
    plain = resized(picture, options("imagenette", shape=[3, 28, 28], resize="random_resized_crop"), None)
    assert np.array_equal(plain, middle)


def test_streams_are_normalised_and_their_holes_are_zero(tmp_path: Path) -> None:
    folders(tmp_path / "imagenet")
    data = opened("imagenet", tmp_path, mean=[0.5], std=[0.5], cutout=10, cutout_p=1.0, **SMALL)
    x, _ = all_of(data.train.batches(SEEDS, 1))
    assert ((x == 0).all(1).flatten(1).sum(1) >= 25).all() and x.min() >= -1 and x.max() <= 1
    assert not (all_of(data.test.batches())[0] == 0).all(1).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_no_image_is_one_line(workers: int, tmp_path: Path) -> None:
    folders(tmp_path / "imagenet")
    broken = tmp_path / "imagenet" / "train" / "n02" / "n02_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    data = opened("imagenet", tmp_path, **(SMALL | {"workers": workers}))
    with pytest.raises(Refused) as error:
        list(data.train.batches(SEEDS, 1))
    assert f"dataset=imagenet: {broken} cannot be read as an image" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_abandoned_epoch_leaves_no_worker_behind(tmp_path: Path) -> None:
    import multiprocessing

    folders(tmp_path / "imagenet")
    data = opened("imagenet", tmp_path, **(SMALL | {"workers": 2}))
    batches = data.train.batches(SEEDS, 1)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_are_deaf_to_stop_requests_from_their_first_moment(tmp_path: Path) -> None:
    import multiprocessing

    folders(tmp_path / "imagenet")
    batches = opened("imagenet", tmp_path, **(SMALL | {"workers": 2})).train.batches(SEEDS, 1)
    next(batches)
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        [blocked] = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert bool(int(blocked, 16) >> (signal.SIGTERM - 1) & 1) is (pid != os.getpid())
    del batches


def test_workers_ignore_stop_requests() -> None:
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in stops}
    try:
        _ignore_signals(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in stops)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("imagenette", "imagenette2-160"),
    ],
)
def test_missing_files_name_the_place_and_the_cure(name: str, folder: str, tmp_path: Path) -> None:
    assert refused(name, tmp_path) == (
        f"dataset={name}: no files under {tmp_path / folder}; "
        "set data_dir (or NORMBENCH_DATA), or dataset.download=true"
    )
    assert not list(tmp_path.iterdir())


def test_missing_or_incomplete_imagenet(tmp_path: Path) -> None:
    message = refused("imagenet", tmp_path, **SMALL)
    assert f"{tmp_path}/imagenet/train and {tmp_path}/imagenet/val" in message
    assert "never downloaded" in message
    folders(tmp_path / "imagenet", per_class=(4, 2))
    assert "if they are meant, set dataset.train_size=12" in refused(
        "imagenet", tmp_path, **(SMALL | {"train_size": 13})
    )
    (tmp_path / "imagenet" / "train" / "n04").mkdir()
    for path in (tmp_path / "imagenet" / "val" / "n01").iterdir():
        path.unlink()
    other = tmp_path / "other"
    (tmp_path / "imagenet").rename(other)
    other.rename(tmp_path / "imagenette2-160")
    assert "incomplete or damaged" in refused("imagenette", tmp_path)


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    def fail(self: object) -> None:
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(CIFAR10, "download", fail)
    message = refused("cifar10", tmp_path, download=True)
    assert f"the download to {tmp_path}/cifar-10-batches-py failed (no route to host)" in message
