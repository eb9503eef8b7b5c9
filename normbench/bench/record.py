"""What a run found, as one JSON file: raw times of every round, and the figures that follow from them."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normbench.bench.spread import Spread
from normbench.plan import read_json
from normbench.values import Refused

if TYPE_CHECKING:
    from normbench.bench.interleaved import Side

FORMAT = 2
Body = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Sides that took turns on one case.

    Args:
        suite: whose it is.
        case: what tells it from the suite's other groups; values are words, numbers or flags.
        per: what a time is of: a call, a step, an image, a session.
        baseline: the side that the others' speed is given against.
        sides: by name, in the order they are shown in.
        controls: a side → the side that shows what of its gain has another cause, shown beside it.
        floor: part → how many times the side "copy" makes its floor.
        note: what a reader must know about all of them, "" for nothing.
    """

    suite: str
    case: Mapping[str, Any]
    per: str
    baseline: str
    sides: "Mapping[str, Side]"
    controls: Mapping[str, str] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def body(self) -> Body:
        """As JSON holds it."""
        return {
            "case": dict(self.case),
            "per": self.per,
            "baseline": self.baseline,
            "note": self.note,
            "controls": dict(self.controls),
            "sides": {name: self.side_body(name) for name in self.sides},
        }

    def side_body(self, name: str) -> Body:
        """One side: its parts with raw times and what follows from them, or the reason why there are none."""
        side = self.sides[name]
        share = None if side.cpu_share is None else round(side.cpu_share, 3)
        body: Body = {"missing": side.missing, "note": side.note, "cpu_share": share, "parts": {}}
        for part, times in side.times_s.items():
            spread = Spread.of(times)
            figures: Body = {"times_s": list(times), **{f"{k}_s": v for k, v in asdict(spread).items()}}
            base = self.sides[self.baseline].times_s.get(part)
            figures["speedup"] = asdict(Spread.of_ratio(base, times)) if base else None
            if part in side.bytes_moved:
                figures["bytes"] = side.bytes_moved[part]
                figures["gb_per_s"] = side.bytes_moved[part] / spread.median / 1e9
            copy = self.sides["copy"].times_s.get("copy") if "copy" in self.sides else None
            if copy and part in self.floor:
                floor = [self.floor[part] * seconds for seconds in copy]
                figures["over_floor"] = asdict(Spread.of_ratio(times, floor))
            body["parts"][part] = figures
        return body


def machine_body(device: Any, threads: int, allocator: str) -> Body:
    """Where a run ran, as far as it can change a time."""
    import torch

    from normbench import device as machine
    from normbench.results import git_commit

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": str(device),
        "device_name": machine.name_of(device),
        "cuda": torch.cuda.is_available(),
        "hostname": platform.node(),
        "system": platform.platform(),
        "cores": machine.cores(),
        "threads": threads,
        "load_before": None if load is None else round(load, 2),
        "allocator": allocator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "git_commit": git_commit(),
    }


def shown(command: Sequence[str], suite: str) -> str:
    """What measures one suite of a command again; where its files lie is left out."""
    places = ("suite=", "out=", "page=", "join=", "against=", "data_dir=")
    own = [word for word in command if not word.startswith(places)]
    return " ".join(["python -m normbench.bench", f"suite={suite}", *own])


def run_body(command: Sequence[str], made_at: str, quick: bool, machine: Body) -> Body:
    """A run before its first suite."""
    return {
        "format": FORMAT,
        "command": list(command),
        "made_at": made_at,
        "quick": quick,
        "complete": False,
        "machine": machine,
        "suites": {},
        "targets": [],
    }


def read_run(key: str, path: str) -> Body:
    """A file that a run has written; Refused where it is none."""
    file = Path(path)
    if not file.is_file():
        raise Refused(f"{key}={path}: no such file; give the JSON that a run of bench has written")
    try:
        body = read_json(file)
    except Refused:  # whose cure, to remove the file, is meant for our own
        body = None
    if not isinstance(body, dict) or body.get("format") != FORMAT or not {"machine", "suites"} <= body.keys():
        raise Refused(f"{key}={path} is no result of this version's bench")
    return body


def same_machine(key: str, path: str, now: Body, then: Body) -> None:
    """Refused where two runs' times do not belong on one page."""
    for what in ("device_name", "torch", "threads", "allocator"):
        if now["machine"][what] != then["machine"][what]:
            raise Refused(
                f"{key}={path}: measured with {what} {then['machine'][what]}, this run has "
                f"{now['machine'][what]}; run its suites again"
            )
