"""A throw-away Slurm cluster on this machine: two nodes of two cores and two pretended GPUs each.

    with running() as cluster:
        cluster.run("squeue")

    python tests/slurm_cluster.py        the same to play with, until Ctrl-C

Needs Debian's slurmctld, slurmd, slurm-client and munge; no root, systemd, cgroups, database or /etc/slurm.
All state lies in a folder of its own, ports are free, every daemon dies with the process that started it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
NODES = ("n1", "n2")
PATH = f"{os.environ['PATH']}:/usr/sbin"  # Debian keeps daemons there
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")

# cred_expire: how long a requeued job is held back; 5 s is the least, 120 s the default.
# MinJobAge: ended jobs stay visible to scontrol.  The user's signal is sent before a preemption too.
CONFIG = """
ClusterName=normbench
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
KillWait=10
ReturnToService=2
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=low  Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1  GraceTime=20
PartitionName=high Nodes=n1,n2             MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# Any character device serves as a GPU: it is never opened and only sets CUDA_VISIBLE_DEVICES.
GPUS = "".join(
    f"NodeName={node} Name=gpu File={file} Flags=nvidia_gpu_env\n"
    for node in NODES
    for file in ("/dev/null", "/dev/zero")
)


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


@dataclass
class Cluster:
    """The daemons and how to talk to them; `environment` is what clients need."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """Up when both nodes are idle."""
        folder = self.folder
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o400)
        os.chmod(key, 0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host, user = socket.gethostname().partition(".")[0], getuser()
        text = CONFIG.format(host=host, user=user, folder=folder, ports=free_ports(4))
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(GPUS)
        self.daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
                    f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                    f"--seed-file={folder}/munged.seed")  # fmt: skip
        self.until("munged listens", lambda: (folder / "munge.sock").exists())
        self.daemon("slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node, "-f", f"{folder}/slurm.conf")
        self.until(
            "both nodes are idle", lambda: self.ask("sinfo", "-hNp", "low", "-o", "%T").count("idle") == 2
        )

    def daemon(self, *command: str) -> None:
        """In the foreground, ended when this process ends, however that is."""
        words = ["setpriv", "--pdeathsig", "TERM", *command]
        with (self.folder / f"{len(self.daemons)}-{command[0]}.log").open("wb") as log:
            self.daemons.append(
                subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def run(self, *command: str) -> str:
        """What a client's command prints; CalledProcessError where it fails."""
        done = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True)
        return done.stdout

    def ask(self, *command: str) -> str:
        """What it prints, nothing where it fails."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return self.run(*command)
        return ""

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, …; nothing for a job it does not know."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def ended(self, job: str) -> bool:
        """Whether a job is over and will not be started again."""
        return self.job(job).get("JobState") in ENDED

    def until(self, what: str, true: Callable[[], object], within_s: float = 90) -> None:
        """Wait; AssertionError with the cluster's own words where it takes too long."""
        end = time.monotonic() + within_s
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"{f.name}:\n{f.read_text()[-2000:]}" for f in sorted(self.folder.glob("*.log"))
                )
                raise AssertionError(
                    f"waited {within_s} s in vain until {what}\n{self.ask('squeue')}\n{logs}"
                )
            time.sleep(0.1)

    def cancel_all(self) -> None:
        """No job is left."""
        self.ask("scancel", "--signal=KILL", "--me")
        self.ask("scancel", "--me")
        self.until("every job is gone", lambda: not self.ask("squeue", "-h"))

    def stop(self) -> None:
        """Down again; nothing is left running."""
        try:
            self.cancel_all()
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
            for daemon in self.daemons:
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster that is up, and down again at the end."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name:  # sockets want a short path
        os.chmod(name, 0o755)
        cluster = Cluster(Path(name))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


if __name__ == "__main__":
    with running() as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf", flush=True)
        signal.pause()
