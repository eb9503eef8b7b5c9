"""Formula of the probability integral transform."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from scipy import stats

from normbench.formulas.common import Array, State, affine, averaged


def polygon(x: Array, quantiles: Array, levels: Array, h: float, side: Literal["left", "right"]) -> Array:
    """Level at x on the line between the quantiles beside it, drawn no steeper than over a width of h."""
    step = np.clip(np.searchsorted(quantiles, x, side) - 1, 0, len(levels) - 2)
    low, high = quantiles[step], quantiles[step + 1]
    with np.errstate(invalid="ignore"):  # a constant channel of zeros: its levels' end, not 0 / 0
        share = 0.5 + (x - (low + high) / 2) / np.maximum(high - low, h)
    share = np.where(high > low, np.clip(share, 0, 1), side == "right")
    return levels[step] + share * (levels[step + 1] - levels[step])


def transform(x: Array, state: State, options: Mapping[str, Any], training: bool) -> tuple[Array, State]:
    """Each channel through the polygon of its quantiles, the mean of what h below and h above x give."""
    k = options["num_quantiles"]
    levels = np.sin(np.linspace(0, np.pi / 2, k)) ** 2
    inset = np.sin(np.pi / 4 / (k - 1)) ** 2
    quantiles, after, y = state["running_quantiles"], {}, np.empty_like(x)
    if training:
        values = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        quantiles = np.quantile(values, levels, axis=1, method="linear").T
        after = averaged(state, options, quantiles=quantiles)
    for c, q in enumerate(quantiles):
        h = max(options["eps"] * (q[-1] - q[0]), 8 * np.finfo(q.dtype).eps * np.abs(q).max())
        sides = polygon(x[:, c] - h, q, levels, h, "left"), polygon(x[:, c] + h, q, levels, h, "right")
        level = (sides[0] + sides[1]) / 2
        if options["target"] == "uniform":
            y[:, c] = np.sqrt(12) * (level - 0.5)
        else:
            y[:, c] = stats.norm.ppf(inset + (1 - 2 * inset) * level)
    return affine(y, state), after


FORMULAS = {"ProbabilityIntegralTransform": transform}
