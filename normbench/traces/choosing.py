"""Which layers and channels a trace looks at; a name that the model has not is refused in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from normbench.building import norm_layers_of
from normbench.values import Refused, nearest

PLACES = ("first", "middle", "last")
HEAD_INPUT = "head_input"  # what the last linear layer gets
CHANNELS_SHOWN = 4


def chosen(key: str, wanted: str | Sequence[str], places: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that `all`, places in a list, or names mean; each once, in the order of `known`.

    Args:
        places: the list that first, middle and last point into.
        known: every name that may be given.
    Raises: Refused — a name that is not known.
    """
    if wanted in ("all", ["all"]):
        return list(places)
    names: list[str] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name in PLACES:
            names += [places[at] for at in ((0, (len(places) - 1) // 2, -1)[PLACES.index(name)],) if places]
        elif name in known:
            names.append(name)
        else:
            hint = nearest(name, [*PLACES, "all", *known]) or f"; there are {', '.join(places) or 'none'}"
            raise Refused(f"{key}: the model has no {name!r}{hint}")
    order = {name: i for i, name in enumerate(known)}
    return sorted(dict.fromkeys(names), key=lambda name: order[name])


def norm_names(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
    """The norm layers that `traces.layers` means, in the order of the forward pass; none where none stand."""
    names = list(norm_layers_of(model))
    return chosen("traces.layers", options["layers"], names, names)


def feature_names(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
    """The modules whose output `traces.features` means, and `head_input`.

    first, middle and last are units: the modules that hold convolutions or linear layers, with the norm and
    the activation that follow. So arms are compared after the activation, whether a norm's operator holds
    it or not.
    """
    modules = [name for name, _ in model.named_modules() if name]
    return chosen("traces.features", options["features"], units(model), [*modules, HEAD_INPUT])


def units(model: nn.Module) -> list[str]:
    """The outermost modules that hold a convolution or linear layer directly; those layers where none do."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _ConvNd))]
    holders = list(dict.fromkeys(name.rpartition(".")[0] for name in layers))
    outer = [name for name in holders if name and not any(inside(name, other) for other in holders)]
    return outer or layers


def inside(name: str, other: str) -> bool:
    """Whether a module's name lies below another's; all lie below the root, which does not count."""
    return bool(other) and name.startswith(f"{other}.")


def head_of(model: nn.Module) -> nn.Module | None:
    """The last linear layer, if the model has one."""
    return next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)


def channels_of(wanted: str | int | Sequence[int], count: int, layer: str) -> list[int]:
    """The channels, from 0, that `traces.channels` means in a layer of `count`.

    A number spreads so many evenly, first and last included; -1 in a list is the last.

    Raises: Refused — a channel that the layer has not.
    """
    if wanted == "all":
        return list(range(count))
    if isinstance(wanted, int):
        many = min(wanted, count)
        return [count - 1] if many == 1 else [i * (count - 1) // (many - 1) for i in range(many)]
    for channel in map(int, wanted):
        if not -count <= channel < count:
            cure = "use -1 for the last of any layer, or choose traces.layers"
            raise Refused(f"traces.channels: {layer} has channels 0 to {count - 1}, got {channel}; {cure}")
    return sorted({int(channel) % count for channel in wanted})


def width_of(model: nn.Module, name: str) -> int:
    """How many channels a norm layer was made for."""
    makers: dict[str, Any] = model.norm_makers  # type: ignore[assignment]
    return int(makers[name].args[0])


def check(model: nn.Module, trace: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse what the model has not."""
    if "norms" in trace:
        for name in norm_names(model, options):
            channels_of(options["channels"], width_of(model, name), name)
    if "features" in trace:
        feature_names(model, options)
        if HEAD_INPUT in options["features"] and head_of(model) is None:
            raise Refused(f"traces.features={HEAD_INPUT}: the model has no linear layer")
