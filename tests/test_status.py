"""The `status` door: what every session is doing, as its folder says, while sweeps run and after."""

import io
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer
from folders import NOBODY, claimed, many
from rich.console import Console
from rows import hear_ctrl_c

from normbench import claim as claims
from normbench import status, training
from normbench.overview import Overview, look
from normbench.plan import Plan, read_json, write_json
from normbench.values import Refused

TINY = ["model.width=4", "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=48", "epochs=2",
        "threads=1", "tensorboard=false", "checkpoint.every=1epoch"]  # fmt: skip
HERE = os.uname().nodename


def text(sweep: Overview, width: int = 10_000) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(status.shown(sweep))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def lines(sweep: Overview) -> list[str]:
    return [" ".join(line.split()) for line in text(sweep).splitlines() if line.strip()]


def open_door(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["status", *arguments])
    status.main()


def test_a_real_sweep_from_its_first_step_to_its_end(train: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    study, seen = Path("outputs/adhoc"), list[list[str]]()
    real = training.train_step

    def step(ready: training.Prepared, *batch: Any) -> Any:
        seen.append(lines(look(study)))
        if ready.config.choices["norm"] == "bn" and ready.config.session == 0:
            raise MemoryError("no more\nof it")
        return real(ready, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", step)
        plan = train("norm=obn,bn", "session=0,1", *TINY, fails=1)
    assert seen[0][0] == "0 of 4 done, 1 running, 3 to run; time to go unknown"
    first = plan.arms[plan.sessions[0].arm].choices["norm"]
    assert seen[0][-1].startswith(f"{first} s0 no epoch yet on {HERE} for ")
    with_rate = [line for said in seen for line in said if " epoch 1 of 2, step 2, " in line]
    assert with_rate and all("images/s on" in line for line in with_rate)
    assert any(said[0].startswith("2 of 4 done, 1 running, 1 failed; about ") for said in seen)
    after = lines(look(study))
    assert after[0] == "3 of 4 done, 1 failed"
    assert after[1] == "arm done failed a session"
    assert after[-2:] == ["failed", "bn s0 MemoryError: of it"]
    train("norm=obn,bn", "session=0,1", *TINY, "retry_failed=true")
    assert lines(look(study))[0] == "4 of 4 done"


def test_a_stopped_session_says_where_it_goes_on(train: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    real = training.train_step

    def step(ready: training.Prepared, *batch: Any) -> Any:
        if any(Path("outputs").glob("*/*/s0/checkpoint.pt")):
            raise Killed
        return real(ready, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", step)
        with pytest.raises(Killed):
            train(*TINY, "session=0,1")
    said = lines(look(Path("outputs/adhoc")))
    assert said[0] == "0 of 2 done, 1 interrupted, 1 to run; nothing runs"
    assert said[-2] == "interrupted" and said[-1].endswith(" s0 at epoch 1")
    assert " ? ?" in said[2]


KINDS = ("ok", "ok", "failed", "running", "interrupted", "waiting")


def test_every_kind_is_counted_by_arm_and_readable_at_80_columns(template: Plan) -> None:
    plan = many(template, Path("out"), 36, arms=2, kinds=KINDS)
    sweep = look(plan.folder)
    said = lines(sweep)
    assert said[0].startswith("12 of 36 done, 6 interrupted, 6 running, 6 failed, 6 to run; about ")
    assert said[1] == "arm done running failed interrupted to run a session to go"
    assert said[2].startswith("obn-copy0 6/18 0 6 6 0 ") and said[3].startswith("obn-copy1 6/18 6 0 0 6 ")
    assert "obn-copy0 s1 and 5 more MemoryError: of it (2 attempts)" in said
    assert "obn-copy0 s2 and 5 more before a checkpoint" in said
    assert sum("on elsewhere for" in line for line in said) == 6
    narrow = text(sweep, width=80).splitlines()
    assert max(map(len, narrow)) <= 80 and not any("…" in line for line in narrow)
    squeezed = "".join("".join(narrow).split())
    assert all("".join(word.split()) in squeezed for line in said for word in line.split())


def test_equal_words_for_ten_thousand_names_stay_short(template: Plan) -> None:
    plan = many(template, Path("out"), 120, arms=30, kinds=["running", "failed"])
    said = lines(look(plan.folder))
    assert said.count("and 40 more lines") == 1  # of 60 running; 15 failing arms fit
    assert len(said) < 30 + 20 + 15 + 6


def test_a_claim_without_a_heartbeat_says_so_and_then_is_dead(template: Plan) -> None:
    plan = many(template, Path("out"), 1, kinds=["running"])
    claim = plan.session_folder(plan.sessions[0]) / "claim-1.json"
    assert "no sign" not in text(look(plan.folder))
    os.utime(claim, (time.time() - 45,) * 2)
    assert "; no sign for 45 s" in text(look(plan.folder)) or "; no sign for 46 s" in text(look(plan.folder))
    os.utime(claim, (time.time() - claims.STALE_S - 1,) * 2)
    assert lines(look(plan.folder))[0] == "0 of 1 done, 1 interrupted; nothing runs"


def test_a_failure_that_is_to_run_again_waits(template: Plan) -> None:
    plan = many(template, Path("out"), 2, kinds=["failed"])
    path = plan.session_folder(plan.sessions[0]) / "failure.json"
    write_json(path, {**read_json(path), "again": True})
    assert lines(look(plan.folder))[0] == "0 of 2 done, 1 failed, 1 to run; nothing runs"
    claimed(path.parent, {}, alive=True)
    assert lines(look(plan.folder))[0] == "0 of 2 done, 1 running, 1 failed; time to go unknown"
    body = read_json(path)
    write_json(path, {**body, "again": False, "row": {**body["row"], "status": "interrupted"}})
    claimed(path.parent, {}, alive=False)
    assert lines(look(plan.folder))[0] == "0 of 2 done, 1 interrupted, 1 failed; nothing runs"


def test_time_to_go_from_what_sessions_took_and_how_many_run(template: Plan) -> None:
    plan = many(template, Path("out"), 10, kinds=["ok", "running", "running", "waiting", "waiting"])
    for planned in plan.sessions[::5]:
        path = plan.session_folder(planned) / "session.json"
        body = read_json(path)
        write_json(path, {**body, "row": {**body["row"], "total_time_s": 1000.0}})
    diverged = plan.session_folder(plan.sessions[5]) / "session.json"
    body = read_json(diverged)
    write_json(diverged, {**body, "row": {**body["row"], "total_time_s": 1.0, "status": "diverged"}})
    for planned in plan.sessions:
        if (plan.session_folder(planned) / "claim-1.json").exists():
            rows = plan.session_folder(planned) / "epochs.csv"
            rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]) + "2,half a row")
    sweep = look(plan.folder)
    (arm,) = sweep.arms
    assert arm.session_s == 1000
    course = arm.running[0].reached
    assert course.epoch == 1 and arm.running[0].part == 0.5 and course.at is not None
    begun = max(course.at, status.since(arm.running[0].claim) or course.at)
    just_then = Overview(sweep.arms, begun + timedelta(seconds=100))
    left = [running.left_s(1000, just_then.now) for running in arm.running]
    assert left[0] == pytest.approx(400)
    assert just_then.to_go_s() == pytest.approx((4 * 1000 + sum(left)) / 4)
    assert text(just_then).splitlines()[0].endswith("; about 23 min to go")
    assert Overview(sweep.arms, begun + timedelta(days=1)).to_go_s() == pytest.approx(1000)


def test_arms_that_the_statistics_settled_have_nothing_to_run(template: Plan) -> None:
    plan = many(template, Path("out"), 12, arms=3, kinds=["ok", "ok", "ok", "waiting"])
    looks = plan.path.with_name(plan.path.name.replace("plan-", "looks-"))
    write_json(looks, {"planned": 6, "at": [5], "stopped": {plan.arms[1].setting: 5}})
    sweep = look(plan.folder)
    assert [(arm.settled, arm.waiting) for arm in sweep.arms] == [(0, 1), (1, 0), (0, 1)]
    assert "9 of 12 done, 1 of settled arms left out, 2 to run" in text(sweep)
    write_json(looks, {"planned": 6, "at": [5], "stopped": {arm.setting: 5 for arm in plan.arms[1:]}})
    assert text(look(plan.folder)).startswith("9 of 12 done, 3 of settled arms left out\n")


def test_the_newest_plan_or_every_folder(
    train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    train("norm=ln", *TINY)
    plan = train("norm=obn", *TINY)
    capsys.readouterr()
    open_door(monkeypatch)
    assert capsys.readouterr().out.startswith("1 of 1 done\n")
    open_door(monkeypatch, str(plan.folder), "--all")
    said = capsys.readouterr().out
    assert said.startswith("2 of 2 done\n") and "\nobn " in said and "\nln " in said
    os.chdir(plan.folder)
    open_door(monkeypatch, ".")
    assert capsys.readouterr().out.startswith("1 of 1 done\n")


def test_a_folder_without_sessions_is_refused_with_what_is_there(template: Plan, tmp_path: Path) -> None:
    for asked in ("real/nope", "real"):
        done = subprocess.run(
            [sys.executable, "-m", "normbench.status", asked], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == f"normbench status: no sessions under {asked}; there are real/adhoc\n"
    with pytest.raises(
        Refused, match=r"no sessions under far/away; give a study's folder like outputs/adhoc"
    ):
        look(Path("far/away"))


def test_watching_a_log_ends_with_the_sweep(template: Plan) -> None:
    """A line at the start, one when a session has finished, and the table at the end."""
    plan = many(template, Path("out"), 2, kinds=["ok", "running"])
    command = [sys.executable, "-m", "normbench.status", str(plan.folder), "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = watching.stdout.readline()
        folders = [plan.session_folder(s) for s in plan.sessions]
        write_json(folders[1] / "session.json", read_json(folders[0] / "session.json"))
        rest = watching.stdout.read()
    assert watching.returncode == 0
    assert "Z  1 of 2 done, 1 running; " in first
    assert "Z  2 of 2 done\n2 of 2 done\n\narm" in rest


def test_ctrl_c_ends_watching(template: Plan) -> None:
    plan = many(template, Path("out"), 2, kinds=["ok", "waiting"])
    command = [sys.executable, "-m", "normbench.status", str(plan.folder), "--watch", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    ) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        assert watching.stdout.readline().endswith("Z  1 of 2 done, 1 to run; nothing runs\n")
        watching.send_signal(signal.SIGINT)
        assert (watching.stdout.read(), watching.stderr.read()) == ("", "")
    assert watching.returncode == 0


def test_watching_a_terminal_refreshes_in_place(template: Plan) -> None:
    plan = many(template, Path("out"), 3, kinds=["ok", "failed", "running"])
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=40)
    folders = [plan.session_folder(s) for s in plan.sessions]
    write_json(folders[2] / "session.json", read_json(folders[0] / "session.json"))
    status.watch(plan.folder, False, 0.1, console)
    assert "2 of 3 done, 1 failed" in screen.getvalue() and "\x1b[" in screen.getvalue()


def test_it_starts_without_torch() -> None:
    code = (
        "import sys, normbench.status; print([m for m in ('torch', 'pandas', 'scipy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_what_cannot_be_read_is_no_traceback(template: Plan) -> None:
    plan = many(template, Path("out"), 3, kinds=["running", "interrupted", "failed"])
    running, interrupted, failed = (plan.session_folder(s) for s in plan.sessions)
    (running / "epochs.csv").write_text("epoch,step\nx,\n")
    (interrupted / "claim-1.json").write_text("{")
    os.utime(interrupted / "claim-1.json", (0, 0))
    assert lines(look(plan.folder))[0].startswith("0 of 3 done, 1 interrupted, 1 running, 1 failed")
    (failed / "failure.json").write_text("{")
    with pytest.raises(Refused, match=r"failure.json is damaged"):
        look(plan.folder)


def test_this_machines_processes_are_asked_for(template: Plan) -> None:
    """A claim of a process of this machine that is gone is dead at once, whatever its heartbeat."""
    plan = many(template, Path("out"), 1, kinds=["running"])
    path = plan.session_folder(plan.sessions[0]) / "claim-1.json"
    write_json(path, {**read_json(path), "machine": claims.this_machine(), "pid": NOBODY})
    assert lines(look(plan.folder))[0] == "0 of 1 done, 1 interrupted; nothing runs"
