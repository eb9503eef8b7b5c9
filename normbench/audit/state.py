"""Parameters, buffers and what else a layer keeps: whether it learns, is copied whole, forgets its graphs."""

import copy
import gc
import random
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normbench.audit.findings import Broken, Doubtful, require
from normbench.audit.subject import Subject, activations, after, back, call, distance, outcome
from normbench.building import MODULE_ATTRIBUTES

STEPS, SGD_STEPS = 200, 12


def building(subject: Subject) -> str:
    """Building draws no random numbers, and a misspelt option is an error."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    layer = subject.make(subject.num_features, **subject.told(subject.maps))
    drew = [
        name
        for name, same in (
            ("torch", torch.equal(before[0], torch.get_rng_state())),
            ("NumPy", repr(before[1]) == repr(np.random.get_state())),
            ("Python", before[2] == random.getstate()),
        )
        if not same
    ]
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])
    ends = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layer.double().train()(activations(subject.maps))
            ends.append(torch.get_rng_state())
    require(not torch.equal(*ends), "forward sets torch's generator to a state of its own")
    require(not swallows(subject), "a misspelt option is taken without a word")
    if drew:
        raise Doubtful(f"building draws random numbers from the generator of {' and '.join(drew)}")
    return "draws no random numbers; a misspelt option is refused"


def swallows(subject: Subject) -> bool:
    """Whether the constructor takes an option that nobody has."""
    try:
        subject.build(changes={"no_such_option": 1})
    except Exception:  # TypeError as a rule; any refusal will do
        return False
    return True


def parameters(subject: Subject) -> str:
    """Every parameter exists before the first forward, gets gradient and moves under SGD."""
    layer = subject.build()
    known = dict(layer.named_parameters())
    trained = {name: p for name, p in known.items() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in known.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2) if trained else None
    target = activations(subject.maps, seed=20)
    without = set(trained)
    for seed in range(1, SGD_STEPS + 1):
        layer.zero_grad()
        x = activations(subject.maps, seed=seed).requires_grad_()
        y = call(layer, x, training=True)
        ours = {id(p) for p in known.values()} | {id(x)}
        for name, p in layer.named_parameters():
            require(name in known, f"{name} is made in forward: an optimizer built before does not hold it")
            require(p is known[name], f"{name} is replaced in forward: the optimizer holds the old one")
        strangers = [leaf for leaf in leaves(y) if id(leaf) not in ours]
        require(not strangers, "a parameter is made anew in forward: no optimizer ever holds it")
        back((y.square() + y * target).sum(), torch.ones((), dtype=y.dtype))
        without -= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}
        if optimizer:
            optimizer.step()
    require(not without, f"no gradient reaches {', '.join(sorted(without))}")
    still = [name for name, p in trained.items() if torch.equal(p.detach(), start[name])]
    require(not still, f"{', '.join(still)} never moved in {SGD_STEPS} steps of SGD")
    overwritten = [name for name in trained if writes_over(subject, name)]
    require(
        not overwritten, f"forward writes over {', '.join(overwritten)}: what an optimizer does to it is lost"
    )
    frozen = sorted(known.keys() - trained.keys())
    moved = [name for name in frozen if not torch.equal(known[name].detach(), start[name])]
    require(not moved, f"{', '.join(moved)} moved though frozen")
    if not known:
        return "none"
    says = [f"{name} {tuple(p.shape)}" for name, p in trained.items()]
    said = f"{', '.join(says)} get gradient and move" if says else "none trained"
    return said + (f"; {', '.join(frozen)} frozen" if frozen else "")


def writes_over(subject: Subject, name: str) -> bool:
    """Whether a forward gives a parameter another value than the one that was put there."""
    for by in (0.0, 0.1):
        layer = subject.build()
        with torch.no_grad():
            put = dict(layer.named_parameters())[name].mul_(1 - by).clone()
        call(layer, activations(subject.maps), training=True)
        if not torch.equal(dict(layer.named_parameters())[name].detach(), put):
            return True
    return False


def leaves(y: Tensor) -> list[Tensor]:
    """The tensors at which the graph of y ends."""
    found: dict[int, Tensor] = {}
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [parent for parent, _ in node.next_functions]
    return list(found.values())


def graphs(subject: Subject) -> str:
    """Nothing of one step's graph is alive in the next; two forwards may come before one backward."""
    shape = subject.shape(4, 0, 3, 3)
    layer = subject.build(shape=shape)
    alive: list[int] = []
    tensors: list[int] = []
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        kept = Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for seed in range(STEPS):
            x = activations(shape, seed=seed % 10).requires_grad_()
            try:
                back(call(layer, x, training=True))
            except RuntimeError as error:
                if "second time" in str(error):
                    said = f"step {seed + 1} goes back through step {seed}'s graph: running state keeps it"
                    raise Broken(said) from error
                raise
            del x
            if seed in (9, STEPS - 1):
                alive.append(len(saved))
                tensors.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    if alive[1] > alive[0]:
        gc.collect()  # what only waits for the collector is no leak
    grows = len(saved) - alive[0]
    require(
        grows <= 0, f"{grows} tensors of old graphs live after {STEPS} steps: running state keeps its graph"
    )
    for name, value in [*layer.named_buffers(), *plain_tensors(layer)]:
        require(value.grad_fn is None, f"{name} carries a graph")
    more = tensors[1] - tensors[0]
    require(more < STEPS // 2, f"{more} more tensors are held after {STEPS} steps than after 10")
    twice = subject.build()
    x = activations(subject.maps).requires_grad_()
    try:
        back(call(twice, x, training=True) + call(twice, x.flip(0), training=True))
    except RuntimeError as error:
        raise Broken(f"two forwards before one backward: {str(error).splitlines()[0]}") from error
    return f"no graph outlives its step over {STEPS} steps; two forwards before one backward work"


class Saved:
    """A tensor that a graph keeps for its backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def plain_tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors in plain attributes of the layer and its parts."""
    return [
        (f"{path}.{key}" if path else key, value)
        for path, part in layer.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor)
    ]


def copies(subject: Subject) -> str:
    """A deep copy and a new layer that loads the state continue bit for bit."""
    layer = after(subject.build(), 3, subject.maps)
    attributes = plain_attributes(subject.build())
    changed = sorted(k for k, v in plain_attributes(layer).items() if not same(v, attributes.get(k)))
    fresh = subject.build(fresh=True)
    try:
        fresh.load_state_dict(layer.state_dict())
    except (RuntimeError, KeyError) as error:
        raise Broken(f"a new layer does not load the state: {str(error).splitlines()[-1].strip()}") from error
    x = activations(subject.maps, seed=30)
    for what, twin in (("a deep copy", copy.deepcopy(layer)), ("a new layer with the loaded state", fresh)):
        for training in (False, True):
            if not torch.equal(outcome(twin, x, training), outcome(layer, x, training)):
                kept = f" (kept outside parameters and buffers: {', '.join(changed)})" if changed else ""
                raise Broken(f"{what} differs{kept}")
    if changed:
        raise Doubtful(f"training changes plain attributes, which no checkpoint holds: {', '.join(changed)}")
    state = ", ".join(f"{k} {tuple(b.shape)}" for k, b in layer.named_buffers()) or "none"
    torchs = from_torch(subject)
    return f"deep copy and loaded state continue bit for bit; buffers: {state}{torchs}"


def plain_attributes(layer: nn.Module) -> dict[str, Any]:
    """What a layer and its parts keep beside parameters, buffers and modules."""
    return {
        f"{path}.{key}" if path else key: value
        for path, part in layer.named_modules()
        for key, value in vars(part).items()
        if key not in MODULE_ATTRIBUTES and not isinstance(value, types.FunctionType)
    }


def same(a: Any, b: Any) -> bool:
    """Equality that also answers for tensors and what has none."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    try:
        return bool(a == b) or repr(a) == repr(b)
    except (TypeError, ValueError, RuntimeError):
        return True


def from_torch(subject: Subject) -> str:
    """Whether it takes the state of nn.BatchNorm2d, where its own has the same names."""
    layer, torchs = subject.build(), nn.BatchNorm2d(subject.num_features).double()
    if layer.state_dict().keys() != torchs.state_dict().keys():
        return ""
    torchs(activations(subject.maps))
    layer.load_state_dict(torchs.state_dict())
    x = activations(subject.maps, seed=30)
    alike = distance(call(layer, x, training=False), torchs.eval()(x)) <= subject.tolerance
    return "; takes nn.BatchNorm2d's state" + (" and then evaluates as it" if alike else "")
