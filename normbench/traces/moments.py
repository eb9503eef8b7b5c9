"""The batch mean and variance that a layer measured, found among what its operators returned.

    with Moments() as seen:
        seen.enter(x)
        layer(x)
        seen.leave()
    seen.mean, seen.var        (C,) each, var ÷n; None where the layer measured no such thing, or several

A fused operator returns its moments. Of plain tensor operations each result is labelled by what it is of the
layer's input: a sample of it, centred, squared, a sum over every axis but the channels. A layer whose moments
are made another way (per group, per device, across processes) has no value here rather than a wrong one.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# operators whose result is the argument itself, or a part of it, with the axes in their order
PARTS = ("slice", "_to_copy", "clone", "detach", "alias", "index_select", "index", "expand")
SPLITS = ("split", "split_with_sizes", "tensor_split", "chunk", "unsafe_split")
VIEWS = ("view", "_unsafe_view", "unsqueeze", "squeeze", "reshape")
FUSED = ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
         "_batch_norm_with_update")  # fmt: skip
Key = tuple[int, torch.Size, tuple[int, ...]]


class Label(NamedTuple):
    """What a tensor is of the layer's input: `sample`, `centred`, `deviations` (its squares), `squares` (of
    the sample) with the channels on `axis`; or the vector of each, `mean`, `mean²`, `second`, `sum of …`
    over `n` values."""

    what: str
    axis: int = 0
    n: int = 0


class Moments(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one layer at a time; changes no result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels: dict[Key | None, Label] = {}
        self.means: list[Tensor] = []
        self.vars: list[Tensor] = []
        self.channels = 0

    def enter(self, x: Tensor) -> None:
        """A layer begins to work on x, (N, C, *)."""
        self.means, self.vars, self.channels = [], [], x.shape[1] if x.ndim > 1 else 0
        self.labels = {key_of(x): Label("sample", 1)}

    def leave(self) -> None:
        """It has ended; what it measured stays until the next begins."""
        self.labels = {}

    @property
    def mean(self) -> Tensor | None:
        """The batch mean (C,), where there is one."""
        return self.means[0] if len(self.means) == 1 else None

    @property
    def var(self) -> Tensor | None:
        """The batch variance (C,), ÷n, where there is one."""
        return self.vars[0] if len(self.vars) == 1 else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        of = [self.labels.get(key_of(a)) for a in args]
        result = func(*args, **kwargs)
        if self.labels:
            label = None
            if any(of):
                # a stranger's operators may take anything, and a trace must not end a session
                with contextlib.suppress(IndexError, TypeError, ValueError, AttributeError, RuntimeError):
                    label = self.meaning(func, args, kwargs, of, result)
            for part in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(part, Tensor):
                    # memory that was freed comes again: what it held before must be forgotten
                    self.labels.pop(key_of(part), None)
                    if label is not None and part.numel():
                        self.labels[key_of(part)] = label
        return result

    def meaning(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], of: list[Label | None], result: Any
    ) -> Label | None:
        """What the result is; notes moments."""
        family, _, name = str(func.overloadpacket).rpartition(".")
        first, second = of[0], of[1] if len(of) > 1 else None
        if family == "normbench":
            if name == "batch_norm" and first and first.what == "sample":
                self.note(result[1], result[2])
            return None
        if first is None:
            return None
        if name in FUSED:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
            measured = given.get("training", True) and first == Label("sample", 1)
            if measured and result[1].numel() == self.channels:
                eps = given.get("eps", given.get("epsilon"))
                self.note(result[1], (result[2].float().square().reciprocal() - eps).clamp_min(0))
            return None
        if name in (*PARTS, *SPLITS, *VIEWS, "permute", "transpose", "t"):
            parts = result if isinstance(result, (tuple, list)) else [result]
            return first if first.what in VECTORS else self.moved(first, name, args, parts[0])
        if name in REDUCTIONS and first.what in SUMMED:
            return self.reduced(first, name, args, kwargs, result)
        if name in ("sub", "sub_") and kwargs.get("alpha", 1) == 1 and second:
            if (first.what, second.what) == ("sample", "mean"):
                return first._replace(what="centred")
            if (first.what, second.what) == ("second", "mean²"):
                self.note(None, result)
        squared = (name == "pow" and args[1] == 2) or (name == "mul" and key_of(args[0]) == key_of(args[1]))
        if squared and first.what in SQUARED:
            return first._replace(what=SQUARED[first.what])
        if name == "div" and first.what.startswith("sum of ") and args[1] == first.n:
            return self.averaged(first.what.removeprefix("sum of "), first.n, result)
        return None

    def moved(self, label: Label, name: str, args: tuple[Any, ...], part: Tensor) -> Label | None:
        """The label of a part or view, with the axis that its channels lie on now; None if they are cut."""
        x, axis = args[0], label.axis
        if name in ("permute", "transpose", "t"):
            order = list(range(x.ndim))
            if name == "permute":
                order = [axis % x.ndim for axis in args[1]]
            else:
                a, b = (args[1], args[2]) if name == "transpose" else (0, 1)
                order[a], order[b] = order[b], order[a]
            axis = order.index(axis)
        elif name in VIEWS:
            before = math.prod(x.shape[:axis])
            fits = [i for i, n in enumerate(part.shape) if n == self.channels
                    and math.prod(part.shape[:i]) == before]  # fmt: skip
            if not fits:
                return None
            axis = fits[-1]
        same = axis < part.ndim and part.shape[axis] == self.channels
        return label._replace(axis=axis) if same else None

    def reduced(
        self, label: Label, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Label | None:
        """What a mean, sum or variance is; None where it is not over all axes but the channels'."""
        x, axes = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
        over = {axis % x.ndim for axis in ([axes] if isinstance(axes, int) else axes or [])}
        if over != set(range(x.ndim)) - {label.axis}:
            return None
        count = x.numel() // x.shape[label.axis]
        if name == "sum":
            return Label(f"sum of {label.what}", 0, count)
        if name == "mean":
            return self.averaged(label.what, count, result)
        if label.what not in ("sample", "centred"):
            return None
        correction = kwargs.get("correction", args[2] if len(args) > 2 else None)
        correction = 1 if correction is None else correction
        spread = result[0] if isinstance(result, tuple) else result
        biased = (spread.square() if name.startswith("std") else spread) * ((count - correction) / count)
        self.note(result[1] if isinstance(result, tuple) and label.what == "sample" else None, biased)
        return None if isinstance(result, tuple) or label.what != "sample" else Label("variance")

    def averaged(self, what: str, count: int, result: Tensor) -> Label:
        """A mean over all axes but the channels': of the sample, of squares, of squared deviations."""
        if what == "sample":
            self.note(result, None)
        elif what == "deviations":
            self.note(None, result)
        return Label({"sample": "mean", "squares": "second"}.get(what, what), 0, count)

    def note(self, mean: Tensor | None, var: Tensor | None) -> None:
        """Keep moments that were found."""
        if mean is not None:
            self.means.append(mean.detach().reshape(-1))
        if var is not None:
            self.vars.append(var.detach().reshape(-1))


SUMMED = ("sample", "centred", "deviations", "squares")
VECTORS = ("mean", "mean²", "second", *(f"sum of {what}" for what in SUMMED))
SQUARED = {"sample": "squares", "centred": "deviations", "mean": "mean²"}
REDUCTIONS = ("mean", "sum", "var", "var_mean", "std", "std_mean")


def key_of(tensor: Any) -> Key | None:
    """Which values a tensor shows: autograd wraps views anew, so the object itself does not say."""
    if not isinstance(tensor, Tensor):
        return None
    try:
        return tensor.data_ptr(), tensor.shape, tensor.stride()
    except RuntimeError:  # a stranger's kind of tensor, without memory of its own
        return id(tensor), tensor.shape, ()
