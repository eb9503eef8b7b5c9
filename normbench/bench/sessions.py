"""Suites `startup` and `sweep`: what sessions cost around their training, in one process and in many."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from normbench.bench import commands
from normbench.bench.bench import Bench
from normbench.bench.interleaved import Ready, Sample, take_turns
from normbench.bench.record import Group

OUTSIDE, COMMAND = "outside the training clock", "command"


def startup(bench: Bench) -> Iterator[Group]:
    """One group: a session's share of everything but training steps."""
    keys = bench.of("startup")
    sessions, fresh = (3, 1) if bench.quick else (keys["sessions"], keys["fresh"])
    tiny = tiny_session(bench, epochs=1)
    sides = {
        "a process each": lambda: Ready(partial(each_alone, tiny, range(fresh))),
        "one process": lambda: Ready(partial(together, tiny, sessions, [])),
    }
    case = {"sessions": sessions, "model": "resnet9", "width": 4, "dataset": "digits"}
    note = (
        f"A sweep of {sessions} sessions of one setting in one process; {fresh} of the {sessions} measured a "
        "round in processes of their own, whose mean stands for all."
    )
    yield Group("startup", case, "session", "a process each", take_turns(sides, bench.process_rounds),
                note=note)  # fmt: skip


def sweep(bench: Bench) -> Iterator[Group]:
    """One group: whole sessions, by the command's own time."""
    keys = bench.of("sweep")
    sessions, fresh = (2, 1) if bench.quick else (keys["sessions"], keys["fresh"])
    epochs = 1 if bench.quick else keys["epochs"]
    small = tiny_session(bench, epochs)
    sides = {
        "separate commands": lambda: command_alone(partial(each_alone, small, range(fresh))),
        "one command, in its process": lambda: command_alone(partial(together, small, sessions, [])),
        "one command, 1 slot": lambda: command_alone(partial(together, small, sessions, slots(1))),
        "one command, 2 slots": lambda: command_alone(partial(together, small, sessions, slots(2))),
    }
    case = {
        "sessions": sessions,
        "epochs": epochs,
        "model": "resnet9",
        "width": 4,
        "dataset": "digits",
    }
    note = (
        f"{sessions} sessions of one setting; {fresh} of them a round as commands of their own, one after "
        "another, whose mean stands for all. Two slots use two cores."
    )
    yield Group("sweep", case, "session", "separate commands", take_turns(sides, bench.process_rounds),
                note=note)  # fmt: skip


def tiny_session(bench: Bench, epochs: int) -> Sequence[str]:
    """A setting whose training takes less than a second."""
    return (
        "model=resnet9", "model.width=4", "dataset=digits", "dataset.train_subset=96",
        "dataset.test_subset=96", "batch.size=24", f"epochs={epochs}", "norm=obn", *bench.words,
    )  # fmt: skip


def slots(number: int) -> list[str]:
    """The local launcher with so many processes beside each other."""
    return [f"hydra.launcher.n_jobs={number}"]


def together(setting: Sequence[str], sessions: int, overrides: Sequence[str]) -> Sample:
    """All sessions in one command; seconds of one."""
    done = commands.train(*setting, f"session=range({sessions})", *overrides)
    return per_session(done.wall_s, done.sessions)


def each_alone(setting: Sequence[str], sessions: Sequence[int]) -> Sample:
    """Some sessions, a command each, one after another; seconds of one."""
    done = [commands.train(*setting, f"session={session}") for session in sessions]
    return per_session(sum(d.wall_s for d in done), [session for d in done for session in d.sessions])


def per_session(wall_s: float, sessions: Sequence[commands.Session]) -> Sample:
    """What one session took, in all and without its training steps."""
    trained = sum(sum(session.epochs_s) for session in sessions)
    return {COMMAND: wall_s / len(sessions), OUTSIDE: (wall_s - trained) / len(sessions)}


def command_alone(measure: Callable[[], Sample]) -> Ready:
    """Without the part that has no meaning where sessions run beside each other."""
    return Ready(lambda: {COMMAND: measure()[COMMAND]})
