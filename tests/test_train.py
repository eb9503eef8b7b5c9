"""Sessions end to end on small settings: rows complete, fair, repeatable, and failures kept."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import STUDIES, Trainer
from torch import Tensor, nn

from normbench import preparing, training
from normbench.building import norm_layers_of
from normbench.config import conf_dir
from normbench.data.options import DatasetOptions
from normbench.manifest import never_moved, observe
from normbench.plan import Plan
from normbench.results import COLUMNS, rebuild
from normbench.seeds import Seeds

NORMS = sorted(f.stem for f in (conf_dir() / "norm").glob("*.yaml") if f.stem != "custom")
STUDIED = ["obn", "torch_bn", "bn", "mbn", "bnrs", "brn", "brnc", "bnwos", "in", "bin", "ln", "gn", "nn"]
MODELS = sorted(f.stem for f in (conf_dir() / "model").glob("*.yaml"))
SMALL = ["model.width=4", "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=32", "threads=1"]
TINY = [*SMALL, "epochs=2", "tensorboard=false"]
TIMES = ("_time_s", "_at", "images_per_s", "peak_memory_mib", "epoch_time_mean_s")


def row_of(plan: Plan, arm: int = 0, session: int = 0) -> dict[str, Any]:
    return document_of(plan, arm, session)["row"]


def document_of(plan: Plan, arm: int = 0, session: int = 0) -> dict[str, Any]:
    at = next(s for s in plan.sessions if (s.arm, s.session) == (arm, session))
    return json.loads((plan.session_folder(at) / "session.json").read_text())  # type: ignore[no-any-return]


def numbers_of(plan: Plan, arm: int = 0, session: int = 0) -> list[dict[str, str]]:
    """epochs.csv without its times."""
    at = next(s for s in plan.sessions if (s.arm, s.session) == (arm, session))
    with (plan.session_folder(at) / "epochs.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in csv.DictReader(file)]


def test_a_session_leaves_a_complete_row(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    plan = train("norm=mbn", "stride=2", *SMALL, "epochs=2")
    folder = plan.session_folder(plan.sessions[0])
    row = row_of(plan)
    assert list(row) == COLUMNS
    assert {k for k, v in row.items() if v is None} == {"steps", "val_acc", "error"}
    assert (row["status"], row["norm"], row["stride"], row["epochs"], row["epochs_timed"]) == (
        "ok",
        "mbn",
        2,
        2,
        2,
    )
    assert row["norm_layers"] == 8 and row["warnings"] == ""
    assert 0 < row["epoch_time_s"] < row["total_time_s"]
    assert row["images_per_s"] == pytest.approx(96 / row["epoch_time_s"], rel=0.5)
    assert (folder / "config.yaml").is_file()
    assert list((folder / "tb").glob("events.*"))
    table = pd.read_csv(plan.folder / "results.csv")
    assert list(table.columns) == COLUMNS and len(table) == 1
    said = capsys.readouterr().out
    assert "epoch 1  step 3/6" in said and "images/s" in said
    assert said.strip().splitlines()[-1] == f"results: {plan.folder / 'results.csv'}"


def test_the_loss_falls(train: Trainer) -> None:
    plan = train("model.width=8", "epochs=6", "threads=1", "tensorboard=false", "optim.lr=0.4")
    losses = [float(r["train_loss"]) for r in numbers_of(plan)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_command_twice_gives_identical_rows(train: Trainer) -> None:
    command = ["norm=obn,bin", *TINY, "dataset.val_fraction=0.2", "model.dropout=0.2"]
    first, second = train(*command, "out=one"), train(*command, "out=two")
    for arm in (0, 1):
        assert numbers_of(first, arm) == numbers_of(second, arm)
        a, b = row_of(first, arm), row_of(second, arm)
        assert {k: v for k, v in a.items() if not k.endswith(TIMES)} == {
            k: v for k, v in b.items() if not k.endswith(TIMES)
        }


@pytest.mark.parametrize(
    ("norm", "optim"),
    [
        pytest.param(n, o, marks=[] if n in ("obn", "mbn") and o == "sgd" else pytest.mark.slow)
        for n in NORMS
        for o in (["sgd", "adam"] if n in STUDIED else ["sgd"])
    ],
)
def test_session_1_after_session_0_equals_session_1_alone(train: Trainer, norm: str, optim: str) -> None:
    command = [f"norm={norm}", f"optim={optim}", *TINY, "save_model=true", "model.dropout=0.1"]
    after, alone = train(*command, "session=0,1", "out=after"), train(*command, "session=1", "out=alone")
    assert numbers_of(after, session=1) == numbers_of(alone, session=1)
    weights = [torch.load(p.session_folder(p.sessions[-1]) / "model.pt") for p in (after, alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())
    assert numbers_of(after, session=0) != numbers_of(after, session=1)


def prepared(train_plan: Plan, arm: int = 0) -> training.Prepared:
    return preparing.prepare(train_plan.config(next(s for s in train_plan.sessions if s.arm == arm)))


def test_norms_share_first_batch_and_convolution_weights_bit_for_bit(plan_of: Trainer) -> None:
    plan = plan_of("norm=obn,mbn,gn,nn", *TINY, "session=3")
    readies = [prepared(plan, arm) for arm in range(4)]
    for ready in readies:
        training.start(ready, Seeds(0, 3))
    batches = [next(iter(ready.data.train.batches(Seeds(0, 3), 1))) for ready in readies]
    kernels = [{n: m.weight for n, m in r.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
               for r in readies]  # fmt: skip
    for x, y in batches[1:]:
        assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])
    for other in kernels[1:]:
        assert other.keys() == kernels[0].keys() and len(other) == 9
        assert all(torch.equal(w, kernels[0][name]) for name, w in other.items())


@pytest.mark.slow
def test_sixty_sessions_make_sixty_interleaved_rows(train: Trainer) -> None:
    tiny = ["model.width=2", "dataset.train_subset=32", "dataset.test_subset=32", "steps=1", "threads=1"]
    plan = train("norm=obn,mbn", "session=range(30)", *tiny, "tensorboard=false")
    table = pd.read_csv(plan.folder / "results.csv")
    assert len(table) == 60 and set(table["status"]) == {"ok"}
    assert list(table["launch_order"]) == list(range(60))
    assert list(table["session"]) == [i // 2 for i in range(60)]
    assert set(table["norm"][:2]) == {"obn", "mbn"}
    assert len(set(table["norm"][::2])) == 2, "the order of arms is shuffled"
    assert (pd.to_datetime(table["started_at"]).diff().dropna() >= pd.Timedelta(0)).all()


def test_a_finished_session_is_not_run_again(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    plan = train(*TINY)
    before = (plan.session_folder(plan.sessions[0]) / "session.json").read_bytes()
    train(*TINY, "session=0,1")
    assert "2 sessions: 1 of 2 done, 1 to run" in capsys.readouterr().out
    assert (plan.session_folder(plan.sessions[0]) / "session.json").read_bytes() == before
    assert len(pd.read_csv(plan.folder / "results.csv")) == 2


@pytest.mark.parametrize("ended", [True, False])
def test_a_folder_of_another_setting_is_refused_and_left_alone(
    train: Trainer, refusal: Any, ended: bool
) -> None:
    plan = train(*TINY)
    folder = plan.session_folder(plan.sessions[0])
    if not ended:
        (folder / "session.json").unlink()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.1", "lr: 0.3"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "disagrees with its folder's setting" in refusal(*TINY)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_session_file_is_named_in_one_line(train: Trainer, refusal: Any) -> None:
    plan = train(*TINY)
    ended = plan.session_folder(plan.sessions[0]) / "session.json"
    ended.write_text(ended.read_text()[:100])
    line = refusal(*TINY)
    assert "session.json is damaged" in line and line.count("\n") == 1


def test_a_session_cut_off_while_it_started_is_run_again(train: Trainer) -> None:
    plan = train(*TINY)
    folder = plan.session_folder(plan.sessions[0])
    (folder / "session.json").unlink()
    (folder / "config.yaml").write_text("")
    train(*TINY)
    assert row_of(plan)["status"] == "ok"


@pytest.mark.slow
def test_stats_reads_the_plan_of_the_last_command(train: Trainer) -> None:
    first = train("norm=obn,bn", *TINY)
    other = train("norm=ln", *TINY)
    assert Plan.newest(first.folder) == other
    assert train("norm=obn,bn", *TINY) == Plan.newest(first.folder)


def test_rates_count_the_images_that_were_seen(train: Trainer) -> None:
    plan = train("model.width=4", "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=64",
                 "dataset.drop_last=true", "threads=1", "epochs=1")  # fmt: skip
    row = row_of(plan)
    assert row["images_per_s"] * row["epoch_time_s"] == pytest.approx(64)


def test_results_are_rebuilt_from_the_sessions(train: Trainer) -> None:
    plan = train("norm=obn,bn", *TINY)
    table = plan.folder / "results.csv"
    before = table.read_bytes()
    table.unlink()
    rebuild(plan.folder)
    assert table.read_bytes() == before


def test_divergence_is_a_result(train: Trainer) -> None:
    plan = train("norm=nn", "optim=adam", "optim.lr=1e30", *TINY)
    row = row_of(plan)
    assert row["status"] == "diverged" and row["train_loss"] is None
    assert len(numbers_of(plan)) == 1
    assert pd.read_csv(plan.folder / "results.csv")["status"].tolist() == ["diverged"]


def test_a_failing_session_is_a_row_and_stops_no_other(
    train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = training.train_step

    def breaks(ready: training.Prepared, *batch: Any) -> tuple[Tensor, Tensor]:
        if ready.config.choices["norm"] == "bn":
            raise MemoryError("no more\nof it")
        return step(ready, *batch)

    monkeypatch.setattr(training, "train_step", breaks)
    plan = train("norm=obn,bn", "session=0,1", *TINY, fails=1)
    table = pd.read_csv(plan.folder / "results.csv")
    assert sorted(table["status"]) == ["failed", "failed", "ok", "ok"]
    assert set(table["error"].dropna()) == {"MemoryError: of it"}
    assert "2 of 4 sessions failed" in capsys.readouterr().err
    failed = next(s for s in plan.sessions if plan.arms[s.arm].choices["norm"] == "bn")
    failure = json.loads((plan.session_folder(failed) / "failure.json").read_text())
    assert failure["attempt"] == 1 and "raise MemoryError" in failure["traceback"]
    monkeypatch.setattr(training, "train_step", step)
    train("norm=obn,bn", "session=0,1", *TINY, "retry_failed=true")
    assert set(pd.read_csv(plan.folder / "results.csv")["status"]) == {"ok"}
    assert not (plan.session_folder(failed) / "failure.json").exists()


def test_the_manifest_names_the_operators_that_ran(train: Trainer) -> None:
    plan = train("norm=obn,bn", *TINY, "norm.eps=1e-4")
    fused, readable = (document_of(plan, arm)["manifest"]["norm_layers"] for arm in (0, 1))
    assert len(fused) == len(readable) == 8
    assert fused[0]["class"] == "normbench.norms.obn.FusedBatchNorm"
    assert any("batch_norm" in op for op in fused[0]["ops"]["forward"])
    assert any("batch_norm" in op for op in fused[0]["ops"]["backward"])
    assert any("batch_norm" in op for op in fused[0]["ops"]["eval"])
    assert not any("batch_norm" in op for phase in readable[0]["ops"].values() for op in phase)
    assert fused[0]["input_shape"] == [32, 4, 8, 8] and fused[0]["parameters"] == 8


def test_strided_statistics_really_run_on_the_sample(train: Trainer) -> None:
    plan = train("norm=mbn", "stride=1,2", "norm.impl=reference,auto", *TINY)
    layers = [document_of(plan, arm)["manifest"]["norm_layers"][0] for arm in range(4)]
    impls = [json.loads(row_of(plan, arm)["norm_options"])["impl"] for arm in range(4)]
    for layer, impl in zip(layers, impls, strict=True):
        ran = "aten.convolution" if impl == "reference" else "normbench.batch_norm"
        assert ran in layer["ops"]["forward"] and layer["fused"] == (impl == "auto")
    losses = {(impls[arm], row_of(plan, arm)["stride"]): row_of(plan, arm)["train_loss"] for arm in range(4)}
    for stride in (1, 2):  # equal but for rounding, and no stride is another's
        assert losses["reference", stride] == pytest.approx(losses["auto", stride], rel=1e-3)
    assert losses["auto", 1] != pytest.approx(losses["auto", 2], rel=1e-4)


STRANGERS = '''
import torch
class D2L(torch.nn.Module):
    """d2l's layer: running statistics in plain attributes; and a parameter drawn at random."""
    def __init__(self, num_features):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(num_features) + 0.5)
        self.moving_mean, self._moving_var = torch.zeros(num_features), torch.ones(num_features)
    def forward(self, x):
        mean, var = self.moving_mean, self._moving_var
        self.calls = getattr(self, "calls", 0) + 1
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.moving_mean = (0.9 * self.moving_mean + 0.1 * mean).detach()
            self._moving_var = (0.9 * self._moving_var + 0.1 * var).detach()
        view = (1, -1, 1, 1)
        return (x - mean.view(view)) / (var.view(view) + 1e-5 * self.calls).sqrt() * self.weight.view(view)
class Fused(torch.nn.BatchNorm2d):
    """The 2020 mistake: takes a stride and returns from the fused path before using it."""
    def __init__(self, num_features, *, stride=1, eps=1e-5):
        super().__init__(num_features, eps=eps)
        self.stride = stride
class Rewrapped(torch.nn.BatchNorm2d):
    """The third study's mistake: a gate that is made anew in every forward pass."""
    def __init__(self, num_features):
        super().__init__(num_features)
        self.gate = torch.nn.Parameter(torch.ones(num_features))
    def forward(self, x):
        self.gate_now = torch.nn.Parameter(self.gate.detach().clamp(0, 1))
        return super().forward(x) * self.gate_now.detach().view(1, -1, 1, 1)
'''


def test_an_option_without_effect_and_a_gate_that_never_moves_are_warnings(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mistakes.py").write_text(STRANGERS)
    monkeypatch.syspath_prepend(tmp_path)
    plan = train("norm=custom", "norm._target_=mistakes.Fused", "+norm.stride=4", "+norm.eps=1e-3", *TINY)
    assert row_of(plan)["warnings"] == "norm.stride=4 changed nothing"
    gated = train("norm=custom", "norm._target_=mistakes.Rewrapped", *TINY)
    assert row_of(gated)["warnings"].startswith("never moved: ")
    assert row_of(gated)["warnings"].count(".gate,") == 8, "the gate"
    assert row_of(gated)["warnings"].count(".gate_now") == 8, (
        "and what the forward made, which no optimizer has"
    )


def test_a_strangers_layer_starts_every_session_afresh(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strangers.py").write_text(STRANGERS)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["norm=custom", "norm._target_=strangers.D2L", *TINY, "save_model=true"]
    after, alone = train(*command, "session=0,1", "out=after"), train(*command, "session=1", "out=alone")
    assert numbers_of(after, session=1) == numbers_of(alone, session=1)
    assert not Path("outputs").exists(), "out= is the only folder"
    ready = prepared(after)
    starts = []
    for session in (0, 1, 0):
        training.start(ready, Seeds(0, session))
        starts.append(norm_layers_of(ready.model)["prep.norm"].weight.detach().clone())
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


@pytest.mark.slow
def test_options_that_act_draw_no_warning(train: Trainer) -> None:
    acting = {
        "mbn": [
            "norm.impl=reference",
            "norm.affine_impl=vector",
            "norm.train_affine=false",
            "norm.stored_var=biased",
            "stride=2",
        ],
        "bn": ["norm.eval_bessel=true", "norm.momentum=0.5", "norm.train_bias=false"],
        "bin": ["norm.train_gate=false"],
        "brnc": ["norm.warmup_steps=2", "norm.r_max_step=4", "norm.d_max_step=5", "norm.stats_timing=post"],
        "bnwos": ["norm.num_devices=4", "norm.stats_device=1"],
        "gn": ["norm.num_groups=2"],
    }
    for norm, options in acting.items():
        plan = train(f"norm={norm}", *options, *TINY)
        assert row_of(plan)["warnings"] == "", norm
    plan = train("norm=mbn", "norm.impl=fused", "norm.affine_impl=vector", *TINY)
    assert row_of(plan)["warnings"] == "norm.affine_impl=vector changed nothing"


def test_a_bias_before_a_norm_is_a_note_not_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    x = torch.rand(4, 1, 3, 3)
    seen = observe(model, {"1": model[1]}, lambda: model(x).sum().backward(), lambda: model(x))
    assert seen.layers["1"].fed_by == "0"
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {id(p) for p in model.parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in ("0.bias", "2.bias"):
                p.add_(1)
    assert never_moved(model, first, trained, seen) == (["2.bias"], ["0.bias"])
    assert never_moved(model, first, trained - {id(model[1].weight)}, seen).suspicious == [
        "1.weight",
        "2.bias",
    ]


def test_best_val_reports_another_evaluation_than_last(train: Trainer) -> None:
    command = [*SMALL, "dataset.val_fraction=0.3", "epochs=6", "optim.lr=0.8"]
    last, best = train(*command, "out=last"), train(*command, "select=best_val", "out=best")
    rows = numbers_of(best)
    assert rows == numbers_of(last)
    chosen = max(rows, key=lambda r: float(r["val_acc"]))
    assert row_of(best)["test_acc"] == float(chosen["test_acc"])
    assert row_of(last)["test_acc"] == float(rows[-1]["test_acc"])
    assert row_of(best)["best_test_acc"] == max(float(r["test_acc"]) for r in rows)


def test_steps_and_evaluations_by_steps(train: Trainer) -> None:
    plan = train(*SMALL, "steps=8", "eval_every=3steps")
    rows = numbers_of(plan)
    assert [(r["epoch"], r["step"]) for r in rows] == [("1", "3"), ("2", "6"), ("3", "8")]
    assert all(r["test_acc"] for r in rows)
    assert row_of(plan)["epochs_timed"] == 2 and row_of(plan)["steps"] == 8
    by_epoch = train(*SMALL, "epochs=5", "eval_every=2epochs", "out=b")
    assert [bool(r["test_acc"]) for r in numbers_of(by_epoch)] == [False, True, False, True, True]


WAYS = [
    *("precision=bf16", "precision=fp16", "channels_last=true", "deterministic=true", "optim=adamw"),
    *("optim.label_smoothing=0.1", "optim/schedule=step"),
    *("dataset.augment.crop=1", "dataset.augment.cutout=3"),
]


@pytest.mark.parametrize("extra", [*WAYS[:2], *(pytest.param(w, marks=pytest.mark.slow) for w in WAYS[2:])])
def test_the_ways_to_train_all_train(train: Trainer, extra: str) -> None:
    plan = train("norm=mbn", "stride=2", *TINY, extra)
    assert row_of(plan)["status"] == "ok" and row_of(plan)["warnings"] == ""
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_compiled_training_says_so_and_names_its_kernels(train: Trainer) -> None:
    plan = train("norm=mbn", "stride=2", *TINY, "compile=true", "out=compiled")
    eager = train("norm=mbn", "stride=2", *TINY, "out=eager")
    manifest = document_of(plan)["manifest"]
    assert manifest["compiled"] and manifest["kernels"]
    assert "normbench.batch_norm" in manifest["norm_layers"][0]["ops"]["forward"]
    assert row_of(plan)["compile"] is True
    assert row_of(plan)["train_loss"] == pytest.approx(row_of(eager)["train_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("norm=gn norm.num_groups=6", "num_groups=6 does not divide num_features=4"),
        ("model=lenet", "lenet needs images of at least 16×16, got 8×8"),
        ("batch.size=1 model=lenet dataset=mnist", "batch statistics need more than one value per channel"),
        ("batch.size=479 dataset.train_subset=480 model=lenet dataset=mnist", "use dataset.drop_last=true"),
        ("model.norm_layers=fc", "fc"),
        ("model.norm_layers=[stemm]", "stemm"),
        ("norm=custom norm._target_=no.such.Norm", "no.such.Norm"),
        ("norm=custom norm._target_=torch.nn.BatchNorm2d +norm.epz=1", "epz"),
    ],
)
def test_what_needs_the_model_is_refused_before_data_is_opened(
    command: str, line: str, refusal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "load", None)
    small = "" if "lenet" in command else " model.width=4"
    said = refusal(command + small)
    assert line in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_data_is_refused_once_saying_where_it_looked(refusal: Any, tmp_path: Path) -> None:
    said = refusal("dataset=cifar10 data_dir=nothing steps=1 session=range(30) norm=obn,bn")
    assert said.count("\n") == 1
    assert "nothing/cifar-10-batches-py; set data_dir" in said and "dataset.download=true" in said
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_there_is_refused(refusal: Any) -> None:
    assert "device=cuda:99: this machine has" in refusal("device=cuda:99")


REAL = ["threads=1", "tensorboard=false"]


@pytest.mark.slow
def test_digits_reach_098_by_default(train: Trainer) -> None:
    assert row_of(train("threads=1"))["test_acc"] >= 0.98


@pytest.mark.slow
@pytest.mark.data
def test_mnist_dilated_cnn_reaches_098_within_600_steps(train: Trainer) -> None:
    """On a cycle that peaks at twenty times Adam's usual rate 400 steps of 32 images are enough."""
    plan = train("model=dilated_cnn", "dataset=mnist", "batch.size=32", "batch.eval_size=50", "optim=adam",
                 "optim/schedule=one_cycle", "optim.lr=0.02", "steps=400", "eval_every=400steps",
                 *REAL)  # fmt: skip
    assert row_of(plan)["test_acc"] >= 0.98


@pytest.mark.slow
@pytest.mark.data
def test_lenet_with_batch_norm_beats_the_same_net_without_after_two_epochs(train: Trainer) -> None:
    """Of a quarter of the images, which is harder for those with batch norm: the plain one learns nothing."""
    plan = train("study=d2l_lenet", "session=0", "epochs=2", "dataset.train_subset=15000", *REAL)
    by_norm = {a.choices["norm"]: row_of(plan, i)["test_acc"] for i, a in enumerate(plan.arms)}
    assert by_norm["bn"] > by_norm["nn"] + 0.05 and by_norm["torch_bn"] > by_norm["nn"] + 0.05


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("model", MODELS)
def test_every_studied_norm_trains_in_every_model_on_cifar10_without_a_warning(
    train: Trainer, model: str
) -> None:
    """Four steps of four images: what does not move in the first never moves, as its gradient is zero."""
    plan = train(f"norm={','.join(STUDIED)}", f"model={model}", "dataset=cifar10", "dataset.train_subset=16",
                 "dataset.test_subset=20", "batch.size=4", "steps=4", "optim.lr=0.001", *REAL)  # fmt: skip
    table = pd.read_csv(plan.folder / "results.csv", keep_default_na=False)
    assert len(table) == len(STUDIED) == 13
    assert set(table["status"]) == {"ok"}
    assert set(table["warnings"]) == {""}, table[["norm", "warnings"]].to_string()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet9", "lenet", "dilated_cnn"])
def test_the_rest_of_the_catalogue_trains_without_a_warning(train: Trainer, model: str) -> None:
    rest = [norm for norm in NORMS if norm not in STUDIED]
    narrow = ["model.width=8"] if model == "resnet9" else []
    plan = train(f"norm={','.join(rest)}", f"model={model}", "dataset=synthetic", "dataset.test_subset=20",
                 "batch.size=4", "steps=6", "optim.lr=0.05", *narrow, *REAL)  # fmt: skip
    table = pd.read_csv(plan.folder / "results.csv", keep_default_na=False).set_index("norm")
    assert len(table) == len(rest) > 0
    assert set(table["status"]) == {"ok"}
    warned = {norm: text for norm, text in table["warnings"].items() if text}
    if model == "resnet9":  # a ReLU is flat to a threshold at zero before it: the warning is right
        assert re.fullmatch(r"never moved: ([\w.]+\.tau(, |$))+", warned.pop("frn"))
    assert not warned


def small_folders(root: Path) -> None:
    """ImageNet's and full Imagenette's layouts with a few generated images."""
    from PIL import Image

    names = [f"n{i:08d}" for i in range(10)]
    for base in (root / "imagenet", root / "imagenette2-320"):
        for split in ("train", "val"):
            for i, name in enumerate(names):
                (base / split / name).mkdir(parents=True)
                for k in range(2):
                    Image.new("RGB", (40 + k, 48), (i * 20, k * 90, 60)).save(
                        base / split / name / f"{k}.JPEG"
                    )


FOLDERS = {
    "mbn_r50_imagenet": ["dataset.num_classes=10", "dataset.train_size=20", "dataset.test_size=20"],
    "mbn_r50_imagenette": ["dataset.train_size=20", "dataset.test_size=20"],
}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("study", STUDIES)
def test_every_preset_runs_two_steps_in_every_fidelity(train: Trainer, study: str, tmp_path: Path) -> None:
    quick = ["steps=2", "session=0", "batch.size=4", "batch.eval_size=50", *REAL]
    if study in FOLDERS:
        small_folders(tmp_path / "folders")
        quick += [*FOLDERS[study], "data_dir=folders", "dataset.shape=[3,64,64]", "dataset.workers=0"]
    else:
        quick += ["dataset.test_subset=50"]
    if study.startswith("harman"):
        quick += ["dataset.val_fraction=0.01"]
    plan = train(f"study={study}", *quick)
    for fidelity in list(plan.arms[0].values["study"]["fidelities"] or {})[1:]:
        more = train(f"study={study}", f"fidelity={fidelity}", *quick)
        assert all(math.isfinite(row_of(more, i)["train_loss"]) for i in range(len(more.arms)))
    table = pd.read_csv(plan.folder / "results.csv")
    assert set(table["status"]) == {"ok"}


def test_options_and_layers_have_accessors(plan_of: Trainer) -> None:
    plan = plan_of(*TINY)
    ready = prepared(plan)
    assert len(norm_layers_of(ready.model)) == 8
    assert DatasetOptions.from_mapping(plan.arms[0].values["dataset"]).train_samples == 96


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns(seed: int) -> None:
    from sklearn.metrics import f1_score

    from normbench.course import macro_f1

    torch.manual_seed(seed)
    labels, predictions = torch.randint(0, 9, (50,)), torch.randint(2, 12, (50,))  # some in one only
    expected = f1_score(labels, predictions, average="macro", zero_division=0.0)
    assert macro_f1(labels, predictions) == pytest.approx(expected, rel=1e-12)
