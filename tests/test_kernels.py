"""The fused batch norm against its readable twin in float64, and what happens around it."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normbench import kernels
from normbench.kernels import cpu
from normbench.models.dilated_cnn import DilatedCNN
from normbench.models.lenet import LeNet
from normbench.models.resnet9 import ResNet9
from normbench.models.resnet_cifar import ResNetCIFAR
from normbench.norms.bn import BatchNorm
from normbench.norms.mbn import MBN

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(40, 6), (4, 6, 9), (4, 6, 9, 7), (3, 20, 33, 40), (2, 6, 5, 6, 7), (70, 3, 1, 1), (2, 70, 8, 8)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def away(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    return ((got.double().cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item()


def laid(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=LAST[x.ndim]) if last and x.ndim in LAST else x


def pair(channels: int, kind: torch.dtype, **options: object) -> tuple[MBN, MBN]:
    """The fused layer, and the readable one in float64 with the same random parameters."""
    fused, readable = MBN(channels, impl="fused", **options), MBN(channels, impl="reference", **options)
    with torch.no_grad():
        for p, q in zip(fused.parameters(), readable.parameters(), strict=True):
            p.copy_(torch.randn(channels))
            q.copy_(p)
        for layer in (fused, readable):
            layer.running_mean.fill_(2.5)
            layer.running_var.fill_(3)
    return fused.to(kind), readable.double()


def compare(fused: MBN, readable: MBN, x: Tensor, relu: bool, device: str = "cpu") -> float:
    """The largest difference in output, gradients and running statistics."""
    fused = fused.to(device)
    ours = x.to(device, copy=True).requires_grad_()
    theirs = x.to(torch.float64, copy=True).requires_grad_()
    y, wanted = fused(ours, relu=relu), readable(theirs, relu=relu)
    dy = torch.randn_like(x)
    y.backward(dy.to(device))
    wanted.backward(dy.double())
    assert y.dtype == x.dtype and y.stride() == x.stride() and ours.grad is not None
    assert ours.grad.stride() == x.stride()
    pairs = [(y, wanted), (ours.grad, theirs.grad), *zip(fused.buffers(), readable.buffers(), strict=True)]
    pairs += [(p.grad, q.grad) for p, q in zip(fused.parameters(), readable.parameters(), strict=True)]
    return max(away(got, want) for got, want in pairs if got is not None and want is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", ["stride", "rows", "batch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operator_is_its_readable_twin(shape: tuple[int, ...], sample: str, device: str) -> None:
    torch.manual_seed(0)
    for dtype in kernels.DTYPES[device]:
        for stride, last, relu in ((1, False, True), (2, True, False), (3, False, False), (4, True, True)):
            kind = torch.promote_types(dtype, torch.float32)
            fused, readable = pair(shape[1], kind, stride=stride, sample=sample)
            x = laid((2 * torch.randn(shape) + 3).to(dtype), last)
            for training in (True, False):
                fused.train(training)
                readable.train(training)
                assert compare(fused, readable, x, relu, device) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, top) for top in (5, 9, 12, 12)]),
    stride=st.integers(1, 9),
    sample=st.sampled_from(["stride", "rows", "batch"]),
    last=st.booleans(),
    relu=st.booleans(),
    affine=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, ...], stride: int, sample: str, last: bool, relu: bool, affine: bool
) -> None:
    torch.manual_seed(1)
    x = laid(torch.randn(shape, dtype=torch.float64) - 1, last)
    fused, readable = pair(shape[1], torch.float64, stride=stride, sample=sample, affine=affine)
    if fused.measured(x).numel() // shape[1] < 2:
        with pytest.raises(ValueError, match="need more than one value per channel"):
            fused(x)
    else:
        assert compare(fused, readable, x, relu) < 1e-10


def test_tensors_that_are_neither_contiguous_nor_channels_last() -> None:
    torch.manual_seed(0)
    wide = torch.randn(4, 6, 8, 16, dtype=torch.float64)
    fused, readable = pair(6, torch.float64, stride=2)
    x = wide[..., ::2].clone().requires_grad_()
    sliced = wide[..., ::2].requires_grad_()
    fused(sliced).sin().sum().backward()
    readable(x).sin().sum().backward()
    assert sliced.grad is not None and x.grad is not None and away(sliced.grad, x.grad) < 1e-12
    assert sliced.grad.stride() == x.stride()


def test_large_tensors_are_written_past_the_cache() -> None:
    torch.manual_seed(0)
    for last in (False, True):
        for stride in (1, 4):
            fused, readable = pair(64, torch.float32, stride=stride)
            assert compare(fused, readable, laid(torch.randn(20, 64, 33, 32), last), True) < 3e-6


@pytest.mark.parametrize("last", [False, True])
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(last: bool) -> None:
    torch.manual_seed(0)
    x = laid(torch.randn(8, 5, 16, 16) + 1e4, last)
    for unlike, limit in ((slice(0, 1), 1e-7), (slice(None), 1e-6)):  # first values that are no guess at it
        x[:4, :, 0, unlike] = 0
        _, mean, var = kernels.batch_norm(x, None, None, (1, 1, 1), 1e-5, False)
        wanted = x.double().var((0, 2, 3), unbiased=False)
        assert away(mean, x.double().mean((0, 2, 3))) < limit and away(var, wanted) < 1e-4


@pytest.mark.parametrize("last", [False, True])
def test_threads_change_no_bit(last: bool) -> None:
    torch.manual_seed(0)
    x, dy = laid(torch.randn(6, 70, 19, 17), last), torch.randn(6, 70, 19, 17)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y, mean, var = kernels.batch_norm(own, None, None, (1, 2, 2), 1e-5, True)
            y.backward(dy)
            found.append((y.detach(), mean, var, own.grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_nan_passes_the_relu_and_the_moments(last: bool, stride: int) -> None:
    x = laid(torch.randn(4, 3, 4, 4), last)
    x[1, 1, 2, 2] = float("nan")
    for values in kernels.batch_norm(x, None, None, (1, stride, stride), 1e-5, True):
        by_channel = values.transpose(0, 1) if values.ndim == 4 else values
        assert by_channel[1].isnan().all() and by_channel[[0, 2]].isfinite().all()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # of torch's own check
def test_torch_takes_the_operators_as_its_own() -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    m, v = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
    for operator, args in (
        (torch.ops.normbench.batch_norm.default, (x, w, b, [1, 2, 2], 1e-5, True)),
        (torch.ops.normbench.batch_norm.default, (x, None, None, [1, 1, 1], 1e-5, False)),
        (torch.ops.normbench.normalized.default, (x, m, v, w, b, 1e-5, True)),
    ):
        assert set(torch.library.opcheck(operator, args, test_utils=checks).values()) == {"SUCCESS"}
    for relu in (False, True):
        assert torch.autograd.gradcheck(
            lambda *a, relu=relu: kernels.batch_norm(*a, (1, 2, 2), 1e-5, relu)[0], (x, w, b)
        )


def test_a_second_derivative_is_refused_not_zero() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    for layer in (MBN(3, stride=2, impl="fused"), MBN(3, impl="fused").eval()):
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; use impl=reference"):
            dx.square().sum().backward()


def test_running_moments_may_move_before_the_backward_of_an_evaluation() -> None:
    torch.manual_seed(0)
    x, gradients = torch.randn(4, 3, 5, 5), []
    for impl in ("fused", "reference"):
        layer, own = MBN(3, impl=impl), x.clone().requires_grad_()
        y = layer.eval()(own)
        layer.train()(x)
        y.square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_it_gives_the_same_numbers(backend: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), MBN(8, stride=2, impl="fused"), nn.ReLU(), BatchNorm(8, impl="fused")
    )
    twin, x = copy.deepcopy(net), torch.randn(4, 3, 9, 9)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for _ in range(2):
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    for got, wanted in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_under_autocast_and_data_parallel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone = nn.Sequential(nn.Conv2d(3, 8, 3), MBN(8, stride=2, impl="fused"))
        parallel = DistributedDataParallel(copy.deepcopy(alone))
        x = torch.randn(4, 3, 9, 9)
        for net in (alone, parallel):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = net(x)
            assert y.dtype == torch.bfloat16
            y.float().square().sum().backward()
    finally:
        dist.destroy_process_group()
    for p, q in zip(alone.parameters(), parallel.module.parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("model", [ResNet9, ResNetCIFAR, LeNet, DilatedCNN])
def test_models_put_the_relu_inside(model: type[nn.Module]) -> None:
    def made(impl: str) -> nn.Module:
        torch.manual_seed(0)
        small = {} if model is LeNet else {"width": 4}
        net = model(
            in_channels=3, num_classes=10, image_size=(28, 28), activation="relu",
            norm=lambda c: MBN(c, stride=2, impl=impl), **small,
        )  # fmt: skip
        return net.double()

    x = torch.randn(4, 3, 28, 28, dtype=torch.float64)
    outputs, relus = {}, {}
    for impl in ("fused", "reference"):
        net = made(impl)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            y = net(x)
        y.square().sum().backward()
        outputs[impl] = [y.detach(), *(p.grad for p in net.parameters())]
        counts = {event.key: event.count for event in seen.key_averages()}
        relus[impl] = counts.get("aten::relu", 0)
    for got, wanted in zip(outputs["fused"], outputs["reference"], strict=True):
        assert got is not None and wanted is not None and away(got, wanted) < 1e-9
    assert relus["fused"] < relus["reference"]  # resnet_cifar's residuals keep one a block


def test_auto_takes_it_where_it_can_and_fused_says_why_not() -> None:
    x = torch.randn(4, 6, 8, 8)
    assert MBN(6).fused(x) and MBN(6).fused(x.bfloat16()) and not MBN(6, sample="random").fused(x)
    assert not MBN(6).fused(x.half()) and not MBN(6, impl="reference").fused(x)
    assert not BatchNorm(6).fused(x) and BatchNorm(6, impl="auto").fused(x)
    assert not MBN(6).fused(x.to("meta")) and not MBN(6).fused(x[:0])
    with pytest.raises(
        RuntimeError, match="impl=fused: cpu kernels take no float16; use impl=auto or reference"
    ):
        MBN(6, impl="fused")(x.half())
    with pytest.raises(ValueError, match="impl=fused measures no sample=random"):
        MBN(6, impl="fused", sample="random")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place without kernels, where they are asked for anew."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for cached in (cpu._load, cpu._function):
        cached.cache_clear()
    yield tmp_path
    for cached in (cpu._load, cpu._function):
        cached.cache_clear()


def test_without_a_compiler_there_is_one_warning_and_the_readable_path(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    layer, x = MBN(6, stride=2), torch.randn(4, 6, 8, 8)
    with pytest.warns(UserWarning, match=r"cannot be compiled \(.{,40}no-such-compiler: .*; impl=auto takes"):
        y = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(MBN(6, stride=2, impl="reference")(x), y) and not layer.fused(x)
    with pytest.raises(RuntimeError, match="impl=fused: the CPU kernels cannot be compiled"):
        MBN(6, impl="fused")(x)
    assert not list(elsewhere.glob("normbench/build-*"))


@pytest.mark.slow
def test_processes_that_build_at_once_agree_and_a_killed_build_blocks_nobody(tmp_path: Path) -> None:
    (tmp_path / "normbench" / "build-killed").mkdir(parents=True)
    (tmp_path / "normbench" / "build-killed" / "lock").touch()
    code = "import torch; from normbench.norms.mbn import MBN; print(MBN(3).fused(torch.ones(2, 3)))"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300) for process in both] == [("True\n", "")] * 2
    kept = list((tmp_path / "normbench").glob("*.so"))
    assert len(kept) == 1 and torch.backends.cpu.get_cpu_capability().lower() in kept[0].name
    written = kept[0].stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.DEVNULL)
    assert kept[0].stat().st_mtime_ns == written


def test_the_gpus_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    script = Path(__file__).with_name("triton_kernels.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    said = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert said.stderr == "" and said.stdout.endswith("12 cases, 0 wrong\n"), said.stdout + said.stderr
