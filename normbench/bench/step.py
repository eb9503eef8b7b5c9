"""Suite `step`: one training step of ResNet9 at CIFAR's size, as a session takes it, flag by flag."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from normbench import device as machine
from normbench.bench import naive
from normbench.bench.bench import Bench
from normbench.bench.interleaved import CannotRun, Clock, Ready, Sample, take_turns
from normbench.bench.record import Group
from normbench.manifest import LayerObservation
from normbench.preparing import prepare
from normbench.seeds import Seeds
from normbench.training import Prepared, start, train_step
from normbench.values import Refused

BASELINE = "fp32, NCHW, readable mbn"
FAST = ["precision=bf16", "channels_last=true"]


def groups(bench: Bench) -> Iterator[Group]:
    """One group: all flags take turns."""
    keys = bench.of("step")
    size = 4 if bench.quick else keys["batch_size"]
    width = 4 if bench.quick else 64
    stride = keys["stride"][-1]
    readable = ["norm=mbn", f"stride={stride}", "norm.impl=reference"]
    fp32: dict[str, list[str]] = {
        BASELINE: readable,
        "fp32, channels-last, readable mbn": [*readable, "channels_last=true"],
        "bf16, NCHW, readable mbn": [*readable, "precision=bf16"],
        "bf16, channels-last, readable mbn": [*readable, *FAST],
        "bf16, channels-last, obn": ["norm=obn", *FAST],
        "bf16, channels-last, no norm": ["norm=nn", *FAST],
    }
    fused = {
        f"bf16, channels-last, fused mbn s={s}": ["norm=mbn", f"stride={s}", "norm.impl=fused", *FAST]
        for s in keys["stride"]
    }
    common = [f"batch.size={size}", f"model.width={width}"]
    sides: dict[str, Callable[[], Ready]] = {
        "naive": partial(naive_step, bench, size, width, stride),
        **{name: partial(session_step, bench, common + own) for name, own in {**fp32, **fused}.items()},
    }
    case = {"model": "resnet9", "batch_size": size, "width": width}
    note = (
        f"Synthetic images of 32×32, one batch at hand; readable layers have stride {stride}; models without "
        "a fused layer have eager ReLU. `naive` is the plain loop's step (fp32, NCHW, readable mbn)."
    )
    yield Group("step", case, "step", BASELINE, take_turns(sides, bench.rounds), note=note)


def session_step(bench: Bench, overrides: list[str]) -> Ready:
    """A session's own step, prepared as a session prepares it."""
    size = next(word.partition("=")[2] for word in overrides if word.startswith("batch.size="))
    try:
        config = bench.session(
            [
                "model=resnet9",
                "dataset=synthetic",
                f"dataset.train_size={size}",
                f"batch.eval_size={size}",
                f"dataset.test_size={size}",
                "optim.lr=1e-4",
                "optim/schedule=constant",
                f"threads={bench.values['threads'] or 'null'}",
                f"device={bench.values['device']}",
                *overrides,
            ]
        )
        ready = prepare(config)
    except (Refused, ValueError) as error:
        raise CannotRun(str(error)) from error
    if "norm.impl=fused" in overrides:
        check_fused(ready)
    start(ready, Seeds(0, 0))
    x, y = next(iter(ready.data.train.batches(Seeds(0, 0), 1)))
    return timed(lambda: train_step(ready, x, y)[0], bench.device)


def check_fused(ready: Prepared) -> None:
    """CannotRun where the norm layers ran no operator of their own in the observed step."""
    layers: list[LayerObservation] = list(ready.observation.layers.values())
    for layer in layers:
        if not layer.fused:
            raise CannotRun(
                f"not fused: {layer.name} ran {', '.join(list(layer.ops.get('forward', {}))[:5])}"
            )


def naive_step(bench: Bench, size: int, width: int, stride: int) -> Ready:
    """The plain loop's step on a batch of the same size."""
    machine.use_threads(bench.values["threads"])
    model = naive.make_model(stride, width, bench.device)
    optimizer = naive.make_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((size, 3, 32, 32), generator=generator).to(bench.device)
    y = torch.arange(size, device=bench.device) % 10
    return timed(lambda: naive.train_step(model, optimizer, x, y), bench.device)


def timed(step: Callable[[], Tensor | float], device: torch.device) -> Ready:
    """Seconds of a step, after two that warm up; CannotRun where the loss is not finite."""
    clock = Clock(device)
    for _ in range(2):
        loss = float(step())
    if loss != loss or loss == float("inf"):
        raise CannotRun(f"the loss is {loss}: its arithmetic would not be a real step's")

    def measure() -> Sample:
        clock.wait()
        begin = clock.mark()
        step()
        end = clock.mark()
        clock.wait()
        return {"step": clock.seconds(begin, end)}

    return Ready(measure)
