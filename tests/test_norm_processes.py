"""Layers about data-parallel training against real processes: two ranks under torchrun, in float64.

DistributedDataParallel divides the sum of the ranks' gradients by their number W. A rank's loss here is W/N
times the sum over its own samples, so that unequal shares too add up to the mean over all N samples.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_each_process

from normbench.models.lenet import LeNet
from normbench.models.resnet9 import ResNet9
from normbench.norms.bn import BatchNorm
from normbench.norms.bnwos import BNWoS
from normbench.norms.sync import SyncBatchNorm

pytestmark = pytest.mark.slow  # one launch, about 10 s, serves every test but the last

RANKS, STEPS, CLASSES = 2, 20, 5
SPLITS = {"equal": (4, 4), "unequal": (6, 2), "empty": (8, 0)}
SHAPES = [(8, 6), (8, 6, 7), (8, 6, 5, 3), (8, 6, 2, 3, 5)]
OURS = {"lenet": (LeNet, {}), "resnet9": (ResNet9, {"width": 4})}
# torch 2.15 gave `broadcast_buffers` a new name
BROADCAST = next(
    key
    for key in ("forward_sync_buffers", "broadcast_buffers")
    if key in inspect.signature(DistributedDataParallel).parameters
)
State = dict[str, Tensor]


class Run(NamedTuple):
    """Parameters and buffers after each step, each step's logits, and the trained model's in evaluation."""

    states: list[State]
    logits: list[Tensor]
    evaluated: Tensor


def net(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        norm(6),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ).double()


def ours(name: str, norm: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model, options = OURS[name]
    return model(in_channels=3, num_classes=CLASSES, image_size=(16, 16), norm=norm, **options).double()


def batches(steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Eight images and their classes, again and again new ones."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = 2 * torch.randn(8, 3, size, size, generator=generator, dtype=torch.float64) + 1
        yield x, torch.randint(CLASSES, (8,), generator=generator)


def trained(model: nn.Module, steps: int = STEPS, size: int = 8, share: slice = slice(None)) -> Run:
    """SGD with momentum on the samples of `share`; all of them in one process."""
    wrapped = isinstance(model, DistributedDataParallel)
    inner = model.module if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    states, logits = [], []
    for x, labels in batches(steps, size):
        y = model(x[share])
        loss = F.cross_entropy(y, labels[share], reduction="sum") / len(x)
        optimizer.zero_grad()
        (RANKS * loss if wrapped else loss).backward()
        optimizer.step()
        states.append({key: value.clone() for key, value in inner.state_dict().items()})
        logits.append(y.detach())
    with torch.no_grad():
        return Run(states, logits, inner.eval()(x))


def activations(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Mean and sd away from zero and one, and different in every channel."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return x * (0.5 + 0.3 * channel) + 0.7 - 0.2 * channel


def one_step(share: slice, shape: tuple[int, ...], **options: Any) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a SyncBatchNorm that sees `share` of a batch."""
    norm = SyncBatchNorm(6, **options).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.7, 1.6, 6))
        norm.bias.copy_(torch.linspace(1.1, -0.4, 6))
    x = activations(shape)[share].requires_grad_()
    y = norm(x)
    y.backward(activations(shape, seed=9)[share])
    grads = {f"d{key}": p.grad for key, p in norm.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(norm.named_buffers())}


def a_single_value(rank: int) -> tuple[str, bool]:
    """What a layer says to one value per channel in all processes, and whether its state stayed."""
    norm = SyncBatchNorm(6)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    try:
        norm(torch.ones(1 - rank, 6, 1))
    except ValueError as error:
        return str(error), all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    return "", False


def first_alone(rank: int) -> Tensor | None:
    """An evaluation that only the first process does, of a layer that keeps no running statistics."""
    norm = SyncBatchNorm(6, track_running_stats=False).double().eval()
    return norm(activations((4, 6, 3))).detach() if rank == 0 else None


def on_a_rank(rank: int) -> dict[str, Any]:
    """Everything that the tests below compare with one process."""
    shares = {
        name: slice(0, first) if rank == 0 else slice(first, None) for name, (first, _) in SPLITS.items()
    }
    halves = shares["equal"]

    def parallel(model: nn.Module, broadcast: bool = True) -> nn.Module:
        return DistributedDataParallel(model, **{BROADCAST: broadcast})

    return {
        "own": trained(parallel(net(nn.BatchNorm2d), broadcast=False), share=halves),
        "broadcast": trained(parallel(net(nn.BatchNorm2d)), share=halves),
        "sync": {name: trained(parallel(net(SyncBatchNorm)), share=at) for name, at in shares.items()},
        "ours": {name: trained(parallel(ours(name, SyncBatchNorm)), 5, 16, halves) for name in OURS},
        "step": {(name, shape): one_step(at, shape) for name, at in shares.items() for shape in SHAPES},
        "untracked": one_step(shares["unequal"], SHAPES[2], momentum=None, track_running_stats=False),
        "single": a_single_value(rank),
        "alone": first_alone(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return in_each_process(on_a_rank, processes=RANKS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_states(actual: list[State], expected: list[State], only: str = "") -> None:
    assert len(actual) == len(expected)
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if only in key:
                message = f"{key} after step {step + 1}: "
                torch.testing.assert_close(
                    ours[key], theirs[key], rtol=1e-10, atol=1e-10, msg=lambda m, at=message: at + m
                )


@pytest.mark.parametrize("stats_device", [0, 1])
def test_bnwos_is_a_rank_of_data_parallel_training_without_synchronization(ranks, stats_device):
    """Buffers that are not broadcast stay each rank's own: `stats_device` is the rank that is looked at."""
    simulated = trained(net(lambda c: BNWoS(c, num_devices=2, stats_device=stats_device)))
    real = ranks[stats_device]["own"]
    assert_states(real.states, simulated.states)
    close(real.evaluated, simulated.evaluated)
    for step, logits in enumerate(simulated.logits):
        close(torch.cat([rank["own"].logits[step] for rank in ranks]), logits)


def test_bnwos_by_default_is_the_first_rank_of_data_parallel_training_as_torch_has_it(ranks):
    """By default the first rank's buffers are broadcast when a forward starts: its own are never touched.

    Another rank goes on from the first one's statistics, with its own batch, until the next forward.
    """
    simulated = trained(net(BNWoS))
    first, second = (rank["broadcast"] for rank in ranks)
    assert_states(first.states, simulated.states)
    close(first.evaluated, simulated.evaluated)
    own = ranks[1]["own"].states
    for step in range(1, STEPS):
        for key in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
            measured = (own[step][key] - 0.9 * own[step - 1][key]) / 0.1  # by the second rank, in this step
            expected = 0.9 * first.states[step - 1][key] + 0.1 * measured
            close(second.states[step][key], expected)
            assert (second.states[step][key] - first.states[step][key]).abs().max() > 1e-3


@pytest.mark.parametrize("split", SPLITS)
def test_sync_bn_on_shares_is_bn_on_the_whole_batch(ranks, split):
    whole = trained(net(BatchNorm))
    for rank in ranks:
        assert_states(rank["sync"][split].states, whole.states)
        close(rank["sync"][split].evaluated, whole.evaluated)
    for step, logits in enumerate(whole.logits):
        close(torch.cat([rank["sync"][split].logits[step] for rank in ranks]), logits)


@pytest.mark.parametrize("name", OURS)
def test_sync_bn_in_a_network_of_ours(ranks, name):
    whole = trained(ours(name, BatchNorm), 5, 16)
    for rank in ranks:
        assert_states(rank["ours"][name].states, whole.states)
        close(rank["ours"][name].evaluated, whole.evaluated)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_one_step_of_sync_bn_is_torchs_batch_norm_on_the_whole_batch(ranks, split, shape):
    x = activations(shape).requires_grad_()
    weight = torch.linspace(-0.7, 1.6, 6).double().requires_grad_()
    bias = torch.linspace(1.1, -0.4, 6).double().requires_grad_()
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    y.backward(activations(shape, seed=9))
    shares = [rank["step"][split, shape] for rank in ranks]
    close(torch.cat([share["y"] for share in shares]), y)
    close(torch.cat([share["dx"] for share in shares]), x.grad)
    close(sum(share["dweight"] for share in shares), weight.grad)
    close(sum(share["dbias"] for share in shares), bias.grad)
    for share in shares:
        close(share["running_mean"], mean)
        close(share["running_var"], var)
        assert share["num_batches_tracked"] == 1
    if shape == SHAPES[2] and split == "unequal":
        close(torch.cat([rank["untracked"]["y"] for rank in ranks]), y)
        assert "running_mean" not in ranks[0]["untracked"]


def test_sync_bn_refuses_one_value_in_all_processes_on_each_of_them(ranks):
    for count, rank in zip((1, 0), ranks, strict=True):
        said, stayed = rank["single"]
        wanted = "batch statistics need more than one value per channel, got"
        assert said == f"{wanted} ({count}, 6, 1) here and 1 in 2 processes" and stayed


def test_evaluation_waits_for_no_other_process(ranks):
    norm = BatchNorm(6, track_running_stats=False).double().eval()
    close(ranks[0]["alone"], norm(activations((4, 6, 3))))


def leaves_the_other_waiting(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one has had enough")
    torch.distributed.barrier()


def test_a_failing_rank_ends_the_launch_and_is_shown():
    with pytest.raises(RuntimeError, match=r"(?s)waiting in 2 processes: exit code 1.*one has had enough"):
        in_each_process(leaves_the_other_waiting, limit_s=60)
