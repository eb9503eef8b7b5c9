"""Every arm's step with and without norms, its layers inside the step, then alone: sides that take turns."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from normbench import device as machine
from normbench.bench.calls import Calls, Ring, copying
from normbench.bench.interleaved import CannotRun, Clock, Ready, Sample, repeats, take_turns
from normbench.building import norm_layers_of
from normbench.data.together import batches_of
from normbench.preparing import prepare
from normbench.profile.arms import Arm
from normbench.profile.traffic import bytes_of
from normbench.profile.watching import Seen, Watch, odd_share, watched, watched_relus
from normbench.seeds import Seeds
from normbench.training import Prepared, autocast, start, train_step
from normbench.values import Refused

Body = dict[str, Any]
STEP, OBSERVED = "step", "observed step"
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Pace:
    """How often and how long to measure.

    Args:
        rounds: turns of every side.
        sample_s: how long a sample lasts at least.
        single: one input for every layer in place of as many as no cache holds.
    """

    rounds: int
    sample_s: float
    single: bool

    @classmethod
    def of(cls, rounds: int, quick: bool) -> "Pace":
        """What the command asks for."""
        return cls(3, 0.002, True) if quick else cls(rounds, 0.03, False)


@dataclass
class Steps:
    """One prepared model at work.

    `bare`: without norms; beside the empty layers, the eager ReLUs behind them are watched.
    """

    ready: Prepared
    bare: bool = False
    seen: dict[str, Seen] = field(default_factory=dict)

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return next(batches_of(self.ready.data.train, [Seeds(0, 0)], epoch=1))

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The norm layers by name."""
        return norm_layers_of(self.ready.model)

    def once(self) -> Tensor:
        """One training step; its loss."""
        loss, _ = train_step(self.ready, *self.batch)
        return loss

    @contextmanager
    def watched(self, clock: Clock) -> Iterator[Watch]:
        """Mark layers meanwhile, in a bare model their ReLUs too."""
        with watched(self.layers, clock) as watch:
            if not self.bare:
                yield watch
                return
            with watched_relus(self.ready.model, self.layers, clock) as relus:
                yield watch
            watch.spans |= {f"{name} relu": passes for name, passes in relus.spans.items()}

    def prepared(self, pace: Pace) -> Ready:
        """Warmed up; a sample is a step as it is, then one that is watched."""
        ready = self.ready
        clock = Clock(ready.device)
        start(ready, Seeds(0, 0))
        with self.watched(clock) as watch:
            self.once()
        self.seen = watch.seen
        count = repeats(self.once, clock, pace.sample_s)

        def timed() -> float:
            clock.wait()
            begin = clock.mark()
            for _ in range(count):
                self.once()
            end = clock.mark()
            clock.wait()
            return clock.seconds(begin, end) / count

        def measure() -> Sample:
            sample = {STEP: timed()}
            with self.watched(clock) as watch:
                sample[OBSERVED] = timed()
            for name, passes in watch.seconds(count).items():
                sample |= {f"{name} {which}": seconds for which, seconds in passes.items()}
            return sample

        return Ready(measure)


def prepared_steps(arms: Sequence[Arm]) -> tuple[dict[str, Steps], dict[str, Steps], dict[str, str]]:
    """Every arm's model, the models without norms by a name, and which of them is each arm's."""
    own: dict[str, Steps] = {}
    for arm in arms:
        try:
            own[arm.name] = Steps(prepare(arm.config))
        except (ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, Refused):
                raise
            line = next(iter(str(error).splitlines()), "")
            raise CannotRun(f"{arm.name}: {type(error).__name__}: {line}") from error
    without: dict[str, Steps] = {}
    names: dict[str, str] = {}
    for arm in arms:
        config = arm.twin
        same = (name for name, steps in without.items() if steps.ready.config == config)
        name = next(same, None) or f"without norms {len(without) + 1}"
        if name not in without:
            without[name] = Steps(prepare(config), bare=True)
        names[arm.name] = name
    return own, without, names


def measure_steps(
    own: Mapping[str, Steps], without: Mapping[str, Steps], pace: Pace
) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Arm or model without norms → part → seconds, one a round; and the least share of a processor it had."""
    sides = {name: partial(steps.prepared, pace) for name, steps in {**own, **without}.items()}
    done = take_turns(sides, pace.rounds)
    for name, side in done.items():
        if side.missing:
            raise CannotRun(f"{name}: {side.missing}")
    times = {name: {part: list(s) for part, s in side.times_s.items()} for name, side in done.items()}
    return times, min(side.cpu_share or 0.0 for side in done.values())


@dataclass(frozen=True)
class Alone:
    """A layer as its model calls it, to be called alone."""

    arm: str
    layer: nn.Module
    seen: Seen
    ready: Prepared

    @property
    def likeness(self) -> str:
        """Equal for layers of an arm that are measured once: of one class, shape and way of being called."""
        layer, seen = self.layer, self.seen
        state = [tuple(t.shape) for t in (*layer.parameters(), *layer.buffers())]
        trained = [p.requires_grad for p in layer.parameters()]
        text = f"{type(layer)} {layer} {state} {trained} {seen}"
        return f"{self.arm}: {hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def forward(self, x: Tensor) -> Tensor:
        """Under the step's precision, with ReLU inside where the model wants that."""
        with autocast(self.ready):
            y: Tensor = self.layer(x, relu=True) if self.seen.relu else self.layer(x)
        return y

    def prepared(self, ring: Ring, pace: Pace) -> Ready:
        """Warmed up."""
        calls = Calls(self.forward, [p for p in self.layer.parameters() if p.requires_grad], ring)
        try:
            calls.calibrate(pace.sample_s)
        except (ValueError, TypeError, RuntimeError) as error:
            line = next(iter(str(error).splitlines()), "")
            raise CannotRun(f"{type(error).__name__}: {line}") from error
        return Ready(calls.measure)

    def peak_memory(self, ring: Ring) -> int | None:
        """Most bytes that one forward and backward pass holds above its inputs and gradients given."""
        calls = Calls(self.forward, [p for p in self.layer.parameters() if p.requires_grad], ring)
        try:
            calls.once()
            return peak_of(calls.once, self.ready.device)
        except (ValueError, TypeError, RuntimeError):
            return None


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch's allocator handed out at once during a call, above what it held before.

    On CUDA its own counter; on the CPU, which has none, the sum of its events as the profiler records them:
    exact for tensors, blind to what a kernel allocates past torch.
    """
    if device.type == "cuda":
        before = machine.reset_peak_memory(device)
        call()
        machine.synchronize(device)
        return machine.peak_memory(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    found = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def measure_alone(own: Mapping[str, Steps], pace: Pace) -> Iterator[Body]:
    """One group for every kind of tensor that layers see: a copy of it and the layers that are not alike."""
    groups: dict[tuple[Any, ...], dict[str, Alone]] = {}
    for arm, steps in own.items():
        for name, layer in steps.layers.items():
            if name in steps.seen:
                alone = Alone(arm, layer, steps.seen[name], steps.ready)
                seen = alone.seen
                tensor = (seen.shape, seen.dtype, seen.layout, seen.output_dtype)
                groups.setdefault(tensor, {}).setdefault(alone.likeness, alone)
    for (shape, dtype, layout, output_dtype), layers in groups.items():
        device = next(iter(own.values())).ready.device
        ring = Ring(shape, dtype, layout, device, output_dtype, single=pace.single)
        sides = {likeness: partial(alone.prepared, ring, pace) for likeness, alone in layers.items()}
        done = take_turns({"copy": partial(copying, ring, pace.sample_s), **sides}, pace.rounds)
        yield {
            "shape": list(shape),
            "dtype": word(dtype),
            "layout": word(layout),
            "tensor_bytes": ring.tensor_bytes,
            "copy_s": list(done["copy"].times_s["copy"]),
            "layers": {
                likeness: {
                    "missing": done[likeness].missing,
                    **{f"{which}_s": list(done[likeness].times_s.get(which, [])) for which in PASSES},
                    "peak_memory_bytes": None if done[likeness].missing else alone.peak_memory(ring),
                }
                for likeness, alone in layers.items()
            },
        }


def arm_body(arm: Arm, steps: Steps, times: Mapping[str, Sequence[float]], without: str) -> Body:
    """What was seen of an arm: its step's times, its layers as they ran inside it."""
    config = arm.config
    layers = [
        layer_body(Alone(arm.name, layer, steps.seen[name], steps.ready), index, name, times)
        for index, (name, layer) in enumerate(steps.layers.items())
        if name in steps.seen
    ]
    return {
        "arm": arm.name,
        "norm": config.choices["norm"],
        "norm_options": {k: v for k, v in config.norm.items() if k != "_partial_"},
        "stride": config.norm.get("stride"),
        "precision": config.precision,
        "channels_last": config.channels_last,
        "batch_size": config.batch["size"],
        "without": without,
        "step_s": list(times[STEP]),
        "observed_step_s": list(times[OBSERVED]),
        "odd_share": odd_share(steps.layers, steps.once),
        "layers": with_bytes(layers, steps),
    }


def layer_body(alone: Alone, index: int, name: str, times: Mapping[str, Sequence[float]]) -> Body:
    """One layer inside the running step."""
    layer, seen = alone.layer, alone.seen
    observed = alone.ready.observation.layers[name]
    return {
        "layer": name,
        "layer_index": index,
        "class": f"{type(layer).__module__}.{type(layer).__qualname__}",
        "shape": list(seen.shape),
        "dtype": word(seen.dtype),
        "layout": word(seen.layout),
        "fused": observed.fused,
        "relu_inside": seen.relu,
        "alike": alone.likeness,
        **in_passes(name, times),
        "forward_operators": dict(observed.ops.get("forward", Counter())),
        "backward_operators": dict(observed.ops.get("backward", Counter())),
    }


def with_bytes(layers: Sequence[Body], steps: Steps) -> list[Body]:
    """The layers with what they have to move; those that are alike are probed once."""
    found: dict[str, tuple[int, int] | None] = {}
    for body in layers:
        if body["alike"] not in found:
            seen = steps.seen[body["layer"]]
            dtypes = seen.dtype, seen.output_dtype
            layer, device = steps.layers[body["layer"]], steps.ready.device
            found[body["alike"]] = bytes_of(layer, seen.shape, dtypes, seen.layout, device)
    moved = [found[body["alike"]] or (None, None) for body in layers]
    return [
        {**body, **{f"{which}_bytes": count for which, count in zip(PASSES, counts, strict=True)}}
        for body, counts in zip(layers, moved, strict=True)
    ]


def without_body(steps: Steps, times: Mapping[str, Sequence[float]]) -> Body:
    """The step without norms: what its marks cost where a layer does nothing, and its eager ReLUs' times."""
    behind = [name for name in steps.layers if f"{name} relu forward" in times]
    return {
        "step_s": list(times[STEP]),
        "observed_step_s": list(times[OBSERVED]),
        "odd_share": odd_share(steps.layers, steps.once),
        "empty": {name: in_passes(name, times) for name in steps.layers},
        "relus": {name: in_passes(f"{name} relu", times) for name in behind},
    }


def in_passes(name: str, times: Mapping[str, Sequence[float]]) -> Body:
    """Seconds of both passes, a round each; none where a pass was not measured."""
    return {f"{which}_s": list(times.get(f"{name} {which}", [])) for which in PASSES}


def word(value: object) -> str:
    """`float32` for torch.float32."""
    return str(value).removeprefix("torch.")
