"""An arm's sessions in order, and whether two arms can be compared at all, and in pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from normbench.stats.metrics import Metric
from normbench.stats.series import Floats
from normbench.stats.survival import Reached
from normbench.stats.verdicts import FEWEST, FEWEST_TIMES

SAME_NUMBERS = (
    "model",
    "dataset",
    "batch_size",
)  # with equal seed and session: equal weights, batches, augmentation
SAME_MACHINE = ("device_name", "precision", "torch_version", "pack", "threads", "slots")


@dataclass
class Arm:
    """One arm's sessions in the order they were run. `place` is each session's row in what arms share."""

    label: str
    key: str
    rows: pd.DataFrame
    place: NDArray[np.intp]
    places: int
    expected: int
    images: Mapping[str, int] = field(default_factory=dict)
    _known: dict[str, list[Any]] = field(default_factory=dict, repr=False)

    def values(self, metric: str) -> Floats:
        """The metric's values, in order, without missing ones."""
        column = self.rows[metric].to_numpy(float)
        return np.asarray(column[~np.isnan(column)])

    def by_place(self, metric: str) -> Floats:
        """The metric of every session that any arm of the group has; NaN where this arm has none."""
        values = np.full(self.places, np.nan)
        values[self.place] = self.rows[metric].to_numpy(float)
        return values

    def known(self, column: str) -> list[Any]:
        """The different values that a column is known to have."""
        if column not in self._known:
            values = list(self.rows[column].dropna().unique()) if column in self.rows else []
            self._known[column] = sorted(values, key=str)
        return self._known[column]

    @cached_property
    def numbered(self) -> bool:
        """Whether every session says its seed and number."""
        return {"seed", "session"} <= set(self.rows) and not self.rows[["seed", "session"]].isna().any(
            axis=None
        )

    @cached_property
    def hosts(self) -> NDArray[np.object_]:
        """The host of every place, None where it is not known."""
        hosts = np.full(self.places, None, dtype=object)
        if "hostname" in self.rows:
            names = self.rows["hostname"].astype(object)
            hosts[self.place] = names.where(names.notna(), None).to_numpy()
        return hosts

    def count(self, status: str) -> int:
        """Sessions that ended so."""
        return (
            int((self.rows["status"] == status).sum())
            if "status" in self.rows
            else len(self.rows) * (status == "ok")
        )

    def repeats_random_numbers_of(self, other: "Arm") -> bool:
        """Whether equal (seed, session) means equal random numbers: by the rows, never assumed."""
        same = all(self.known(column) == other.known(column) for column in SAME_NUMBERS)
        return self.numbered and other.numbered and same


def pairing(b: Arm, t: Arm, metric: Metric) -> tuple[bool, str]:
    """Whether sessions are compared in pairs, and a word where some have no partner."""
    if not t.repeats_random_numbers_of(b):
        return False, ""
    x, y = b.by_place(metric.name), t.by_place(metric.name)
    both = ~np.isnan(x) & ~np.isnan(y)
    whole = int(min((~np.isnan(x)).sum(), (~np.isnan(y)).sum()))
    most = int(max((~np.isnan(x)).sum(), (~np.isnan(y)).sum()))
    if both.sum() < max(FEWEST, whole / 2):
        return False, ""
    if metric.is_time and not same_hosts(b, t, both):
        return False, "pairs ran on different hosts, so each arm's own series decides"
    return True, "" if both.sum() == most else f"by the {both.sum()} sessions that both arms have"


def same_hosts(b: Arm, t: Arm, both: NDArray[np.bool_]) -> bool:
    """Whether the two sessions of each pair ran on one host, as far as is known."""
    if b.known("hostname") == t.known("hostname") and len(b.known("hostname")) <= 1:
        return True
    return bool(np.all(b.hosts[both] == t.hosts[both]))


def obstacle(b: Arm, t: Arm, metric: Metric, is_paired: bool) -> str:
    """Why the arms cannot be compared at all; empty where they can."""
    for column in ("dataset", *(SAME_MACHINE if metric.is_time else ())):
        one, other = b.known(column), t.known(column)
        if one and other and one != other:
            cure = "; use --by dataset" if column == "dataset" else ""
            return f"{column} differs: {listed(other)} against {listed(one)}{cure}"
        if len(one) > 1 and column != "dataset" and not is_paired:
            return f"{column} varies within the arms: {listed(one)}"
    return ""


def listed(values: Sequence[Any]) -> str:
    """Values on one line, whole numbers without a point."""
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def too_few(metric: Metric, x: Floats, y: Floats) -> str:
    """Why so many sessions say nothing; empty where they do."""
    n = min(x.size, y.size)
    if n < FEWEST:
        return f"too few sessions: {y.size} against {x.size}, {FEWEST} an arm needed"
    if metric.is_time and n < FEWEST_TIMES:
        return (
            f"too few sessions: {n} times cannot show how much they repeat themselves, {FEWEST_TIMES} needed"
        )
    return ""


def reached_by(arms: Sequence[Arm], metric: Metric, places: NDArray[np.bool_] | None) -> list[Reached]:
    """When each session reached the target, if it did: in order, or by place where compared in pairs."""
    sides = []
    for arm in arms:
        time = arm.rows[metric.name].to_numpy(float)
        reached = arm.rows[f"{metric.name} reached"].to_numpy(bool)
        known = ~np.isnan(time)
        if places is not None:
            time, there = arm.by_place(metric.name), np.zeros(arm.places, bool)
            there[arm.place] = reached
            reached, known = there, places
        sides.append(Reached(time[known], reached[known]))
    return sides
