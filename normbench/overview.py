"""What every session of a sweep is doing, as its folder says; reads little, and nothing of torch.

A session is done (session.json), running (the claim of a living process), failed or waiting to be tried again
(failure.json), interrupted (it trained, and no process has it), or waiting.
"""

import contextlib
import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normbench.checkpoint import epoch_of
from normbench.claim import Claim, holder
from normbench.identity import short_names
from normbench.plan import Plan, failure_in
from normbench.results import folders_in, row_from, session_names
from normbench.values import Refused

TIMED = 5  # finished sessions of an arm whose times are read: the newest


@dataclass(frozen=True)
class Reached:
    """How far a session that runs has come, by its epochs.csv; zeros and None before the first row.

    Args:
        epoch, step: of the last row; None where there is none.
        images_per_s: of the last row that was timed.
        trained_s: of all rows, training and evaluation.
        at: when the last row was written.
    """

    epoch: int | None = None
    step: int | None = None
    images_per_s: float | None = None
    trained_s: float = 0.0
    at: datetime | None = None

    @classmethod
    def of(cls, folder: str) -> "Reached":
        """From the rows there are; a row that is being written is left for the next look."""
        try:
            text = Path(folder, "epochs.csv").read_text()
            rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
            last = rows[-1]
            rates = [float(row["images_per_s"]) for row in rows if row["images_per_s"]]
            spent = sum(float(row[key] or 0) for row in rows for key in ("epoch_time_s", "eval_time_s"))
            at = datetime.fromisoformat(last["finished_at"])
            return cls(int(last["epoch"]), int(last["step"]), rates[-1] if rates else None, spent, at)
        except (FileNotFoundError, IndexError, KeyError, TypeError, ValueError):
            return cls()  # no row, or none that can be read


@dataclass(frozen=True)
class Running:
    """A session that a living process has.

    Args:
        name: of its folder.
        claim: the process's.
        silent_s: seconds since its last sign of life.
        reached: how far it has come.
        part: of its training that is done, 0 to 1; None where nothing says it.
    """

    name: str
    claim: Claim
    silent_s: float
    reached: Reached
    part: float | None

    def left_s(self, session_s: float, now: datetime) -> float:
        """Seconds until it ends where a whole session takes so many."""
        last = max(filter(None, (self.reached.at, since(self.claim))), default=now)
        return max(0.0, session_s * (1 - (self.part or 0)) - (now - last).total_seconds())


@dataclass(frozen=True)
class Failure:
    """A session whose last attempt ended in an error."""

    name: str
    error: str
    attempts: int


@dataclass
class Arm:
    """The sessions of one arm by what they are doing; `settled` will not run, as the statistics have enough.

    `session_s` is what a session takes: the mean of the newest that ended, else what the running ones will.
    """

    name: str
    planned: int = 0
    done: int = 0
    settled: int = 0
    waiting: int = 0
    running: list[Running] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    interrupted: list[tuple[str, int | None]] = field(default_factory=list)
    session_s: float | None = None

    @property
    def left(self) -> int:
        """Sessions that have not ended and may."""
        return self.waiting + len(self.interrupted) + len(self.running)

    def work_s(self, now: datetime) -> float | None:
        """Seconds of training left, were one session run after another; None where nothing says it."""
        if not self.left:
            return 0.0
        if self.session_s is None:
            return None
        idle = self.waiting + len(self.interrupted)  # an interrupted one at most as long as a new one
        return idle * self.session_s + sum(r.left_s(self.session_s, now) for r in self.running)


@dataclass(frozen=True)
class Overview:
    """A sweep's arms, at one moment."""

    arms: Sequence[Arm]
    now: datetime

    @property
    def at_once(self) -> int:
        """Sessions that run now."""
        return sum(len(arm.running) for arm in self.arms)

    @property
    def ended(self) -> bool:
        """Whether nothing is left that a sweep would run."""
        return not any(arm.left for arm in self.arms)

    def to_go_s(self, arm: Arm | None = None) -> float | None:
        """Seconds until an arm, or all, have ended; None where nothing runs or an arm's time is unknown."""
        arms = self.arms if arm is None else [arm]
        work = [some.work_s(self.now) for some in arms]
        known = [seconds for seconds in work if seconds is not None]
        if len(known) < len(work) or not (self.at_once or self.ended):
            return None
        longest = [
            r.left_s(a.session_s, self.now) for a in arms for r in a.running if a.session_s is not None
        ]
        return max([sum(known) / max(1, self.at_once), *longest])


def look(study: Path, everything: bool = False) -> Overview:
    """What the newest plan's sessions are doing, or with `everything` all that have a folder."""
    plan = None if everything else Plan.newest(study)
    if plan is None:
        sessions: dict[str, list[str]] = {}
        for path in session_names(study):
            setting, _, name = path.partition("/")
            sessions.setdefault(setting, []).append(name)
        ids = {setting: setting.rpartition("-")[0] for setting in sessions}
    else:
        ids = {arm.setting: arm.arm for arm in plan.arms}
        sessions = {setting: [] for setting in ids}
        for planned in plan.sessions:
            sessions[plan.arms[planned.arm].setting].append(plan.session_folder(planned).name)
    if not any(sessions.values()):
        raise Refused(nothing_in(study))
    names = short_names(ids)
    settled = settled_arms(study, plan)
    arms = [arm_of(study / s, name, sessions[s], s in settled) for s, name in names.items()]
    return Overview(arms, datetime.now(UTC))


def nothing_in(study: Path) -> str:
    """The refusal of a folder without sessions, with the studies that are near."""
    for folder in (study, study.parent):
        near = [folder / name for name in folders_in(str(folder)) if is_study(folder / name)]
        if near:
            return f"no sessions under {study}; there are {', '.join(map(str, near))}"
    return f"no sessions under {study}; give a study's folder like outputs/adhoc"


def is_study(folder: Path) -> bool:
    """Whether a folder has a plan or sessions."""
    return any(folder.glob("plan-*.json")) or any(session_names(folder))


def settled_arms(study: Path, plan: Plan | None) -> set[str]:
    """The settings that the looks at a plan have stopped."""
    if plan is None or not any(study.glob("looks-*.json")):
        return set()
    from normbench.stats.sequential import Looks
    from normbench.waves import looks_path, settled

    path = study / looks_path(plan).name
    return {plan.arms[arm].setting for arm in settled(plan, Looks.read(path))} if path.is_file() else set()


def arm_of(setting: Path, name: str, sessions: Sequence[str], settled: bool) -> Arm:
    """Sort an arm's sessions by what they are doing."""
    arm, there = Arm(name, planned=len(sessions)), set(folders_in(str(setting)))
    ended: list[tuple[int, str]] = []
    for session in sessions:
        folder = f"{setting}/{session}"
        if session not in there:
            wait(arm, settled)
        elif (finished := place(arm, session, folder, settled)) is not None:
            ended.append((finished, folder))
    arm.done = len(ended)
    newest = [folder for _, folder in sorted(ended)[-TIMED:]]
    steps = Reached.of(newest[-1]).step if newest and arm.running else None
    arm.running = [with_part(running, steps) for running in arm.running]
    arm.session_s = session_time(newest, arm.running)
    return arm


def place(arm: Arm, session: str, folder: str, settled: bool) -> int | None:
    """Add a session that has a folder; one that is finished is only returned: when that was, in ns."""
    with contextlib.suppress(FileNotFoundError):
        return os.stat(f"{folder}/session.json").st_mtime_ns
    try:
        names = os.listdir(folder)
        claim = holder(Path(folder)) if any(name.startswith("claim-") for name in names) else None
        if claim is not None and claim.alive:
            arm.running.append(Running(session, claim, claim.silent_s(), Reached.of(folder), None))
            return None
        failure = failure_in(Path(folder)) if "failure.json" in names else {}
        row = row_from(folder, "failure.json") if failure else None
    except FileNotFoundError:  # it ended, or went away, while we looked
        if os.path.isdir(folder):
            return place(arm, session, folder, settled)
        wait(arm, settled)
        return None
    if row is not None and row["status"] == "failed" and not failure.get("again"):
        arm.failed.append(Failure(session, row["error"] or "", int(failure.get("attempt", 1))))
    elif settled or failure.get("again") or not (failure or claim or "epochs.csv" in names):
        wait(arm, settled)
    else:
        arm.interrupted.append((session, epoch_of(Path(folder))))
    return None


def wait(arm: Arm, settled: bool) -> None:
    """Add a session that nothing has begun."""
    arm.settled += settled
    arm.waiting += not settled


def with_part(running: Running, steps: int | None) -> Running:
    """With the part that is done: by the steps that a finished session of the arm took, else by its plan."""
    row, reached = running.claim.row, running.reached
    total, done = (
        (row.get("epochs"), reached.epoch) if row.get("steps") is None else (row["steps"], reached.step)
    )
    if steps is not None:
        total, done = steps, reached.step
    part = min(1.0, (done or 0) / total) if total else None
    return Running(running.name, running.claim, running.silent_s, reached, part)


def session_time(finished: Sequence[str], running: Sequence[Running]) -> float | None:
    """Seconds that a session takes; those that diverged ended early and say nothing."""
    rows: list[Mapping[str, Any]] = []
    for folder in finished:
        with contextlib.suppress(Refused):  # damaged; `results` says so
            rows += [row] if (row := row_from(folder, "session.json")) else []
    took = [float(row["total_time_s"]) for row in rows if row["status"] == "ok" and row["total_time_s"]]
    took = took or [r.reached.trained_s / r.part for r in running if r.part]
    return statistics.fmean(took) if took else None


def since(claim: Claim) -> datetime | None:
    """When a session was claimed; None where its claim cannot be read."""
    try:
        return datetime.fromisoformat(claim.since)
    except ValueError:
        return None
