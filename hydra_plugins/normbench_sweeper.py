"""The sweeper that Hydra finds: hands every command to `normbench.sweep`, which plans and runs it."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class PlannedSweeperConf:
    _target_: str = "hydra_plugins.normbench_sweeper.PlannedSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="normbench", node=PlannedSweeperConf)


class PlannedSweeper(Sweeper):
    """Session-major sweeps from a written plan, arms shuffled within each session."""

    context: HydraContext
    launcher: Launcher
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives and make the launcher."""
        self.context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plan and run the command."""
        from normbench.config import Composer
        from normbench.sweep import sweep

        composer = Composer(self.context.config_loader, self.config)
        sweep(composer, self.launcher, self.config, arguments)
