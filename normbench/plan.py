"""A plan: the sessions one command means to run, in launch order; written once, read by all that follows."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from normbench.config import Config, Values
from normbench.identity import Setting, digest_of, result_changing
from normbench.values import Refused

REPETITION = re.compile(r"^(?:session|seed): \d+\n", re.MULTILINE)  # in config.yaml; no part of the setting


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

    @property
    def pack(self) -> int:
        """How many of its sessions train together; 1 where each is alone."""
        return self.values.get("pack") or 1

    @cached_property
    def config_text(self) -> str:
        """config.yaml of its session 0 of seed 0."""
        body = {"config_hash": self.config_hash, "choices": dict(self.choices), **self.values}
        return yaml.safe_dump({**body, "session": 0, "seed": 0}, sort_keys=False, allow_unicode=True)


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
    where: Path | None = field(default=None, compare=False)  # where it was read, if that is not below `out`

    @classmethod
    def interleaved(
        cls, study: str, arms: Sequence[Arm], sessions: Iterable[int], seeds: Iterable[int]
    ) -> "Plan":
        """Session-major, each session's arms in an order shuffled by seed and session: drift hits all.

        With packs it is block-major: as many sessions as fill every arm's packs, those of an arm in a row.
        """
        planned: list[Planned] = []
        size = math.lcm(*(arm.pack for arm in arms))
        blocks: dict[int, list[int]] = {}
        for session in sessions:
            blocks.setdefault(session // size, []).append(session)
        for seed in seeds:
            for block in blocks.values():
                order = list(range(len(arms)))
                random.Random(f"{seed}/{block[0]}").shuffle(order)
                for arm, session in itertools.product(order, block):
                    planned.append(Planned(arm, session, seed, len(planned)))
        return cls(study, arms, planned)

    @cached_property
    def block_ends(self) -> list[int]:
        """The places at which every arm has had equally many sessions, and no pack is cut."""
        size = math.lcm(*(arm.pack for arm in self.arms))
        block = [(planned.seed, planned.session // size) for planned in self.sessions]
        inner = [place for place in range(1, len(block)) if block[place] != block[place - 1]]
        return [*inner, len(block)]

    def packs(self, first: int = 0, last: int | None = None) -> list[list[int]]:
        """The places of a slice by the sessions that train together, each alone where nothing is packed."""
        together: dict[tuple[int, int, int], list[int]] = {}
        for place, planned in enumerate(self.sessions[first:last], first):
            key = (planned.arm, planned.seed, planned.session // self.arms[planned.arm].pack)
            together.setdefault(key, []).append(place)
        return list(together.values())

    def seat(self, planned: Planned) -> int:
        """A session's place in its pack."""
        return planned.session % self.arms[planned.arm].pack

    @property
    def folder(self) -> Path:
        """`<out>/<study>`; of a plan that was read elsewhere, where its file lies."""
        return self.where or Path(self.arms[0].values["out"]) / self.study

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

    def failure(self, planned: Planned) -> dict[str, Any] | None:
        """What an attempt left that ended in an error or was killed, unless it is to be run again."""
        try:
            body = failure_in(self.session_folder(planned))
        except FileNotFoundError:
            return None
        return None if body.get("again") else body

    def open(self, planned: Planned) -> bool:
        """Whether the session is neither finished nor failed."""
        return not self.finished(planned) and self.failure(planned) is None

    def run_again(self, planned: Planned) -> None:
        """Let the session be open again, although it failed; its row stays until the next attempt ends."""
        body = self.failure(planned)
        if body is not None:
            write_json(self.session_folder(planned) / "failure.json", {**body, "again": True})

    def config_text(self, planned: Planned) -> str:
        """A session's config.yaml: every value, the chosen options and the setting's hash."""
        text = self.arms[planned.arm].config_text
        # at a line's start stands no other key's value
        text = text.replace("\nsession: 0\n", f"\nsession: {planned.session}\n")
        return text.replace("\nseed: 0\n", f"\nseed: {planned.seed}\n")

    def check_folders(self) -> None:
        """Refuse a session's folder whose config.yaml is of another setting, finished or not."""
        hashes: dict[str, str | None] = {}
        for planned in self.sessions:
            path = self.session_folder(planned) / "config.yaml"
            try:
                text = path.read_text()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            setting = REPETITION.sub("", text)
            if setting not in hashes:
                hashes[setting] = hash_of_text(setting)
            there = hashes[setting]
            if there == self.arms[planned.arm].config_hash or text == self.config_text(planned):
                continue
            # without a hash it was cut off while it was written; a new start writes it again
            if there is not None or self.finished(planned):
                raise Refused(
                    f"{path} disagrees with its folder's setting; move the folder away to run it again"
                )

    @property
    def body(self) -> dict[str, Any]:
        """What the plan's file holds."""
        arms, sessions = [asdict(a) for a in self.arms], [asdict(s) for s in self.sessions]
        return {"study": self.study, "arms": arms, "sessions": sessions}

    @property
    def path(self) -> Path:
        """`plan-<hash>.json` beside the sessions."""
        digest = hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:10]
        return self.folder / f"plan-{digest}.json"

    def write(self) -> None:
        """Write the file, or leave it where it is already; its time of change says when it was last meant."""
        path = self.path
        if path.is_file():
            os.utime(path)
        else:
            write_json(path, {"made_at": utc_now(), **self.body})

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan of one file."""
        body = read_json(path)
        try:
            arms = [Arm(**arm) for arm in body["arms"]]
            sessions = [Planned(**session) for session in body["sessions"]]
            plan = cls(body["study"], arms, sessions)
            here = plan.folder.resolve() == path.parent.resolve()
            return plan if here else replace(plan, where=path.parent)
        except (KeyError, TypeError) as error:
            raise Refused(f"{path} is no plan; remove it to make it again") from error

    @classmethod
    def newest(cls, folder: Path) -> "Plan | None":
        """The plan in `folder` that a command meant last, if there is one."""
        plans = sorted(folder.glob("plan-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return cls.read(plans[-1]) if plans else None


def failure_in(folder: Path) -> dict[str, Any]:
    """A session's failure.json; Refused where it is damaged."""
    path = folder / "failure.json"
    body: dict[str, Any] = read_json(path)
    if not (isinstance(body, dict) and isinstance(body.get("row"), dict) and body["row"].get("status")):
        raise Refused(f"{path} is damaged; remove it to run the session again")
    return body


def hash_of_text(text: str) -> str | None:
    """The setting's hash by the values in a config.yaml; None where it cannot be read."""
    try:
        values = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return digest_of(result_changing(values, values["choices"]))
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        return None


def utc_now() -> str:
    """The time now, UTC, ISO-8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_json(path: Path) -> Any:
    """A file's content; Refused where it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is damaged ({error}); remove it to make it again") from error


def write_json(path: Path, body: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(body, indent=1, ensure_ascii=False))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed.

    Raises: Refused — a device, a pipe or a folder is there, which the renaming would replace.
    """
    if path.exists() and not path.is_file():
        raise Refused(f"{path} is no ordinary file; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
