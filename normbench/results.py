"""Rows and where they land: epochs.csv while a session goes, session.json at its end, results.csv from all.

    python -m normbench.results outputs/mbn_stride      brings results.csv up to date with the sessions' files

`results.csv` is never the only copy: every row in it can be made again from the session folders. A session's
row comes from its session.json, else its failure.json, else the claim of a process that is gone; one that
runs for the first time has none yet, one that is tried again keeps the row of its last attempt.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import statistics
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from normbench.claim import holder, numbers
from normbench.doors import one_line_errors
from normbench.plan import Plan, read_json, write_whole
from normbench.values import Refused

COLUMNS = """
    study setting arm session seed status model dataset norm norm_options stride batch_size epochs steps
    lr precision compile pack threads slots device device_name test_acc test_loss test_macro_f1
    best_test_acc val_acc train_acc train_loss epoch_time_s epoch_time_mean_s epochs_timed eval_time_s
    total_time_s images_per_s peak_memory_mib params trainable_params norm_layers warnings launch_order
    started_at finished_at hostname torch_version git_commit config_hash error
""".split()  # noqa: SIM905
Row = dict[str, Any]
FOLDER = re.compile(r"(seed\d+-)?s\d+")
ROW_FIRST = '{\n "row": '
CACHE, CACHE_FORMAT = ".results-cache", 1


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


def session_names(study: Path) -> Iterator[str]:
    """`<setting>/s<session>` of every session folder of a study, whatever plan made it, sorted."""
    for setting in folders_in(str(study)):
        for name in folders_in(f"{study}/{setting}"):
            if FOLDER.fullmatch(name):
                yield f"{setting}/{name}"


def session_folders(study: Path) -> Iterator[Path]:
    """Every session folder of a study, whatever plan made it."""
    return (study / name for name in session_names(study))


def folders_in(folder: str) -> list[str]:
    """The names of the folders in a folder, sorted; none where it is not there."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def source_of(folder: str) -> tuple[str, os.stat_result] | None:
    """The file that a session's row comes from, and its state; None where no process ever had the session."""
    for name in ("session.json", "failure.json"):
        with contextlib.suppress(FileNotFoundError):
            return name, os.stat(f"{folder}/{name}")
    for number in numbers(Path(folder))[-1:]:
        with contextlib.suppress(FileNotFoundError):
            name = f"claim-{number}.json"
            return name, os.stat(f"{folder}/{name}")
    return None


def row_from(folder: str, source: str) -> Row | None:
    """The row that `source_of` found; None for a claim of a process that is at work, or that says nothing."""
    path = Path(folder, source)
    if source.startswith("claim-"):
        claim = holder(path.parent)
        if claim is None or claim.alive or not claim.row:
            return None
        known = {**claim.row, "status": "interrupted", "error": f"interrupted on {claim.host}"}
        return {column: known.get(column) for column in COLUMNS}
    try:
        row = leading_row(path)
        if row is None:
            row = read_json(path)["row"]
        return {column: row.get(column) for column in COLUMNS}
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} has no row; remove it to run the session again") from error


def leading_row(path: Path) -> Any:
    """The row at the head of a file that is whole, without its manifest, which is long; None where unsure."""
    with contextlib.suppress(ValueError):
        text = path.read_bytes().decode()
        if text.startswith(ROW_FIRST) and text.endswith("\n}"):
            return json.JSONDecoder().raw_decode(text, len(ROW_FIRST))[0]
    return None


class Entry(NamedTuple):
    """A line of results.csv, where it belongs, and the state of the file that it came from."""

    source: str
    mtime_ns: int
    size: int
    inode: int
    launch_order: int
    started_at: str
    line: str


def entry_of(folder: str, known: Entry | None) -> Entry | None:
    """A session's line; `known` where its file is as it was.

    A claim that was dead and has not been touched since still is.
    """
    found = source_of(folder)
    if found is None:
        return None
    source, state = found
    seen = (source, state.st_mtime_ns, state.st_size, state.st_ino)
    if known is not None and known[:4] == seen:
        return known
    try:
        row = row_from(folder, source)
    except FileNotFoundError:  # removed just now: a finished session removes its failure
        return entry_of(folder, known)
    if row is None:
        return None
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row.values())
    order = row["launch_order"] if isinstance(row["launch_order"], int) else -1
    return Entry(*seen, order, str(row["started_at"] or ""), line.getvalue())


def entries(study: Path, known: Mapping[str, Entry], damaged: list[str]) -> dict[str, Entry]:
    """The line of every session that was started, by its folder; what cannot be read goes to `damaged`."""
    found, said = {}, []
    for name in session_names(study):
        try:
            entry = entry_of(f"{study}/{name}", known.get(name))
        except Refused as refused:
            said.append(str(refused))
            continue
        if entry is not None:
            found[name] = entry
    damaged[:] = said
    return found


def rebuild(study: Path) -> Path:
    """Bring results.csv up to date with the session folders; returns its path."""
    update(study)
    return study / "results.csv"


def update(study: Path, fresh: bool = False) -> int:
    """Write results.csv from the session folders; how many rows it has. `fresh` reads every session again.

    Whoever ends a session does this after it. One at a time, the last has seen all that ended before; where
    the file system has no locks, each looks again after it has written. Refused, after all that can be read
    has been written, where a session's file is damaged.
    """
    damaged: list[str] = []
    study.mkdir(parents=True, exist_ok=True)
    with turn(study) as alone:
        known = {} if fresh else read_cache(study)
        found = entries(study, known, damaged)
        while True:
            write_table(study / "results.csv", found)
            again = found if alone else entries(study, found, damaged)
            if again == found:
                break
            found = again
        read = sum(known.get(name) is not entry for name, entry in found.items())
        if read > len(known) // 100:  # to read so few again costs less than to write the cache
            write_cache(study, found)
    if damaged:
        others = f" (and {len(damaged) - 1} more like it)" if len(damaged) > 1 else ""
        raise Refused(damaged[0] + others)
    return len(found)


def write_table(path: Path, found: Mapping[str, Entry]) -> None:
    """All lines in launch order."""
    ordered = sorted(found.values(), key=lambda entry: (entry.launch_order, entry.started_at))
    write_whole(path, "".join([",".join(COLUMNS) + "\n", *(entry.line for entry in ordered)]))


@contextlib.contextmanager
def turn(study: Path) -> Iterator[bool]:
    """Wait until no other process rebuilds; False where the file system has no locks."""
    with (study / ".results.lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False
        yield alone


def cache_head(body: bytes) -> Any:
    """What the first line of a cache says where its second is whole and of this version."""
    return {"format": CACHE_FORMAT, "columns": COLUMNS, "crc32": zlib.crc32(body)}


def read_cache(study: Path) -> dict[str, Entry]:
    """The lines as they were last time; none where there is no cache, a damaged one or another version's."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        head, _, body = (study / CACHE).read_bytes().partition(b"\n")
        if json.loads(head) == cache_head(body):
            return {name: Entry(*values) for name, values in json.loads(body).items()}
    return {}


def write_cache(study: Path, found: Mapping[str, Entry]) -> None:
    """Keep the lines for the next time; a disk that takes no more costs only the time."""
    body = json.dumps(found).encode()
    with contextlib.suppress(OSError):
        write_whole(study / CACHE, json.dumps(cache_head(body)).encode() + b"\n" + body)


def failure_line(folder: Path) -> str:
    """Where a session is that has not ended, and why: its error, or who runs it."""
    found = source_of(str(folder))
    row = None if found is None else row_from(str(folder), found[0])
    if row is not None:
        return f"{folder}: {row['error']}"
    claim = holder(folder)
    return f"{folder}: {f'runs on {claim.host}' if claim and claim.alive else 'did not start'}"


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="normbench results", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("outputs/adhoc"),
                        help="a study's folder (default: outputs/adhoc)")  # fmt: skip
    parser.add_argument("--fresh", action="store_true",
                        help="read every session again, not only those that changed")  # fmt: skip
    given = parser.parse_args()
    study: Path = given.study
    with one_line_errors("results"):
        if not any(session_folders(study)):
            raise Refused(f"no sessions under {study}; give a study's folder like outputs/adhoc")
        rows = update(study, given.fresh)
        plan = Plan.newest(study)
    table = study / "results.csv"
    print(f"{table}: {rows} rows" + (f", {len(plan.sessions)} sessions in the newest plan" if plan else ""))


if __name__ == "__main__":
    main()
