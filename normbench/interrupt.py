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
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # submitit sends USR2 before a time limit


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
        if len(_asked) == 1:
            said = f"{signal.Signals(signum).name}: stops after this step"
            again = "; Ctrl-C once more stops at once" if signum == signal.SIGINT else ""
            os.write(2, f"{said}{again}\n".encode())

    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield
    finally:
        _asked.clear()
        for signum, handler in before.items():
            signal.signal(signum, handler)
