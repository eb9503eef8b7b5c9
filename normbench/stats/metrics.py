"""What can be compared: columns of results.csv, and what is derived from the sessions' epochs.csv."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from normbench.values import Refused, nearest

Curve = pd.DataFrame


def best(curve: Curve) -> float:
    """The best test accuracy of any epoch: chosen on the test set, so flattering."""
    return float(curve["test_acc"].max())


def last(curve: Curve) -> float:
    """The test accuracy at the end."""
    return float(curve["test_acc"].iloc[-1])


def area(curve: Curve) -> float:
    """The mean height of test accuracy over steps (trapezoids): high where a session learns early."""
    steps = curve["step"].to_numpy(float)
    heights = curve["test_acc"].to_numpy(float)
    return (
        float(np.trapezoid(heights, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(heights[0])
    )


DERIVED: Mapping[str, Callable[[Curve], float]] = {"best_acc": best, "last_acc": last, "auc_acc": area}
UNTIL = ("time_to_acc", "epochs_to_acc")


@dataclass(frozen=True)
class Metric:
    """A metric by name; `target` where it asks how long until an accuracy is reached."""

    name: str
    target: float | None = None

    @classmethod
    def of(cls, text: str) -> "Metric":
        """`test_acc`, `auc_acc`, `time_to_acc=0.93`."""
        name, sign, value = text.partition("=")
        if name in UNTIL:
            number = float(value) if re.fullmatch(r"\d*\.?\d+([eE]-?\d+)?", value) else math.nan
            if not 0 < number <= 1:
                raise Refused(f"--metric {text}: give the accuracy to reach, a fraction, like {name}=0.93")
            return cls(text, number)
        if sign or not name:
            raise Refused(f"--metric {text!r}: only {' and '.join(UNTIL)} take a value")
        return cls(name)

    @property
    def is_until(self) -> bool:
        """Whether sessions that never get there are censored."""
        return self.target is not None

    @property
    def from_epochs(self) -> bool:
        """Whether the sessions' epochs.csv are needed."""
        return self.is_until or self.name in DERIVED

    @property
    def is_time(self) -> bool:
        """Whether it measures a machine, so that order and hardware matter."""
        return self.name.endswith("_s") or self.name.startswith("time_to_acc")

    @property
    def is_accuracy(self) -> bool:
        """Whether it is the fraction of a fixed set that was right."""
        return self.name.endswith("_acc") and self.name != "auc_acc" and not self.is_until

    @property
    def part(self) -> str:
        """Which images it was measured on: train, val or test."""
        return next((part for part in ("train", "val") if self.name.startswith(f"{part}_")), "test")

    @property
    def better(self) -> int:
        """1 where more is better, −1 where less is."""
        high = self.name.endswith(("_acc", "_f1")) or self.name == "images_per_s"
        return 1 if high else -1

    def course(self, curve: Curve) -> "pd.Series[float]":
        """How far training was at each evaluation: epochs, or seconds of training."""
        return (
            curve["epoch_time_s"].cumsum() if self.name.startswith("time") else curve["epoch"].astype(float)
        )

    def of_curve(self, curve: Curve) -> tuple[float, bool]:
        """A session's value, and whether it was reached rather than cut off."""
        if self.target is None:
            return DERIVED[self.name](curve), True
        there = (curve["test_acc"] >= self.target).to_numpy()
        at = int(there.argmax()) if there.any() else -1
        return float(self.course(curve).iloc[at]), bool(there.any())


def read_curve(path: Path | None) -> Curve | None:
    """The evaluated epochs of one session; None where it has none."""
    if path is None or not path.is_file():
        return None
    try:
        curve = pd.read_csv(path, usecols=["epoch", "step", "test_acc", "epoch_time_s"])
        curve["epoch_time_s"] = curve["epoch_time_s"].astype(float).cumsum()
        curve = curve[curve["test_acc"].astype(float).notna()]
    except (ValueError, pd.errors.ParserError) as error:
        raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    curve["epoch_time_s"] = curve["epoch_time_s"].diff().fillna(curve["epoch_time_s"])
    return None if curve.empty else curve.reset_index(drop=True)


def unknown(metric: Metric, columns: list[str]) -> Refused:
    """The refusal of a metric that no input has."""
    known = [*columns, *DERIVED, *UNTIL]
    return Refused(f"metric {metric.name!r}: no such column of numbers{nearest(metric.name, known)}")
