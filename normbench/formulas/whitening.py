"""Formulas of the layers that whiten a batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from normbench.formulas.common import Array, State, affine, averaged


def whitening_matrix(cov: Array, options: Mapping[str, Any]) -> Array:
    """W of one group, for its covariance with eps on the diagonal."""
    if options["method"] == "cholesky":  # Siarohin et al., arXiv 1806.00420
        inverse: Array = np.linalg.inv(np.linalg.cholesky(cov))
        return inverse
    if options["method"] == "zca":  # Huang et al., arXiv 1804.08450: D Λ^(-1/2) Dᵀ
        values, vectors = np.linalg.eigh(cov)
        symmetric: Array = vectors @ np.diag(values**-0.5) @ vectors.T
        return symmetric
    root: Array = np.eye(len(cov))  # Huang et al., arXiv 1904.03441
    for _ in range(options["iterations"]):
        root = (3 * root - np.linalg.matrix_power(root, 3) @ cov / np.trace(cov)) / 2
    root /= np.sqrt(np.trace(cov))
    return root


def decorrelated(x: Array, state: State, options: Mapping[str, Any], training: bool) -> tuple[Array, State]:
    """The centred channels of each group times its W."""
    values = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)  # (C, n)
    groups, size = state["running_cov"].shape[:2]
    n, y, after = values.shape[1], np.empty_like(values), {}
    mean, cov = state["running_mean"], state["running_cov"]
    blocks = [slice(g * size, (g + 1) * size) for g in range(groups)]
    if training:
        mean = values.mean(1)
        cov = np.stack([np.cov(values[block], bias=True).reshape(size, size) for block in blocks])
        after = averaged(state, options, mean=mean, cov=cov * n / (n - 1))
    for g, block in enumerate(blocks):
        whiten = whitening_matrix(cov[g] + options["eps"] * np.eye(size), options)
        y[block] = whiten @ (values[block] - mean[block, None])
    return affine(np.moveaxis(y.reshape(x.shape[1], x.shape[0], *x.shape[2:]), 0, 1), state), after


FORMULAS = {"DecorrelatedBatchNorm": decorrelated}
