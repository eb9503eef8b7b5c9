"""How a Hydra door opens: late imports, one line and exit code 2 for a mistake, tracebacks for ours."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from normbench import ranks
from normbench.config import GROUPS, conf_dir, register_resolvers, unknown_key, unknown_option
from normbench.doors import line_of, refuse
from normbench.interrupt import Interrupted
from normbench.values import Refused

LAUNCHER = "hydra/launcher"
GROUP_KEYS = {group.replace("/", "."): group for group in GROUPS if "/" in group}


def run(door: str) -> None:
    """Run one Hydra door with the process's arguments."""
    import hydra

    from normbench import sweep

    register_resolvers()
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if door == "profile":
        sys.argv[1:] = with_compare(sys.argv[1:])
    check_arguments(door)
    sys.argv[1:] = for_swept_groups(sys.argv[1:])
    behaviour = {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}  # 1.4 has one only
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra.main then raises instead of printing and exiting
    try:
        hydra.main(**behaviour, config_path=str(conf_dir()), config_name=door)(sweep.job)()
    except sweep.SweepFailed as failed:
        print(failed, file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, Interrupted) as stopped:
        if ranks.first():
            print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + stopped.signum if isinstance(stopped, Interrupted) else 130)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, Refused, OSError) as error:
        if traceback_wanted:
            raise
        refuse(door, explain(error, door))
    finally:
        if not traceback_wanted:
            del os.environ["HYDRA_FULL_ERROR"]


def with_compare(arguments: list[str]) -> list[str]:
    """`--compare file.csv` as `compare='file.csv'`."""
    from normbench.sweep import quoted

    words, found = iter(arguments), []
    for word in words:
        option, _, path = word.partition("=")
        if option != "--compare":
            found.append(word)
            continue
        path = path or next(words, "")
        if not path:
            refuse("profile", "--compare needs a file, like --compare layers.csv")
        found.append(f"compare={quoted(Path(path))}")
    return found


def check_arguments(door: str) -> None:
    """argparse would answer a wrong option with eight lines of usage; one is enough."""
    parser: argparse.ArgumentParser = get_args_parser()

    def one_line(message: str) -> NoReturn:
        refuse(door, f"{message}; see python -m normbench.{door} --help")

    parser.error = one_line  # type: ignore[method-assign]
    sys.argv[1:] = sorted(sys.argv[1:], key=is_override)  # argparse wants the options together
    arguments = parser.parse_args()
    for override in arguments.overrides:
        if "=" not in override and not override.startswith("~"):
            refuse(door, f"{override!r} is no override; write key=value")
        key, _, value = override.lstrip("+~").partition("=")
        if key in ("hydra.mode", "hydra/sweeper") or key.startswith(("hydra.sweep", "hydra.run")):
            refuse(door, f"{override}: normbench plans its sessions and their folders itself; leave it out")
        if key in (*GROUPS, "study", LAUNCHER) and ".." in value.split("/"):
            refuse(door, f"{override}: no such {key}; options are names, not paths")
        if key in GROUP_KEYS:
            refuse(door, f"{override}: choose a group's option with /, like {GROUP_KEYS[key]}={value}")


def for_swept_groups(arguments: list[str]) -> list[str]:
    """`norm=mbn,bn norm.impl=auto` as `norm=mbn,bn ++norm.impl=auto`.

    Hydra composes once with the default option in a swept group's place, where a key that only the swept
    options have is unknown; what they do not have is refused when each arm is composed.
    """
    try:
        swept = [each.key_or_group for each in OverridesParser.create().parse_overrides(
            [argument for argument in arguments if is_override(argument)]
        ) if each.is_sweep_override()]  # fmt: skip
    except OverrideParseException:  # Hydra says it
        return arguments
    inside = tuple(f"{key.replace('/', '.')}." for key in swept if key in GROUPS)
    return [f"++{argument}" if argument.startswith(inside) else argument for argument in arguments]


def is_override(argument: str) -> bool:
    """Whether an argument is a key=value rather than an option or an option's value."""
    return "=" in argument and not argument.startswith("-")


def explain(error: Exception, door: str) -> str:
    """One line in our words for a composition error of Hydra's."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        path = str(error.missing_cfg_file)
        groups = [g for g in (*GROUPS, "study", LAUNCHER) if path.startswith(f"{g}/")]
        group = max(groups, key=len, default="config")
        return unknown_option(group, path.removeprefix(f"{group}/"), error.options)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a valid override ({str(error).splitlines()[0]})"
    if isinstance(error, yaml.YAMLError):
        return " ".join(f"not valid YAML: {error}".split())
    if isinstance(error, (Refused, OSError)) and not isinstance(error, HydraException):
        return line_of(error)
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, ConfigCompositionException):
        return explain_composition(message, error, door)
    return message


def explain_composition(message: str, error: Exception, door: str) -> str:
    """`Could not override 'epoch'.` becomes `unknown key 'epoch'; did you mean 'epochs'?`."""
    match = re.match(r"Could not override '([^'@]+)", message)
    if match:
        key, owners = match[1], legal_keys(door)
        if owners.get(key):
            group = LAUNCHER if key.startswith("hydra.launcher.") else key.partition(".")[0]
            return f"{key}: the chosen {group} has no such key; {group}={','.join(owners[key])} has it"
        return unknown_key(key, owners)
    if error.__cause__ is not None and str(error.__cause__):
        return f"{message}: {str(error.__cause__).splitlines()[0]}"
    return message


def legal_keys(door: str) -> dict[str, list[str]]:
    """Every key that some choice of `conf/` has in this door, with the options that have it."""
    keys: dict[str, list[str]] = {}
    defaults = OmegaConf.load(conf_dir() / f"{door}.yaml").defaults
    chosen = {str(group) for entry in defaults if OmegaConf.is_config(entry) for group in entry}
    others = LAUNCHER if f"override {LAUNCHER}" in chosen else None
    for file in sorted(conf_dir().rglob("*.yaml")):
        folder = file.relative_to(conf_dir()).parent.as_posix()
        group = folder.replace("/", ".").strip(".")
        if folder != others and (folder.split("/")[0] not in chosen if group else file.stem != door):
            continue
        if group.startswith("study"):
            continue
        if group:
            keys.setdefault(group, [])
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for key in dotted(tree, f"{group}." if group else ""):
            keys.setdefault(key, []).extend([file.stem] if group else [])
    return keys


def dotted(tree: object, prefix: str) -> list[str]:
    """The dotted names of a mapping's leaves and branches."""
    names: list[str] = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if key != "defaults":
            names += [f"{prefix}{key}", *dotted(value, f"{prefix}{key}.")]
    return names
