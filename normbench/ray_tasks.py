"""Slices of a plan as tasks of Ray, through hydra-ray-launcher; imported only when asked for.

A task that dies takes none of the others with it and is not started again behind the user's back: its session
is reported, and the same command goes on from its checkpoint. A task has one GPU where there are any.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray, start_ray
from omegaconf import DictConfig, OmegaConf, open_dict
from ray.exceptions import RayError, TaskCancelledError

from normbench import failure
from normbench.device import SLOTS
from normbench.doors import say
from normbench.plan import Plan
from normbench.values import Refused
from normbench.worker import FailedFast


@dataclass(frozen=True)
class Tasks:
    """Slices as tasks.

    Args:
        init: options of ray.init.
        remote: options of every task; null where `asked` works them out.
        context, function, config: Hydra's.
    """

    init: DictConfig
    remote: DictConfig
    context: HydraContext
    function: TaskFunction
    config: DictConfig

    def launch(self, slices: Sequence[Sequence[str]], first_number: int) -> Sequence[JobReturn]:
        """Start a slice a task and wait for all of them; ends Ray again where it was started here."""
        was_up = ray.is_initialized()
        try:
            start_ray(self.init)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise Refused(f"hydra/launcher=ray_tasks: {str(error).strip().splitlines()[0]}") from error
        try:
            asked, state = self.asked(), Singleton.get_state()
            configs = list(self.configs(slices, first_number))
            tasks = [launch_job_on_ray(self.context, asked, each, self.function, state) for each in configs]
            returned = outcomes(tasks)
            for each in configs:
                plan, part = Plan.read(Path(each.plan.file)), each.plan
                failure.write_killed(
                    plan, part.first, part.last, lambda held: not held.alive, "its task died"
                )
            return returned
        finally:
            if not was_up:
                ray.shutdown()

    def asked(self) -> DictConfig:
        """What a task asks for: one GPU and its share of the cores, or one core."""
        options: dict[str, Any] = {str(k): v for k, v in self.remote.items()}
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cores, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
        if options["num_gpus"] is None:
            options["num_gpus"] = 1 if gpus else 0
        if options["num_cpus"] is None:
            options["num_cpus"] = max(1, cores // gpus) if gpus and options["num_gpus"] else 1
        environment = {SLOTS: str(beside_each_other(options["num_cpus"], options["num_gpus"]))}
        return OmegaConf.create({**options, "runtime_env": {"env_vars": environment}})

    def configs(self, slices: Sequence[Sequence[str]], first_number: int) -> Iterator[DictConfig]:
        """Hydra's configuration of every slice."""
        for number, overrides in enumerate(slices, first_number):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = f"job_id_for_{number}", number
            yield config


def beside_each_other(cores: float, gpus: float) -> int:
    """How many tasks run at once on the machine that holds most of them."""
    most = 1
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        has = node["Resources"]
        fit = [int(has.get(kind, 0) // share) for kind, share in (("CPU", cores), ("GPU", gpus)) if share]
        most = max(most, min(fit, default=1))
    return most


def outcomes(tasks: Sequence[Any]) -> list[JobReturn]:
    """What the tasks returned, as they end; without those that died, of which the sessions' files tell.

    A task that was to stop everything makes the others stop with checkpoints.
    """
    returned: list[JobReturn] = []
    left = list(tasks)
    while left:
        [task], left = ray.wait(left)
        try:
            returned.append(ray.get(task))
        except TaskCancelledError:
            continue
        except RayError as error:
            why, _, _ = str(error).strip().partition("\n")
            say(f"a Ray task died: {why}", error=True)
            continue
        if isinstance(returned[-1]._return_value, FailedFast):
            for other in left:
                ray.cancel(other)
    return returned
