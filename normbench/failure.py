"""failure.json: what a session leaves that did not end, and how the next attempt is asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normbench.plan import read_json, utc_now, write_json
from normbench.results import COLUMNS
from normbench.values import Refused


def write(folder: Path, row: Mapping[str, Any], status: str, error: str, traceback: str | None) -> None:
    """Keep a failed or interrupted attempt: its row as far as it is known, its traceback, its number."""
    path = folder / "failure.json"
    known = {**row, "status": status, "error": error, "finished_at": utc_now()}
    body = {"row": {column: known.get(column) for column in COLUMNS}, "attempt": attempts(folder) + 1}
    write_json(path, {**body, "traceback": traceback})


def attempts(folder: Path) -> int:
    """How many attempts have failed so far."""
    path = folder / "failure.json"
    return int(read_json(path).get("attempt", 0)) if path.is_file() else 0


def last_line(error: BaseException) -> str:
    """The error on one line."""
    text = str(error).strip().splitlines()
    if isinstance(error, Refused) and text:
        return text[-1]
    return f"{type(error).__name__}: {text[-1] if text else ''}"
