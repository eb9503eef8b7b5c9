"""Traces see what layers really did, change nothing, survive a kill; TensorBoard reads what is written."""

# ruff: noqa: F811  # the fixture `killed`

import copy
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Planner, Trainer
from layers import NAMES, build
from planted import Plain
from test_graphed import stand_in
from test_resume import assert_same, killed  # noqa: F401  # a fixture
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from normbench import preparing, training
from normbench.figures import svg_of, words_of
from normbench.graphed import GraphedStep
from normbench.plan import Plan
from normbench.rules import Interval
from normbench.seeds import Seeds
from normbench.traces import figures, tables
from normbench.traces.choosing import channels_of, feature_names, units
from normbench.traces.features import Seen, quantiles_of
from normbench.traces.moments import Moments
from normbench.traces.norms import steps_between
from normbench.traces.reading import arms_of, read_traces

TINY = ["model.width=4", "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "epochs=2",
        "threads=1", "save_model=true", "tensorboard=false"]  # fmt: skip
BOTH = "trace=[norms,features]"
EVERY = [BOTH, "traces.every=1"]


def tiny(*extra: str) -> list[str]:
    """TINY with these options, which replace its own."""
    given = {option.partition("=")[0] for option in extra}
    return [*(option for option in TINY if option.partition("=")[0] not in given), *extra]


def folder_of(plan: Plan, at: int = -1) -> Path:
    return plan.session_folder(plan.sessions[at])


def trace(plan: Plan, kind: str = "norms", at: int = -1) -> pd.DataFrame:
    return pd.read_csv(folder_of(plan, at) / "traces" / f"{kind}.csv")


# ---- what is seen ----------------------------------------------------------------------------------------

# a layer without an entry measures no batch moments, or several, or makes them another way
MEAN = {"bin", "bn", "bn_no_affine", "bnrs", "brn", "brnc", "cbn", "cumulative_bn", "dbn", "dbn_cholesky",
        "dbn_group", "ebn", "evonorm_b0", "ghost", "iternorm", "l1bn", "mbn", "mbn_batch", "mbn_random",
        "mbn_rows", "mean_bn", "memorized_bn", "obn", "range_bn", "renorm", "sync_bn", "torch_bn",
        "var_bn"}  # fmt: skip
VAR = MEAN - {"dbn", "dbn_cholesky", "dbn_group", "iternorm", "l1bn", "range_bn"}
SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "mbn": lambda x: x[..., ::2, ::2],
    "mbn_rows": lambda x: x[..., ::2, :],
    "mbn_batch": lambda x: x[::2],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_moments_of_every_norm_are_those_of_its_sample_or_unknown(name: str) -> None:
    layer = build(name, 4, torch.float32)
    x = (torch.randn(6, 4, 5, 3) * 2 + torch.arange(4.0).view(1, 4, 1, 1)).requires_grad_()
    twin, seen = copy.deepcopy(layer), Moments()
    torch.manual_seed(0)
    seen.enter(x)
    y = layer(x)
    seen.leave()
    torch.manual_seed(0)
    assert torch.equal(y, twin(x))  # watched or not, it is the same
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))
    assert (seen.mean is not None, seen.var is not None) == (name in MEAN, name in VAR)
    if name == "mbn_random":  # which positions it drew is its own affair
        return
    sample = SAMPLES.get(name, lambda x: x)(x.detach())
    if seen.mean is not None:
        torch.testing.assert_close(seen.mean, sample.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    if seen.var is not None:
        torch.testing.assert_close(seen.var, sample.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


WRITTEN: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "two passes": lambda x: (m := x.mean((0, 2, 3)), ((x - m.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))),
    "squares": lambda x: (m := x.mean((0, 2, 3)), (x * x).mean((0, 2, 3)) - m * m),
    "var_mean": lambda x: torch.var_mean(x, (0, 2, 3))[::-1],
    "std": lambda x: (x.mean((0, 2, 3)), x.std((0, 2, 3))),
    "sums": lambda x: (
        m := x.sum((0, 2, 3)) / 90,
        (x - m[:, None, None]).square().sum((0, 2, 3)) / 90,
    ),
    "channels first": lambda x: (
        (rows := x.transpose(0, 1).reshape(4, -1)).mean(1),
        rows.var(1, correction=0),
    ),
    "channels last": lambda x: (
        (rows := x.permute(0, 2, 3, 1).reshape(-1, 4)).mean(0),
        rows.var(0, correction=0),
    ),
    "float64": lambda x: (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_moments_are_found_however_a_stranger_writes_them(way: str) -> None:
    x = (torch.randn(6, 4, 5, 3) * 2 + 1).requires_grad_()
    seen = Moments()
    seen.enter(x)
    WRITTEN[way](x)
    seen.leave()
    assert seen.mean is not None and seen.var is not None
    torch.testing.assert_close(seen.mean.float(), x.detach().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    expected = x.detach().var((0, 2, 3), correction=0)
    torch.testing.assert_close(seen.var.float(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_batch_moment_stays_unknown() -> None:
    x = torch.randn(4, 4, 5, 3)  # as many samples as channels: only the axes tell
    seen = Moments()
    for wrong in (
        lambda: x.mean((1, 2, 3)),  # of each sample
        lambda: x.abs().mean((0, 2, 3)),
        lambda: [part.mean((0, 2, 3)) for part in x.chunk(2)],  # several
        lambda: x[:, :2].mean((0, 2, 3)),
        lambda: nn.functional.instance_norm(x),
        lambda: nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4)),  # evaluation
    ):
        seen.enter(x)
        wrong()
        seen.leave()
        assert seen.mean is None and seen.var is None


def in_place(x: Tensor) -> None:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    var.add_(1e-5).rsqrt_()
    mean.neg_()


def branching(x: Tensor) -> None:
    torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
    torch.var_mean(x, (0, 2, 3), correction=0)


@pytest.mark.parametrize("layer", [in_place, branching])
def test_what_a_layer_does_beside_measuring_is_its_own_affair(layer: Callable[[Tensor], None]) -> None:
    x, seen = torch.randn(6, 4, 5, 3) * 2 + 1, Moments()
    seen.enter(x)
    layer(x)
    seen.leave()
    assert seen.mean is not None and seen.var is not None
    torch.testing.assert_close(seen.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(seen.var, x.var((0, 2, 3), correction=0))


def test_channels_in_another_order_are_no_moments() -> None:
    x, seen = torch.randn(6, 4, 5, 3), Moments()
    for order in (lambda: x[:, [3, 2, 1, 0]], lambda: x.index_select(1, torch.tensor([1, 0, 3, 2]))):
        seen.enter(x)
        order().mean((0, 2, 3))
        seen.leave()
        assert seen.mean is None


def test_a_compiled_part_of_a_layer_stays_compiled() -> None:
    calls = []

    def backend(graph: Any, examples: Any) -> Any:
        return lambda *given: calls.append(0) or graph(*given)

    compiled = torch.compile(lambda x: x - x.mean((0, 2, 3), keepdim=True), backend=backend)
    x, seen = torch.randn(6, 4, 5, 3), Moments()
    compiled(x)
    seen.enter(x)
    compiled(x)
    seen.leave()
    assert len(calls) == 2


class Noting(Plain):
    """Writes down the moments that it uses; its parameters lie in a layer inside, as strangers' may."""

    noted: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = super().moments(x)
        self.noted.append((mean.detach().clone(), var.detach().clone()))
        return mean, var


def test_a_strangers_values_are_those_it_used(train: Trainer) -> None:
    plan = train(*tiny("norm=custom", "norm._target_=test_traces.Noting", "model.norm_layers=last",
                       "epochs=1", "trace=norms", "traces.every=1", "traces.channels=all"))  # fmt: skip
    used = Noting.noted[-4:]  # the rest of the session's: training alone measures
    frame = trace(plan)
    assert len(frame) == 4 * 16 and frame["channel"].tolist() == 4 * list(range(16))
    for (mean, var), (_, rows) in zip(used, frame.groupby("step"), strict=True):
        assert torch.equal(torch.tensor(rows["batch_mean"].to_numpy(np.float32)), mean)
        np.testing.assert_array_equal(rows["batch_std"].to_numpy(np.float32), np.sqrt(var.numpy()))


class Odd(nn.Module):
    """Nothing per channel, an attribute called weight that is none, an argument that is no tensor."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = "heavy"
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.tensor(0.5)) * self.scale * 1


def test_a_layer_without_such_values_has_empty_columns(train: Trainer) -> None:
    for norm in ("norm=nn", "norm=custom norm._target_=test_traces.Odd"):
        plan = train(*norm.split(), *TINY, *EVERY)
        frame = trace(plan)
        assert len(frame) == 8 * 3 * 4 and frame[list(tables.QUANTITIES)].isna().all(axis=None)
        assert len(trace(plan, "features")) == 2 * 4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_columns_agree_with_one_another(train: Trainer, precision: str) -> None:
    """Plain SGD: weight falls by lr · gradient, the running mean moves a tenth towards the batch's."""
    plan = train("norm=obn", *TINY, "trace=norms", "traces.every=1", "optim.momentum=0",
                 "optim.weight_decay=0", "optim.nesterov=false", "optim/schedule=constant",
                 f"precision={precision}")  # fmt: skip
    frame = trace(plan)
    columns = ["layer", "channel", *tables.QUANTITIES]
    one, two = (frame[frame["step"] == step][columns].reset_index(drop=True) for step in (3, 4))
    assert (one[["weight_grad", "bias_grad"]].abs().max() > 0).all()
    lr = plan.arms[0].values["optim"]["lr"]
    for name in ("weight", "bias"):
        np.testing.assert_allclose(two[name], one[name] - lr * one[f"{name}_grad"], rtol=1e-5, atol=1e-7)
    expected = 0.9 * one["running_mean"] + 0.1 * two["batch_mean"]
    np.testing.assert_allclose(two["running_mean"], expected, rtol=1e-4, atol=1e-6)
    assert (frame["batch_std"] > 0).all()


def test_features_are_those_of_the_evaluation(train: Trainer) -> None:
    plan = train("norm=mbn", *TINY, "trace=features", "traces.features=[first,head_input,fc]")
    ready = preparing.prepare(plan.config(plan.sessions[0]))
    ready.model.load_state_dict(torch.load(folder_of(plan) / "model.pt"))
    ready.model.eval()
    seen: dict[str, list[Tensor]] = {"prep": [], "fc": [], "head_input": []}
    ready.model.get_submodule("prep").register_forward_hook(lambda m, a, y: seen["prep"].append(y))
    fc = ready.model.get_submodule("fc")
    fc.register_forward_pre_hook(lambda m, a: seen["head_input"].append(a[0]))
    fc.register_forward_hook(lambda m, a, y: seen["fc"].append(y))
    with torch.no_grad():
        logits = torch.cat([ready.model(x) for x, _ in ready.data.test.batches(0, 1)])
    frame = trace(plan, "features")
    last = frame[frame["epoch"] == 2].set_index("layer")
    assert list(last.index) == ["prep", "fc", "head_input"] and set(last["part"]) == {"test"}
    for layer, parts in seen.items():
        values = torch.cat(parts).flatten().numpy()
        assert last.loc[layer, "values"] == last.loc[layer, "out_of"] == values.size
        quantiles = np.quantile(values, [0.01, 0.2, 0.8, 0.99])
        np.testing.assert_allclose(
            last.loc[layer, ["q01", "q20", "q80", "q99"]].tolist(), quantiles, rtol=1e-6
        )
    peaks = trace(plan, "logits").iloc[-1]
    assert peaks["peak_mean"] == pytest.approx(logits.amax(1).double().mean().item(), rel=1e-6)


def test_the_validation_part_is_watched_where_there_is_one(train: Trainer) -> None:
    plan = train(*TINY, "trace=features", "dataset.val_fraction=0.25", "eval_every=2epochs")
    assert set(trace(plan, "features")["part"]) == {"val"} and set(trace(plan, "logits")["epoch"]) == {2}


def test_a_large_output_is_sampled_evenly() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 12, 8, 8) * (1 + torch.arange(12.0).view(1, 12, 1, 1))
    for layout in (torch.contiguous_format, torch.channels_last):
        seen = Seen()
        seen.add(x.to(memory_format=layout), 5000)
        values = seen.values()
        assert 4000 < values.size <= 5000 and seen.out_of == x.numel()
        np.testing.assert_allclose(quantiles_of(values), quantiles_of(x.numpy().ravel()), atol=0.8)


def test_no_values_and_infinite_ones_have_quantiles_all_the_same() -> None:
    assert all(map(math.isnan, quantiles_of(np.empty(0, np.float32))))
    assert all(map(math.isnan, quantiles_of(np.array([1, math.nan], np.float32))))
    assert quantiles_of(np.array([0, 1, math.inf], np.float32))[0] == pytest.approx(0.02)


# ---- nothing changes -------------------------------------------------------------------------------------

UNCHANGED = ["norm=obn model.dropout=0.1", "norm=mbn stride=2", "norm=bn precision=bf16 channels_last=true",
             "norm=gn batch.micro=12", "norm=mbn pack=2 session=0,1"]  # fmt: skip


@pytest.mark.parametrize("extra", UNCHANGED)
def test_a_trace_changes_no_bit(train: Trainer, extra: str) -> None:
    plain = train(*TINY, *extra.split(), "out=plain")
    traced = train(*TINY, *extra.split(), *EVERY, "out=traced")
    assert plain.arms[0].setting == traced.arms[0].setting
    assert_same(plain, traced)
    assert len(trace(traced)) == 8 * 3 * 4
    assert not (folder_of(plain) / "traces").exists()


@pytest.mark.slow
def test_a_compiled_session_shows_its_state_and_keeps_its_bits(train: Trainer) -> None:
    plain = train(*TINY, "norm=mbn", "compile=true", "out=plain")
    traced = train(*TINY, "norm=mbn", "compile=true", *EVERY, "out=traced")
    assert_same(plain, traced)
    frame = trace(traced)
    assert frame[["batch_mean", "batch_std"]].isna().all(axis=None)
    assert frame[list(tables.QUANTITIES[2:])].notna().all(axis=None)
    assert trace(traced, "features").empty and len(trace(traced, "logits")) == 2


def test_packed_sessions_have_a_set_each(train: Trainer) -> None:
    packed = train(*TINY, "norm=mbn", "pack=2", "session=0,1", *EVERY, "out=packed")
    alone = train(*TINY, "norm=mbn", "session=0,1", *EVERY, "out=alone")
    for session in (0, 1):
        for kind in ("norms", "features", "logits"):
            one, other = trace(packed, kind, session), trace(alone, kind, session)
            keys = [c for c in one if not pd.api.types.is_float_dtype(one[c])]
            pd.testing.assert_frame_equal(one[keys], other[keys])
            first = one["step"] == one["step"].min()  # packed sums round in another order, which grows
            numbers = [c for c in one if c not in keys]
            np.testing.assert_allclose(
                one.loc[first, numbers], other.loc[first, numbers], rtol=2e-3, atol=1e-4
            )
    assert not trace(packed, at=0)["weight_grad"].equals(trace(packed, at=1)["weight_grad"])


def test_recorded_steps_are_traced_as_they_are(plan_of: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(*TINY, "norm=mbn", "trace=norms", "traces.every=3")
    ready = preparing.prepare(plan.config(plan.sessions[0]))
    watch = ready.norm_watch
    assert watch is not None
    training.start(ready, Seeds(0, 0))
    batches = [
        (x, y) for _, (_, x, y) in zip(range(6), training.endless(ready.data, [Seeds(0, 0)]), strict=False)
    ]
    parameters = [p for group in ready.optimizer.param_groups for p in group["params"]]
    plain, ready.graphed = training.gradients_of, None
    made = GraphedStep(lambda x, y: plain(ready, x, y, None, None), lambda: training.update(ready),
                       parameters, stand_in(ready))  # fmt: skip
    made.record(*batches[0], [tensor for _, tensor in training.state_of(ready.model)])
    ready.graphed, eager = made, []

    def gradients(*given: Any) -> Any:
        eager.append(watch.now)
        return plain(*given)

    monkeypatch.setattr(training, "gradients_of", gradients)
    for step, (x, y) in enumerate(batches, start=1):
        with training.watched(ready, 1, step):
            training.train_step(ready, x, y, len(y), 0)
    assert eager == [(1, 1), (1, 3), (1, 6)]
    assert [sample.step for sample in watch.drain()[0]] == [1] * 3 + [3] * 3 + [6] * 3


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt


def test_hooks_are_there_on_traced_steps_alone(plan_of: Planner) -> None:
    plan = plan_of(*TINY, "norm=mbn", BOTH)
    ready = preparing.prepare(plan.config(plan.sessions[0]))
    assert ready.norm_watch is not None and ready.feature_watch is not None

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in ready.model.modules())

    counts = []
    for step in (1, 2, 20):  # four steps an epoch
        with ready.norm_watch.step(1, step):
            counts.append(hooks())
    norm = ready.model.get_submodule("prep.norm")
    with pytest.raises(KeyboardInterrupt), ready.norm_watch.step(1, 1):
        norm.register_forward_pre_hook(interrupted)
        ready.model(torch.zeros(2, 1, 8, 8))
    norm._forward_pre_hooks.clear()
    assert not is_in_torch_dispatch_mode()
    with (
        pytest.raises(ZeroDivisionError),
        ready.norm_watch.step(1, 1),
        ready.feature_watch.over({0: ready.model}),
    ):
        raise ZeroDivisionError
    assert counts == [6, 0, 6] and hooks() == 0


# ---- kills, divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(), ("pack=2", "session=0,1")], ids=["alone", "packed"])
def test_a_cut_off_session_has_the_traces_of_an_undisturbed_one(
    train: Trainer,
    killed: Any,
    extra: tuple[str, ...],
) -> None:
    command = tiny(*extra, BOTH, "traces.every=3", "epochs=3", "checkpoint.every=1epoch", "norm=mbn")
    whole = train(*command, "out=whole")
    killed(*command, "out=cut", at=10)  # after the second epoch's checkpoint, with step 9 traced since
    with (folder_of(whole) / "traces/norms.csv").open() as file:
        steps = sorted({int(row["step"]) for row in csv.DictReader(file)})
    assert steps == [1, 3, 6, 9, 12]
    for kind in ("norms", "features", "logits"):
        path = next(Path("cut").rglob(f"s0/traces/{kind}.csv"))
        with path.open("a") as file:
            file.write("9,3,prep.norm,0,0.5\n11,")  # what a kill may leave behind the checkpoint
    resumed = train(*command, "out=cut")
    assert_same(whole, resumed)
    for place in range(len(whole.sessions)):
        for kind in ("norms", "features", "logits"):
            one, other = (folder_of(plan, place) / "traces" / f"{kind}.csv" for plan in (whole, resumed))
            assert one.read_text() == other.read_text()


def test_a_checkpoint_inside_an_epoch_keeps_what_was_traced_before(
    train: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normbench import interrupt

    command = [*TINY, "trace=norms", "traces.every=1", "norm=obn"]
    whole = train(*command, "out=whole")
    real, done = training.train_step, []

    def step(*given: Any) -> Any:
        done.append(0)
        if len(done) == 9:
            interrupt.ask_to_stop()
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", step)
        train(*command, "out=cut", fails=143)
    resumed = train(*command, "out=cut")
    assert_same(whole, resumed)
    assert trace(whole).equals(trace(resumed))


def test_a_diverged_session_keeps_its_traces(train: Trainer) -> None:
    plan = train(*tiny(*EVERY, "norm=nn", "optim.lr=1e30", "tensorboard=true"))
    row = pd.read_csv("outputs/adhoc/results.csv").iloc[0]
    assert row["status"] == "diverged"
    assert len(trace(plan)) and trace(plan, "logits")["peak_mean"].isna().any()


# ---- what may be asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "trace=norm",
            "trace must be norms, features, [norms,features] or null, got 'norm'; did you mean 'norms'?",
        ),
        ("trace=[norms,feature]", "got 'feature'; did you mean 'features'?"),
        (
            "trace=norms,features",
            "it makes no arms; give one value, or all of them as one: trace=[norms,features]",
        ),
        ("traces.every=2", "traces.every=2 changes nothing without trace=norms; add that"),
        ("trace=norms traces.features=[fc]", "changes nothing without trace=features; add that"),
        ("trace.every=2", "unknown key 'trace.every'; did you mean 'traces.every'?"),
        ("traces=null", "traces holds other keys; set one of them: traces.every, traces.layers, "),
        ("traces.every=0", "traces.every must be a count ≥ 1"),
        ("traces.channels=0", "traces.channels must be all, a count ≥ 1 or a list like [0,-1], got 0"),
        ("traces.channels=[a]", "traces.channels must be all"),
        ("traces.layers=[]", "traces.layers must be all or a list of names"),
        ("traces.layer=all", "unknown key 'traces.layer'; did you mean 'traces.layers'?"),
        (
            "trace=norms traces.layers=[prep]",
            "traces.layers: the model has no 'prep'; did you mean 'prep.norm'?",
        ),
        ("trace=norms traces.layers=xyz", "traces.layers: the model has no 'xyz'; there are prep.norm, "),
        ("trace=norms traces.channels=[300]", "prep.norm has channels 0 to 63, got 300; use -1 for the last"),
        ("trace=features traces.features=[laier1]", "the model has no 'laier1'; did you mean 'layer1'?"),
    ],
)
def test_what_a_trace_cannot_look_at_is_refused_in_one_line(
    refusal: Callable[..., str], command: str, line: str
) -> None:
    said = refusal(command)
    assert line in said and said.count("\n") == 1


def test_by_default_ten_steps_of_an_epoch_are_traced_and_no_more_than_one_in_20() -> None:
    every = [steps_between(None, steps) for steps in (1, 12, 209, 210, 469, 30_000)]
    assert every == [20, 20, 20, 21, 46, 3000]
    assert steps_between(Interval(1, "epochs"), 12) == 12 and steps_between(Interval(1, "steps"), 469) == 1


def test_first_middle_last_units_and_channels(plan_of: Planner) -> None:
    from normbench.building import build as build_model

    def model(*command: str) -> nn.Module:
        plan = plan_of(*command)
        return build_model(plan.config(plan.sessions[0]))

    ask = {"features": ["first", "middle", "last", "head_input"]}
    assert (
        feature_names(model(), {"features": ["all"]})
        == units(model())
        == feature_names(model(), {"features": "all"})
    )
    assert feature_names(model(), ask) == ["prep", "res1b", "layer3", "head_input"]
    assert feature_names(model("model.norm_layers=none"), ask) == ["prep", "res1b", "layer3", "head_input"]
    resnet = model("model=resnet50", "dataset=cifar10")
    assert units(resnet)[:2] == ["layer1.0", "layer1.1"] and len(units(resnet)) == 16
    assert channels_of(4, 64, "x") == [0, 21, 42, 63] and channels_of(1, 64, "x") == [63]
    assert channels_of(9, 3, "x") == [0, 1, 2] and channels_of([-1, 0, 63], 64, "x") == [0, 63]


# ---- TensorBoard -----------------------------------------------------------------------------------------


def test_tensorboard_reads_scalars_histograms_and_hyperparameters(train: Trainer) -> None:
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    plan = train(*tiny("tensorboard=true", *EVERY, "norm=obn,mbn", "session=0,1"))
    events = EventMultiplexer().AddRunsFromDirectory("outputs/adhoc").Reload()
    runs = {f"{plan.arms[s.arm].setting}/s{s.session}/tb": s for s in plan.sessions}
    assert set(events.Runs()) == set(runs)
    for name, planned in runs.items():
        assert [e.step for e in events.Tensors(name, "loss/train")] == [4, 8]
        assert len(events.Tensors(name, "trace_batch_std/layer3.norm/15")) == 8
        histograms = {
            f"trace_histograms/{what}" for what in ("features/prep", "weight/prep.norm", "logits/peak")
        }
        assert histograms <= set(events.Runs()[name]["tensors"])
        row = pd.read_csv("outputs/adhoc/results.csv").set_index("launch_order").loc[planned.launch_order]
        shown = events.Tensors(name, "final/test_acc")[0].tensor_proto.float_val[0]
        assert shown == pytest.approx(row["test_acc"])

    provider = MultiplexerDataProvider(events, "outputs/adhoc")
    context = backend_context.Context(TBContext(data_provider=provider))
    experiment = context.experiment_from_metadata(
        RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), []
    )
    assert {h.name for h in experiment.hparam_infos} >= {"norm", "stride", "lr", "batch_size"}
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=statuses)
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert {(g.hparams["norm"].string_value, g.hparams["stride"].string_value) for g in groups} == {
        ("obn", "none"), ("mbn", "1")}  # fmt: skip
    assert {g.name for g in groups} == {arm.setting for arm in plan.arms}
    assert all(s.status == api_pb2.STATUS_SUCCESS for g in groups for s in g.sessions)
    rows = pd.read_csv("outputs/adhoc/results.csv").groupby("setting")["test_acc"].mean()
    for group in groups:
        assert len(group.sessions) == 2
        shown = next(m.value for m in group.metric_values if m.name.tag == "final/test_acc")
        assert shown == pytest.approx(rows[group.name])
    assert {m.name.tag for g in groups for m in g.metric_values} >= {"final/test_acc", "final/epoch_time_s"}


def test_tensorboard_forgets_what_a_killed_session_did_after_its_checkpoint(
    train: Trainer,
    killed: Any,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = tiny("tensorboard=true", "trace=norms", "traces.every=1", "epochs=3", "eval_every=3steps",
                   "checkpoint.every=1epoch")  # fmt: skip
    killed(*command, at=7)  # the checkpoint has step 4, TensorBoard step 6
    folder = next(Path().rglob("tb"))
    before = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in before.Scalars("loss/train")] == [3, 6]
    train(*command)
    after = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0}).Reload()
    assert [e.step for e in after.Scalars("loss/train")] == [3, 6, 9, 12]
    assert [e.step for e in after.Scalars("trace_weight/prep.norm/0")] == list(range(1, 13))
    assert [e.step for e in after.Histograms("trace_histograms/weight/prep.norm")] == [3, 6, 9, 12]


# ---- figures ---------------------------------------------------------------------------------------------


def test_figures_of_arms_and_of_one_session(
    train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from normbench.traces.__main__ import main

    train(*TINY, *EVERY, "norm=mbn,nn", "session=0,1")
    monkeypatch.setattr("sys.argv", ["traces", "outputs/adhoc"])
    monkeypatch.setattr(figures, "save_svg", lambda figure, path: path)
    main()
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written: ")]
    stems = [Path(line.removeprefix("written: ")).stem for line in written]
    layers = ["prep.norm", "res1b.norm", "layer3.norm"]
    assert stems == [  # nn has no norm to draw
        *(f"traces-norms-{layer}" for layer in layers),
        *(f"traces-norms-{layer}-mbn" for layer in layers),
        *(f"traces-features-{layer}" for layer in ("prep", "res1b", "layer3", "head_input")),
        "traces-logits",
    ]
    assert [path.stem for path in figures.draw(Path("outputs/adhoc"), "s1", [])] == [f"{s}-s1" for s in stems]
    traces = read_traces(arms_of(Path("outputs/adhoc")), [])
    own = figures.of_layer(traces.norms, "prep.norm")["mbn"]
    together = figures.norms_figure(traces.arms, {"mbn": own}, "prep.norm")
    each = figures.channels_figure(own, "mbn", "prep.norm")
    assert together is not None and each is not None and (len(together.axes), len(each.axes)) == (8, 6)
    by_step = own.groupby("step")["batch_mean"]
    np.testing.assert_allclose(together.axes[0].lines[0].get_ydata(), by_step.median())
    first = own[own["channel"] == 0].groupby("step")["batch_mean"].mean()
    np.testing.assert_allclose(each.axes[0].lines[0].get_ydata(), first)

    there = "--session 7: no such session; there are s0, s1"
    for arguments, line in (["nowhere"], "no sessions under nowhere"), (["--session", "7"], there):
        monkeypatch.setattr("sys.argv", ["traces", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and line in said and said.count("\n") == 1


def test_a_label_with_signs_stays_text() -> None:
    same = dict.fromkeys(tables.QUANTITIES, 0.5)
    rows = [{"session": "s0", "step": step, "epoch": 1, "layer": "<b>$x$&", "channel": 0, **same}
            for step in (1, 2)]  # fmt: skip
    figure = figures.channels_figure(pd.DataFrame(rows), '<script>"a"</script>', "<b>$x$&")
    assert figure is not None
    text = svg_of(figure, "one")
    assert "<script>" not in text and "<b>" not in text and "$x$&amp;" in text


def test_an_arm_far_beyond_the_others_does_not_flatten_them() -> None:
    rows = [{"session": "s0", "epoch": e, "step": e, "q01": -w, "q20": -w / 2, "q80": w / 2, "q99": w,
             "part": "test", "arm": arm} for arm, w in (("obn", 2.0), ("gn", 3.0), ("nn", 1e6))
            for e in (1, 2)]  # fmt: skip
    tables_by_arm = dict(tuple(pd.DataFrame(rows).groupby("arm", sort=False)))
    figure = figures.quantiles_figure(["obn", "gn", "nn"], tables_by_arm, "values", figures.QUANTILES, "")
    assert figure is not None
    low, high = figure.axes[0].get_ylim()
    assert -4 < low < -3 and 3 < high < 4 and "beyond: nn" in words_of(figure)["caption"].get_label()


def test_one_bad_file_among_many_is_a_notice(tmp_path: Path) -> None:
    text = "epoch,step,layer,q01,q20,q80,q99,part,values,out_of\n1,2,a,0,1,2,3,test,4,4\n"
    files = {"good": text, "half": text + "2,4,a,0,1", "bad": text.replace("0,1,2", "0,x,2"),
             "other": text.replace("q01", "q1"), "empty": "", "head": text.splitlines()[0]}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name / "traces").mkdir(parents=True)
        (tmp_path / name / "traces" / "features.csv").write_text(content)
    notices: list[str] = []
    traces = read_traces({"obn": [tmp_path / name for name in (*files, "none")], "gn": []}, notices)
    assert list(traces.arms) == ["obn", "gn"] and list(traces.features) == ["obn"]
    assert list(traces.features["obn"]["session"]) == ["good", "half"] and not traces.norms
    first, second = notices
    assert "other" in first and "no column 'q01'" in first and "bad" in second and "'x'" in second


def test_a_half_written_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "norms.csv"
    columns = tables.COLUMNS["norms"]
    path.write_text(",".join(columns) + "\n" + "1,1,a,0" + "," * 8 + "\n2,1,a,0,0.5\n3")
    assert [row[:4] for row in tables.rows_until(path, columns, 5)] == [["1", "1", "a", "0"]]
    assert tables.rows_until(tmp_path / "none.csv", columns, 5) == []
    path.write_text("step\n1\n")
    assert tables.rows_until(path, columns, 5) == []
