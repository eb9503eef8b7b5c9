"""`hydra/launcher=commands`: prints a sweep's commands, for a scheduler that Hydra knows nothing of."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class CommandsLauncher(Launcher):
    """One line of shell for each slice, to be run anywhere that sees the same files."""

    def __init__(self, sessions_per_job: int | None, wait: bool) -> None:
        """`sessions_per_job` and `wait` are for the sweeper, which cuts the slices."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing to set up."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Print the commands; nothing runs."""
        for overrides in job_overrides:
            print(command(overrides))
        return []


def command(overrides: Sequence[str]) -> str:
    """The shell command that trains one slice, wherever it is run."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plan = {str(override.key_or_group): override.value() for override in parsed}
    part = [str(plan["plan.first"]), str(plan["plan.last"])]
    words = [sys.executable, "-m", "normbench.worker", plan["plan.file"], *part, "--code", plan["plan.code"]]
    words += ["--skip", *map(str, skip)] if isinstance(skip := plan.get("plan.skip"), list) else []
    words += ["--fail-fast"] if plan["fail_fast"] else []
    return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(map(str, words))}"
