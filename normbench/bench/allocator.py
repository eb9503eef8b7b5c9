"""The memory allocator of every process that is measured: tuned as a training process tunes its own."""

import os

from normbench import device as machine


def tuned() -> str:
    """Tune this process's allocator where normbench can, and say which it has."""
    given = [key for key in sorted(os.environ) if key.startswith("MALLOC_") or key == "GLIBC_TUNABLES"]
    if given:
        return "as set by " + ", ".join(given)
    tune = getattr(machine, "tune_allocator", None)
    return "tuned by normbench" if tune is not None and tune() else "as the system has it"
