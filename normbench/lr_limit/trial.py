"""One session at one learning rate, and whether it trained: what failure means in this door.

A session at a rate is the session that `train` would run with `optim.lr` at that rate, bit for bit. It failed
if one of these holds, the first that does is its reason:

    non_finite   the loss of a training step, or of the evaluation at the end, is not finite; or a layer had a
                 matrix to decompose that is not
    loss         the mean training loss of the last fifth of the steps is not below the entropy of the
                 training labels, which a model reaches that knows their frequencies and looks at no image
    accuracy     accuracy at the end, in evaluation mode, is at most p + 2·√(p(1 − p)/n), with p the share of
                 the commonest class among the n images: within two standard errors of naming that class

The images are the validation part's where `dataset.val_fraction` makes one, else the test set's.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not to types

from normbench import interrupt
from normbench.data.loading import Data, EvalPart
from normbench.optim import Schedule
from normbench.seeds import Seeds
from normbench.training import Prepared, endless, evaluate, settings_of, start, train_step

LAST = 5  # the final loss is that of the last 1/LAST of the steps
LOOK_EVERY = 10  # steps between looks at the losses, each of which waits for the device


@dataclass(frozen=True)
class Chance:
    """What guessing reaches on this data set.

    Args:
        loss: entropy of the training labels, smoothed as `optim.label_smoothing` has it, nats.
        acc: share of the commonest class among the images judged.
        bound: the accuracy that is not above chance, two standard errors over `acc`.
        part: whose images are judged, val or test; `images`: how many.
    """

    loss: float
    acc: float
    bound: float
    part: str
    images: int

    @classmethod
    def of(cls, data: Data, label_smoothing: float) -> "Chance":
        """From the labels alone."""
        labels = data.train.source.labels.cpu()[data.train.index]
        share = labels.bincount(minlength=data.num_classes).double() / len(labels)
        share = (1 - label_smoothing) * share + label_smoothing / len(share)
        judged = judged_part(data)
        acc = float(judged.labels.bincount().max() / judged.num_samples)
        error = math.sqrt(acc * (1 - acc) / judged.num_samples)
        part = "val" if data.val else "test"
        return cls(float(torch.special.entr(share).sum()), acc, acc + 2 * error, part, judged.num_samples)


@dataclass(frozen=True)
class Outcome:
    """How a session at a rate ended.

    Args:
        reason: why it failed, non_finite, loss or accuracy; "" where it trained.
        steps: made, the one that failed included.
        final_loss: mean training loss of the last fifth of the steps, nats; None where it did not get there.
        eval_loss, eval_acc: of the images judged, at the end; None where it did not get there.
    """

    reason: str
    steps: int
    final_loss: float | None
    eval_loss: float | None
    eval_acc: float | None

    @property
    def failed(self) -> bool:
        """Whether it did not train."""
        return bool(self.reason)


def judged_part(data: Data) -> EvalPart:
    """The images that tell at the end whether a session trained."""
    return data.val or data.test


def run_trial(ready: Prepared, seeds: Seeds, rate: float, chance: Chance) -> Outcome:
    """Train one session at this rate, in the model that is there, and judge it.

    Raises: Interrupted — a signal came; nothing of the session is kept.
    """
    ready.schedule.lr = rate
    with settings_of(ready.config, ready.device):
        losses = until_not_finite(training_losses(ready, seeds))
        if not math.isfinite(losses[-1]):
            return Outcome("non_finite", len(losses), None, None, None)
        try:
            found = evaluate(ready, judged_part(ready.data))[0]
        except LinAlgError:
            return Outcome("non_finite", len(losses), final_of(losses), None, None)
    return judged(losses, found.loss, found.acc, chance)


def range_test(ready: Prepared, seeds: Seeds, rates: Sequence[float]) -> list[float]:
    """The training loss of each step of one run whose rate grows: step i is made with `rates[i]`.

    Ends with the first loss that is not finite. `ready` keeps its own schedule and steps.
    """
    ours, steps = ready.schedule, ready.total_steps
    ready.schedule, ready.total_steps = Growing(ours, rates), len(rates)
    try:
        with settings_of(ready.config, ready.device):
            return until_not_finite(training_losses(ready, seeds))
    finally:
        ready.schedule, ready.total_steps = ours, steps


class Growing(Schedule):
    """A rate for each step in place of a schedule's; momentum stays what it was."""

    def __init__(self, other: Schedule, rates: Sequence[float]) -> None:
        self.rates, self.momentum = rates, other.momentum

    def at(self, step: int) -> tuple[float, float | None]:
        """lr and momentum of the update number `step`, counted from 0."""
        return self.rates[step], self.momentum


def judged(losses: Sequence[float], eval_loss: float, eval_acc: float, chance: Chance) -> Outcome:
    """The verdict on a session that came to its last step."""
    final, reason = final_of(losses), ""
    if not math.isfinite(eval_loss):
        reason = "non_finite"
    elif final >= chance.loss:
        reason = "loss"
    elif eval_acc <= chance.bound:
        reason = "accuracy"
    return Outcome(reason, len(losses), final, eval_loss, eval_acc)


def final_of(losses: Sequence[float]) -> float:
    """The mean of the last fifth."""
    last = losses[-max(1, len(losses) // LAST) :]
    return sum(last) / len(last)


def training_losses(ready: Prepared, seeds: Seeds) -> Iterator[list[float]]:
    """Start the session afresh and train it; the losses of every few steps, in nats.

    A layer that cannot decompose its matrix has a loss of NaN, and nothing comes after it.
    """
    start(ready, seeds)
    train, waiting = ready.data.train, list[Tensor]()
    for step, (epoch, x, y) in enumerate(endless(ready.data, [seeds]), start=1):
        interrupt.obey()
        ready.schedule.apply(ready.optimizer, step - 1)
        images = train.images_in((step - 1) % train.steps_per_epoch)
        try:
            loss, _ = train_step(ready, x, y, images, seeds.number("forward", epoch, step))
        except LinAlgError:
            yield [*torch.stack(waiting).tolist(), math.nan] if waiting else [math.nan]
            return
        waiting.append(loss.clone())  # a recorded step writes the next loss over it
        if step % LOOK_EVERY == 0 or step == ready.total_steps:
            yield torch.stack(waiting).tolist()
            waiting = []
        if step == ready.total_steps:
            return


def until_not_finite(chunks: Iterable[list[float]]) -> list[float]:
    """All losses up to the first that is not finite, that one included."""
    losses: list[float] = []
    for chunk in chunks:
        for loss in chunk:
            losses.append(loss)
            if not math.isfinite(loss):
                return losses
    return losses
