"""Times of sides that take turns: every round runs every side once, so that drift hits all alike."""

import contextlib
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from normbench import device as machine

Sample = Mapping[str, float]  # part ("forward", "step") → seconds of one unit of work


class CannotRun(Exception):
    """A side cannot be measured here; the text is the reason, which stands in its cell."""


@dataclass(frozen=True)
class Ready:
    """A side that is prepared and warmed up.

    Args:
        measure: takes one sample.
        note: what a reader must know about it, "" for nothing.
        bytes_moved: part → bytes that its unit of work has to read and write at least.
    """

    measure: Callable[[], Sample]
    note: str = ""
    bytes_moved: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """What was measured of one side: part → seconds, one a round; or why nothing was.

    `cpu_share` is this process's processor time over the time that passed: below its threads where others
    worked beside it, or where the work was another's (a device's, a child's).
    """

    times_s: Mapping[str, Sequence[float]]
    missing: str | None = None
    note: str = ""
    bytes_moved: Mapping[str, float] = field(default_factory=dict)
    cpu_share: float | None = None


class Clock:
    """Marks on the device's own time line: the processor's counter, or CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> "float | torch.cuda.Event":
        """Now, where the device has got to by then; waits for nothing."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        """Between two marks; on CUDA after `wait`."""
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return float(begin.elapsed_time(end)) / 1e3
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin

    def wait(self) -> None:
        """Until the device has done what it was given."""
        machine.synchronize(self.device)


def take_turns(sides: Mapping[str, Callable[[], Ready]], rounds: int) -> dict[str, Side]:
    """Prepare every side, then measure all of them `rounds` times, each round in an order of its own.

    A side that raises CannotRun, while it is prepared or later, is missing with that reason.
    """
    ready: dict[str, Ready] = {}
    missing: dict[str, str] = {}
    for name, prepare in sides.items():
        progress(f"preparing {name}")
        try:
            ready[name] = prepare()
        except CannotRun as why:
            missing[name] = str(why)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ready}
    passed, worked = dict.fromkeys(ready, 0.0), dict.fromkeys(ready, 0.0)
    shuffle = random.Random(0)
    with no_collection():
        for done in range(rounds):
            progress(f"round {done + 1} of {rounds}, {len(ready)} sides")
            turn = [name for name in ready if name not in missing]
            shuffle.shuffle(turn)
            for name in turn:
                begun, began = time.process_time(), time.perf_counter()
                try:
                    sample = ready[name].measure()
                except CannotRun as why:
                    missing[name] = str(why)
                    continue
                passed[name] += time.perf_counter() - began
                worked[name] += time.process_time() - begun
                for part, seconds in sample.items():
                    times[name].setdefault(part, []).append(seconds)
    progress("")
    return {
        name: Side({}, missing[name])
        if name in missing
        else Side(times[name], None, ready[name].note, ready[name].bytes_moved, worked[name] / passed[name])
        for name in sides
    }


def progress(line: str) -> None:
    """What is being done, to a person at a terminal; the next line takes its place."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and none meanwhile."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def repeats(call: Callable[[], object], clock: Clock, at_least_s: float) -> int:
    """How many calls, 1 to 1000, last as long as a sample should; warms the call up."""
    call()
    clock.wait()
    began = time.perf_counter()
    call()
    clock.wait()
    once = time.perf_counter() - began
    return max(1, min(1000, round(at_least_s / max(once, 1e-9))))
