"""failure.json: what a session leaves that did not end, and how the next attempt is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from normbench.checkpoint import epoch_of
from normbench.claim import Claim, holder
from normbench.doors import line_of, say
from normbench.plan import Plan, failure_in, utc_now, write_json
from normbench.results import COLUMNS
from normbench.values import Refused


def write(folder: Path, row: Mapping[str, Any], status: str, error: str, traceback: str | None) -> None:
    """Keep a failed or interrupted attempt: its row as far as it is known, its traceback, its number."""
    path = folder / "failure.json"
    known = {**row, "status": status, "error": error, "finished_at": utc_now()}
    body = {"row": {column: known.get(column) for column in COLUMNS}, "attempt": attempts(folder) + 1}
    write_json(path, {**body, "traceback": traceback})


def keep(held: Claim, status: str, error: str) -> None:
    """Keep what became of a session that another process had, if the disk takes it, and say it."""
    try:
        write(held.folder, held.row, status, error, None)
    except (OSError, Refused) as why:
        error += f" (and failure.json cannot be written: {line_of(why)})"
    say(f"{status}: {held.folder}: {error}", error=True)


def keep_killed(held: Claim, status: str, how: str) -> None:
    """Keep that a process died in the middle of a session, and let the next to come take it at once."""
    epoch = epoch_of(held.folder)
    where = f"its checkpoint is of epoch {epoch}" if epoch else "it has no checkpoint yet"
    keep(held, status, f"{how}; {where}")
    held.release()


def write_killed(plan: Plan, first: int, last: int, gone: Callable[[Claim], bool], how: str) -> None:
    """Keep that a job is gone in the middle of a session of its slice; the next may go on at once."""
    for planned in plan.sessions[first:last]:
        folder = plan.session_folder(planned)
        held = holder(folder)
        if held is None or held.released or not plan.open(planned) or not gone(held):
            continue
        keep_killed(held, "interrupted", how)


def attempts(folder: Path) -> int:
    """How many attempts have failed so far."""
    try:
        return int(failure_in(folder).get("attempt", 0))
    except FileNotFoundError:
        return 0


def last_line(error: BaseException) -> str:
    """The error on one line."""
    text = str(error).strip().splitlines()
    if isinstance(error, Refused) and text:
        return text[-1]
    return f"{type(error).__name__}: {text[-1] if text else ''}"
