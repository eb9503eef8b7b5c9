"""A plan: the sessions one command means to run, in launch order; written once, read by all that follows."""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from normbench.config import Config, Values
from normbench.identity import Setting


@dataclass(frozen=True)
class Arm:
    """One setting inside a study, with every value it runs with."""

    setting: str
    arm: str
    config_hash: str
    choices: Mapping[str, str]
    values: Values

    @classmethod
    def of(cls, setting: Setting, values: Values, choices: Mapping[str, str]) -> "Arm":
        """An arm of checked values."""
        return cls(setting.name, setting.id, setting.hash, dict(choices), values)


@dataclass(frozen=True)
class Planned:
    """One session of a plan: which arm, which repetition, and its place in the launch order."""

    arm: int
    session: int
    seed: int
    launch_order: int


@dataclass(frozen=True)
class Plan:
    """Arms × sessions of one study in launch order."""

    study: str
    arms: Sequence[Arm]
    sessions: Sequence[Planned]

    @classmethod
    def interleaved(
        cls, study: str, arms: Sequence[Arm], sessions: Iterable[int], seeds: Iterable[int]
    ) -> "Plan":
        """Session-major, each session's arms in an order shuffled by seed and session: drift hits all."""
        planned: list[Planned] = []
        repetitions = list(sessions)
        for seed in seeds:
            for session in repetitions:
                order = list(range(len(arms)))
                random.Random(f"{seed}/{session}").shuffle(order)
                planned += [Planned(arm, session, seed, len(planned) + i) for i, arm in enumerate(order)]
        return cls(study, arms, planned)

    @property
    def folder(self) -> Path:
        """`<out>/<study>`."""
        return Path(self.arms[0].values["out"]) / self.study

    def session_folder(self, planned: Planned) -> Path:
        """`<out>/<study>/<setting>/s<session>`, with the seed in front where it is not 0."""
        name = f"s{planned.session}" if planned.seed == 0 else f"seed{planned.seed}-s{planned.session}"
        return self.folder / self.arms[planned.arm].setting / name

    def config(self, planned: Planned) -> Config:
        """The typed config of one session."""
        arm = self.arms[planned.arm]
        return Config.of({**arm.values, "session": planned.session, "seed": planned.seed}, arm.choices)

    def finished(self, planned: Planned) -> bool:
        """Whether the session's own file says that it ended."""
        return (self.session_folder(planned) / "session.json").is_file()

    def write(self) -> Path:
        """Write `plan-<hash>.json` beside the sessions, unless the same plan is there already."""
        body = {"study": self.study, "arms": [asdict(a) for a in self.arms],
                "sessions": [asdict(s) for s in self.sessions]}  # fmt: skip
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:10]
        path = self.folder / f"plan-{digest}.json"
        if not path.is_file():
            write_json(path, {"made_at": utc_now(), **body})
        return path

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan of one file."""
        body = json.loads(path.read_text())
        return cls(body["study"], [Arm(**a) for a in body["arms"]], [Planned(**s) for s in body["sessions"]])

    @classmethod
    def newest(cls, folder: Path) -> "Plan | None":
        """The plan in `folder` that was made last, if there is one."""
        plans = [(json.loads(p.read_text())["made_at"], p) for p in folder.glob("plan-*.json")]
        return cls.read(max(plans)[1]) if plans else None


def utc_now() -> str:
    """The time now, UTC, ISO-8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_json(path: Path, body: Any) -> None:
    """Write a file whole or not at all: beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(body, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
