"""From a command to a plan and through it: expands arms and sessions, checks them, runs what is missing."""

import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from normbench.config import Composer
from normbench.identity import identify
from normbench.plan import Arm, Plan, Planned
from normbench.values import Refused, nearest

BESIDE_ARMS = ("session", "seed", "study", "fidelity")


class SweepFailed(Exception):
    """Some sessions failed; the text lists them. The door exits with code 1."""


def sweep(composer: Composer, launcher: Launcher, master: DictConfig, arguments: Sequence[str]) -> None:
    """Plan one command, check every arm before a folder exists, launch what is missing, gather the rows."""
    plan = make_plan(composer, master, arguments)
    todo = [s for s in plan.sessions if not plan.finished(s)]
    if todo:
        check_arms(plan, {s.arm: s for s in todo}.values(), here=runs_here(launcher))
    done = len(plan.sessions) - len(todo)
    print(f"{plan.study}: {count(len(plan.arms), 'arm')}, {count(len(plan.sessions), 'session')}, "
          f"{done} done, {len(todo)} to run", flush=True)  # fmt: skip
    if todo:
        path = str(plan.write().resolve()).replace("'", "\\'")
        slices = [[f"plan.file='{path}'", "plan.first=0", f"plan.last={len(plan.sessions)}"]]
        try:
            returned = launcher.launch(slices, initial_job_idx=0)
        except KeyboardInterrupt:
            gather(plan)
            raise
        for job_return in returned:
            if job_return.status is JobStatus.FAILED:
                job_return.return_value  # noqa: B018  (raises what ended the job: sessions catch their own)
    gather(plan)
    report_failures(plan)


def runs_here(launcher: Launcher) -> bool:
    """Whether jobs run in this process; by name, since Hydra loads its plugins as modules of their own."""
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


def report_failures(plan: Plan) -> None:
    """SweepFailed names the sessions that did not end."""
    from normbench.results import failure_line

    failed = [folder for s in plan.sessions if not plan.finished(s) and (folder := plan.session_folder(s))]
    if failed:
        lines = "\n".join(f"  {failure_line(folder)}" for folder in failed)
        raise SweepFailed(f"{len(failed)} of {len(plan.sessions)} sessions failed:\n{lines}")


def job(cfg: DictConfig) -> None:
    """What a launcher runs: the sessions of one slice of a plan."""
    from normbench.session import run_slice

    run_slice(Plan.read(Path(cfg.plan.file)), cfg.plan.first, cfg.plan.last)


def make_plan(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> Plan:
    """The plan that these overrides ask for; Refused before anything is written."""
    parser = OverridesParser.create(config_loader=composer.loader)
    typed: dict[str, Override] = {}
    for override in parser.parse_overrides(list(arguments)):
        if typed.setdefault(str(override.key_or_group), override) is not override:
            raise Refused(f"{override.key_or_group} is given twice; a sweep is one list, like norm=obn,mbn")
    for key in ("study", *(k for k in typed if k.startswith(("study.", "plan.")))):
        if key in typed and typed[key].is_sweep_override():
            raise Refused(f"{key} cannot be swept; run one study per command")
    study = master.study
    shared = [o for key, o in typed.items() if key not in BESIDE_ARMS]
    arms: dict[str, Arm] = {}
    for fidelity in fidelities(study, typed.get("fidelity")):
        for overrides in expand_arms(parser, study, fidelity, shared):
            chosen = [str(o.input_line) for key, o in typed.items() if key == "study"]
            values, choices = composer.compose([*chosen, *overrides])
            setting = identify(values, choices, *composer.usual(choices))
            if setting.hash in arms and not fidelity:
                raise Refused(f"two arms are one setting ({setting.id}): {' '.join(overrides)}; give it once")
            arms[setting.hash] = Arm.of(setting, values, choices)
    sessions = numbers(typed.get("session"), "session", study_sessions(study, master.session))
    seeds = numbers(typed.get("seed"), "seed", [master.seed])
    return Plan.interleaved(study.name, list(arms.values()), sessions, seeds)


def key_of(override: Override) -> str:
    """The key that an override sets; `norm.stride` and its shorthand count as one."""
    key = str(override.key_or_group)
    return "stride" if key == "norm.stride" else key


def expand_arms(
    parser: OverridesParser, study: DictConfig, fidelity: str | None, shared: Sequence[Override]
) -> Iterator[list[str]]:
    """The overrides of every arm: what the study's arms say, crossed with the swept keys of the command."""
    as_written = study.fidelities[fidelity] if fidelity else {}
    extra = [o for o in parser.parse_overrides(list(as_written.get("overrides") or []))]
    arms = [parser.parse_overrides(shlex.split(arm)) for arm in as_written.get("arms") or study.arms or [""]]
    clash = {key_of(o) for own in arms for o in own} & {key_of(o) for o in shared}
    if clash:
        keys = ", ".join(sorted(clash))
        raise Refused(f"{keys}: set by the arms of study={study.name}; leave it out of the command")
    for own in arms:
        given = {key_of(o) for o in [*own, *shared]}
        everything = [*(o for o in extra if key_of(o) not in given), *own, *shared]
        yield from (list(combination) for combination in itertools.product(*map(spellings, everything)))


def spellings(override: Override) -> list[str]:
    """The override once for each of its values."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise Refused(f"{override.input_line}: give the values to sweep, like {override.key_or_group}=1,2,4")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def fidelities(study: DictConfig, typed: Override | None) -> list[str | None]:
    """Which of the study's versions to run: the one asked for, else its first; [None] for a study without."""
    offered = list(study.fidelities or {})
    if typed is None:
        return [offered[0]] if offered else [None]
    asked = [str(value) for value in plain_values(typed)]
    for name in asked:
        if name not in offered:
            there = f"there are {', '.join(offered)}" if offered else "it has one version only"
            raise Refused(
                f"fidelity={name}: study={study.name} has none of this name{nearest(name, offered)}; {there}"
            )
    return [*asked]


def study_sessions(study: DictConfig, single: int) -> list[int]:
    """The study's own sessions, or the one session of the configuration."""
    if study.sessions is None:
        return [single]
    if not isinstance(study.sessions, int) or study.sessions < 1:
        raise Refused(f"study.sessions must be an int ≥ 1, got {study.sessions!r}")
    return list(range(study.sessions))


def numbers(typed: Override | None, key: str, default: list[int]) -> list[int]:
    """The ints that an override of session or seed gives."""
    values = default if typed is None else plain_values(typed)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Refused(f"{key} must be an int ≥ 0, got {value!r}; range(30) gives 0 to 29")
    if len(set(values)) < len(values):
        raise Refused(f"{key} has a value twice: {', '.join(map(str, values))}")
    return values


def plain_values(override: Override) -> list[Any]:
    """The values of one override, swept or not."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
