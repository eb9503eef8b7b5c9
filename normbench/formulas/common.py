"""What the formulas share: axes, the affine, the running averages."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = Mapping[str, Array]


def over_batch(x: Array) -> tuple[int, ...]:
    """Every axis but the channels'."""
    return (0, *range(2, x.ndim))


def over_sample(x: Array) -> tuple[int, ...]:
    """Channels and positions."""
    return tuple(range(1, x.ndim))


def over_map(x: Array) -> tuple[int, ...]:
    """Positions alone."""
    return tuple(range(2, x.ndim))


def column(values: Array, x: Array) -> Array:
    """(C,) values so that they broadcast over (N, C, *)."""
    return values.reshape(1, -1, *(1,) * (x.ndim - 2))


def affine(x: Array, state: State) -> Array:
    """x · weight + bias, where the layer has them."""
    return x * column(state["weight"], x) + column(state["bias"], x) if "weight" in state else x


def averaged(state: State, options: Mapping[str, Any], **new: Array) -> dict[str, Array]:
    """The buffers `running_<name>` after a batch measured `new`; none where none are kept."""
    if "num_batches_tracked" not in state:
        return {}
    batches = state["num_batches_tracked"] + 1
    share = 1 / batches if options["momentum"] is None else options["momentum"]
    after = {f"running_{k}": (1 - share) * state[f"running_{k}"] + share * v for k, v in new.items()}
    return {"num_batches_tracked": batches, **after}
