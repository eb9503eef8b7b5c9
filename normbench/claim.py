"""Who runs a session: a numbered file with a heartbeat in its folder, so that no two processes run one.

    claim = take(folder, row)      None where a living process has it
    ...
    claim.release()                it may go on elsewhere; claim.remove() once the session is finished

The highest number holds the session: `claim-2.json` after `claim-1.json`. Taking over a dead claim is making
the next number, which only one process can (a hard link that is there already fails), so of many that see a
claim die one wins. Numbers only rise until the session is finished; whoever wins looks again whether it is.

A claim is dead when it was released, when its process is gone (seen at once from the same machine), when it
belonged to an earlier start of the same Slurm job, or when its heart has not beaten for STALE_S seconds by
the clock of the file system.
"""

import contextlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from normbench.plan import utc_now, write_json

BEAT_S = 10.0
STALE_S = 90.0


class Lost(RuntimeError):
    """Another process took the claim over, as this one seemed dead; what is half done must not be written."""


@dataclass(frozen=True)
class Claim:
    """One process's claim on a session.

    Args:
        folder: the session's.
        number: of the claim's file; the highest holds.
        host: the machine's name.
        machine: its boot and process namespace, within which `pid` and `born` name one process.
        pid: of the process.
        born: when the process started, in the machine's own ticks; "" where unknown.
        job: Slurm's id of the job and how often it had been restarted; None outside Slurm.
        since: when it was claimed.
        row: the result row's columns that are known before a session trains.
        released: the process gave it up.
    """

    folder: Path
    number: int
    host: str
    machine: str
    pid: int
    born: str
    job: tuple[str, int] | None
    since: str
    row: Mapping[str, Any]
    released: bool = False

    @property
    def path(self) -> Path:
        """`claim-<number>.json`."""
        return self.folder / f"claim-{self.number}.json"

    @property
    def alive(self) -> bool:
        """Whether its process may still be at work."""
        if self.released:
            return False
        if self.machine == this_machine():
            if self.pid == os.getpid():
                return self.path.absolute() in hearts.paths
            return runs(self.pid, self.born)
        mine = slurm_job()
        if self.job is not None and mine is not None and self.job[0] == mine[0] and self.job[1] < mine[1]:
            return False
        return self.silent_s() < STALE_S

    def silent_s(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file system."""
        try:
            with tempfile.NamedTemporaryFile(prefix=".now-", dir=self.folder) as now:
                return os.stat(now.name).st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return STALE_S
        except OSError:  # a folder that is only ours to read: by this machine's clock
            return time.time() - self.path.stat().st_mtime

    def held(self) -> None:
        """Lost where another process has taken it over, or the folder is gone."""
        there = numbers(self.folder)
        if there[-1:] != [self.number]:
            how = "was taken over by another process" if there else "was removed while its session ran"
            raise Lost(f"{self.folder} {how}")

    def release(self) -> None:
        """Give it up; the next to come may go on at once, on any machine."""
        hearts.discard(self.path)
        with contextlib.suppress(OSError, Lost):
            self.held()
            write_json(self.path, replace(self, released=True).body)

    def remove(self) -> None:
        """Take every claim away; for a finished session, whose own file keeps others off."""
        hearts.discard(self.path)
        for number in numbers(self.folder):
            (self.folder / f"claim-{number}.json").unlink(missing_ok=True)

    @property
    def body(self) -> dict[str, Any]:
        """What its file holds."""
        return {key: value for key, value in asdict(self).items() if key not in ("folder", "number")}


def take(folder: Path, row: Mapping[str, Any]) -> Claim | None:
    """Claim a session for this process; None where a living process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = holder(folder)
    if before is not None and before.alive:
        return None
    number = 1 if before is None else before.number + 1
    pid = os.getpid()
    mine = Claim(folder, number, platform.node(), this_machine(), pid, born(pid), slurm_job(), utc_now(), row)
    if not make(mine):
        return None
    there = numbers(folder)
    if there[-1:] != [number]:
        mine.path.unlink(missing_ok=True)
        return None
    for earlier in there[:-1]:
        (folder / f"claim-{earlier}.json").unlink(missing_ok=True)
    hearts.add(mine.path)
    return mine


def make(claim: Claim) -> bool:
    """Write the claim's file whole unless there is one of its number; whether it was written."""
    text = json.dumps(claim.body, ensure_ascii=False)
    handle, name = tempfile.mkstemp(prefix=".claim-", dir=claim.folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        try:
            os.link(name, claim.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            with claim.path.open("x") as file:
                file.write(text)
    except FileExistsError:
        return False
    finally:
        Path(name).unlink(missing_ok=True)
    return True


def holder(folder: Path) -> Claim | None:
    """The claim that holds a session or held it last; None where there is none."""
    for number in reversed(numbers(folder)):
        path = folder / f"claim-{number}.json"
        try:
            body = json.loads(path.read_text())
            job = None if body["job"] is None else (str(body["job"][0]), int(body["job"][1]))
            claim = Claim(folder, number, **{**body, "job": job})
            if not (isinstance(claim.pid, int) and isinstance(claim.row, dict)):
                raise TypeError
            return claim
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):  # not written to its end; dead when it stays so
            return Claim(folder, number, "?", "?", 0, "", None, "", {})
    return None


def running(folder: Path) -> bool:
    """Whether a living process has the session."""
    held = holder(folder)
    return held is not None and held.alive


def numbers(folder: Path) -> list[int]:
    """The numbers of a folder's claims, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = (name[len("claim-") : -len(".json")] for name in names if name.startswith("claim-"))
    return sorted(int(text) for text in found if text.isdecimal())


@cache
def this_machine() -> str:
    """This boot of the machine and the process namespace: within them a pid and its birth are one process."""
    words = [platform.node()]
    with contextlib.suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


def born(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def runs(pid: int, birth: str) -> bool:
    """Whether the process that was born then is there; one that has ended and was not waited for is not."""
    with contextlib.suppress(OSError, IndexError):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X"):
            return False
    try:
        with contextlib.suppress(PermissionError):  # another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return born(pid) == birth


def slurm_job() -> tuple[str, int] | None:
    """Slurm's id of the job that this process is, and how often it was restarted."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    step = os.environ.get("SLURM_PROCID", "0")
    return f"{job}.{step}", int(os.environ.get("SLURM_RESTART_COUNT", "0"))


class Hearts:
    """Touches the files of this process's claims every BEAT_S seconds, from a thread of its own."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()
        self.thread: threading.Thread | None = None

    def add(self, path: Path) -> None:
        """Begin to beat."""
        self.paths.add(path.absolute())
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.beat, name="heartbeat", daemon=True)
            self.thread.start()

    def discard(self, path: Path) -> None:
        """Beat no more."""
        self.paths.discard(path.absolute())

    def beat(self) -> None:
        """Until the process ends."""
        while True:
            for path in tuple(self.paths):
                with contextlib.suppress(OSError):
                    os.utime(path)
            time.sleep(BEAT_S)


hearts = Hearts()
