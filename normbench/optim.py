"""Optimizers that keep norm parameters apart, and learning-rate schedules as functions of the step."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from normbench.config import Values
from normbench.models.weights import gains_of

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
NOT_OF_TORCH = {"name", "schedule", "weight_decay", "decay_norm", "decay_bias", "label_smoothing"}


def make_optimizer(
    options: Values, model: nn.Module, norm_layers: Iterable[nn.Module]
) -> torch.optim.Optimizer:
    """torch's optimizer over two groups: with weight decay and without.

    Norm parameters are those of the modules that the model's `norm` callable returned, whatever their class;
    they and biases (one-dimensional parameters of other layers, and the gains that `model.weight` adds) are
    decayed only where options say so. One fused operator updates all parameters of a group where the device
    has it; SGD's momentum is there from the start, since that operator takes all buffers of a group or none.
    """
    norm = {id(p) for layer in norm_layers for p in layer.parameters()}
    gains = {id(p) for layer in model.modules() for p in gains_of(layer)}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_weight = parameter.ndim > 1 and id(parameter) not in gains
        wants = options["decay_norm"] if id(parameter) in norm else is_weight or options["decay_bias"]
        (decayed if wants else spared).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options["weight_decay"]},
        {"params": spared, "weight_decay": 0.0},
    ]
    kwargs = {key: value for key, value in options.items() if key not in NOT_OF_TORCH}
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    optimizer: torch.optim.Optimizer = OPTIMIZERS[options["name"]](
        [g for g in groups if g["params"]], fused=can_fuse([*decayed, *spared]) or None, **kwargs
    )
    if options.get("momentum"):
        for parameter in [*decayed, *spared]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch's fused optimizers take all of these: real, on the CPU or CUDA, densely stored."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() and dense(p) for p in parameters)


def dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory in some order of the axes."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


class Schedule:
    """The learning rate (and SGD's momentum) at every step of a run; holds no state, so a resume needs none.

    Args:
        options: `conf/optim/schedule/*.yaml`.
        lr, momentum: their peak values; `momentum` is None for optimizers without one.
        total_steps: of the whole run. `steps_per_epoch` turns milestones into steps. `samples`, `batch_size`:
            of an epoch, for `missized_tail` only.
    """

    def __init__(
        self,
        options: Values,
        *,
        lr: float,
        momentum: float | None,
        total_steps: int,
        steps_per_epoch: int,
        samples: int,
        batch_size: int,
    ) -> None:
        self.options, self.lr, self.momentum = options, lr, momentum
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.cycle_steps = total_steps
        if options.get("missized_tail") and samples % batch_size:
            epochs = math.ceil(total_steps / steps_per_epoch)
            self.cycle_steps = (epochs + 1) * samples // batch_size

    def at(self, step: int) -> tuple[float, float | None]:
        """lr and momentum of the update number `step`, counted from 0."""
        if self.options["name"] == "one_cycle":
            return self.one_cycle(step)
        factor = {"constant": self.constant, "step": self.step_down, "cosine": self.cosine}[
            self.options["name"]
        ]
        return self.lr * factor(step), self.momentum

    def constant(self, step: int) -> float:
        """1 always."""
        return 1.0

    def step_down(self, step: int) -> float:
        """gamma for each milestone epoch that has begun."""
        epoch = step // self.steps_per_epoch
        return math.pow(self.options["gamma"], sum(epoch >= m for m in self.options["milestones"]))

    def cosine(self, step: int) -> float:
        """Linear from 0 over the warm-up, then half a cosine down to `end`."""
        warm = round(self.options["warmup"] * self.total_steps)
        if step < warm:
            return float((step + 1) / warm)
        done = (step - warm) / max(1, self.total_steps - warm)
        end: float = self.options["end"]
        return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

    def one_cycle(self, step: int) -> tuple[float, float | None]:
        """lr × start → lr → lr × start, then towards lr × end, all linear; momentum mirrored."""
        o, mid = self.options, max(1, int(self.options["warmup"] * self.cycle_steps))
        if step < 2 * mid:
            peak = 1 - abs(step - mid) / mid  # 0 at both ends of the cycle, 1 at its middle
            factor = o["start"] + (1 - o["start"]) * peak
        else:
            peak = 0.0
            tail = (step - 2 * mid) / max(1, self.cycle_steps - 2 * mid)
            factor = o["start"] + (o["end"] - o["start"]) * min(1.0, tail)
        if self.momentum is None or o["low_momentum"] is None:
            return self.lr * factor, self.momentum
        return self.lr * factor, self.momentum + (o["low_momentum"] - self.momentum) * peak

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set this step's values in every parameter group; returns the lr."""
        lr, momentum = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if momentum is not None:
                group["momentum"] = momentum
        return lr


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every tensor an optimizer has gathered."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
