"""What the README says works: its commands run, its tables name what exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import in_turn

from normbench.config import conf_dir

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines() if line and not line.startswith("#")]  # fmt: skip
DOORS = [c for c in COMMANDS if c.startswith("python -m normbench.")]
TINY = {
    "train": ["dataset.train_subset=96", "dataset.test_subset=64", "batch.size=48", "threads=1",
              "tensorboard=false"],
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tracked files beside this environment, as a stranger's clone would be."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    return tmp_path


def shrink(command: str) -> list[str]:
    """The README's command with its sessions made small."""
    words = shlex.split(command)[1:]
    if words[1] != "normbench.train" or "--help" in words:
        return words
    given = {word.partition("=")[0] for word in words}
    small = [o for o in TINY["train"] if o.partition("=")[0] not in given]
    words = [w for w in words if not w.startswith(("session=", "epochs=", "steps="))]
    narrow = ["model.width=4"] if not any(w.startswith(("model=", "study=")) for w in words) else []
    return [*words, *small, *narrow, "steps=1", "session=0,1"]


@pytest.mark.slow
@pytest.mark.data
def test_the_readmes_commands_run(checkout: Path) -> None:
    assert len(DOORS) >= 6
    commands = [shrink(command) for command in DOORS]
    assert {words[0] for words in commands} == {"-m"}
    for done in in_turn(*(words[1:] for words in commands), cwd=checkout):
        assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_quickstart_trains_and_compares(checkout: Path) -> None:
    done = subprocess.run(["scripts/quickstart", "model.width=4", "epochs=1", "threads=1"], cwd=checkout,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 arms, 10 sessions: 0 of 10 done, 10 to run" in done.stdout
    assert "test_acc against obn" in done.stdout and "epoch_time_s against obn" in done.stdout
    assert "scripts/quickstart" in README and "scripts/test" in README


def test_the_tables_name_every_norm_model_data_set_and_study() -> None:
    for group in ("norm", "model", "dataset", "study"):
        for file in (conf_dir() / group).glob("*.yaml"):
            assert f"`{file.stem}`" in README, f"{group} {file.stem}"


def test_the_reading_order_has_honest_line_counts() -> None:
    counts = re.findall(r"`(normbench/[\w/]+\.py)` \((\d+)\)", README)
    assert len(counts) >= 5
    for name, said in counts:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(said)) <= 0.15 * lines, f"{name} has {lines} lines, not {said}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, as pip would lay them out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT)]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "site", "zip")
    return folder / "site"


def run_installed(site: Path, where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python command in a stranger's folder, with the wheel in place of the checkout."""
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(where)}
    return subprocess.run(
        [sys.executable, *words], cwd=where, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_wheel_ships_the_configuration_and_the_sweeper(installed: Path, tmp_path: Path) -> None:
    said = run_installed(installed, tmp_path, "-c", "import normbench.config as c; print(c.conf_dir())")
    assert said.stdout.strip() == str(installed / "normbench" / "conf")
    command = ["normbench.train", "norm=mbn", "stride=2", "model.width=2", "steps=1", "threads=1"]
    done = run_installed(installed, tmp_path, "-m", *command)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "adhoc" / "results.csv").is_file()


@pytest.mark.slow
def test_a_layer_of_ones_own_from_outside(installed: Path, tmp_path: Path) -> None:
    """The README's file, YAML and commands, with the wheel installed and nothing of the checkout."""
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", README, re.S):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    commands = [shlex.split(line)[1:] for line in README.splitlines() if " --config-dir mine " in line]
    assert [words[1] for words in commands] == ["normbench.audit", "normbench.train"]
    audit, train = commands
    card = run_installed(installed, tmp_path, *audit)
    assert card.returncode == 0, card.stdout + card.stderr
    assert card.stdout.startswith("mean_size: my_layers.MeanSize(") and "\npass: " in card.stdout
    small = ["model.width=2", "steps=1", "threads=1", "tensorboard=false", "dataset.train_subset=96"]
    done = run_installed(installed, tmp_path, *train[:-1], "session=0,1", *small)
    assert done.returncode == 0, done.stderr
    assert "2 arms, 4 sessions" in done.stdout
    rows = (tmp_path / "outputs" / "adhoc" / "results.csv").read_text().splitlines()
    assert len(rows) == 5 and sum("mean_size" in row for row in rows) == 2
