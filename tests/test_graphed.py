"""Recorded steps: their buffers around a stand-in for CUDA's capture give the bits of plain steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Planner
from torch import Tensor, nn

from normbench import graphed, preparing, training
from normbench.course import Totals
from normbench.graphed import GraphedStep, Outputs, Unfaithful, why_not
from normbench.seeds import Seeds
from normbench.values import Refused

TINY = ["model.width=4", "dataset.train_subset=90", "dataset.test_subset=32", "batch.size=24", "epochs=2",
        "threads=1", "dataset.augment.crop=1"]  # fmt: skip


def stand_in(ready: training.Prepared) -> graphed.Capture:
    """Like a graph: the replay does the same again, from and into the same tensors."""

    def capture(run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
        outputs = run()
        parameters = [p for group in ready.optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters]

        def replay() -> None:
            for kept, new in zip(outputs, run(), strict=True):
                kept.copy_(new)
            for kept, parameter in zip(grads, parameters, strict=True):
                if kept is not None and parameter.grad is not None:
                    kept.copy_(parameter.grad)

        return outputs, replay

    return capture


def session(ready: training.Prepared, number: int) -> list[Tensor]:
    """Two epochs of a session: totals, weights, buffers and optimizer state at the end."""
    seeds, totals = Seeds(0, number), Totals(ready.device)
    training.start(ready, seeds)
    training.warm_up(ready, seeds)
    training.start(ready, seeds)
    sums = []
    steps = 2 * ready.data.train.steps_per_epoch
    for step, (epoch, x, y) in zip(range(steps), training.endless(ready.data, [seeds]), strict=False):
        ready.schedule.apply(ready.optimizer, step)
        totals.add(*training.train_step(ready, x, y, len(y), seeds.number("forward", epoch, step)), y)
        sums.append(totals.loss.clone())
    ready.optimizer.zero_grad()
    state = [tensor for _, tensor in training.state_of(ready.model)]
    return [t.detach().clone() for t in (*sums, *state, *training.state_tensors(ready.optimizer))]


@pytest.mark.parametrize(
    "extra", ["norm=mbn norm.stride=2", "optim=adam model.dropout=0.2", "precision=bf16 channels_last=true"]
)
def test_recorded_steps_give_the_bits_of_plain_ones(
    plan_of: Planner, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 90 images in batches of 24: a last batch of 18; the one-cycle schedule moves lr and momentum each step
    plan = plan_of(*TINY, *extra.split())
    plain, recorded = (preparing.prepare(plan.config(plan.sessions[0])) for _ in range(2))
    monkeypatch.setattr(preparing, "why_not", lambda *args, **kwargs: None)
    monkeypatch.setattr(GraphedStep.__init__, "__defaults__", (stand_in(recorded),))
    with training.settings_of(recorded.config, recorded.device):
        training.start(recorded, Seeds(0, 0))
        x, y = next(iter(recorded.data.train.batches(Seeds(0, 0), 1)))
        preparing.record_steps(recorded, x, y)
    assert recorded.not_graphed is None and recorded.graphed is not None
    assert {shape[0] for shape in recorded.graphed.recordings} == {24, 18}
    for number in (0, 1):
        a, b = (session(ready, number) for ready in (plain, recorded))
        assert len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


class Counting(nn.Module):
    """Counts its batches on the host, which a graph would not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.batches = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        y: Tensor = self.linear(x) * self.batches
        return y


def test_a_recording_that_does_something_else_is_refused_and_changes_nothing() -> None:
    model = Counting()
    before = [p.detach().clone() for p in model.parameters()]

    def gradients(x: Tensor, y: Tensor) -> Outputs:
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        return loss.detach(), logits.detach()

    def frozen(run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
        return run(), lambda: None

    step = GraphedStep(gradients, lambda: None, model.parameters(), frozen)
    with pytest.raises(Unfaithful):
        step.record(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), model.parameters())
    assert not step.recordings and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_what_is_not_recorded_is_said() -> None:
    cuda, norm = torch.device("cuda"), nn.BatchNorm2d(3)
    assert why_not(cuda, [norm], parts=1, compiled=False) is None
    assert why_not(torch.device("cpu"), [norm], parts=1, compiled=False) == "the device is cpu"
    assert why_not(cuda, [norm], parts=2, compiled=False) == "a batch is cut into several parts"
    stranger = why_not(cuda, [norm, Counting()], parts=1, compiled=False)
    assert stranger is not None and "Counting is no layer of normbench's or torch's" in stranger


def test_the_key_is_outside_the_identity_and_refused_without_cuda(plan_of: Planner, refusal: Any) -> None:
    off, auto = plan_of(*TINY, "cuda_graph=false"), plan_of(*TINY)
    assert off.arms[0].setting == auto.arms[0].setting
    assert "cuda_graph=true needs a CUDA device, got device=cpu" in refusal("cuda_graph=true device=cpu")
    if not torch.cuda.is_available():
        plan = plan_of(*TINY, "cuda_graph=true")
        with pytest.raises(Refused, match="needs a CUDA device, got device=auto, which is cpu here"):
            preparing.check_device(plan.config(plan.sessions[0]))
    assert "cuda_graph must be true or false" in refusal("cuda_graph=maybe")


@pytest.mark.parametrize("extra", ["norm=mbn", "precision=fp16", "optim=adamw model.dropout=0.1"])
def test_steps_never_wait_for_the_device(plan_of: Planner, extra: str) -> None:
    class Waits(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    plan = plan_of(*TINY, *extra.split())
    ready = preparing.prepare(plan.config(plan.sessions[0]))
    training.start(ready, Seeds(0, 0))
    totals = Totals(ready.device)
    waits = Waits()
    batches = list(ready.data.train.batches(Seeds(0, 0), 1))
    with waits:
        for step, (x, y) in enumerate(batches):
            ready.schedule.apply(ready.optimizer, step)
            totals.add(*training.train_step(ready, x, y, len(y), step), y)
        assert waits.seen == 0
        totals.loss.item()
    assert waits.seen == 1
