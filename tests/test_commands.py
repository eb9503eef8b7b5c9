"""Launchers without a cluster: printed commands, presets of one's own, what is said where an extra lacks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer

from normbench import cli
from normbench.config import conf_dir

TINY = ["dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "model.width=4", "threads=1",
        "epochs=1"]  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The lines on standard output of a command that runs nothing."""
    monkeypatch.setattr(sys, "argv", ["train", "hydra/launcher=commands", *words])
    cli.run("train")
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_every_line_is_a_command_that_trains_its_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, train: Trainer
) -> None:
    words = ["norm=obn,mbn", "session=0,1,2", *TINY, "out='a b'"]
    lines = printed(capsys, monkeypatch, *words, "hydra.launcher.sessions_per_job=3")
    assert [line.partition(" --code ")[0].split()[-2:] for line in lines] == [["0", "4"], ["4", "6"]]
    assert not list(Path().rglob("session.json"))
    subprocess.run(["bash", "-c", lines[1]], check=True, cwd="/", capture_output=True)
    assert len(list(Path("a b").rglob("session.json"))) == 2
    assert len(printed(capsys, monkeypatch, *words, "hydra.launcher.sessions_per_job=6")) == 1
    train(*words)
    capsys.readouterr()
    assert printed(capsys, monkeypatch, *words) == []


def test_a_line_printed_before_an_edit_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [line] = printed(capsys, monkeypatch, *TINY)
    edited = line.partition(" --code ")[0] + " --code 0123456789"
    done = subprocess.run(["bash", "-c", edited], capture_output=True, text=True)
    assert done.returncode == 2 and "the code is not what was submitted" in done.stderr
    assert not list(Path().rglob("session.json"))


@pytest.mark.parametrize(
    ("launcher", "module", "extra"),
    [("slurm", "submitit", "slurm"), ("ray_tasks", "hydra_plugins.hydra_ray_launcher._launcher_util", "ray")],
)
def test_a_missing_extra_is_one_line(
    refusal: Any, monkeypatch: pytest.MonkeyPatch, launcher: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("normbench.slurm", "normbench.ray_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    said = refusal(f"hydra/launcher={launcher}")
    assert said.count("\n") == 1 and f"pip install 'normbench[{extra}]'" in said


def test_without_sbatch_slurm_is_refused_at_once(refusal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert "there is no sbatch here" in refusal("hydra/launcher=slurm")
    assert not Path("outputs").exists()


def test_ones_own_preset_sets_what_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Path("mine/hydra/launcher/cluster.yaml")
    preset.parent.mkdir(parents=True)
    preset.write_text("defaults: [slurm]\npartition: gpu\ntimeout_min: 240\n")
    words = ["--config-dir", "mine", "hydra/launcher=cluster", "hydra.launcher.qos=high", "--cfg", "hydra"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    cli.run("train")
    said = capsys.readouterr().out.splitlines()
    for line in ("partition: gpu", "timeout_min: 240", "qos: high", "max_num_timeout: 100"):
        assert f"    {line}" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("hydra/launcher=slrm", "no such hydra/launcher; did you mean 'slurm'?"),
        ("hydra/launcher=slurm hydra.launcher.partiton=x", "did you mean 'hydra.launcher.partition'?"),
        ("hydra.launcher.partition=x", "hydra/launcher=slurm has it"),
        ("hydra/launcher=commands hydra.launcher.sessions_per_job=0", "must be an int ≥ 1"),
        ("hydra/launcher=commands norm=obn,mbn stop_when_decided=true", "waits for its sessions"),
    ],
)
def test_slips_in_a_launchers_keys(refusal: Any, words: str, line: str) -> None:
    assert line in refusal(words)


def test_presets_say_what_every_key_of_theirs_does() -> None:
    for path in (conf_dir() / "hydra" / "launcher").glob("*.yaml"):
        assert path.read_text().startswith("# ")
