"""Puts the norm into a finished model's slots, and keeps the list of what stands there."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from normbench.models.units import MakeNorm, Slot
from normbench.values import nearest, one_of

CHOICES = ("all", "none", "conv", "fc", "first", "last")


def place_norms(
    model: nn.Module, norm: MakeNorm, norm_layers: str | Sequence[str], input_shape: tuple[int, ...]
) -> dict[str, nn.Module]:
    """Fill the chosen slots with what `norm(num_features)` returns, the others with nothing.

    Slots are filled in the order of the forward pass, in which the models register them.

    Args:
        norm: a callable; one with a parameter `spatial_shape` is also told the map's (H, W), () after a
            linear layer; one with a parameter `fed_by` the convolution or linear layer whose output reaches
            the slot as it is, None where something stands between.
        norm_layers: all, none, conv, fc, first, last or a list of slots' names.
        input_shape: (C, H, W) of one image.

    Returns: every module that `norm` returned, whatever its class, by name.
    Raises: ValueError — an unknown name, or fc in a model without such slots; TypeError — no module returned.
    """
    slots = {name: slot for name, slot in model.named_modules() if isinstance(slot, Slot)}
    chosen = choose(slots, norm_layers, type(model).__name__)
    asked = [name for name in ("spatial_shape", "fed_by") if takes(norm, name)]
    seen = seen_by_slots(model, input_shape) if asked else {}
    placed: dict[str, nn.Module] = {}
    makers: dict[str, Callable[[], nn.Module]] = {}
    for name, slot in slots.items():
        if name in chosen:
            make = functools.partial(norm, slot.num_features, **{key: seen[name][key] for key in asked})
            layer = make()
            if not isinstance(layer, nn.Module):
                raise TypeError(f"norm must return a torch.nn.Module, got {type(layer).__name__}")
            placed[name] = layer
            makers[name] = make
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, placed.get(name, nn.Identity()))
    model.norm_makers = makers  # type: ignore[assignment]  # how to make each anew
    return placed


def choose(slots: dict[str, Slot], norm_layers: str | Sequence[str], model: str) -> set[str]:
    """The names of the slots that `norm_layers` means."""
    names = list(slots)
    if not isinstance(norm_layers, str) and isinstance(norm_layers, Sequence):
        if len(set(norm_layers)) < len(norm_layers):
            raise ValueError(f"norm_layers names a layer twice: {', '.join(norm_layers)}")
        for name in norm_layers:
            if name not in slots:
                raise ValueError(f"norm_layers: {model} has no norm layer {name!r}{nearest(name, names)}")
        return set(norm_layers)
    kind = one_of("norm_layers", norm_layers, CHOICES)
    if kind == "fc" and not any(slot.kind == "fc" for slot in slots.values()):
        raise ValueError(f"norm_layers=fc: {model} has no norm after a linear layer; use all, conv or a list")
    wanted = {"all": names, "none": [], "first": names[:1], "last": names[-1:]}
    return set(wanted.get(kind, [name for name in names if slots[name].kind == kind]))


def takes(norm: MakeNorm, parameter: str) -> bool:
    """Whether the callable, through functools.partial too, has a parameter of that name."""
    try:
        return parameter in inspect.signature(norm).parameters
    except ValueError:  # a builtin without a signature
        return False


def sign_outputs(model: nn.Module) -> list[RemovableHandle]:
    """Have every convolution and linear layer write its name on what it hands on: `normbench_made_by`."""

    def sign(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        output.normbench_made_by = name  # type: ignore[attr-defined]

    return [
        layer.register_forward_hook(functools.partial(sign, name))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, _ConvNd))
    ]


def seen_by_slots(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Each slot's `spatial_shape` and `fed_by`, found by one forward pass of a copy without numbers."""

    twin = copy.deepcopy(model).to("meta").train()  # in training dropout hands on something else than it got
    sign_outputs(twin)
    with torch.no_grad():
        twin(torch.empty((1, *input_shape), device="meta"))
    return {
        name: {
            "spatial_shape": slot.spatial_shape,
            "fed_by": model.get_submodule(slot.fed_by) if slot.fed_by else None,
        }
        for name, slot in twin.named_modules()
        if isinstance(slot, Slot)
    }
