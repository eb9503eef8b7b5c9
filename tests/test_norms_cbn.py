"""Cross-iteration batch norm against recomputation: earlier batches under today's weights, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.models.lenet import LeNet
from normbench.models.resnet9 import ResNet9
from normbench.models.weights import reparametrize
from normbench.norms.bn import BatchNorm
from normbench.norms.cbn import CrossIterationBatchNorm

FEEDING: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear": lambda: (nn.Linear(5, 6), (7, 5)),
    "linear without bias": lambda: (nn.Linear(5, 6, bias=False), (7, 5)),
    "1d": lambda: (nn.Conv1d(4, 6, 3, stride=2), (5, 4, 9)),
    "2d": lambda: (nn.Conv2d(4, 6, 3, padding=1, bias=False), (3, 4, 5, 4)),
    "strides": lambda: (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(0, 1), dilation=(1, 2)),
        (3, 4, 6, 7),
    ),
    "groups": lambda: (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 6)),
    "same": lambda: (nn.Conv2d(4, 6, (1, 3), padding="same", dilation=2), (3, 4, 5, 6)),
    "reflect": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 5, 6)),
    "3d": lambda: (nn.Conv3d(2, 6, 2), (2, 2, 3, 4, 3)),
}
FORMS = ["none", "standardized", "scaled", "weight_norm"]


def feeding(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A layer and four batches for it."""
    torch.manual_seed(0)
    layer, shape = FEEDING[name]()
    return layer.double(), [2 * torch.randn(shape, dtype=torch.float64) + 1 for _ in range(4)]


@torch.no_grad()
def move(layer: nn.Module, by: float = 0.1) -> None:
    for parameter in layer.parameters():
        parameter.add_(by * torch.randn_like(parameter))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square per channel."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    return x.mean(axes), x.square().mean(axes)


def per_channel(moment: Tensor, weight: Tensor) -> Tensor:
    """∂moment_c/∂weight_c by autograd; no channel's moment knows another channel's weights."""
    return torch.autograd.grad(moment.sum(), weight, retain_graph=True)[0]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FEEDING)
def test_normalizes_by_the_papers_moments(name):
    """Four batches under four weights; each is measured, and its slope taken by autograd, where it stands."""
    layer, batches = feeding(name)
    norm = CrossIterationBatchNorm(6, layer, window=3).double()
    past: list[tuple[Tensor, ...]] = []
    for inputs in batches:
        x = layer(inputs)
        y = norm(x)
        means, squares = ([moment] for moment in moments(x.detach()))
        for mean, square, by_mean, by_square, weight, bias in past[-2:]:
            change = (layer.weight - weight).detach()
            means.append(mean + (by_mean * change).flatten(1).sum(1))
            squares.append(square + (by_square * change).flatten(1).sum(1))
            if bias is not None:  # q = E(z + b)² with z the output without bias, b's step taken whole
                b = layer.bias.detach()
                unbiased = means[-1] - bias
                squares[-1] = squares[-1] - bias**2 - 2 * bias * unbiased + 2 * b * unbiased + b**2
                means[-1] = unbiased + b
        kept = torch.stack([q - m**2 >= 0 for m, q in zip(means, squares, strict=True)]).double()
        mean = (torch.stack(means) * kept).sum(0) / kept.sum(0)
        square = (torch.stack(squares) * kept).sum(0) / kept.sum(0)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        expected = (x - mean.view(shape)) / (square - mean**2 + 1e-5).sqrt().view(shape)
        close(y, expected.detach())
        bias = None if layer.bias is None else layer.bias.detach().clone()
        by_moments = [per_channel(moment, layer.weight) for moment in moments(x)]
        past.append((*(m.detach() for m in moments(x)), *by_moments, layer.weight.detach().clone(), bias))
        move(layer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FEEDING)
def test_earlier_means_are_exactly_those_under_todays_weights(name, form):
    layer, batches = feeding(name)
    reparametrize(nn.Sequential(layer, nn.Linear(1, 1)), form)
    norm = CrossIterationBatchNorm(6, layer.double(), window=5).double()
    for inputs in batches:
        norm(layer(inputs))
        move(layer, 0.01)
    mean, _, counts = norm.recall()
    assert counts.mean() > 0.5
    for row, inputs in enumerate(batches):
        now = moments(layer(inputs))[0].detach()
        close(mean[row], torch.where(counts[row] > 0, now, 0))


@pytest.mark.parametrize("name", FEEDING)
def test_earlier_mean_squares_are_right_to_first_order(name):
    errors = []
    for by in (1e-3, 5e-4):
        layer, batches = feeding(name)
        norm = CrossIterationBatchNorm(6, layer, window=2).double()
        norm(layer(batches[0]))
        torch.manual_seed(1)
        move(layer, by)
        mean, var, counts = norm.recall()
        assert counts.all()
        _, square = moments(layer(batches[0]))
        errors.append((var + mean.square() - square).detach().norm().item())
    assert errors[0] == pytest.approx(4 * errors[1], rel=0.01) and errors[1] > 0


@pytest.mark.parametrize("shape", [(8, 6), (5, 6, 7), (4, 6, 5, 3), (3, 6, 2, 3, 5)], ids=str)
def test_a_window_of_one_and_the_burn_in_are_bn(shape):
    torch.manual_seed(0)
    alone, warming, bn = (
        CrossIterationBatchNorm(6, window=1),
        CrossIterationBatchNorm(6, burn_in=2),
        BatchNorm(6),
    )
    for step in range(3):
        inputs = [torch.randn(shape).requires_grad_() for _ in range(1)] * 3
        outputs = [norm(x) for norm, x in zip((alone, warming, bn), inputs, strict=True)]
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[2]) == (step < 2)
        upstream = torch.randn(shape)
        grads = [torch.autograd.grad(y, x, upstream)[0] for y, x in zip(outputs, inputs, strict=True)]
        torch.testing.assert_close(grads[0], grads[2])
    for name in ("running_mean", "running_var", "num_batches_tracked"):  # of single batches, whatever counts
        assert torch.equal(getattr(alone, name), getattr(bn, name))
        assert torch.equal(getattr(warming, name), getattr(bn, name))
    assert torch.equal(alone.eval()(inputs[0]), bn.eval()(inputs[0]))


def test_a_channel_leaves_out_a_batch_of_negative_variance():
    layer, batches = feeding("2d")
    norm, bn = CrossIterationBatchNorm(6, layer, window=2).double(), BatchNorm(6).double()
    norm(layer(batches[0]))
    move(layer, 0.01)
    norm.slope_var[0, 2] = -1e6 * (layer.weight - norm.past_weight[0])[2]
    assert norm.recall()[2].squeeze(0).tolist() == [1, 1, 0, 1, 1, 1]
    x = layer(batches[1])
    y, plain = norm(x), bn(x)
    close(y[:, 2], plain[:, 2])
    assert all((y[:, c] - plain[:, c]).abs().max() > 1e-3 for c in (0, 1, 3, 4, 5))


def test_what_did_not_come_from_the_feeding_layer_is_not_carried_over():
    layer, batches = feeding("1d")
    norm, alone = (CrossIterationBatchNorm(6, fed).double() for fed in (layer, None))
    layer.bias.data.zero_()
    for inputs in batches:
        x = layer(inputs).detach()
        norm.received = None
        close(norm(x), alone(x))
        layer.weight.data.mul_(1.1)
    assert not norm.slope_mean.any() and not norm.slope_var.any()


def network(make: Callable[..., nn.Module] = CrossIterationBatchNorm, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    task = {"in_channels": 3, "num_classes": 5, "image_size": (8, 8)}
    return ResNet9(**task, norm=make, width=4, **options)


def train(model: nn.Module, steps: int = 3, seed: int = 1) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        x, labels = torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 5
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_network_trains_and_starts_again():
    model = network()
    assert [name for name, _ in model.named_parameters()] == [
        n for n, _ in network(BatchNorm).named_parameters()
    ]
    start = copy.deepcopy(model.state_dict())
    first = train(model)
    for name, norm in model.norm_layers.items():
        assert norm.fed_by is model.get_submodule(name.replace("norm", "conv"))
        assert norm.received is None
        assert norm.num_batches_tracked == 3
        for key in ("past_mean", "past_var", "past_weight", "slope_mean", "slope_var"):
            history = getattr(norm, key)
            assert history.isfinite().all() and history.flatten(1).any(1).all() and not history.requires_grad
        assert not torch.equal(norm.past_weight[0], norm.past_weight[2])
    assert train(network(BatchNorm))[0] == first[0] and train(network(BatchNorm)) != first
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(start[key])
    assert train(model) == first


def test_a_copy_of_a_network_is_fed_by_its_own_layers():
    model = network()
    train(model, 1)
    twin = copy.deepcopy(model)
    assert train(model, 2, seed=2) == train(twin, 2, seed=2)
    for name, norm in twin.norm_layers.items():
        assert norm.fed_by is twin.get_submodule(name.replace("norm", "conv"))
        assert norm.fed_by is not model.norm_layers[name].fed_by
    for key, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize(
    ("options", "fed"),
    [
        ({}, True),
        ({"weight": "scaled"}, True),
        ({"dropout": 0.5, "dropout_position": "after"}, True),
        ({"dropout": 0.5, "dropout_position": "before"}, False),
        ({"norm_position": "after"}, False),
    ],
    ids=str,
)
def test_networks_tell_who_feeds_a_norm(options, fed):
    class Told(nn.Identity):
        def __init__(self, num_features: int, fed_by: nn.Module | None = None) -> None:
            super().__init__()
            self.told = [fed_by]  # a list hides it from the module

    state = torch.get_rng_state()
    with torch.device("meta"):
        lenet = LeNet(in_channels=1, num_classes=5, image_size=(16, 16), norm=Told, **options)
    assert torch.equal(state, torch.get_rng_state())  # dropout drew nothing on the way
    for model in (lenet, network(Told, **options)):
        for name, layer in model.norm_layers.items():
            unit = dict(model.get_submodule(name.rpartition(".")[0]).named_children())
            before = unit.get("conv", unit.get("linear"))
            assert layer.told[0] is (before if fed else None)


def test_autocast_keeps_the_history_in_full_precision():
    exact, rounded = network(), network()
    x = torch.randn(6, 3, 8, 8)
    exact(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded(x).float().sum().backward()
    one, other = (model.norm_layers["prep.norm"] for model in (exact, rounded))
    assert torch.equal(other.slope_mean, one.slope_mean)  # of the images alone
    torch.testing.assert_close(other.slope_var, one.slope_var, rtol=0.05, atol=0.05)
    assert all(buffer.isfinite().all() for buffer in rounded.buffers())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_network_compiles_as_one_graph(backend):
    torch.compiler.reset()
    task = {"in_channels": 1, "num_classes": 5, "image_size": (16, 16)}
    model = LeNet(**task, norm=CrossIterationBatchNorm, norm_layers=["conv2.norm", "fc1.norm"])
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(6, 1, 16, 16)
        for run, owner in ((compiled, model), (plain, plain)):
            owner.zero_grad()
            run(x).square().sum().backward()
            with torch.no_grad():
                for parameter in owner.parameters():
                    parameter -= 0.01 * parameter.grad
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key)


def test_only_layers_with_these_channels_feed_it():
    for layer in (nn.Linear(3, 5), nn.ConvTranspose2d(6, 6, 3), nn.ReLU()):
        with pytest.raises(
            ValueError, match="fed_by must be a convolution or linear layer with num_features=6"
        ):
            CrossIterationBatchNorm(6, layer)
    for key in ("window", "burn_in"):
        with pytest.raises(ValueError, match=f"{key} must be an int ≥"):
            CrossIterationBatchNorm(6, **{key: -1})
