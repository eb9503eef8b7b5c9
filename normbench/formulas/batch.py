"""Formulas of the layers that measure batches."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from normbench.formulas.common import Array, State, affine, averaged, column, over_batch

Options = Mapping[str, Any]
Answer = tuple[Array, State]
Moments = tuple[Array, Array]


def moments(x: Array) -> Moments:
    """Mean and ÷n variance of each channel."""
    return x.mean(over_batch(x)), x.var(over_batch(x))


def bessel(x: Array) -> float:
    """n / (n − 1), n the values of one channel."""
    n: int = x.size // x.shape[1]
    return n / (n - 1)


def standardized(x: Array, mean: Array, var: Array, options: Options) -> Array:
    return (x - column(mean, x)) / np.sqrt(column(var + options["eps"], x))


def running(state: State) -> Moments:
    return state["running_mean"], state["running_var"]


def batch_norm(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Ioffe and Szegedy, arXiv 1502.03167, algorithms 1 and 2; eval_bessel as one study evaluated."""
    if training or not options["track_running_stats"]:
        return measured_by(x, x, state, options)
    mean, var = running(state)
    var = var * bessel(x) if options.get("eval_bessel") else var
    return affine(standardized(x, mean, var, options), state), {}


def measured_by(x: Array, sample: Array, state: State, options: Options) -> Answer:
    """x by the moments of `sample`, which enter the running ones."""
    mean, var = moments(sample)
    stored = var if options.get("stored_var") == "biased" else var * bessel(sample)
    return affine(standardized(x, mean, var, options), state), averaged(state, options, mean=mean, var=stored)


def mbn(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Modified-Batch-Normalization, `MBatchNorm.py`: batch norm by the moments of a part of x."""
    if not training and options["track_running_stats"]:
        return batch_norm(x, state, options, training)
    strided = {"batch": [0], "rows": [2]}.get(options["sample"], list(range(2, x.ndim)))
    grid = x[tuple(slice(None, None, options["stride"] if i in strided else 1) for i in range(x.ndim))]
    if options["sample"] != "random" or grid.shape == x.shape:
        return measured_by(x, grid, state, options)
    values, wanted = x.reshape(*x.shape[:2], -1), int(np.prod(grid.shape[2:]))
    drawn = torch.randperm(values.shape[2])[:wanted].numpy()  # as the layer draws: seed alike before both
    return measured_by(x, values[:, :, drawn], state, options)


def ghost(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Hoffer, Hubara and Soudry, arXiv 1705.08741: parts of the batch, each by its own moments."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    parts = np.array_split(x, max(1, len(x) // options["ghost_batch_size"]))
    mean = np.mean([moments(part)[0] for part in parts], axis=0)
    var = np.mean([moments(part)[1] * bessel(part) for part in parts], axis=0)
    y = np.concatenate([standardized(part, *moments(part), options) for part in parts])
    return affine(y, state), averaged(state, options, mean=mean, var=var)


def without_sync(x: Array, state: State, options: Options, training: bool) -> Answer:
    """BNWoS of enhuiz's study: one chunk to a device, the running moments of one of them."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    chunks = np.array_split(x, options["num_devices"])
    y = np.concatenate([standardized(chunk, *moments(chunk), options) for chunk in chunks])
    seen = chunks[options["stats_device"]]
    mean, var = moments(seen)
    return affine(y, state), averaged(state, options, mean=mean, var=var * bessel(seen))


def running_only(x: Array, state: State, options: Options, training: bool) -> Answer:
    """BNRS of enhuiz's study: the running moments in training too, from before this batch or after it."""
    after: State = {}
    if training:
        mean, var = moments(x)
        after = averaged(state, options, mean=mean, var=var * bessel(x))
    used = {**state, **after} if options["stats_timing"] == "post" else state
    return affine(standardized(x, *running(used), options), state), after


def renorm(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Ioffe, arXiv 1702.03275, algorithm 1; limits that open linearly as in its section 4."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    mean, var = moments(x)
    after = averaged(state, options, mean=mean, var=var * bessel(x))
    mu, sigma2 = running({**state, **after} if options["stats_timing"] == "post" else state)
    sigma = np.sqrt(sigma2 + options["eps"])
    t, warm = state["num_batches_tracked"], options["warmup_steps"]

    def limit(name: str, shut: float) -> float:
        end, most = options[f"{name}_step"], options[name]
        share = float(np.clip((t - warm) / (end - warm), 0, 1) if end else t >= warm)
        if most is None:
            return np.inf if share else shut
        return float(shut + share * (most - shut))

    r_max, d_max = limit("r_max", 1), limit("d_max", 0)
    r = np.clip(np.sqrt(var + options["eps"]) / sigma, 1 / r_max, r_max)
    d = np.clip((mean - mu) / sigma, -d_max, d_max)
    y = standardized(x, mean, var, options) * column(r, x) + column(d, x)
    return affine(y, state), after


def mean_only(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Salimans and Kingma, arXiv 1602.07868, section 4."""
    mean, var = moments(x) if training else running(state)
    after = averaged(state, options, mean=mean, var=var * bessel(x)) if training else {}
    return affine(x - column(mean, x), state), after


def variance_only(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Batch norm without its centring; the variance is about the mean all the same."""
    mean, var = moments(x) if training else running(state)
    after = averaged(state, options, mean=mean, var=var * bessel(x)) if training else {}
    return affine(x / np.sqrt(column(var + options["eps"], x)), state), after


def l1(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Hoffer et al., arXiv 1803.01814, section 4: C_L1 · mean|x − mean| with C_L1 = sqrt(π/2)."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    mean = x.mean(over_batch(x))
    s2 = np.pi / 2 * np.abs(x - column(mean, x)).mean(over_batch(x)) ** 2
    return affine(standardized(x, mean, s2, options), state), averaged(state, options, mean=mean, var=s2)


def range_norm(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Banner et al., arXiv 1805.11046, section 3: C(n) · range(x − mean) with C(n) = 1 / sqrt(2 ln n)."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    mean = x.mean(over_batch(x))
    values = np.moveaxis(x - column(mean, x), 1, 0).reshape(x.shape[1], -1)
    chunks = np.array_split(values, options["num_chunks"], axis=1)
    s = np.mean([np.ptp(chunk, axis=1) / np.sqrt(2 * np.log(chunk.shape[1])) for chunk in chunks], axis=0)
    after = averaged(state, options, mean=mean, var=s**2)
    return affine(standardized(x, mean, s**2, options), state), after


def extended(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Luo et al., arXiv 2003.05569: the mean over (N, H, W), the standard deviation over (N, C, H, W)."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    mean, var = x.mean(over_batch(x)), np.full(x.shape[1], x.var())
    after = averaged(state, options, mean=mean, var=var * x.size / (x.size - 1))
    return affine(standardized(x, mean, var, options), state), after


def moving_average(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Yan et al., arXiv 2001.06838: the forward pass; the backward changes buffer_gz alone."""
    eps, size, t = options["eps"], options["buffer_size"], int(state["num_batches_tracked"])
    if not training:
        return affine(x / np.sqrt(column(state["running_var"] + eps, x)), state), {}
    memory = state["buffer_x2"].copy()
    memory[t % size] = (x**2).mean(over_batch(x))
    warm = max(size, options["warmup_steps"])
    a = memory[t % size] if t < warm else memory.mean(0)
    r = np.sqrt((a + eps) / (state["running_var"] + eps))
    r_max = options["r_max"] or np.inf
    r = np.clip(r, 1 / r_max, r_max) if t >= max(warm, options["r_warmup_steps"]) else np.ones_like(r)
    after = averaged(state, options, var=a)
    return affine(x * column(r / np.sqrt(a + eps), x), state), {**after, "buffer_x2": memory}


def memorized(x: Array, state: State, options: Options, training: bool) -> Answer:
    """Batch norm, evaluated by the last batches' moments pooled; after Guo et al., arXiv 2010.04947."""
    if not training:
        return affine(standardized(x, *running(state), options), state), {}
    t, mean, var = int(state["num_batches_tracked"]), *moments(x)
    means, variances = state["memory_mean"].copy(), state["memory_var"].copy()
    means[t % options["window"]], variances[t % options["window"]] = mean, var
    seen = slice(0, min(t + 1, options["window"]))
    pooled = means[seen].mean(0)
    spread = (variances[seen] + means[seen] ** 2).mean(0) - pooled**2
    after = {"memory_mean": means, "memory_var": variances, "num_batches_tracked": np.array(t + 1)}
    return affine(standardized(x, mean, var, options), state), {
        **after, "running_mean": pooled, "running_var": spread}  # fmt: skip


FORMULAS: dict[str, Callable[[Array, State, Options, bool], Answer]] = {
    "BatchNorm": batch_norm,
    "FusedBatchNorm": batch_norm,
    "MBN": mbn,
    "GhostBatchNorm": ghost,
    "BNWoS": without_sync,
    "BNRS": running_only,
    "BatchRenorm": renorm,
    "MeanOnlyBatchNorm": mean_only,
    "VarianceOnlyBatchNorm": variance_only,
    "L1BatchNorm": l1,
    "RangeBatchNorm": range_norm,
    "ExtendedBatchNorm": extended,
    "MABN": moving_average,
    "MemorizedBatchNorm": memorized,
}
