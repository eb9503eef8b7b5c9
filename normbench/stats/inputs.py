"""From paths to sessions: output folders, results CSVs, globs, and the studies' own three-column files."""

import glob
import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from normbench.identity import short_names
from normbench.plan import Plan
from normbench.results import COLUMNS, rebuild, session_folders
from normbench.stats.metrics import Curve, Metric, read_curve, unknown
from normbench.values import Refused, nearest

if TYPE_CHECKING:
    from normbench.stats.sequential import Looks

STUDY_FORMAT = {"Model No.": "session", "Time(s)": "total_time_s", "Accuracy": "test_acc"}
NAMES = (
    *("study", "setting", "arm", "status", "model", "dataset", "norm", "device", "device_name"),
    *("precision", "torch_version", "hostname", "error"),
)
NUMBERS = ("session", "seed", "batch_size", "pack", "threads", "slots", "launch_order")
ENDED = ("ok", "diverged")
STATUSES = (*ENDED, "failed", "interrupted")
LARGEST = 1e100
INTERNAL = ("key", "id", "name", "home", "started_at")


@dataclass
class Sessions:
    """The sessions of all inputs, a row each in the order they were run, and what was expected of them.

    `rows` has `key` (the setting), `id` (its readable name), `name` where the input gave one, `session`,
    `seed`, `status`, the metrics, and the columns that say what is comparable. `expected` counts sessions
    by key, where a plan says so.
    """

    rows: pd.DataFrame
    expected: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    images: dict[str, dict[str, int]] = field(default_factory=dict)
    looks: "Looks | None" = None
    folder: Path | None = None

    @property
    def planned(self) -> int:
        """Sessions that were to run: as planned, else as many of every arm as the largest has."""
        if self.expected:
            return sum(self.expected.values())
        counts = self.rows["key"].value_counts()
        return int(counts.max() * len(counts))


def read(
    inputs: Sequence[str], metrics: Sequence[Metric] | None, by: Sequence[str], everything: bool
) -> Sessions:
    """All sessions behind the inputs; Refused where one cannot be read, in one line that says where."""
    found: list[Sessions] = []
    columns = [m.name for m in metrics or [] if not m.from_epochs]
    for name, path in expand(inputs):
        source = (
            read_folder(path, columns, by, everything)
            if path.is_dir()
            else read_file(path, columns, by, everything)
        )
        if name is not None:
            source.rows["name"] = name
            source.rows["key"] = name + ":" + source.rows["key"].astype(str)
            source.expected = {f"{name}:{key}": n for key, n in source.expected.items()}
            source.images = {f"{name}:{key}": images for key, images in source.images.items()}
        found.append(source)
    rows = pd.concat([s.rows for s in found], ignore_index=True)
    together = Sessions(
        rows,
        {k: n for s in found for k, n in s.expected.items()},
        [m for s in found for m in s.missing],
        {k: n for s in found for k, n in s.images.items()},
        next((s.looks for s in found if s.looks), None),
        found[0].folder if len(found) == 1 else None,
    )
    check_unique(rows)
    order = [c for c in ("started_at", "launch_order") if c in rows]
    if order:
        together.rows = rows.sort_values(order, kind="stable", ignore_index=True)
    return together


def expand(inputs: Sequence[str]) -> list[tuple[str | None, Path]]:
    """Every input as (name or None, path)."""
    found: list[tuple[str | None, Path]] = []
    for text in inputs:
        name, sign, rest = text.partition("=")
        if Path(text).exists() or not sign:
            paths = [Path(text)] if Path(text).exists() else sorted(map(Path, glob.glob(text)))
            if not paths:
                raise Refused(
                    f"{text}: no such file or folder; give a study's folder, a results CSV or name=file.csv"
                )
            found += [(None, path) for path in paths]
        elif not Path(rest).is_file():
            raise Refused(f"{text}: no file {rest}")
        else:
            found.append((name, Path(rest)))
    names = [name for name, _ in found if name is not None]
    if len(set(names)) < len(names):
        raise Refused(
            f"two files have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
    return found


def read_folder(folder: Path, columns: Sequence[str], by: Sequence[str], everything: bool) -> Sessions:
    """A study's folder: its rows gathered anew from the sessions' own files."""
    if not any(session_folders(folder)):
        if (folder / "results.csv").is_file():
            return read_file(folder / "results.csv", columns, by, everything)
        raise Refused(f"no sessions under {folder}; give a study's folder like outputs/adhoc")
    return read_file(rebuild(folder), columns, by, everything)


def read_file(path: Path, columns: Sequence[str], by: Sequence[str], everything: bool) -> Sessions:
    """One CSV: the studies' three columns, or rows with an `arm`."""
    head = header(path)
    if set(STUDY_FORMAT) & set(head):
        for column in STUDY_FORMAT:
            if column not in head:
                raise Refused(
                    f"{path}: no column {column!r}; the studies' format is {','.join(STUDY_FORMAT)}"
                )
        return Sessions(study_rows(path))
    if "arm" not in head and "setting" not in head:
        raise Refused(f"{path}: no column 'arm'; give results.csv, or the format {','.join(STUDY_FORMAT)}")
    for column in by:
        if column not in head:
            raise Refused(f"--by {column}: {path} has no such column{nearest(column, head)}")
    rows = table(path, head, {*columns, "test_acc", "epoch_time_s", "total_time_s"}, by)
    check_statuses(path, rows)
    source = "setting" if "setting" in head else "arm"
    if rows[source].isna().any():
        raise Refused(f"{path}, line {first(rows[source].isna()) + 2}: {source} is empty")
    rows["setting"] = rows[source].astype(str).astype("category")
    rows["id"] = (rows["arm"] if "arm" in head else rows["setting"]).astype(str).astype("category")
    rows["home"] = str(path.parent)
    sessions = within_plan(Sessions(rows, folder=path.parent), path.parent, everything)
    rows = sessions.rows
    study = rows["study"].astype(object).fillna("").astype(str) + "/" if "study" in head else ""
    rows["key"] = (study + rows["setting"].astype(str)).astype("category")
    unique = rows.drop_duplicates("key")
    keys = dict(zip(unique["key"].astype(str), unique["setting"].astype(str), strict=True))
    key_of = {name: key for key, name in keys.items()}  # an arm without sessions is expected all the same
    sessions.expected = {key_of.get(name, name): n for name, n in sessions.expected.items()}
    sessions.images = {key: images_of(path.parent / name) for key, name in keys.items()}
    return sessions


def check_statuses(path: Path, rows: pd.DataFrame) -> None:
    """Refuse a status that sessions do not have."""
    if "status" not in rows:
        return
    wrong = ~rows["status"].isin(STATUSES)
    if wrong.any():
        at, known = first(wrong), ", ".join(STATUSES)
        raise Refused(f"{path}, line {at + 2}: status={rows['status'].iloc[at]!r} is none of {known}")


def first(wrong: "pd.Series[bool]") -> int:
    """The position of the first row that is wrong."""
    return int(np.argmax(wrong.to_numpy()))


def header(path: Path) -> list[str]:
    """A CSV's column names."""
    try:
        return [str(c) for c in pd.read_csv(path, nrows=0).columns]
    except (ValueError, pd.errors.ParserError) as error:
        raise Refused(f"{path} is not a CSV file: {str(error).splitlines()[0]}") from error


def table(path: Path, head: Sequence[str], columns: Iterable[str], by: Iterable[str]) -> pd.DataFrame:
    """The needed columns of a results CSV, names as categories, numbers as numbers."""
    names = {c for c in {*NAMES, *by} if c in head and c not in NUMBERS}
    numbers = [c for c in (*NUMBERS, *sorted(columns)) if c in head and c not in names]
    kinds = dict.fromkeys(names, "category")
    wanted = [*names, *numbers, *(["started_at"] if "started_at" in head else [])]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)
            rows = pd.read_csv(path, usecols=wanted, dtype=kinds)
    except (ValueError, pd.errors.ParserError) as error:
        raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if rows.empty:
        raise Refused(f"{path} has no rows")
    for column in numbers:
        rows[column] = as_numbers(path, rows[column])
    if "started_at" in rows:
        rows["started_at"] = pd.to_datetime(rows["started_at"], format="ISO8601", utc=True, errors="coerce")
    return pd.DataFrame(rows)


def as_numbers(path: Path, values: "pd.Series[float]") -> "pd.Series[float]":
    """The column as floats; what is no finite number is missing, text is refused."""
    numbers = values
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        numbers = pd.to_numeric(values, errors="coerce")
        wrong = numbers.isna() & values.notna()
        if wrong.any():
            at = first(wrong)
            raise Refused(f"{path}, line {at + 2}: {values.name}={values.iloc[at]!r} is not a number")
    floats = numbers.astype(float)
    floats = floats.where(np.isfinite(floats))
    wrong = (floats.abs() > LARGEST) | ((floats.abs() < 1 / LARGEST) & (floats != 0))
    if wrong.any():
        at = first(wrong)
        raise Refused(f"{path}, line {at + 2}: {values.name}={floats.iloc[at]:g} is out of any range")
    return floats


def study_rows(path: Path) -> pd.DataFrame:
    """The studies' format: `Model No.` names a session, time is of the whole session, accuracy a fraction."""
    try:
        rows = pd.read_csv(path, usecols=list(STUDY_FORMAT)).rename(columns=STUDY_FORMAT)
    except (ValueError, pd.errors.ParserError) as error:
        raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if rows.empty:
        raise Refused(f"{path} has no rows")
    twice = rows["session"][rows["session"].duplicated()]
    if not twice.empty:
        raise Refused(f"{path}: session {twice.iloc[0]} is there twice")
    for column in ("total_time_s", "test_acc"):
        rows[column] = as_numbers(path, rows[column].rename({v: k for k, v in STUDY_FORMAT.items()}[column]))
    if (rows["test_acc"] > 1).any():
        at = first(rows["test_acc"] > 1)
        raise Refused(
            f"{path}, line {at + 2}: Accuracy={rows['test_acc'].iloc[at]:g} must be a fraction from 0 to 1"
        )
    return rows.assign(session=np.arange(len(rows), dtype=float), status="ok", key=str(path),
                       id=path.stem, launch_order=np.arange(len(rows), dtype=float))  # fmt: skip


def check_unique(rows: pd.DataFrame) -> None:
    """Refuse a session that is there twice."""
    if "session" not in rows:
        return
    identity = ["key", "session", *(["seed"] if "seed" in rows else [])]
    twice = rows.duplicated(identity) & rows["session"].notna()
    if twice.any():
        row = rows[twice].iloc[0]
        raise Refused(f"session {row['session']:g} of {row['id']} is there twice; give each session once")


def within_plan(sessions: Sessions, study: Path, everything: bool) -> Sessions:
    """Only the newest plan's sessions, and what is missing of them."""
    plan = Plan.newest(study)
    if plan is None:
        return sessions
    rows = sessions.rows
    if "setting" not in rows or "session" not in rows or "seed" not in rows:
        return sessions
    here = set(zip(rows["setting"].astype(str), rows["seed"], rows["session"], strict=True))
    folder_of = {
        (plan.arms[s.arm].setting, s.seed, s.session): plan.session_folder(s).name for s in plan.sessions
    }
    looks = plan.path.with_name(plan.path.name.replace("plan-", "looks-"))
    if looks.is_file():
        from normbench.stats.sequential import Looks  # with SciPy, which no mistake should wait for

        sessions.looks = Looks.read(looks)
    if not everything:
        keep = [
            key in folder_of
            for key in zip(rows["setting"].astype(str), rows["seed"], rows["session"], strict=True)
        ]
        rows = rows[keep].reset_index(drop=True)
        for column in ("setting", "id"):
            rows[column] = rows[column].astype(str).astype("category")
        if rows.empty:
            raise Refused(
                f"0 of {len(folder_of)} sessions under {study} have ended; train first, or give --all"
            )
        stopped = sessions.looks.stopped if sessions.looks else {}
        folder_of = {key: name for key, name in folder_of.items() if key in here or key[0] not in stopped}
        for setting, _, _ in folder_of:
            sessions.expected[setting] = sessions.expected.get(setting, 0) + 1
        sessions.missing = [
            f"{setting}/{name}"
            for (setting, seed, n), name in folder_of.items()
            if (setting, seed, n) not in here
        ]
    sessions.rows = rows
    return sessions


def images_of(setting: Path) -> dict[str, int]:
    """How many images a setting's sessions trained and were tested on, as the first that ended wrote down."""
    try:
        for path in sorted(setting.glob("*/session.json")):
            images = json.loads(path.read_text())["images"]
            return {part: int(n) for part, n in images.items() if n}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # an older or damaged file says nothing of images
    return {}


def choose_metrics(sessions: Sessions, asked: Sequence[Metric] | None) -> list[Metric]:
    """The metrics asked for, else test accuracy and the time of an epoch, else of a session."""
    rows = sessions.rows
    if asked is None:
        timed = "epoch_time_s" in rows and rows["epoch_time_s"].notna().any()
        asked = [Metric("test_acc"), Metric("epoch_time_s" if timed else "total_time_s")]
        asked = [m for m in asked if m.name in rows and rows[m.name].notna().any()]
    for metric in asked:
        if metric.from_epochs:
            add_from_epochs(sessions, metric)
        elif metric.name not in rows or metric.name in (*NAMES, *NUMBERS, *INTERNAL):
            raise unknown(metric, [c for c in rows.columns if c in COLUMNS and c not in (*NAMES, *NUMBERS)])
        leave_out(rows, metric)
    if not asked:
        raise Refused("no metric: the rows have neither test_acc nor a time; name one with --metric")
    return list(asked)


def leave_out(rows: pd.DataFrame, metric: Metric) -> None:
    """Drop what is no result: values of sessions that did not end, whole times of those that diverged."""
    if metric.is_accuracy and (rows[metric.name] > 1).any():
        at = first(rows[metric.name] > 1)
        raise Refused(f"{metric.name}={rows[metric.name].iloc[at]:g} must be a fraction from 0 to 1")
    if "status" in rows:
        rows.loc[~rows["status"].isin(ENDED), metric.name] = math.nan
        if metric.name == "total_time_s":
            rows.loc[rows["status"] == "diverged", metric.name] = math.nan


def add_from_epochs(sessions: Sessions, metric: Metric) -> None:
    """Columns `<metric>` and `<metric> reached`, read from every session's epochs.csv.

    A session that diverged reaches no target, however long it were trained: it counts as missing it to the
    last of all sessions' ends, and its curve as lying on the floor to the last step of all.
    """
    rows = sessions.rows
    curves = [read_curve(epochs_file(row)) for row in rows.itertuples()]
    known = [curve for curve in curves if curve is not None]
    if not known:
        raise Refused(
            f"metric {metric.name}: no session has an epochs.csv; give the study's folder under outputs/"
        )
    found = [(math.nan, False) if curve is None else metric.of_curve(curve) for curve in curves]
    end, steps = max(metric.course(c).iloc[-1] for c in known), max(steps_of(c) for c in known)
    diverged = rows["status"].eq("diverged") if "status" in rows else [False] * len(rows)
    for i, (curve, cut_short) in enumerate(zip(curves, diverged, strict=True)):
        value, reached = found[i]
        if cut_short and metric.is_until and not reached:
            found[i] = float(end), False
        elif cut_short and metric.name == "auc_acc" and curve is not None and steps > 0:
            found[i] = value * steps_of(curve) / steps, True
    rows[metric.name], rows[f"{metric.name} reached"] = zip(*found, strict=True)


def steps_of(curve: Curve) -> float:
    """Steps from a curve's first evaluation to its last."""
    return float(curve["step"].iloc[-1] - curve["step"].iloc[0])


def epochs_file(row: Any) -> Path | None:
    """Where a session's epochs.csv would be; None where the input says no folder."""
    if not isinstance(getattr(row, "home", None), str) or math.isnan(getattr(row, "session", math.nan)):
        return None
    seed = getattr(row, "seed", 0) or 0
    name = f"s{row.session:.0f}" if seed == 0 else f"seed{seed:.0f}-s{row.session:.0f}"
    return Path(row.home) / str(row.setting) / name / "epochs.csv"


def labels_of(rows: pd.DataFrame) -> dict[str, str]:
    """key → what tables call the arm: the input's name for it, else its id without what all arms share."""
    arms = rows.drop_duplicates("key")
    short = short_names(dict(zip(arms["key"].astype(str), arms["id"].astype(str), strict=True)))
    if "name" not in arms:
        return short
    labels = {}
    per_name = arms["name"].value_counts()
    for key, name in zip(arms["key"].astype(str), arms["name"], strict=True):
        if isinstance(name, str):
            labels[key] = name if per_name[name] == 1 else f"{name}-{short[key]}"
        else:
            labels[key] = short[key]
    return labels
