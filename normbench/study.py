"""A study's own part of the configuration: arms, sessions and fidelities, checked before anything runs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normbench.values import Refused, nearest


@dataclass(frozen=True)
class Fidelity:
    """One version of a study: arms in place of the study's own, and overrides for every arm."""

    arms: Sequence[str] = ()
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """Arms × sessions. No arms means that the swept keys are the arms; no sessions, that one is run."""

    name: str
    arms: Sequence[str] = ()
    sessions: int | None = None
    fidelities: Mapping[str, Fidelity] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any], chosen: str | None) -> "Study":
        """The `study` mapping of the composed configuration; `chosen` is the file it came from, if any."""
        known = ("name", "question", "arms", "sessions", "fidelities")
        for key in values:
            if key not in known:
                hint = nearest(f"study.{key}", [f"study.{name}" for name in known])
                raise Refused(f"unknown key 'study.{key}'{hint}")
        fidelities = values["fidelities"] or {}
        if not isinstance(fidelities, Mapping):
            raise Refused(f"study.fidelities must map names to versions, got {fidelities!r}")
        return cls(
            study_name(values["name"], chosen),
            texts("study.arms", values["arms"], needed=values["arms"] is not None),
            study_sessions(values["sessions"]),
            {str(name): fidelity(str(name), version) for name, version in fidelities.items()},
        )


def study_name(name: Any, chosen: str | None) -> str:
    """The chosen file's name; without one, what the user calls it. It names a folder."""
    if chosen is not None and name not in ("adhoc", chosen):
        raise Refused(
            f"study.name={name}: the study is called {chosen}, as its file is; leave study.name out"
        )
    text = chosen or str(name)
    if not re.fullmatch(r"\w[\w.+=-]*", text):
        raise Refused(f"study.name must be a word that can name a folder, got {text!r}")
    return text


def study_sessions(value: Any) -> int | None:
    """How many sessions each arm runs."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise Refused(f"study.sessions must be an int ≥ 1, got {value!r}")
    return value


def fidelity(name: str, version: Any) -> Fidelity:
    """One entry of `study.fidelities`."""
    where = f"study.fidelities.{name}"
    if not isinstance(version, Mapping):
        raise Refused(f"{where} must be a mapping of arms and overrides, {{}} for none, got {version!r}")
    for key in version:
        if key not in ("arms", "overrides"):
            raise Refused(f"unknown key '{where}.{key}'{nearest(str(key), ('arms', 'overrides'))}")
    return Fidelity(
        texts(f"{where}.arms", version.get("arms"), needed="arms" in version),
        texts(f"{where}.overrides", version.get("overrides"), needed="overrides" in version),
    )


def texts(key: str, value: Any, needed: bool) -> list[str]:
    """A list of override strings, not empty where it is given."""
    if not needed:
        return []
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise Refused(
            f'{key} must be a list of override strings like ["norm=obn", "norm=mbn"], got {value!r}'
        )
    return value
