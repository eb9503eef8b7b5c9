"""The memory allocator of every process that is measured: tuned as a training process tunes its own."""

from normbench import device as machine


def tuned() -> str:
    """Tune this process's allocator where normbench can, and say which it has."""
    tune = getattr(machine, "tune_allocator", None)
    if tune is None:
        return "as the system has it"
    return "tuned" if tune() is not False else "as the system has it"
