"""Features and logits of an evaluation that runs anyway: quantiles of a layer's output over a whole part.

A feature watch is asked twice:

    with watch.over(models):        hooks on the chosen modules of each seat's model
        evaluate(…)
    watch.found(seat)               off the clock: quantiles of every layer, the logits' peaks
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normbench import ranks
from normbench.traces.choosing import HEAD_INPUT, feature_names, head_of

QUANTILES = (0.01, 0.2, 0.8, 0.99)
MOST_VALUES = 2**18  # of a layer in an evaluation: of a larger output an even sample, whose 1 % is ±0.02 %
Values = NDArray[np.float32]


@dataclass
class Seen:
    """What was kept of one layer's output, and how many values it had in all."""

    parts: list[Tensor] = field(default_factory=list)
    out_of: int = 0

    def add(self, output: Tensor, most: int) -> None:
        """Keep about `most` values, at even distances in memory that fall on every channel and position."""
        flat = flat_view(output.detach())
        self.out_of += flat.numel()
        step = math.ceil(flat.numel() / max(1, most))
        while step > 1 and math.gcd(step, flat.numel() // len(output)) > 1:
            step += 1
        self.parts.append(flat[::step].clone())  # what follows may write into the output

    def values(self) -> Values:
        """All that was kept, in float32 on the CPU."""
        if not self.parts:
            return np.empty(0, np.float32)
        joined: Values = torch.cat([part.float() for part in self.parts]).cpu().numpy()
        return joined


@dataclass
class Found:
    """One layer of one evaluation: quantiles of `values` (n,), a sample of `out_of`; n = 0: it never ran."""

    layer: str
    values: Values
    out_of: int

    @property
    def quantiles(self) -> list[float]:
        """At QUANTILES, interpolated between neighbours."""
        return quantiles_of(self.values)


class FeatureWatch:
    """Watches evaluations of a setting's models.

    Args:
        one: a model of one session.
        options: `traces`.
        hooked: whether the models run as they are; of a compiled one only the logits are seen.
        images: in the part that is watched, to know how far to thin its features.
    """

    def __init__(self, one: nn.Module, options: Mapping[str, Any], *, hooked: bool, images: int) -> None:
        self.names = feature_names(one, options) if hooked else []
        self.images = images
        self.layers: dict[int, dict[str, Seen]] = {}
        self.peaks: dict[int, list[Tensor]] = {}

    @contextlib.contextmanager
    def over(self, models: Mapping[int, nn.Module]) -> Iterator[None]:
        """Around an evaluation of each seat's model."""
        self.layers = {seat: {name: Seen() for name in self.names} for seat in models}
        self.peaks = {seat: [] for seat in models}
        handles = [handle for seat, model in models.items() for handle in self.hook(seat, model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hook(self, seat: int, model: nn.Module) -> list[RemovableHandle]:
        """Have the chosen modules hand on their output here too."""
        handles = []
        for name, seen in self.layers[seat].items():
            if name == HEAD_INPUT:
                head = head_of(model)
                if head is not None:
                    handles.append(head.register_forward_pre_hook(self.keep_input(seen)))
            else:
                handles.append(model.get_submodule(name).register_forward_hook(self.keep_output(seen)))
        return handles

    def keep_input(self, seen: Seen) -> Any:
        return lambda module, args: self.keep(seen, args[0])

    def keep_output(self, seen: Seen) -> Any:
        return lambda module, args, output: self.keep(seen, output)

    def keep(self, seen: Seen, tensor: Any) -> None:
        """A batch's values; what is no tensor of numbers is passed over."""
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() and tensor.ndim:
            seen.add(tensor, MOST_VALUES * len(tensor) // max(1, self.images))

    def logits(self, seat: int, logits: Tensor) -> None:
        """A batch's (N, classes)."""
        self.peaks[seat].append(logits.detach().amax(1))

    def found(self, seat: int) -> tuple[list[Found], Values]:
        """Every layer, and each image's largest logit (n,), of all ranks' batches; all ranks ask together."""
        own = self.layers.pop(seat)
        seen = [(name, kept.values(), kept.out_of) for name, kept in own.items()]
        peaks = Seen(self.peaks.pop(seat)).values()
        everywhere = ranks.gathered((seen, peaks))
        layers = []
        for at, name in enumerate(own):
            each = [theirs[at] for theirs, _ in everywhere]
            values = np.concatenate([values for _, values, _ in each])
            layers.append(Found(name, values, sum(out_of for _, _, out_of in each)))
        return layers, np.concatenate([theirs for _, theirs in everywhere])


def flat_view(x: Tensor) -> Tensor:
    """All values in a row, in memory's order where that takes no copy."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    kept = last is not None and x.is_contiguous(memory_format=last)
    return (x.movedim(1, -1) if kept else x).reshape(-1)


def quantiles_of(values: Values, at: Sequence[float] = QUANTILES) -> list[float]:
    """Of values (n,); NaN without any, or with one that is NaN."""
    if not values.size:
        return [math.nan] * len(at)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return [float(q) for q in np.quantile(values, at)]
