"""From a command to a plan and through it: expands arms and sessions, checks them, runs what is missing."""

import itertools
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from normbench import claim as claims
from normbench.checkpoint import epoch_of
from normbench.code import code_hash
from normbench.config import Composer, plain
from normbench.identity import identify
from normbench.interrupt import Interrupted
from normbench.plan import Arm, Plan, Planned
from normbench.study import Fidelity, Study
from normbench.values import Refused, nearest, positive_int
from normbench.worker import FailedFast

if TYPE_CHECKING:
    from normbench.stats.sequential import Looks

BESIDE_ARMS = ("session", "seed", "study", "fidelity")
COMMAND_KEYS = ("retry_failed", "fail_fast", "stop_when_decided")  # of one command, not of its plan
LOOK_EVERY = 5


class SweepFailed(Exception):
    """Some sessions failed; the text lists them. The door exits with code 1."""


def sweep(composer: Composer, launcher: Launcher, master: DictConfig, arguments: Sequence[str]) -> None:
    """Plan one command, check every arm before a folder exists, launch what is missing, gather the rows."""
    plan = make_plan(composer, master, arguments)
    asked = Asked.of(master, plan)
    plan.check_folders()
    looks = looks_of(plan) if asked.stop_when_decided else None
    progress = Progress.of(plan, asked.retry_failed, looks)
    if progress.todo:
        here = runs_here(launcher, len(progress.todo), plan)
        check_arms(plan, {s.arm: s for s in progress.todo}.values(), here)
    print(progress.line, file=asked.stream, flush=True)
    plan.write()
    for planned in progress.todo:
        plan.run_again(planned)
    try:
        for wave in [Wave(0, len(plan.sessions))] if looks is None else waves(plan, looks):
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
        wait: False where the launcher submits and returns.
        stream: where the sweep's own words go.
    """

    retry_failed: bool
    fail_fast: bool
    stop_when_decided: bool
    sessions_per_job: int | None
    wait: bool
    stream: TextIO

    @classmethod
    def of(cls, master: DictConfig, plan: Plan) -> "Asked":
        """From the command's config and its launcher's; Refused where they do not go together."""
        flags = {key: bool(master[key]) for key in COMMAND_KEYS}
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
        if flags["stop_when_decided"] and len(plan.arms) < 2:
            raise Refused("stop_when_decided=true compares arms, and this command has one; give it two norms")
        per_job = 0 if chosen in ("local", "basic") else per_job
        stream = sys.stderr if chosen == "commands" else sys.stdout
        return cls(**flags, sessions_per_job=per_job, wait=wait, stream=stream)


def launch(launcher: Launcher, asked: Asked, plan: Plan, wave: "Wave") -> None:
    """Hand a wave to the launcher, in jobs of its size; returns when they have ended, or are submitted."""
    where = [f"plan.file={quoted(plan.path.resolve())}", f"out={quoted(plan.folder.parent)}"]
    where += [f"plan.code={code_hash(plan)}", f"fail_fast={str(asked.fail_fast).lower()}"]
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


def looks_path(plan: Plan) -> Path:
    """Beside the plan, where `stats` finds them."""
    return plan.path.with_name(plan.path.name.replace("plan-", "looks-"))


def looks_of(plan: Plan) -> "Looks":
    """The looks at a plan so far, and which arms they settled."""
    from normbench.stats.sequential import Looks

    path = looks_path(plan)
    return Looks.read(path) if path.is_file() else Looks(len(plan.sessions) // len(plan.arms), ())


def waves(plan: Plan, looks: "Looks") -> Iterator["Wave"]:
    """LOOK_EVERY sessions of every arm that is still open, then a look at the statistics, and so on.

    The looks are kept beside the plan, so that the same command given again goes on from them.
    """
    from normbench.stats.sequential import Looks
    from normbench.stats.stopping import decided

    block, planned = len(plan.arms), looks.planned
    for done in Looks.every(LOOK_EVERY, planned, planned).at:
        if done in looks.at:
            continue
        first = block * (looks.at[-1] if looks.at else 0)
        skip = [place for place, arm in enumerate(plan.arms) if arm.setting in looks.stopped]
        wave = Wave(first, block * done, skip)
        yield wave
        if any(running(plan, s) for s in plan.sessions[wave.first : wave.last]):
            print("other processes run sessions of this wave; give the command again when they have ended")
            return
        gather(plan)
        decision = decided(plan.folder, Looks(planned, (*looks.at, done), looks.stopped))
        settled = {setting: done for setting in decision.settled} if done < planned else {}
        looks = Looks(planned, (*looks.at, done), {**settled, **looks.stopped})
        looks.write(looks_path(plan))
        verdicts = ", ".join(f"{setting} {verdict}" for setting, verdict in decision.settled.items())
        print(f"look after {done} of {planned} sessions: {verdicts or 'nothing is settled'}", flush=True)
        if all(setting in looks.stopped for setting in decision.open):
            return


@dataclass(frozen=True)
class Wave:
    """The sessions `plan.sessions[first:last]` without those of the arms in `skip`."""

    first: int
    last: int
    skip: Sequence[int] = ()


@dataclass(frozen=True)
class Progress:
    """What of a plan is done, was interrupted or failed before, runs elsewhere, and what there is to run."""

    plan: Plan
    done: int
    failed: int
    elsewhere: int
    settled: int
    epochs: list[int | None]  # of the interrupted sessions: where each goes on, None from the start
    todo: list[Planned]

    @classmethod
    def of(cls, plan: Plan, retry_failed: bool, looks: "Looks | None" = None) -> "Progress":
        """As the sessions' folders have it; failed sessions are run again only on request, those of arms that
        the looks have settled not at all."""
        done, failed, elsewhere, settled = 0, 0, 0, 0
        epochs: list[int | None] = []
        todo: list[Planned] = []
        for planned in plan.sessions:
            folder = plan.session_folder(planned)
            if plan.finished(planned):
                done += 1
            elif looks is not None and plan.arms[planned.arm].setting in looks.stopped:
                settled += 1
            elif running(plan, planned):
                elsewhere += 1
            elif (failure := plan.failure(planned)) and failure["row"]["status"] == "failed":
                failed += not retry_failed
                todo += [planned] if retry_failed else []
            else:
                epochs += [epoch_of(folder)] if failure or (folder / "epochs.csv").is_file() else []
                todo.append(planned)
        return cls(plan, done, failed, elsewhere, settled, epochs, todo)

    @property
    def line(self) -> str:
        """`lenet_stride: 2 arms, 60 sessions: 42 of 60 done, 1 interrupted at epoch 7, 17 to run`."""
        plan, said = self.plan, [f"{self.done} of {len(self.plan.sessions)} done"]
        if self.epochs:
            where = {f"at epoch {epoch}" if epoch else "before a checkpoint" for epoch in self.epochs}
            said.append(f"{len(self.epochs)} interrupted {where.pop() if len(where) == 1 else 'on the way'}")
        if self.elsewhere:
            said.append(f"{self.elsewhere} running in other processes")
        if self.settled:
            said.append(f"{self.settled} of settled arms left out")
        if self.failed:
            said.append(f"{self.failed} failed before (retry_failed=true runs them again)")
        said.append(f"{len(self.todo) - len(self.epochs)} to run")
        sizes = f"{count(len(plan.arms), 'arm')}, {count(len(plan.sessions), 'session')}"
        return f"{plan.study}: {sizes}: {', '.join(said)}"


def running(plan: Plan, planned: Planned) -> bool:
    """Whether a living process has the session."""
    held = claims.holder(plan.session_folder(planned))
    return held is not None and held.alive


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
    """Rebuild results.csv and say where it is."""
    from normbench.results import rebuild

    print(f"results: {rebuild(plan.folder)}", flush=True)


def report(plan: Plan, meant: Sequence[Planned], looks: "Looks | None") -> None:
    """SweepFailed names the sessions that failed, and counts those that were meant to run and did not end."""
    stopped = looks.stopped if looks else {}
    failed = [plan.session_folder(s) for s in plan.sessions if not plan.finished(s) and plan.failure(s)]
    elsewhere, left = [], 0
    for planned in meant:
        if plan.open(planned) and plan.arms[planned.arm].setting not in stopped:
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
        raise SweepFailed("\n".join([f"{len(failed)} of {len(plan.sessions)} sessions failed:", *lines]))


def job(cfg: DictConfig) -> None:
    """What a launcher runs: the sessions of one slice of a plan."""
    from normbench.worker import work

    plan, part = Plan.read(Path(cfg.plan.file)), cfg.plan
    work(plan, part.first, part.last, skip=part.skip, code=part.code, fail_fast=cfg.fail_fast)


def make_plan(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> Plan:
    """The plan that these overrides ask for; Refused before anything is written."""
    parser = OverridesParser.create(config_loader=composer.loader)
    typed = by_key(parser.parse_overrides(list(arguments)), "the command")
    for key in typed:
        if key.startswith("plan."):
            raise Refused(f"{key} is filled in by normbench; leave it out")
        if key.startswith("study") and typed[key].is_sweep_override():
            raise Refused(f"{key} cannot be swept; run one study per command")
    chosen = master.hydra.runtime.choices.get("study")
    study = Study.of(plain(master)["study"], None if chosen in (None, "null") else str(chosen))
    beside = [str(o.input_line) for key, o in typed.items() if key == "study"]
    shared = [o for key, o in typed.items() if key not in BESIDE_ARMS]
    versions = fidelities(study, typed.get("fidelity"))
    arms: dict[str, Arm] = {}
    for version in versions:
        for overrides in expand_arms(parser, study, version, shared):
            values, choices = composer.compose([*beside, *overrides])
            setting = identify(values, choices, *composer.usual(choices))
            if setting.hash in arms and len(versions) == 1:
                raise Refused(f"two arms are one setting ({setting.id}): {' '.join(overrides)}; give it once")
            kept = {key: value for key, value in values.items() if key not in COMMAND_KEYS}
            arms.setdefault(setting.hash, Arm.of(setting, kept, choices))
    default = [master.session] if study.sessions is None else list(range(study.sessions))
    sessions = numbers(typed.get("session"), "session", default)
    seeds = numbers(typed.get("seed"), "seed", [master.seed])
    return Plan.interleaved(study.name, list(arms.values()), sessions, seeds)


def by_key(overrides: Iterable[Override], where: str) -> dict[str, Override]:
    """Overrides by the key they set; Refused where one is given twice."""
    keys: dict[str, Override] = {}
    for override in overrides:
        if keys.setdefault(str(override.key_or_group), override) is not override:
            key = override.key_or_group
            raise Refused(f"{key} is given twice in {where}; a sweep is one list, like norm=obn,mbn")
    return keys


def meaning(key: str) -> str:
    """`norm.stride` and its shorthand are one key."""
    return "stride" if key == "norm.stride" else key


def expand_arms(
    parser: OverridesParser, study: Study, version: Fidelity, shared: Sequence[Override]
) -> Iterator[list[str]]:
    """The overrides of every arm: what the study's arms say, crossed with the swept keys of the command."""
    extra = by_key(parser.parse_overrides(list(version.overrides)), f"a fidelity of study={study.name}")
    arms = [parse_arm(parser, arm) for arm in version.arms or study.arms or [""]]
    common = {meaning(str(o.key_or_group)) for o in shared}
    clash = {meaning(key) for arm in arms for key in arm} & common
    if clash:
        keys = ", ".join(sorted(clash))
        raise Refused(f"{keys}: set by the arms of study={study.name}; leave it out of the command")
    for arm in arms:
        given = common | {meaning(key) for key in arm}
        everything = [*(o for key, o in extra.items() if meaning(key) not in given), *arm.values(), *shared]
        yield from (list(combination) for combination in itertools.product(*map(spellings, everything)))


def parse_arm(parser: OverridesParser, arm: str) -> dict[str, Override]:
    """The overrides of one arm; what belongs to the whole study cannot be among them."""
    try:
        overrides = by_key(parser.parse_overrides(shlex.split(arm)), f"the arm {arm!r}")
    except ValueError as error:  # an open quotation mark
        raise Refused(f"study.arms: {arm!r} cannot be read ({error})") from error
    for key in overrides:
        if key in (*BESIDE_ARMS, *COMMAND_KEYS, "out") or key.startswith(("study.", "plan.", "hydra")):
            raise Refused(f"study.arms: {arm!r} sets {key}, which belongs to the study or the command")
    return overrides


def spellings(override: Override) -> list[str]:
    """The override once for each of its values."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise Refused(f"{override.input_line}: give the values to sweep, like {override.key_or_group}=1,2,4")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def fidelities(study: Study, typed: Override | None) -> list[Fidelity]:
    """Which of the study's versions to run: those asked for, else its first."""
    offered = study.fidelities
    if typed is None:
        return [next(iter(offered.values()), Fidelity())]
    asked = [str(value) for value in plain_values(typed)]
    for name in asked:
        if name not in offered:
            there = f"there are {', '.join(offered)}" if offered else "it has one version only"
            hint = nearest(name, offered)
            raise Refused(f"fidelity={name}: study={study.name} has none of this name{hint}; {there}")
    return [offered[name] for name in asked]


def numbers(typed: Override | None, key: str, default: list[int]) -> list[int]:
    """The ints that an override of session or seed gives."""
    values = default if typed is None else plain_values(typed)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Refused(f"{key} must be an int ≥ 0, got {value!r}; range(30) gives 0 to 29")
    if not values:
        raise Refused(f"{key} has no value; range(30) gives 0 to 29")
    if len(set(values)) < len(values):
        raise Refused(f"{key} has a value twice: {', '.join(map(str, values))}")
    return values


def plain_values(override: Override) -> list[Any]:
    """The values of one override, swept or not."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
