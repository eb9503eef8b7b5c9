"""How every door speaks and refuses: one line on stderr, exit code 2, whatever a person or disk got wrong."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from normbench import ranks
from normbench.values import Refused

RANK_0_SPEAKS_S = 10.0


def say(line: str, error: bool = False) -> None:
    """Print a line at once; where nobody reads any more, `| head` or a dropped line, go on in silence."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def refuse(door: str, line: str) -> NoReturn:
    """Print the one line and exit with code 2; of several ranks the first speaks, torchrun ends the rest."""
    if not ranks.first():
        time.sleep(RANK_0_SPEAKS_S)
    print(f"normbench {door}: {line}", file=sys.stderr)
    sys.exit(2)


class Arguments(argparse.ArgumentParser):
    """A door's arguments, whose mistakes are one line too."""

    def error(self, message: str) -> NoReturn:
        """Refuse; `--help` shows the usage."""
        refuse(self.prog.removeprefix("normbench "), f"{message}; see --help")


@contextmanager
def one_line_errors(door: str) -> Iterator[None]:
    """Refusals, and files that cannot be read or written, end in one line."""
    try:
        yield
    except (Refused, OSError) as error:
        refuse(door, line_of(error))


def line_of(error: Exception) -> str:
    """The one line that tells a person what went wrong."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
