"""From a command through its plan: checks what it means to run, launches what is missing, gathers rows."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from normbench import claim as claims
from normbench import ranks
from normbench.checkpoint import epoch_of
from normbench.code import code_hash
from normbench.config import Composer
from normbench.interrupt import Interrupted
from normbench.plan import Plan, Planned
from normbench.planning import COMMAND_KEYS, make_plan
from normbench.values import Refused, positive_int
from normbench.waves import Wave, looks_of, settled, waves
from normbench.worker import FailedFast, follow

if TYPE_CHECKING:
    from normbench.stats.sequential import Looks


class SweepFailed(Exception):
    """Some sessions failed; the text lists them. The door exits with code 1."""


def sweep(composer: Composer, launcher: Launcher, master: DictConfig, arguments: Sequence[str]) -> None:
    """Plan one command, check every arm before a folder exists, launch what is missing, gather the rows."""
    plan = make_plan(composer, master, arguments)
    if not ranks.first():
        follow(on_cuda(plan))
        return
    asked = Asked.of(master, plan)
    plan.check_folders()
    looks = looks_of(plan) if asked.stop_when_decided else None
    progress = Progress.of(plan, asked.retry_failed, looks)
    here = runs_here(launcher, len(progress.todo), plan)
    if ranks.size() > 1 and not here:
        raise Refused("hydra.launcher starts processes of its own, and torchrun has; leave it out")
    if progress.todo:
        check_arms(plan, {s.arm: s for s in progress.todo}.values(), here)
    print(progress.line, file=asked.stream, flush=True)
    plan.write()
    for planned in progress.todo:
        plan.run_again(planned)
    try:
        with ranks.leading(on_cuda(plan)):
            for wave in [Wave(0, len(plan.sessions))] if looks is None else waves(plan, looks, asked.margin):
                launch(launcher, asked, plan, wave)
    except FailedFast:
        print("stopped at the first failure", file=sys.stderr)
    except (KeyboardInterrupt, Interrupted):
        gather(plan)
        raise
    if asked.wait:
        gather(plan)
        report(plan, progress.todo, looks_of(plan) if asked.stop_when_decided else None)


@dataclass(frozen=True)
class Asked:
    """What a command asks of a sweep beside its plan.

    Args:
        retry_failed: run sessions again that failed before.
        fail_fast: stop at the first session that fails.
        stop_when_decided: ask the statistics after every LOOK_EVERY sessions, end arms that are settled.
        sessions_per_job: sessions of one job, rounded up to whole repetitions; None for one repetition; 0
            where the launcher takes the whole plan as one job.
        margin: with it, the difference in test accuracy that counts as none, like 0.01 or 2%.
        wait: False where the launcher submits and returns.
        stream: where the sweep's own words go.
    """

    retry_failed: bool
    fail_fast: bool
    stop_when_decided: bool
    margin: str | None
    sessions_per_job: int | None
    wait: bool
    stream: TextIO

    @classmethod
    def of(cls, master: DictConfig, plan: Plan) -> "Asked":
        """From the command's config and its launcher's; Refused where they do not go together."""
        flags = {key: bool(master[key]) for key in COMMAND_KEYS if key != "margin"}
        margin = None if master.margin is None else str(master.margin)
        chosen, launcher = master.hydra.runtime.choices.get("hydra/launcher"), master.hydra.launcher
        per_job, wait = launcher.get("sessions_per_job"), bool(launcher.get("wait", True))
        if per_job is not None:
            try:
                positive_int("hydra.launcher.sessions_per_job", per_job)
            except ValueError as error:
                raise Refused(str(error)) from error
        if flags["stop_when_decided"] and not wait:
            raise Refused(
                f"stop_when_decided=true waits for its sessions, and hydra/launcher={chosen} does not"
            )
        if margin is not None and not flags["stop_when_decided"]:
            raise Refused(
                "margin is for stop_when_decided=true; the statistics take --margin test_acc=" + margin
            )
        if flags["stop_when_decided"] and len(plan.arms) < 2:
            raise Refused("stop_when_decided=true compares arms, and this command has one; give it two norms")
        per_job = 0 if chosen in ("local", "basic") else per_job
        stream = sys.stderr if chosen == "commands" else sys.stdout
        return cls(**flags, margin=margin, sessions_per_job=per_job, wait=wait, stream=stream)


def on_cuda(plan: Plan) -> bool:
    """Whether the ranks that train together meet on GPUs."""
    if ranks.size() == 1:
        return False
    import torch

    return torch.cuda.is_available() and any(arm.values["device"] != "cpu" for arm in plan.arms)


def launch(launcher: Launcher, asked: Asked, plan: Plan, wave: "Wave") -> None:
    """Hand a wave to the launcher, in jobs of its size; returns when they have ended, or are submitted."""
    where = [f"plan.file={quoted(plan.path.resolve())}", f"out={quoted(plan.folder.parent)}"]
    where += [f"plan.code='{code_hash(plan)}'", f"fail_fast={str(asked.fail_fast).lower()}"]
    where += [f"plan.skip=[{','.join(map(str, wave.skip))}]"] if wave.skip else []
    slices = [[*where, f"plan.first={first}", f"plan.last={last}"] for first, last in jobs(plan, wave, asked)]
    for returned in launcher.launch(slices, initial_job_idx=0) if slices else ():
        if returned.status is JobStatus.FAILED:
            returned.return_value  # noqa: B018  (raises what ended the job: sessions catch their own)


def jobs(plan: Plan, wave: "Wave", asked: Asked) -> Iterator[tuple[int, int]]:
    """The ranges of a wave that have something to do, each of whole repetitions."""
    block, size = len(plan.arms), wave.last - wave.first
    if asked.sessions_per_job != 0:
        size = block * -(-(asked.sessions_per_job or 1) // block)
    for first in range(wave.first, wave.last, size):
        last = min(first + size, wave.last)
        if any(plan.open(s) and s.arm not in wave.skip for s in plan.sessions[first:last]):
            yield first, last


@dataclass(frozen=True)
class Progress:
    """What of a plan is done, was interrupted or failed before, runs elsewhere, and what there is to run."""

    plan: Plan
    done: int
    failed: int
    elsewhere: int
    left_out: int
    epochs: list[int | None]  # of the interrupted sessions: where each goes on, None from the start
    todo: list[Planned]

    @classmethod
    def of(cls, plan: Plan, retry_failed: bool, looks: "Looks | None" = None) -> "Progress":
        """As the sessions' folders have it; failed sessions are run again only on request, those of arms that
        the looks have settled not at all."""
        done, failed, elsewhere, left_out, stopped = 0, 0, 0, 0, settled(plan, looks)
        epochs: list[int | None] = []
        todo: list[Planned] = []
        for planned in plan.sessions:
            folder = plan.session_folder(planned)
            if plan.finished(planned):
                done += 1
            elif planned.arm in stopped:
                left_out += 1
            elif claims.running(folder):
                elsewhere += 1
            elif (failure := plan.failure(planned)) and failure["row"]["status"] == "failed":
                failed += not retry_failed
                todo += [planned] if retry_failed else []
            else:
                epochs += [epoch_of(folder)] if failure or (folder / "epochs.csv").is_file() else []
                todo.append(planned)
        return cls(plan, done, failed, elsewhere, left_out, epochs, todo)

    @property
    def line(self) -> str:
        """`lenet_stride: 2 arms, 60 sessions: 42 of 60 done, 1 interrupted at epoch 7, 17 to run`."""
        plan, said = self.plan, [f"{self.done} of {len(self.plan.sessions)} done"]
        if self.epochs:
            where = {f"at epoch {epoch}" if epoch else "before a checkpoint" for epoch in self.epochs}
            said.append(f"{len(self.epochs)} interrupted {where.pop() if len(where) == 1 else 'on the way'}")
        if self.elsewhere:
            said.append(f"{self.elsewhere} running in other processes")
        if self.left_out:
            said.append(f"{self.left_out} of settled arms left out")
        if self.failed:
            said.append(f"{self.failed} failed before (retry_failed=true runs them again)")
        said.append(f"{len(self.todo) - len(self.epochs)} to run")
        sizes = f"{count(len(plan.arms), 'arm')}, {count(len(plan.sessions), 'session')}"
        return f"{plan.study}: {sizes}: {', '.join(said)}"


def quoted(path: Path) -> str:
    """A path as a value in Hydra's grammar."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def runs_here(launcher: Launcher, sessions: int, plan: Plan) -> bool:
    """Whether so many sessions run in this process; by name: Hydra loads plugins as their own modules."""
    if type(launcher).__name__ == "LocalLauncher":
        return len(launcher.slots(sessions, plan)) == 0  # type: ignore[attr-defined]
    return type(launcher).__name__ == "BasicLauncher"


def check_arms(plan: Plan, examples: Iterable[Planned], here: bool) -> None:
    """Build every arm's model and, where sessions run in this process, open its data, before any starts."""
    from normbench.building import check_builds

    for planned in examples:
        check_builds(plan.config(planned))
    if here:
        from normbench.training import load_data

        for planned in examples:
            load_data(plan.config(planned))


def count(number: int, thing: str) -> str:
    """`1 arm`, `2 arms`."""
    return f"{number} {thing}" + ("s" if number != 1 else "")


def gather(plan: Plan) -> None:
    """Rebuild results.csv and say where it is, or what kept it from being written."""
    from normbench.results import rebuild

    try:
        print(f"results: {rebuild(plan.folder)}", flush=True)
    except OSError as error:
        why = f"{error.strerror}; python -m normbench.results {plan.folder} makes it anew"
        print(f"results.csv is not up to date: {why}", file=sys.stderr)


def report(plan: Plan, meant: Sequence[Planned], looks: "Looks | None") -> None:
    """SweepFailed names the sessions that failed, and counts those that were meant to run and did not end."""
    stopped = settled(plan, looks)
    failed = [plan.session_folder(s) for s in plan.sessions if not plan.finished(s) and plan.failure(s)]
    elsewhere, left = [], 0
    for planned in meant:
        if plan.open(planned) and planned.arm not in stopped:
            held = claims.holder(plan.session_folder(planned))
            elsewhere += [held] if held is not None and held.alive else []
            left += held is None or not held.alive
    if elsewhere:
        hosts = ", ".join(sorted({held.host for held in elsewhere}))
        print(f"{count(len(elsewhere), 'session')} running in other processes ({hosts})")
    if failed or left:
        from normbench.results import failure_line

        lines = [f"  {failure_line(folder)}" for folder in failed]
        lines += [f"  {count(left, 'session')} not ended; the same command goes on from here"] if left else []
        first = f"{len(failed)} of {len(plan.sessions)} sessions failed"
        raise SweepFailed("\n".join([first + (":" if lines else ""), *lines]))


def job(cfg: DictConfig) -> None:
    """What a launcher runs: the sessions of one slice of a plan."""
    from normbench.worker import work

    plan, part = Plan.read(Path(cfg.plan.file)), cfg.plan
    work(plan, part.first, part.last, skip=part.skip, code=part.code, fail_fast=cfg.fail_fast)
