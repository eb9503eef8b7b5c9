"""How far a session has come: totals, rows and the reported evaluation, and how a checkpoint keeps them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from normbench import device as machine
from normbench import ranks
from normbench.building import state_of
from normbench.checkpoint import Checkpoints
from normbench.claim import Lost
from normbench.config import Config
from normbench.doors import say
from normbench.packing import own
from normbench.progress import SessionProgress
from normbench.results import EpochRow, EpochTable, Outcome
from normbench.scalars import Scalars
from normbench.traces.writing import SessionTraces

if TYPE_CHECKING:
    from normbench.training import Prepared


@dataclass(frozen=True)
class Evaluation:
    """Loss (mean, nats) and accuracy over one part; `labels` and `predictions` (n,) on the CPU."""

    loss: float
    acc: float
    labels: Tensor
    predictions: Tensor


class Course:
    """How far a session has come, and the checkpoint that says so.

    `seat` is the session's place in its pack, 0 for one alone; `totals` are all its pack's. `timed` is false
    while the row in progress began in another process.
    """

    def __init__(self, ready: "Prepared", seat: int, totals: "Totals") -> None:
        self.seat, self.totals, self.selection = seat, totals, Selection(ready.config)
        self.rows: list[EpochRow] = []
        self.step, self.elapsed_s, self.timed = 0, 0.0, True

    def body(self, ready: "Prepared") -> dict[str, Any]:
        """Everything that the rest of the session depends on, in plain types and tensors."""
        seats = len(ready.models)
        return {
            "epoch": 1 + max(0, self.step - 1) // ready.data.train.steps_per_epoch,
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "threads": torch.get_num_threads(),
            "model": {name: self.alone(ready, tensor) for name, tensor in state_of(ready.models[self.seat])},
            "optimizer": {
                index: {key: self.alone(ready, own(value, self.seat, seats)) for key, value in state.items()}
                for index, state in ready.optimizer.state_dict()["state"].items()
            },
            "scaler": ready.scaler.state_dict(),
            "totals": ranks.gathered(self.totals.body(self.seat)),
            "rows": [asdict(row) for row in self.rows],
            "selection": self.selection.body(),
        }

    @staticmethod
    def alone(ready: "Prepared", value: Any) -> Any:
        """A value for the checkpoint; a pack's tensors hold every session's numbers, so a copy of its own."""
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone() if len(ready.models) > 1 else value.detach()

    @classmethod
    @torch.no_grad()
    def resumed(cls, ready: "Prepared", seat: int, totals: "Totals", body: Mapping[str, Any]) -> "Course":
        """Go on from a checkpoint: writes its state over a started session's, in place."""
        course = cls(ready, seat, totals)
        course.step, course.elapsed_s = body["step"], body["elapsed_s"]
        course.rows = [EpochRow(**row) for row in body["rows"]]
        course.totals.restore(seat, body["totals"][ranks.rank()])
        course.timed = not course.totals.images
        course.selection.restore(body["selection"], course.rows)
        for name, tensor in state_of(ready.models[seat]):
            tensor.copy_(body["model"][name])
        there = ready.optimizer.state_dict()["state"]
        for index, state in body["optimizer"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    own(there[index][key], seat, len(ready.models)).copy_(value)
        ready.scaler.load_state_dict(body["scaler"])
        machine.use_threads(body["threads"])  # equal bits are promised for equal threads
        return course


@dataclass(eq=False)
class Run:
    """One session while it trains: how far it is, and what it writes.

    `outcome`, the reported `weights` and, to be kept, the last step's `body` are there when it has ended;
    `lost`: another process took it.
    """

    title: str
    course: Course
    table: EpochTable
    scalars: Scalars
    traces: SessionTraces
    checkpoints: Checkpoints
    outcome: Outcome | None = None
    weights: dict[str, Tensor] | None = None
    body: dict[str, Any] | None = None
    lost: bool = False

    def write(self, row: EpochRow, progress: SessionProgress) -> None:
        """Add a row to all that shows it."""
        self.course.rows.append(row)
        self.course.timed = True
        self.table.append(row)
        self.scalars.write(row)
        progress.row(row, self.title)


def still_ours(runs: Sequence[Run]) -> list[Run]:
    """The sessions whose claims this process still holds; Lost where it holds none."""
    kept: list[Run] = []
    for run in runs:
        try:
            run.checkpoints.held()
            kept.append(run)
        except Lost as lost:
            run.lost = True
            if len(runs) == 1:
                raise
            say(str(lost), error=True)
    if not kept:
        raise Lost(f"no session of the pack of {runs[0].title} is left")
    return kept


class Selection:
    """Which evaluation a session reports: the last, or the best on the validation part."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.row: EpochRow | None = None
        self.test: Evaluation | None = None
        self.weights: dict[str, Tensor] = {}

    def consider(self, row: EpochRow, test: Evaluation, model: nn.Module) -> None:
        """Take this evaluation in place of the reported one if it should be; the test set has no say."""
        best = self.row.val_acc if self.row is not None and self.config.select == "best_val" else None
        if best is not None and row.val_acc is not None and row.val_acc <= best:
            return
        self.row, self.test = row, test
        if self.config.save_model:
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def body(self) -> dict[str, Any]:
        """For a checkpoint."""
        test = None if self.test is None else asdict(self.test)
        return {"step": None if self.row is None else self.row.step, "test": test, "weights": self.weights}

    def restore(self, body: Mapping[str, Any], rows: Sequence[EpochRow]) -> None:
        """From a checkpoint, whose rows hold the reported one."""
        self.row = next((row for row in rows if row.step == body["step"]), None)
        self.test = None if body["test"] is None else Evaluation(**body["test"])
        self.weights = dict(body["weights"])

    def outcome(self, rows: list[EpochRow], steps_per_epoch: int, total_time_s: float) -> Outcome:
        """How the session ended."""
        if self.row is None or self.test is None:
            raise RuntimeError("a run ended without an evaluation")
        f1 = macro_f1(self.test.labels, self.test.predictions)
        status = "ok" if math.isfinite(rows[-1].train_loss) else "diverged"
        return Outcome(status, rows, self.row, f1, steps_per_epoch, total_time_s)


def macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """scikit-learn's, of the classes that occur."""
    from sklearn.metrics import f1_score  # no small import: a session's end is early enough

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


class Totals:
    """This rank's loss and correct answers added up on the device, for each session of a pack; `lap` alone
    synchronizes the host."""

    def __init__(self, device: torch.device, sessions: int = 1) -> None:
        self.loss = torch.zeros(sessions, dtype=torch.float64, device=device)
        self.correct = torch.zeros(sessions, dtype=torch.long, device=device)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Add one batch: its mean loss (), logits (N, classes) and labels (N,); those of a pack are
        (sessions,), (N, sessions · classes) and (N, sessions)."""
        self.loss += loss.double() * len(y)
        self.correct += (logits.view(*y.shape, -1).argmax(-1) == y).sum(0)
        self.images += len(y)

    def body(self, seat: int) -> dict[str, Any]:
        """For a session's checkpoint."""
        return {"loss": self.loss[seat].cpu(), "correct": self.correct[seat].cpu(), "images": self.images}

    def restore(self, seat: int, body: Mapping[str, Any]) -> None:
        """From a session's checkpoint."""
        self.loss[seat].copy_(body["loss"])
        self.correct[seat].copy_(body["correct"])
        self.images = body["images"]

    def lap(self) -> "list[Mean]":
        """Each session's means of all ranks since the last lap; counts from zero again."""
        means = []
        for own_loss, own_correct in torch.stack([self.loss, self.correct.double()], 1).tolist():
            loss, correct, images = ranks.summed(own_loss, own_correct, self.images)
            means.append(Mean(int(images), loss / images, correct / images))
        self.images = 0
        self.loss.zero_()
        self.correct.zero_()
        return means


class Mean(NamedTuple):
    """Loss (nats) and accuracy over so many images."""

    images: int
    loss: float
    acc: float
