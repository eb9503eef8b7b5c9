"""What one session's watches saw, into its files and TensorBoard.

TensorBoard's groups go by the first word of a tag: `trace_…` comes after accuracy, loss and time, and the
histograms, a card a run, are a group of their own.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from normbench.results import EpochRow
from normbench.scalars import Scalars
from normbench.traces.features import Found, Values, quantiles_of
from normbench.traces.norms import Sample
from normbench.traces.tables import COLUMNS, QUANTITIES, Cell, TraceTable

SCALAR_CHANNELS = 8  # of a layer as TensorBoard scalars; the histograms have them all
HISTOGRAM_VALUES = 2**16


class SessionTraces:
    """The traces of one session.

    Args:
        folder: its `traces/`; None writes nothing.
        kinds: norms, features.
        step: what the session goes on from.
        scalars: TensorBoard's.
        seat: its place in its pack.
    """

    def __init__(
        self, folder: Path | None, kinds: Sequence[str], step: int, scalars: Scalars, seat: int
    ) -> None:
        files = [
            name for kind in kinds for name in (("norms",) if kind == "norms" else ("features", "logits"))
        ]
        self.tables = {
            name: TraceTable(folder / f"{name}.csv" if folder else None, name, step) for name in files
        }
        self.scalars, self.seat = scalars, seat

    def norms(self, samples: Iterable[Sample]) -> None:
        """Traced steps: a row a channel, and scalars of the first few."""
        for sample in samples:
            own = sample.values[:, self.seat].tolist()
            found = dict(zip(sample.quantities, own, strict=True))
            at = (sample.step, sample.epoch, sample.layer)
            rows: list[list[Cell]] = [
                [*at, channel, *(found[name][i] if name in found else None for name in QUANTITIES)]
                for i, channel in enumerate(sample.channels)
            ]
            self.tables["norms"].append(rows)
            for name, values in found.items():
                shown = zip(sample.channels[:SCALAR_CHANNELS], values, strict=False)
                for channel, value in shown:
                    self.scalars.add(f"trace_{name}/{sample.layer}/{channel}", value, sample.step)

    def whole_norms(self, samples: Iterable[Sample]) -> None:
        """The latest traced step with every channel: histograms."""
        for sample in samples:
            for name, values in zip(sample.quantities, sample.values[:, self.seat], strict=True):
                self.scalars.histogram(f"trace_histograms/{name}/{sample.layer}", values, sample.step)

    def features(self, row: EpochRow, part: str, layers: Sequence[Found], peaks: Values) -> None:
        """An evaluation: a row a layer, and one of the logits' peaks."""
        at = (row.epoch, row.step)
        rows: list[list[Cell]] = []
        for found in layers:
            quantiles: list[Cell] = list(found.quantiles) if found.values.size else [None] * 4
            rows.append([*at, found.layer, *quantiles, part, found.values.size, found.out_of])
            for name, value in zip(COLUMNS["features"][3:7], quantiles, strict=True):
                if value is not None:
                    self.scalars.add(f"trace_features/{found.layer}/{name}", float(value), row.step)
            thinned = found.values[:: math.ceil(found.values.size / HISTOGRAM_VALUES) or 1]
            self.scalars.histogram(f"trace_histograms/features/{found.layer}", thinned, row.step)
        self.tables["features"].append(rows)
        with np.errstate(all="ignore"):
            mean = float(peaks.mean(dtype=np.float64))
        numbers = (mean, *quantiles_of(peaks))
        self.tables["logits"].append([[*at, *numbers, part]])
        for name, value in zip(COLUMNS["logits"][2:7], numbers, strict=True):
            self.scalars.add(f"trace_logits/{name}", value, row.step)
        self.scalars.histogram("trace_histograms/logits/peak", peaks, row.step)

    def close(self) -> None:
        """Close the files."""
        with contextlib.ExitStack() as stack:
            for table in self.tables.values():
                stack.callback(table.close)
