"""Sides that are whole commands: `normbench.train` and the naive loop, each in a process of its own."""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import normbench
from normbench.bench.interleaved import CannotRun
from normbench.sweep import quoted


@dataclass(frozen=True)
class Session:
    """One session that a command trained: its row, its epochs' seconds by the training clock."""

    row: dict[str, Any]
    epochs_s: list[float]


@dataclass(frozen=True)
class Command:
    """One command that ended well.

    Args:
        wall_s: from its start to its end.
        sessions: that it trained; none for other commands than `normbench.train`.
        said: its standard output.
    """

    wall_s: float
    sessions: list[Session]
    said: str


def train(*overrides: str) -> Command:
    """One `normbench.train` command in a folder of its own; CannotRun with its last line where it fails."""
    with tempfile.TemporaryDirectory(prefix="normbench-bench-", ignore_cleanup_errors=True) as folder:
        wall_s, said = run("normbench.train", *overrides, "tensorboard=false", f"out={quoted(Path(folder))}")
        return Command(wall_s, sessions_in(Path(folder)), said)


def run(module: str, *arguments: str) -> tuple[float, str]:
    """Seconds and standard output of `python -m module …`; CannotRun where it does not end with 0."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.perf_counter() - began
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CannotRun(lines[-1] if lines else f"{module} ended with exit code {done.returncode}")
    return wall_s, done.stdout


def environment() -> dict[str, str]:
    """This process's, in which the same normbench is found from any folder."""
    source = str(Path(normbench.__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    own = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}  # this door's
    return {**own, "PYTHONPATH": os.pathsep.join(filter(None, (source, path)))}


def sessions_in(folder: Path) -> list[Session]:
    """What a command left, in launch order."""
    sessions = []
    for file in folder.glob("*/*/*/session.json"):
        body = json.loads(file.read_text())
        with open(file.with_name("epochs.csv"), newline="") as table:
            epochs_s = [float(row["epoch_time_s"]) for row in csv.DictReader(table)]
        ran_fused(body)
        sessions.append(Session(body["row"], epochs_s))
    if not sessions:
        raise CannotRun("the command left no session")
    return sorted(sessions, key=lambda session: int(session.row["launch_order"]))


def ran_fused(body: dict[str, Any]) -> None:
    """CannotRun where a session was to run a fused norm and its manifest shows none."""
    if body["config"]["norm"].get("impl") != "fused":
        return
    for layer in body["manifest"]["norm_layers"]:
        if not layer["fused"]:
            raise CannotRun(f"not fused: {layer['name']} ran {', '.join(list(layer['ops']['forward'])[:5])}")
