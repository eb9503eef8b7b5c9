"""The forms a weight may have: their formulas, where they stand, how sessions start and train with them."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Planner, Trainer
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_models import MODELS, DepthwiseAffine, build, refuse
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from normbench import preparing, training
from normbench.config import conf_dir
from normbench.identity import identify
from normbench.manifest import never_moved, observe
from normbench.models.init import SCHEMES, initialise
from normbench.models.weights import EPS, GAIN, RAW, WEIGHTS, G, gains_of, raw_weight, reparametrize
from normbench.optim import make_optimizer
from normbench.plan import Plan
from normbench.seeds import Seeds

FORMS = [weight for weight in WEIGHTS if weight != "none"]
NARROW: dict[str, dict[str, Any]] = {
    name: {"width": 4} for name in ("resnet9", "resnet_cifar", "dilated_cnn")
}
CLASSIFIER = {"lenet": "fc3"}


def norm_of(name: str) -> Callable[..., nn.Module]:
    make: Callable[..., nn.Module] = instantiate(OmegaConf.load(conf_dir() / "norm" / f"{name}.yaml"))
    return make


def narrow(name: str, weight: str, norm: str = "gn", **options: Any) -> Any:
    """A model of this form with few channels, started as session 0."""
    given = {"size": 16, "norm": norm_of(norm), "weight": weight} | NARROW.get(name, {}) | options
    model = build(name, **given)
    initialise(model, Seeds(0, 0))
    return model


def weighted(model: nn.Module) -> dict[str, Any]:
    """Convolutions and linear layers, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def with_form(layer: nn.Module, weight: str) -> Any:
    """The layer alone in this form, its raw weight as it was and its gain away from where it starts."""
    reparametrize(nn.Sequential(layer, nn.Linear(2, 2)), weight)
    for name, parameter in layer.named_parameters():
        if name in (GAIN, G):
            with torch.no_grad():
                parameter.copy_(torch.linspace(-0.4, 1.7, len(parameter)).view_as(parameter))
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=2, dilation=2, padding=3),
    "conv1d": lambda: nn.Conv1d(3, 5, 2),
    "linear": lambda: nn.Linear(7, 5, bias=False),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("weight", FORMS)
def test_a_form_is_its_formula(weight: str, make: Callable[[], nn.Module]) -> None:
    layer = with_form(make().double(), weight)
    raw = raw_weight(layer).detach().numpy()
    axes = tuple(range(1, raw.ndim))
    gain = np.concatenate([g.detach().numpy().ravel() for g in gains_of(layer)] or [[1.0]])
    gain = gain.reshape(-1, *(1,) * len(axes))
    mean, var = raw.mean(axes, keepdims=True), raw.var(axes, keepdims=True)
    expected = {
        "standardized": (raw - mean) / np.sqrt(var + EPS),
        "scaled": gain * (raw - mean) / np.sqrt(raw[0].size * (var + EPS)),
        "weight_norm": gain * raw / np.sqrt((raw**2).sum(axes, keepdims=True)),
    }[weight]
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize(
    ("weight", "theirs"), [("standardized", StdConv2d), ("scaled", ScaledStdConv2d)], ids=str
)
def test_standardized_and_scaled_are_timms(
    weight: str, theirs: Any, dtype: torch.dtype, tolerance: float
) -> None:
    shape = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, "bias": True}
    layer, other = nn.Conv2d(6, 8, **shape), theirs(6, 8, **shape)
    assert other.eps == EPS
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(layer.bias)
        if weight == "scaled":
            other.gain.copy_(torch.linspace(-0.4, 1.7, 8).view_as(other.gain))
    layer, other = with_form(layer, weight).to(dtype), other.to(dtype)
    x = torch.randn(3, 6, 9, 7, dtype=dtype)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(one), other(two)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(one.grad, two.grad, **close)
    torch.testing.assert_close(layer.bias.grad, other.bias.grad, **close)
    torch.testing.assert_close(raw_weight(layer).grad, other.weight.grad, **close)
    if weight == "scaled":
        gain = layer.get_parameter(GAIN)
        torch.testing.assert_close(gain.grad, other.gain.grad.flatten(), **close)


@pytest.mark.parametrize("weight", FORMS)
def test_gradcheck(weight: str) -> None:
    conv = with_form(nn.Conv2d(2, 3, 2), weight).double()
    names = [name for name, _ in conv.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(conv, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [torch.randn(2, 2, 3, 3, dtype=torch.float64), *conv.parameters()]
    assert torch.autograd.gradcheck(forward, [t.detach().clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("weight", ["standardized", "scaled"])
def test_a_constant_or_huge_or_tiny_weight_stays_finite(weight: str) -> None:
    for fill in (0.0, 3.0):
        layer = with_form(nn.Linear(5, 3), weight)
        nn.init.constant_(raw_weight(layer), fill)
        layer(torch.ones(2, 5)).sum().backward()
        assert not layer.weight.any() and raw_weight(layer).grad.isfinite().all()
    for factor in (1e-6, 1e6):
        layer = with_form(nn.Linear(5, 3), weight)
        with torch.no_grad():
            raw_weight(layer).mul_(factor)
        layer(torch.randn(2, 5)).sum().backward()
        assert layer.weight.isfinite().all() and raw_weight(layer).grad.isfinite().all()


@pytest.mark.parametrize("weight", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_but_the_classifier_has_the_form_and_no_norm(name: str, weight: str) -> None:
    with torch.device("meta"):
        model = build(name, weight=weight, norm=DepthwiseAffine, norm_layers="conv")
    plain = {n for n, m in weighted(model).items() if not is_parametrized(m)}
    in_norms = {f"{n}.{part}" for n in model.norm_layers for part in ("affine", "mix")}
    assert plain == {CLASSIFIER.get(name, "fc"), *in_norms}


@pytest.mark.parametrize("name", MODELS)
def test_the_default_is_the_plain_model(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert not any(is_parametrized(m) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, "torch") for name in MODELS), *(("lenet", scheme) for scheme in SCHEMES[1:])],
)
def test_raw_weights_start_equal_in_every_form_and_in_place(name: str, scheme: str) -> None:
    plain = narrow(name, "none", init=scheme, bias=True)
    start = {n: (m.weight, m.bias) for n, m in weighted(plain).items()}
    for weight in FORMS:
        model = narrow(name, weight, "bn", init=scheme, bias=True)
        model.to(memory_format=torch.channels_last)
        places = {n: p.data_ptr() for n, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)  # what a session before left behind
        initialise(model, Seeds(0, 0))
        assert places == {n: p.data_ptr() for n, p in model.named_parameters()}
        assert weighted(model).keys() == start.keys()
        for path, layer in weighted(model).items():
            raw, bias = start[path]
            assert torch.equal(raw_weight(layer), raw), path
            assert bias is None or torch.equal(layer.bias, bias), path
            if weight == "weight_norm":
                torch.testing.assert_close(layer.weight, raw, rtol=1e-6, atol=0)
            elif GAIN in dict(layer.named_parameters()):
                assert torch.equal(layer.get_parameter(GAIN), torch.ones(len(raw)))


def test_scaled_layers_keep_the_variance_and_standardized_ones_magnify_it() -> None:
    x = torch.randn(64, 512)
    for weight, factor in (("scaled", 1.0), ("standardized", 512.0)):
        layer = nn.Linear(512, 400)
        reparametrize(nn.Sequential(layer, nn.Linear(2, 2)), weight)
        assert (layer(x).var() / factor).item() == pytest.approx(1, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["nn", "gn"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_in_every_form(name: str, weight: str, norm: str) -> None:
    # 53 standardized layers without a norm magnify an image 10^51 times, beyond float32
    explodes = (name, weight, norm) == ("resnet50", "standardized", "nn")
    dtype = torch.float64 if explodes else torch.float32
    model = narrow(name, weight, norm).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.rand(2, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    still = [n for n, p in model.named_parameters() if torch.equal(p, first[n])]
    assert not still
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("decay_bias", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weight_decay_takes_raw_weights_and_treats_gains_as_biases(weight: str, decay_bias: bool) -> None:
    model = narrow("lenet", weight)
    options = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "decay_norm": False, "decay_bias": decay_bias}
    optimizer = make_optimizer(options, model, model.norm_layers.values())
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    norms = {n for n in names.values() if ".norm." in n}
    raw = {n for n in names.values() if n.endswith(RAW) and n not in norms}
    rest = set(names.values()) - raw - norms
    assert len(raw) == 5 and len(rest) == 5 + 4 * (weight in ("scaled", "weight_norm"))
    assert groups == {0.5: raw | rest, 0.0: norms} if decay_bias else {0.5: raw, 0.0: rest | norms}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_names_are_refused(name: str) -> None:
    refuse(name, "weight must be one of none, standardized, scaled, weight_norm, got 'scale'; did you mean "
           "'scaled'?", weight="scale")  # fmt: skip


@pytest.mark.parametrize("weight", FORMS)
def test_one_value_per_output_channel_is_refused(weight: str) -> None:
    line = (
        f"weight={weight} needs more than one value per output channel, got (2, 1, 1, 1) in stage2.0.shortcut"
    )
    refuse("resnet_cifar", line, width=1, weight=weight)
    with torch.device("meta"):
        build("dilated_cnn", width=1, weight=weight)  # the classifier may have one: it keeps its weight
        build("resnet_cifar", width=1)


@pytest.mark.parametrize("weight", FORMS)
def test_building_draws_nothing_more_and_tells_maps_to_a_norm_that_asks(weight: str) -> None:
    def norm(num_features: int, *, spatial_shape: tuple[int, ...]) -> nn.Module:
        assert len(spatial_shape) in (0, 2)
        return nn.Identity()

    states = []
    for form in ("none", weight):
        torch.manual_seed(0)
        build("lenet", size=16, weight=form, norm=norm)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("weight", FORMS)
def test_copies_and_state_dicts_carry_the_form(weight: str) -> None:
    model = narrow("resnet_cifar", weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    x = torch.rand(2, 3, 16, 16)
    expected = model(x)
    fresh = build("resnet_cifar", size=16, norm=norm_of("gn"), weight=weight, width=4)
    fresh.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert torch.equal(fresh(x), expected) and torch.equal(twin(x), expected)
    with torch.no_grad():
        raw_weight(twin.stem.conv).add_(torch.rand(4, 3, 3, 3))
    assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
    assert model.to("meta")(x.to("meta")).shape == (2, 10)


@pytest.mark.parametrize("weight", FORMS)
def test_channels_last_changes_nothing(weight: str) -> None:
    model = narrow("resnet9", weight).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    if weight != "weight_norm":  # torch's own op answers contiguously
        assert model.res1a.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", FORMS)
def test_half_precision_and_autocast(weight: str, dtype: torch.dtype) -> None:
    model = narrow("resnet9", weight)
    x = torch.rand(2, 3, 16, 16)
    exact = model(x)
    with torch.autocast("cpu", dtype):
        assert model.prep.conv.weight.dtype == torch.float32
        logits = model(x)
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.05 * exact.std().item())
    logits.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    layer = copy.deepcopy(model.res2a.conv)
    exact_weight = layer.weight
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    torch.testing.assert_close(
        layer.weight.float(), exact_weight, rtol=0.02, atol=0.02 * exact_weight.std().item()
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("weight", FORMS)
def test_compiles_as_one_graph_and_trains_alike(weight: str, backend: str) -> None:
    torch.compiler.reset()
    model = narrow("lenet", weight, "bn")
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    x = torch.rand(8, 3, 16, 16)
    for _ in range(3):
        for run, optimizer in zip((compiled, plain), optimizers, strict=True):
            loss = F.cross_entropy(run(x), torch.arange(8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ddp") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weight", FORMS)
def test_trains_under_data_parallel(weight: str, one_process_group: None) -> None:
    model = narrow("lenet", weight)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        wrapped(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_gain_before_a_norm_is_a_note_not_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 1))
    reparametrize(model, "scaled")
    x = torch.rand(4, 2, 6, 6)
    seen = observe(model, {"1": model[1]}, lambda: model(x).sum().backward(), lambda: model(x))
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(GAIN):
                parameter.add_(1)
    trained = {id(p) for p in model.parameters()}
    assert never_moved(model, first, trained, seen) == ([f"2.{GAIN}"], [f"0.{GAIN}"])


TINY = ["model.width=4", "dataset.train_subset=48", "dataset.test_subset=32", "batch.size=24", "threads=1",
        "tensorboard=false"]  # fmt: skip


def document_of(plan: Plan, arm: int = 0) -> dict[str, Any]:
    at = next(s for s in plan.sessions if s.arm == arm)
    return json.loads((plan.session_folder(at) / "session.json").read_text())  # type: ignore[no-any-return]


def test_a_form_sweeps_like_any_option(train: Trainer) -> None:
    plan = train("norm=nn", "model.weight=none,standardized", *TINY, "steps=2")
    plain, standardized = (document_of(plan, arm)["row"] for arm in (0, 1))
    assert (plain["status"], standardized["status"]) == ("ok", "ok")
    ids = set(plain["arm"].split("-")), set(standardized["arm"].split("-"))
    assert ids[1] - ids[0] == {"standardized"} and not ids[0] - ids[1]
    assert plain["train_loss"] != standardized["train_loss"]
    assert plain["warnings"] == standardized["warnings"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("weight", FORMS)
def test_session_1_after_session_0_equals_session_1_alone(train: Trainer, weight: str) -> None:
    command = [f"model.weight={weight}", *TINY, "epochs=2", "save_model=true", "norm=obn"]
    after, alone = train(*command, "session=0,1", "out=after"), train(*command, "session=1", "out=alone")
    folders = [plan.session_folder(plan.sessions[-1]) for plan in (after, alone)]
    one, two = (torch.load(folder / "model.pt") for folder in folders)
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert document_of(alone)["row"]["warnings"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["channels_last=true"], ["precision=bf16"], ["precision=fp16"]], ids=str)
def test_the_ways_to_train_take_a_form(train: Trainer, extra: list[str]) -> None:
    plan = train("model.weight=standardized,scaled,weight_norm", "norm=gn", *TINY, *extra, "steps=2")
    for arm in range(3):
        row = document_of(plan, arm)["row"]
        assert (row["status"], row["warnings"]) == ("ok", "")


@pytest.mark.slow
def test_compiled_sessions_take_a_form(train: Trainer) -> None:
    command = ["model=dilated_cnn", "model.weight=scaled,weight_norm", "norm=bn", *TINY, "steps=4"]
    plans = train(*command, "compile=true", "out=compiled"), train(*command, "out=eager")
    for arm in range(2):
        compiled, eager = (document_of(plan, arm)["row"] for plan in plans)
        assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)


def test_sessions_of_all_forms_start_from_one_raw_weight(plan_of: Planner) -> None:
    plan = plan_of("norm=obn,gn", f"model.weight={','.join(WEIGHTS)}", *TINY, "session=3")
    starts: list[dict[str, Tensor]] = []
    for arm in range(len(plan.arms)):
        ready = preparing.prepare(plan.config(next(s for s in plan.sessions if s.arm == arm)))
        training.start(ready, Seeds(0, 3))
        starts.append({n: raw_weight(m).detach().clone() for n, m in weighted(ready.model).items()})
    assert len(starts) == 8 and all(other.keys() == starts[0].keys() for other in starts)
    assert all(torch.equal(w, starts[0][n]) for other in starts for n, w in other.items())


def test_recorded_settings_keep_their_names(plan_of: Planner) -> None:
    assert plan_of().arms[0].setting == "obn-resnet9-digits-adbbcccb35"  # from before there were forms
    arm = plan_of("model.weight=none").arms[0]
    before = {key: value for key, value in arm.values["model"].items() if key != "weight"}
    assert (
        identify({**arm.values, "model": before}, arm.choices, arm.values, arm.choices).hash
        == arm.config_hash
    )
    other = plan_of("model.weight=standardized").arms[0]
    assert other.config_hash != arm.config_hash and other.arm == "obn-resnet9-digits-standardized"


def test_an_unknown_form_is_refused_at_the_door(refusal: Callable[..., str], tmp_path: Path) -> None:
    line = refusal("model.weight=standardised")
    assert (
        "model.weight must be one of none, standardized, " in line and "did you mean 'standardized'?" in line
    )
    assert line.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "weight=scaled needs more than one value per output channel" in refusal(
        "model=resnet_cifar model.width=1 model.weight=scaled"
    )
