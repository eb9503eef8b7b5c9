"""Formulas of the layers that measure batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from normbench.formulas.common import Array, State, affine, averaged, column, over_batch


def batch_norm(x: Array, state: State, options: Mapping[str, Any], training: bool) -> tuple[Array, State]:
    """Ioffe and Szegedy, arXiv 1502.03167, algorithms 1 and 2."""
    measured, after = training or not options["track_running_stats"], {}
    if measured:
        mean, var, n = x.mean(over_batch(x)), x.var(over_batch(x)), x.size // x.shape[1]
        stored = var if options.get("stored_var") == "biased" else var * n / (n - 1)
        after = averaged(state, options, mean=mean, var=stored)
    else:
        mean, var = state["running_mean"], state["running_var"]
    return affine((x - column(mean, x)) / np.sqrt(column(var + options["eps"], x)), state), after


FORMULAS = {"BatchNorm": batch_norm, "FusedBatchNorm": batch_norm}
