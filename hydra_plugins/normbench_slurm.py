"""`hydra/launcher=slurm`: the door to `normbench.slurm`, which needs the extra of that name."""

import shutil
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from normbench.values import Refused


class SlurmLauncher(Launcher):
    """Hands slices to `normbench.slurm.Jobs`; refuses at once where they could not be submitted."""

    def __init__(self, **params: Any) -> None:
        self.params = params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make what submits."""
        try:
            from normbench.slurm import Jobs
        except ImportError as error:
            raise Refused(f"hydra/launcher=slurm needs pip install 'normbench[slurm]' ({error})") from error
        if shutil.which("sbatch") is None:
            raise Refused(
                "hydra/launcher=slurm: there is no sbatch here; submit from a machine of the cluster"
            )
        self.jobs = Jobs(**self.params)
        self.jobs.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit a slice a job; wait for them unless `wait` is false."""
        return self.jobs.launch(job_overrides, initial_job_idx)
