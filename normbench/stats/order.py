"""The order of arms, which tables and colours follow: the baseline first, then the others by name."""

import re
from collections.abc import Iterable, Sequence

from normbench.values import Refused, nearest


def in_order(labels: Iterable[str], baseline: str) -> list[str]:
    """The baseline, then the others by name."""
    return [baseline, *sorted((label for label in labels if label != baseline), key=natural)]


def natural(label: str) -> list[tuple[bool, int, str]]:
    """A key that puts stride2 before stride10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", label)]


def choose_baseline(labels: Sequence[str], wanted: str | None) -> str:
    """The arm asked for, else batch norm where there is one, else the first of the inputs."""
    norms = {label: label.split("-")[0].lower() for label in labels}
    if wanted is None:
        usual = [label for norm in ("obn", "torch_bn", "bn") for label in labels if norms[label] == norm]
        return (usual or list(labels))[0]
    found = [n for n in labels if n == wanted] or [n for n in labels if norms[n] == wanted.lower()]
    if len(found) != 1:
        problem = "several arms match" if found else "no such arm"
        hint = "" if found else nearest(wanted, labels)
        raise Refused(f"baseline {wanted!r}: {problem}{hint}; there are {', '.join(labels)}")
    return found[0]
