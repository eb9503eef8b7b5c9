"""The machine under a session: which device, how to time it, how much memory it took, what it is called."""

import contextlib
import ctypes
import os
import platform
import resource
import time
from functools import cache
from pathlib import Path

import torch

from normbench import ranks
from normbench.values import Refused

# deterministic=true needs it, and cuBLAS reads it when its first handle is made
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SLOTS = "NORMBENCH_SLOTS"  # in a worker's environment: how many work beside each other


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h's numbers


def tune_allocator() -> bool:
    """Keep freed memory in this process, so that every step's big tensors need not be fetched anew.

    By default glibc gives a tensor of 32 MiB and more back to the system when it is freed, and the next one
    costs a page fault for every 4 KiB: more than batch norm itself. Whoever has set MALLOC_* or
    GLIBC_TUNABLES is left alone, and so is another C library. Returns whether the allocator is tuned.
    """
    return not malloc_settings() and _tuned()


def malloc_settings() -> list[str]:
    """The environment's own settings of glibc's allocator, by name."""
    return [key for key in sorted(os.environ) if key.startswith("MALLOC_") or key == "GLIBC_TUNABLES"]


@cache
def _tuned() -> bool:
    libc = _glibc()
    # a threshold above 32 MiB is refused, so no tensor gets a mapping of its own; -1 never trims the heap
    return libc is not None and bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def _glibc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, TypeError):  # TypeError: Windows has no library of that name
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "gnu_get_libc_version") else None
    return None


def give_back_memory() -> None:
    """Return what the allocator keeps for later to the system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def pick(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU; of several ranks each has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if ranks.size() > 1 and device.type == "cuda":
        if device.index is not None:
            raise Refused(
                f"device={name}: under torchrun every process takes a GPU of its own; use device=cuda"
            )
        device = torch.device("cuda", ranks.local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refused(
            f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices; use device=auto"
        )
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds of device work between `start` and `stop`, synchronized on both sides, added up until `lap`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total_s = 0.0
        self.began: float | None = None

    def start(self) -> None:
        """Start, or go on after a pause."""
        synchronize(self.device)
        self.began = time.perf_counter()

    def stop(self) -> None:
        """Pause."""
        synchronize(self.device)
        if self.began is not None:
            self.total_s += time.perf_counter() - self.began
            self.began = None

    def lap(self) -> float:
        """The seconds so far; counts from zero again."""
        seconds, self.total_s = self.total_s, 0.0
        return seconds


def reset_peak_memory(device: torch.device) -> int:
    """Count peak memory from here on; returns the bytes held now, without what is only kept for later."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the reset: by the allocator on CUDA, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def name_of(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """The cores this process may use; where Slurm gave it some, those."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, int(os.environ.get("SLURM_CPUS_PER_TASK") or found))


def slots() -> int:
    """How many processes its launcher runs beside each other on this machine."""
    return int(os.environ.get(SLOTS) or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def share() -> int:
    """The cores of one slot."""
    return max(1, cores() // slots())


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads on the CPU; None means this slot's share of the cores."""
    torch.set_num_threads(threads or share())
