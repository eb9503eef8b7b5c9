"""The machine under a session: an allocator that keeps memory, and peak memory that is not fooled by it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Trainer

from normbench.plan import read_json

FAULTS = """
import ctypes, resource, torch
from normbench.device import give_back_memory, tune_allocator

PR_SET_THP_DISABLE = 41  # huge pages would cost a fault for every 512
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

tuned = tune_allocator() and tune_allocator()

def faults(big):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(big).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(4):
    faults(2**23)  # the heap grows to what is needed
print(tuned, faults(2**23) > 10_000)
give_back_memory()
print(faults(2**23) > 5_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("own", [False, True])
def test_memory_stays_in_a_tuned_process_and_a_users_own_wish_wins(own: bool) -> None:
    # 32 MiB are 8192 pages; fetched again at each of four fills, or kept until they are given back
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"MALLOC_ARENA_MAX": "8"} if own else {}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first == ("False True" if own else "True False"), done.stderr
    assert second == "True"


def test_every_session_of_a_process_reports_its_own_peak_memory(train: Trainer) -> None:
    # activations of some 60 MiB; the digits and the interpreter belong to no session
    plan = train("session=0,1,2", "norm=obn", "model.width=32", "batch.size=128", "epochs=1", "threads=1",
                 "dataset.train_subset=256", "dataset.test_subset=64", "tensorboard=false")  # fmt: skip
    folders = [plan.session_folder(planned) for planned in plan.sessions]
    peaks = [float(read_json(Path(f) / "session.json")["row"]["peak_memory_mib"]) for f in folders]
    assert min(peaks) > 10 and max(peaks) < 1.25 * min(peaks), peaks
