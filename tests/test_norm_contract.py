"""Every layer of `conf/norm/` against the contract of a norm; a new YAML is found by itself."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from normbench.models.placing import takes_spatial_shape

CONF = Path(__file__).parents[1] / "conf" / "norm"
# `custom` names no layer: its `_target_` is the user's to give
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "custom")
# r and d of renormalization are constants to autograd, so numeric and analytic gradients differ by design;
# test_norm_oracles.py holds their gradient against a written-out expression
WHOLE_GRADIENT = [name for name in NAMES if name not in {"brn", "brnc"}]
SHAPES = [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5), (7, 5), (3, 7, 1, 9), (5, 1, 3), (4, 3, 1, 1)]
# bfloat16 keeps 8 bits: one rounding of the input, one of the output, on values up to about 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def options(name: str) -> dict[str, object]:
    """The YAML without what Hydra needs; `stride` is 1, as when the root key is not given."""
    config = OmegaConf.load(CONF / f"{name}.yaml")
    if "stride" in config:
        config.stride = 1
    return OmegaConf.to_container(config, resolve=True)


def build(
    name: str,
    num_features: int,
    dtype: torch.dtype = torch.float64,
    spatial_shape: tuple[int, ...] = (5, 3),
    **changes: object,
) -> nn.Module:
    """The layer with parameters away from one and zero, which would hide half the bugs."""
    make = instantiate(options(name) | changes)
    sized = {"spatial_shape": spatial_shape} if takes_spatial_shape(make) else {}
    norm = make(num_features, **sized).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 + 0.6 * values)
    return norm


def activations(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Mean and sd away from zero and one, and different in every channel."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return (x * (0.5 + 0.3 * channel) + 0.7 - 0.2 * channel).to(dtype)


def measures_batches(norm: nn.Module) -> bool:
    return "running_var" in dict(norm.named_buffers())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_shape_and_dtype_and_agrees_with_float64(name, shape, dtype):
    x = activations(shape, dtype).requires_grad_()
    norm = build(name, shape[1], torch.float64 if dtype == torch.float64 else torch.float32)
    exact = build(name, shape[1])
    for training in (True, False):
        y = norm.train(training)(x)
        assert y.shape == x.shape
        assert y.dtype == dtype
        expected = exact.train(training)(x.detach().double())
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) in FORMATS], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_memory_format(name, shape, dtype, training):
    norm = build(name, shape[1], torch.float64 if dtype == torch.float64 else torch.float32).train(training)
    x = activations(shape, dtype)
    assert norm(x).is_contiguous()
    last = FORMATS[len(shape)]
    y = norm(x.contiguous(memory_format=last))
    assert y.is_contiguous(memory_format=last)
    if not measures_batches(norm) or not training:  # else the running statistics moved
        torch.testing.assert_close(y, norm(x))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_parameters_and_inputs(name):
    norm = build(name, 6, torch.float16)
    x = activations((4, 6, 5, 3), torch.float16).requires_grad_()
    y = norm(x)
    y.float().sum().backward()
    assert y.dtype == torch.float16 and y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_building_draws_no_random_numbers(name):
    before = torch.get_rng_state()
    instantiate(options(name))(64)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_identity_of_its_affine(name):
    norm = instantiate(options(name))(6)
    if getattr(norm, "weight", None) is not None:
        assert torch.equal(norm.weight, torch.ones(6)) and torch.equal(norm.bias, torch.zeros(6))
    if measures_batches(norm):
        assert norm.num_batches_tracked.dtype == torch.int64 and norm.num_batches_tracked.shape == ()


@pytest.mark.parametrize("shape", [(8, 6), (5, 6, 7), (4, 6, 5, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_eval_does_not_depend_on_batch_mates(name, shape):
    norm = build(name, 6)
    for seed in (1, 2):
        norm(activations(shape, seed=seed))
    norm.eval()
    x = activations(shape)
    state = copy.deepcopy(norm.state_dict())
    y = norm(x)
    for i in range(shape[0]):
        torch.testing.assert_close(norm(x[i : i + 1]), y[i : i + 1], rtol=1e-12, atol=1e-12)
    for key, value in norm.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_and_deepcopy_carry_everything(name):
    norm = build(name, 6)
    for seed in (1, 2, 3):
        norm(activations((4, 6, 5, 3), seed=seed))
    if measures_batches(norm):
        assert norm.num_batches_tracked == 3
        assert not norm.running_mean.requires_grad and not norm.running_var.requires_grad
    fresh = instantiate(options(name))(6).double()
    fresh.load_state_dict(norm.state_dict())
    x = activations((4, 6, 5, 3))
    for twin in (fresh, copy.deepcopy(norm)):
        for training in (False, True):
            original = copy.deepcopy(norm)
            assert torch.equal(twin.train(training)(x), original.train(training)(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 4), (2, 3, 3, 2), (2, 3, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, shape, training):
    if training and name not in WHOLE_GRADIENT:
        return  # see WHOLE_GRADIENT
    if name == "bnwos":
        shape = (4, *shape[1:])  # two samples to a chunk
    norm = build(name, 3).train(training)
    names = [key for key, _ in norm.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in norm.named_buffers()}  # every call from one state
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)) | buffers, (x,))

    inputs = [activations(shape), *norm.parameters()]
    assert torch.autograd.gradcheck(forward, [t.detach().clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 1), (1, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_value_per_channel_is_refused_where_the_batch_is_measured(name, shape):
    norm = build(name, 6)
    state = copy.deepcopy(norm.state_dict())
    x = activations(shape)
    if measures_batches(norm):
        words = "batch statistics need more than one value per channel, got|needs as many samples, got"
        with pytest.raises(ValueError, match=words):
            norm(x)
    else:
        assert norm(x).isfinite().all()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert norm.eval()(x).isfinite().all()


@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 3, 3), (6,), (2, 6, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_are_refused(name, shape):
    for norm in (build(name, 6), build(name, 6).eval()):
        with pytest.raises(ValueError, match=rf"num_features=6 .*got \({shape[0]},"):
            norm(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_is_refused_by_name(name):
    with pytest.raises(TypeError, match="epz"):
        type(build(name, 6))(6, epz=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_spells_out_every_option_and_no_other(name):
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    given = options(name)
    assert given.pop("_partial_") is True
    given.pop("_target_")
    norm = build(name, 64)
    signature = inspect.signature(type(norm)).parameters
    assert next(iter(signature)) == "num_features"
    named = [key for key, parameter in signature.items() if parameter.kind == parameter.KEYWORD_ONLY]
    assert sorted(given) == sorted(named)
    for key in given:
        assert f"{key}=" in repr(norm)
    assert "64" in repr(norm)


@pytest.mark.parametrize("name", NAMES)
def test_public_docstring_has_every_part(name):
    doc = inspect.getdoc(type(build(name, 6)))
    assert "y = " in doc
    for part in ("Args:", "Shape:", "State:", "Raises:", "Source:", "Differs from the source in:"):
        assert part in doc, part
    for key in options(name).keys() - {"_target_", "_partial_"}:
        assert f"    {key}: " in doc, key


@pytest.mark.parametrize("name", [name for name in NAMES if "affine" in options(name)])
def test_halves_of_the_affine_freeze_and_drop(name):
    x = activations((4, 6, 5, 3))
    for frozen, trained in (("weight", "bias"), ("bias", "weight")):
        norm = build(name, 6, **{"affine": True, f"train_{frozen}": False})
        norm(x).square().sum().backward()
        assert getattr(norm, frozen).grad is None
        assert getattr(norm, trained).grad.abs().min() > 0
    norm = build(name, 6, affine=False)
    assert norm.weight is None and norm.bias is None
    assert norm(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_neither_dtype_nor_values(name, dtype):
    norm, plain = build(name, 6, torch.float32), build(name, 6, torch.float32)
    x = activations((4, 6, 5, 3), dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, plain(x))
    y.float().sum().backward()
    for key, buffer in norm.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), key
        assert torch.equal(buffer, dict(plain.named_buffers())[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_meta_tensors(name):
    for momentum in (0.1, None):
        changes = {"momentum": momentum} if "momentum" in options(name) else {}
        norm = instantiate(options(name) | changes)(6).to("meta")
        assert norm(torch.empty(4, 6, 5, 3, device="meta")).shape == (4, 6, 5, 3)


@pytest.mark.parametrize("name", NAMES)
def test_two_forwards_before_one_backward(name):
    norm = build(name, 6)
    x = activations((4, 6, 5, 3)).requires_grad_()
    (norm(x) + norm(x.flip(0))).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name, backend):
    torch.compiler.reset()
    norm = build(name, 6, torch.float32)
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend=backend)
    for step in range(3):
        x, z = (activations((4, 6, 5, 3), torch.float32, seed=step).requires_grad_() for _ in range(2))
        y, expected = compiled(x), plain(z)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        upstream = activations((4, 6, 5, 3), torch.float32, seed=9)  # of y² it would be nearly zero
        y.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
    for key, parameter in norm.named_parameters():
        torch.testing.assert_close(
            parameter.grad, dict(plain.named_parameters())[key].grad, rtol=1e-4, atol=1e-4
        )
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key])
    norm.eval(), plain.eval()
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("ddp") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in NAMES if "affine" in options(name)])
def test_trains_under_data_parallel(name, one_process_group):
    norm = build(name, 6, torch.float32, affine=True)
    wrapped = nn.parallel.DistributedDataParallel(norm)
    for step in range(2):
        wrapped(activations((4, 6, 5, 3), torch.float32, seed=step)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in norm.parameters())


def test_the_custom_yaml_takes_a_users_layer():
    config = OmegaConf.load(CONF / "custom.yaml")
    assert OmegaConf.is_missing(config, "_target_")
    config._target_ = "torch.nn.BatchNorm2d"
    assert isinstance(instantiate(config)(6), nn.BatchNorm2d)
