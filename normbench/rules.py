"""The range of every key: what its value may be, beyond the kind that `conf/` shows."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from normbench.values import (
    above_zero,
    below_one,
    flag,
    fraction,
    int_from,
    nearest,
    number_from,
    one_of,
    positive_int,
)

Rule = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Interval:
    """How often to evaluate: `count` epochs or steps."""

    count: int
    unit: str


def interval(key: str, value: Any, unit: str = "epochs") -> Interval:
    """`2epochs`, `500steps`, or a bare number of `unit`s."""
    match = re.fullmatch(r"(\d+) *(epoch|step)?s?", str(value))
    if not match or int(match[1]) < 1:
        raise ValueError(
            f"{key} must be a count ≥ 1 of epochs or steps, like 2epochs or 500steps, got {value!r}"
        )
    return Interval(int(match[1]), f"{match[2]}s" if match[2] else unit)


@dataclass(frozen=True)
class Every:
    """How often to write a checkpoint: `count` epochs or minutes."""

    count: int
    unit: str


def every(key: str, value: Any) -> Every:
    """`2epochs` or `10minutes`."""
    match = re.fullmatch(r"(\d+) *(epoch|minute|min)s?", str(value))
    if not match or int(match[1]) < 1:
        raise ValueError(
            f"{key} must be a count ≥ 1 of epochs or minutes, like 1epoch or 10minutes, got {value!r}"
        )
    return Every(int(match[1]), "epochs" if match[2] == "epoch" else "minutes")


from_zero = partial(int_from, low=0)
nonnegative = partial(number_from, low=0)


def optional(rule: Rule) -> Rule:
    """`rule`, or null."""
    return lambda key, value: None if value is None else rule(key, value)


def either(*allowed: str) -> Rule:
    """One of these names."""
    return lambda key, value: one_of(key, value, allowed)


def list_of(rule: Rule) -> Rule:
    """A list whose items all follow `rule`."""

    def check(key: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{key} must be a list like [1, 2], got {value!r}")
        return [rule(f"{key}[{i}]", item) for i, item in enumerate(value)]

    return check


def device_name(key: str, value: Any) -> str:
    """auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
        raise ValueError(f"{key} must be auto, cpu, cuda or cuda:N, got {value!r}")
    return str(value)


def margin(key: str, value: Any) -> str:
    """An amount above 0, or a percentage like 2%."""
    text = str(value)
    if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?%?", text) or not float(text.removesuffix("%")) > 0:
        raise ValueError(f"{key} must be a number above 0 or a percentage, like 0.01 or 2%, got {value!r}")
    return text


def layer_choice(key: str, value: Any) -> Any:
    """all, none, conv, fc, first, last or a list of layer names."""
    named = ("all", "none", "conv", "fc", "first", "last")
    return value if isinstance(value, list) else one_of(key, value, named)


TRACES = ("norms", "features")


def trace(key: str, value: Any) -> list[str]:
    """norms, features, or a list of them; null is none."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if name not in TRACES:
            there = "norms, features, [norms,features] or null"
            raise ValueError(f"{key} must be {there}, got {name!r}{nearest(str(name), TRACES)}")
    return [name for name in TRACES if name in names]


def names_or_all(key: str, value: Any) -> Any:
    """all, a name, or a list of names."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{key} must be all or a list of names like [first,last], got {value!r}")
    if "all" in items and len(items) > 1:
        raise ValueError(f"{key} must be all alone or a list without it, got {value!r}")
    return items


def channels(key: str, value: Any) -> Any:
    """all, how many, or a list of numbers from 0, where -1 is the last."""
    if isinstance(value, list) and value:
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return value
    elif value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"{key} must be all, a count ≥ 1 or a list like [0,-1], got {value!r}")


def folder_name(key: str, value: Any) -> str:
    """One folder's name, no path."""
    if not re.fullmatch(r"\w[\w.+=~-]*", str(value)):
        raise ValueError(f"{key} must be a word of letters, digits and . + = ~ - _, got {value!r}")
    return str(value)


SUITES = ("layer", "step", "loader", "naive", "pack", "startup", "sweep", "session")  # of bench


def words(*allowed: str) -> Rule:
    """A list of these names, which may be empty."""

    def check(key: str, value: Any) -> list[str]:
        if not isinstance(value, list):
            raise ValueError(f"{key} must be a list like [{allowed[0]}], got {value!r}")
        return [one_of(key, item, allowed) for item in value]

    return check


def text(key: str, value: Any) -> str:
    """Words, not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be text, got {value!r}")
    return value


def arm_list(key: str, value: Any) -> list[str]:
    """Override strings, which may be none."""
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        there = '["norm=obn","norm=mbn stride=1,4"]'
        raise ValueError(f"{key} must be a list like {there}, got {value!r}")
    return value


def folders(key: str, value: Any) -> list[str]:
    """Places of earlier results, which may be none."""
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{key} must be a list like [outputs/one,outputs/two], got {value!r}")
    return value


RULES: dict[str, Rule] = {
    "stride": optional(positive_int),
    "epochs": optional(positive_int),
    "steps": optional(positive_int),
    "session": from_zero,
    "seed": from_zero,
    "precision": either("fp32", "bf16", "fp16"),
    "device": device_name,
    "select": either("last", "best_val"),
    "eval_every": interval,
    "threads": optional(positive_int),
    "cuda_graph": optional(flag),
    "pack": optional(partial(int_from, low=2)),
    "sessions": partial(int_from, low=2),
    "resolution": partial(number_from, low=1.001),  # far enough for two rates to differ
    "lowest": above_zero,
    "highest": above_zero,
    "range.steps": optional(partial(int_from, low=10)),
    "range.low": above_zero,
    "range.high": above_zero,
    "name": optional(folder_name),
    "backend": optional(either("aot_eager", "inductor")),
    "margin": optional(margin),
    "checkpoint.every": optional(every),
    "trace": trace,
    "traces.every": optional(partial(interval, unit="steps")),
    "traces.layers": names_or_all,
    "traces.channels": channels,
    "traces.features": names_or_all,
    "batch.size": positive_int,
    "batch.micro": optional(positive_int),
    "batch.eval_size": positive_int,
    "optim.lr": above_zero,
    "optim.momentum": below_one,
    "optim.betas": list_of(below_one),
    "optim.eps": above_zero,
    "optim.weight_decay": nonnegative,
    "optim.label_smoothing": below_one,
    "optim.schedule.milestones": list_of(positive_int),
    "optim.schedule.gamma": above_zero,
    "optim.schedule.warmup": fraction,  # one_cycle: below half, see check_together
    "optim.schedule.start": nonnegative,
    "optim.schedule.end": nonnegative,
    "optim.schedule.low_momentum": optional(below_one),
    "model.width": positive_int,
    "model.n": positive_int,
    "model.padding": from_zero,
    "model.norm_position": either("before", "after"),
    "model.norm_layers": layer_choice,
    "model.dropout": below_one,
    "model.dropout_position": either("before", "after"),
    "model.activation": optional(either("relu", "gelu", "silu", "sigmoid", "tanh", "none")),
    "model.shortcut": either("conv", "pad"),
    "model.stride_on": either("3x3", "1x1"),
    "model.init": either("torch", "xavier", "he", "glorot"),
    "model.logit_scale": above_zero,
    "model.weight": either("none", "standardized", "scaled", "weight_norm"),
    "norm.eps": nonnegative,
    "norm.momentum": optional(fraction),
    "norm.stride": positive_int,
    "norm.affine_impl": either("depthwise", "vector"),
    "norm.impl": either("auto", "reference", "fused"),
    "norm.stored_var": either("unbiased", "biased"),
    "norm.stats_timing": either("pre", "post"),
    "norm.r_max": optional(partial(number_from, low=1)),
    "norm.d_max": optional(nonnegative),
    "norm.warmup_steps": from_zero,
    "norm.r_max_step": from_zero,
    "norm.d_max_step": from_zero,
    "norm.num_devices": positive_int,
    "norm.stats_device": from_zero,
    "norm.num_groups": optional(positive_int),
    "norm.ghost_batch_size": positive_int,
    "norm.over": either("channels", "sample"),
    "norm.alpha": nonnegative,
    "norm.channels_per_group": positive_int,
    "norm.sample": either("stride", "rows", "batch", "random"),
    "norm.num_chunks": positive_int,
    "norm.buffer_size": positive_int,
    "norm.r_warmup_steps": from_zero,
    "norm.window": positive_int,
    "norm.burn_in": from_zero,
    "norm.size": positive_int,
    "norm.beta": optional(nonnegative),
    "norm.k": above_zero,
    "norm.summation_window": positive_int,
    "norm.suppression_window": positive_int,
    "norm.sigma": above_zero,
    "norm.learned_eps": optional(nonnegative),
    "norm.activation": either("relu", "gelu", "silu", "identity"),
    "norm.num_quantiles": partial(int_from, low=2),
    "norm.proxy_eps": nonnegative,
    "norm.function": either("tanh", "isru", "erf", "hardtanh"),
    "norm.method": either("zca", "cholesky", "newton"),
    "norm.iterations": optional(positive_int),
    "norm.radius_steps": positive_int,
    "norm.target": either("uniform", "gaussian"),
    "suite": words(*SUITES, "all"),
    "rounds": positive_int,
    "process_rounds": positive_int,
    "layer.model": list_of(either("resnet9", "resnet50", "dilated_cnn")),
    "layer.shapes": either("some", "all"),
    "layer.batch_size": optional(partial(int_from, low=2)),
    "layer.layout": list_of(either("nchw", "nhwc")),
    "layer.dtype": list_of(either("fp32", "bf16", "fp16")),
    "layer.relu": list_of(flag),
    "layer.impl": list_of(either("reference", "fused")),
    "layer.stride": list_of(positive_int),
    "layer.sample": list_of(either("stride", "rows", "batch")),
    "step.batch_size": partial(int_from, low=2),
    "step.stride": list_of(positive_int),
    "loader.batch_size": positive_int,
    "loader.workers": from_zero,
    "naive.batch_size": partial(int_from, low=2),
    "naive.images": positive_int,
    "naive.stride": positive_int,
    "naive.workers": from_zero,
    "pack.together": optional(partial(int_from, low=2)),
    "pack.batch_size": partial(int_from, low=2),
    "pack.steps": partial(int_from, low=2),
    "pack.slots": positive_int,
    "pack.precision": list_of(either("fp32", "bf16")),
    "startup.sessions": partial(int_from, low=2),
    "startup.fresh": positive_int,
    "sweep.sessions": partial(int_from, low=2),
    "sweep.fresh": positive_int,
    "sweep.epochs": positive_int,
    "arms": optional(arm_list),
    "join": folders,
    "compare": optional(text),
}
