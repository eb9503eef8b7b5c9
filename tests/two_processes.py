"""Runs a function in several processes under torchrun, on the CPU, and brings back what each returned.

    def work(rank: int, size: int) -> Tensor: ...

    first, second = in_each_process(work, 5)   # work(0, 5) and work(1, 5), joined by gloo

`work` stands at the top of a module that can be imported; arguments and answers are what `torch.save` takes.
"""

import faulthandler
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STARTUP_S = 60.0  # beyond the ranks' own limit: three interpreters import torch, torchrun ends them again
OF_A_RANK = {
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}


def in_each_process(
    function: Callable[..., Any], *arguments: Any, processes: int = 2, limit_s: float = 240, join: bool = True
) -> list[Any]:
    """What `function(rank, *arguments)` returned in each process, by rank.

    Args:
        limit_s: seconds after which a rank writes to its stderr where it stands, and dies.
        join: start a gloo process group before the call and end it afterwards.

    Raises: RuntimeError — a rank failed or took too long; shows every rank's stderr. No process is left.
    """
    target = f"{function.__module__}:{function.__qualname__}"
    with tempfile.TemporaryDirectory(prefix="normbench-ranks-") as name:
        folder = Path(name)
        torch.save((limit_s, join, arguments), folder / "arguments.pt")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={processes}", f"--log-dir={folder}", "--redirects=3"]
        ended = run([*command, __file__, name, target], folder / "torchrun.log", limit_s + STARTUP_S)
        answers = [folder / f"{rank}.pt" for rank in range(processes)]
        if ended != "exit code 0" or not all(answer.exists() for answer in answers):
            raise RuntimeError(f"{target} in {processes} processes: {ended}\n{errors(folder)}")
        return [torch.load(answer, weights_only=False) for answer in answers]


def run(command: list[str], log: Path, limit_s: float) -> str:
    """Run torchrun without a network but the loopback; how it ended."""
    environment = {key: value for key, value in os.environ.items() if key not in OF_A_RANK} | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": loopback(),  # else gloo asks a name server who this host is
    }
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        ) as torchrun,
    ):
        try:
            return f"exit code {torchrun.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            return f"no end after {limit_s:g} s"
        finally:
            stop(torchrun)


def stop(torchrun: "subprocess.Popen[bytes]") -> None:
    """End it if it still runs; a SIGTERM it hands on to its ranks, each in a session of its own."""
    if torchrun.poll() is None:
        torchrun.send_signal(signal.SIGTERM)
        try:
            torchrun.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(torchrun.pid, signal.SIGKILL)


def loopback() -> str:
    """The network interface that never leaves this machine: lo, or lo0."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def errors(folder: Path) -> str:
    """The end of each rank's stderr; of torchrun's where no rank came to start."""
    logs = sorted(folder.glob("**/stderr.log"), key=lambda path: int(path.parent.name))
    said = {f"rank {path.parent.name}": path for path in logs} or {"torchrun": folder / "torchrun.log"}
    return "\n".join(f"--- {who}\n{path.read_text()[-6000:]}" for who, path in said.items())


def main(folder: Path, target: str) -> None:
    """One rank: call the function, save its answer."""
    limit_s, join, arguments = torch.load(folder / "arguments.pt", weights_only=False)
    faulthandler.dump_traceback_later(limit_s, exit=True)  # also while it waits for another rank
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    if join:
        dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    if join:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
