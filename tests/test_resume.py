"""A session killed at any moment goes on from its checkpoint and ends with the same bits."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainer

from normbench import checkpoint, training
from normbench.config import conf_dir
from normbench.plan import Plan, read_json
from normbench.predict.weights import of_session

NORMS = sorted(f.stem for f in (conf_dir() / "norm").glob("*.yaml") if f.stem != "custom")
TINY = ["dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "model.width=4", "threads=1",
        "epochs=3", "save_model=true", "model.dropout=0.1", "checkpoint.every=1epoch"]  # fmt: skip
STEPS = 12
TIMES = (
    "_time_s",
    "_at",
    "images_per_s",
    "peak_memory_mib",
    "epoch_time_mean_s",
    "epochs_timed",
    "total_time_s",
)


class Killed(BaseException):
    """What a kill leaves behind: nothing more is written."""


def numbers(plan: Plan) -> dict[str, Any]:
    """The row without what a clock says."""
    row = read_json(plan.session_folder(plan.sessions[-1]) / "session.json")["row"]
    return {k: v for k, v in row.items() if not k.endswith(TIMES)}


def epochs(plan: Plan) -> list[dict[str, str]]:
    """epochs.csv without what a clock says."""
    with (plan.session_folder(plan.sessions[-1]) / "epochs.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in csv.DictReader(file)]


def weights(plan: Plan) -> dict[str, torch.Tensor]:
    return torch.load(plan.session_folder(plan.sessions[-1]) / "model.pt")


def assert_same(a: Plan, b: Plan) -> None:
    assert numbers(a) == numbers(b)
    assert epochs(a) == epochs(b) and len(epochs(a)) > 0
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("extra", [(), ("pack=2", "session=0,1")], ids=["alone", "packed"])
def test_a_kept_checkpoint_is_the_last_steps(train: Trainer, extra: tuple[str, ...]) -> None:
    small = [option for option in TINY if not option.startswith(("epochs", "checkpoint"))]
    plan = train(*small, "epochs=1", "checkpoint.every=null", "checkpoint.keep=true", *extra)
    for planned in plan.sessions:
        folder = plan.session_folder(planned)
        body, model = checkpoint.read(folder / "checkpoint.pt"), torch.load(folder / "model.pt")
        assert body["step"] == body["selection"]["step"] == body["rows"][-1]["step"] == STEPS // 3
        assert all(torch.equal(tensor, body["model"][name]) for name, tensor in model.items())
        (folder / "model.pt").unlink()
        assert of_session(folder, {"status": "ok"}) == folder / "checkpoint.pt"


@pytest.fixture
def killed(train: Trainer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command whose training is cut off before its `at`-th step of the session itself."""

    def run(*command: str, at: int) -> None:
        real_step, real_train = training.train_step, training.train
        done = {"steps": -1}

        def train_loop(*args: Any) -> Any:
            done["steps"] = 0
            return real_train(*args)

        def step(*args: Any) -> Any:
            if done["steps"] == at:
                raise Killed
            if done["steps"] >= 0:
                done["steps"] += 1
            return real_step(*args)

        with monkeypatch.context() as patch:
            patch.setattr(training, "train_step", step)
            patch.setattr("normbench.session.train", train_loop)
            with pytest.raises(Killed):
                train(*command)

    return run


WAYS = [
    ("optim=sgd",),
    ("optim=adam", "optim/schedule=one_cycle"),
    ("optim=adamw", "optim/schedule=cosine"),
    ("precision=bf16", "optim/schedule=step"),
    ("precision=fp16",),
    ("channels_last=true", "deterministic=true"),
    ("select=best_val", "dataset.val_fraction=0.25"),
    ("epochs=null", "steps=11", "eval_every=5steps"),
    ("model.weight=weight_norm", "norm=gn"),
]


@pytest.mark.parametrize(
    "extra", [pytest.param(w, id=" ".join(w), marks=[] if w in WAYS[:1] else pytest.mark.slow) for w in WAYS]
)
def test_a_cut_off_session_ends_as_if_it_had_not_been(
    train: Trainer, killed: Any, extra: tuple[str, ...]
) -> None:
    command = [*(o for o in TINY if o.partition("=")[0] not in {e.partition("=")[0] for e in extra}), *extra]
    whole = train(*command, "out=whole")
    killed(*command, "out=cut", at=9)
    resumed = train(*command, "out=cut")
    assert_same(whole, resumed)


def test_an_epoch_that_ends_between_rows_has_its_checkpoint(
    train: Trainer, killed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, "eval_every=3steps"]  # of four steps an epoch
    whole = train(*command, "out=whole")
    killed(*command, "out=cut", at=9)
    capsys.readouterr()
    resumed = train(*command, "out=cut")
    assert "goes on from step 8/12" in capsys.readouterr().out
    assert_same(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_goes_on_with_the_same_bits(train: Trainer, killed: Any, norm: str) -> None:
    command = [f"norm={norm}", *TINY]
    whole = train(*command, "out=whole")
    killed(*command, "out=cut", at=6)
    assert_same(whole, train(*command, "out=cut"))


@pytest.mark.parametrize("at", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 11))])
def test_inside_an_epoch_too(train: Trainer, killed: Any, monkeypatch: pytest.MonkeyPatch, at: int,
                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(checkpoint.Checkpoints, "due", lambda self, epoch_ended: True)
    whole = train(*TINY, "out=whole", "norm=mbn_random")
    killed(*TINY, "out=cut", "norm=mbn_random", at=at)
    capsys.readouterr()
    resumed = train(*TINY, "out=cut", "norm=mbn_random")
    assert f"goes on from step {at}/{STEPS}" in capsys.readouterr().out
    assert_same(whole, resumed)
    row = read_json(resumed.session_folder(resumed.sessions[0]) / "session.json")["row"]
    assert row["epochs_timed"] == (3 if at % 4 == 0 else 2)  # an interrupted epoch has no time


def test_what_is_done_interrupted_and_to_run_is_said_first(
    train: Trainer, killed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*TINY)
    killed(*TINY, "session=0,1,2", at=9)
    capsys.readouterr()
    train(*TINY, "session=0,1,2")
    said = capsys.readouterr().out
    assert said.startswith("adhoc: 1 arm, 3 sessions: 1 of 3 done, 1 interrupted at epoch 2, 1 to run\n")
    assert "s1: goes on from step 8/12" in said


def test_a_failed_session_is_run_again_only_on_request(
    train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("normbench.session.train", broken)
        train(*TINY, fails=1)
    capsys.readouterr()
    plan = train(*TINY, fails=1)
    said = capsys.readouterr()
    assert "0 of 1 done, 1 failed before (retry_failed=true runs them again), 0 to run" in said.out
    assert "1 of 1 sessions failed" in said.err and "out of memory" in said.err
    again = train(*TINY, "retry_failed=true")
    assert again.session_folder(again.sessions[0]) == plan.session_folder(plan.sessions[0])
    assert "0 of 1 done, 1 to run" in capsys.readouterr().out and plan.finished(plan.sessions[0])
    assert not (plan.session_folder(plan.sessions[0]) / "failure.json").is_file()


def test_a_finished_session_keeps_its_checkpoint_only_on_request(train: Trainer) -> None:
    for keep in (False, True):
        plan = train(*TINY, f"checkpoint.keep={str(keep).lower()}", f"out=keep_{keep}")
        assert (plan.session_folder(plan.sessions[0]) / checkpoint.NEWEST).is_file() is keep


@pytest.mark.parametrize(
    "damage", ["flip", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "empty", "foreign"))]
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_serves(
    train: Trainer, killed: Any, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(*TINY, "out=whole")
    killed(*TINY, "out=cut", at=10)
    newest = next(Path("cut").rglob(checkpoint.NEWEST))
    content = newest.read_bytes()
    middle = len(content) // 2
    newest.write_bytes({
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:middle], "empty": b"", "foreign": b"PK" + content,
    }[damage])  # fmt: skip
    capsys.readouterr()
    resumed = train(*TINY, "out=cut")
    said = capsys.readouterr()
    assert f"{checkpoint.NEWEST} is passed over: it is " in said.err
    assert "goes on from step 4/12" in said.out
    assert_same(whole, resumed)


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_session_starts_again(train: Trainer, killed: Any) -> None:
    whole = train(*TINY, "out=whole")
    killed(*TINY, "out=cut", at=10)
    for file in Path("cut").rglob("checkpoint*.pt"):
        file.write_bytes(b"")
    assert_same(whole, train(*TINY, "out=cut"))


@pytest.mark.slow
def test_a_checkpoint_of_other_code_is_said_and_the_session_starts_again(
    train: Trainer, killed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(*TINY, "out=whole")
    killed(*TINY, "out=cut", at=10)
    folder = next(Path("cut").rglob(checkpoint.NEWEST)).parent
    body = dict(checkpoint.read(folder / checkpoint.NEWEST))
    body["model"] = {name: tensor for name, tensor in body["model"].items() if name != "fc.weight"}
    checkpoint.write(folder, body)
    (folder / ".checkpoint-coming").write_bytes(b"half")
    capsys.readouterr()
    resumed = train(*TINY, "out=cut")
    assert "its checkpoint does not fit (KeyError: 'fc.weight'); starts again" in capsys.readouterr().err
    assert_same(whole, resumed)
    assert not [path.name for path in folder.iterdir() if "checkpoint" in path.name]


def test_truncated_anywhere_it_is_damaged_and_never_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, {"epoch": 1, "step": 3, "model": {"w": torch.arange(5.0)}})
    content = (tmp_path / checkpoint.NEWEST).read_bytes()
    for length in [0, 1, len(checkpoint.FORMAT), len(checkpoint.FORMAT) + 30, *range(100, len(content), 97)]:
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(checkpoint.Damaged, match="it is "):
            checkpoint.read(tmp_path / "cut.pt")


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(
    train: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(*TINY, "out=whole")

    def full(folder: Path, body: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    full_disk = train(*TINY, "out=full")
    assert "No space left on device; training goes on" in capsys.readouterr().err
    assert_same(whole, full_disk)


KILL = """
import os, signal, sys
from normbench import cli, training
real, left = training.train_step, [int(sys.argv.pop(1))]
def step(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
training.train_step = step
cli.run("train")
"""


@pytest.mark.slow
def test_sigkill_at_any_step_leaves_a_session_that_ends_the_same(train: Trainer) -> None:
    whole = train(*TINY, "out=whole")
    for at in (9, 10, 6):  # of these the first 4 are no steps of the session
        command = [sys.executable, "-c", KILL, str(at), *TINY, "out=cut"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert_same(whole, train(*TINY, "out=cut"))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("checkpoint.every=0", "checkpoint.every must be a count ≥ 1 of epochs or minutes"),
        ("checkpoint.every=5steps", "checkpoint.every must be a count ≥ 1 of epochs or minutes"),
        ("checkpoint.keep=yes", "checkpoint.keep must be true or false"),
        ("checkpoint.evry=1epoch", "did you mean 'checkpoint.every'"),
    ],
)
def test_slips_in_checkpoint_keys(refusal: Any, key: str, line: str) -> None:
    assert line in refusal(key)
