"""From a command to a plan: the overrides of every arm, expanded, composed, checked and named."""

import itertools
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from normbench.config import Composer, plain
from normbench.identity import Setting, identify, outside
from normbench.plan import Arm, Plan
from normbench.study import Fidelity, Study
from normbench.values import Refused, nearest

BESIDE_ARMS = ("session", "seed", "study", "fidelity")
LISTS = ("trace", "traces.layers", "traces.channels", "traces.features")  # keys that take several values
COMMAND_KEYS = ("retry_failed", "fail_fast", "stop_when_decided", "margin")  # of one command, not of its plan


def make_plan(composer: Composer, master: DictConfig, arguments: Sequence[str]) -> Plan:
    """The plan that these overrides ask for; Refused before anything is written."""
    parser = OverridesParser.create(config_loader=composer.loader)
    typed = by_key(parser.parse_overrides(list(arguments)), "the command")
    for key in typed:
        if key.startswith("plan."):
            raise Refused(f"{key} is filled in by normbench; leave it out")
        if key in ("out", *COMMAND_KEYS) and typed[key].is_sweep_override():
            raise Refused(f"{key} is one for all sessions of a command and cannot be swept")
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
                raise Refused(given_twice(setting, overrides, shared))
            kept = {key: value for key, value in values.items() if key not in COMMAND_KEYS}
            arms.setdefault(setting.hash, Arm.of(setting, kept, choices))
    default = [master.session] if study.sessions is None else list(range(study.sessions))
    sessions = numbers(typed.get("session"), "session", default)
    seeds = numbers(typed.get("seed"), "seed", [master.seed])
    return Plan.interleaved(study.name, list(arms.values()), sessions, seeds)


def given_twice(setting: Setting, overrides: Sequence[str], shared: Iterable[Override]) -> str:
    """Why two arms are one setting, and the cure."""
    for override in shared:
        key = str(override.key_or_group)
        if override.is_sweep_override() and outside(key) and key != "stride":
            values = str(override.input_line).partition("=")[2]
            whole = f", or all of them as one: {key}=[{values}]" if key in LISTS else ""
            return (
                f"{override.input_line}: {key} changes no result, so it makes no arms; give one value{whole}"
            )
    return f"two arms are one setting ({setting.id}): {' '.join(overrides)}; give it once"


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
