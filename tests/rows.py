"""What two runs of one session must have in common: the row and the epochs without what a clock says."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normbench.plan import Plan, read_json

TIMES = ("_time_s", "_at", "images_per_s", "peak_memory_mib", "epoch_time_mean_s", "epochs_timed",
         "total_time_s", "hostname")  # fmt: skip
PLACE = ("launch_order", "slots", "git_commit")  # another plan or another place to work


def row_of(folder: Path) -> dict[str, Any]:
    """A finished session's row without times and place."""
    row = read_json(folder / "session.json")["row"]
    return {k: v for k, v in row.items() if not k.endswith(TIMES) and k not in PLACE}


def epochs_of(folder: Path) -> list[dict[str, str]]:
    """epochs.csv without times."""
    with (folder / "epochs.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in csv.DictReader(file)]


def folders_of(out: Path) -> dict[str, Path]:
    """`<setting>/s<session>` → folder, of all sessions below an out folder."""
    return {"/".join(path.parent.parts[-2:]): path.parent for path in sorted(out.rglob("config.yaml"))}


def assert_same_sessions(one: Path, other: Path) -> None:
    """Both out folders hold the same finished sessions with the same numbers."""
    first, second = folders_of(one), folders_of(other)
    assert first.keys() == second.keys() and first
    for name, folder in first.items():
        assert row_of(folder) == row_of(second[name]), name
        assert epochs_of(folder) == epochs_of(second[name]) != [], name


def command(*overrides: str) -> list[str]:
    """A `train` command as a person types it."""
    return [sys.executable, "-m", "normbench.train", *overrides]


def begin(*overrides: str, log: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
    """Start a `train` command; its words go to `log`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if log is None:
        return subprocess.Popen(command(*overrides), env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)  # fmt: skip
    with log.open("a") as file:
        return subprocess.Popen(command(*overrides), env=env, text=True, stdout=file, stderr=file)


def hear_ctrl_c() -> None:
    """In a child: what was started in the background has SIGINT ignored, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(what: Callable[[], Any], limit_s: float = 60) -> Any:
    """What `what` says as soon as it says something; AssertionError when it never does."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} has said nothing for {limit_s} s")


def workers_in(folder: Path) -> list[int]:
    """The launcher's worker processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"normbench.worker" in words and Path(os.readlink(process / "cwd")) == folder.resolve():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def rows_in(plan: Plan) -> int:
    """Rows of results.csv."""
    with (plan.folder / "results.csv").open() as file:
        return sum(1 for _ in csv.DictReader(file))
