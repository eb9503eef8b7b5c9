"""Formulas of the layers that measure each sample by itself or nothing at all, and of EvoNorm-B0."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import special

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

Options = Mapping[str, Any]
NOTHING: State = {}


def whiten(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """(x − mean) / sqrt(var + eps) over `axes`; where they hold one value, the value."""
    if math.prod(x.shape[axis] for axis in axes) == 1:
        return x
    mean: Array = x.mean(axes, keepdims=True)
    var: Array = x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


def grouped(x: Array, groups: int) -> Array:
    """(N, C, *) → (N, G, C/G, *)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def whiten_groups(x: Array, groups: int, eps: float) -> Array:
    g = grouped(x, groups)
    return whiten(g, tuple(range(2, g.ndim)), eps).reshape(x.shape)


def no_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    return x, NOTHING


def instance_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Ulyanov, Vedaldi and Lempitsky, arXiv 1607.08022."""
    return affine(whiten(x, over_map(x), options["eps"]), state), NOTHING


def layer_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Ba, Kiros and Hinton, arXiv 1607.06450, with weight and bias per channel."""
    return affine(whiten(x, over_sample(x), options["eps"]), state), NOTHING


def elementwise_layer_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Ba, Kiros and Hinton, arXiv 1607.06450."""
    y = whiten(x, over_sample(x), options["eps"])
    return (y * state["weight"] + state["bias"] if options["affine"] else y), NOTHING


def group_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Wu and He, arXiv 1803.08494."""
    return affine(whiten_groups(x, options["num_groups"], options["eps"]), state), NOTHING


def positional_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Li et al., arXiv 1907.04312."""
    return affine(whiten(x, (1,), options["eps"]), state), NOTHING


def rms_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Zhang and Sennrich, arXiv 1910.07467; without an affine Karras et al., arXiv 1710.10196."""
    axes = (1,) if options["over"] == "channels" else over_sample(x)
    return affine(x / np.sqrt((x**2).mean(axes, keepdims=True) + options["eps"]), state), NOTHING


def local_response_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Krizhevsky, Sutskever and Hinton, NeurIPS 2012, section 3.3, with alpha over size for alpha."""
    n, y = options["size"], np.empty_like(x)
    for i in range(x.shape[1]):
        near = x[:, max(0, i - n // 2) : i + (n - 1) // 2 + 1]
        energy = options["k"] + options["alpha"] / n * (near**2).sum(1)
        y[:, i] = x[:, i] / energy ** options["beta"]
    return y, NOTHING


def divisive_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Ren et al., arXiv 1611.04520, with fields that end where the map does."""

    def field_mean(z: Array, window: int) -> Array:
        mean = np.empty((z.shape[0], 1, *z.shape[2:]))
        for position in np.ndindex(z.shape[2:]):
            field = [slice(max(0, p - window // 2), p + window // 2 + 1) for p in position]
            part = z[(slice(None), slice(None), *field)]
            mean[(slice(None), 0, *position)] = part.mean(over_sample(part))
        return mean

    v = x - field_mean(x, options["summation_window"])
    if x.shape[1] == 1 and (options["summation_window"] == 1 or x[0].size == 1):
        return affine(x, state), NOTHING
    energy = field_mean(v**2, options["suppression_window"])
    return affine(v / np.sqrt(energy + state["smoother"] ** 2), state), NOTHING


def filter_response_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Singh and Krishnan, arXiv 1911.09737."""
    eps = options["eps"] + np.abs(state.get("more_eps", np.zeros(())))
    y = affine(x / np.sqrt((x**2).mean(over_map(x), keepdims=True) + eps), state)
    return (np.maximum(y, column(state["tau"], y)) if options["tlu"] else y), NOTHING


def evonorm_s0(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Liu et al., arXiv 2004.02967."""
    swish = x * special.expit(column(state["v1"], x) * x)
    g = grouped(x, options["num_groups"])
    if g[0, 0].size == 1:
        return affine(swish, state), NOTHING
    std = np.sqrt(g.var(tuple(range(2, g.ndim)), keepdims=True) + options["eps"])
    return affine((grouped(swish, options["num_groups"]) / std).reshape(x.shape), state), NOTHING


def evonorm_b0(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Liu et al., arXiv 2004.02967."""
    after: State = {}
    var = state["running_var"]
    if training:
        n = x.size // x.shape[1]
        var = x.var(over_batch(x))
        after = averaged(state, options, mean=x.mean(over_batch(x)), var=var * n / (n - 1))
    own = x.var(over_map(x), keepdims=True)
    of_sample = column(state["v1"], x) * x + np.sqrt(own + options["eps"])
    return affine(x / np.maximum(np.sqrt(column(var, x) + options["eps"]), of_sample), state), after


def global_response_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Woo et al., arXiv 2301.00808."""
    size = np.sqrt((x**2).sum(over_map(x), keepdims=True))
    return x + affine(x * size / (size.mean(1, keepdims=True) + options["eps"]), state), NOTHING


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda u: np.maximum(u, 0),
    "gelu": lambda u: u * special.ndtr(u),
    "silu": lambda u: u * special.expit(u),
    "identity": lambda u: u,
}


def proxy_norm(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Labatie et al., arXiv 2106.03743."""
    f, count = ACTIVATIONS[options["activation"]], options["num_quantiles"]
    normal = math.sqrt(2) * special.erfinv(2 * (np.arange(count) + 0.5) / count - 1)
    normal /= normal.std()
    proxy = state["proxy_mean"] + (1 + state["proxy_scale"]) * normal[:, None]  # (count, C)
    z = f(affine(proxy, state))
    y = f(affine(whiten_groups(x, options["num_groups"], options["eps"]), state))
    mean, var = column(z.mean(0), x), column(z.var(0), x)
    return (y - mean) / np.sqrt(var + options["proxy_eps"]), NOTHING


SQUASHINGS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "isru": lambda u: u / np.sqrt(1 + u**2),
    "erf": special.erf,
    "hardtanh": lambda u: np.clip(u, -1, 1),
}


def dyt(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Zhu et al., arXiv 2503.10622; Chen et al., arXiv 2512.10938."""
    u = state["slope"] * x + state.get("offset", np.zeros(()))
    return affine(SQUASHINGS[options["function"]](u), state), NOTHING


def dyisru(x: Array, state: State, options: Options, training: bool) -> tuple[Array, State]:
    """Stollenwerk, arXiv 2503.21708."""
    beta = state["slope"] ** -2
    return affine(math.sqrt(x.shape[1]) * x / np.sqrt(beta + x**2), state), NOTHING


FORMULAS = {
    "NoNorm": no_norm,
    "InstanceNorm": instance_norm,
    "LayerNorm": layer_norm,
    "ElementwiseLayerNorm": elementwise_layer_norm,
    "GroupNorm": group_norm,
    "PositionalNorm": positional_norm,
    "RMSNorm": rms_norm,
    "LocalResponseNorm": local_response_norm,
    "DivisiveNorm": divisive_norm,
    "FilterResponseNorm": filter_response_norm,
    "EvoNormS0": evonorm_s0,
    "EvoNormB0": evonorm_b0,
    "GlobalResponseNorm": global_response_norm,
    "ProxyNorm": proxy_norm,
    "DyT": dyt,
    "DyISRU": dyisru,
}
