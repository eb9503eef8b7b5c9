"""One machine, several sessions at once: a fresh process per slot, its device pinned, its share of the cores.

    run_slots(job, slots)     every slot walks the plan (`worker`) until nothing is left to claim

A process that dies takes only its session with it: the launcher writes down what it was and starts another.
A signal is handed on; the workers write checkpoints, and nothing is left running. Where the launcher itself
is killed, its workers notice and stop the same way.
"""

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from normbench import claim as claims
from normbench import failure
from normbench.device import SLOTS, cores
from normbench.interrupt import SIGNALS, Interrupted, handled_by
from normbench.plan import Plan
from normbench.worker import MORE, STOPPED, FailedFast

ORDERLY = tuple(128 + signum for signum in SIGNALS)  # asked to stop, and did so with a checkpoint
IN_VAIN = 3  # processes that may be killed in a row before they have a session


class Broken(RuntimeError):
    """A worker could not work at all; its own stderr says why."""


@dataclass(frozen=True)
class Job:
    """What all slots work on.

    Args:
        plan: the plan.
        first: place in it to start at.
        last: place to stop before.
        skip: arms to pass over.
        slots: among how many the machine is divided, also where fewer sessions are left than that.
        code: the hash of the code that every worker must run.
        fail_fast: stop everything at the first session that fails.
        sessions_per_process: a fresh process after so many sessions; None for one process to the end.
        timeout_min: a session that takes longer is ended and has failed; None for no limit.
        grace_s: how long a worker may take to write its checkpoint when it is to stop.
    """

    plan: Plan
    first: int
    last: int
    skip: Sequence[int]
    slots: int
    code: str | None
    fail_fast: bool
    sessions_per_process: int | None
    timeout_min: float | None
    grace_s: float


def run_slots(job: Job, devices: Sequence[str | None]) -> None:
    """Work through a job in as many slots as `devices` has; each names its CUDA device, or None.

    Raises: Interrupted — a signal came, every worker has stopped. FailedFast. Broken.
    """
    slots = [Slot(job, device) for device in devices]
    threads = [threading.Thread(target=slot.run, name=f"slot {i}") for i, slot in enumerate(slots)]
    asked, deadline = False, math.inf
    with signals() as got:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.05)
            if not asked and (got or any(slot.ended not in (None, 0) for slot in slots)):
                asked, deadline = True, time.monotonic() + job.grace_s
                for slot in slots:
                    slot.stop(signal.SIGTERM)
            if time.monotonic() > deadline or got.count(signal.SIGINT) > 1:
                deadline = math.inf
                for slot in slots:
                    slot.stop(signal.SIGKILL)
    if got:
        raise Interrupted(got[0])
    if any(slot.ended == STOPPED for slot in slots):
        raise FailedFast
    if broken := [slot.ended for slot in slots if slot.ended]:
        raise Broken(f"a worker ended with exit code {broken[0]} before it had a session; see above")


class Slot:
    """One place to work: one process after another, until nothing is left to claim.

    `ended` is None while it works, then 0, or the exit code of a process that could not go on.
    """

    def __init__(self, job: Job, device: str | None) -> None:
        self.job, self.device = job, device
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping = False
        self.ended: int | None = None
        self.lock = threading.Lock()

    def run(self) -> None:
        """Process after process; what one dies of, it writes down."""
        in_vain = 0
        while True:
            process, pipe = self.begin()
            if process is None:
                break
            places, timed_out = self.follow(process, pipe)
            code = process.wait()
            if process.stdin is not None:
                process.stdin.close()
            for place in [] if timed_out else places:
                self.write_down(place, process.pid, code)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it had started itself
            in_vain = 0 if places or code == MORE else in_vain + 1
            if places and self.job.fail_fast and code not in ORDERLY:
                code = STOPPED
            elif places or code == MORE or (code < 0 and in_vain < IN_VAIN):
                continue
            self.ended = 0 if self.stopping and code != STOPPED else code
            return
        self.ended = 0

    def begin(self) -> "tuple[subprocess.Popen[bytes] | None, int]":
        """A new process and the pipe on which it says what it does; None when the slot is to stop."""
        job = self.job
        environment = {**os.environ, SLOTS: str(job.slots)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // job.slots)))
        if self.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.device
        pipe, end = os.pipe()
        words = [sys.executable, "-m", "normbench.worker", str(job.plan.path), str(job.first), str(job.last)]
        words += ["--told", str(end), "--grace", str(job.grace_s)]
        words += ["--fail-fast"] if job.fail_fast else []
        words += ["--skip", *map(str, job.skip)] if job.skip else []
        words += ["--code", job.code] if job.code else []
        words += ["--most", str(job.sessions_per_process)] if job.sessions_per_process else []
        with self.lock:
            if self.stopping:
                os.close(pipe)
                os.close(end)
                return None, -1
            self.process = subprocess.Popen(
                words, env=environment, stdin=subprocess.PIPE, pass_fds=[end], start_new_session=True
            )
        os.close(end)
        return self.process, pipe

    def follow(self, process: "subprocess.Popen[bytes]", pipe: int) -> tuple[list[int], bool]:
        """Listen until the process has ended: the places of the sessions that it was in, one or a pack's, and
        whether they were ended for taking too long, a pack as long as its sessions may one after another."""
        places: list[int] = []
        since, rest, timed_out = 0.0, b"", False
        limit_s = math.inf if self.job.timeout_min is None else 60 * self.job.timeout_min
        with os.fdopen(pipe, "rb", buffering=0) as told:
            while True:
                heard = select.select([told], [], [], 0.2)[0]
                if heard:
                    chunk = told.read(4096)
                    if not chunk:
                        break
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        places, since = [int(word) for word in line.split() if word != b"-"], time.monotonic()
                elif process.poll() is not None:
                    break
                if places and not timed_out and time.monotonic() - since > limit_s * len(places):
                    timed_out = True
                    self.end_for_time(places, process)
        return places, timed_out

    def end_for_time(self, places: Sequence[int], process: "subprocess.Popen[bytes]") -> None:
        """The sessions have failed for time: said in their folders first, so that no other slot has them."""
        limit_min = len(places) * (self.job.timeout_min or 0)
        for planned in (self.job.plan.sessions[place] for place in places):
            held = claims.holder(self.job.plan.session_folder(planned))
            if held is not None and held.pid == process.pid and self.job.plan.open(planned):
                failure.keep(held, "failed", f"timeout: not finished after {limit_min:g} minutes")
        process.terminate()
        try:
            process.wait(self.job.grace_s)
        except subprocess.TimeoutExpired:
            process.kill()

    def write_down(self, place: int, pid: int, code: int) -> None:
        """What a process died of, in the folder of the session it was in; it may have said so itself."""
        planned = self.job.plan.sessions[place]
        held = claims.holder(self.job.plan.session_folder(planned))
        if code in ORDERLY or held is None or held.pid != pid or not self.job.plan.open(planned):
            return
        killed = code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with code {code}"
        if code == -signal.SIGKILL and self.stopping:
            how = f"asked to stop, it did not within {self.job.grace_s:g} s"
        elif code == -signal.SIGKILL:
            how += ": by the system when memory ran out, or by hand"
        failure.keep_killed(held, "interrupted" if killed else "failed", how)

    def stop(self, signum: int) -> None:
        """Start no process any more, and send the one there is a signal."""
        with self.lock:
            self.stopping = True
            if self.process is not None:
                self.process.send_signal(signum)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The signals that come meanwhile, in order."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return

    def note(signum: int, frame: FrameType | None) -> None:
        got.append(signum)
        if len(got) == 1:
            said = f"{signal.Signals(signum).name}: the workers write checkpoints and stop\n"
            with contextlib.suppress(OSError):
                os.write(2, said.encode())

    with handled_by(note):
        yield got


def visible_devices() -> list[str]:
    """The CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
