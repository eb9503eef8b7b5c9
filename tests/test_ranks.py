"""Several processes that train one session: equal to one process, down to a kill and its resume."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Planner
from test_data import folders, opened
from torch import Tensor
from two_processes import OF_A_RANK, in_each_process, loopback

from normbench import preparing, ranks, training
from normbench.config import Config
from normbench.course import Totals
from normbench.data.loading import Data, TrainPart
from normbench.data.resident import Normalizer
from normbench.plan import read_json
from normbench.ranks import Cut
from normbench.results import COLUMNS
from normbench.seeds import Seeds

STEPS, SIZE = 20, 2
ALONE = ("obn", "gn drop_last", "dropout micro 12")  # of one process only: what others are compared with
# batches of 24, 24, 24, 24, 4 images
TINY = ["model.width=4", "dataset.train_subset=100", "dataset.test_subset=64", "batch.size=24",
        "threads=1", "batch.eval_size=10", "dataset.augment.crop=1", "dataset.augment.flip=0.5",
        "dataset.augment.cutout=3", "dataset.augment.cutout_p=0.5", "optim.label_smoothing=0.1"]  # fmt: skip
SETTINGS = {
    "bn": ["norm=bn"],
    "bn synchronized": ["norm=bn", "sync_bn=true"],
    "obn": ["norm=obn"],
    "obn synchronized": ["norm=obn", "sync_bn=true"],
    "gn": ["norm=gn", "optim=adam"],
    "gn micro 5": ["norm=gn", "optim=adam", "batch.micro=5", "dataset.drop_last=true"],
    "gn drop_last": ["norm=gn", "optim=adam", "dataset.drop_last=true"],
    "dropout": ["norm=gn", "model.dropout=0.2"],
    "dropout micro 12": ["norm=gn", "model.dropout=0.2", "batch.micro=12"],
    "bn micro 12": ["norm=bn", "batch.micro=12"],
    "bn micro 6": ["norm=bn", "batch.micro=6", "dataset.drop_last=true"],
    "fp16": ["norm=bn", "precision=fp16"],
    "proxy": ["norm=proxy"],
}
Result = dict[str, Any]


# shares


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_shares_of_a_batch_are_each_image_once_in_order(size: int, micros: int) -> None:
    for n in (0, 1, 7, 24, 31):
        images = torch.arange(n)
        shares = [images[Cut(micros, rank, size).own(n)] for rank in range(size)]
        assert torch.equal(torch.cat(shares), images)
        parts = [part for share in shares for part in share.tensor_split(micros)]
        assert [len(part) for part in parts] == [len(part) for part in images.tensor_split(size * micros)]


@pytest.mark.parametrize("micro", range(1, 26))
def test_no_micro_batch_is_larger_than_asked(micro: int) -> None:
    cut = Cut.here(25, micro)
    assert max(len(part) for part in torch.arange(25).tensor_split(cut.micros)) <= micro
    assert cut.micros == -(-25 // micro)


def shared(data: Data, rank: int, micros: int = 1) -> TrainPart:
    return replace(data.train, cut=Cut(micros, rank, 3))


def assert_shares_are_the_whole(data: Data) -> None:
    """Every image once, each as one process sees it."""
    for epoch in (1, 2):
        whole = list(data.train.batches(Seeds(0, 0), epoch, 1))
        shares = zip(*(shared(data, rank).batches(Seeds(0, 0), epoch, 1) for rank in range(3)), strict=True)
        for (x, y), parts in zip(whole, shares, strict=True):
            assert torch.equal(torch.cat([part for part, _ in parts]), x)
            assert torch.equal(torch.cat([labels for _, labels in parts]), y)
            assert len({len(labels) for _, labels in parts}) <= 2


def test_ranks_together_see_every_image_once_as_one_process_does() -> None:
    changes = {"train_subset": 100, "crop": 1, "flip": 0.5, "cutout": 3, "cutout_p": 0.5}
    data = opened("digits", batch_size=32, **changes)
    assert_shares_are_the_whole(data)
    seen = [data.train.images_in(step) for step in range(data.train.steps_per_epoch)]
    assert seen == [32, 32, 32, 4] and sum(seen) == data.train.num_samples
    places = torch.arange(len(data.train.source.labels))
    index = replace(data.train, source=Places(places))
    once = [torch.cat([at for at, _ in shared(replace(data, train=index), r).batches(Seeds(0, 0), 1)])
            for r in range(3)]  # fmt: skip
    assert sorted(torch.cat(once).tolist()) == data.train.index.tolist()


class Places:
    """A data set whose images are their own places in the files."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def augmented(self, rows: Any, seeds: Seeds, epoch: int, first: int, own: Any) -> Iterator[Any]:
        return ((whole[own(len(whole))], whole[own(len(whole))]) for whole in rows)


def test_streamed_shares_too(tmp_path: Path) -> None:
    wnids = [f"n{i:08d}" for i in range(2)]
    folders(tmp_path / "imagenet", wnids, (6, 1))
    changes = {"num_classes": 2, "train_size": 12, "test_size": 2, "shape": [3, 24, 24], "cutout": 5}
    assert_shares_are_the_whole(opened("imagenet", tmp_path, batch_size=4, workers=0, **changes))


# what is refused


@contextlib.contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """The environment that torchrun gives a rank."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank)):
            patch.setenv(key, str(value))
        yield


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "norm=mbn sync_bn=true",
            "sync_bn=true: norm=mbn has no other form that is synchronized; use bn, obn",
        ),
        ("norm=sync_bn sync_bn=true", "no other form that is synchronized; leave sync_bn out"),
        (
            "norm=bn sync_bn=true norm.stored_var=biased",
            "sync_bn=true needs norm.stored_var=unbiased, got biased",
        ),
        ("norm=bn sync_bn=true norm.eval_bessel=true", "sync_bn=true needs norm.eval_bessel=false, got true"),
        ("sync_bn=yes", "sync_bn must be true or false"),
        ("batch.micro=0", "batch.micro must be an int ≥ 1, got 0"),
        ("batch.micro=129", "batch.micro=129 is larger than batch.size=128; use 128 or less, or null"),
        ("world=2", "world=2: torchrun --nproc-per-node fills it in; leave it out"),
    ],
)
def test_slips_are_refused(refusal: Callable[..., str], command: str, line: str) -> None:
    assert line in refusal(command)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("batch.size=2", "a batch of 2 samples (batch.size=2, 1437 an epoch) cannot be shared by 4"),
        ("batch.size=718", "a batch of 1 samples (batch.size=718, 1437 an epoch) cannot be "
         "shared by 4 processes; use dataset.drop_last=true"),
        ("batch.size=24 batch.micro=1", "by 4 processes × 6 micro batches; use dataset.drop_last=true"),
        ("norm=bn batch.size=6 dataset=mnist dataset.drop_last=true model=lenet",
         "batch.size=6 in 4 parts: batch statistics need more than one value per channel"),
        ("hydra.launcher.n_jobs=2 session=0,1", "hydra.launcher starts processes of its own"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_share_is_refused(refusal: Callable[..., str], command: str, line: str) -> None:
    with as_rank(0, 4):
        assert line in refusal(command)


def test_the_number_of_ranks_is_part_of_the_setting(plan_of: Planner) -> None:
    alone = plan_of().arms[0]
    with as_rank(1, 4):
        together = plan_of().arms[0]
    assert (together.arm, together.values["world"]) == (f"{alone.arm}-world4", 4)
    assert together.config_hash != alone.config_hash
    micro = plan_of("batch.micro=32", "sync_bn=true", "norm=bn").arms[0]
    assert (
        micro.arm == "bn-resnet9-digits-sync_bn-micro32" or micro.arm == "bn-resnet9-digits-micro32-sync_bn"
    )


def test_options_that_change_nothing_are_warnings(train: Any) -> None:
    plan = train("norm=bn", "sync_bn=true", "batch.micro=24", "steps=1", *TINY)
    document = read_json(plan.session_folder(plan.sessions[0]) / "session.json")
    assert "sync_bn=true changed nothing in one process" in document["row"]["warnings"]
    assert "batch.micro=24 changed nothing" in document["row"]["warnings"]
    assert "SyncBatchNorm" in document["row"]["norm_options"]
    assert {layer["class"] for layer in document["manifest"]["norm_layers"]} == {
        "normbench.norms.sync.SyncBatchNorm"
    }


# two processes against one


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models and images in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        build, normalize = preparing.build, Normalizer.__call__
        patch.setattr(preparing, "build", lambda config: build(config).double())
        patch.setattr(Normalizer, "__call__", lambda self, images: normalize(self, images).double())
        yield


def trained(rank: int, config: Config, overflow: bool = False) -> Result:
    """Twenty steps of a session; with `overflow` rank 1's images are too large for fp16 in the third."""
    precise = in_float64() if config.precision == "fp32" else contextlib.nullcontext()
    with precise:
        ready, seeds = preparing.prepare(config), Seeds(0, 0)
        training.start(ready, seeds)
        totals, train, scales = Totals(ready.device), ready.data.train, []
        batches = zip(range(STEPS), training.endless(ready.data, [seeds]), strict=False)
        for step, (epoch, x, y) in batches:
            before = [p.detach().clone() for p in ready.model.parameters()]
            x = x * 1e30 if overflow and step == 2 and rank == 1 else x
            number = seeds.number("forward", epoch, step + 1)
            loss = training.train_step(ready, x, y, train.images_in(step % train.steps_per_epoch), number)
            totals.add(*loss, y)
            moved = any(not torch.equal(p, b) for p, b in zip(ready.model.parameters(), before, strict=True))
            scales.append((ready.scaler.get_scale(), moved))
        shown = training.evaluate(ready, ready.data.test)[0]
        return {
            "parameters": {name: p.detach().clone() for name, p in ready.model.named_parameters()},
            "buffers": {name: b.clone() for name, b in ready.model.named_buffers()},
            "train": totals.lap()[0],
            "test": (shown.loss, shown.acc),
            "predictions": shown.predictions,
            "labels": shown.labels,
            "scales": scales,
            "layers": [layer.as_dict()["class"] for layer in ready.observation.layers.values()],
        }


def on_a_rank(rank: int, configs: dict[str, Config]) -> Result:
    """Every setting in two processes, and what they agree on."""
    found = {name: trained(rank, config, overflow=name == "fp16") for name, config in configs.items()}
    boundary, heard = ranks.Boundary(), []
    for step in range(400):
        signum, due = boundary.ask(15 if rank == 1 and step >= 5 else None, due=rank == 1 or step >= 3)
        heard.append((signum, due))
    return {
        **found,
        "heard": heard,
        "told": ranks.told(f"from {rank}"),
        "gathered": ranks.gathered(rank),
        "summed": ranks.summed(0.1 + rank, rank),
    }


LAUNCHED: dict[str, Any] = {}  # one launch of two processes serves every test


@pytest.fixture
def together(plan_of: Planner) -> list[Result]:
    """What each of two processes found, of every setting."""
    if "ranks" not in LAUNCHED:
        plans = {name: plan_of(*TINY, *words) for name, words in SETTINGS.items()}
        LAUNCHED["configs"] = {name: plan.config(plan.sessions[0]) for name, plan in plans.items()}
        shared = {name: config for name, config in LAUNCHED["configs"].items() if name not in ALONE}
        LAUNCHED["ranks"] = in_each_process(on_a_rank, shared, processes=SIZE)
    found: list[Result] = LAUNCHED["ranks"]
    return found


def alone(name: str) -> Result:
    """The same in this process."""
    return trained(0, LAUNCHED["configs"][name])


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=1e-10, msg=lambda m, at=name: f"{at}: {m}"
        )


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "whole"),
    [
        pytest.param("bn synchronized", "bn", id="synchronized bn is bn on the joined batch"),
        pytest.param("obn synchronized", "obn", id="synchronized obn is obn on the joined batch"),
        pytest.param("gn", "gn", id="what measures no batch needs no synchronization"),
        pytest.param("gn micro 5", "gn drop_last", id="micro batches add up to the batch, in ranks too"),
        pytest.param("proxy", "proxy", id="a norm with parameters of its own"),
    ],
)
def test_two_processes_equal_one_on_the_joined_batch(together: list[Result], shared: str, whole: str) -> None:
    expected = alone(whole)
    for rank in together:
        found = rank[shared]
        assert_close(found["parameters"], expected["parameters"])
        assert_close(found["buffers"], expected["buffers"])
        assert found["train"] == pytest.approx(expected["train"], abs=1e-10)
        assert found["test"] == pytest.approx(expected["test"], abs=1e-10)
        assert torch.equal(found["predictions"], expected["predictions"])
        assert torch.equal(found["labels"], expected["labels"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "micro"),
    [("bn", "bn micro 12"), ("dropout", "dropout micro 12"), ("bn micro 12", "bn micro 6 of one")],
)
def test_micro_batches_are_the_devices_that_they_mimic(
    together: list[Result], shared: str, micro: str
) -> None:
    """Parameters, dropout's choices included; running statistics are rank 0's there, every part's here."""
    if micro == "bn micro 6 of one":
        shared, micro = "bn micro 6", "bn micro 6"
    expected = alone(micro)
    for rank in together:
        assert_close(rank[shared]["parameters"], expected["parameters"])
        assert rank[shared]["train"] == pytest.approx(expected["train"], abs=1e-10)
    if "bn" in shared:
        steps = {n: int(b) for n, b in together[0][shared]["buffers"].items() if n.endswith("tracked")}
        parts = {n: int(b) for n, b in expected["buffers"].items() if n.endswith("tracked")}
        assert len(steps) > 0 and all(SIZE * steps[name] == parts[name] for name in steps)


@pytest.mark.slow
def test_micro_batches_of_a_norm_that_measures_none_change_nothing(together: list[Result]) -> None:
    assert_close(alone("gn micro 5")["parameters"], alone("gn drop_last")["parameters"])
    assert_close(alone("dropout micro 12")["buffers"], alone("dropout")["buffers"])


@pytest.mark.slow
def test_unsynchronized_bn_is_another_thing_than_bn_on_the_joined_batch(together: list[Result]) -> None:
    ours, whole = together[0]["bn"]["parameters"], alone("bn")["parameters"]
    assert max(float((ours[name] - whole[name]).abs().max()) for name in ours) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ALONE])
def test_all_ranks_hold_and_report_the_same_bits(together: list[Result], name: str) -> None:
    first, second = (rank[name] for rank in together)
    assert_same_bits(first["parameters"], second["parameters"])
    assert_same_bits(first["buffers"], second["buffers"])  # rank 0's, since the evaluation
    assert all(moved for _, moved in first["scales"]) or name == "fp16"
    assert all(repr(first[key]) == repr(second[key]) for key in ("train", "test", "scales"))  # NaN too
    assert torch.equal(first["predictions"], second["predictions"])


@pytest.mark.slow
def test_an_overflow_in_one_rank_skips_the_step_in_all(together: list[Result]) -> None:
    for rank in together:
        scales = rank["fp16"]["scales"]
        assert scales[1][0] / 2 == scales[2][0] and not scales[2][1] and scales[3][1]


@pytest.mark.slow
def test_what_ran_is_in_the_manifest(together: list[Result]) -> None:
    assert set(together[0]["bn synchronized"]["layers"]) == {"normbench.norms.sync.SyncBatchNorm"}
    assert set(together[0]["bn"]["layers"]) == {"normbench.norms.bn.BatchNorm"}


@pytest.mark.slow
def test_what_a_clock_or_a_signal_says_is_agreed_on(together: list[Result]) -> None:
    first, second = together
    assert first["heard"] == second["heard"]
    stops = [step for step, (signum, _) in enumerate(first["heard"]) if signum]
    saves = [step for step, (_, due) in enumerate(first["heard"]) if due]
    assert stops and stops[0] >= 5 and {signum for signum, _ in first["heard"]} == {None, 15}
    assert saves and saves[0] >= 3  # rank 0's clock alone
    assert [(rank["told"], rank["gathered"], rank["summed"]) for rank in together] == [
        ("from 0", [0, 1], [1.2000000000000002, 1.0])
    ] * SIZE


# the command


RUN = [*TINY, "norm=bn", "model.dropout=0.1", "epochs=30", "eval_every=10epochs",
       "save_model=true", "tensorboard=false"]  # fmt: skip
CLOCK = ("_time_s", "_at", "images_per_s", "peak_memory_mib", "time_mean_s", "epochs_timed")


class Launch:
    """One `torchrun --nproc-per-node=2 -m normbench.train …` in a folder, read line by line."""

    def __init__(self, folder: Path, *words: str) -> None:
        run = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
        folder.mkdir(exist_ok=True)
        inherited = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
        paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *run, "-m", "normbench.train", *words],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env=inherited | {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": loopback(), "PYTHONUNBUFFERED": "1",
                             "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def until(self, word: str) -> None:
        """Wait for a line with this word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if word in line:
                return
        raise AssertionError("".join(self.said))

    def end(self, code: int) -> str:
        """Wait for the end; everything that was said."""
        try:
            rest, _ = self.process.communicate(timeout=120)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                self.process.communicate(timeout=60)
        text = "".join(self.said) + rest
        assert self.process.returncode == code, text
        return text


def the_row(folder: Path) -> dict[str, str]:
    with (folder / "outputs" / "adhoc" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    return row


def without_clock(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if not key.endswith(CLOCK)}


@pytest.mark.slow
def test_a_killed_session_of_two_ranks_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    whole = Launch(tmp_path / "whole", *RUN)
    said = whole.end(0)
    assert said.count("epoch 30 ") == 1 and said.count("results: ") == 1
    row = the_row(tmp_path / "whole")
    assert list(row) == COLUMNS
    assert (row["status"], row["batch_size"], row["slots"], row["steps"]) == ("ok", "24", "2", "")
    assert "-world2" in row["arm"] and float(row["images_per_s"]) > 0

    cut = Launch(tmp_path / "cut", *RUN)
    cut.until("epoch 3 ")
    cut.process.send_signal(signal.SIGTERM)
    assert cut.end(1).count("stops after this step") == 1
    (session,) = (tmp_path / "cut" / "outputs" / "adhoc").glob("*/s0")
    assert (session / "checkpoint.pt").is_file() and not (session / "session.json").is_file()
    assert not (session / "failure.json").is_file()
    assert "goes on from step" in Launch(tmp_path / "cut", *RUN).end(0)
    assert without_clock(the_row(tmp_path / "cut")) == without_clock(row)
    epochs, weights = [], []
    for name in ("whole", "cut"):
        (session,) = (tmp_path / name / "outputs" / "adhoc").glob("*/s0")
        assert not list(session.glob("*checkpoint*")) and not list(session.glob("claim*"))
        with (session / "epochs.csv").open() as file:
            epochs.append([without_clock(row) for row in csv.DictReader(file)])
        weights.append(torch.load(session / "model.pt"))
    assert len(epochs[0]) == 30 and epochs[0] == epochs[1]
    assert_same_bits(weights[0], weights[1])


BREAKS = """
import os, pathlib, signal, torch
from normbench.norms.bn import BatchNorm
class Breaks(BatchNorm):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.unused = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        if self.training and os.environ.get("RANK") == "1" and self.num_batches_tracked >= 4:
            if pathlib.Path("kill").is_file():
                pathlib.Path("kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            if pathlib.Path("raise").is_file():
                raise MemoryError("rank 1 has had enough")
        return super().forward(x)
"""


@pytest.mark.slow
def test_an_error_in_one_rank_ends_all_and_is_written_down_and_a_kill_is_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    command = [*TINY, "norm=custom", "norm._target_=breaks.Breaks", "session=0,1", "epochs=2"]

    def left() -> list[tuple[int, str, str]]:
        bodies = [read_json(path) for path in (tmp_path / "outputs" / "adhoc").glob("*/*/failure.json")]
        return [(body["attempt"], body["row"]["status"], body["row"]["error"]) for body in bodies]

    (tmp_path / "raise").touch()
    said = Launch(tmp_path, *command).end(1)
    assert "failed: outputs/adhoc/" in said and "rank 1 has had enough (rank 1)" in said
    assert left() == [(1, "failed", "MemoryError: rank 1 has had enough (rank 1)")]
    (tmp_path / "raise").unlink()

    (tmp_path / "kill").touch()
    said = Launch(tmp_path, *command).end(1)
    assert "1 failed before (retry_failed=true runs them again), 1 to run" in said
    ((_, _, error),) = (found for found in left() if found[1] == "interrupted")
    assert error == "another process of torchrun's was killed"

    said = Launch(tmp_path, *command, "retry_failed=true").end(0)
    assert left() == [] and said.count(": ok, ") == 2 and said.count("results: ") == 1


@pytest.mark.slow
def test_a_slip_is_said_once(tmp_path: Path) -> None:
    said = Launch(tmp_path, "epoch=3").end(1)
    assert said.count("normbench train: unknown key 'epoch'; did you mean 'epochs'?") == 1
    assert "exitcode  : 2" in said
