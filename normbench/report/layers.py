"""A profile of norm layers beside a study: which one is shown, and its rows as tables to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normbench.profile.record import Body, Row, layer_rows, read_profile, step_rows
from normbench.values import Refused

STEPS = {"step_median_s": "step (ms)", "without_norms_median_s": "without norms (ms)",
         "norm_share_by_layers": "share by layers (%)", "norm_share_by_difference": "by difference (%)",
         "gap": "gap (%)", "gap_low": "gap from (%)", "gap_high": "gap to (%)",
         "agrees": "agree"}  # fmt: skip
TIMES = {"forward_median_s": "forward (ms)", "backward_median_s": "backward (ms)",
         "forward_gb_per_s": "forward (GB/s)", "backward_gb_per_s": "backward (GB/s)",
         "copy_gb_per_s": "a copy (GB/s)", "peak_memory_mib": "peak memory (MiB)",
         "share_of_step": "share of step (%)"}  # fmt: skip
Norm = tuple[str, Mapping[str, Any]]
NAMES = {"layer": "layer", "arm": "arm", "place": "where", "shape": "shape"}


@dataclass(frozen=True)
class Profile:
    """A profile's folder and what it found."""

    folder: Path
    body: Body

    @property
    def where(self) -> str:
        """What was measured, and on what."""
        machine, arm = self.body["machine"], self.body["arms"][0]
        said = [self.body["model"], f"batch {arm['batch_size']}", arm["precision"], machine["device_name"],
                f"threads {machine['threads']}", f"torch {machine['torch']}"]  # fmt: skip
        return ", ".join(said)

    def places(self, norms: Sequence[Norm]) -> list[int]:
        """Each arm's place in the palette: of the study's first arm with its norm, else one behind them all.

        Args:
            norms: of the study's arms the norm's name and options.
        """
        places: list[int] = []
        others = iter(range(len(norms), len(norms) + len(self.body["arms"])))
        for arm in self.body["arms"]:
            norm = arm["norm"], arm["norm_options"]
            own = norms.index(norm) if norm in norms else -1
            places.append(own if own >= 0 and own not in places else next(others))
        return places


def profile_of(study: Path, given: Path | None, notices: list[str]) -> Profile | None:
    """The profile asked for, else the newest of the study's own; None where there is none.

    Raises: Refused where the one asked for cannot be read; another is a notice.
    """
    if given is not None:
        return Profile(given, read_profile("--profile", str(given)))
    found = sorted((study / "profile").glob("*/profile.json"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        return None
    try:
        return Profile(found[-1].parent, read_profile("profile", str(found[-1])))
    except Refused as refused:
        notices.append(str(refused))
        return None


def layer_table(profile: Profile) -> tuple[list[str], list[list[str]]]:
    """The rows of layers.csv for reading."""
    return table(list(layer_rows(profile.body)), NAMES | TIMES)


def step_table(profile: Profile) -> tuple[list[str], list[list[str]]]:
    """The rows of steps.csv for reading."""
    return table(list(step_rows(profile.body)), {"arm": "arm"} | STEPS)


def table(rows: Sequence[Row], columns: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """The columns by their names to read, in ms and per cent."""
    cells = [[cell(row.get(column), columns[column]) for column in columns] for row in rows]
    return list(columns.values()), cells


def cell(value: object, name: str) -> str:
    """A value of a table, in its column's unit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        scale = 1e3 if name.endswith("(ms)") else 100 if name.endswith("(%)") else 1
        return f"{scale * value:.4g}"
    return "" if value is None else str(value)
