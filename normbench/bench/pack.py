"""Suite `pack`: K sessions trained as one network against the same sessions one after another."""

from collections.abc import Iterator
from functools import partial

from normbench.bench import commands
from normbench.bench.bench import Bench
from normbench.bench.interleaved import CannotRun, Ready, Sample, take_turns
from normbench.bench.record import Group


def groups(bench: Bench) -> Iterator[Group]:
    """One group for every precision."""
    keys = bench.of("pack")
    cuda = bench.device.type == "cuda"
    together = keys["together"] or (2 if bench.quick else 30 if cuda else 8)
    slots = 1 if cuda or bench.quick else keys["slots"]
    steps = 8 if bench.quick else keys["steps"]
    for precision in keys["precision"]:
        train = partial(session_step, bench, precision, steps, slots, together)
        sides = {
            "one after another": lambda train=train: Ready(partial(train, [])),
            f"pack={together}": lambda train=train: Ready(partial(train, [f"pack={together}"])),
        }
        case = {"model": "dilated_cnn", "batch_size": keys["batch_size"], "precision": precision}
        note = (
            f"Processes on both sides: {slots}, with threads={bench.values['threads']}, {together} sessions "
            f"each, {steps} steps a session, by the training clock of the rows."
        )
        yield Group("pack", {**case, "slots": slots}, "session-step", "one after another",
                    take_turns(sides, bench.process_rounds), note=note)  # fmt: skip


def session_step(
    bench: Bench, precision: str, steps: int, slots: int, together: int, overrides: list[str]
) -> Sample:
    """Seconds of one step of one session, in one of the processes."""
    size = bench.of("pack")["batch_size"]
    images = size * steps // 2
    jobs = [f"hydra.launcher.n_jobs={slots}"] if slots > 1 else []
    done = commands.train(
        "model=dilated_cnn", "dataset=synthetic", "dataset.shape=[1,28,28]", "dataset.mean=[0.5]",
        "dataset.std=[0.21]", f"dataset.train_size={images}", "dataset.test_size=16", f"batch.size={size}",
        "epochs=2", "norm=obn", f"precision={precision}", f"session=range({slots * together})", *jobs,
        *overrides, *bench.words,
    )  # fmt: skip
    packs = {int(session.row["pack"]) for session in done.sessions}
    if overrides and packs != {together}:
        raise CannotRun(f"not packed: its rows say pack={', '.join(map(str, sorted(packs)))}")
    seconds = sum(sum(session.epochs_s) / int(session.row["pack"]) for session in done.sessions)
    return {"step": seconds / (len(done.sessions) * 2 * (images // size))}
