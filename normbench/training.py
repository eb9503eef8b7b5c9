"""How a session trains: start what is prepared afresh, train; the clock covers training steps alone.

`train` is the story, `train_step` and `evaluate` are its two verbs. `preparing` makes what they work on.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normbench import device as machine
from normbench import interrupt, ranks
from normbench.building import remake_strangers, state_of
from normbench.config import Config
from normbench.course import Course, Evaluation, Run, still_ours
from normbench.data.loading import Data, EvalPart
from normbench.data.together import batches_of
from normbench.graphed import GraphedStep
from normbench.manifest import Observation
from normbench.models.init import initialise
from normbench.norms.base import widen
from normbench.optim import Schedule, state_tensors
from normbench.plan import utc_now
from normbench.progress import SessionProgress
from normbench.results import EpochRow
from normbench.seeds import Seeds
from normbench.traces.features import FeatureWatch
from normbench.traces.norms import NormWatch

WARMUP_STEPS = 3
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Prepared:
    """What is dear, and shared by all sessions of a setting in this process.

    `models` are the sessions' own: the model itself, or with `pack` one a seat, whose tensors are its parts
    of the model's. `first_state` is one session's.
    """

    config: Config
    device: torch.device
    model: nn.Module
    models: list[nn.Module]
    step_model: nn.Module  # the model, or its compiled form
    parallel: DistributedDataParallel | None  # around it, where several processes train together
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    data: Data
    total_steps: int
    first_state: dict[str, Tensor]
    first_scale: dict[str, Any]
    observation: Observation
    graphed: GraphedStep | None = None  # the training step from recordings, on CUDA
    not_graphed: str | None = None  # why there is none, where one was possible
    norm_watch: NormWatch | None = None  # with trace=norms
    feature_watch: FeatureWatch | None = None  # with trace=features
    held: int = 0  # bytes that are no session's own: what the process held before the warm-up


@contextlib.contextmanager
def settings_of(config: Config, device: torch.device) -> Iterator[None]:
    """The process-wide switches of a session; determinism and random state are put back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    machine.use_threads(config.threads)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.deterministic = config.deterministic
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.deterministic = before[1]


@torch.no_grad()
def start(ready: Prepared, *seeds: Seeds) -> None:
    """Write every seat's whole start state in place: parameters, buffers, optimizer, scaler."""
    for model, own_seeds in zip(ready.models, seeds, strict=True):
        for name, tensor in state_of(model):
            if name in ready.first_state:  # a layer that makes parameters in its forward makes them again
                tensor.copy_(ready.first_state[name])
        remake_strangers(model, own_seeds)
        initialise(model, own_seeds)
    ready.optimizer.zero_grad()
    for tensor in state_tensors(ready.optimizer):
        tensor.zero_()
    ready.scaler.load_state_dict(ready.first_scale)
    ready.model.train()


def warm_up(ready: Prepared, *seeds: Seeds) -> None:
    """A few throw-away steps of a started model, so that the first epoch is timed like the others.

    Peak memory counts from here: what the steps need, the allocator then has at hand.
    """
    ready.held = machine.reset_peak_memory(ready.device) - bytes_of(ready)
    batches = batches_of(ready.data.train, seeds, epoch=1)
    for step, (x, y) in enumerate(itertools.islice(batches, WARMUP_STEPS)):
        interrupt.obey()
        ready.schedule.apply(ready.optimizer, step)
        with watched(ready, 1, step + 1):
            train_step(ready, x, y)
    forget(ready)


def train(ready: Prepared, seeds: Sequence[Seeds], runs: Sequence[Run], progress: SessionProgress) -> None:
    """Train started models until sessions end: all at their last step, or one by divergence.

    Those that ended have their outcome; the others, all at one step, are given back as they are.

    Args:
        seeds: of every seat, those included whose session is not here.
        runs: the sessions of a pack that are trained; one where nothing is packed.
    Raises: Interrupted. Lost — no session is ours any more.
    """
    config, data, clock = ready.config, ready.data, machine.Stopwatch(ready.device)
    steps_per_epoch, every = data.train.steps_per_epoch, config.eval_every
    row_steps = every.count if every.unit == "steps" else steps_per_epoch
    eval_steps = every.count * (1 if every.unit == "steps" else steps_per_epoch)
    totals, done, boundary = runs[0].course.totals, runs[0].course.step, ranks.Boundary()
    started = time.perf_counter()
    began = {run.course.seat: started - run.course.elapsed_s for run in runs}
    forget(ready)

    def due(epoch_ended: int | None) -> bool:
        return any(run.checkpoints.due(epoch_ended) for run in runs)

    def note(course: Course, step: int) -> None:
        course.step, course.elapsed_s = step, time.perf_counter() - began[course.seat]

    def save(step: int) -> None:
        ours = still_ours(runs)
        write_norms(ready, ours)
        for run in ours:
            note(run.course, step)
            body = run.course.body(ready)
            if ranks.first():
                run.checkpoints.write(body)

    clock.start()
    for step, (epoch, x, y) in enumerate(endless(data, seeds, done), start=done + 1):
        signum, wanted = boundary.ask(interrupt.asked(), due(None))
        if signum:
            clock.stop()
            if runs[0].checkpoints.every is not None:
                save(step - 1)
            raise interrupt.Interrupted(signum)
        lr = ready.schedule.apply(ready.optimizer, step - 1)
        images = data.train.images_in((step - 1) % steps_per_epoch)
        numbers = [own_seeds.number("forward", epoch, step) for own_seeds in seeds]
        with watched(ready, epoch, step):
            totals.add(*train_step(ready, x, y, images, *numbers), y)
        progress.step(images)
        ended = None if step % steps_per_epoch else epoch
        if step % row_steps and step < ready.total_steps:
            if wanted or (ended and ranks.told(due(ended))):
                clock.stop()
                save(step)
                clock.start()
            continue

        clock.stop()
        means = totals.lap()
        last = step == ready.total_steps
        ending = [run for run in runs if last or not math.isfinite(means[run.course.seat].loss)]
        eval_clock, evaluated = machine.Stopwatch(ready.device), runs if step % eval_steps == 0 else ending
        val, test = {}, {}
        if evaluated:
            seats = [run.course.seat for run in evaluated]
            eval_clock.start()
            val = evaluate(ready, data.val, seats, watched=True) if data.val else {}
            test = evaluate(ready, data.test, seats, watched=not data.val)
            eval_clock.stop()
        train_time_s, eval_time_s = clock.lap(), eval_clock.lap() if evaluated else None
        peak_mib = (machine.peak_memory(ready.device) - ready.held) / 2**20
        runs = still_ours(runs)
        write_norms(ready, runs, histograms=True)
        for run in runs:
            course, mean = run.course, means[run.course.seat]
            own_val, own_test = val.get(course.seat), test.get(course.seat)
            row = EpochRow(
                epoch=epoch,
                step=step,
                train_loss=mean.loss,
                train_acc=mean.acc,
                val_loss=own_val.loss if own_val else None,
                val_acc=own_val.acc if own_val else None,
                test_loss=own_test.loss if own_test else None,
                test_acc=own_test.acc if own_test else None,
                lr=lr,
                epoch_time_s=train_time_s if course.timed else None,
                eval_time_s=eval_time_s if own_test else None,
                images_per_s=mean.images / train_time_s if course.timed else None,
                peak_memory_mib=peak_mib,
                finished_at=utc_now(),
            )
            run.write(row, progress)
            if ready.feature_watch and evaluated:
                part = "val" if data.val else "test"
                run.traces.features(row, part, *ready.feature_watch.found(course.seat))
            if own_test:
                course.selection.consider(row, own_test, ready.models[course.seat])
            if run in ending:
                note(course, step)
                run.outcome = course.selection.outcome(course.rows, steps_per_epoch, course.elapsed_s)
                run.weights = course.selection.weights
                if config.checkpoint["keep"]:
                    run.body = {**course.body(ready), "ended": True}
        runs = [run for run in runs if run not in ending]
        if ranks.told(due(ended)):
            save(step)
        if ending:
            for run in runs:
                note(run.course, step)
            return
        clock.start()


@contextlib.contextmanager
def watched(ready: Prepared, epoch: int, step: int) -> Iterator[None]:
    """Around a training step that may be traced."""
    with ready.norm_watch.step(epoch, step) if ready.norm_watch else contextlib.nullcontext():
        yield


def forget(ready: Prepared) -> None:
    """Drop what was traced of steps that no session keeps."""
    if ready.norm_watch:
        ready.norm_watch.clear()


def write_norms(ready: Prepared, runs: Sequence[Run], histograms: bool = False) -> None:
    """Bring what was traced since into the sessions' files; off the clock."""
    if ready.norm_watch is None:
        return
    samples, whole = ready.norm_watch.drain()
    for run in runs:
        run.traces.norms(samples)
        if histograms:
            run.traces.whole_norms(whole)


def bytes_of(ready: Prepared) -> int:
    """What a setting itself holds: parameters, buffers and the optimizer's state."""
    own = [tensor for _, tensor in state_of(ready.model)] + list(state_tensors(ready.optimizer))
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def endless(data: Data, seeds: Sequence[Seeds], done: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Epoch after epoch of training batches, after the `done` first steps; epochs count from 1."""
    whole, start_step = divmod(done, data.train.steps_per_epoch)
    for epoch in itertools.count(1 + whole):
        for x, y in batches_of(data.train, seeds, epoch, start_step):
            yield epoch, x, y
        start_step = 0


def autocast(ready: Prepared) -> torch.autocast:
    """Mixed precision as configured; fp32 switches it off."""
    dtype = AUTOCAST.get(ready.config.precision)
    return torch.autocast(ready.device.type, dtype=dtype, enabled=dtype is not None)


def train_step(
    ready: Prepared, x: Tensor, y: Tensor, images: int | None = None, *seeds: int
) -> tuple[Tensor, Tensor]:
    """One update; returns its loss () and logits (N, classes), still on the device.

    Args:
        x, y: this process's share of the batch; a pack's, see `batches_of`, whose losses are (sessions,).
        images: of the whole batch, over whose mean loss the gradient is taken; None if all shares are alike.
        seeds: what dropout and sampling norms draw from, of every session (none: 0): each part of the batch
            from a number of its own.
    """
    watch = ready.norm_watch if ready.norm_watch and ready.norm_watch.looking else None
    if ready.graphed is not None and watch is None:  # a replay calls no hooks
        return ready.graphed(x, y, seeds[0] if seeds else 0)
    outputs = gradients_of(ready, x, y, images, seeds)
    if watch is not None:
        watch.take(ready.scaler.get_scale())
    update(ready)
    return outputs


def update(ready: Prepared) -> None:
    """Move the weights by the gradients that are there; left out where a scaled one overflowed."""
    ready.scaler.step(ready.optimizer)
    ready.scaler.update()


def gradients_of(
    ready: Prepared, x: Tensor, y: Tensor, images: int | None, seeds: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The gradients of `train_step`, in the parameters; `seeds` of None leave the generators alone."""
    model, cut = ready.parallel or ready.step_model, ready.data.train.cut
    count = images or len(y) * cut.ranks
    ready.optimizer.zero_grad()
    losses, outputs = [], []
    for i, (part, labels) in enumerate(
        zip(x.tensor_split(cut.micros), y.tensor_split(cut.micros), strict=True)
    ):
        if seeds is not None:
            first = cut.rank * cut.micros + i
            draw_from(ready, [seed + first for seed in seeds or [0] * len(ready.models)])
        waits = ready.parallel is not None and i < cut.micros - 1
        with ready.parallel.no_sync() if ready.parallel and waits else contextlib.nullcontext():
            with autocast(ready):
                logits = model(part)
                loss = loss_of(widen(logits), labels, ready.config.optim["label_smoothing"])
            share = len(labels) * cut.ranks / count  # the ranks' gradients are averaged
            total = loss.sum() if loss.ndim else loss  # no session's loss depends on another's parameters
            ready.scaler.scale(total if share == 1 else total * share).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach() * (len(labels) / len(y)) if cut.micros > 1 else loss.detach())
        outputs.append(logits.detach())
    return torch.stack(losses).sum(0), torch.cat(outputs)


def draw_from(ready: Prepared, numbers: Sequence[int]) -> None:
    """Seed what the coming forward pass draws from; in a pack each session's dropout has its own."""
    torch.manual_seed(numbers[0])
    if ready.config.pack:
        for generator, number in zip(
            cast(list[torch.Generator], ready.model.generators), numbers, strict=True
        ):
            generator.manual_seed(number)


def loss_of(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross entropy (); of a pack (N, sessions · classes) and (N, sessions) → (sessions,)."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    each = F.cross_entropy(
        logits.view(labels.numel(), -1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return each.view(labels.shape).mean(0)


@torch.no_grad()
def evaluate(
    ready: Prepared, part: EvalPart, seats: Sequence[int] = (0,), watched: bool = False
) -> dict[int, Evaluation]:
    """Loss and accuracy over a whole part in evaluation mode, by seat; every rank takes some of its batches.

    A pack evaluates each of its sessions' own models on its own: these batches are large enough.
    `watched`: features are traced, where that is wanted.
    """
    share_buffers(ready)
    models = {seat: ready.models[seat] if ready.config.pack else ready.step_model for seat in seats}
    losses: dict[int, list[Tensor]] = {seat: [] for seat in seats}
    predictions: dict[int, list[Tensor]] = {seat: [] for seat in seats}
    for model in models.values():
        model.eval()
    watch = ready.feature_watch if watched else None
    with watch.over({seat: ready.models[seat] for seat in seats}) if watch else contextlib.nullcontext():
        for x, y in part.batches(ranks.rank(), ranks.size()):
            for seat, model in models.items():
                with autocast(ready):
                    logits = model(x)
                losses[seat].append(F.cross_entropy(widen(logits), y, reduction="sum").double())
                predictions[seat].append(logits.argmax(1))
                if watch:
                    watch.logits(seat, logits)
    for model in models.values():
        model.train()
    return {seat: joined(part, losses[seat], predictions[seat]) for seat in seats}


def joined(part: EvalPart, losses: list[Tensor], predictions: list[Tensor]) -> Evaluation:
    """All ranks' batches of a part as one evaluation: summed loss () and predictions (n,) of each batch."""
    sums = torch.stack(losses).cpu() if losses else torch.empty(0)
    sizes = [len(p) for p in predictions]
    guesses = list(torch.split(torch.cat(predictions).cpu(), sizes)) if predictions else []
    found = ranks.gathered((sums, guesses))
    in_order = [(found[i % len(found)], i // len(found)) for i in range(sum(len(own) for own, _ in found))]
    loss = sum(own[at].item() for (own, _), at in in_order)
    truth, guess = part.labels, torch.cat([own[at] for (_, own), at in in_order])
    acc = (truth == guess).double().mean()
    return Evaluation(loss / len(truth), acc.item(), truth, guess)


def share_buffers(ready: Prepared) -> None:
    """Give every rank the buffers of rank 0, as its next training step would."""
    if ready.parallel is not None:
        for buffer in ready.model.buffers():
            torch.distributed.broadcast(buffer, 0)
