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
from collections.abc import Callable, Collection, Sequence
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
    from normbench.session import Claimed
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
    told: Callable[[Sequence[int]], None] = lambda places: None,
) -> bool:
    """Train what nobody has trained, claimed or failed among `plan.sessions[first:last]`.

    Args:
        skip: arms to pass over.
        code: the hash of the code at submission; Refused where this process would run other code.
        most: train so many sessions at most, rounded up to whole packs.
        fail_fast: FailedFast at the first session that fails; else its failure is written down, and on.
        told: called with the places in the plan of the sessions that start together, and none when they
            have ended.
    Returns: False after a walk to the end, True where `most` ended it before.
    Raises: Interrupted — a signal came; the session it caught has a checkpoint and may go on anywhere.
    """
    check_code(plan, code)
    prepared: OrderedDict[int, Prepared] = OrderedDict()
    trained = 0
    with interrupt.listening():
        for pack in plan.packs(first, last):
            interrupt.obey()
            places = [p for p in pack if plan.sessions[p].arm not in skip and plan.open(plan.sessions[p])]
            if not places:
                continue
            if most is not None and trained >= most:
                return True
            trained += train_pack(plan, places, prepared, fail_fast, told)
    return False


def train_pack(
    plan: Plan,
    places: Sequence[int],
    prepared: "OrderedDict[int, Prepared]",
    fail_fast: bool,
    told: Callable[[Sequence[int]], None],
) -> int:
    """Claim and train the sessions of a pack, or the one that is alone, together; how many this process had.

    Those that another process has, or just had, are left out.
    """
    from normbench import session

    taken: dict[int, Claimed] = {}
    try:
        for place in places:
            if claimed := claim(plan, plan.sessions[place]):
                taken[place] = claimed
        if not taken:
            return 0
        told(list(taken))
        pack = list(taken.values())
        attempts = [failure.attempts(each.folder) for each in pack]
        try:
            for each in pack:
                write_whole(each.folder / "config.yaml", plan.config_text(each.planned))
            planned, started_at = pack[0].planned, pack[0].started_at
            fresh = not is_ready(plan, planned, prepared)
            with ranks.session((plan, next(iter(taken)), started_at, attempts[0], fresh)):
                session.run_pack(ready_for(plan, planned, prepared), pack)
        except claims.Lost as lost:
            say(str(lost), error=True)
            if ranks.size() > 1:
                raise FailedFast from lost
        except (Exception, SystemExit) as error:
            prepared.pop(pack[0].planned.arm, None)
            for each, before in zip(pack, attempts, strict=True):
                # else it had ended, or another rank has said why
                if plan.open(each.planned) and failure.attempts(each.folder) == before:
                    write_down(each.folder, each.row, error)
            if fail_fast or ranks.size() > 1:
                raise FailedFast from error
        if pack[0].planned.arm not in prepared:
            free_memory()
        told([])
        return len(taken)
    except Interrupted as stopped:
        for each in taken.values():
            if plan.open(each.planned):  # else its time was up, and the launcher has said so
                say(f"{each.folder}: {stopped}; the same command goes on from here", error=True)
        raise
    finally:
        for each in taken.values():
            if each.claim and plan.finished(each.planned):
                each.claim.remove()
            elif each.claim:
                each.claim.release()


def claim(plan: Plan, planned: Planned) -> "Claimed | None":
    """Claim a session; None where another process has it or just had it."""
    from normbench import session

    folder, started_at = plan.session_folder(planned), utc_now()
    try:
        held = claims.take(folder, session.started(plan, planned, started_at))
    except OSError as error:  # a full disk, a folder that is not ours
        say(f"failed: {folder}: cannot be claimed: {error.strerror}", error=True)
        return None
    if held is None:
        return None
    if plan.open(planned):
        return session.Claimed(plan, planned, held, started_at)
    if plan.finished(planned):  # another process ended it between our look and our claim
        held.remove()
    held.release()
    return None


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
            task_of_rank_0 = session.Claimed(plan, planned, None, started_at)
            folder = plan.session_folder(planned)
            try:
                if fresh:
                    prepared.pop(planned.arm, None)
                session.run_pack(ready_for(plan, planned, prepared), [task_of_rank_0])
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
    from normbench.preparing import prepare

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

    def told(places: Sequence[int]) -> None:
        if given.told is not None:
            os.write(given.told, f"{' '.join(map(str, places)) or '-'}\n".encode())

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
