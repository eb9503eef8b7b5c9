"""Sweeps that survive: slots, kills, crashes, time limits, full disks, sixteen commands at once."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import Trainer
from forked import together
from rows import assert_same_sessions, begin, command, epochs_of, folders_of, rows_in, until, workers_in

from normbench import claim as claims
from normbench import worker
from normbench.checkpoint import NEWEST, epoch_of
from normbench.code import code_hash, source_of
from normbench.plan import Plan, read_json

TINY = ["dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "model.width=4", "threads=1",
        "epochs=3", "tensorboard=false", "checkpoint.every=1epoch"]  # fmt: skip
SLOTS = "hydra.launcher.n_jobs=2"
SLOT = "hydra.launcher.n_jobs=1"
LONG, MANY = ([*(o for o in TINY if not o.startswith("epochs=")), f"epochs={n}"] for n in (60, 12))
ONE = [*(o for o in TINY if not o.startswith("epochs=")), "epochs=1"]


def failures(out: Path) -> dict[str, str]:
    """`<norm> s<session>` → the error of every failure.json."""
    found = {}
    for path in sorted(out.rglob("failure.json")):
        row = read_json(path)["row"]
        found[f"{row['norm']} s{row['session']}"] = f"{row['status']}: {row['error']}"
    return found


def claimed(out: Path) -> list[claims.Claim]:
    """The living claims of workers."""
    found = [claims.holder(folder) for folder in folders_of(out).values()]
    return [held for held in found if held is not None and held.alive]


LAYER = """
import os, signal, time
from torch import nn

class Layer(nn.Module):
    def __init__(self, num_features):
        super().__init__()

    def forward(self, x):
        if "NORMBENCH_SLOTS" in os.environ or {here}:
            {does}
        return x
"""
Stranger = Callable[..., list[str]]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    """A layer from outside that does something in a worker process, or `here` too; its overrides."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(does: str, here: bool = False, norm: str = "obn,stranger") -> list[str]:
        Path("stranger.py").write_text(LAYER.format(does=does, here=here))
        Path("mine/norm").mkdir(parents=True, exist_ok=True)
        Path("mine/norm/stranger.yaml").write_text("_target_: stranger.Layer\n_partial_: true\n")
        return ["--config-dir=mine", f"norm={norm}"]

    yield write
    sys.modules.pop("stranger", None)
    source_of.cache_clear()


def test_slots_give_the_same_numbers_as_one_process(train: Trainer) -> None:
    train("norm=obn,mbn", "session=range(3)", *TINY, "out=here")
    plan = train("norm=obn,mbn", "session=range(3)", *TINY, "out=slots", SLOTS)
    assert_same_sessions(Path("here"), Path("slots"))
    table = pd.read_csv(plan.folder / "results.csv")
    assert len(table) == 6 and set(table["slots"]) == {2} and set(table["status"]) == {"ok"}
    assert not workers_in(Path.cwd()) and not list(Path("slots").rglob("claim-*"))


@pytest.mark.slow
def test_threads_are_divided_among_slots(train: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan = train("session=0,1", *(o for o in ONE if o != "threads=1"), SLOTS)
    cores = len(os.sched_getaffinity(0))
    assert set(pd.read_csv(plan.folder / "results.csv")["threads"]) == {max(1, cores // 2)}


@pytest.mark.slow
def test_a_fresh_process_after_so_many_sessions(train: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    real = subprocess.Popen

    def counted(words: list[str], **kwargs: object) -> object:
        started.append(words)
        return real(words, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr("normbench.local.subprocess.Popen", counted)
    plan = train(
        "session=range(3)", *TINY, "hydra.launcher.n_jobs=1", "hydra.launcher.sessions_per_process=2"
    )
    assert rows_in(plan) == 3
    assert len([words for words in started if "normbench.worker" in words]) == 2


CRASHES = {  # norm → what its forward pass does in a worker, and what is written down
    "segfault": ("os.kill(os.getpid(), signal.SIGSEGV)",
                 "failed: killed by SIGSEGV; it has no checkpoint yet"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)",
               "interrupted: killed by SIGKILL: by the system when memory"),
    "exits": ("os._exit(7)", "failed: the process ended with code 7"),
    "raises": ("raise MemoryError", "failed: MemoryError"),
    "leaves": ("raise SystemExit(0)", "failed: SystemExit"),
}  # fmt: skip


@pytest.mark.slow
def test_a_crash_harms_no_other_session(train: Trainer, stranger: Stranger) -> None:
    """All kinds in one command: each is also one of those that the others must not harm."""
    arms = stranger("pass", norm=f"obn,{','.join(CRASHES)}")
    layers = [
        LAYER.replace("Layer", norm).format(does=does, here=False) for norm, (does, _) in CRASHES.items()
    ]
    Path("stranger.py").write_text("".join(layers))
    for norm in CRASHES:
        Path(f"mine/norm/{norm}.yaml").write_text(f"_target_: stranger.{norm}\n_partial_: true\n")
    plan = train(*arms, "session=0", *ONE, SLOT, fails=1)
    said = failures(Path("outputs"))
    assert said.keys() == {f"{norm} s0" for norm in CRASHES}
    assert all(said[f"{norm} s0"].startswith(says) for norm, (_, says) in CRASHES.items()), said
    table = pd.read_csv(plan.folder / "results.csv")
    ends = {norm: {says.partition(":")[0]} for norm, (_, says) in CRASHES.items()}
    assert table.groupby("norm")["status"].agg(set).to_dict() == {"obn": {"ok"}, **ends}


@pytest.mark.slow
def test_what_was_killed_goes_on_with_the_next_command_and_what_failed_only_on_request(
    train: Trainer, stranger: Stranger
) -> None:
    once = "os.path.exists('go') or os.kill(os.getpid(), signal.{})"
    for signum, again in (("SIGKILL", []), ("SIGSEGV", ["retry_failed=true"])):
        Path("go").unlink(missing_ok=True)
        arms = [*stranger(once.format(signum)), "session=0", *ONE, SLOT, f"out={signum}"]
        train(*arms, fails=1)
        Path("go").touch()
        if again:
            train(*arms, fails=1)
            assert len(failures(Path(signum))) == 1
        plan = train(*arms, *again)
        assert rows_in(plan) == 2 and not failures(Path(signum))


@pytest.mark.slow
def test_a_session_that_takes_too_long_has_failed(train: Trainer, stranger: Stranger) -> None:
    plan = train(*stranger("time.sleep(600)"), *ONE, SLOTS, "hydra.launcher.timeout_min=0.1",
                 "hydra.launcher.grace_s=1", fails=1)  # fmt: skip
    assert failures(Path("outputs")) == {"stranger s0": "failed: timeout: not finished after 0.1 minutes"}
    assert set(pd.read_csv(plan.folder / "results.csv")["status"]) == {"ok", "failed"}
    assert not workers_in(Path.cwd())


@pytest.mark.parametrize(
    "extra", [pytest.param([], id="here"), pytest.param([SLOTS], id="slots", marks=pytest.mark.slow)]
)
def test_fail_fast_stops_at_the_first(train: Trainer, stranger: Stranger, extra: list[str]) -> None:
    arms = stranger("raise RuntimeError('no')", here=True, norm="stranger")
    train(*arms, "session=range(8)", *TINY, "fail_fast=true", *extra, fails=1)
    assert 1 <= len(failures(Path("outputs"))) <= 2


@pytest.mark.slow
def test_a_worker_refuses_other_code(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    plan = train(*ONE)
    for code, rc in ((code_hash(plan), 0), ("0123456789", 2)):
        words = [sys.executable, "-m", "normbench.worker", str(plan.path), "--code", code]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == rc, done.stderr
    assert done.stderr.startswith("normbench worker: the code is not what was submitted")
    assert len(done.stderr.splitlines()) == 1


def test_the_code_of_layers_from_outside_counts(train: Trainer, stranger: Stranger) -> None:
    plan = train(*stranger("pass"), *ONE)
    before = code_hash(plan)
    assert before == code_hash(plan)
    stranger("x = x * 2")
    assert code_hash(plan) != before


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("extra", ["hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs=null"])
def test_a_signal_stops_everything_with_checkpoints(train: Trainer, signum: int, extra: str) -> None:
    sweep = ["session=0,1", *LONG]
    sessions = 2 if "=2" in extra else 1
    running = begin(*sweep, extra, "out=cut")
    until(lambda: len([f for f in Path("cut").rglob(NEWEST)]) == sessions)
    running.send_signal(signum)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signum, errors
    assert "interrupted; the same command goes on from here" in errors and "Traceback" not in errors
    assert not workers_in(Path.cwd()) and not claimed(Path("cut"))
    stopped = [folder for folder in folders_of(Path("cut")).values() if (folder / NEWEST).is_file()]
    assert len(stopped) == sessions
    if signum == signal.SIGTERM:
        train(*sweep, "out=cut")
        train(*sweep, "out=whole")
        assert_same_sessions(Path("cut"), Path("whole"))


@pytest.mark.slow
def test_workers_stop_when_their_launcher_is_killed() -> None:
    running = begin("session=0,1", *LONG, SLOTS, "out=cut")
    until(lambda: len(list(Path("cut").rglob(NEWEST))) == 2)
    running.kill()
    running.communicate()
    until(lambda: not workers_in(Path.cwd()))
    assert all(epoch_of(folder) for folder in folders_of(Path("cut")).values())


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_outlive_its_launcher(stranger: Stranger) -> None:
    arms = stranger("time.sleep(600)", norm="stranger")
    running = begin(*arms, "session=0,1", *ONE, SLOTS, "hydra.launcher.grace_s=1", "out=cut")
    until(lambda: len(claimed(Path("cut"))) == 2)
    running.kill()
    running.communicate()
    until(lambda: not workers_in(Path.cwd()))


FULL = """
import os, resource, signal, sys
from normbench import cli, training
real, steps = training.train_step, [0]
def step(*args):
    steps[0] += 1
    if steps[0] == 4 + 5:  # 4 steps before the session's own; its first checkpoint is of step 4
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    if steps[0] == 4 + 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
training.train_step = step
cli.run("train")
"""


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    train(*TINY, "out=whole")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    done = subprocess.run([sys.executable, "-c", FULL, *TINY, "out=full"], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert "no checkpoint in" in done.stderr and "File too large; training goes on" in done.stderr
    capsys.readouterr()
    train(*TINY, "out=full")
    said = capsys.readouterr().out
    assert "1 interrupted at epoch 1" in said and "goes on from step 4/12" in said
    assert_same_sessions(Path("whole"), Path("full"))


@pytest.mark.slow
def test_a_disk_that_takes_little_fails_the_sessions_and_says_so(train: Trainer) -> None:
    """A row and its manifest do not fit, what says so does; with more room the same sessions end."""
    plan = train("session=0", *ONE, "out=full")
    limit = (6_000, resource.RLIM_INFINITY)
    done = subprocess.run(command("session=0,1", *ONE, "out=full"), capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "1 of 2 sessions failed:" in done.stderr and "File too large" in done.stderr
    assert [line.partition(":")[0] for line in failures(plan.folder).values()] == ["failed"]
    assert rows_in(train("session=0,1", *ONE, "out=full", "retry_failed=true")) == 2
    assert not failures(plan.folder)


@pytest.mark.slow
def test_data_that_is_gone_fails_its_session(train: Trainer, tmp_path: Path) -> None:
    plan = train("dataset=mnist", f"data_dir={tmp_path}/none", *TINY, SLOT, "session=0,1", fails=1)
    assert {line.partition(":")[0] for line in failures(plan.folder).values()} == {"failed"}
    assert all("none" in line for line in failures(plan.folder).values())


def test_a_walk_leaves_living_claims_alone(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    plan = train("session=0", *ONE)
    held = claims.take(plan.folder / plan.arms[0].setting / "s1", {})
    assert held is not None
    train("session=0,1,2", *ONE)
    said = capsys.readouterr().out
    assert "1 of 3 done, 1 running in other processes, 1 to run" in said
    assert not (held.folder / "session.json").is_file()
    assert "1 session running in other processes" not in said  # it was not ours to run
    held.release()
    assert rows_in(train("session=0,1,2", *ONE)) == 3


@pytest.mark.slow
def test_forty_sessions_survive_a_killer(train: Trainer) -> None:
    """SIGKILL for random workers and the parent, every second or so, until all is done."""
    sweep = ["norm=obn,mbn", "session=range(20)", *MANY]
    train(*sweep, "out=whole")
    killer, killed, starts = random.Random(7), {"worker": 0, "parent": 0}, 0
    while True:
        starts += 1
        assert starts < 40, Path("log").read_text()[-3000:]
        running = begin(*sweep, SLOTS, "out=cut", log=Path("log"))
        while running.poll() is None:
            until(lambda: claimed(Path("cut")) or running.poll() is not None)  # noqa: B023
            pause = time.monotonic() + killer.uniform(0.2, 2.0)
            while time.monotonic() < pause and running.poll() is None:
                time.sleep(0.05)
            victims = [held.pid for held in claimed(Path("cut"))]
            if running.poll() is not None or not victims or sum(killed.values()) >= 8:
                continue
            if sum(killed.values()) % 4 == 2:
                running.kill()
                killed["parent"] += 1
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killer.choice(victims), signal.SIGKILL)
                    killed["worker"] += 1
        running.wait()
        until(lambda: not workers_in(Path.cwd()))
        if running.returncode == 0:
            break
    assert killed["worker"] >= 4 and killed["parent"] >= 1, killed
    assert_same_sessions(Path("whole"), Path("cut"))
    table = pd.read_csv("cut/adhoc/results.csv")
    assert len(table) == 40 and not table.duplicated(["setting", "session"]).any()
    assert set(table["status"]) == {"ok"}
    assert not list(Path("cut").rglob("failure.json"))


@pytest.mark.slow
def test_sixteen_commands_at_once_run_every_session_once(train: Trainer) -> None:
    sweep = ["norm=obn,mbn", "session=range(20)", *TINY]
    plan = train(*sweep, "out=whole")
    commands = together(*[["normbench.train", *sweep, "out=crowd"]] * 16)
    assert [done.returncode for done in commands] == [0] * 16, [done.stderr for done in commands]
    assert_same_sessions(Path("whole"), Path("crowd"))
    finished = [line for done in commands for line in done.stdout.splitlines() if ": ok, " in line]
    assert len(finished) == 40 == len(set(finished)) == rows_in(Plan.newest(Path("crowd/adhoc")) or plan)
    assert all(len(epochs_of(folder)) == 3 for folder in folders_of(Path("crowd")).values())


@pytest.mark.slow
def test_a_failure_says_its_attempt(train: Trainer, stranger: Stranger) -> None:
    arms = [*stranger("raise RuntimeError('no')", norm="stranger"), "session=0,1", *ONE, SLOT]
    for attempt in (1, 2):
        train(*arms, *(["retry_failed=true"] if attempt > 1 else []), fails=1)
        bodies = [read_json(path) for path in Path("outputs").rglob("failure.json")]
        assert [body["attempt"] for body in bodies] == [attempt, attempt]
        assert all("RuntimeError: no" in body["traceback"] for body in bodies)
        assert not any(body.get("again") for body in bodies)


@pytest.mark.parametrize(
    ("slip", "line"),
    [
        ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs must be an int ≥ 1, got 0"),
        ("hydra.launcher.timeout_min=-1", "hydra.launcher.timeout_min must be a number > 0, got -1"),
        ("hydra.launcher.jobs=2", "hydra.launcher.jobs"),
        ("stop_when_decided=true", "stop_when_decided=true compares arms, and this command has one"),
        ("margin=0.01", "margin is for stop_when_decided=true"),
        ("margin=wide", "margin must be a number above 0 or a percentage"),
        ("fail_fast=maybe", "fail_fast must be true or false"),
    ],
)
def test_slips_in_a_launchers_options(refusal: object, slip: str, line: str) -> None:
    assert line in refusal(slip)  # type: ignore[operator]


@pytest.mark.slow
def test_stopping_early_leaves_settled_arms_out(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["norm=obn,torch_bn,bn", "session=range(10)", *ONE, "stop_when_decided=true",
             "margin=0.05"]  # fmt: skip
    plan = train(*sweep)
    said = capsys.readouterr().out
    assert "look after 5 of 10 sessions: " in said and "torch_bn equivalent" in said
    counts = pd.read_csv(plan.folder / "results.csv").groupby("norm").size().to_dict()
    assert counts["torch_bn"] == 5 and counts["obn"] >= counts["bn"]
    train(*sweep)
    assert "of settled arms left out, 0 to run" in capsys.readouterr().out


def test_the_walk_itself_says_whether_there_is_more(train: Trainer) -> None:
    plan = train("session=0", *ONE)
    assert worker.work(plan, 0, 1) is False
    for path in plan.folder.rglob("session.json"):
        path.unlink()
    assert worker.work(plan, 0, 1, most=0) is True
    assert worker.work(plan, 0, 1, skip=(0,)) is False and not plan.finished(plan.sessions[0])


@pytest.mark.slow
def test_every_slot_sees_its_own_device(
    train: Trainer, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normbench.local.visible_devices", lambda: ["3", "7"])
    signs_and_waits = """
            open('seen-' + os.environ['CUDA_VISIBLE_DEVICES'], 'w').close()
            until = time.monotonic() + 60  # else one quick slot may end every session alone
            while len([name for name in os.listdir() if name.startswith('seen-')]) < 2:
                assert time.monotonic() < until
                time.sleep(0.05)
    """
    arms = stranger(signs_and_waits, norm="stranger")
    plan = train(*arms, "session=range(4)", *ONE)
    assert rows_in(plan) == 4 and set(pd.read_csv(plan.folder / "results.csv")["slots"]) == {2}
    assert {path.name for path in Path.cwd().glob("seen-*")} == {"seen-3", "seen-7"}


def test_one_session_or_a_named_device_takes_no_slots(
    train: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normbench.local.visible_devices", lambda: ["3", "7"])
    for overrides in (["session=0", "out=one"], ["session=0,1", "device=cpu", "out=named"]):
        plan = train(*overrides, *ONE)
        assert set(pd.read_csv(plan.folder / "results.csv")["slots"]) == {1}


@pytest.mark.slow
def test_what_a_looked_at_wave_lacks_is_run_before_the_next(
    train: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["norm=obn,nn", "session=range(10)", *ONE, "stop_when_decided=true", "margin=0.0001"]
    plan = train(*sweep)
    folder = plan.session_folder(next(s for s in plan.sessions if s.session == 2))
    (folder / "session.json").unlink()
    capsys.readouterr()
    train(*sweep)
    assert "19 of 20 done, 1 interrupted" in capsys.readouterr().out
    assert (folder / "session.json").is_file()


@pytest.mark.slow
def test_no_look_while_a_session_runs_elsewhere(train: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["norm=obn,nn", "session=range(6)", *ONE, "stop_when_decided=true"]
    first = train("norm=obn,nn", "session=0", *ONE)
    held = claims.take(first.folder / first.arms[0].setting / "s1", {})
    assert held is not None
    plan = train(*sweep, fails=1)
    said = capsys.readouterr().out
    assert "no look after 5 sessions yet" in said and "1 session running in other processes" not in said
    assert rows_in(plan) == 9 and not list(plan.folder.glob("looks-*"))
    held.release()
    assert rows_in(train(*sweep)) == 12 and list(plan.folder.glob("looks-*"))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], [SLOTS]], ids=["here", "slots"])
def test_nobody_has_to_read_what_a_sweep_says(extra: list[str]) -> None:
    sweep = begin("session=0,1", *ONE, *extra)
    assert sweep.stdout is not None and sweep.stderr is not None
    sweep.stdout.close()
    errors = sweep.stderr.read()
    sweep.stderr.close()
    assert sweep.wait(120) == 0, errors
    assert len(list(Path("outputs").rglob("session.json"))) == 2


@pytest.mark.slow
def test_what_is_left_of_a_sweep_has_the_threads_it_began_with(train: Trainer) -> None:
    sweep = ["session=0,1", *(o for o in ONE if o != "threads=1"), SLOTS]
    plan = train(*sweep)
    before = pd.read_csv(plan.folder / "results.csv")
    (plan.session_folder(plan.sessions[1]) / "session.json").unlink()
    after = pd.read_csv(train(*sweep).folder / "results.csv")
    same = ["session", "threads", "slots", "train_loss", "test_acc"]
    assert after[same].equals(before[same]) and set(after["slots"]) == {2}


def test_leftovers_of_a_kill_after_the_end_are_taken_away(train: Trainer) -> None:
    plan = train("session=0", *ONE)
    folder = plan.session_folder(plan.sessions[0])
    left = claims.take(folder, {})
    assert left is not None
    left.release()
    for name in (NEWEST, "..checkpoint-coming-x1", "failure.json"):
        (folder / name).write_text("{}")
    before = (folder / "session.json").read_bytes()
    train("session=0", *ONE)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "epochs.csv", "session.json"}
    assert (folder / "session.json").read_bytes() == before


@pytest.mark.slow
def test_damaged_files_are_named_in_a_line_and_cost_no_other_row(
    train: Trainer, refusal: Callable[..., str]
) -> None:
    sweep = ["session=0,1", *ONE]
    plan = train(*sweep)
    folder = plan.session_folder(plan.sessions[0])
    whole = (folder / "session.json").read_text()
    (folder / "session.json").write_text(whole[:100])
    done = subprocess.run(command(*sweep), capture_output=True, text=True)
    assert f"{folder}/session.json is damaged" in done.stderr and "Traceback" not in done.stderr
    assert rows_in(plan) == 1
    (folder / "session.json").unlink()
    for body in ("[]", '{"row": null}', '{"row": {}}', "{"):
        (folder / "failure.json").write_text(body)
        assert f"{folder.relative_to('outputs')}/failure.json is damaged" in refusal(*sweep)
    (folder / "failure.json").unlink()
    (folder / "claim-1.json").write_text('{"pid": "abc"}')
    os.utime(folder / "claim-1.json", (0, 0))
    assert rows_in(train(*sweep)) == 2


@pytest.mark.slow
def test_a_worker_finds_its_sessions_from_anywhere(train: Trainer) -> None:
    plan = train("session=0,1", *ONE)
    (plan.session_folder(plan.sessions[1]) / "session.json").unlink()
    words = [sys.executable, "-m", "normbench.worker", str(plan.path.resolve())]
    Path("elsewhere").mkdir()
    done = subprocess.run(words, cwd="elsewhere", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": ok, ") == 1, done.stderr
    assert plan.finished(plan.sessions[1]) and not list(Path("elsewhere").iterdir())


NAMES = ["back\\slash", "it's", "a,b", "ü ñ", "a=b", "trailing\\"]


@pytest.mark.parametrize("out", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_any_folder_name_will_do(train: Trainer, out: str) -> None:
    words = out.replace("\\", "\\\\") if out.endswith("\\") else out
    quoted = words.replace("'", "\\'")
    plan = train("session=0", *ONE, f"out='{quoted}'")
    assert plan.folder == Path(out, "adhoc") and rows_in(plan) == 1


def test_out_cannot_be_swept(refusal: Callable[..., str]) -> None:
    assert "out is one for all sessions of a command and cannot be swept" in refusal("out=a,b")
