"""A real Slurm cluster: an array over two nodes, and jobs that are disturbed in every way Slurm knows."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
import slurm_cluster
from conftest import Trainer
from rows import assert_same_sessions
from slurm_cluster import Cluster
from test_data import folders

from normbench import claim
from normbench.plan import Plan

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
HERE = Path(__file__).parent
TINY = ["dataset.train_subset=96", "dataset.test_subset=64", "batch.size=24", "model.width=4", "threads=1",
        "device=cpu", "checkpoint.every=1epoch"]  # fmt: skip
SLOW = [*TINY, "norm=custom", "norm._target_=slow_layers.Slow", "epochs=24"]  # over a minute while it is slow
STREAMED = ["dataset=imagenet", "data_dir=pictures", "dataset.num_classes=3", "dataset.train_size=24",
            "dataset.test_size=6", "dataset.shape=[3,32,32]", "dataset.workers=2", "batch.size=6",
            *(word for word in SLOW if not word.startswith(("dataset.", "batch.")))]  # fmt: skip
JOB = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if lacking := slurm_cluster.missing():
        said = f"there is no {', '.join(lacking)} here: apt-get install slurmctld slurmd slurm-client munge"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    with slurm_cluster.running() as running:
        yield running


class Command:
    """`python -m normbench.train` in the test's folder, as a client of the cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.slow = Path("slow").resolve()
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", str(HERE.parent))])
        self.environment = {**cluster.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
                            "SLOW_WHILE": str(self.slow)}  # fmt: skip

    def start(self, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "normbench.train", *JOB, *words]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *words: str, fails: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that ends with this code."""
        process = self.start(*words)
        said = process.communicate(timeout=180)
        assert process.returncode == fails, said
        return said

    def submit(self, *words: str) -> str:
        """The job's number, without waiting."""
        out, _ = self.run("hydra.launcher.wait=false", *words)
        found = re.search(r"submitted to Slurm: (\d+), ", out)
        assert found is not None, out
        return found[1]

    def submit_slow(self, words: Sequence[str] = SLOW) -> str:
        """The number of a job that has written a checkpoint and will not be done soon."""
        self.slow.touch()
        job = self.submit(*words)
        self.cluster.until(
            "the job has a checkpoint", lambda: list(Path().glob("outputs/*/*/s0/checkpoint.pt"))
        )
        return job

    def finish(self, job: str) -> dict[str, str]:
        """Let a job be fast from now on; what Slurm says of it at its end."""
        self.slow.unlink()
        self.cluster.until("the job ends", lambda: self.cluster.ended(job), within_s=150)
        return self.cluster.job(job)


@pytest.fixture
def command(cluster: Cluster) -> Iterator[Command]:
    yield Command(cluster)
    cluster.cancel_all()


def newest(folder: str = "outputs/adhoc") -> Plan:
    plan = Plan.newest(Path(folder))
    assert plan is not None
    return plan


def log(job: str) -> str:
    return "".join(path.read_text() for path in sorted(Path("outputs/adhoc/slurm").glob(f"{job}_*_log.*")))


def test_an_array_over_two_nodes_pins_its_gpus_and_trains_as_this_process_does(
    command: Command, train: Trainer
) -> None:
    words = ["norm=obn,mbn", "session=range(6)", "epochs=2", *TINY]
    out, err = command.run(*words, "hydra.launcher.sessions_per_job=2", "hydra.launcher.array_parallelism=4")
    assert "a job array of 6 jobs" in out and "6 of 6 jobs have ended" in out and err == ""
    plan = newest()
    assert len(plan.sessions) == 12
    train(*words, "out=whole")
    assert_same_sessions(Path("outputs"), Path("whole"))
    assert list(pd.read_csv("outputs/adhoc/results.csv")["status"]) == ["ok"] * 12
    said = [path.read_text() for path in Path("outputs/adhoc/slurm").glob("*_log.out")]
    places = [re.search(r"on (n\d), CUDA_VISIBLE_DEVICES=(\d),", text) for text in said]
    assert len(places) == 6
    assert {place.groups() for place in places if place} == {(n, gpu) for n in ("n1", "n2") for gpu in "01"}
    assert all(len(re.findall(r"s(\d): ok", text)) == 2 for text in said)
    assert all(len(set(re.findall(r"s(\d): ok", text))) == 1 for text in said)  # both arms of a repetition
    assert "12 of 12 done, 0 to run" in command.run(*words)[0]


def test_a_requeued_job_goes_on_from_its_checkpoint(command: Command, train: Trainer) -> None:
    """Slurm signals every process of a job; those that read pictures for the training one pass it over."""
    folders(Path("pictures/imagenet"), per_class=(8, 2))
    job = command.submit_slow(STREAMED)
    command.cluster.run("scontrol", "requeue", job)
    ended = command.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log(job)
    assert "SIGTERM: stops after this step" in log(job) and "goes on from step" in log(job)
    assert log(job).count("stops after this step") == 1 and "Error" not in log(job)
    train(*STREAMED, "out=whole")
    assert_same_sessions(Path("outputs"), Path("whole"))


def test_a_preempted_job_makes_way_and_goes_on(command: Command, train: Trainer) -> None:
    job = command.submit_slow()
    high = command.cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                               "--output=/dev/null", "--wrap=true").strip()  # fmt: skip
    command.cluster.until("the other job has run", lambda: command.cluster.ended(high))
    ended = command.finish(job)
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, log(job)
    assert "SIGUSR2: stops after this step" in log(job) and "goes on from step" in log(job)
    train(*SLOW, "out=whole")
    assert_same_sessions(Path("outputs"), Path("whole"))


def test_a_job_that_reaches_its_time_limit_goes_on_in_the_next(command: Command, train: Trainer) -> None:
    command.slow.touch()
    job = command.submit(*SLOW, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=15")
    command.cluster.until("it is requeued", lambda: command.cluster.job(job).get("Restarts") == "1")
    ended = command.finish(job)
    assert ended["JobState"] == "COMPLETED", log(job)
    assert "SIGUSR2: stops after this step" in log(job) and "goes on from step" in log(job)
    train(*SLOW, "out=whole")
    assert_same_sessions(Path("outputs"), Path("whole"))


def test_a_job_killed_outright_is_noticed_and_the_same_command_goes_on(
    command: Command, train: Trainer
) -> None:
    command.slow.touch()
    client = command.start(*SLOW)
    command.cluster.until(
        "the job has a checkpoint", lambda: list(Path().glob("outputs/*/*/s0/checkpoint.pt"))
    )
    plan = newest()
    held = claim.holder(plan.session_folder(plan.sessions[0]))
    assert held is not None and held.job is not None
    os.kill(held.pid, signal.SIGKILL)
    out, err = client.communicate(timeout=60)
    assert client.returncode == 1 and "1 of 1 sessions not ended" in err, out + err
    assert "s0: its job was killed or cancelled; its checkpoint is of epoch" in err
    assert list(pd.read_csv("outputs/adhoc/results.csv")["status"]) == ["interrupted"]
    command.slow.unlink()
    out, _ = command.run(*SLOW)
    assert "1 interrupted at epoch" in out
    train(*SLOW, "out=whole")
    assert_same_sessions(Path("outputs"), Path("whole"))


EARLY = """
import os, signal
if "SLURM_PROCID" in os.environ and os.path.exists("early"):
    os.unlink("early")
    os.kill(os.getpid(), signal.SIGUSR2)
"""


def test_a_job_that_is_warned_before_it_listens_is_requeued_too(command: Command) -> None:
    Path("sitecustomize.py").write_text(EARLY)
    Path("early").touch()
    command.environment["PYTHONPATH"] += f"{os.pathsep}{Path.cwd()}"
    command.run(*TINY, "epochs=1")
    [said] = Path("outputs/adhoc/slurm").glob("*_log.out")
    job = said.name.partition("_")[0]
    assert command.cluster.job(job)["Restarts"] == "1" and "restart 1" in log(job)
    assert newest().finished(newest().sessions[0])


STRANGERS = """
from torch import nn

class Plain(nn.BatchNorm2d):
    pass

class Failing(nn.BatchNorm2d):
    def forward(self, x):
        if self.training and x.device.type == "cpu":
            raise RuntimeError("no such luck")
        return super().forward(x)
"""


def test_code_edited_after_submission_is_refused_and_slurm_calls_what_failed_failed(command: Command) -> None:
    layers = Path("strangers.py")
    layers.write_text(STRANGERS)
    words = ["epochs=1", "norm=custom", *TINY]
    held = command.submit(*words, "norm._target_=strangers.Plain",
                          "+hydra.launcher.additional_parameters.hold=true")  # fmt: skip
    failing = command.submit(*words, "norm._target_=strangers.Failing", "session=1,2",
                             "hydra.launcher.sessions_per_job=2")  # fmt: skip
    command.cluster.until("the second ends", lambda: command.cluster.ended(failing))
    assert command.cluster.job(failing)["JobState"] == "FAILED"
    assert "2 of 2 sessions failed" in log(failing)
    failures = [json.loads(path.read_text()) for path in Path("outputs").rglob("failure.json")]
    assert [failure["row"]["error"] for failure in failures] == ["RuntimeError: no such luck"] * 2

    layers.write_text(STRANGERS + "\n# edited\n")
    command.cluster.run("scontrol", "release", held)
    command.cluster.until("the first ends", lambda: command.cluster.ended(held))
    assert command.cluster.job(held)["JobState"] == "FAILED"
    assert "the code is not what was submitted" in log(held)
    assert not list(Path("outputs").rglob("session.json"))


def test_fail_fast_cancels_the_jobs_that_wait(command: Command) -> None:
    Path("strangers.py").write_text(STRANGERS)
    words = ["epochs=1", "norm=custom", "norm._target_=strangers.Failing", "session=range(6)", *TINY]
    _, err = command.run(*words, "fail_fast=true", "hydra.launcher.array_parallelism=1", fails=1)
    assert "stopped at the first failure" in err and "5 of 6 sessions not ended" in err
    assert len(list(Path("outputs").rglob("failure.json"))) == 1


def test_what_sbatch_refuses_is_one_line(command: Command) -> None:
    _, err = command.run(*TINY, "hydra.launcher.partition=nowhere", fails=2)
    assert err.count("\n") == 1 and "invalid partition" in err.lower()
