"""Runs commands of ours as processes of their own that share one import of torch, four seconds of each.

    ended = in_turn(["normbench.train", "steps=1"], ["normbench.stats"])  # python -m normbench.train steps=1
    ended = together(*commands)  # all at once

Each is a fork of a process that has imported torch and what else is not ours, and nothing of ours.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Ended = subprocess.CompletedProcess[str]


def in_turn(*commands: list[str], cwd: Path | None = None) -> list[Ended]:
    """How each `python -m` command ended in `cwd`, one after the other."""
    return _run(commands, cwd, at_once=False)


def together(*commands: list[str], cwd: Path | None = None) -> list[Ended]:
    """How each `python -m` command ended in `cwd`, all started at once."""
    return _run(commands, cwd, at_once=True)


def _run(commands: tuple[list[str], ...], cwd: Path | None, at_once: bool) -> list[Ended]:
    with tempfile.TemporaryDirectory(prefix="normbench-forked-") as name:
        asked = json.dumps({"commands": commands, "at_once": at_once, "folder": name})
        done = subprocess.run(
            [sys.executable, __file__],
            input=asked,
            cwd=cwd,
            text=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout)
        said = [[Path(name, f"{i}.{kind}").read_text() for kind in ("out", "err")] for i in range(len(codes))]
        return [Ended(words, code, *texts) for words, code, texts in zip(commands, codes, said, strict=True)]


def become(words: list[str], folder: Path, number: int) -> None:
    """In a fork: be `python -m` of these words, writing to files."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{number}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[0] = os.getcwd()
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def main(asked: dict[str, Any]) -> None:
    """Fork for every command; the parent prints their exit codes."""
    for module in ("torch._dynamo", "pandas", "hydra.main"):
        importlib.import_module(module)
    children: list[int] = []
    codes: list[int] = []
    for number, words in enumerate(asked["commands"]):
        child = os.fork()
        if child == 0:
            return become(words, Path(asked["folder"]), number)
        children.append(child)
        if not asked["at_once"]:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    waited = [os.waitpid(child, 0)[1] for child in children] if asked["at_once"] else []
    print(json.dumps(codes + [os.waitstatus_to_exitcode(status) for status in waited]))


if __name__ == "__main__":
    main(json.load(sys.stdin))
