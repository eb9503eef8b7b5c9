"""Ray, started here: a task that is killed takes no other with it and is not silently started again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import Trainer
from rows import assert_same_sessions, until

from normbench import claim
from normbench.plan import read_json

ray = (
    pytest.importorskip("ray", reason="needs pip install 'normbench[ray]'")
    if not os.environ.get("CI")
    else None
)
HERE = Path(__file__).parent
WORDS = ["norm=custom", "norm._target_=slow_layers.Slow", "session=range(6)", "epochs=12", "threads=1",
         "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "model.width=4", "device=cpu",
         "checkpoint.every=1epoch"]  # fmt: skip

FAILING = """
import time
from pathlib import Path
from torch import nn

class Failing(nn.BatchNorm2d):
    def forward(self, x):
        if self.training and x.device.type == "cpu":
            if not Path("failed").exists():
                Path("failed").touch()
                raise RuntimeError("no such luck")
            time.sleep(0.05)  # one that has begun by then trains until it is cancelled
        return super().forward(x)
"""


def start(slow: Path) -> "subprocess.Popen[str]":
    """The command, with two tasks at a time."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", str(HERE.parent))])
    return subprocess.Popen(
        [sys.executable, "-m", "normbench.train", "hydra/launcher=ray_tasks",
         "hydra.launcher.ray.init.num_cpus=2", *WORDS],
        env={**os.environ, "PYTHONPATH": path, "SLOW_WHILE": str(slow)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_of_six_sessions_one_is_killed_five_end_and_the_same_command_ends_the_sixth(train: Trainer) -> None:
    slow = Path("slow").resolve()
    slow.touch()
    process = start(slow)
    try:
        folder = until(lambda: list(Path().glob("outputs/adhoc/*/s*/checkpoint.pt")), limit_s=90)[0].parent
        held = claim.holder(folder)
        assert held is not None
        os.kill(held.pid, signal.SIGKILL)
        slow.unlink()
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 1, out + err
    assert (
        "a Ray task died" in err
        and f"1 of 6 sessions not ended; the same command goes on from here:\n  {folder}: its task died"
        in err
    )
    assert len(list(Path().glob("outputs/adhoc/*/s*/session.json"))) == 5
    assert claim.numbers(folder) == [held.number] == [1]  # nobody else has tried
    assert read_json(folder / "failure.json")["attempt"] == 1
    assert sorted(pd.read_csv("outputs/adhoc/results.csv")["status"]) == ["interrupted", *["ok"] * 5]

    process = start(slow)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    assert "5 of 6 done, 1 interrupted at epoch" in out and "goes on from step" in out
    rows = pd.read_csv("outputs/adhoc/results.csv")
    assert sorted(rows["session"]) == list(range(6)) and set(rows["status"]) == {"ok"}
    assert set(rows["slots"]) == {2}
    train(*WORDS, "out=whole")
    assert_same_sessions(Path("outputs"), Path("whole"))


@pytest.mark.ray
@pytest.mark.slow
def test_fail_fast_cancels_what_has_not_begun() -> None:
    Path("failing.py").write_text(FAILING)
    words = [word for word in WORDS if not word.startswith("norm._target_")]
    done = subprocess.run(
        [sys.executable, "-m", "normbench.train", "hydra/launcher=ray_tasks", "fail_fast=true",
         "hydra.launcher.ray.init.num_cpus=1", *words, "norm._target_=failing.Failing"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback (most" not in done.stderr, done.stderr
    assert "stopped at the first failure" in done.stderr
    assert "1 of 6 sessions failed:" in done.stderr, done.stderr
    assert "5 of 6 sessions not ended" in done.stderr
    kept = [read_json(path)["row"]["status"] for path in Path("outputs").rglob("failure.json")]
    assert kept.count("failed") == 1 and set(kept) <= {"failed", "interrupted"}
