"""An arm's sessions in order, and which sessions of two arms are compared, if they can be at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from normbench.stats.estimates import CAUTION, still
from normbench.stats.inputs import ENDED
from normbench.stats.metrics import Metric
from normbench.stats.series import Floats, effective_n, lag1
from normbench.stats.survival import Reached, horizon_of
from normbench.stats.verdicts import FEWEST, FEWEST_TIMES

# with equal seed and session: equal weights, batches and augmentation
SAME_NUMBERS = ("model", "dataset", "batch_size")
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

    def values(self, metric: str, places: int | None = None) -> Floats:
        """The metric's values, in order, without missing ones; of the first `places` places."""
        column = self.rows[metric].to_numpy(float)
        kept = ~np.isnan(column) & (True if places is None else self.place < places)
        return np.asarray(column[kept])

    def by_place(self, metric: str) -> Floats:
        """The metric of every session that any arm of the group has; NaN where this arm has none."""
        values = np.full(self.places, np.nan)
        values[self.place] = self.rows[metric].to_numpy(float)
        return values

    def texts_by_place(self, column: str) -> NDArray[np.object_]:
        """A column of names by place, None where it is not known."""
        texts = np.full(self.places, None, dtype=object)
        values = self.rows[column].astype(object)
        texts[self.place] = values.where(values.notna(), None).to_numpy()
        return texts

    def known(self, column: str) -> list[Any]:
        """The different values that a column is known to have."""
        if column not in self._known:
            values = list(self.rows[column].dropna().unique()) if column in self.rows else []
            self._known[column] = sorted(values, key=str)
        return self._known[column]

    @cached_property
    def numbered(self) -> bool:
        """Whether every session says its seed and number."""
        columns = ["seed", "session"]
        return set(columns) <= set(self.rows) and not self.rows[columns].isna().any(axis=None)

    @cached_property
    def ended(self) -> NDArray[np.bool_]:
        """Whether each session ended with a result."""
        if "status" not in self.rows:
            return np.ones(len(self.rows), bool)
        return self.rows["status"].isin(ENDED).to_numpy(bool)

    def count(self, status: str) -> int:
        """Sessions that ended so."""
        return int((self.rows["status"] == status).sum()) if "status" in self.rows else 0

    def unmeasured(self, metric: str) -> int:
        """Sessions that ended without a value of the metric."""
        return int((self.rows[metric].isna().to_numpy() & self.ended).sum())

    def repeats_random_numbers_of(self, other: "Arm") -> bool:
        """Whether equal (seed, session) means equal random numbers: by the rows, never assumed."""
        if not (self.numbered and other.numbered):
            return False
        return all(self.known(c) and self.known(c) == other.known(c) for c in SAME_NUMBERS)


@dataclass(frozen=True)
class Worth:
    """A series of n sessions, how alike successive ones are, and how many independent ones it is worth."""

    name: str
    lag1: float
    n: int
    sessions: float

    def __str__(self) -> str:
        return (
            f"{self.name}: lag-1 autocorrelation {self.lag1:.2f}, {self.n} sessions worth {self.sessions:.1f}"
        )


@dataclass(frozen=True)
class Match:
    """Which sessions of two arms are compared in one metric: in pairs, or each arm by itself."""

    b: Arm
    t: Arm
    metric: Metric
    is_paired: bool
    note: str

    @classmethod
    def of(cls, b: Arm, t: Arm, metric: Metric) -> "Match":
        """Pairs where sessions share random numbers and at least half of the smaller arm has a partner."""
        made = partial(cls, b, t, metric)
        if not t.repeats_random_numbers_of(b):
            return made(False, "")
        x, y = ~np.isnan(b.by_place(metric.name)), ~np.isnan(t.by_place(metric.name))
        common = int((x & y).sum())
        if common < max(FEWEST, min(x.sum(), y.sum()) / 2):
            return made(False, "")
        if metric.is_time and differing(b, t, "hostname", x & y):
            return made(False, "pairs ran on different hosts, so each arm's own series decides")
        whole = common == max(x.sum(), y.sum())
        return made(True, "" if whole else f"by the {common} sessions that both arms have")

    @cached_property
    def both(self) -> NDArray[np.bool_]:
        """The places where both arms have a value."""
        x, y = self.b.by_place(self.metric.name), self.t.by_place(self.metric.name)
        return np.asarray(~np.isnan(x) & ~np.isnan(y))

    @property
    def last_place(self) -> int:
        """How many places the shorter arm has gone through, whatever became of its sessions."""
        return int(min(self.b.place.max(), self.t.place.max())) + 1

    def sides(self, places: int | None = None) -> tuple[Floats, Floats]:
        """The baseline's and the treatment's values, up to so many places."""
        name = self.metric.name
        if not self.is_paired:
            return self.b.values(name, places), self.t.values(name, places)
        kept = self.both[:places]
        return self.b.by_place(name)[:places][kept], self.t.by_place(name)[:places][kept]

    def reached(self, places: int | None = None) -> tuple[Reached, Reached]:
        """When each session reached the target, and whether it did."""
        sides = []
        for arm, time in zip((self.b, self.t), self.sides(places), strict=True):
            there = arm.rows[f"{self.metric.name} reached"].to_numpy(bool)
            if self.is_paired:
                by_place = np.zeros(arm.places, bool)
                by_place[arm.place] = there
                there = by_place[:places][self.both[:places]]
            else:
                kept = ~arm.rows[self.metric.name].isna().to_numpy()
                there = there[kept & (True if places is None else arm.place < places)]
            sides.append(Reached(time, there))
        return sides[0], sides[1]

    def series(self) -> tuple[Floats, Floats]:
        """`sides`, times to a target cut at the horizon up to which both arms' are known."""
        x, y = self.sides()
        if self.metric.is_until:
            horizon = horizon_of(*self.reached())
            return np.minimum(x, horizon), np.minimum(y, horizon)
        return x, y

    def worth(self) -> list[Worth]:
        """How many independent sessions the series are worth that the serial test rests on."""
        x, y = self.series()
        if self.is_paired:
            return [Worth("the differences", float(lag1(y - x)), x.size, float(effective_n(y - x, CAUTION)))]
        named = ((self.b.label, x), (self.t.label, y))
        return [Worth(name, float(lag1(side)), side.size, float(effective_n(side))) for name, side in named]

    def obstacle(self) -> str:
        """Why the arms cannot be compared at all; empty where they can."""
        for column in ("dataset", *(SAME_MACHINE if self.metric.is_time else ())):
            one, other = self.b.known(column), self.t.known(column)
            if not (one and other):
                continue
            if one != other:
                cure = "; use --by dataset" if column == "dataset" else ""
                return f"{column} differs: {listed(other)} against {listed(one)}{cure}"
            if len(one) > 1 and (not self.is_paired or differing(self.b, self.t, column, self.both)):
                return f"{column} varies within the arms: {listed(one)}"
        packs = sorted({*self.b.known("pack"), *self.t.known("pack")})
        what = "memory" if self.metric.name == "peak_memory_mib" else "time" if self.metric.is_time else ""
        if what and packs and packs[-1] > 1:
            return f"pack={listed(packs)}: a packed session's {what} is its pack's"
        return self.too_few()

    def too_few(self) -> str:
        """Why so many sessions say nothing; empty where they do."""
        x, y = self.sides()
        n = min(x.size, y.size)
        if n < FEWEST:
            return f"too few sessions: {y.size} against {x.size}, {FEWEST} an arm needed"
        if not self.metric.is_time:
            return ""
        if n < FEWEST_TIMES:
            return f"too few sessions: {n} times cannot show how alike they are, {FEWEST_TIMES} needed"
        if still(x, y, self.is_paired):
            return "no spread: times that never differ cannot show how alike they are"
        return ""

    def caution(self) -> str:
        """What else could make times differ: each arm on hosts of its own, or one after the other."""
        if not self.metric.is_time or self.is_paired:
            return ""
        one, other = set(self.b.known("hostname")), set(self.t.known("hostname"))
        words = ["each arm ran on hosts of its own"] if one and other and not one & other else []
        for column in ("started_at", "launch_order"):
            if column in self.b.rows and self.b.known(column) and self.t.known(column):
                first, second = self.b.rows[column], self.t.rows[column]
                if first.max() < second.min() or second.max() < first.min():
                    words.append("the arms ran one after the other, so a drift between them looks the same")
                break
        return "; ".join(words)


def differing(b: Arm, t: Arm, column: str, both: NDArray[np.bool_]) -> bool:
    """Whether a column is known to differ between the sessions of some pair."""
    one, other = b.known(column), t.known(column)
    if not (one and other) or (one == other and len(one) == 1):
        return False
    x, y = b.texts_by_place(column)[both], t.texts_by_place(column)[both]
    return any(p is not None and q is not None and p != q for p, q in zip(x, y, strict=True))


def listed(values: Sequence[Any]) -> str:
    """Values on one line, whole numbers without a point."""
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
