"""A torch.profiler trace of one training step of every arm, for Perfetto and for TensorBoard."""

import errno
import gzip
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from normbench.plan import write_whole
from normbench.profile.measuring import Steps


def write_trace(own: Mapping[str, Steps], folder: Path) -> None:
    """`trace.json`, and a copy under `tensorboard/` named as its profiler plugin wants it.

    A step is a span with its arm's name, and in it every norm layer's forward pass one with its own.
    """
    activities = [ProfilerActivity.CPU]
    if any(steps.ready.device.type == "cuda" for steps in own.values()):
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        for name, steps in own.items():
            with spans(steps.layers), span("step", name):
                steps.once()
            profiler.step()
    with tempfile.TemporaryDirectory(prefix=".trace-", dir=folder) as beside:
        exported = Path(beside) / "trace.json"
        profiler.export_chrome_trace(str(exported))
        if not exported.is_file():  # it says nothing of a full disk
            raise OSError(errno.EIO, "the profiler could not write it", str(folder / "trace.json"))
        os.replace(exported, folder / "trace.json")
    worker = f"{socket.gethostname()}_{os.getpid()}"
    copy = folder / "tensorboard" / f"{worker}.{time.time_ns()}.pt.trace.json.gz"
    write_whole(copy, gzip.compress((folder / "trace.json").read_bytes()))


def span(kind: str, name: str) -> Any:
    """A span of the trace; the profiler leaves out one whose name is not all printable ASCII."""
    return record_function(f"{kind}: " + "".join(c if " " <= c <= "~" else "?" for c in name))


@contextmanager
def spans(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Forward passes of these layers as spans of the trace."""
    open_spans: list[Any] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        open_spans.append(span("norm", name))
        open_spans[-1].__enter__()

    def leave(module: nn.Module, args: Any, y: torch.Tensor) -> None:
        open_spans.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(enter, name)).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        yield
