"""Suite `step`: one training step of ResNet9 at CIFAR's size, as a session takes it, flag by flag."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from normbench import device as machine
from normbench.bench import naive
from normbench.bench.bench import Bench
from normbench.bench.interleaved import CannotRun, Clock, Ready, Sample, take_turns
from normbench.bench.layer import shapes_of
from normbench.bench.record import Group
from normbench.manifest import LayerObservation
from normbench.preparing import prepare
from normbench.seeds import Seeds
from normbench.training import Prepared, start, train_step
from normbench.values import Refused

BASELINE = "fp32, NCHW, readable mbn"
FAST = ["precision=bf16", "channels_last=true"]
QUICK = "bf16, channels-last"
NO_NORM = f"{QUICK}, no norm"
COPIES = "a bf16 copy of what each norm layer sees"


def groups(bench: Bench) -> Iterator[Group]:
    """What each flag gives; and the fast step with and without norms, in more and quicker turns."""
    keys = bench.of("step")
    size = 4 if bench.quick else keys["batch_size"]
    width = 4 if bench.quick else 64
    stride = keys["stride"][-1]
    common = [f"batch.size={size}", f"model.width={width}"]
    readable = ["norm=mbn", f"stride={stride}", "norm.impl=reference"]
    fused = {
        f"{QUICK}, fused mbn s={s}": ["norm=mbn", f"stride={s}", "norm.impl=fused", *FAST]
        for s in keys["stride"]
    }
    last = f"{QUICK}, fused mbn s={stride}"
    flags: dict[str, list[str]] = {
        BASELINE: readable,
        "fp32, channels-last, readable mbn": [*readable, "channels_last=true"],
        "bf16, NCHW, readable mbn": [*readable, "precision=bf16"],
        f"{QUICK}, readable mbn": [*readable, *FAST],
        last: fused[last],
    }
    norms: dict[str, list[str]] = {
        NO_NORM: ["norm=nn", *FAST],
        f"{QUICK}, obn": ["norm=obn", *FAST],
        **fused,
    }

    def sides(of: Mapping[str, list[str]]) -> dict[str, Callable[[], Ready]]:
        return {name: partial(session_step, bench, common + own) for name, own in of.items()}

    case = {"model": "resnet9", "batch_size": size, "width": width}
    yield Group(
        "step", {"compared": "flags", **case}, "step", BASELINE,
        take_turns({"naive": partial(naive_step, bench, size, width, stride), **sides(flags)}, bench.rounds),
        note=f"Synthetic images of 32×32, one batch at hand; readable layers have stride {stride}, and eager "
        "ReLU behind them. `naive` is the plain loop's step (fp32, NCHW, readable mbn).",
    )  # fmt: skip
    yield Group(
        "step", {"compared": "norms", **case}, "step", NO_NORM,
        take_turns({**sides(norms), COPIES: partial(copies, bench, size, width)}, 3 * bench.rounds),
        note="Models without a fused layer have eager ReLU, which moves 5 units of memory; a norm with ReLU "
        "inside moves 3 units more at s=1 and 0.19 at s=4: by the bytes alone that adds 1.5 or 0.1 times the "
        f"row `{COPIES}` to the step without norm.",
    )  # fmt: skip


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


def copies(bench: Bench, size: int, width: int) -> Ready:
    """Reads and writes of what every norm layer of the step sees, 2 units of memory each."""
    shapes = shapes_of("resnet9", size, width=width)
    pairs = [torch.randn(2, *shape, device=bench.device, dtype=torch.bfloat16).unbind() for shape in shapes]

    def step() -> float:
        for source, target in pairs:
            target.copy_(source)
        return 0.0

    return timed(step, bench.device)


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
