"""Each layer's mathematics in NumPy, written from its source and not from its code: what layers are held to.

A formula is called as `formula(x, state, options, training)`: an (N, C, *) array, the layer's parameters and
buffers before the call by name, its constructor's options by name, and the mode. It answers the output and
the buffers that the call changes. A layer from elsewhere declares one as a static method `formula`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from normbench.formulas import batch, cbn, mixing, pit, sample, sync, whitening
from normbench.formulas.common import Array, State

Formula = Callable[[Array, State, Mapping[str, Any], bool], tuple[Array, State]]

FORMULAS: dict[str, Formula] = {
    **batch.FORMULAS,
    **sample.FORMULAS,
    **sync.FORMULAS,
    **cbn.FORMULAS,
    **mixing.FORMULAS,
    **whitening.FORMULAS,
    **pit.FORMULAS,
}


def formula_of(layer: nn.Module) -> Formula | None:
    """The formula that a layer's class declares, or that stands here for a class of ours."""
    declared: Formula | None = getattr(layer, "formula", None)
    ours = type(layer).__module__.startswith("normbench.")
    return declared or (FORMULAS.get(type(layer).__name__) if ours else None)


def state_of(layer: nn.Module) -> dict[str, Array]:
    """Parameters and buffers as float64 copies."""
    return {name: t.detach().double().cpu().numpy().copy() for name, t in layer.state_dict().items()}


def options_of(layer: nn.Module) -> dict[str, Any]:
    """The constructor's options as the layer keeps them."""
    names = list(inspect.signature(type(layer)).parameters)[1:]
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}
