"""The batch family: layers against their formulas beyond the first batches, gradients, draws, identities."""

import copy

import numpy as np
import pytest
import torch
from layers import build, options
from torch import Tensor, nn

from normbench.formulas import formula_of, options_of, state_of
from normbench.manifest import LayerObservation, idle_options
from normbench.norms.bn import BatchNorm
from normbench.norms.brn import BatchRenorm
from normbench.norms.ebn import ExtendedBatchNorm
from normbench.norms.mabn import MABN
from normbench.norms.mbn import MBN
from normbench.norms.memorized_bn import MemorizedBatchNorm
from normbench.norms.range_bn import RangeBatchNorm

SHAPES = [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5)]
MAPS = SHAPES[1:]


def activations(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Mean and sd away from zero and one, different in every channel and every batch."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return x * (0.5 + 0.3 * channel + 0.2 * (seed % 4)) + 0.7 - 0.2 * channel


def set_up(norm: nn.Module) -> nn.Module:
    """In float64, weight and bias away from one and zero."""
    norm = norm.double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.7, 1.6, len(norm.weight)))
        norm.bias.copy_(torch.linspace(1.1, -0.4, len(norm.bias)))
    return norm


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def hold_to_formula(norm: nn.Module, x: Tensor, training: bool = True) -> None:
    """One batch: output and every buffer."""
    state = state_of(norm)
    with torch.random.fork_rng(devices=[]):
        y = norm.train(training)(x)
    expected, changed = formula_of(norm)(x.detach().numpy(), state, options_of(norm), training)
    close(y.detach(), torch.from_numpy(expected))
    for key, value in state_of(norm).items():
        np.testing.assert_allclose(value, changed.get(key, state[key]), rtol=1e-9, atol=1e-9, err_msg=key)


BEYOND_DEFAULTS = {
    "renorm": BatchRenorm(6, r_max=3, d_max=5, warmup_steps=1, r_max_step=5, d_max_step=3, momentum=0.01),
    "renorm_half_clipped": BatchRenorm(6, r_max=1.1, warmup_steps=2, stats_timing="post"),
    "range_chunks": RangeBatchNorm(6, num_chunks=3),
    "ebn_cumulative": ExtendedBatchNorm(6, momentum=None),
    "mabn": MABN(6, buffer_size=3, warmup_steps=4, r_warmup_steps=6, r_max=1.2, momentum=0.3),
    "mabn_at_once": MABN(6, buffer_size=2, warmup_steps=0, r_warmup_steps=0, r_max=None, momentum=None),
    "memorized": MemorizedBatchNorm(6, window=3),
    "mbn_stride": MBN(6, stride=2),
    "mbn_rows": MBN(6, stride=2, sample="rows"),
    "mbn_batch": MBN(6, stride=2, sample="batch", stored_var="biased"),
    "mbn_random": MBN(6, stride=2, sample="random"),
    "bn_bessel": BatchNorm(6, eval_bessel=True, stored_var="biased"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BEYOND_DEFAULTS)
def test_is_its_formula_with_options_and_beyond_warm_up(name, shape):
    norm = set_up(copy.deepcopy(BEYOND_DEFAULTS[name]))
    for seed in range(9):
        hold_to_formula(norm, activations(shape, seed))
        hold_to_formula(norm, activations(shape, seed + 20), training=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_channel_extended_is_batch_norm(shape):
    one, bn = ExtendedBatchNorm(1).double(), BatchNorm(1).double()
    for seed in range(3):
        x = activations((shape[0] * 2, 1, *shape[2:]), seed)
        close(one(x), bn(x))
    for key, value in one.state_dict().items():
        close(value, bn.state_dict()[key])
    close(one.eval()(x), bn.eval()(x))


def test_extended_output_has_one_spread_and_no_means():
    x = activations((16, 6, 9, 9))
    y = ExtendedBatchNorm(6, affine=False, eps=0).double()(x)
    close(y.mean((0, 2, 3)), torch.zeros(6, dtype=torch.float64))
    centred = x - x.mean((0, 2, 3), keepdim=True)
    close(y * x.std(correction=0), centred)


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_range_of_normal_values_is_about_twice_their_sd(chunks):
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    _, s2 = RangeBatchNorm(1, num_chunks=chunks).double().batch_stats(x)
    assert 1.6 < s2.sqrt().item() / 3 < 2  # from below: sqrt(2 ln n) is where the largest value tends to


def test_range_chunks_follow_samples_then_positions_in_either_memory_format():
    norm = RangeBatchNorm(6, num_chunks=2, affine=False, eps=0).double()
    x = activations((4, 6, 5, 3))
    first, last = (RangeBatchNorm(6).double().batch_stats(half)[1].sqrt() for half in x.split(2))
    close(norm.batch_stats(x)[1], ((first + last) / 2).square())
    close(norm(x.contiguous(memory_format=torch.channels_last)), norm(x))


def test_range_refuses_parts_without_a_range():
    with pytest.raises(
        ValueError, match=r"num_chunks=9 needs two values per channel in each chunk, got \(4, 6, 2, 2\)"
    ):
        RangeBatchNorm(6, num_chunks=9)(torch.zeros(4, 6, 2, 2))
    RangeBatchNorm(6, num_chunks=8)(torch.zeros(4, 6, 2, 2))
    with pytest.raises(ValueError, match="num_chunks must be an int ≥ 1, got 0"):
        RangeBatchNorm(6, num_chunks=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memorized_evaluates_as_batch_norm_over_all_remembered_values(shape):
    norm = set_up(MemorizedBatchNorm(6, window=3))
    x = activations(shape)
    fresh = x * view(norm.weight / np.sqrt(1 + 1e-5), x) + view(norm.bias, x)
    close(norm.eval()(x), fresh)
    batches = [activations(shape, seed) for seed in range(5)]
    for i, batch in enumerate(batches):
        norm.train()(batch)
        together = torch.cat(batches[max(0, i - 2) : i + 1])
        close(norm.running_mean, together.mean(axes(x)))
        close(norm.running_var, together.var(axes(x), correction=0))


def test_memorized_keeps_its_precision_on_large_means():
    norm = MemorizedBatchNorm(6, window=4)
    for seed in range(6):
        norm((activations((16, 6, 9, 9), seed) + 3000).float())
    kept = torch.cat([activations((16, 6, 9, 9), seed) for seed in range(2, 6)])
    torch.testing.assert_close(
        norm.running_var.double(), kept.var((0, 2, 3), correction=0), rtol=1e-3, atol=0
    )


def axes(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def view(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1,) * (x.ndim - 2))


@pytest.mark.parametrize("options", [{}, {"buffer_size": 1, "warmup_steps": 0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mabn_of_its_own_statistics_is_a_root_mean_square_norm(shape, options):
    """In warm-up, and with a buffer of one batch: gradients are autograd's."""
    norm = set_up(MABN(6, **options))
    for seed in range(3):
        x, z = (activations(shape, seed).requires_grad_() for _ in range(2))
        plain = z / view((z.square().mean(axes(z)) + 1e-5).sqrt(), z)
        expected = plain * view(norm.weight.detach(), z) + view(norm.bias.detach(), z)
        y = norm(x)
        close(y, expected)
        upstream = activations(shape, seed + 10)
        y.backward(upstream), expected.backward(upstream)
        close(x.grad, z.grad)


class MovingAverages:
    """The published forward and backward in NumPy, with lists of what was seen instead of buffers."""

    def __init__(self, weight, options):
        self.weight, self.options = weight, options
        self.x2, self.gz, self.running = [], [], np.ones(len(weight))

    def step(self, x, upstream):
        """Output before the bias, and the gradient of x."""
        o, over = self.options, (0, *range(2, x.ndim))
        column = (1, -1) + (1,) * (x.ndim - 2)
        seen = len(self.x2)
        warm = max(o["buffer_size"], o["warmup_steps"])

        def pooled(values):
            return np.mean(values[-o["buffer_size"] :] if seen >= warm else values[-1:], axis=0)

        self.x2.append((x**2).mean(over))
        a = pooled(self.x2) + 1e-5
        r = np.ones_like(a)
        if seen >= max(warm, o["r_warmup_steps"]):
            r = np.clip(np.sqrt(a / (self.running + 1e-5)), 1 / o["r_max"], o["r_max"])
        self.running = (1 - o["momentum"]) * self.running + o["momentum"] * (a - 1e-5)
        z = x / np.sqrt(a).reshape(column)
        y = z * (r * self.weight).reshape(column)
        g = upstream * (self.weight * r).reshape(column)
        self.gz.append((g * z).mean(over))
        return y, (g - z * pooled(self.gz).reshape(column)) / np.sqrt(a).reshape(column)


LATE = {"buffer_size": 3, "warmup_steps": 2, "r_warmup_steps": 5, "r_max": 1.1, "momentum": 0.3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mabn_gradient_by_moving_averages(shape):
    norm = set_up(MABN(6, **LATE))
    written = MovingAverages(norm.weight.detach().numpy(), LATE)
    true = []
    for seed in range(10):
        x = activations(shape, seed).requires_grad_()
        upstream = activations(shape, seed + 10)
        norm.weight.grad = None
        y = norm(x)
        y.backward(upstream)
        expected, dx = written.step(x.detach().numpy(), upstream.numpy())
        close((y - view(norm.bias, x)).detach(), torch.from_numpy(expected))
        close(x.grad, torch.from_numpy(dx))
        normed = (y.detach() - view(norm.bias.detach(), x)) / view(norm.weight.detach(), x)
        close(norm.weight.grad, (upstream * normed).sum(axes(x)))
        true.append(orthogonal(x.grad, x.detach()))
    assert all(true[:3]) and not any(true[3:])
    close(norm.running_var, torch.from_numpy(written.running))
    assert torch.equal(norm.running_mean, torch.zeros(6, dtype=torch.float64))
    rows = [t % 3 for t in range(10)][-3:]
    close(norm.buffer_gz[rows], torch.from_numpy(np.stack(written.gz[-3:])))


def orthogonal(grad: Tensor, x: Tensor) -> bool:
    """A true gradient through the batch's own mean square has no part along x, but for eps."""
    along = (grad * x).sum(axes(x)).abs()
    return bool((along < 1e-3 * grad.norm() * x.norm()).all())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_mabn_compiled_is_itself_beyond_warm_up(backend):
    torch.compiler.reset()
    norm = set_up(MABN(6, **LATE)).float()
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend=backend)
    for seed in range(8):
        x, z = (activations((4, 6, 5, 3), seed).float().requires_grad_() for _ in range(2))
        if seed < 6:
            y, expected = compiled(x), plain(z)
        else:  # two forwards before one backward
            y, expected = compiled(x) + compiled(x.flip(0) * 2), plain(z) + plain(z.flip(0) * 2)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        upstream = activations((4, 6, 5, 3), seed + 10).float()
        y.backward(upstream), expected.backward(upstream)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_mabn_forgets_a_gradient_that_is_not_finite():
    norm = MABN(2, buffer_size=2, warmup_steps=0)
    for seed in range(6):
        x = activations((4, 2, 3, 3), seed).float().requires_grad_()
        norm(x).backward(torch.full_like(x, torch.inf) if seed == 3 else torch.ones_like(x))
        assert x.grad.isfinite().all() == (seed != 3)
        assert norm.buffer_gz.isfinite().all()


def test_mabn_takes_half_precision_parameters_large_values_and_constant_channels():
    for scale in (1e4, 1e-4):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            norm = MABN(6, buffer_size=2, warmup_steps=0).to(dtype)
            for seed in range(4):
                x = (activations((4, 6, 5, 3), seed) * scale).clamp(-6e4, 6e4).to(dtype)
                x[:, 0] = 0
                x.requires_grad_()
                y = norm(x)
                y.backward(torch.ones_like(y))
                assert y.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("sample", ["stride", "rows", "batch", "random"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mbn_of_stride_1_is_batch_norm_by_every_sample(shape, sample):
    norm, bn = set_up(MBN(6, sample=sample)), set_up(BatchNorm(6))
    x, z = (activations(shape).requires_grad_() for _ in range(2))
    before = torch.get_rng_state()
    norm(x).backward(activations(shape, 1)), bn(z).backward(activations(shape, 1))
    assert torch.equal(before, torch.get_rng_state()), "nothing to draw"
    close(x.grad, z.grad)
    close(norm.running_var, bn.running_var)


def test_mbn_measures_the_sample_that_it_names():
    x = activations((5, 6, 7, 8))
    shapes = {"stride": (5, 6, 3, 3), "rows": (5, 6, 3, 8), "batch": (2, 6, 7, 8), "random": (5, 6, 9)}
    for sample, shape in shapes.items():
        assert MBN(6, stride=3, sample=sample).measured(x).shape == shape
    for sample, rows in (("rows", x[:, :, ::3]), ("batch", x[::3])):
        assert torch.equal(MBN(6, stride=3, sample=sample).measured(x), rows)
    flat = activations((5, 6))
    for sample in ("stride", "rows", "random"):
        assert torch.equal(MBN(6, stride=3, sample=sample).measured(flat), flat)
    assert torch.equal(MBN(6, stride=3, sample="batch").measured(flat), flat[::3])


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_mbn_random_measures_what_torch_draws(shape):
    norm = MBN(6, stride=2, sample="random").double()
    x = activations(shape)
    wanted = norm.measured(x).shape[2]
    assert wanted == MBN(6, stride=2).measured(x)[0, 0].numel()
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sample = norm.measured(x)
        torch.manual_seed(seed)
        drawn = torch.randperm(x[0, 0].numel())[:wanted]
        assert len(set(drawn.tolist())) == wanted
        assert torch.equal(sample, x.flatten(2)[..., drawn])
        last = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        torch.manual_seed(seed)
        assert torch.equal(norm.measured(last), sample)
        seen.append(sample)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    state = torch.get_rng_state()
    norm.eval()(x)
    assert torch.equal(state, torch.get_rng_state()), "evaluation draws nothing"


@pytest.mark.parametrize("sample", ["rows", "batch", "random"])
def test_mbn_gradient_flows_through_any_sample(sample):
    norm = set_up(MBN(2, stride=2, sample=sample))

    def forward(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(norm, {k: b.clone() for k, b in norm.named_buffers()}, x)

    with torch.random.fork_rng(devices=[]):
        assert torch.autograd.gradcheck(forward, activations((4, 2, 3, 5)).requires_grad_())


@pytest.mark.parametrize(
    ("sample", "backend"),
    [
        *(("rows", "aot_eager"), ("batch", "aot_eager"), ("random", "aot_eager")),
        pytest.param("random", "inductor", marks=pytest.mark.slow),
    ],
)
def test_mbn_samples_compile_as_one_graph(sample, backend):
    torch.compiler.reset()
    norm = set_up(MBN(6, stride=2, sample=sample)).float()
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend=backend)
    for seed in range(2):
        x, z = (activations((4, 6, 5, 3), seed).float().requires_grad_() for _ in range(2))
        torch.manual_seed(seed)
        y = compiled(x)
        torch.manual_seed(seed)
        expected = plain(z)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.sum().backward(), expected.sum().backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)


def test_mbn_refuses_other_samples():
    with pytest.raises(
        ValueError, match="sample must be one of stride, rows, batch, random, got 'row'; did you"
    ):
        MBN(6, sample="row")
    with pytest.raises(ValueError, match=r"got \(1, 6\) sampled from \(3, 6\)$"):
        MBN(6, stride=3, sample="batch")(torch.zeros(3, 6))


@pytest.mark.parametrize(
    ("name", "changes", "idle"),
    [
        ("mbn_rows", {"stride": 2}, []),
        ("mbn_batch", {"stride": 2}, []),
        ("mbn_random", {"stride": 2}, []),
        ("mbn_rows", {"stride": 1}, ["sample"]),  # stride 1: every sample is everything
        ("mbn", {"stride": 2, "impl": "fused"}, []),  # auto, the default, chooses it too
        ("bn", {"impl": "fused"}, []),
        ("mbn", {"stride": 2, "affine_impl": "vector"}, ["affine_impl"]),  # the operator has its own
        ("mabn", {"buffer_size": 4, "warmup_steps": 9, "r_warmup_steps": 12, "r_max": 1.2}, []),
        ("memorized_bn", {"window": 5}, []),
        ("range_bn", {"num_chunks": 4}, []),
        ("renorm", {}, []),
        ("bn_no_affine", {}, []),
    ],
)
def test_the_manifest_sees_which_options_act(name, changes, idle):
    values = options(name) | changes
    layer = build(name, 6, torch.float32, **changes)
    at = LayerObservation("norm", layer, shape=(8, 6, 5, 3), probe=activations((8, 6, 5, 3)).float())
    assert idle_options(values, {"norm": at}) == idle
