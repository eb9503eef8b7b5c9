"""Runs the checks of the contract on one layer and keeps what they found, for people and as data."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from normbench.audit import behaviour, numbers, options, shapes, state
from normbench.audit.cost import cost
from normbench.audit.findings import FAIL, PASS, WARN, Broken, Doubtful, Finding
from normbench.audit.subject import Subject, activations, call, first_line
from normbench.values import Refused

Check = Callable[[Subject], str]
WIDTHS = (12, 16, 64, 60, 48, 256)

CHECKS: dict[str, Check] = {
    "repeatable": behaviour.repeatable,
    "statistics": behaviour.statistics,
    "evaluation": behaviour.evaluation,
    "mode": behaviour.modes,
    "running statistics": behaviour.running_statistics,
    "options": options.options,
    "parameters": state.parameters,
    "building": state.building,
    "graphs": state.graphs,
    "copies": state.copies,
    "formula": numbers.formula,
    "exactness": numbers.exactness,
    "gradients": numbers.gradients,
    "ranks": shapes.ranks,
    "dtypes": shapes.dtypes,
    "half precision": shapes.half_parameters,
    "memory format": shapes.memory_format,
    "small batches": shapes.small_batches,
    "constant channels": shapes.constant_channels,
    "extreme values": shapes.extremes,
    "autocast": numbers.autocast,
}
COLOURS = {PASS: "green", WARN: "yellow", FAIL: "bold red"}


@dataclass(frozen=True)
class Card:
    """One layer's audit."""

    norm: str
    layer: str
    options: dict[str, Any]
    num_features: int
    findings: list[Finding]

    @property
    def failed(self) -> bool:
        """Whether any row failed."""
        return any(finding.status == FAIL for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The rows counted, and what they come to."""
        counts = {status: sum(f.status == status for f in self.findings) for status in (PASS, WARN, FAIL)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{FAIL if self.failed else PASS}: {said}"

    def as_dict(self) -> dict[str, Any]:
        """The card as plain data."""
        return {**asdict(self), "verdict": FAIL if self.failed else PASS, "torch_version": torch.__version__}

    def print(self, console: Console) -> None:
        """The card as a table."""
        table = Table(box=None, show_header=False, padding=(0, 1), expand=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            status = Text(finding.status, style=COLOURS[finding.status])
            table.add_row(status, finding.check, Text(finding.seen))
        title = f"{self.norm}: {self.layer}, probed with {self.num_features} channels"
        console.print(Text(title, style="bold"))
        console.print(table)
        console.print(Text(self.verdict, style=COLOURS[FAIL if self.failed else PASS]))


def subject_of(norm: str, values: Mapping[str, Any]) -> Subject:
    """The layer, at the first width that it can be built for.

    Raises:
        Refused — it cannot be built, or called on any input, with the reason.
    """
    reason = ""
    for width in WIDTHS:
        subject = Subject(values, width)
        try:
            layer = subject.build()
        except Refused:
            raise
        except (Exception, SystemExit) as error:
            reason = reason or f"norm={norm} cannot be built: {first_line(error)}"
            continue
        if not isinstance(layer, nn.Module):
            raise Refused(f"norm={norm} must return a torch.nn.Module, got {type(layer).__name__}")
        try:
            y = call(layer, activations(subject.maps), training=True)
        except Exception as error:
            reason = reason or f"norm={norm} cannot be called on {subject.maps}: {first_line(error)}"
            continue
        if not isinstance(y, torch.Tensor):
            raise Refused(f"norm={norm} must return a tensor, got {type(y).__name__}")
        if y.shape != subject.maps:
            raise Refused(f"norm={norm} must keep the shape: {subject.maps} in, {tuple(y.shape)} out")
        return subject
    raise Refused(reason)


def run_check(subject: Subject, name: str, check: Check) -> Finding:
    """One row: what the check says, or how it failed."""
    try:
        return Finding(name, PASS, check(subject))
    except Doubtful as doubt:
        return Finding(name, WARN, str(doubt))
    except Broken as broken:
        return Finding(name, FAIL, str(broken))
    except Exception as error:  # what the layer raised in the middle of a check
        return Finding(name, FAIL, first_line(error))


def audit(norm: str, subject: Subject, *, backend: str | None, with_cost: bool) -> Card:
    """Every check on one layer."""
    checks = dict(CHECKS)
    if backend:
        checks["compile"] = partial(numbers.compiles, backend=backend)
    if with_cost:
        checks["cost"] = cost
    findings = [run_check(subject, name, check) for name, check in checks.items()]
    layer = subject.build()
    called = f"{type(layer).__module__}.{type(layer).__qualname__}({layer.extra_repr()})"
    return Card(norm, called, subject.options, subject.num_features, findings)
