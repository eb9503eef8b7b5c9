"""No two processes ever run one session, whoever dies, comes late or sleeps."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from normbench import claim as claims
from normbench.plan import write_json

ROW = {"arm": "obn", "session": 0}


def another(folder: Path, **changes: object) -> claims.Claim:
    """A claim of a process on another machine, as it lies in the folder."""
    mine = claims.take(folder, ROW)
    assert mine is not None
    claims.hearts.discard(mine.path)
    other = replace(mine, host="n7", machine="n7 another boot", **changes)  # type: ignore[arg-type]
    write_json(other.path, other.body)
    return other


def silent_for(claim: claims.Claim, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(claim.path, (then, then))


def test_a_claim_holds_until_it_is_released(tmp_path: Path) -> None:
    mine = claims.take(tmp_path, ROW)
    assert mine is not None and mine.alive and claims.running(tmp_path)
    assert claims.take(tmp_path, ROW) is None
    held = claims.holder(tmp_path)
    assert held is not None and (held.pid, held.row, held.number) == (os.getpid(), ROW, 1)
    mine.release()
    assert not claims.running(tmp_path)
    second = claims.take(tmp_path, ROW)
    assert second is not None and second.number == 2 and claims.numbers(tmp_path) == [2]
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    code = f"from pathlib import Path\nfrom normbench import claim\nclaim.take(Path({str(tmp_path)!r}), {{}})"
    subprocess.run([sys.executable, "-c", code], check=True)
    left = claims.holder(tmp_path)
    assert left is not None and left.number == 1 and not left.alive
    taken = claims.take(tmp_path, ROW)
    assert taken is not None and taken.number == 2


def test_a_pid_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    parent = os.getppid()
    mine = claims.take(tmp_path, ROW)
    assert mine is not None
    write_json(mine.path, replace(mine, pid=parent, born=claims.born(parent)).body)
    assert claims.running(tmp_path)
    write_json(mine.path, replace(mine, pid=parent, born="1").body)
    assert not claims.running(tmp_path)


def test_elsewhere_the_heartbeat_decides(tmp_path: Path) -> None:
    other = another(tmp_path)
    assert other.alive and claims.take(tmp_path, ROW) is None
    silent_for(other, claims.STALE_S - 5)
    assert claims.take(tmp_path, ROW) is None
    silent_for(other, claims.STALE_S + 1)
    taken = claims.take(tmp_path, ROW)
    assert taken is not None and taken.number == 2
    with pytest.raises(claims.Lost, match="taken over by another process"):
        other.held()
    other.release()  # what is no longer held cannot be given up
    assert claims.holder(tmp_path) == taken


def test_a_requeued_slurm_job_takes_up_what_its_earlier_start_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another(tmp_path, job=("4711.0", 0))
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claims.take(tmp_path, ROW) is None
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    taken = claims.take(tmp_path, ROW)
    assert taken is not None and taken.job == ("4711.0", 1)


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    monkeypatch.setattr(claims, "hearts", claims.Hearts())
    mine = claims.take(tmp_path, ROW)
    assert mine is not None
    silent_for(mine, 500)
    deadline = time.monotonic() + 20
    while mine.silent_s() > 100 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mine.silent_s() < 100
    mine.remove()


def test_a_half_written_claim_holds_as_long_as_it_may_be_being_written(tmp_path: Path) -> None:
    (tmp_path / "claim-3.json").write_text('{"host": ')
    assert claims.take(tmp_path, ROW) is None
    then = time.time() - claims.STALE_S - 1
    os.utime(tmp_path / "claim-3.json", (then, then))
    taken = claims.take(tmp_path, ROW)
    assert taken is not None and taken.number == 4


def compete(folder: Path, rounds: int, ready: "multiprocessing.synchronize.Barrier", name: int) -> None:
    """Claim in every round; who wins leaves a file."""
    for i in range(rounds):
        ready.wait(60)
        mine = claims.take(folder / str(i), ROW)
        if mine is not None:
            (folder / str(i) / f"won-{name}").write_text("")
        ready.wait(60)


@pytest.mark.parametrize("before", ["nothing", "a dead claim"])
def test_of_eight_that_see_a_claim_die_one_wins(tmp_path: Path, before: str) -> None:
    rounds, processes = 40, 8
    for i in range(rounds):
        (tmp_path / str(i)).mkdir()
        if before == "a dead claim":
            silent_for(another(tmp_path / str(i)), claims.STALE_S + 1)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    rivals = [context.Process(target=compete, args=(tmp_path, rounds, barrier, n)) for n in range(processes)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(120)
        assert rival.exitcode == 0
    winners = [len(list((tmp_path / str(i)).glob("won-*"))) for i in range(rounds)]
    assert winners == [1] * rounds


def test_a_stopped_process_that_wakes_up_too_late_writes_no_more(tmp_path: Path) -> None:
    """On another machine its heart was not heard; when it goes on, it finds out before it writes."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom normbench import claim\n"
        f"mine = claim.take(Path({str(tmp_path)!r}), {{}})\nprint('have', flush=True)\nsys.stdin.readline()\n"
        "try:\n    mine.held()\nexcept claim.Lost:\n    print('lost')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sleeper:
        assert sleeper.stdout is not None and sleeper.stdout.readline() == "have\n"
        sleeper.send_signal(signal.SIGSTOP)
        held = claims.holder(tmp_path)
        assert held is not None
        write_json(held.path, {**json.loads(held.path.read_text()), "machine": "as seen from elsewhere"})
        silent_for(held, claims.STALE_S + 1)
        assert claims.take(tmp_path, ROW) is not None
        sleeper.send_signal(signal.SIGCONT)
        said, _ = sleeper.communicate("\n")
        assert said == "lost\n"
