"""What the sessions' own files say beside their numbers: warnings, what ran, on what, and how arms differ."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normbench.config import flatten
from normbench.plan import read_json
from normbench.report.study import ArmFiles, Study
from normbench.results import row_from, source_of
from normbench.stats.tables import some
from normbench.values import Refused

MACHINE = ("device", "device_name", "hostname", "threads", "slots", "pack", "precision", "compile",
           "torch_version", "git_commit")  # fmt: skip
NOT_SETTINGS = ("study", "plan", "hydra", "session", "seed", "out", "data_dir")
MOST_OPERATORS = 8
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Warned:
    """One thing that manifests say, and in how many sessions of which arm."""

    arm: str
    kind: str
    text: str
    sessions: str


@dataclass(frozen=True)
class Ran:
    """What the norm layers of an arm were seen to do, by the manifest of a session."""

    arm: str
    layers: int
    classes: str
    fused: str
    forward: str
    backward: str
    note: str


@dataclass(frozen=True)
class Fact:
    """One line of a table of settings or machines: a value per arm, and whether all are equal."""

    name: str
    values: Sequence[str]

    @property
    def shared(self) -> bool:
        """Whether every arm has the same."""
        return len(set(self.values)) == 1


@dataclass(frozen=True)
class Evidence:
    """What the sessions of a part say, arm by arm."""

    arms: Sequence[str]
    rows: Mapping[str, Sequence[Body]]
    warnings: Sequence[Warned]
    ran: Sequence[Ran]
    machine: Sequence[Fact]
    differences: Sequence[Fact]
    images: Sequence[str]

    @property
    def finished(self) -> int:
        """Sessions with a row."""
        return sum(map(len, self.rows.values()))


def evidence_of(study: Study, arms: Sequence[ArmFiles]) -> Evidence:
    """Read every session's row and manifest; what is damaged becomes a notice of the study."""
    rows: dict[str, list[Body]] = {}
    bodies: dict[str, list[tuple[str, Body]]] = {}
    for arm in arms:
        rows[arm.label], bodies[arm.label] = [], []
        for folder in arm.sessions:
            with contextlib.suppress(FileNotFoundError):  # it ended, or went away, while we looked
                try:
                    found = source_of(str(folder))
                    row = row_from(str(folder), found[0]) if found else None
                    rows[arm.label] += [row] if row else []
                    if found and found[0] == "session.json":
                        bodies[arm.label].append((folder.name, whole(folder / "session.json")))
                except Refused as refused:
                    study.notices.append(str(refused))
    labels = [arm.label for arm in arms]
    warned = [line for label in labels for line in warnings_of(label, bodies[label])]
    ran = [line for label in labels if (line := ran_of(label, bodies[label]))]
    images = images_of([body for label in labels for _, body in bodies[label]])
    values = {
        arm.label: study.values_of(arm.setting.name) or next((b["config"] for _, b in bodies[arm.label]), {})
        for arm in arms
    }
    return Evidence(labels, rows, warned, ran, machine_of(labels, rows), differences_of(values), images)


def whole(path: Path) -> Body:
    """A finished session's file, with the parts that reports read."""
    body = read_json(path)
    if not isinstance(body, dict):
        raise Refused(f"{path} is damaged; remove it to run the session again")
    manifest = mapping(body.get("manifest"))
    if not is_manifest(manifest):
        raise Refused(f"{path} has a damaged manifest; remove it to run the session again")
    return {
        "row": body.get("row") or {},
        "config": mapping(body.get("config")),
        "images": mapping(body.get("images")),
        "manifest": manifest,
    }


def mapping(value: object) -> Body:
    """A part of a file that is a mapping; nothing where it is none."""
    return value if isinstance(value, dict) else {}


def is_manifest(body: Body) -> bool:
    """Whether a manifest has the parts that reports read, in their shapes; one cut short by hand has not."""
    layers = body.get("norm_layers") or []
    try:
        operators(layers, "forward"), operators(layers, "backward")
    except (AttributeError, TypeError, ValueError):
        return False
    lists = (body.get(name) or [] for name in ("norm_layers", "warnings", "notes"))
    return all(isinstance(each, list) for each in lists)


def warnings_of(arm: str, bodies: Sequence[tuple[str, Body]]) -> Iterator[Warned]:
    """The manifests' warnings, then their notes, equal ones together."""
    for kind in ("warnings", "notes"):
        texts: dict[str, list[str]] = {}
        for session, body in bodies:
            for text in body["manifest"].get(kind) or []:
                texts.setdefault(str(text), []).append(session)
        for text, sessions in texts.items():
            all_of_them = len(sessions) == len(bodies)
            named = "all" if all_of_them else some(sessions)
            yield Warned(arm, kind[:-1], text, f"{len(sessions)} of {len(bodies)}: {named}")


def ran_of(arm: str, bodies: Sequence[tuple[str, Body]]) -> Ran | None:
    """What a session's norm layers executed; a note where another session's differ."""
    if not bodies:
        return None
    seen = [(session, body["manifest"].get("norm_layers") or []) for session, body in bodies]
    layers: list[Body] = seen[0][1]
    signature = json.dumps(layers, sort_keys=True)
    others = [session for session, more in seen if json.dumps(more, sort_keys=True) != signature]
    notes = [f"other operators or shapes in {some(others)}" if others else ""]
    manifest = bodies[0][1]["manifest"]
    notes += ["compiled: operators of the uncompiled step"] if manifest.get("compiled") else []
    return Ran(
        arm,
        len(layers),
        joined(layer.get("class", "") for layer in layers),
        fused_words([bool(layer.get("fused")) for layer in layers]),
        operators(layers, "forward"),
        operators(layers, "backward"),
        "; ".join(filter(None, notes)),
    )


def joined(words: Iterator[str]) -> str:
    """Different words, each once."""
    return some(list(dict.fromkeys(words)))


def fused_words(fused: Sequence[bool]) -> str:
    """`yes`, `no`, `3 of 8 layers`."""
    if not fused or not any(fused):
        return "no"
    return "yes" if all(fused) else f"{sum(fused)} of {len(fused)} layers"


def operators(layers: Sequence[Body], phase: str) -> str:
    """The operators that any of the layers executed, with the most calls that one of them made."""
    calls: dict[str, int] = {}
    for layer in layers:
        for name, count in ((layer.get("ops") or {}).get(phase) or {}).items():
            calls[name] = max(calls.get(name, 0), int(count))
    names = [f"{name.removeprefix('aten.')} × {n}" if n > 1 else name.removeprefix("aten.")
             for name, n in calls.items()]  # fmt: skip
    more = f" and {len(names) - MOST_OPERATORS} more" if len(names) > MOST_OPERATORS else ""
    return ", ".join(names[:MOST_OPERATORS]) + more


def machine_of(labels: Sequence[str], rows: Mapping[str, Sequence[Body]]) -> list[Fact]:
    """Hardware, versions and commit by arm, and when its sessions ran."""
    facts = []
    known = [label for label in labels if rows[label]]
    for column in MACHINE:
        values = [some(list(dict.fromkeys(said(row.get(column)) for row in rows[label]))) for label in known]
        if any(values):
            facts.append(Fact(column, values))
    for name, column, choose in (("first start", "started_at", min), ("last end", "finished_at", max)):
        times = [[str(row[column]) for row in rows[label] if row.get(column)] for label in known]
        if any(times):
            facts.append(Fact(name, [minute(choose(t)) if t else "" for t in times]))
    return facts


def minute(time: str) -> str:
    """`2026-11-21 14:03 UTC` of a UTC time in ISO-8601."""
    return f"{time[:16].replace('T', ' ')} UTC"


def differences_of(values: Mapping[str, Body]) -> list[Fact]:
    """Every key of the configuration that is not the same in all arms; an arm without it has nothing."""
    flat = {label: dict(flatten(config)) for label, config in values.items()}
    keys = dict.fromkeys(key for config in flat.values() for key in config)
    known = [label for label, config in flat.items() if config]
    facts = [
        Fact(key, [said(flat[label][key]) if key in flat[label] else "" for label in known])
        for key in keys
        if key.split(".")[0] not in NOT_SETTINGS and not key.endswith("_partial_")
    ]
    return [fact for fact in facts if len(set(fact.values)) > 1]


def said(value: Any) -> str:
    """A value as a person writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def images_of(bodies: Sequence[Body]) -> list[str]:
    """`1,437 train, 360 test`, once for every way that sessions were fed."""
    found = []
    for body in bodies:
        counts = [f"{n:,} {part}" for part, n in body["images"].items() if isinstance(n, int) and n]
        found += [", ".join(counts)] if counts else []
    return list(dict.fromkeys(found))
