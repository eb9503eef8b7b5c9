"""What a search leaves on the disk: every trial, a row that is written at once, and the range tests.

A folder belongs to one question. Its trials are known by setting, seed, session and rate; so the same command
goes on where it was stopped, and one with more sessions, or other arms, starts from what is there.
"""

import csv
import dataclasses
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normbench import device as machine
from normbench.plan import utc_now, write_whole
from normbench.results import git_commit
from normbench.values import Refused


class Place(NamedTuple):
    """What names a trial."""

    config_hash: str
    seed: int
    session: int
    rate: float


@dataclass(frozen=True)
class Machine:
    """On what, and with what, a trial ran: other bits elsewhere, so a search stays on one."""

    device_name: str
    threads: int
    torch_version: str

    @classmethod
    def here(cls, device: torch.device, threads: int | None) -> "Machine":
        """This process."""
        return cls(machine.name_of(device), threads or machine.share(), torch.__version__)


@dataclass(frozen=True)
class Trial:
    """One row of trials.csv: one session at one rate.

    Args:
        arm: its short name; `config_hash`: of its setting without the rate.
        purpose: why this rate was tried: bracket, bisect or widen.
        failed: 0 or 1; `reason`: non_finite, loss, accuracy, or "" where it trained.
        steps: made. final_loss, eval_loss: nats; eval_acc: fraction; None where it did not get there.
        wall_s: seconds, start and evaluation included.
    """

    arm: str
    config_hash: str
    seed: int
    session: int
    rate: float
    purpose: str
    failed: int
    reason: str
    steps: int
    final_loss: float | None
    eval_loss: float | None
    eval_acc: float | None
    wall_s: float
    finished_at: str
    device_name: str
    threads: int
    torch_version: str
    hostname: str
    git_commit: str | None

    @classmethod
    def of(cls, arm: str, place: Place, purpose: str, found: Mapping[str, Any], where: Machine) -> "Trial":
        """A trial that ended just now."""
        return cls(
            arm=arm,
            **place._asdict(),
            purpose=purpose,
            **found,
            finished_at=utc_now(),
            **dataclasses.asdict(where),
            hostname=platform.node(),
            git_commit=git_commit(),
        )

    @property
    def place(self) -> Place:
        """What names it."""
        return Place(self.config_hash, self.seed, self.session, self.rate)

    @property
    def where(self) -> Machine:
        """What it ran on."""
        return Machine(self.device_name, self.threads, self.torch_version)


NUMBERS: Mapping[str, type] = {
    **dict.fromkeys(("seed", "session", "failed", "steps", "threads"), int),
    **dict.fromkeys(("rate", "final_loss", "eval_loss", "eval_acc", "wall_s"), float),
}


class Trials:
    """trials.csv: what is there is read, what comes is appended and flushed. A torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Place, Trial] = {}
        self.columns = [f.name for f in fields(Trial)]
        if path.is_file():
            self.rows = {trial.place: trial for trial in self.read()}
        write_whole(path, table(self.columns, map(dataclasses.astuple, self.rows.values())))
        self.file = path.open("a", newline="")

    def read(self) -> list[Trial]:
        """The trials in the file; Refused where it is no such table."""
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1]
        rows = csv.reader(io.StringIO(lines))
        if next(rows, None) != self.columns:
            raise Refused(f"{self.path} is no table of trials of this version; move it away or give a name=…")
        try:
            return [trial_of(dict(zip(self.columns, row, strict=True))) for row in rows]
        except ValueError as error:
            raise Refused(
                f"{self.path} is damaged ({error}); move it away to run its trials again"
            ) from error

    def same_machine(self, here: Machine, hashes: Iterable[str]) -> None:
        """Refused where trials of these settings ran on something that gives other bits."""
        ours = set(hashes)
        for trial in self.rows.values():
            if trial.config_hash in ours and trial.where != here:
                was, now = dataclasses.asdict(trial.where), dataclasses.asdict(here)
                key = next(key for key in was if was[key] != now[key])
                cure = f"threads={trial.threads} or another name=…" if key == "threads" else "another name=…"
                raise Refused(
                    f"{self.path} has trials with {key} {was[key]}, here it is {now[key]}; give {cure}"
                )

    def there(self) -> str:
        """How many trials there are, and what other commits ran them."""
        said = f"{len(self.rows)} trials there"
        others = {trial.git_commit or "none" for trial in self.rows.values()} - {git_commit() or "none"}
        return said + (f", some by other code: commit {', '.join(sorted(others))}" if others else "")

    def add(self, trial: Trial) -> None:
        """Write one row through to the file."""
        self.rows[trial.place] = trial
        csv.writer(self.file, lineterminator="\n").writerow(dataclasses.astuple(trial))
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def trial_of(row: Mapping[str, str]) -> Trial:
    """A row as it stands in the file."""
    values: dict[str, Any] = {}
    for column, text in row.items():
        optional = column in ("final_loss", "eval_loss", "eval_acc", "git_commit")
        values[column] = None if optional and not text else NUMBERS.get(column, str)(text)
    return Trial(**values)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file's text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True)
class Range:
    """An arm's range test, a run of session 0: the rates of its steps, and the training losses (nats).

    Losses end with the first that is not finite; in the file the rates do too.
    """

    arm: str
    config_hash: str
    seed: int
    rates: Sequence[float]
    losses: Sequence[float]


RANGE_COLUMNS = ["arm", "config_hash", "seed", "step", "rate", "train_loss"]


def read_ranges(path: Path) -> dict[tuple[str, int], Range]:
    """The range tests in the file, by config hash and seed; none where there is no file."""
    if not path.is_file():
        return {}
    found: dict[tuple[str, int], Range] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != RANGE_COLUMNS:
            raise Refused(f"{path} is no range test of this version; move it away or give a name=…")
        for row in reader:
            key = row["config_hash"], int(row["seed"])
            before = found.get(key, Range(row["arm"], *key, [], []))
            rates, losses = [*before.rates, float(row["rate"])], [*before.losses, float(row["train_loss"])]
            found[key] = dataclasses.replace(before, rates=rates, losses=losses)
    return found


def write_ranges(path: Path, ranges: Iterable[Range]) -> None:
    """All arms' range tests, whole."""
    rows = [
        (each.arm, each.config_hash, each.seed, step, rate, loss)
        for each in ranges
        for step, (rate, loss) in enumerate(zip(each.rates, each.losses, strict=False), start=1)
    ]
    write_whole(path, table(RANGE_COLUMNS, rows))
