"""What a layer measures and when, found by changing its input and watching its output."""

import copy

import torch
from torch import Tensor, nn

from normbench.audit.findings import Doubtful, require
from normbench.audit.subject import Subject, activations, after, call, distance, outcome, population

PROBE = (4, 0, 6, 6)


def statistics(subject: Subject) -> str:
    """Which other values an output depends on, in training and in evaluation."""
    training, evaluation = describe(subject, training=True), describe(subject, training=False)
    later = describe(subject, training=True, late=True)
    if later != training:
        training = f"{training} at first, {later} later"
    if training == evaluation:
        return f"{training}, in training and evaluation alike"
    return f"training: {training}; evaluation: {evaluation}"


def describe(subject: Subject, training: bool, late: bool = False) -> str:
    """What the outputs of one sample's channel depend on beside their own inputs."""
    shape = subject.shape(*PROBE)
    layer = after(subject.build(shape=shape), 2 if late or not training else 0, shape)
    if late:
        age(layer)
    x = activations(shape)
    samples, channels, height, width = shape
    base = outcome(layer, x, training)[0, 0]

    def acts(*index: int | slice) -> Tensor:
        """Which positions of the first sample's first channel change with these values."""
        z = x.clone()
        z[index] += 3.1
        changed = (outcome(layer, z, training)[0, 0] - base).abs()
        return changed > 1e-12 * base.abs().max()  # more than rounding

    mates = [n for n in range(1, samples) if acts(n).any()]
    others = [c for c in range(1, channels) if acts(0, c).any()]
    who = "all samples" if len(mates) == samples - 1 else f"samples {runs([0, *mates])} of {samples}"
    measured = torch.zeros(height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            changed = acts(mates[0] if mates else 0, 0, i, j)
            if not mates:
                changed[i, j] = False
            measured[i, j] = changed.any()
    said = []
    if measured.any():
        said.append(f"{positions(measured)} of {who if mates else 'its own sample'}")
    elif mates:
        said.append(f"other channels of {who}")
    if others:
        every = len(others) == channels - 1
        said.append("all channels" if every else f"channels {runs([0, *others])} of {channels}")
    if remembers(subject, training, late):
        said.append("earlier batches")
    return ", ".join(said) or "its own value alone"


def positions(grid: Tensor) -> str:
    """`all positions`, or how many and in which rows and columns."""
    if grid.all():
        return "all positions"
    height, width = grid.shape
    rows, columns = grid.any(1).nonzero().flatten().tolist(), grid.any(0).nonzero().flatten().tolist()
    full = grid[rows][:, columns].all().item()
    count = f"{int(grid.sum())} of {grid.numel()} positions"
    if not full:
        return count
    parts = []
    if len(rows) < height:
        parts.append(f"rows {runs(rows)}")
    if len(columns) < width:
        parts.append(f"columns {runs(columns)}")
    return f"{count} ({', '.join(parts)})"


def runs(numbers: list[int]) -> str:
    """`0, 2, 4` or `0 to 5`."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def remembers(subject: Subject, training: bool, late: bool = False) -> bool:
    """Whether earlier batches change the output."""
    x = activations(subject.maps)
    one, other = subject.build(), subject.build()
    call(one, activations(subject.maps, seed=1), training=True)
    call(other, 3 * activations(subject.maps, seed=7) + 1, training=True)
    if late:
        age(one)
        age(other)
    return not torch.equal(outcome(one, x, training), outcome(other, x, training))


def age(layer: nn.Module) -> None:
    """Let a layer believe that it has seen a million batches, so that warm-ups and ramps are over."""
    for name, buffer in layer.named_buffers():
        if name.rpartition(".")[2] == "num_batches_tracked":
            buffer.fill_(1_000_000)


def evaluation(subject: Subject) -> str:
    """A sample's output is the same alone, among others and in any order; nothing is remembered."""
    if subject.options.get("track_running_stats") is False:
        raise Doubtful("track_running_stats=false: evaluation measures the batch, as asked")
    for shape in [*subject.shapes, (40, *subject.maps[1:])]:
        layer = after(subject.build(shape=shape), 2, shape)
        x = activations(shape)
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        together = call(layer, x, training=False)
        for key, value in layer.state_dict().items():
            require(torch.equal(value, state[key]), f"evaluation changes {key}")
        own = call(layer, x.flip(0), training=False)
        require(not torch.equal(own, together), "in evaluation the output does not depend on its own input")
        for i in range(min(shape[0], 8)):
            alone = call(layer, x[i : i + 1], training=False)
            off = distance(alone, together[i : i + 1])
            said = f"a sample's output depends on its batch mates: alone it differs by {off:.1e}"
            require(off <= subject.tolerance, said)
        mates = x.clone()
        mates[1:] = 5 * mates[1:] + 2
        off = distance(call(layer, mates, training=False)[:1], together[:1])
        said = f"a sample's output depends on its batch mates' values (by {off:.1e})"
        require(off <= subject.tolerance, said)
    return "a sample's output is the same alone and among others; nothing is remembered"


def modes(subject: Subject) -> str:
    """train() and eval() decide the mode, not whether gradients are on."""
    x = activations(subject.maps)
    for training in (True, False):
        layer = after(subject.build(), 2, subject.maps)
        with torch.no_grad():
            without = outcome(layer, x, training)
        with torch.inference_mode():
            inferred = outcome(layer, x.clone(), training).clone()
        mode = "training" if training else "evaluation"
        off = distance(outcome(layer, x, training), without)
        said = f"in {mode} the output under no_grad differs by {off:.1e}: the gradient mode decides"
        require(off <= subject.tolerance, said)
        for how, other in (
            ("in inference_mode", inferred),
            ("of an input that needs gradient", needing(layer, x, training)),
        ):
            off = distance(other, without)
            said = f"in {mode} the output {how} differs by {off:.1e}: the gradient mode decides"
            require(off <= subject.tolerance, said)
        changed = copy.deepcopy(layer)
        with torch.no_grad():
            call(changed, x, training)
        twin = copy.deepcopy(layer)
        call(twin, x, training)
        for key, value in changed.state_dict().items():
            same = torch.equal(value, twin.state_dict()[key])
            require(same, f"in {mode} {key} is updated differently under no_grad: the gradient mode decides")
    return "train() and eval() decide the mode; no_grad changes neither output nor state"


def needing(layer: nn.Module, x: Tensor, training: bool) -> Tensor:
    """The output of an input that needs gradient; in evaluation the state must stay."""
    twin = copy.deepcopy(layer)
    y = call(twin, x.clone().requires_grad_(), training)
    for key, value in twin.state_dict().items() if not training else ():
        require(
            torch.equal(value, layer.state_dict()[key]),
            f"evaluation of an input that needs gradient changes {key}",
        )
    return y


def repeatable(subject: Subject) -> str:
    """Equal calls give equal, finite outputs and leave their input alone."""
    x = activations(subject.maps)
    for training in (True, False):
        layer = after(subject.build(), 2, subject.maps)
        given, mode = x.clone(), "training" if training else "evaluation"
        y = outcome(layer, given, training)
        require(bool(y.isfinite().all()), f"the output is not finite in {mode}")
        require(torch.equal(given, x), f"{mode} changes its input in place")
        again = distance(outcome(layer, x, training), y)
        require(
            again <= subject.tolerance,
            f"two equal calls in {mode} differ by {again:.1e}: it draws its own randomness",
        )
    return "equal calls give equal outputs and leave their input alone"


def running_statistics(subject: Subject) -> str:
    """How stored statistics approach those of the data, and how far evaluation then is from training."""
    layer = subject.build(fresh=True)
    shape = subject.maps
    x = activations(shape, seed=10_001)
    if not remembers(subject, training=False):
        gap = distance(outcome(layer, x, True), outcome(layer, x, False))
        if gap > subject.tolerance:
            raise Doubtful(f"nothing is stored, yet evaluation differs from training by {gap:.1e}")
        return "none: evaluation equals training"
    mean, var = population(shape[1])
    buffers = dict(layer.named_buffers())
    within: dict[str, int] = {}
    batches = 400
    for batch in range(1, batches + 1):
        call(layer, activations(shape, seed=batch), training=True)
        for key, truth in (("running_mean", mean), ("running_var", var)):
            held = buffers.get(key)
            if held is not None and held.shape == truth.shape and key not in within:
                scale = var.sqrt() if key == "running_mean" else var
                if ((held - truth).abs() / scale).mean() < 0.1:
                    within[key] = batch
    for key, value in layer.named_buffers():
        require(bool(value.isfinite().all()), f"{key} is not finite after {batches} batches")
    gap = rms_gap(outcome(layer, x, False), outcome(layer, x, True))
    reached = ", ".join(f"{k} within 10 % after {n}" for k, n in within.items())
    said = f"after {batches} batches evaluation is {gap:.0%} (rms) from training"
    said = f"{reached}; {said}" if reached else said
    if gap > 0.3:
        raise Doubtful(f"{said}: what is stored is not what training uses")
    return said


def rms_gap(a: Tensor, b: Tensor) -> float:
    """Root mean square difference relative to b's deviation from its mean."""
    return ((a - b).square().mean().sqrt() / b.std()).item()
