"""The launcher that Hydra finds by default: this machine, in this process or in several (`local.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from normbench.plan import Plan


class LocalLauncher(Launcher):
    """Sessions on this machine.

    Args:
        n_jobs: sessions at once; None for one a CUDA device where there are several, else one, here.
        sessions_per_process: a fresh process after so many; None for one process a slot.
        timeout_min: a session that takes longer has failed; None for no limit.
        grace_s: seconds for writing a checkpoint when asked to stop.
    """

    def __init__(self, n_jobs: Any, sessions_per_process: Any, timeout_min: Any, grace_s: Any) -> None:
        self.n_jobs, self.sessions_per_process = n_jobs, sessions_per_process
        self.timeout_min, self.grace_s = timeout_min, grace_s

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives; Refused where an option is out of range."""
        from normbench.values import Refused, above_zero, positive_int

        self.context, self.task, self.config = hydra_context, task_function, config
        rules = {"n_jobs": positive_int, "sessions_per_process": positive_int,
                 "timeout_min": above_zero, "grace_s": above_zero}  # fmt: skip
        for name, rule in rules.items():
            value = getattr(self, name)
            try:
                if value is not None:
                    rule(f"hydra.launcher.{name}", value)
            except ValueError as error:
                raise Refused(str(error)) from error

    def slots(self, plan: "Plan") -> list[str | None]:
        """The CUDA device of each slot, None where sessions choose it; empty to run in this process.

        By the whole plan, not by what is left of it: what goes on must have the threads that it began with.
        """
        from normbench import ranks
        from normbench.local import visible_devices

        if ranks.size() > 1 and self.n_jobs is None:
            return []
        named = {str(arm.values["device"]) for arm in plan.arms}
        devices = visible_devices() if named <= {"auto", "cuda"} else []
        alone = 1 if self.timeout_min or self.sessions_per_process else 0  # what only a launcher can do
        wanted = self.n_jobs or (len(devices) if len(devices) > 1 else alone)
        packs = len(plan.packs())
        if packs == 1:
            wanted = alone
        return [devices[i % len(devices)] if devices else None for i in range(min(wanted, packs))]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run each slice in turn."""
        from normbench import local
        from normbench.plan import Plan

        for overrides in job_overrides:
            cfg = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            plan, part = Plan.read(Path(cfg.plan.file)), cfg.plan
            some = [
                pack
                for pack in plan.packs(part.first, part.last)
                if any(s.arm not in part.skip and plan.open(s) for s in map(plan.sessions.__getitem__, pack))
            ]
            devices = self.slots(plan)
            if not devices:
                self.task(cfg)
                continue
            job = local.Job(
                plan, part.first, part.last, tuple(part.skip), len(devices), part.code, cfg.fail_fast,
                self.sessions_per_process, self.timeout_min, self.grace_s,
            )  # fmt: skip
            local.run_slots(job, devices[: max(1, len(some))])
        return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]
