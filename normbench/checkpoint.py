"""A session's state on disk, so that a killed session goes on: written whole, checked when read.

A file is a line that names the format, a line of JSON with epoch, step and the payload's SHA-256, and what
`torch.save` makes of plain types and tensors, read back with `weights_only=True`. The file before it is kept:
where the newest is damaged the one before it serves.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normbench.doors import say
from normbench.plan import write_whole
from normbench.rules import Every

FORMAT = b"normbench checkpoint 1\n"
NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"
Body = Mapping[str, Any]


class Damaged(ValueError):
    """A file that is no whole checkpoint; its text says why."""


@dataclass
class Checkpoints:
    """The checkpoints of one session: when they are due, where they lie.

    Args:
        folder: the session's.
        every: how often, in epochs or minutes; None never.
        held: raises where this process may no longer write here.
    """

    folder: Path
    every: Every | None
    held: Callable[[], None] = lambda: None
    last: float = field(default_factory=time.monotonic)

    def due(self, epoch_ended: int | None) -> bool:
        """Whether to write one now; `epoch_ended` is the epoch whose last step was just done."""
        if self.every is None:
            return False
        if self.every.unit == "epochs":
            return epoch_ended is not None and epoch_ended % self.every.count == 0
        return time.monotonic() - self.last >= 60 * self.every.count

    def write(self, body: Body) -> None:
        """Write one; a disk that takes no more is said and costs nothing but the checkpoint."""
        self.last = time.monotonic()
        self.held()
        try:
            write(self.folder, body)
        except OSError as error:
            say(f"no checkpoint in {self.folder}: {error.strerror}; training goes on", error=True)

    def read(self) -> Body | None:
        """The newest whole one; None where there is none. What is damaged is said."""
        for name in (NEWEST, BEFORE):
            path = self.folder / name
            try:
                return read(path)
            except FileNotFoundError:
                continue
            except (Damaged, OSError) as error:
                say(f"{path} is passed over: {error}", error=True)
        return None

    def remove(self) -> None:
        """A finished session needs none, nor what a kill left half written: the hidden files."""
        half = (path for path in self.folder.glob(".*") if not path.name.startswith((".claim-", ".now-")))
        for path in [*half, self.folder / NEWEST, self.folder / BEFORE]:
            path.unlink(missing_ok=True)


def write(folder: Path, body: Body) -> None:
    """Make `body` the newest checkpoint and what was the newest the one before."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(body), buffer)
    payload = buffer.getvalue()
    newest = folder / NEWEST
    coming = folder / ".checkpoint-coming"
    head = {"epoch": body["epoch"], "step": body["step"], "sha256": hashlib.sha256(payload).hexdigest()}
    write_whole(coming, FORMAT + json.dumps(head).encode() + b"\n" + payload)
    if newest.is_file():
        os.replace(newest, folder / BEFORE)
    os.replace(coming, newest)


def head_of(line: bytes) -> Mapping[str, Any]:
    """Epoch, step and checksum, from a file's second line."""
    try:
        head: Mapping[str, Any] = json.loads(line)
        return {key: head[key] for key in ("epoch", "step", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("it is damaged: its head cannot be read") from error


def epoch_of(folder: Path) -> int | None:
    """The epoch that a session's newest checkpoint was written in, without reading its tensors."""
    for name in (NEWEST, BEFORE):
        try:
            with (folder / name).open("rb") as file:
                if file.readline() == FORMAT:
                    return int(head_of(file.readline())["epoch"])
        except (OSError, Damaged):
            continue
    return None


def read(path: Path) -> Body:
    """A checkpoint's body, on the CPU.

    Raises:
        Damaged — not a checkpoint, cut off, or changed since it was written.
    """
    content = path.read_bytes()
    if not content.startswith(FORMAT):
        raise Damaged("it is no checkpoint of this version")
    line, _, payload = content[len(FORMAT) :].partition(b"\n")
    if hashlib.sha256(payload).hexdigest() != head_of(line)["sha256"]:
        raise Damaged("it is damaged: its checksum does not fit")
    import torch

    body: Body = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return body
