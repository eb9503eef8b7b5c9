"""Layer times of somewhere else, to lay over ours: the first study's two tables, or another layers.csv.

mbn_kernel_stats_bn_times.csv    run, bn_index_forward_order, layer_name, fwd_ns, bwd_ns
mbn_jpeg_bars_read_ns.csv        model, direction, stride, bn_index_forward_order, wall_ns_read
layers.csv                       our own; its times inside the model
"""

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from normbench.values import Refused

KERNELS = ("run", "bn_index_forward_order", "fwd_ns", "bwd_ns")
BARS = ("model", "direction", "stride", "bn_index_forward_order", "wall_ns_read")
OURS = ("arm", "stride", "layer_index", "place", "forward_median_s", "backward_median_s")
RUN = re.compile(r"(?:^|/)(OBN|MBN)(?:_S(\d+))?(?:/|$)")

Key = tuple[str, int | None, int, str]  # arm, stride, layer, pass


@dataclass(frozen=True)
class Series:
    """One arm of theirs: pass → seconds, a layer each, in forward order."""

    arm: str
    stride: int | None
    times_s: dict[str, list[float]]


def read_times(path: str) -> list[Series]:
    """Every arm of a table; where an arm has several runs, each layer's median. Refused where it is none."""
    file = Path(path)
    if not file.is_file():
        raise Refused(f"compare={path}: no such file")
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        columns = set(rows[0]) if rows else set()
        reader = next((read for names, read in READERS if columns.issuperset(names)), None)
        if reader is None:
            known = "; ".join(", ".join(names) for names, _ in READERS)
            raise Refused(f"compare={path}: no table of layer times; the columns known are {known}")
        found: dict[Key, list[float]] = defaultdict(list)
        for key, time_s in reader(rows):
            found[key].append(time_s)
    except (ValueError, TypeError, csv.Error) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"compare={path}: cannot be read ({error})") from error
    return in_series(path, found)


def in_series(path: str, found: dict[Key, list[float]]) -> list[Series]:
    """By arm and stride, complete from the first layer to the last in both passes."""
    arms = sorted({key[:2] for key in found}, key=lambda arm: (arm[0], arm[1] or 0))
    series = []
    for arm, stride in arms:
        times: dict[str, list[float]] = {}
        for which in ("forward", "backward"):
            own = {
                k[2]: statistics.median(v) for k, v in found.items() if (*k[:2], k[3]) == (arm, stride, which)
            }
            if sorted(own) != list(range(len(own))) or not own:
                raise Refused(f"compare={path}: {arm} stride {stride} lacks layers in its {which} pass")
            times[which] = [own[layer] for layer in range(len(own))]
        if len(times["forward"]) != len(times["backward"]):
            raise Refused(f"compare={path}: {arm} stride {stride} has passes of unequal length")
        series.append(Series(arm, stride, times))
    return series


def of_kernels(rows: Sequence[dict[str, str]]) -> Iterable[tuple[Key, float]]:
    """The profiler's kernel times, by the run's name; a plain OBN run has no stride.

    Some runs count eleven steps, some one: the run with the least time is taken as one step.
    """
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        totals[row["run"]] += seconds(row, "fwd_ns", 1e9)
    least = min(totals.values())
    for row in rows:
        steps = round(totals[row["run"]] / least)
        match = RUN.search(row["run"])
        if match is None:
            raise ValueError(f"run {row['run']!r} names no OBN or MBN")
        stride = None if match[2] is None else int(match[2])
        layer = int(row["bn_index_forward_order"])
        yield (match[1], stride, layer, "forward"), seconds(row, "fwd_ns", 1e9) / steps
        yield (match[1], stride, layer, "backward"), seconds(row, "bwd_ns", 1e9) / steps


def of_bars(rows: Sequence[dict[str, str]]) -> Iterable[tuple[Key, float]]:
    """What was read off the published bar charts."""
    for row in rows:
        if row["direction"] not in ("forward", "backward"):
            raise ValueError(f"direction {row['direction']!r} is no pass")
        key = (row["model"], int(row["stride"]), int(row["bn_index_forward_order"]), row["direction"])
        yield key, seconds(row, "wall_ns_read", 1e9)


def of_ours(rows: Sequence[dict[str, str]]) -> Iterable[tuple[Key, float]]:
    """Another profile's layers inside the model."""
    for row in rows:
        if row["place"] == "model":
            stride = int(row["stride"]) if row["stride"] else None
            for which in ("forward", "backward"):
                key = (row["arm"], stride, int(row["layer_index"]), which)
                yield key, seconds(row, f"{which}_median_s")


def seconds(row: Mapping[str, str], column: str, of_a_second: float = 1.0) -> float:
    """A time above zero, given in parts of a second."""
    found = float(row[column]) / of_a_second
    if not 0 < found < math.inf:
        raise ValueError(f"{column} must be above 0, got {row[column]}")
    return found


READERS = ((KERNELS, of_kernels), (BARS, of_bars), (OURS, of_ours))


def check_layers(path: str, series: Sequence[Series], layers: int) -> None:
    """Refused where theirs is another model."""
    for one in series:
        theirs = len(one.times_s["forward"])
        if theirs != layers:
            raise Refused(
                f"compare={path}: {one.arm} has {theirs} norm layers, {layers} in the model; compare alike"
            )
