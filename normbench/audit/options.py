"""Which options act: each is given another value, and the layer's behaviour compared bit for bit."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normbench.audit.findings import Broken
from normbench.audit.subject import Subject, activations
from normbench.manifest import behaviour, differ, telling_counts

WIDE = 64
ENOUGH = 4  # other values without effect after which an option counts as idle


def options(subject: Subject) -> str:
    """Every option with another value changes outputs, gradients, state or the operators that run."""
    found: dict[str, list[str]] = {"acts": [], "acts with": [], "idle": [], "refused": [], "single": []}
    for key, value in subject.options.items():
        verdict, beside = tried(subject, key, value)
        found[verdict].append(f"{key} with {beside}" if beside else key)
    acts = found["acts"] + found["acts with"]
    wide = [key for key in found["acts"] if not acts_when_wide(subject, key)]
    if wide:
        raise Broken(
            f"{', '.join(wide)}: acts on {subject.num_features} channels, not on {WIDE}, channels last"
        )
    if found["idle"]:
        rest = f" ({', '.join(acts)} act)" if acts else ""
        raise Broken(f"{', '.join(found['idle'])}: no other value changes anything{rest}")
    said = [f"{', '.join(acts)} act"] if acts else []
    if found["refused"]:
        said.append(f"{', '.join(found['refused'])}: other values are refused beside the others given")
    if found["single"]:
        said.append(f"{', '.join(found['single'])}: no second value known")
    return "; ".join(said) or "none"


def tried(subject: Subject, key: str, value: Any) -> tuple[str, str]:
    """acts, acts with another option, idle, refused (no other value builds) or single (none is known)."""
    alternatives = list(others(subject, key, value))
    built = 0
    for other in alternatives:
        works, apart = compared(subject, key, other, {})
        if apart:
            return "acts", ""
        built += works
        if built == ENOUGH:
            break
    if not built:
        return ("refused" if alternatives else "single"), ""
    for switch, state in subject.options.items():
        for beside in switches(subject, switch, state) if switch != key else ():
            if any(compared(subject, key, other, {switch: beside})[1] for other in alternatives[:ENOUGH]):
                return "acts with", f"{switch}={'null' if beside is None else str(beside).lower()}"
    guessed = (
        value is None
        and key in subject.signature
        and subject.signature[key].annotation is inspect.Parameter.empty
    )
    return ("single" if guessed else "idle"), ""


def acts_when_wide(subject: Subject, key: str) -> bool:
    """Whether the option also acts where a fast path would run: more channels, channels last."""
    wide = Subject(subject.values, WIDE)
    x = activations((8, WIDE, 6, 6), torch.float32).contiguous(memory_format=torch.channels_last)
    built = 0
    for other in others(subject, key, subject.options[key]):
        works, apart = compared(wide, key, other, {}, x)
        if apart:
            return True
        built += works
    return not built


def compared(
    subject: Subject, key: str, other: Any, beside: dict[str, Any], x: Tensor | None = None
) -> tuple[bool, bool]:
    """Whether the layer builds with the other value, and whether that tells in any way."""
    try:
        pairs = [
            [
                subject.build(torch.float32, None if x is None else tuple(x.shape), fresh=fresh, changes=c)
                for c in (beside, {**beside, key: other})
            ]
            for fresh in (False, True)
        ]
    except Exception:  # whatever a constructor says to a value that is wrong for it
        return False, False
    return True, any(tells_apart(subject, layer, twin, other, x) for layer, twin in pairs)


def tells_apart(
    subject: Subject, layer: nn.Module, twin: nn.Module, other: Any, x: Tensor | None = None
) -> bool:
    """Whether two layers hold other things, or behave differently on a probe at some count of batches."""
    if facts(layer) != facts(twin):
        return True
    x = activations(subject.maps, torch.float32) if x is None else x
    for batches in telling_counts({**subject.options, "other": other}):
        for probe in (x, 0.01 * x, 8 * x + 3):
            try:
                if differ(behaviour(layer, probe, batches), behaviour(twin, probe, batches)):
                    return True
            except Exception:  # whatever a stranger's layer raises: one of them does not even work there
                return True
    return False


def facts(layer: nn.Module) -> list[tuple[str, torch.Size, bool]]:
    """Names, shapes and trainability of what a layer holds."""
    return [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()] + [
        (name, b.shape, False) for name, b in layer.named_buffers()
    ]


def others(subject: Subject, key: str, value: Any) -> Iterator[Any]:
    """Values to try instead, nearest meaning first."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        tried_first = (2, value + 1, value // 2, 4, 2 * value, 3 * value, 1, 0)
        yield from dict.fromkeys(v for v in tried_first if v != value)
    elif isinstance(value, float):
        yield from (v for v in (value / 2, value * 3 + 0.01, value + 1) if v != value)
    elif value is None:
        yield from (2, 3, 0.5, 1.5, True)
    elif isinstance(value, str):
        yield from (name for name in allowed(subject, key) if name != value)


def switches(subject: Subject, key: str, value: Any) -> Iterator[Any]:
    """Values that may switch another option on: the other flag, another name, null."""
    if isinstance(value, (bool, str)):
        yield from others(subject, key, value)
    elif value is not None and key in subject.signature and "None" in str(subject.signature[key].annotation):
        yield None


def allowed(subject: Subject, key: str) -> list[str]:
    """The names that an option may have: from what it says to a wrong one, else from its docstring."""
    try:
        subject.build(torch.float32, changes={key: "no such value"})
    except Exception as error:
        listed = re.search(r"one of (.*), got", str(error))
        if listed:
            return re.split(r", | or ", listed[1])
    line = re.search(rf"^\s*{key}: (.*)$", subject.layer_class.__doc__ or "", re.M)
    return re.findall(r"\b[a-z_]+\b", line[1]) if line else []
