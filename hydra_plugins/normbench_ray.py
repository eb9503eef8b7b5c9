"""`hydra/launcher=ray_tasks`: the door to `normbench.ray_tasks`, which needs the extra named ray."""

import os
from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from normbench.values import Refused


class RayLauncher(Launcher):
    """Hands slices to `normbench.ray_tasks.Tasks`; refuses at once where Ray is missing."""

    def __init__(self, ray: DictConfig, sessions_per_job: int | None) -> None:
        """`sessions_per_job` is for the sweeper, which cuts the slices."""
        self.ray = ray

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make what starts the tasks."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported: it calls nobody
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        try:
            from normbench.ray_tasks import Tasks
        except ImportError as error:
            raise Refused(f"hydra/launcher=ray_tasks needs pip install 'normbench[ray]' ({error})") from error
        self.tasks = Tasks(self.ray.init, self.ray.remote, hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start a slice a task and wait for all of them."""
        return self.tasks.launch(job_overrides, initial_job_idx)
