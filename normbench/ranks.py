"""This process's place among those that train one session together, as torchrun's environment has it.

    told(value)           rank 0's, on every rank
    gathered(value)       everyone's, by rank

Rank 0 walks the plan; the others train along with it (`worker.follow`). What all do alike they compute
alike; only what a clock, a disk or a signal says is agreed on here. Alone, a process asks nobody. Nothing
imports torch before the processes meet.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
AGREE_S = 0.25  # how long a signal or a due checkpoint may wait until all have heard of it


def size() -> int:
    """How many processes train one session together."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def rank() -> int:
    """Which of them this is; 0 claims, writes and speaks."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def first() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def local_rank() -> int:
    """Which of this machine's it is, and so which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def local_size() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


@dataclass(frozen=True)
class Cut:
    """How every batch is divided: each of `ranks` takes `micros` parts, all parts as even as they come."""

    micros: int = 1
    rank: int = 0
    ranks: int = 1

    @classmethod
    def here(cls, batch_size: int, micro: int | None) -> "Cut":
        """This process's, of batches of that size; no part of one is larger than `micro`, if that is given.

        A smaller last batch is cut into as many parts, as it would be for so many devices.
        """
        share = -(-batch_size // size())
        return cls(1 if micro is None else -(-share // micro), rank(), size())

    @property
    def parts(self) -> int:
        """Into how many all ranks together cut a batch."""
        return self.micros * self.ranks

    def own(self, n: int) -> slice:
        """Where this rank's share of a batch of n lies; `tensor_split` into `micros` gives its parts."""
        even, longer = divmod(n, self.parts)
        first, end = self.rank * self.micros, (self.rank + 1) * self.micros
        return slice(first * even + min(first, longer), end * even + min(end, longer))


WHOLE = Cut()


def join(cuda: bool) -> None:
    """Meet the others: gloo for what lies on the CPU and, with `cuda`, NCCL for what lies on the GPUs."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def part() -> None:
    """Leave when all have come this far."""
    if size() == 1:
        return
    import torch.distributed as dist

    summed(0)
    dist.destroy_process_group()


@contextlib.contextmanager
def leading(cuda: bool) -> Iterator[None]:
    """On rank 0: the others follow, through every `session`, until this ends."""
    join(cuda)
    _apart.clear()
    try:
        yield
    finally:
        if not _apart:
            told(None)
            part()


@contextlib.contextmanager
def session(task: object) -> Iterator[None]:
    """On rank 0: the others are told what to train, and wait for the next afterwards.

    Where it ends in an error they may be anywhere, and nothing more can be said to them.
    """
    told(task)
    _apart.append(task)
    yield
    _apart.clear()


_apart: list[object] = []


def lost_one(error: BaseException) -> bool:
    """Whether an error says that another rank went away, which may say why itself."""
    said = re.search(r"gloo|nccl|connection (closed|reset)|broken pipe", str(error), re.I)
    return size() > 1 and isinstance(error, RuntimeError) and said is not None


def told(value: T) -> T:
    """Rank 0's value on every rank; the others' are not looked at."""
    if size() == 1:
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    answer: T = box[0]
    return answer


def gathered(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def summed(*values: float) -> list[float]:
    """Each value added up over the ranks, in float64: equal bits on every rank."""
    if size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    answer: list[float] = total.tolist()
    return answer


class Boundary:
    """What all ranks have to decide alike between two steps: to stop, or to write a checkpoint.

    They ask each other about every AGREE_S seconds, after a number of steps that rank 0 sets by its clock;
    one that is alone asks itself at every step.
    """

    def __init__(self) -> None:
        self.steps, self.left, self.asked_at = 1, 1, time.monotonic()

    def ask(self, signum: int | None, due: bool) -> tuple[int | None, bool]:
        """A signal that any rank has had, if one has, and whether rank 0 finds a checkpoint due."""
        if size() == 1:
            return signum, due
        self.left -= 1
        if self.left > 0:
            return None, False
        import torch
        import torch.distributed as dist

        now = time.monotonic()
        fitting = int(self.steps * AGREE_S / max(now - self.asked_at, 1e-3))
        coming = max(1, min(fitting, 4 * self.steps, 1000))
        said = torch.tensor([signum or 0, *((due, coming) if first() else (0, 0))])
        dist.all_reduce(said, dist.ReduceOp.MAX)
        heard, decided, self.steps = said.tolist()
        self.left, self.asked_at = self.steps, now
        return heard or None, bool(decided)
