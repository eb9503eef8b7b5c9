"""The sweeper that Hydra finds: hands every command to the door that was opened."""

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
    """Every value of every swept key, by the rules of the door."""

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
        """Run the command: `train` plans sessions and launches them, the other doors look here."""
        from normbench.config import Composer

        composer = Composer(self.context.config_loader, self.config)
        if composer.door == "audit":
            from normbench.audit import door

            door.run(composer, self.config, arguments)
        elif composer.door == "lr_limit":
            from normbench.lr_limit import door as lr_limit

            lr_limit.run(composer, self.config, arguments)
        elif composer.door == "bench":
            from normbench.bench import door as bench

            bench.run(composer, self.config, arguments)
        elif composer.door == "profile":
            from normbench.profile import door as profile

            profile.run(composer, self.config, arguments)
        else:
            from normbench import sweep

            sweep.sweep(composer, self.launcher, self.config, arguments)
