"""A training step recorded once and replayed: on CUDA one launch in place of hundreds.

    graphed = GraphedStep(gradients, update, parameters)
    graphed.record(x, y)            once for each shape of a batch that will come
    loss, logits = graphed(x, y, seed)

What is recorded is a CUDA graph of zeroed gradients, forward, loss and backward. It reads and writes tensors
where they lay when it was recorded. A session starts by writing its state in place, so that one recording
serves every session of a process. The update follows as one fused operator: momentum and learning rate are
numbers that a schedule changes, which a graph would keep as they were.

The CUDA side (`capture`) follows torch's documented whole-network capture and is untested on CUDA; the
buffers around it are tested on the CPU with a stand-in.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Outputs = tuple[Tensor, Tensor]  # loss () and logits (N, classes)
Capture = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], object]]]
WARM_UP = 3  # torch asks for a few passes on a side stream before a capture
CLOSE = 1e-2  # relative: a replay may sum in another order, what it draws and measures is the same


class Unfaithful(RuntimeError):
    """A recording does something else than the step it was made from."""


@dataclass
class Recording:
    """One shape's buffers, and how to fill the outputs from the inputs."""

    x: Tensor
    y: Tensor
    outputs: Outputs
    grads: list[Tensor | None]
    replay: Callable[[], object]


def capture(run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
    """Record `run` as a CUDA graph, after a few real runs; its outputs' buffers and the replay.

    The default generator is registered with every graph by torch: a replay draws from the seed that stands
    when it begins. Untested on CUDA.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


class GraphedStep:
    """A training step from recordings, one per shape of a batch; a shape without one is run as it is.

    Args:
        gradients: x, y → loss and logits; leaves the gradients in the parameters, draws nothing on the host.
        update: the optimizer's step from those gradients.
        parameters: whose gradients they are.
        capture: records a callable; another than CUDA's in tests.
    """

    def __init__(
        self,
        gradients: Callable[[Tensor, Tensor], Outputs],
        update: Callable[[], None],
        parameters: Iterable[nn.Parameter],
        capture: Capture = capture,
    ) -> None:
        self.gradients, self.update, self.capture = gradients, update, capture
        self.parameters = list(parameters)
        self.recordings: dict[tuple[int, ...], Recording] = {}

    def record(self, x: Tensor, y: Tensor, state: Iterable[Tensor]) -> None:
        """Record this shape and hold a replay against the step itself; leaves `state` as it was.

        Raises: Unfaithful — the replay draws or counts something on the host; RuntimeError — no capture.
        """
        state = list(state)
        start = [tensor.detach().clone() for tensor in state]
        at_x, at_y = torch.empty_like(x), torch.empty_like(y)
        at_x.copy_(x)
        at_y.copy_(y)
        try:
            self.forget()
            with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # nothing on the CPU
                outputs, replay = self.capture(lambda: self.gradients(at_x, at_y))
            grads = [p.grad for p in self.parameters]
            made = Recording(at_x, at_y, outputs, grads, replay)
            runs: list[Callable[[], Outputs]]
            runs = [lambda: self.gradients(x, y), lambda: self.replayed(made, x, y)]
            for seed in (1, 2):
                seen = []
                for run in runs:
                    put_back(state, start)
                    self.forget()
                    torch.manual_seed(seed)
                    loss, logits = run()
                    seen.append([t.detach().clone() for t in (loss, logits, self.gradient(), *state)])
                if not all(map(close, *seen)):
                    raise Unfaithful("a replay gives other numbers than the step it was recorded from")
        finally:
            put_back(state, start)
            self.forget()
        self.recordings[tuple(x.shape)] = made

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> Outputs:
        """One update; loss and logits lie in buffers that the next step writes again."""
        made = self.recordings.get(tuple(x.shape))
        torch.manual_seed(seed)
        outputs = self.gradients(x, y) if made is None else self.replayed(made, x, y)
        self.update()
        return outputs

    def replayed(self, made: Recording, x: Tensor, y: Tensor) -> Outputs:
        """Fill a recording's inputs and replay it; the parameters hold its gradients then."""
        made.x.copy_(x, non_blocking=True)
        made.y.copy_(y, non_blocking=True)
        made.replay()
        for parameter, grad in zip(self.parameters, made.grads, strict=True):
            parameter.grad = grad
        return made.outputs

    def gradient(self) -> Tensor:
        """All gradients as one vector: alone, one that is zero but for rounding is never twice the same."""
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
                          for p in self.parameters])  # fmt: skip

    def forget(self) -> None:
        """Let go of the gradients, so that the next backward pass makes its own."""
        for parameter in self.parameters:
            parameter.grad = None


@torch.no_grad()
def put_back(state: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write the values into the state's tensors."""
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike up to a different order of sums, or both without finite numbers."""
    a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
    return bool((a - b).norm() <= CLOSE * max(a.norm(), b.norm()) + 1e-6)


def why_not(device: torch.device, layers: Iterable[nn.Module], *, parts: int, compiled: bool) -> str | None:
    """Why a step is better run as it is; None where it may be recorded.

    Args:
        layers: the norm layers; a stranger's may count or draw on the host, and its tensors may be replaced.
        parts: into how many parts the processes and micro batches cut a batch.
    """
    if device.type != "cuda":
        return f"the device is {device.type}"
    if compiled:
        return "compile=true makes another step"
    if parts > 1:
        return "a batch is cut into several parts"
    ours = ("normbench.", "torch.")
    for kind in map(type, layers):
        if not kind.__module__.startswith(ours):
            return f"{kind.__module__}.{kind.__qualname__} is no layer of normbench's or torch's"
    return None
