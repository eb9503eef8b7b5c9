"""From a command through its plan: checks what it means to run, launches what is missing, gathers rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from normbench import claim as claims
from normbench import ranks
from normbench.checkpoint import Checkpoints, epoch_of
from normbench.code import code_hash
from normbench.config import Composer
from normbench.doors import line_of, say
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
    tidy(plan)
    looks = looks_of(plan) if asked.stop_when_decided else None
    progress = Progress.of(plan, asked.retry_failed, looks)
    if progress.todo:
        here = runs_here(launcher, plan)
        if ranks.size() > 1 and not here:
            raise Refused("hydra.launcher starts processes of its own, and torchrun has; leave it out")
        check_arms(plan, {s.arm: s for s in progress.todo}.values(), here)
    say(progress.line, error=asked.commands_only)
    plan.write()
    for planned in progress.todo:
        plan.run_again(planned)
    try:
        with ranks.leading(on_cuda(plan)):
            for wave in [Wave(0, len(plan.sessions))] if looks is None else waves(plan, looks, asked.margin):
                launch(launcher, asked, plan, wave)
    except FailedFast:
        say("stopped at the first failure", error=True)
    except (KeyboardInterrupt, Interrupted):
        gather(plan)
        raise
    if asked.wait:
        damaged = gather(plan)
        report(plan, progress.todo, looks_of(plan) if asked.stop_when_decided else None)
        if damaged:
            raise damaged


@dataclass(frozen=True)
class Asked:
    """What a command asks of a sweep beside its plan.

    Args:
        retry_failed: run sessions again that failed before.
        fail_fast: stop at the first session that fails.
        stop_when_decided: ask the statistics after every LOOK_EVERY sessions, end arms that are settled.
        sessions_per_job: sessions of one job, rounded up to whole blocks; None for one block; 0
            where the launcher takes the whole plan as one job.
        margin: with it, the difference in test accuracy that counts as none, like 0.01 or 2%.
        wait: False where the launcher submits and returns.
        commands_only: nothing but the launcher's words on standard output.
    """

    retry_failed: bool
    fail_fast: bool
    stop_when_decided: bool
    margin: str | None
    sessions_per_job: int | None
    wait: bool
    commands_only: bool

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
        return cls(
            **flags, margin=margin, sessions_per_job=per_job, wait=wait, commands_only=chosen == "commands"
        )


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
    """The ranges of a wave that have something to do, each of whole blocks."""
    first, size = wave.first, asked.sessions_per_job
    for last in plan.block_ends:
        if (
            last <= first
            or last > wave.last
            or (last < wave.last and (size == 0 or last - first < (size or 1)))
        ):
            continue
        if any(plan.open(s) and s.arm not in wave.skip for s in plan.sessions[first:last]):
            yield first, last
        first = last


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
    return QuotedString(text=str(path), quote=Quote.single).with_quotes()


def runs_here(launcher: Launcher, plan: Plan) -> bool:
    """Whether sessions run in this process; by name: Hydra loads plugins as their own modules."""
    if type(launcher).__name__ == "LocalLauncher":
        return len(launcher.slots(plan)) == 0  # type: ignore[attr-defined]
    return type(launcher).__name__ == "BasicLauncher"


def check_arms(plan: Plan, examples: Iterable[Planned], here: bool) -> None:
    """Build every arm's model and, where sessions run in this process, look at its device and data."""
    from normbench.building import check_builds

    for planned in examples:
        check_builds(plan.config(planned))
    if here:
        from normbench.preparing import check_device, load_data

        for planned in examples:
            check_device(plan.config(planned))
            load_data(plan.config(planned))


def count(number: int, thing: str) -> str:
    """`1 arm`, `2 arms`."""
    return f"{number} {thing}" + ("s" if number != 1 else "")


def gather(plan: Plan) -> Refused | None:
    """Rebuild results.csv and say where it is, or why it is not up to date; what is damaged, if a file is."""
    from normbench.results import rebuild

    try:
        say(f"results: {rebuild(plan.folder)}")
    except OSError as error:
        say(f"results.csv is not up to date: {line_of(error)}", error=True)
    except Refused as damaged:
        return damaged
    return None


def tidy(plan: Plan) -> None:
    """Take away what processes left that were killed between a session's end and their own."""
    for planned in plan.sessions:
        folder = plan.session_folder(planned)
        if plan.finished(planned) and (held := claims.holder(folder)) is not None and not held.alive:
            if not plan.arms[planned.arm].values["checkpoint"]["keep"]:
                Checkpoints(folder, None).remove()
            (folder / "failure.json").unlink(missing_ok=True)
            held.remove()


def report(plan: Plan, meant: Sequence[Planned], looks: "Looks | None") -> None:
    """SweepFailed names the sessions that failed, and those that were meant to run and did not end."""
    from normbench.results import failure_line

    stopped, ours = settled(plan, looks), {planned.launch_order for planned in meant}
    failed: list[str] = []
    cut: list[str] = []
    elsewhere: list[str] = []
    for planned in plan.sessions:
        folder = plan.session_folder(planned)
        if plan.finished(planned) or planned.arm in stopped:
            continue
        if failure := plan.failure(planned):
            (failed if failure["row"]["status"] == "failed" else cut).append(failure_line(folder))
        elif planned.launch_order in ours:
            held = claims.holder(folder)
            if held is not None and held.alive:
                elsewhere.append(f"  {folder}: runs on {held.host}")
            else:
                cut.append(failure_line(folder))
    if elsewhere:
        say("\n".join([f"{count(len(elsewhere), 'session')} running in other processes:", *elsewhere]))
    lines = []
    for what, found in (("failed:", failed), ("not ended; the same command goes on from here:", cut)):
        if found:
            lines += [
                f"{len(found)} of {len(plan.sessions)} sessions {what}",
                *(f"  {line}" for line in found),
            ]
    if lines:
        raise SweepFailed("\n".join(lines))


def job(cfg: DictConfig) -> None:
    """What a launcher runs: the sessions of one slice of a plan."""
    from normbench.worker import work

    plan, part = Plan.read(Path(cfg.plan.file)), cfg.plan
    work(plan, part.first, part.last, skip=part.skip, code=part.code, fail_fast=cfg.fail_fast)
