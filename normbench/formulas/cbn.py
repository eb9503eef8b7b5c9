"""Formula of cross-iteration batch norm, for a layer that nothing feeds: earlier moments as they were."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from normbench.formulas.common import Array, State, affine, averaged, column, over_batch


def cross_iteration(
    x: Array, state: State, options: Mapping[str, Any], training: bool
) -> tuple[Array, State]:
    """Yao et al., arXiv 2002.05712: means and mean squares of the last `window` batches, averaged."""
    if not training:
        mean, var, after = state["running_mean"], state["running_var"], {}
    else:
        own_mean, own_var, n = x.mean(over_batch(x)), x.var(over_batch(x)), x.size // x.shape[1]
        seen, rows = int(state["num_batches_tracked"]), options["window"] - 1
        known = range(min(seen, rows)) if seen >= options["burn_in"] else ()
        means = np.stack([own_mean, *(state["past_mean"][row] for row in known)])
        squares = np.stack(
            [own_var + own_mean**2, *(state["past_var"][row] + state["past_mean"][row] ** 2 for row in known)]
        )
        mean = means.mean(0)
        var = squares.mean(0) - mean**2
        after = averaged(state, options, mean=own_mean, var=own_var * n / (n - 1))
        for name, value in (("past_mean", own_mean), ("past_var", own_var)):
            past = state[name].copy()
            if rows:
                past[seen % rows] = value
            after[name] = past
    return affine((x - column(mean, x)) / np.sqrt(column(var, x) + options["eps"]), state), after


FORMULAS = {"CrossIterationBatchNorm": cross_iteration}
