"""results.csv: every session's row, by its cache as from nothing, whoever writes at the same time."""

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Trainer
from folders import claimed, many

from normbench import claim as claims
from normbench import results, training
from normbench.plan import Plan, read_json, write_json
from normbench.results import CACHE, COLUMNS, failure_line, read_cache, rebuild, session_names, update
from normbench.values import Refused

TINY = ["model.width=4", "dataset.train_subset=96", "dataset.test_subset=64", "batch.size=48", "epochs=1",
        "threads=1", "tensorboard=false"]  # fmt: skip


def rows_of(study: Path) -> list[dict[str, str]]:
    with (study / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def statuses(study: Path) -> list[str]:
    return [row["status"] for row in rows_of(study)]


def assert_as_from_nothing(study: Path) -> None:
    """The update by the cache, the rows read one by one, and a rebuild from nothing are the same bytes."""
    update(study)
    quick = (study / "results.csv").read_bytes()
    (study / CACHE).unlink()
    update(study)
    assert (study / "results.csv").read_bytes() == quick


def test_two_thousand_sessions_are_all_there_in_launch_order(template: Plan) -> None:
    kinds = ["ok"] * 14 + ["failed", "failed", "interrupted", "running", "waiting", "ok"]
    plan = many(template, Path("out"), 2000, arms=40, kinds=kinds)
    assert update(plan.folder) == 1800
    rows = rows_of(plan.folder)
    there = [i for i in range(2000) if kinds[i % 20] not in ("running", "waiting")]
    assert [int(row["launch_order"]) for row in rows] == there
    says = {"ok": "ok", "failed": "failed", "interrupted": "interrupted"}
    assert [row["status"] for row in rows] == [says[kinds[i % 20]] for i in there]
    assert {row["error"] for row in rows if row["status"] == "interrupted"} == {"interrupted on elsewhere"}
    one, real = rows[0], read_json(template.session_folder(template.sessions[0]) / "session.json")["row"]
    own = ("setting", "arm", "launch_order", "test_acc")
    assert {c: one[c] for c in COLUMNS if c not in own} == {
        c: "" if real[c] is None else str(real[c]) for c in COLUMNS if c not in own
    }
    assert len(read_cache(plan.folder)) == 1800
    assert_as_from_nothing(plan.folder)


def test_the_cache_follows_every_change(template: Plan) -> None:
    kinds = ("ok", "failed", "interrupted", "running", "ok")
    plan = many(template, Path("out"), 30, arms=3, kinds=kinds)
    study, folders = plan.folder, [plan.session_folder(s) for s in plan.sessions]
    update(study)
    assert_as_from_nothing(study)
    assert len(rows_of(study)) == 24

    def finish(folder: Path, **changed: Any) -> None:
        body = read_json(folders[0] / "session.json")
        write_json(folder / "session.json", {**body, "row": {**body["row"], **changed}})

    finish(folders[1], launch_order=1)  # failed → ok
    (folders[1] / "failure.json").unlink()
    assert_as_from_nothing(study)
    assert statuses(study)[:4] == ["ok", "ok", "interrupted", "ok"]
    os.replace(folders[2] / "claim-1.json", folders[2] / "claim-1.old")
    claimed(folders[2], {"launch_order": 2}, alive=True)  # interrupted → running → ok
    assert_as_from_nothing(study)
    assert len(rows_of(study)) == 23
    finish(folders[2], launch_order=2, test_loss='a "quoted",\nvalue')
    assert_as_from_nothing(study)
    assert rows_of(study)[2]["test_loss"] == 'a "quoted",\nvalue'
    finish(folders[2], launch_order=2, test_loss=1.5)  # changed
    assert_as_from_nothing(study)
    assert rows_of(study)[2]["test_loss"] == "1.5"
    shutil.rmtree(folders[0])  # removed
    shutil.move(folders[5], study / "elsewhere")
    assert_as_from_nothing(study)
    assert len(rows_of(study)) == 22
    shutil.copytree(folders[4], study / "another-setting" / "seed7-s0")  # added, with equal times
    shutil.copytree(folders[4], study / "another-setting" / "copy of s0")
    assert_as_from_nothing(study)
    assert len(rows_of(study)) == 23
    again = read_json(folders[6] / "failure.json")  # tried again: its last attempt's row until it has ended
    write_json(folders[6] / "failure.json", {**again, "again": True})
    claimed(folders[6], again["row"], alive=True)
    assert_as_from_nothing(study)
    assert len(rows_of(study)) == 23


def test_only_what_changed_is_read(template: Plan) -> None:
    plan = many(template, Path("out"), 200)
    update(plan.folder)
    before = (plan.folder / "results.csv").read_bytes()
    path = plan.session_folder(plan.sessions[7]) / "session.json"
    state, size = path.stat(), path.stat().st_size
    path.write_bytes(b"x" * size)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    update(plan.folder)
    assert (plan.folder / "results.csv").read_bytes() == before
    with pytest.raises(Refused, match=r"s7/session.json is damaged .*remove it to make it again"):
        update(plan.folder, fresh=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: b"{",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"0.5", b"0.6"),
        lambda content: content.replace(b'"format": 1', b'"format": 0'),
        lambda content: content.replace(b'"test_acc", ', b"", 1),
        lambda content: b"[" * 100_000,
        lambda content: b"\xff" + content,
    ],
)
def test_a_cache_that_is_damaged_or_of_another_version_is_made_again(
    template: Plan, spoil: Callable[[bytes], bytes]
) -> None:
    plan = many(template, Path("out"), 3)
    update(plan.folder)
    table, cache = (plan.folder / "results.csv").read_bytes(), (plan.folder / CACHE).read_bytes()
    (plan.folder / CACHE).write_bytes(spoil(cache))
    assert spoil(cache) != cache and read_cache(plan.folder) == {}
    assert update(plan.folder) == 3
    assert (plan.folder / "results.csv").read_bytes() == table
    assert (plan.folder / CACHE).read_bytes() == cache


@pytest.mark.parametrize(
    "text", ['{"row": 3}', "[]", "{}", '{\n "row": {"study": "a"}, \n "x": [}\n}x', "\x00"]
)
def test_a_session_file_without_a_row_is_named(template: Plan, text: str) -> None:
    path = template.session_folder(template.sessions[0]) / "session.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"session.json (has no row|is damaged).*; remove it to "):
        update(template.folder)


def test_a_session_file_of_another_layout_has_the_same_row(template: Plan) -> None:
    before = rows_of(template.folder)
    path = template.session_folder(template.sessions[0]) / "session.json"
    body = read_json(path)
    for text in (json.dumps(body), json.dumps(dict(reversed(body.items())), indent=1)):
        path.write_text(text)
        update(template.folder)
        assert rows_of(template.folder) == before


def test_a_stopped_session_is_an_interrupted_row_until_it_ends(
    train: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def step(*args: Any) -> Any:
        seen.append([(s, failure_line(study / s)) for s in session_names(study)])
        seen.append(statuses(rebuild(study).parent))
        raise Killed

    study, seen = Path("outputs/adhoc"), list[Any]()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", step)
        with pytest.raises(Killed):
            train(*TINY)
    assert [line for _, line in seen[0]] == [f"{study / seen[0][0][0]}: runs on {os.uname().nodename}"]
    assert seen[1] == []
    rebuild(study)
    (row,) = rows_of(study)
    assert (row["status"], row["error"]) == ("interrupted", f"interrupted on {os.uname().nodename}")
    assert row["norm"] == "obn" and row["started_at"] and not row["finished_at"]
    train(*TINY)
    assert statuses(study) == ["ok"]
    assert_as_from_nothing(study)


def test_a_claim_that_cannot_be_read_gives_no_row(template: Plan) -> None:
    plan = many(template, Path("out"), 2, kinds=["ok", "interrupted"])
    path = plan.session_folder(plan.sessions[1]) / "claim-1.json"
    path.write_text("{")
    os.utime(path, (0, 0))
    assert update(plan.folder) == 1


def finish_some(study: Path, worker: int, sessions: int) -> None:
    """Finish sessions one after another, gather after each, and look whether their rows are there."""
    example = next(study.glob("*-copy0-*/s0/session.json"))
    body = read_json(example)
    for n in range(sessions):
        folder = study / f"worker{worker}-0000000000" / f"s{n}"
        row = {**body["row"], "setting": folder.parent.name, "launch_order": 100 + worker, "session": n}
        held = claims.take(folder, row)
        assert held is not None
        write_json(folder / "session.json", {**body, "row": row})
        held.remove()
        rebuild(study)


@pytest.mark.parametrize("locks", [True, False])
def test_sixteen_processes_lose_no_row(template: Plan, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    if not locks:

        def refuse(file: object, operation: int) -> None:
            raise OSError("this file system has no locks")

        monkeypatch.setattr(fcntl, "flock", refuse)
    plan = many(template, Path("out"), 50)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=finish_some, args=(plan.folder, n, 4)) for n in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 16
    rows = rows_of(plan.folder)
    assert len(rows) == 50 + 64
    assert len({(row["setting"], row["session"]) for row in rows}) == 114
    assert {p.name for p in plan.folder.iterdir() if p.is_file() and p.suffix != ".json"} == {
        "results.csv", results.CACHE, ".results.lock"
    }  # fmt: skip
    assert_as_from_nothing(plan.folder)
