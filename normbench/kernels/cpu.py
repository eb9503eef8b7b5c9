"""The CPU's kernels: `batch_norm.cpp`, compiled when first needed by torch's own loader, and kept.

The file includes nothing of torch, so it compiles in seconds and one build serves every torch. A build is
made for what this processor can do and its name says so: a home directory shared by different machines
holds one build for each kind.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("batch_norm.cpp")
FLAGS = ["-O3", "-fopenmp"]
FLAGS_OF = {  # by torch.backends.cpu.get_cpu_capability(), all that the flags ask for is in it
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}


def missing() -> str | None:
    """Why there are no CPU kernels, or None."""
    found = _load()
    return found if isinstance(found, str) else None


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none; then one warning."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*FLAGS, *FLAGS_OF.get(capability, [])]
    try:
        return ctypes.CDLL(str(_built(flags, f"{platform.machine()}-{capability}".lower())))
    except (OSError, RuntimeError, ImportError) as error:  # no compiler, no ninja, no place to write
        lines = str(error).strip().splitlines() or [type(error).__name__]  # a builder's begin with commands
        reason = next((line for line in lines if "error:" in line or "not found" in line), lines[0])
        warnings.warn(
            f"the CPU kernels of impl=fused cannot be compiled ({reason}); impl=auto takes the readable path",
            stacklevel=2,
        )
        return f"the CPU kernels cannot be compiled: {reason}"


def _built(flags: list[str], kind: str) -> Path:
    """The library's file, built where it is not there; two processes that build at once agree."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:10]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions"
    kept = Path(root) / "normbench" / f"batch_norm-{kind}-{digest}.so"
    if kept.exists():
        return kept
    logging.getLogger("torch.utils.cpp_extension").setLevel(
        logging.ERROR
    )  # it misses a CUDA that nobody needs
    from torch.utils import cpp_extension

    # torch's loader waits for ever on the lock of a builder that was killed: every build has its own folder
    kept.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=kept.parent))
    scripts = str(Path(sys.executable).parent)  # where pip puts ninja
    path = os.environ.get("PATH", "")
    try:
        os.environ["PATH"] = f"{path}{os.pathsep}{scripts}"
        cpp_extension.load(
            "batch_norm",
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
        (folder / "batch_norm.so").replace(kept)
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder, ignore_errors=True)
    return kept


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    steps: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var of a dense x; without `steps` mean and var are given and stay."""
    kind = _kind(x)
    y = torch.empty_like(x)
    mean = x.new_empty(x.shape[1], dtype=kind) if mean is None else _values(mean, kind)
    var = torch.empty_like(mean) if var is None else _values(var, kind)
    tensors = (x, y, _values(weight, kind), _values(bias, kind), mean, var)
    _call("forward", x, tensors, steps, (), eps, relu)
    return y, mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    steps: Sequence[int],
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, for dy as dense as x."""
    kind = _kind(x)
    dx, dweight = torch.empty_like(x), x.new_empty(x.shape[1], dtype=kind)
    dbias = torch.empty_like(dweight)
    given = [_values(values, kind) for values in (weight, bias, mean, var)]
    tensors = (dy, x, dx, *given, dweight, dbias)
    _call("backward", x, tensors, steps, (_sampled(x.shape, steps),), eps, relu)
    return dx, dweight, dbias


def _call(
    name: str,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    steps: Sequence[int],
    numbers: tuple[float, ...],
    eps: float,
    relu: bool,
) -> None:
    from normbench.kernels import channels_last

    _function(name, x.dtype)(
        *(None if t is None else t.data_ptr() for t in tensors),
        _shape(x.shape, tuple(steps)),
        *numbers,
        channels_last(x) or x[0, 0].numel() == 1,
        relu,
        eps,
        torch.get_num_threads(),
    )


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    """A kernel, told what it takes.

    Raises: RuntimeError — they cannot be compiled here.
    """
    kernels = _load()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    found = getattr(kernels, f"{name}_{str(dtype).removeprefix('torch.')}")
    tensors, numbers = (6, []) if name == "forward" else (9, [ctypes.c_double])
    end = [ctypes.c_bool, ctypes.c_bool, ctypes.c_double, ctypes.c_int]
    found.argtypes = [*[ctypes.c_void_p] * tensors, ctypes.POINTER(ctypes.c_int64), *numbers, *end]
    found.restype = None
    return found


@functools.lru_cache(256)
def _shape(shape: torch.Size, steps: tuple[int, ...]) -> Any:
    """N, C, D, H, W and the steps of N, D, H, W; 0 of N where nothing is measured."""
    gap = (1,) * (5 - len(shape))
    every = (steps[0], *gap, *steps[1:]) if steps else (0, 1, 1, 1)
    return (ctypes.c_int64 * 9)(*shape[:2], *gap, *shape[2:], *every)


def _kind(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _values(values: Tensor | None, kind: torch.dtype) -> Any:
    return None if values is None else values.to(kind).contiguous()


def _sampled(shape: torch.Size, steps: Sequence[int]) -> float:
    """How many values of a channel are measured."""
    sizes = (shape[0], *shape[2:])
    return float(
        math.prod(-(-size // step) for size, step in zip(sizes, steps or (1,) * len(sizes), strict=True))
    )
