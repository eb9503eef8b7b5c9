"""The `normbench` command: doors, completion, one-line errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def normbench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "normbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_help_lists_the_doors() -> None:
    said = normbench().stdout
    assert all(
        f"\n  {door} " in said
        for door in ("train", "audit", "bench", "profile", "stats", "status", "results")
    )


def test_a_wrong_door_is_one_line() -> None:
    done = normbench("trian")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == "normbench: no door 'trian'; did you mean 'train'?; "
        "there are train, audit, bench, profile, stats, status, results\n"
    )


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("normbench ", ["train", "audit", "bench", "profile", "stats", "status", "results"]),
        ("normbench tr", ["train"]),
        ("normbench train norm=gh", ["norm=ghost"]),
        ("normbench audit norm=gh", ["norm=ghost"]),
        ("normbench audit norm=mbn norm.str", ["norm.stride="]),
        ("normbench bench rou", ["rounds="]),
        ("normbench profile norm=mbn norm.str", ["norm.stride="]),
        ("normbench train norm=mbn norm.str", ["norm.stride="]),
        ("normbench train dataset=ci", ["dataset=cifar10", "dataset=cifar100"]),
        ("normbench stats out", []),
    ],
)
def test_tab_completion_knows_doors_groups_and_keys(line: str, offered: list[str]) -> None:
    done = normbench("-sc", "query=bash", COMP_LINE=line)
    assert done.stdout.split() == offered, done.stderr


def test_completion_installs_for_the_normbench_command() -> None:
    assert normbench("-sc", "install=bash").stdout.strip().endswith("-F hydra_bash_completion normbench")


def test_a_door_opened_by_the_command_names_itself(tmp_path: Path) -> None:
    done = normbench("train", "epoch=3")
    assert done.returncode == 2
    assert done.stderr == "normbench train: unknown key 'epoch'; did you mean 'epochs'?\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("norm=mbn,bn norm.impl=quick", "norm.impl must be one of"),
     ("norm=mbn,bn norm.impll=auto", "did you mean 'norm.impl'?"),
     ("norm=mbn,gn norm.impl=auto", "unknown key 'norm.impl'"),
     ("optim/schedule=one_cycle,step optim.schedule.warm=1", "did you mean 'optim.schedule.warmup'?")],
)  # fmt: skip
def test_a_swept_group_takes_keys_that_its_default_has_not(arguments: str, said: str) -> None:
    done = normbench("train", *arguments.split())
    assert done.returncode == 2 and said in done.stderr and "Ambiguous" not in done.stderr
    assert done.stderr.count("\n") == 1


DEAR = {"torch", "torchvision", "sklearn", "scipy", "statsmodels", "matplotlib", "pandas"}


@pytest.mark.parametrize(
    ("command", "code"),
    [("train --help", 0), ("train epoch=3", 2), ("train norm=xyz", 2), ("train optim.lr=-1", 2),
     ("train batch=bs3", 2), ("audit --help", 0), ("audit norm=xyz", 2), ("profile --help", 0),
     ("profile model=xyz", 2), ("profile --compare nowhere", 2), ("profile stride=4", 2), ("stats --help", 0),
     ("stats nowhere", 2), ("status --help", 0), ("status nowhere", 2), ("results nowhere", 2),
     ("worker nowhere", 2)],
)  # fmt: skip
def test_help_and_mistakes_import_nothing_dear(command: str, code: int, tmp_path: Path) -> None:
    # on an idle machine each answers in under a second; torch alone takes two
    door, *arguments = command.split()
    program = f"""
import runpy, sys
sys.argv = ["normbench.{door}", *{arguments!r}]
try:
    runpy.run_module("normbench.{door}", run_name="__main__")
finally:
    print("modules:", *{DEAR!r} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    *_, last = done.stdout.splitlines()
    allowed = {"pandas"} if command == "stats nowhere" else set()  # which reads the tables
    assert last.split()[0] == "modules:" and set(last.split()[1:]) <= allowed


def test_full_errors_on_request() -> None:
    done = normbench("train", "epoch=3", HYDRA_FULL_ERROR="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_results_door_counts_and_refuses(tmp_path: Path) -> None:
    done = normbench("results", "nowhere")
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and "no sessions under nowhere" in done.stderr
    )
