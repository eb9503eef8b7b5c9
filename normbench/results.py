"""Rows and where they land: epochs.csv while a session goes, session.json at its end, results.csv from all.

    python -m normbench.results outputs/mbn_stride      rebuilds results.csv from the sessions' own files

`results.csv` is never the only copy: every row in it can be made again from the session folders.
"""

import argparse
import csv
import math
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from normbench.doors import one_line_errors
from normbench.plan import Plan, read_json
from normbench.values import Refused

COLUMNS = """
    study setting arm session seed status model dataset norm norm_options stride batch_size epochs steps
    lr precision compile pack threads slots device device_name test_acc test_loss test_macro_f1
    best_test_acc val_acc train_acc train_loss epoch_time_s epoch_time_mean_s epochs_timed eval_time_s
    total_time_s images_per_s peak_memory_mib params trainable_params norm_layers warnings launch_order
    started_at finished_at hostname torch_version git_commit config_hash error
""".split()  # noqa: SIM905
Row = dict[str, Any]


@dataclass(frozen=True)
class EpochRow:
    """One row of epochs.csv. Losses are means in nats, accuracies fractions; None where not evaluated."""

    epoch: int
    step: int
    train_loss: float
    train_acc: float
    val_loss: float | None
    val_acc: float | None
    test_loss: float | None
    test_acc: float | None
    lr: float
    epoch_time_s: float | None  # None where the epoch was interrupted
    eval_time_s: float | None
    images_per_s: float | None
    peak_memory_mib: float
    finished_at: str


class EpochTable:
    """epochs.csv, begun anew with the rows so far and flushed at every row."""

    def __init__(self, path: Path, so_far: Sequence[EpochRow] = ()) -> None:
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow([f.name for f in fields(EpochRow)])
        for row in so_far:
            self.append(row)

    def append(self, row: EpochRow) -> None:
        """Write one row through to the file."""
        self.writer.writerow(astuple(row))
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


@dataclass(frozen=True)
class Outcome:
    """How a session's training ended."""

    status: str
    rows: Sequence[EpochRow]
    reported: EpochRow
    test_macro_f1: float
    steps_per_epoch: int
    total_time_s: float

    def epoch_times(self) -> list[float]:
        """Seconds per epoch, one per row as long as the first; a row that is no epoch is scaled to one.

        An epoch that was interrupted has none.
        """
        steps = [b.step - a for a, b in zip([0, *(r.step for r in self.rows)], self.rows, strict=False)]
        whole = [(row, n) for row, n in zip(self.rows, steps, strict=True) if n == steps[0]]
        return [r.epoch_time_s * self.steps_per_epoch / n for r, n in whole if r.epoch_time_s is not None]

    def columns(self) -> Row:
        """The measured part of the result row."""
        times = self.epoch_times()
        evaluations = [r.eval_time_s for r in self.rows if r.eval_time_s is not None]
        tested = [r.test_acc for r in self.rows if r.test_acc is not None]
        rates = [r.images_per_s for r in self.rows if r.images_per_s is not None]
        return {
            "status": self.status,
            "test_acc": self.reported.test_acc,
            "test_loss": self.reported.test_loss,
            "test_macro_f1": self.test_macro_f1,
            "best_test_acc": max(tested),
            "val_acc": self.reported.val_acc,
            "train_acc": self.reported.train_acc,
            "train_loss": self.reported.train_loss,
            "epoch_time_s": statistics.median(times) if times else None,
            "epoch_time_mean_s": statistics.fmean(times) if times else None,
            "epochs_timed": len(times),
            "eval_time_s": statistics.median(evaluations),
            "total_time_s": self.total_time_s,
            "images_per_s": statistics.median(rates) if rates else None,
            "peak_memory_mib": max(r.peak_memory_mib for r in self.rows),
        }


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, `+dirty` where files differ from it; None outside a checkout."""
    here = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run(
            [*here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run(
            [*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+dirty" if changes.strip() else "")


def finite(value: Any) -> Any:
    """JSON knows no NaN: null instead, also inside lists and mappings."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def read_row(folder: Path) -> Row | None:
    """A session's row: from session.json, else from failure.json, else None where it never started."""
    for name in ("session.json", "failure.json"):
        if (folder / name).is_file():
            try:
                row = read_json(folder / name)["row"]
                return {column: row.get(column) for column in COLUMNS}
            except (KeyError, TypeError, AttributeError) as error:
                raise Refused(f"{folder / name} has no row; remove it to run the session again") from error
    return None


def session_folders(study: Path) -> Iterator[Path]:
    """Every session folder of a study, whatever plan made it."""
    yield from sorted(path.parent for path in study.glob("*/*/config.yaml"))


def rebuild(study: Path) -> Path:
    """Write results.csv from the session folders; returns its path."""
    rows = [row for folder in session_folders(study) if (row := read_row(folder))]
    rows.sort(key=lambda row: (row["launch_order"], row["started_at"] or ""))
    table = study / "results.csv"
    temporary = study / ".results.csv"
    study.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(table)
    return table


def failure_line(folder: Path) -> str:
    """Where a session failed and its error's last line."""
    row = read_row(folder)
    return f"{folder}: {row['error'] if row else 'did not start'}"


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="normbench results", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("outputs/adhoc"),
                        help="a study's folder (default: outputs/adhoc)")  # fmt: skip
    study = parser.parse_args().study
    with one_line_errors("results"):
        if not any(session_folders(study)):
            raise Refused(f"no sessions under {study}; give a study's folder like outputs/adhoc")
        table = rebuild(study)
        plan = Plan.newest(study)
    with table.open() as file:
        found = sum(1 for _ in file) - 1
    print(f"{table}: {found} rows" + (f", {len(plan.sessions)} sessions in the newest plan" if plan else ""))


if __name__ == "__main__":
    main()
