"""Stopping early: a sweep in waves, each followed by a look at the statistics that spends its part of alpha.

The looks are kept beside the plan (`looks-<hash>.json`), so that `stats` applies the same bounds and the same
command given again goes on from them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normbench.doors import say
from normbench.identity import short_names
from normbench.plan import Plan, Planned

if TYPE_CHECKING:
    from normbench.stats.sequential import Looks

LOOK_EVERY = 5


@dataclass(frozen=True)
class Wave:
    """The sessions `plan.sessions[first:last]` without those of the arms in `skip`."""

    first: int
    last: int
    skip: Sequence[int] = ()


def looks_path(plan: Plan) -> Path:
    """Beside the plan, where `stats` finds them."""
    return plan.path.with_name(plan.path.name.replace("plan-", "looks-"))


def looks_of(plan: Plan) -> "Looks":
    """The looks at a plan so far, and which arms they settled."""
    from normbench.stats.sequential import Looks

    path = looks_path(plan)
    return Looks.read(path) if path.is_file() else Looks(len(plan.sessions) // len(plan.arms), ())


def lacks(plan: Plan, planned: Planned) -> bool:
    """Whether a session may still end: it is neither finished nor failed."""
    failure = plan.failure(planned)
    return not plan.finished(planned) and (failure is None or failure["row"]["status"] == "interrupted")


def settled(plan: Plan, looks: "Looks | None") -> set[int]:
    """The arms that need no more sessions; all of them when only the baseline is left."""
    if looks is None:
        return set()
    stopped = {place for place, arm in enumerate(plan.arms) if arm.setting in looks.stopped}
    return stopped if len(stopped) < len(plan.arms) - 1 else set(range(len(plan.arms)))


def looks_at(plan: Plan) -> list[int]:
    """After how many sessions of every arm to look: LOOK_EVERY or more, to whole packs, and at the end."""
    at = [0]
    for end in plan.block_ends:
        done = end // len(plan.arms)
        if done - at[-1] >= LOOK_EVERY or end == len(plan.sessions):
            at.append(done)
    return at[1:]


def waves(plan: Plan, looks: "Looks", margin: str | None) -> Iterator["Wave"]:
    """LOOK_EVERY sessions of every arm that is still open, then a look at the statistics, and so on.

    The looks are kept beside the plan, so that the same command given again goes on from them.
    """
    from normbench.results import rebuild
    from normbench.stats.comparison import Margin
    from normbench.stats.sequential import Looks
    from normbench.stats.stopping import decided

    block, planned = len(plan.arms), looks.planned
    if looks.at:  # what failed since, and is to run again
        yield Wave(0, block * looks.at[-1], sorted(settled(plan, looks)))
    margins = {"test_acc": Margin.of(margin, "margin")} if margin else {}
    for done in looks_at(plan):
        if done in looks.at:
            continue
        first = block * (looks.at[-1] if looks.at else 0)
        wave = Wave(first, block * done, sorted(settled(plan, looks)))
        if len(wave.skip) == block:
            return
        yield wave
        if any(s.arm not in wave.skip and lacks(plan, s) for s in plan.sessions[: wave.last]):
            say(f"no look after {done} sessions yet: some are interrupted, or run in other processes")
            return
        rebuild(plan.folder)
        decision = decided(plan.folder, Looks(planned, (*looks.at, done), looks.stopped), margins=margins)
        stopped = {setting: done for setting in decision.settled} if done < planned else {}
        looks = Looks(planned, (*looks.at, done), {**stopped, **looks.stopped})
        looks.write(looks_path(plan))
        names = short_names({arm.setting: arm.arm for arm in plan.arms})
        verdicts = ", ".join(f"{names[setting]} {verdict}" for setting, verdict in decision.settled.items())
        say(f"look after {done} of {planned} sessions: {verdicts or 'nothing is settled'}")
