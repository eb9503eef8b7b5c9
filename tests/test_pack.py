"""Several sessions as one network: the numbers, rows and folders that they would have alone."""

import contextlib
import copy
import csv
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Planner, Trainer
from folders import claimed

import normbench.session
from normbench import checkpoint, preparing, training
from normbench import claim as claims
from normbench.building import build, norm_layers_of, state_of
from normbench.config import Config
from normbench.data.resident import Normalizer
from normbench.models.init import initialise
from normbench.optim import make_optimizer
from normbench.packing import own_models, packed
from normbench.plan import Plan, read_json
from normbench.seeds import Seeds
from normbench.sweep import Asked, jobs
from normbench.waves import Wave, looks_at
from normbench.worker import work

NORMS = ["obn", "torch_bn", "bn", "mbn", "bnrs", "brn", "brnc", "bnwos", "in", "bin", "ln", "gn", "nn"]
MODELS = {
    "resnet9": ["model=resnet9", "model.width=2"],
    "resnet_cifar conv": ["model=resnet_cifar", "model.width=2", "model.n=1"],
    "resnet_cifar pad": ["model=resnet_cifar", "model.width=2", "model.n=1", "model.shortcut=pad"],
    "lenet": ["model=lenet"],
    "dilated_cnn": ["model=dilated_cnn", "model.width=2"],
}
SMALL = ["dataset=synthetic", "dataset.shape=[1,16,16]", "dataset.train_size=40", "dataset.test_size=8",
         "dataset.num_classes=4", "dataset.mean=[0.4]", "dataset.std=[0.3]", "batch.size=4", "steps=20",
         "epochs=null", "threads=1", "optim.weight_decay=1e-3"]  # fmt: skip
FAST = ("obn", "mbn", "ln")
K, STEPS = 3, 20


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models and images of double precision."""
    build, normalize = preparing.build, Normalizer.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "build", lambda config: build(config).double())
        patch.setattr(Normalizer, "__call__", lambda self, images: normalize(self, images).double())
        yield


def assert_equal(mine: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    """Parameters and buffers to 1e-12 of their size."""
    assert mine.keys() == alone.keys()
    for name, tensor in alone.items():
        difference = (mine[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1)
        assert tensor.dtype != torch.float32 and difference <= 1e-12, (name, difference)


CONFIGS: dict[str, list[Config]] = {}


@pytest.fixture
def config_of(plan_of: Planner) -> Callable[[str, str], Config]:
    """The config of a norm in a small model, all norms of a model composed at once."""

    def make(model: str, norm: str) -> Config:
        if model not in CONFIGS:
            plan = plan_of(*SMALL, *MODELS[model], f"norm={','.join(NORMS)}")
            CONFIGS[model] = [plan.config(planned) for planned in plan.sessions]
        config = next(c for c in CONFIGS[model] if c.choices["norm"] == norm)
        return replace(config, norm={**config.norm, "stride": 2}) if norm == "mbn" else config

    return make


@pytest.mark.parametrize("norm", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NORMS])
@pytest.mark.parametrize("model", MODELS)
def test_twenty_steps_are_those_of_each_session_alone(
    config_of: Callable[[str, str], Config], model: str, norm: str
) -> None:
    config = config_of(model, norm)
    one = build(config).double()
    wide = packed(one, K)
    mine, alone = own_models(one, wide, K), [copy.deepcopy(one) for _ in range(K)]
    # batch norm of four samples behind sigmoids, which hardly spread, magnifies rounding; small steps do not
    options = {**config.optim, "lr": 0.003 if model == "lenet" else 0.05}
    optimizers = [make_optimizer(options, m, norm_layers_of(m).values()) for m in (wide, *alone)]
    for session, pair in enumerate(zip(mine, alone, strict=True)):
        for each in pair:
            initialise(each, Seeds(0, session))
    images = 8 if norm == "bnwos" else 4  # two values a chunk: a step function, and every rounding grows
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(images, K, 16, 16, dtype=torch.float64, generator=generator)
        y = torch.randint(4, (images, K), generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        training.loss_of(wide(x), y, 0.1).sum().backward()
        for session, each in enumerate(alone):
            training.loss_of(each(x[:, session : session + 1]), y[:, session], 0.1).backward()
        for optimizer in optimizers:
            optimizer.step()
    for session in range(K):
        assert_equal(dict(state_of(mine[session])), dict(state_of(alone[session])))
    assert not torch.equal(*(next(iter(each.parameters())) for each in mine[:2]))


def trained(config: Config, sessions: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """Twenty steps of sessions that sit together, or of one alone, as they train; every session's state."""
    with in_float64():
        ready = preparing.prepare(config)
        seeds, train = [Seeds(0, session) for session in sessions], ready.data.train
        training.start(ready, *seeds)
        for step, (epoch, x, y) in zip(range(STEPS), training.endless(ready.data, seeds), strict=False):
            ready.schedule.apply(ready.optimizer, step)
            numbers = [own.number("forward", epoch, step + 1) for own in seeds]
            images = train.images_in(step % train.steps_per_epoch)
            training.train_step(ready, x, y, images, *numbers)
    return [{name: t.detach().clone() for name, t in state_of(model)} for model in ready.models]


WAYS = [
    ("optim=adam", "model.dropout=0.2", "dataset.augment.crop=2", "dataset.augment.flip=0.5"),
    ("channels_last=true", "model.dropout=0.2", "model.dropout_position=before", "dataset.augment.cutout=4"),
    ("model.weight=weight_norm", "batch.micro=2", "optim.label_smoothing=0.1", "norm=gn"),
    ("model.weight=scaled", "model=lenet", "model.dropout=0.1", "norm=nn", "optim=adamw"),
]


@pytest.mark.parametrize(
    "way", [pytest.param(w, id=w[0], marks=[] if w is WAYS[0] else pytest.mark.slow) for w in WAYS]
)
def test_order_augmentation_and_dropout_are_each_sessions_own(plan_of: Planner, way: tuple[str, ...]) -> None:
    lenet = "model=lenet" in way
    plan = plan_of(*SMALL, *way, *([] if lenet else ["model=resnet9", "model.width=2"]), "optim.lr=0.01")
    config = plan.config(plan.sessions[0])
    together = trained(replace(config, pack=K), range(K))
    for session, mine in enumerate(together):
        (alone,) = trained(config, [session])
        assert_equal(mine, alone)


TINY = ["dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "model.width=4", "threads=1",
        "epochs=3", "save_model=true", "model.dropout=0.1", "checkpoint.every=1epoch", "tensorboard=false",
        "pack=4"]  # fmt: skip
TIMES = ("_time_s", "_at", "images_per_s", "peak_memory_mib", "epoch_time_mean_s", "epochs_timed")


def numbers_of(
    plan: Plan, session: int
) -> tuple[dict[str, Any], list[dict[str, str]], dict[str, torch.Tensor]]:
    """A session's row, epochs and weights, without what a clock or the plan's size says."""
    folder = plan.session_folder(next(s for s in plan.sessions if s.session == session))
    row = read_json(folder / "session.json")["row"]
    with (folder / "epochs.csv").open() as file:
        epochs = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in csv.DictReader(file)]
    kept = {k: v for k, v in row.items() if not k.endswith(TIMES) and k not in ("launch_order", "slots")}
    return kept, epochs, torch.load(folder / "model.pt")


def assert_same(one: Plan, other: Plan, sessions: Iterable[int]) -> None:
    for session in sessions:
        mine, theirs = numbers_of(one, session), numbers_of(other, session)
        assert mine[:2] == theirs[:2] and len(mine[1]) > 0
        assert all(torch.equal(tensor, theirs[2][name]) for name, tensor in mine[2].items())


@pytest.fixture
def whole(train: Trainer) -> Plan:
    """Six sessions, a pack and half a one, that nothing disturbed."""
    return train(*TINY, "session=range(6)", "out=whole")


def test_each_session_has_its_own_folder_and_row(whole: Plan) -> None:
    rows = [numbers_of(whole, session)[0] for session in range(6)]
    assert [row["pack"] for row in rows] == [4] * 6 and len({row["train_loss"] for row in rows}) == 6
    assert {row["status"] for row in rows} == {"ok"} and {row["warnings"] for row in rows} == {""}
    folders = [whole.session_folder(planned) for planned in whole.sessions]
    found = [read_json(folder / "session.json") for folder in folders]
    assert len({body["row"]["epoch_time_s"] for body in found[:4]}) == 1  # the pack's
    layers = found[0]["manifest"]["norm_layers"]
    assert len(layers) == 8 and layers[0]["input_shape"] == [24, 4, 8, 8] and layers[0]["parameters"] == 8
    left = {path.name for folder in folders for path in folder.iterdir()}
    assert left == {"config.yaml", "epochs.csv", "session.json", "model.pt"}


def test_a_session_does_not_depend_on_who_is_beside_it(train: Trainer, whole: Plan) -> None:
    assert_same(whole, train(*TINY, "session=2", "out=some"), [2])
    assert_same(whole, train(*TINY, "session=5,1,0", "out=others"), [5, 1, 0])


class Killed(BaseException):
    """What a kill leaves behind: nothing more is written."""


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Do something before the `at`-th step that a session itself takes."""

    @contextlib.contextmanager
    def make(at: int, act: Callable[[training.Prepared], None]) -> Iterator[None]:
        real_step, real_train, done = training.train_step, normbench.session.train, {"steps": -1}

        def train_loop(*args: Any) -> None:
            done["steps"] = max(0, done["steps"])
            real_train(*args)

        def step(*args: Any) -> Any:
            done["steps"] += done["steps"] >= 0
            if done["steps"] == at + 1:
                act(args[0])
            return real_step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(training, "train_step", step)
            patch.setattr("normbench.session.train", train_loop)
            yield

    return make


def kill(ready: training.Prepared) -> None:
    raise Killed


def fail(ready: training.Prepared) -> None:
    raise RuntimeError("out of memory")


def poison(ready: training.Prepared) -> None:
    """Session 1 diverges: its row of epoch 2, which the fifth step is in, is its last."""
    next(iter(ready.models[1].parameters())).data.fill_(math.inf)


def test_a_killed_pack_ends_as_if_it_had_not_been(
    train: Trainer, whole: Plan, disturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with disturbed(9, kill), pytest.raises(Killed):
        train(*TINY, "session=range(6)", "out=cut")
    capsys.readouterr()
    resumed = train(*TINY, "session=range(6)", "out=cut")
    said = capsys.readouterr().out
    assert "6 sessions: 0 of 6 done, 4 interrupted at epoch 2, 2 to run" in said
    assert " s0-s3: goes on from step 8/12" in said
    assert_same(whole, resumed, range(6))


def test_sessions_at_different_steps_go_on_in_groups(
    train: Trainer, whole: Plan, disturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with disturbed(9, kill), pytest.raises(Killed):
        train(*TINY, "session=range(6)", "out=cut")
    folders = sorted(path.parent for path in Path("cut").rglob(checkpoint.NEWEST))
    (folders[1] / checkpoint.NEWEST).write_bytes(b"")  # the one before serves
    for name in (checkpoint.NEWEST, checkpoint.BEFORE):
        (folders[3] / name).unlink()
    body = dict(checkpoint.read(folders[0] / checkpoint.NEWEST))
    checkpoint.write(folders[2], {**body, "model": {}})  # of other code
    capsys.readouterr()
    resumed = train(*TINY, "session=range(6)", "out=cut")
    said = capsys.readouterr()
    assert " s0: goes on from step 8/12" in said.out and " s1: goes on from step 4/12" in said.out
    assert "its checkpoint does not fit" in said.err
    assert_same(whole, resumed, range(6))


def test_one_that_diverges_ends_alone(train: Trainer, whole: Plan, disturbed: Any) -> None:
    with disturbed(5, poison):
        hurt = train(*TINY, "session=range(4)", "out=hurt")
    assert_same(whole, hurt, [0, 2, 3])
    row, epochs, _ = numbers_of(hurt, 1)
    assert row["status"] == "diverged" and [line["epoch"] for line in epochs] == ["1", "2"]


def test_the_checkpoint_of_an_epoch_in_which_one_diverges_is_written(
    train: Trainer, whole: Plan, disturbed: Any
) -> None:
    with disturbed(5, poison), disturbed(9, kill), pytest.raises(Killed):
        train(*TINY, "session=range(4)", "out=hurt")
    folders = sorted(path.parent for path in Path("hurt").rglob(checkpoint.NEWEST))
    assert [(folder.name, checkpoint.epoch_of(folder)) for folder in folders] == [
        ("s0", 2),
        ("s2", 2),
        ("s3", 2),
    ]
    assert_same(whole, train(*TINY, "session=range(4)", "out=hurt"), [0, 2, 3])


def test_an_error_fails_no_session_that_had_ended(train: Trainer, disturbed: Any) -> None:
    with disturbed(5, poison), disturbed(9, fail):
        hurt = train(*TINY, "session=range(4)", "out=hurt", fails=1)
    assert [hurt.finished(planned) for planned in hurt.sessions] == [False, True, False, False]
    left = {path.name for path in hurt.session_folder(hurt.sessions[1]).iterdir()}
    assert left == {"config.yaml", "epochs.csv", "session.json", "model.pt"}


def test_an_error_fails_every_session_of_its_pack(
    train: Trainer, whole: Plan, disturbed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with disturbed(5, fail):
        failed = train(*TINY, "session=range(6)", "out=failed", fails=1)
    assert "4 of 6 sessions failed" in capsys.readouterr().err
    assert [failed.finished(planned) for planned in failed.sessions] == [False] * 4 + [True] * 2
    assert_same(whole, train(*TINY, "session=range(6)", "out=failed", "retry_failed=true"), range(6))


def test_another_processs_session_is_left_to_it(train: Trainer, whole: Plan, plan_of: Planner) -> None:
    plan = plan_of(*TINY, "session=range(4)", "out=shared")
    theirs = plan.session_folder(plan.sessions[1])
    claimed(theirs, {}, alive=True)
    train(*TINY, "session=range(4)", "out=shared")
    assert_same(whole, plan, [0, 2, 3])
    assert not plan.finished(plan.sessions[1]) and not (theirs / "epochs.csv").exists()
    assert claims.holder(theirs).host == "elsewhere"


def test_a_claim_that_is_lost_takes_only_its_session(
    train: Trainer, whole: Plan, disturbed: Any, plan_of: Planner
) -> None:
    plan = plan_of(*TINY, "session=range(4)", "out=lost")
    theirs = plan.session_folder(plan.sessions[1])

    def take_over(ready: training.Prepared) -> None:
        claimed(theirs, {}, alive=True).rename(theirs / "claim-2.json")

    with disturbed(5, take_over):
        train(*TINY, "session=range(4)", "out=lost")
    assert_same(whole, plan, [0, 2, 3])
    assert not plan.finished(plan.sessions[1]) and (theirs / "claim-2.json").is_file()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pack=1", "pack must be an int ≥ 2, got 1"),
        ("pack=2 precision=fp16", "pack=2: precision=fp16 scales all gradients alike; use bf16 or fp32, or"),
        ("pack=2 sync_bn=true", "pack=2: sync_bn=true measures the batches of all processes together"),
        (
            "pack=2 model=resnet50",
            "pack=2 model=resnet50 norm=obn: ResNet50 has no form for several sessions",
        ),
        (
            "pack=2 norm=frn",
            "norm=frn: FilterResponseNorm has no form for several sessions; use obn, torch_bn,",
        ),
        ("pack=2 norm=mbn_random", "sample=random draws one sample for all channels; use another, or leave"),
    ],
)
def test_what_cannot_be_packed_is_refused(refusal: Callable[..., str], command: str, line: str) -> None:
    assert line in refusal(command)
    assert not Path("outputs").exists()


def test_a_plan_keeps_packs_whole(plan_of: Planner) -> None:
    plan = plan_of("norm=obn,gn", "pack=4", "session=range(10)", "seed=0,1")
    assert plan.block_ends == [8, 16, 20, 28, 36, 40]
    assert [len(pack) for pack in plan.packs()] == [4, 4, 4, 4, 2, 2] * 2
    for pack in plan.packs():
        assert pack == list(range(pack[0], pack[-1] + 1))
        assert len({(plan.sessions[p].arm, plan.sessions[p].seed) for p in pack}) == 1
    assert [plan.seat(planned) for planned in plan.sessions[:4]] == [0, 1, 2, 3]
    assert plan.packs(0, 6)[1] == [4, 5]
    mixed = plan_of("norm=obn", "pack=null,2,4", "session=range(5)")
    assert mixed.block_ends == [12, 15]
    assert sorted(len(pack) for pack in mixed.packs(0, 12)) == [1, 1, 1, 1, 2, 2, 4]
    single = plan_of("norm=obn,gn", "session=range(3)")
    assert single.block_ends == [2, 4, 6] and "pack" not in single.arms[0].setting


def test_slices_and_looks_are_of_whole_packs(plan_of: Planner) -> None:
    plan = plan_of("norm=obn,gn", "pack=4", "session=range(14)")

    def slices(sessions_per_job: int | None) -> list[tuple[int, int]]:
        asked = Asked(False, False, False, None, sessions_per_job, True, False)
        return list(jobs(plan, Wave(0, len(plan.sessions)), asked))

    assert slices(None) == slices(1) == slices(8) == [(0, 8), (8, 16), (16, 24), (24, 28)]
    assert slices(9) == [(0, 16), (16, 28)] and slices(0) == [(0, 28)]
    assert looks_at(plan) == [8, 14]
    assert looks_at(plan_of("norm=obn,gn", "session=range(14)")) == [5, 10, 14]


def test_a_process_is_never_ended_inside_a_pack(plan_of: Planner) -> None:
    plan = plan_of(*TINY, "session=range(6)", "out=most")
    plan.write()
    told: list[list[int]] = []
    assert work(plan, 0, 6, most=1, told=lambda places: told.append(list(places)))
    assert (
        told == [[0, 1, 2, 3], []] and [plan.finished(s) for s in plan.sessions] == [True] * 4 + [False] * 2
    )
    assert not work(plan, 0, 6, most=1)


@pytest.mark.slow
def test_two_processes_share_packs(train: Trainer, whole: Plan) -> None:
    assert_same(whole, train(*TINY, "session=range(6)", "out=two", "hydra.launcher.n_jobs=2"), range(6))


def test_statistics_refuse_to_compare_packed_times_and_memory(train: Trainer) -> None:
    plan = train(*TINY, "norm=obn,mbn", "session=range(4)", "out=times")
    metrics = ["--metric", "epoch_time_s", "--metric", "peak_memory_mib", "--metric", "test_acc"]
    command = [sys.executable, "-m", "normbench.stats", str(plan.folder), *metrics]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.count("not comparable: pack=4: a packed session's") == 2
    assert "a packed session's time is its pack's" in found
    assert "a packed session's memory is its pack's" in found
