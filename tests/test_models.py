"""The networks: their sizes, their names, where the norm stands, and the weights they start from."""

import copy
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from normbench.models.init import SCHEMES, initialise
from normbench.norms.frn import FilterResponseNorm
from normbench.seeds import Seeds

CONF = Path(__file__).parent.parent / "conf" / "model"
MODELS = sorted(path.stem for path in CONF.glob("*.yaml"))
SMALLEST = {"lenet": 16}
SMALL: dict[str, dict[str, Any]] = {"resnet9": {"width": 8}}  # quick where the width teaches nothing


class AnyRank(nn.Module):
    """Batch norm for (N, C, *)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


def nothing(num_features: int) -> nn.Module:
    return nn.Identity()


def build(
    name: str,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    size: int | tuple[int, int] = 32,
    norm: Callable[..., nn.Module] = AnyRank,
    **options: Any,
) -> Any:
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options)
    image_size = (size, size) if isinstance(size, int) else size
    return instantiate(config)(
        in_channels=in_channels, num_classes=num_classes, image_size=image_size, norm=norm
    )


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def layers(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of a convolution or linear layer, by name."""
    return {
        f"{path}.{name}": parameter
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
        for name, parameter in layer.named_parameters(recurse=False)
    }


MNIST, C100 = {"in_channels": 1, "size": 28}, {"num_classes": 100}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet9", {}, 2_440_256),
        ("resnet9", {"norm_layers": "none"}, 2_437_312),
        ("resnet9", {"norm": nothing}, 2_437_312),
        ("resnet50", {}, 23_528_522),
        ("resnet50", {"bias": True, "stride_on": "1x1"}, 23_555_082),
        ("resnet_cifar", {}, 175_818),
        ("resnet_cifar", {"n": 3}, 273_258),
        ("resnet_cifar", {"n": 9}, 857_898),
        ("resnet_cifar", {"norm_layers": "none"}, 174_698),
        ("resnet_cifar", {"norm_layers": "none", "n": 3}, 271_690),
        ("resnet_cifar", {"norm_layers": "none", "n": 9}, 853_642),
        ("lenet", MNIST, 44_878),
        ("lenet", MNIST | {"norm_layers": "none"}, 44_426),
        ("lenet", MNIST | {"norm_layers": "none", "padding": 2}, 61_706),
        ("dilated_cnn", MNIST, 28_650),
        ("dilated_cnn", C100, 32_196),
    ],
)
def test_parameter_counts_are_the_studies(name: str, options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        assert count(build(name, **options)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_yaml_spells_out_every_option_with_its_default(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(config, dict) and config.pop("_partial_") is True
    parameters = inspect.signature(get_class(config.pop("_target_"))).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    given = {"in_channels", "num_classes", "image_size", "norm"}
    assert config == {k: p.default for k, p in parameters.items() if k not in given}
    assert list(config) == [k for k in parameters if k not in given]
    assert (CONF / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32, (33, 33), (17, 24)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_any_image_trains(name: str, size: int | tuple[int, int], channels: int) -> None:
    if size == 8:
        size = SMALLEST.get(name, 8)
    model = build(name, in_channels=channels, num_classes=7, size=size, **SMALL.get(name, {}))
    height, width = (size, size) if isinstance(size, int) else size
    logits = model(torch.rand(4, channels, height, width))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.parametrize(
    "options",
    [
        {"norm_position": "after"},
        {"dropout": 0.5, "dropout_position": "before"},
        {"norm_position": "after", "dropout": 0.5, "dropout_position": "before"},
        {"norm_position": "after", "dropout": 0.5, "dropout_position": "after", "bias": False},
        {"norm_layers": "none", "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_every_option_trains(name: str, options: dict[str, Any]) -> None:
    model = build(name, size=16, **SMALL.get(name, {}), **options)
    model(torch.rand(4, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    before_norm = [
        m
        for n, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear)) and not n.startswith("fc")
    ]
    expected = options.get("bias", OmegaConf.load(CONF / f"{name}.yaml").bias)
    assert {m.bias is not None for m in before_norm} == {expected}


def test_lenet_bias_reaches_its_linear_units_and_not_the_classifier() -> None:
    without = {n for n, m in build("lenet", bias=False).named_modules() if getattr(m, "bias", 0) is None}
    assert without == {"conv1.conv", "conv2.conv", "fc1.linear", "fc2.linear"}


VARIANTS: list[dict[str, Any]] = [
    {"norm": nothing},
    {"norm_position": "after"},
    {"norm_layers": "none"},
    {"norm_layers": "first"},
    {"dropout": 0.3},
    {"dropout": 0.3, "dropout_position": "before"},
    {"bias": True},
    {"bias": False},
]


@pytest.mark.parametrize("name", MODELS)
def test_shared_layers_start_equal_whatever_surrounds_them(name: str) -> None:
    seeds = Seeds(0, 3)
    reference = build(name, **SMALL.get(name, {}))
    initialise(reference, seeds)
    start = layers(reference)
    weights = {k for k in start if k.endswith("weight")}
    for options in VARIANTS:
        model = build(name, **SMALL.get(name, {}), **options)
        initialise(model, seeds)
        other = layers(model)
        assert {k for k in other if k.endswith("weight")} == weights
        assert all(torch.equal(start[k], other[k]) for k in start.keys() & other.keys()), options


@pytest.mark.parametrize("name", MODELS)
def test_initialise_repeats_differs_by_session_and_leaves_the_global_generator(name: str) -> None:
    model = build(name, **SMALL.get(name, {}))
    before, places = torch.get_rng_state(), [p.data_ptr() for p in model.parameters()]
    initialise(model, Seeds(0, 0))
    first = copy.deepcopy(layers(model))
    norm_start = [copy.deepcopy(layer.state_dict()) for layer in model.norm_layers.values()]
    initialise(model, Seeds(0, 1))
    second = copy.deepcopy(layers(model))
    initialise(model, Seeds(0, 0))
    assert all(torch.equal(first[k], v) for k, v in layers(model).items())
    assert not any(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(before, torch.get_rng_state())
    assert places == [p.data_ptr() for p in model.parameters()]
    for layer, state in zip(model.norm_layers.values(), norm_start, strict=True):
        assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())


def test_layers_of_equal_shape_start_different() -> None:
    model = build("dilated_cnn")
    initialise(model, Seeds(0, 0))
    assert not torch.equal(model.conv2.conv.weight, model.conv3.conv.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_have_their_spread(scheme: str) -> None:
    model = build("lenet", init=scheme)
    initialise(model, Seeds(0, 0))
    conv, linear = model.conv2.conv, model.fc1.linear
    conv_in, conv_out, linear_in, linear_out = 150, 400, 400, 120
    uniform = {"torch": conv_in**-0.5, "xavier": (6 / (conv_in + conv_out)) ** 0.5}
    uniform["glorot"] = uniform["xavier"]
    if scheme == "he":
        assert conv.weight.std().item() == pytest.approx((2 / conv_out) ** 0.5, rel=0.1)
    else:
        assert 0.98 * uniform[scheme] < conv.weight.abs().max().item() <= uniform[scheme]
    wide = {"xavier": (6 / (linear_in + linear_out)) ** 0.5}
    bound = wide["xavier"] if scheme in ("xavier", "glorot") else linear_in**-0.5
    assert 0.99 * bound < linear.weight.abs().max().item() <= bound
    largest = linear.bias.abs().max().item()
    assert largest == 0 if scheme == "glorot" else 0.9 * linear_in**-0.5 < largest <= linear_in**-0.5


def test_initialise_reaches_a_strangers_layers_other_dtypes_and_compiled_models() -> None:
    class Stranger(nn.Module):
        def __init__(self, num_features: int) -> None:
            super().__init__()
            self.mix = nn.Conv1d(num_features, num_features, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x.flatten(2)).view_as(x)

    one, two = build("dilated_cnn", norm=Stranger), build("dilated_cnn", norm=Stranger).double()
    initialise(one, Seeds(0, 0))
    initialise(two, Seeds(0, 0))
    mix = one.conv1.norm.mix.weight
    assert torch.equal(mix.double(), two.conv1.norm.mix.weight)
    initialise(torch.compile(two), Seeds(0, 0))
    assert torch.equal(mix.double(), two.conv1.norm.mix.weight)


@pytest.mark.parametrize("name", MODELS)
def test_norm_layers_are_the_modules_that_norm_returned_in_forward_order(name: str) -> None:
    returned: list[nn.Module] = []
    ran: list[nn.Module] = []

    def norm(num_features: int) -> nn.Module:
        returned.append(AnyRank(num_features) if len(returned) % 2 else nn.Sequential())
        return returned[-1]

    for position in ("before", "after"):
        returned.clear()
        model = build(name, norm=norm, norm_position=position, **SMALL.get(name, {}))
        assert [id(m) for m in model.norm_layers.values()] == [id(m) for m in returned]
        assert all(model.get_submodule(n) is m for n, m in model.norm_layers.items())
        ran.clear()
        for layer in returned:
            layer.register_forward_hook(lambda layer, x, y, ran=ran: ran.append(layer))
        model(torch.rand(2, 3, 32, 32))
        assert [id(m) for m in ran] == [id(m) for m in returned]


def test_number_of_slots() -> None:
    expected = {"resnet9": 8, "resnet50": 53, "resnet_cifar": 15, "lenet": 4, "dilated_cnn": 4}
    with torch.device("meta"):
        assert {name: len(build(name).norm_layers) for name in expected} == expected


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", ["conv1.norm", "conv2.norm", "fc1.norm", "fc2.norm"]),
        ("none", []),
        ("conv", ["conv1.norm", "conv2.norm"]),
        ("fc", ["fc1.norm", "fc2.norm"]),
        ("first", ["conv1.norm"]),
        ("last", ["fc2.norm"]),
        (["fc1.norm", "conv2.norm"], ["conv2.norm", "fc1.norm"]),
        ([], []),
    ],
)
def test_norm_layers_chooses_slots(choice: Any, expected: list[str]) -> None:
    model = build("lenet", norm_layers=choice)
    assert list(model.norm_layers) == expected
    assert [n for n, m in model.named_modules() if isinstance(m, AnyRank)] == expected
    with_names = {"conv1.norm", "conv2.norm", "fc1.norm", "fc2.norm"}
    assert all(isinstance(model.get_submodule(n), nn.Identity) for n in with_names - set(expected))


def test_first_and_last_of_resnet50() -> None:
    with torch.device("meta"):
        assert list(build("resnet50", norm_layers="first").norm_layers) == ["bn1"]
        assert list(build("resnet50", norm_layers="last").norm_layers) == ["layer4.2.bn3"]


def refuse(name: str, message: str, **options: Any) -> None:
    with pytest.raises(Exception, match=re.escape(message)) as error, torch.device("meta"):
        build(name, **options)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_wrong_norm_layers_are_refused_with_the_nearest() -> None:
    refuse("resnet9", "no norm layer 'prep.nrm'; did you mean 'prep.norm'?", norm_layers=["prep.nrm"])
    refuse("resnet50", "did you mean 'layer1.0.bn1'?", norm_layers=["bn1", "layer1.0.bm1"])
    refuse("resnet9", "got 'frist'; did you mean 'first'?", norm_layers="frist")
    for name in ("resnet9", "resnet50", "resnet_cifar", "dilated_cnn"):
        refuse(name, "norm_layers=fc: ", norm_layers="fc")


@pytest.mark.parametrize("name", MODELS)
def test_wrong_values_are_refused(name: str) -> None:
    refuse(name, "dropout must be a number ≥ 0 and < 1, got 1.5", dropout=1.5)
    refuse(name, "got 'befor'; did you mean 'before'?", norm_position="befor")
    refuse(name, "got 'aftr'; did you mean 'after'?", dropout_position="aftr")
    refuse(name, "bias must be true or false, got 'no'", bias="no")
    refuse(name, "got 'xaver'; did you mean 'xavier'?", init="xaver")
    refuse(name, "in_channels must be an int ≥ 1, got 0", in_channels=0)
    refuse(name, "num_classes must be an int ≥ 1, got 0", num_classes=0)
    least = SMALLEST.get(name, 8)
    less = least // 2
    refuse(name, f"{name} needs images of at least {least}×{least}, got {least}×{less}", size=(least, less))


def test_wrong_values_of_single_models_are_refused() -> None:
    for name in ("resnet9", "resnet_cifar", "dilated_cnn"):
        refuse(name, "width must be an int ≥ 1, got 0", width=0)
    refuse("resnet9", "logit_scale must be a number > 0, got 0", logit_scale=0)
    refuse("resnet_cifar", "n must be an int ≥ 1, got 0", n=0)
    refuse("resnet_cifar", "shortcut must be one of conv, pad, got 'cnv'", shortcut="cnv")
    refuse("resnet50", "stride_on must be one of 3x3, 1x1, got '2x2'", stride_on="2x2")
    refuse("lenet", "padding must be an int ≥ 0, got -1", padding=-1)


def test_norm_must_return_a_module() -> None:
    with pytest.raises(TypeError, match=r"norm must return a torch\.nn\.Module, got int"):
        build("lenet", norm=lambda num_features: 3)


def executed(model: nn.Module, unit: nn.Module) -> list[str]:
    """The unit's submodules in the order in which they really run."""
    ran: list[str] = []
    for name, module in unit.named_children():
        if not (name == "dropout" and isinstance(module, nn.Identity)):
            module.register_forward_hook(lambda m, x, y, name=name: ran.append(name))
    model(torch.rand(2, 3, 16, 16))
    return ran


@pytest.mark.parametrize(
    ("position", "dropout_position", "dropout", "expected"),
    [
        ("before", "after", 0.0, "norm activation"),
        ("after", "after", 0.0, "activation norm"),
        ("before", "before", 0.5, "dropout norm activation"),
        ("before", "after", 0.5, "norm activation dropout"),
        ("after", "before", 0.5, "activation dropout norm"),
        ("after", "after", 0.5, "activation norm dropout"),
    ],
)
def test_position_and_dropout_change_what_runs(
    position: str, dropout_position: str, dropout: float, expected: str
) -> None:
    options = {"norm_position": position, "dropout": dropout, "dropout_position": dropout_position}
    for name, path, layer in [
        ("resnet9", "res1b", "conv"),
        ("lenet", "conv2", "conv"),
        ("lenet", "fc1", "linear"),
        ("dilated_cnn", "conv3", "conv"),
        ("resnet_cifar", "stem", "conv"),
        ("resnet_cifar", "stage2.0.second", "conv"),
    ]:
        model = build(name, size=16, **options)
        assert executed(model, model.get_submodule(path)) == [layer, *expected.split()]
    model = build("resnet50", size=16, **options)
    step = expected.replace("activation", "relu").split()
    sequence = [[f"conv{i}", *(f"bn{i}" if s == "norm" else s for s in step)] for i in (1, 2, 3)]
    first, second, third = sequence
    assert executed(model, model.layer1[0]) == [*first, *second, "downsample", *third]
    model = build("resnet50", size=16, **options)
    assert [s for s in executed(model, model) if s in {"conv1", "bn1", "relu", "dropout"}] == first


@pytest.mark.parametrize("name", ["resnet9", "resnet50", "resnet_cifar", "lenet", "dilated_cnn"])
def test_the_activation_can_be_another_or_left_to_the_norm(name: str) -> None:
    def of(kind: type[nn.Module], **options: Any) -> int:
        return sum(type(m) is kind for m in build(name, size=16, **options).modules())

    own = {"lenet": nn.Sigmoid, "dilated_cnn": nn.GELU}.get(name, nn.ReLU)
    units = of(own)
    assert units >= 4
    assert of(nn.SiLU, activation="silu") == units and of(own, activation="silu") == 0
    assert of(own, activation="none") == 0
    with pytest.raises(
        Exception, match=r"activation must be one of relu, gelu, .* got 'rellu'; did you mean 'relu'"
    ):
        build(name, size=16, activation="rellu")


def test_a_norm_that_holds_its_activation_trains_its_threshold_without_the_models() -> None:
    for activation, moves in ((None, False), ("none", True)):
        model = build("resnet9", norm=FilterResponseNorm, width=4, activation=activation)
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        layer = next(iter(model.norm_layers.values()))
        assert bool(layer.tau.grad.any()) is moves


def test_residual_is_added_before_the_activation_and_shortcuts_have_no_dropout() -> None:
    model = build("resnet_cifar", norm=nothing, dropout=0.5)
    block = model.stage2[0]
    assert isinstance(block.shortcut.activation, nn.Identity) and isinstance(
        block.shortcut.dropout, nn.Identity
    )
    x = torch.randn(2, 16, 8, 8)
    block.eval()
    torch.testing.assert_close(
        block(x), torch.relu(block.second.conv(block.first(x)) + block.shortcut.conv(x))
    )


def test_pad_shortcut_takes_every_second_pixel_and_zeros() -> None:
    shortcut = build("resnet_cifar", shortcut="pad").stage2[0].shortcut
    x = torch.randn(2, 16, 9, 9)
    y = shortcut(x)
    assert y.shape == (2, 32, 5, 5)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert not list(shortcut.parameters())


def test_resnet50_is_torchvisions() -> None:
    from torchvision.models import resnet50

    reference = resnet50(num_classes=10)
    model = build("resnet50", norm=nn.BatchNorm2d, size=64)
    model.load_state_dict(reference.state_dict())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), reference.eval()(x))


def test_resnet50_stride_moves_and_keeps_sizes() -> None:
    with torch.device("meta"):
        keras, torchs = (build("resnet50", stride_on=s) for s in ("1x1", "3x3"))
    assert (keras.layer2[0].conv1.stride, keras.layer2[0].conv2.stride) == ((2, 2), (1, 1))
    assert (torchs.layer2[0].conv1.stride, torchs.layer2[0].conv2.stride) == ((1, 1), (2, 2))


def test_other_models_do_not_import_torchvision() -> None:
    code = (
        "import sys, normbench.models.resnet9, normbench.models.resnet_cifar, normbench.models.lenet;"
        "import normbench.models.dilated_cnn, normbench.models.init; assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent.parent)


@pytest.mark.parametrize("name", MODELS)
def test_deepcopy_keeps_norm_layers_and_modules_together(name: str) -> None:
    model = build(name, **SMALL.get(name, {}))
    twin = copy.deepcopy(model)
    assert list(twin.norm_layers) == list(model.norm_layers)
    for path, layer in twin.norm_layers.items():
        assert layer is twin.get_submodule(path) and layer is not model.norm_layers[path]


@pytest.mark.parametrize("name", MODELS)
def test_builds_and_runs_without_numbers(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_is_kept_and_changes_nothing(name: str) -> None:
    model = build(name, size=64, **SMALL.get(name, {})).double()
    x = torch.rand(4, 3, 64, 64, dtype=torch.float64)  # small maps make batch norm magnify rounding
    expected = model(x)
    seen: list[bool] = []
    for layer in model.norm_layers.values():
        layer.register_forward_hook(
            lambda m, args, y: seen.append(y.ndim == 2 or y.is_contiguous(memory_format=torch.channels_last))
        )
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    assert len(seen) == len(model.norm_layers) and all(seen)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    model = build(name, **SMALL.get(name, {}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, 3, 32, 32))
    logits.float().sum().backward()
    assert logits.isfinite().all()


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(name: str, position: str) -> None:
    model = build(name, norm_position=position, size=16, **SMALL.get(name, {}))
    x = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_maps_are_told_to_a_norm_that_asks() -> None:
    told: list[tuple[int, tuple[int, ...], str]] = []

    def norm(num_features: int, *, spatial_shape: tuple[int, ...], word: str = "") -> nn.Module:
        told.append((num_features, spatial_shape, word))
        return nn.Identity()

    build("lenet", in_channels=1, size=(28, 20), norm=functools.partial(norm, word="hi"))
    assert told == [(6, (24, 16), "hi"), (16, (8, 4), "hi"), (120, (), "hi"), (84, (), "hi")]
    told.clear()
    build("resnet_cifar", size=33, norm=norm, norm_layers=["stem.norm", "stage2.0.shortcut.norm"])
    assert told == [(16, (33, 33), ""), (32, (17, 17), "")]


@pytest.mark.parametrize("name", MODELS)
def test_told_maps_are_the_ones_seen(name: str) -> None:
    class Asks(nn.Module):
        def __init__(self, num_features: int, *, spatial_shape: tuple[int, ...] = ()) -> None:
            super().__init__()
            self.spatial_shape = spatial_shape

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == self.spatial_shape
            return x

    state = torch.get_rng_state()
    with torch.device("meta"):
        build(name, size=(40, 25), norm=Asks, dropout=0.1)
    assert torch.equal(state, torch.get_rng_state())
    build(name, size=(40, 25), norm=Asks)(torch.rand(1, 3, 40, 25))


def test_resnet9_scales_its_logits_and_takes_the_maximum() -> None:
    one, two = build("resnet9", width=4), build("resnet9", width=4, logit_scale=0.4)
    for model in (one, two):
        initialise(model, Seeds(0, 0))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(2 * one(x), two(x))
    assert one.fc.bias is None


class DepthwiseAffine(nn.Module):
    """A stranger's norm whose affine is a convolution that starts as the identity."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.affine = nn.Conv2d(num_features, num_features, 1, groups=num_features)
        self.mix = nn.Conv2d(num_features, num_features, 1)
        nn.init.ones_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(x) + 0 * self.mix(x)


def test_constant_convolutions_inside_a_norm_keep_their_start() -> None:
    model = build("resnet9", norm=DepthwiseAffine, width=4)
    before = model.norm_layers["prep.norm"].mix.weight.clone()
    initialise(model, Seeds(0, 1))
    layer = model.norm_layers["prep.norm"]
    assert torch.equal(layer.affine.weight, torch.ones_like(layer.affine.weight))
    assert torch.equal(layer.affine.bias, torch.zeros_like(layer.affine.bias))
    assert not torch.equal(layer.mix.weight, before)
