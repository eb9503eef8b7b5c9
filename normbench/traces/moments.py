"""The batch mean and variance that a layer measured, found among what its operators returned.

    seen = Moments()
    seen.enter(x)
    layer(x)
    seen.leave()
    seen.mean, seen.var        (C,) each, var ÷n; None where the layer measured no such thing, or several

A fused operator returns its moments. Of plain tensor operations each result is labelled by what it is of the
layer's input: a sample of it, centred, squared, a sum over every axis but the channels. A layer whose moments
are made another way (per group, per device, across processes) has no value here rather than a wrong one.
"""

import contextlib
import functools
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
TURNS = ("permute", "transpose", "t")
MOVES = frozenset((*PARTS, *SPLITS, *VIEWS, *TURNS))
REDUCTIONS = ("mean", "sum", "var", "var_mean", "std", "std_mean")
FUSED = ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
         "_batch_norm_with_update")  # fmt: skip
# what a tensor may be of the layer's input, see `Label`
SUMMED = ("sample", "centred", "deviations", "squares")
VECTORS = frozenset(("mean", "mean²", "second", *(f"sum of {what}" for what in SUMMED)))
SQUARED = {"sample": "squares", "centred": "deviations", "mean": "mean²"}
Layout = tuple[torch.Size, tuple[int, ...]]


class Label(NamedTuple):
    """What a tensor is of the layer's input: `sample`, `centred`, `deviations` (its squares), `squares` (of
    the sample) with the channels on `axis`; or the vector of each, `mean`, `mean²`, `second`, `sum of …`
    over `n` values."""

    what: str
    axis: int = 0
    n: int = 0


class Moments(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one layer at a time; changes no result."""

    supports_higher_order_operators = True  # torch.cond and its like run as they do unwatched

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels: dict[int, dict[Layout, Label]] = {}  # by address: views of one memory share it
        self.means: list[Tensor] = []
        self.vars: list[Tensor] = []
        self.channels = 0
        self.watching = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A function that a layer compiled runs compiled, unseen: else torch would run it as it is, which
        rounds otherwise."""
        return True

    def enter(self, x: Tensor) -> None:
        """A layer begins to work on x, (N, C, *)."""
        self.means, self.vars, self.channels = [], [], x.shape[1] if x.ndim > 1 else 0
        self.labels = {address(x): {layout(x): Label("sample", 1)}}
        self.__enter__()  # type: ignore[no-untyped-call]
        self.watching = True

    def leave(self) -> None:
        """It has ended; what it measured stays until the next begins."""
        if self.watching:
            self.watching = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
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
        of = [self.label_of(a) if isinstance(a, Tensor) else None for a in args]
        result = func(*args, **kwargs) if kwargs else func(*args)
        label = None
        for each in of:
            if each is not None:
                # a stranger's operators may take anything, and a trace must not end a session
                with contextlib.suppress(IndexError, TypeError, ValueError, AttributeError, RuntimeError):
                    label = self.meaning(func, args, kwargs or {}, of, result)
                break
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.call(part, label)
        return result

    def call(self, tensor: Tensor, label: Label | None) -> None:
        """Label a result. Memory that was freed comes again: what it held before must be forgotten."""
        at = address(tensor)
        if label is not None:
            self.labels.setdefault(at, {})[layout(tensor)] = label
        elif at in self.labels:
            self.labels[at].pop(layout(tensor), None)

    def label_of(self, tensor: Tensor) -> Label | None:
        """What a tensor is of the layer's input, where that is known."""
        views = self.labels.get(address(tensor))
        return views.get(layout(tensor)) if views else None

    def meaning(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], of: list[Label | None], result: Any
    ) -> Label | None:
        """What the result is; notes moments."""
        family, name = name_of(func)
        first, second = of[0], of[1] if len(of) > 1 else None
        if first is None:
            return None
        if family == "normbench":
            if name == "batch_norm" and first.what == "sample":
                self.note(result[1], result[2])
            return None
        if name in FUSED:
            measured = first == Label("sample", 1) and given(func, args, kwargs, "training", True)
            if measured and result[1].numel() == self.channels:
                eps = given(func, args, kwargs, "eps", None) or given(func, args, kwargs, "epsilon", 0.0)
                self.note(result[1], result[2].float().pow(-2).sub_(eps).clamp_min_(0))
            return None
        if name in MOVES:
            if first.what in VECTORS:
                return first
            return self.moved(first, name, args, result[0] if isinstance(result, (tuple, list)) else result)
        if name in REDUCTIONS:
            return self.reduced(first, name, args, kwargs, result) if first.what in SUMMED else None
        if name in ("sub", "sub_") and second and kwargs.get("alpha", 1) == 1:
            if (first.what, second.what) == ("sample", "mean"):
                return Label("centred", first.axis, first.n)
            if (first.what, second.what) == ("second", "mean²"):
                self.note(None, result)
        elif first.what in SQUARED and squares(name, args):
            return Label(SQUARED[first.what], first.axis, first.n)
        elif name == "div" and first.what.startswith("sum of ") and args[1] == first.n:
            return self.averaged(first.what.removeprefix("sum of "), first.n, result)
        return None

    def moved(self, label: Label, name: str, args: tuple[Any, ...], part: Tensor) -> Label | None:
        """The label of a part or view, with the axis that its channels lie on now; None if they are cut."""
        x, axis = args[0], label.axis
        if name in TURNS:
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
        elif (name == "index_select" and args[1] % x.ndim == axis) or (
            name == "index" and len(args[1]) > axis and args[1][axis] is not None
        ):
            return None  # channels in another order
        same = axis < part.ndim and part.shape[axis] == self.channels
        return Label(label.what, axis, label.n) if same else None

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
        """Keep moments that were found, as they are now: the layer may go on to write into them."""
        if mean is not None:
            self.means.append(mean.reshape(-1).clone())
        if var is not None:
            self.vars.append(var.reshape(-1).clone())


@functools.cache
def name_of(func: Any) -> tuple[str, str]:
    """An operator's family and name: `aten`, `mean`."""
    family, _, name = str(func.overloadpacket).rpartition(".")
    return family, name


@functools.cache
def place_of(func: Any, argument: str) -> int | None:
    """Where an operator takes an argument; None where it takes none of that name."""
    names = [each.name for each in func._schema.arguments]
    return names.index(argument) if argument in names else None


def given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], argument: str, missing: Any) -> Any:
    """What an operator got for an argument."""
    place = place_of(func, argument)
    return args[place] if place is not None and place < len(args) else kwargs.get(argument, missing)


def squares(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operator squares its first argument."""
    if name == "pow":
        return isinstance(args[1], (int, float)) and args[1] == 2
    same = name == "mul" and isinstance(args[1], Tensor)
    return same and address(args[0]) == address(args[1]) and layout(args[0]) == layout(args[1])


def address(tensor: Tensor) -> int:
    """Where a tensor's values lie: autograd wraps views anew, so the object itself does not say."""
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a stranger's kind of tensor, without memory of its own
        return id(tensor)


def layout(tensor: Tensor) -> Layout:
    """Which of the values there a tensor shows; a vector's stride, dear to ask for, says nothing more."""
    shape = tensor.shape
    return shape, tensor.stride() if len(shape) > 1 else ()
