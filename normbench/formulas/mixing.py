"""Formulas of mixtures of moments."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from normbench.formulas.common import (
    Array,
    State,
    affine,
    averaged,
    column,
    over_batch,
    over_map,
    over_sample,
)


def batch_instance(x: Array, state: State, options: Mapping[str, Any], training: bool) -> tuple[Array, State]:
    """Nam and Kim, arXiv 1805.07925, the gate clipped before every training step."""
    gate, eps = np.clip(state["gate"], 0, 1), options["eps"]
    n, after = x.size // x.shape[1], {"gate": gate} if training else {}
    if training or not options["track_running_stats"]:
        mean, var = x.mean(over_batch(x)), x.var(over_batch(x))
        stored = var if options["stored_var"] == "biased" else var * n / (n - 1)
        after |= averaged(state, options, mean=mean, var=stored)
    else:
        mean, var = state["running_mean"], state["running_var"]
        var = var * n / (n - 1) if options["eval_bessel"] else var
    batch = (x - column(mean, x)) / np.sqrt(column(var, x) + eps)
    instance = x
    if np.prod(x.shape[2:]) > 1:  # else a value by itself, which passes through
        axes = over_map(x)
        instance = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
    return affine(column(gate, x) * batch + column(1 - gate, x) * instance, state), after


def softmax(z: Array) -> Array:
    shares: Array = np.exp(z) / np.exp(z).sum()
    return shares


def sparsestmax(z: Array, radius: float) -> Array:
    """Shao et al., arXiv 1903.03793: the point of the simplex nearest to z, `radius` or more from its centre.

    On each face the candidate is the face's nearest point or, where that is too near to the centre, the one
    at the missing distance from the face's centre in the direction of z.
    """
    centre = np.full(len(z), 1 / len(z))
    candidates: list[Array] = []
    for face in itertools.product([False, True], repeat=len(z)):
        on = np.array(face)
        if not on.any():
            continue
        middle = on / on.sum()
        away = np.where(on, z - z[on].mean(), 0)
        missing = np.sqrt(max(radius**2 - ((middle - centre) ** 2).sum(), 0))
        length = np.linalg.norm(away)
        ways = [away] if length else [corner - middle for corner in np.eye(len(z))[on]]  # a tie: every way
        lengths = [np.linalg.norm(way) or 1 for way in ways]
        points = [middle + w / n * max(length, missing) for w, n in zip(ways, lengths, strict=True)]
        candidates += [p for p in points if p.min() > -1e-12 and np.linalg.norm(p - centre) > radius - 1e-9]
    distances = np.array([np.linalg.norm(p - z) for p in candidates])
    return candidates[int(np.flatnonzero(distances < distances.min() + 1e-9)[0])]


def mixture(
    x: Array, state: State, options: Mapping[str, Any], training: bool, radius: float | None
) -> tuple[Array, State]:
    """Σ share · mean and Σ share · var of instance, layer and batch; parts of single values are left out."""
    n, after = x.size // x.shape[1], {}
    if training:
        batch = x.mean(over_batch(x)), x.var(over_batch(x))
        after = averaged(state, options, mean=batch[0], var=batch[1] * n / (n - 1))
    else:
        batch = state["running_mean"], state["running_var"]
    parts = [(0, over_map(x)), (1, over_sample(x))]
    used = [k for k, axes in parts if np.prod([x.shape[axis] for axis in axes]) > 1] + [2]
    moments = {k: (x.mean(axes, keepdims=True), x.var(axes, keepdims=True)) for k, axes in parts}
    moments[2] = column(batch[0], x), column(batch[1], x)
    mixed = []
    for i, name in enumerate(("mean_weight", "var_weight")):
        logits = state[name][used]
        # the source's radius is that of 3 parts; of fewer parts their own simplex is crossed as fast
        full = np.sqrt(1 - 1 / len(used))
        shares = softmax(logits) if radius is None else sparsestmax(logits, radius * full)
        mixed.append(sum(share * moments[k][i] for share, k in zip(shares, used, strict=True)))
    return affine((x - mixed[0]) / np.sqrt(mixed[1] + options["eps"]), state), after


def switchable(x: Array, state: State, options: Mapping[str, Any], training: bool) -> tuple[Array, State]:
    """Luo et al., arXiv 1806.10779."""
    return mixture(x, state, options, training, None)


def sparse_switchable(
    x: Array, state: State, options: Mapping[str, Any], training: bool
) -> tuple[Array, State]:
    """Shao et al., arXiv 1903.03793, the radius growing linearly."""
    opened = min(1.0, float(state["num_batches_tracked"]) / options["radius_steps"])
    return mixture(x, state, options, training, opened)


FORMULAS = {
    "BatchInstanceNorm": batch_instance,
    "SwitchableNorm": switchable,
    "SparseSwitchableNorm": sparse_switchable,
}
