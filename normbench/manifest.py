"""What really ran: the operators of each norm layer, options without effect, parameters that never moved.

Everything here is observed, nothing declared. An option that a layer accepts and ignores, or a gate that is
made anew in every forward pass, shows up as what it is.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from normbench.building import make
from normbench.models.placing import sign_outputs, takes
from normbench.models.weights import GAINS
from normbench.norms.sync import alone

PROBE_SAMPLES = 8


@dataclass
class LayerObservation:
    """One norm layer as it was seen at work."""

    name: str
    layer: nn.Module
    shape: tuple[int, ...] = ()
    fed_by: str | None = None  # the convolution or linear layer whose output it got as it was
    probe: Tensor | None = None  # a few samples of its input
    ops: dict[str, Counter[str]] = field(default_factory=dict)  # phase → operator → calls

    @property
    def fused(self) -> bool:
        """Whether operators of ours ran."""
        return any(op.startswith("normbench.") for counts in self.ops.values() for op in counts)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        parameters = list(self.layer.parameters())
        return {
            "name": self.name,
            "class": f"{type(self.layer).__module__}.{type(self.layer).__qualname__}",
            "repr": self.layer.extra_repr() or repr(self.layer),
            "input_shape": list(self.shape),
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "fused": self.fused,
            "ops": {phase: dict(counts) for phase, counts in self.ops.items()},
        }


@dataclass
class Observation:
    """What one training step and one evaluation step showed, per norm layer."""

    layers: dict[str, LayerObservation]
    idle: list[str] = field(default_factory=list)
    kernels: dict[str, int] | None = None  # of the compiled step, where there is one


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that reach the dispatcher while a layer is marked as running."""

    supports_higher_order_operators = True  # a stranger's layer may call torch.cond and its like

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "forward"
        self.running: LayerObservation | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.running is not None:
            name = str(getattr(func, "overloadpacket", func))
            self.running.ops.setdefault(self.phase, Counter())[name] += 1
        return func(*args, **(kwargs or {}))


def observe(
    model: nn.Module,
    norm_layers: Mapping[str, nn.Module],
    train_step: Callable[[], object],
    eval_step: Callable[[], object],
) -> Observation:
    """Run one training step and one evaluation step of `model` and watch its norm layers."""
    seen = {name: LayerObservation(name, layer) for name, layer in norm_layers.items()}
    recorder = _Recorder()
    with _watched(model, seen, recorder), recorder:
        model.train()
        train_step()
        recorder.phase = "eval"
        model.eval()
        eval_step()
        model.train()
    return Observation(seen)


@contextmanager
def _watched(model: nn.Module, seen: Mapping[str, LayerObservation], recorder: _Recorder) -> Iterator[None]:
    """Hooks that mark a norm layer as running in its forward and in the backward nodes it made."""

    def enter(at: LayerObservation, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if recorder.phase == "forward":
            at.shape, at.fed_by = tuple(x.shape), getattr(x, "normbench_made_by", None)
            at.probe = x[:PROBE_SAMPLES].detach().clone()
        recorder.running = at

    def leave(at: LayerObservation, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        recorder.running = None
        for node in _nodes_between(output, args[0]):
            node.register_prehook(partial(enter_backward, at))
            node.register_hook(leave_backward)

    def enter_backward(at: LayerObservation, grads: Any) -> None:
        recorder.phase, recorder.running = "backward", at

    def leave_backward(grad_inputs: Any, grad_outputs: Any) -> None:
        recorder.running = None

    handles = sign_outputs(model)
    layers = {id(at.layer): at for at in seen.values()}
    for module in model.modules():
        if id(module) in layers:
            handles.append(module.register_forward_pre_hook(partial(enter, layers[id(module)])))
            handles.append(module.register_forward_hook(partial(leave, layers[id(module)])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nodes_between(output: Tensor, x: Tensor) -> list[Any]:
    """The autograd nodes that lead from a layer's output back to, and not beyond, its input."""
    nodes: list[Any] = []
    waiting, stop = [output.grad_fn], {x.grad_fn, None}
    while waiting:
        node = waiting.pop()
        if node in stop or type(node).__name__ == "AccumulateGrad":
            continue
        stop.add(node)
        nodes.append(node)
        waiting += [parent for parent, _ in node.next_functions]  # type: ignore[union-attr]
    return nodes


def idle_options(
    norm: Mapping[str, Any], layers: Mapping[str, LayerObservation], among: Collection[str] | None = None
) -> list[str]:
    """Options set to something else than their class's default that change nothing in any layer.

    Each is put back to its default in a copy of the layer. "Nothing" means equal bits in output, gradients
    and running statistics, in training and evaluation, by the same operators on the same parameters, at any
    count of batches that an option of whole numbers may mean. An option whose default is "auto" is not tried:
    that may have chosen the same. `among` limits which options are tried.
    """
    make_norm = make(dict(norm))
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make_norm.func).parameters.items()
        if parameter.default not in (inspect.Parameter.empty, "auto")
    }
    changed = [key for key, value in norm.items() if key in defaults and value != defaults[key]]
    tried = [key for key in changed if among is None or key in among]
    return [key for key in tried if not any(_acts(norm, key, defaults[key], at) for at in layers.values())]


def _acts(norm: Mapping[str, Any], option: str, default: Any, at: LayerObservation) -> bool:
    """Whether the layer behaves differently with `option` at its default."""
    if at.probe is None:
        return True
    probe = at.probe.float()
    with torch.random.fork_rng(devices=[]), alone():
        try:
            maker = make({**norm, option: default})
            sized = {"spatial_shape": at.shape[2:]} if takes(maker, "spatial_shape") else {}
            twin = maker(at.shape[1], **sized).to(probe.device)
            twin.load_state_dict(at.layer.state_dict())
            return any(
                differ(behaviour(at.layer, x, batches), behaviour(twin, x, batches))
                for batches in telling_counts(norm)
                for x in (probe, 8 * probe + 3)
            )
        except (ValueError, TypeError, RuntimeError):
            return True  # the default does not even work beside the other options, so the option matters


def telling_counts(norm: Mapping[str, Any]) -> list[int | None]:
    """Counts of batches at which a warm-up or ramp may show: around every whole number among the options."""
    numbers = {v for v in norm.values() if isinstance(v, int) and not isinstance(v, bool) and v > 1}
    return [None, *sorted({max(0, n + d) for n in numbers for d in (-1, 0, 1)})]


def behaviour(layer: nn.Module, x: Tensor, batches: int | None) -> tuple[dict[str, Tensor], list[Any]]:
    """The tensors and facts of training and evaluation steps by which two layers can be told apart."""
    layer = copy.deepcopy(layer)
    layer.zero_grad()
    seen = dict(layer.named_buffers()).get("num_batches_tracked")
    if seen is not None and batches is not None:
        seen.fill_(batches)
    torch.manual_seed(0)
    recorder = _Recorder()
    recorder.running = LayerObservation("", layer)
    x = x.clone().requires_grad_()
    layer.train()
    with recorder:
        y = layer(x)
        recorder.phase = "backward"
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    tensors = {"output": y.detach(), "dx": x.grad if x.grad is not None else torch.zeros(0)}
    tensors |= {f"d{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    for i, batch in enumerate((1.5 * x.detach(), x.detach().flip(0) - 1)):  # what earlier batches do
        tensors[f"output {i + 2}"] = layer(batch).detach()
    tensors |= {n: b.clone() for n, b in layer.named_buffers()}
    layer.eval()
    with torch.no_grad():
        tensors["eval"] = layer(x)
    return tensors, [recorder.running.ops, [n for n, p in layer.named_parameters() if p.requires_grad]]


def differ(a: tuple[dict[str, Tensor], list[Any]], b: tuple[dict[str, Tensor], list[Any]]) -> bool:
    return (
        a[1] != b[1]
        or a[0].keys() != b[0].keys()
        or any(not torch.equal(torch.nan_to_num(t), torch.nan_to_num(b[0][k])) for k, t in a[0].items())
    )


class Still(NamedTuple):
    """Names of trainable parameters that training left as they were."""

    suspicious: list[str]
    before_norm: list[str]  # biases and gains directly before a norm: zero gradient but for rounding


def never_moved(
    model: nn.Module, first: Mapping[str, Tensor], trained: Collection[int], observation: Observation
) -> Still:
    """Parameters whose bits are those of the start, and those that are not among the optimizer's.

    `trained` holds the ids of the optimizer's parameters: what a forward pass makes anew is never in it.
    """
    still = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad
        and (id(p) not in trained or name not in first or torch.equal(p.detach().cpu(), first[name]))
    ]
    before_norm = {f"{at.fed_by}.{name}" for at in observation.layers.values() for name in ("bias", *GAINS)}
    return Still([n for n in still if n not in before_norm], [n for n in still if n in before_norm])


def kernels_of(step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """What one compiled step launches, by the profiler: kernel or fused-graph name → calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return {event.key: event.count for event in profiler.key_averages() if event.device_type == wanted}
