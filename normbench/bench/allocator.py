"""The memory allocator of every process that is measured: tuned as a session tunes its own."""

from normbench import device as machine


def tuned() -> str:
    """Tune this process's allocator, unless its environment does, and say which it has."""
    if given := machine.malloc_settings():
        return "as set by " + ", ".join(given)
    return "tuned by normbench" if machine.tune_allocator() else "as the system has it"
