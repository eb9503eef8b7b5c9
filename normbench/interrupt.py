"""Ctrl-C, SIGTERM and a cluster's warning: noted when they come, obeyed at the next step's boundary.

    with listening():
        ...
        obey()       raises Interrupted if a signal has come; every step begins with it

So a session that is stopped has a checkpoint of a whole step. A second Ctrl-C stops at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from normbench import ranks

# submitit has Slurm send USR2 before a time limit and before a preemption
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


class Interrupted(BaseException):
    """A signal asked this process to stop; `signum` says which. Nothing that catches errors catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


_asked: list[int] = []


def asked() -> int | None:
    """The signal that has come, if one has."""
    return _asked[0] if _asked else None


def ask_to_stop() -> None:
    """As if SIGTERM had come; for a process whose parent is gone."""
    _asked.append(signal.SIGTERM)


def obey() -> None:
    """Raise Interrupted if a signal has come."""
    if _asked:
        raise Interrupted(_asked[0])


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Note signals instead of dying of them; in the main thread of this process, and no child of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def note(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return
        if _asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        _asked.append(signum)
        if len(_asked) == 1 and ranks.first():
            said = f"{signal.Signals(signum).name}: stops after this step"
            again = "; Ctrl-C once more stops at once" if signum == signal.SIGINT else ""
            with contextlib.suppress(OSError):
                os.write(2, f"{said}{again}\n".encode())

    try:
        with handled_by(note):
            yield
    finally:
        _asked.clear()


@contextlib.contextmanager
def handled_by(note: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hand SIGNALS to `note` meanwhile, but for those that were ignored, as nohup has it."""
    there = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {signum: handler for signum, handler in there.items() if handler not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
