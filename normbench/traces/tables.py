"""The files of a session's `traces/`: appended and flushed as it goes, cut back to the checkpoint on resume.

What a row is (`outputs/README.md` says what the columns are):

    norms.csv      a row for each traced step, layer and channel
    features.csv   a row for each evaluation and layer
    logits.csv     a row for each evaluation
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from normbench.plan import write_whole

QUANTITIES = ("batch_mean", "batch_std", "running_mean", "running_var", "weight", "bias", "weight_grad",
              "bias_grad")  # fmt: skip
COLUMNS = {
    "norms": ("step", "epoch", "layer", "channel", *QUANTITIES),
    "features": ("epoch", "step", "layer", "q01", "q20", "q80", "q99", "part", "values", "out_of"),
    "logits": ("epoch", "step", "peak_mean", "peak_q01", "peak_q20", "peak_q80", "peak_q99", "part"),
}
Cell = str | int | float | None


class TraceTable:
    """One file: the rows up to `step` that are there already, and what is appended.

    Args:
        path: None writes nothing.
        kind: which of COLUMNS.
        step: what the session goes on from; 0 begins anew.
    """

    def __init__(self, path: Path | None, kind: str, step: int) -> None:
        self.file: io.TextIOWrapper | None = None
        if path is None:
            return
        columns = COLUMNS[kind]
        kept = rows_until(path, columns, step) if step else []
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *kept])
        write_whole(path, text.getvalue())
        self.file = path.open("a", newline="")

    def append(self, rows: Iterable[Sequence[Cell]]) -> None:
        """Write rows through to the file; a number has nine digits, which is all that float32 has."""
        if self.file is None:
            return
        csv.writer(self.file, lineterminator="\n").writerows([list(map(cell, row)) for row in rows])
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def cell(value: Cell) -> str:
    """A value as it stands in the file; empty for None."""
    if isinstance(value, float):
        return f"{value:.9g}" if math.isfinite(value) else str(value)
    return "" if value is None else str(value)


def rows_until(path: Path, columns: Sequence[str], step: int) -> list[list[str]]:
    """The whole rows of a file up to that step; none where it is missing or of another version."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
    except (OSError, csv.Error):
        return []
    if not rows or rows[0] != list(columns):
        return []
    at = columns.index("step")
    whole = (row for row in rows[1:] if len(row) == len(columns) and row[at].isdigit())
    return [row for row in whole if int(row[at]) <= step]
