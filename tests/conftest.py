"""Shared by the tests: run a door in this process, plan without running."""

import gc
import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from normbench import cli, sweep
from normbench.config import conf_dir
from normbench.plan import Plan

STUDIES = sorted(path.stem for path in (conf_dir() / "study").glob("*.yaml"))
Planner = Callable[..., Plan]
Trainer = Callable[..., Plan]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test writes below its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_garbage() -> None:
    """What is there already is looked through no more: with torch's compiler imported one gc.collect() takes
    half a second, and statsmodels asks for one in every correction, a worker after some sessions."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions say at the end that they leak


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra composes the same overrides of unchanged files once for all tests of a process, and parses a
    text once: two thirds of a small `train` command were spent there."""
    compose, parse = ConfigLoaderImpl.load_configuration, OmegaConf.load
    kept: dict[object, bytes] = {}

    def parsed(file: Any) -> Any:
        text = file.read() if hasattr(file, "read") else Path(file).read_text()
        if text not in kept:
            kept[text] = pickle.dumps(parse(io.StringIO(text)))
        return pickle.loads(kept[text])

    def composed(self: ConfigLoaderImpl, config_name: str, overrides: list[str], run_mode: RunMode,
                 **more: bool) -> DictConfig:  # fmt: skip
        folders = [at.path.removeprefix("file://") for at in self.config_search_path.get_path() if at.path]
        files = [file for folder in folders for file in sorted(Path(folder).rglob("*.yaml"))]
        stamps = [(str(file), (at := file.stat()).st_mtime_ns, at.st_size, at.st_ino) for file in files]
        if run_mode == RunMode.MULTIRUN:
            more.pop("validate_sweep_overrides", None)  # it refuses a sweep where none may be
        key = repr((folders, stamps, config_name, overrides, run_mode, sorted(more.items())))
        if key not in kept:
            kept[key] = pickle.dumps(compose(self, config_name, overrides, run_mode, **more))
        config: DictConfig = pickle.loads(kept[key])
        with flag_override(config, ["struct", "readonly"], False):
            config.hydra.runtime.cwd = os.getcwd()
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", composed)
        patch.setattr(OmegaConf, "load", parsed)
        yield


def words(arguments: Sequence[str]) -> list[str]:
    return [word for argument in arguments for word in argument.split()]


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch) -> Planner:
    """The plan that a `train` command makes, without running it."""

    def make(*arguments: str) -> Plan:
        plans: list[Plan] = []

        def only_plan(composer: object, launcher: object, master: object, overrides: object) -> None:
            plans.append(sweep.make_plan(composer, master, overrides))  # type: ignore[arg-type]

        with monkeypatch.context() as patch:  # its end leaves the test in its own folder
            patch.setattr(sweep, "sweep", only_plan)
            patch.setattr(sys, "argv", ["train", *arguments])
            cli.run("train")
        return plans[0]

    return make


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a `train` command is refused; fails where it is not."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *words(arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run("train")
        said = capsys.readouterr()
        assert ended.value.code == 2, said
        return said.err

    return run


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Run a `train` command in this process and return its plan; `fails` is the exit code to expect."""

    def run(*arguments: str, fails: int = 0) -> Plan:
        plans: list[Plan] = []
        make_plan = sweep.make_plan

        def remembered(*given: object) -> Plan:
            plans.append(make_plan(*given))  # type: ignore[arg-type]
            return plans[-1]

        with monkeypatch.context() as patch:
            patch.setattr(sweep, "make_plan", remembered)
            patch.setattr(sys, "argv", ["train", *arguments])
            if fails:
                with pytest.raises(SystemExit) as ended:
                    cli.run("train")
                assert ended.value.code == fails
            else:
                cli.run("train")
        return plans[-1]

    return run


@pytest.fixture
def template(train: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A copy of one real session under `real`, trained once by every process of the tests."""
    trained = tmp_path_factory.getbasetemp() / "one-real-session"
    if not trained.exists():
        train("model.width=4", "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=48",
              "epochs=2", "threads=1", "tensorboard=false", f"out={trained}")  # fmt: skip
    shutil.copytree(trained, "real")
    plan = Plan.newest(Path("real/adhoc"))
    assert plan is not None
    return replace(plan, arms=[replace(arm, values={**arm.values, "out": "real"}) for arm in plan.arms])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What trains for minutes starts first, half of it in each of two workers, which begin at the first and
    at the middle item; the cluster's tests share one cluster."""

    def halves(some: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
        return some[::2], some[1::2]

    cluster = [item for item in items if item.get_closest_marker("slurm")]
    slow = [item for item in items if item.get_closest_marker("slow") and item not in cluster]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    first, second = zip(halves(slow), halves(fast), strict=True)
    items[:] = [*cluster, *first[0], *first[1], *second[0], *second[1]]
