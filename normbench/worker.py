"""One process's walk through a plan: claims the next session that nobody has, trains it, goes on.

    python -m normbench.worker PLAN FIRST LAST      what launchers and printed commands call

Any number of walkers may go through one plan at once, on one machine or many; each session is run by one.
"""

import argparse
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from normbench import claim as claims
from normbench import failure, interrupt, ranks
from normbench.code import check_code
from normbench.doors import line_of, one_line_errors, say
from normbench.interrupt import Interrupted
from normbench.plan import Plan, Planned, utc_now, write_whole
from normbench.results import Row
from normbench.values import Refused

if TYPE_CHECKING:
    from normbench.training import Prepared

PREPARED_AT_ONCE = 8
MORE, STOPPED = 75, 3  # exit codes: there may be more to do; a session failed and fail_fast was asked


class FailedFast(Exception):
    """A session failed, and the command was to stop at the first that does."""


def work(
    plan: Plan,
    first: int,
    last: int,
    *,
    skip: Collection[int] = (),
    code: str | None = None,
    most: int | None = None,
    fail_fast: bool = False,
    told: Callable[[int | None], None] = lambda place: None,
) -> bool:
    """Train what nobody has trained, claimed or failed among `plan.sessions[first:last]`.

    Args:
        skip: arms to pass over.
        code: the hash of the code at submission; Refused where this process would run other code.
        most: train so many sessions at most.
        fail_fast: FailedFast at the first session that fails; else its failure is written down, and on.
        told: called with the place in the plan of each session that starts, and None when it has ended.
    Returns: False after a walk to the end, True where `most` ended it before.
    Raises: Interrupted — a signal came; the session it caught has a checkpoint and may go on anywhere.
    """
    check_code(plan, code)
    prepared: OrderedDict[int, Prepared] = OrderedDict()
    trained = 0
    with interrupt.listening():
        for place, planned in enumerate(plan.sessions[first:last], first):
            interrupt.obey()
            if planned.arm in skip or not plan.open(planned):
                continue
            if trained == most:
                return True
            trained += train_one(plan, planned, place, prepared, fail_fast, told)
    return False


def train_one(
    plan: Plan,
    planned: Planned,
    place: int,
    prepared: "OrderedDict[int, Prepared]",
    fail_fast: bool,
    told: Callable[[int | None], None],
) -> bool:
    """Claim and train one session; False where another process has it or just had it."""
    from normbench import session

    folder, started_at = plan.session_folder(planned), utc_now()
    try:
        claim = claims.take(folder, session.started(plan, planned, started_at))
    except OSError as error:  # a full disk, a folder that is not ours
        say(f"failed: {folder}: cannot be claimed: {error.strerror}", error=True)
        return False
    if claim is None:
        return False
    try:
        if not plan.open(planned):  # another process ended it between our look and our claim
            if plan.finished(planned):
                claim.remove()
            return False
        told(place)
        attempts = failure.attempts(folder)
        try:
            write_whole(folder / "config.yaml", plan.config_text(planned))
            fresh = not is_ready(plan, planned, prepared)
            with ranks.session((plan, place, started_at, attempts, fresh)):
                ready = ready_for(plan, planned, prepared)
                session.run_session(ready, plan.config(planned), plan, planned, started_at, claim)
        except claims.Lost as lost:
            say(str(lost), error=True)
            if ranks.size() > 1:
                raise FailedFast from lost
        except (Exception, SystemExit) as error:
            prepared.pop(planned.arm, None)
            if failure.attempts(folder) == attempts:  # else another rank has said why
                write_down(folder, session.started(plan, planned, started_at), error)
            if fail_fast or ranks.size() > 1:
                raise FailedFast from error
        else:
            claim.remove()
        if planned.arm not in prepared:
            free_memory()
        told(None)
        return True
    except Interrupted as stopped:
        if plan.open(planned):  # else its time was up, and the launcher has said so
            say(f"{folder}: {stopped}; the same command goes on from here", error=True)
        raise
    finally:
        claim.release()


def follow(cuda: bool) -> None:
    """What every rank but the first does: trains along with rank 0 until that has no more.

    Raises: SystemExit — an error here or in another rank; torchrun ends those that still wait for one.
    """
    from normbench import session

    prepared: OrderedDict[int, Prepared] = OrderedDict()
    ranks.join(cuda)
    with interrupt.listening():
        while True:
            try:
                task: tuple[Plan, int, str, int, bool] | None = ranks.told(None)
            except RuntimeError:  # rank 0 is gone, and has said why
                sys.exit(1)
            if task is None:
                break
            plan, place, started_at, attempts, fresh = task
            planned = plan.sessions[place]
            folder = plan.session_folder(planned)
            try:
                if fresh:
                    prepared.pop(planned.arm, None)
                ready = ready_for(plan, planned, prepared)
                session.run_session(ready, plan.config(planned), plan, planned, started_at, None)
            except (Exception, SystemExit) as error:
                if failure.attempts(folder) == attempts and not ranks.lost_one(error):
                    write_down(folder, session.started(plan, planned, started_at), error)
                sys.exit(1)
    ranks.part()


def write_down(folder: Path, row: Row, error: BaseException) -> None:
    """Keep a failure in its session's folder, if the disk takes it, and say it.

    Where another rank was killed the session is interrupted: the same command goes on with it.
    """
    said, status = failure.last_line(error), "failed"
    if ranks.lost_one(error):
        said, status = "another process of torchrun's was killed", "interrupted"
    said += f" (rank {ranks.rank()})" if ranks.rank() else ""
    try:
        failure.write(folder, row, status, said, traceback.format_exc())
    except (OSError, Refused) as why:
        said += f" (and failure.json cannot be written: {line_of(why)})"
    say(f"{status}: {folder}: {said}", error=True)


def is_ready(plan: Plan, planned: Planned, prepared: "OrderedDict[int, Prepared]") -> bool:
    """Whether a session before has prepared what this one needs; the seed also chooses subsets."""
    return planned.arm in prepared and prepared[planned.arm].config.seed == planned.seed


def ready_for(plan: Plan, planned: Planned, prepared: "OrderedDict[int, Prepared]") -> "Prepared":
    """What the session's arm shares, prepared now or by a session before."""
    from normbench.training import prepare

    there = is_ready(plan, planned, prepared)
    ready = prepared.pop(planned.arm, None)
    if ready is None or not there:
        ready = prepare(plan.config(planned))
    prepared[planned.arm] = ready
    if len(prepared) > PREPARED_AT_ONCE:
        prepared.popitem(last=False)
    return ready


def free_memory() -> None:
    """Give back what a failed session held: it may have run out of memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def watch_parent(grace_s: float) -> None:
    """Stop as by SIGTERM when the launcher is gone: its end of our stdin closes; at last by force."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        interrupt.ask_to_stop()
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="normbench worker", description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="the plan's file, plan-<hash>.json")
    parser.add_argument("first", type=int, nargs="?", default=0, help="place in the plan to start at (0)")
    parser.add_argument("last", type=int, nargs="?", help="place to stop before (the end)")
    parser.add_argument("--skip", type=int, nargs="*", default=[], help="arms to pass over, by number")
    parser.add_argument("--code", help="hash of the code; other code is refused")
    parser.add_argument("--most", type=int, help="sessions to train at most")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first session that fails")
    parser.add_argument("--told", type=int, help=argparse.SUPPRESS)  # a launcher's pipe
    parser.add_argument("--grace", type=float, help=argparse.SUPPRESS)  # and what it gives to stop in
    given = parser.parse_args()
    if given.told is not None:
        watch_parent(given.grace)

    def told(place: int | None) -> None:
        if given.told is not None:
            os.write(given.told, b"-\n" if place is None else f"{place}\n".encode())

    with one_line_errors("worker"):
        if ranks.size() > 1:
            raise Refused("torchrun starts normbench.train, whose ranks train one session together")
        plan = Plan.read(given.plan)
        last = len(plan.sessions) if given.last is None else given.last
        try:
            more = work(plan, given.first, last, skip=given.skip, code=given.code, most=given.most,
                        fail_fast=given.fail_fast, told=told)  # fmt: skip
        except Interrupted as stopped:
            sys.exit(128 + stopped.signum)
        except FailedFast:
            sys.exit(STOPPED)
    sys.exit(MORE if more else 0)


if __name__ == "__main__":
    main()
