"""Slices of a plan as one job array of Slurm, through hydra-submitit-launcher; imported only when asked for.

What submitit leaves open is closed here.

- A warning (USR2: time limit, preemption) waits for the step's boundary; the checkpoint is written before
  submitit requeues the job. TERM (scancel, scontrol requeue, preemption without warning) is obeyed the same
  way and ends the job with 143; submitit would pass it over.
- USR2 before Python listens kills the job's step; its batch script then requeues it.
- A job whose sessions failed is FAILED for Slurm too.
- Waiting asks `squeue` which jobs are left: no accounting database, and a job that died is noticed.
- What a killed job left half written in submitit's folder does not stop the requeued one.
"""

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from submitit.core.utils import FailedJobError, FailedSubmissionError

from normbench import failure
from normbench.claim import Claim
from normbench.config import register_resolvers
from normbench.interrupt import Interrupted
from normbench.plan import Plan
from normbench.values import Refused
from normbench.worker import FailedFast

OURS = ("wait", "sessions_per_job", "max_num_timeout", "setup")
EVERY_S, AT_MOST_EVERY_S = 1.0, 15.0

# Since 22.05 srun binds a task to one core unless it is told; submitit does not tell it.
SETUP = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"'
# A step killed by USR2 (128 + 12) had not begun to listen: nothing is lost, and nobody else would requeue it.
TEARDOWN = [
    "code=$?",
    f'if [ $code = {128 + signal.SIGUSR2} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    "exit $code",
]


class SessionsFailed(Exception):
    """Some sessions of a job failed; their folders say why. Slurm calls the job FAILED."""


class Jobs(SlurmLauncher):  # type: ignore[misc]
    """hydra-submitit-launcher's, with its own way to submit and to wait, and a task that obeys signals."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit a slice a job; wait for all unless `wait` is false."""
        folder = part(job_overrides[0])[0].path.parent.absolute() / "slurm"
        jobs = self.submit(folder, job_overrides, initial_job_idx)
        array = jobs[0].job_id.partition("_")[0]
        of = f"a job array of {len(jobs)} jobs" if len(jobs) > 1 else "1 job"
        print(f"submitted to Slurm: {array}, {of}; logs in {os.path.relpath(folder)}/{array}*.out and .err")
        print(f"look: python -m normbench.status {os.path.relpath(folder.parent)}   stop: scancel {array}")
        if not self.params["wait"]:
            return []
        print("waiting; Ctrl-C ends only the waiting", flush=True)
        wait_for(array, len(jobs))
        for overrides in job_overrides:
            plan, first, last = part(overrides)
            failure.write_killed(plan, first, last, gone, "its job was killed or cancelled")
        return [job_return for job in jobs if (job_return := what_it_left(job)) is not None]

    def submit(
        self, folder: Path, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[submitit.Job[JobReturn]]:
        """The jobs of one array; Refused in sbatch's own words where it takes none."""
        arguments = [
            (list(overrides), "hydra.sweep.dir", i, f"job_id_for_{i}", Singleton.get_state())
            for i, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        named = {key: value for key, value in self.params.items() if key not in OURS}
        shared = set(BaseQueueConf.__dataclass_fields__)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                executor = submitit.AutoExecutor(
                    folder, cluster="slurm", slurm_max_num_timeout=self.params["max_num_timeout"]
                )
                executor.update_parameters(
                    **{key if key in shared else f"slurm_{key}": value for key, value in named.items()},
                    slurm_setup=[SETUP, *(self.params["setup"] or [])],
                    slurm_teardown=TEARDOWN,
                )
                return executor.map_array(self, *zip(*arguments, strict=True))
        except (FailedJobError, FailedSubmissionError, NameError, TypeError, ValueError) as error:
            words = said.getvalue().strip() or str(error).partition("\n")[0]
            raise Refused(f"hydra/launcher=slurm: {words.splitlines()[-1]}") from error

    def __call__(self, *args: Any) -> JobReturn:
        """One job, on its node."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until a session is claimed there is nothing to save
        remove_half_written()
        register_resolvers()
        print(where(), flush=True)
        try:
            returned: JobReturn = super().__call__(*args)
        except Interrupted as stopped:
            requeue = signal.getsignal(stopped.signum)
            if stopped.signum == signal.SIGUSR2 and callable(requeue):
                requeue(stopped.signum, None)  # submitit's: it does not return
            sys.exit(128 + stopped.signum)
        if returned.status is JobStatus.FAILED:
            if isinstance(returned._return_value, FailedFast):
                cancel_others()
            returned.return_value  # noqa: B018  (raises what ended the job)
        check_sessions(args[0])
        return returned


def check_sessions(overrides: Sequence[str]) -> None:
    """SessionsFailed where a session of the slice did."""
    plan, first, last = part(overrides)
    sessions = plan.sessions[first:last]
    failed = [str(plan.session_folder(planned)) for planned in sessions if plan.failure(planned)]
    if failed:
        raise SessionsFailed(f"{len(failed)} of {len(sessions)} sessions failed: {', '.join(failed)}")


def cancel_others() -> None:
    """Stop the array's other jobs; those that run write checkpoints."""
    array, mine = os.environ.get("SLURM_ARRAY_JOB_ID"), submitit.JobEnvironment().job_id
    if array is not None:
        listed = ["squeue", "--noheader", "--array", "--jobs", array, "--format", "%i"]
        others = subprocess.run(listed, capture_output=True, text=True).stdout.split()
        subprocess.run(["scancel", *(job for job in others if job != mine)])


def where() -> str:
    """What this job is, for its log: `Slurm job 7_3 on n1, CUDA_VISIBLE_DEVICES=1, restart 0`."""
    get = os.environ.get
    job = submitit.JobEnvironment().job_id
    devices = f"CUDA_VISIBLE_DEVICES={get('CUDA_VISIBLE_DEVICES', '')}"
    return f"Slurm job {job} on {get('SLURMD_NODENAME')}, {devices}, restart {get('SLURM_RESTART_COUNT', 0)}"


def remove_half_written() -> None:
    """submitit refuses to write where an earlier start of this job was killed while it wrote."""
    paths = submitit.JobEnvironment().paths
    for path in (paths.submitted_pickle, paths.result_pickle):
        path.with_suffix(f"{path.suffix}.save_tmp").unlink(missing_ok=True)


def part(overrides: Sequence[str]) -> tuple[Plan, int, int]:
    """The plan that a slice is of, and its range."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values: dict[str, Any] = {str(override.key_or_group): override.value() for override in parsed}
    return Plan.read(Path(values["plan.file"])), values["plan.first"], values["plan.last"]


def gone(held: Claim) -> bool:
    """Whether the job that has a session is no longer in Slurm's hands; what is no job goes by its heart."""
    return not held.alive if held.job is None else in_queue(held.job[0].partition(".")[0]) == 0


def wait_for(array: str, count: int) -> None:
    """Until Slurm has none of the array's jobs any more; says how many are left whenever that changes."""
    pause, before = EVERY_S, count
    while True:
        left = in_queue(array)
        if left is not None and left < before:
            print(f"{count - left} of {count} jobs have ended", flush=True)
            before, pause = left, EVERY_S
        if left == 0:
            return
        time.sleep(pause)
        pause = min(1.2 * pause, AT_MOST_EVERY_S)


def in_queue(array: str) -> int | None:
    """How many jobs of an array are waiting or running; None where Slurm does not answer."""
    asked = ["squeue", "--noheader", "--array", "--jobs", array, "--format", "%i"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode == 0:
        return len(done.stdout.split())
    return 0 if "Invalid job id" in done.stderr else None


def what_it_left(job: submitit.Job[JobReturn]) -> JobReturn | None:
    """What a job that has ended says by itself; a refusal ends the command, all else is said here.

    None where the sessions' own files say the rest.
    """
    log = os.path.relpath(job.paths.stderr)
    try:
        outcome, said = pickle.loads(job.paths.result_pickle.read_bytes())
    except (OSError, EOFError, pickle.UnpicklingError):
        return None  # killed or cancelled
    if outcome == "success":
        return None
    last = str(said).strip().splitlines()[-1]
    kind, _, line = last.partition(": ")
    ends = {name_of(Refused): Refused(line), name_of(FailedFast): FailedFast()}
    if kind in ends:
        return JobReturn(status=JobStatus.FAILED, _return_value=ends[kind])
    if kind != name_of(SessionsFailed):
        print(f"Slurm job {job.job_id}: {last}; {log}", file=sys.stderr)
    return None


def name_of(error: type[Exception]) -> str:
    """As the last line of a traceback has it."""
    return f"{error.__module__}.{error.__qualname__}"
