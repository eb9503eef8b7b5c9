"""Layers as tables and figures show them: each by itself; where there are many, those of a shape together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normbench.bench.spread import Spread
from normbench.profile.record import Body, summed

MOST = 20  # layers that are shown each by itself


@dataclass(frozen=True)
class Shown:
    """One line or place in a figure: the layers behind it, by their place in the model.

    `name` is a layer's, or how many there are of a shape; `shape` without the batch.
    """

    name: str
    shape: str
    layers: tuple[int, ...]


def shown(body: Body) -> list[Shown]:
    """What is shown of a profile, in forward order."""
    layers = body["arms"][0]["layers"]
    if len(layers) <= MOST:
        return [Shown(layer["layer"], short(layer["shape"]), (i,)) for i, layer in enumerate(layers)]
    alike: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        alike.setdefault(short(layer["shape"]), []).append(i)
    return [
        Shown(f"{len(places)} layer{'s' if len(places) > 1 else ''}", shape, tuple(places))
        for shape, places in alike.items()
    ]


def short(shape: Sequence[int]) -> str:
    """`64@32²` for (N, 64, 32, 32)."""
    channels, *space = shape[1:]
    if not space:
        return str(channels)
    size = f"{space[0]}²" if len(space) == 2 and space[0] == space[1] else "×".join(map(str, space))
    return f"{channels}@{size}"


def in_model(arm: Body, places: Sequence[int], which: str) -> list[float]:
    """Seconds of a pass of these layers inside the step, a round each; empty where one was not measured."""
    columns = [arm["layers"][place][f"{which}_s"] for place in places]
    return summed(columns, columns[0]) if all(columns) else []


def alone(body: Body, arm: Body, places: Sequence[int], which: str) -> list[float]:
    """The same of these layers alone."""
    columns = [one[f"{which}_s"] for one in of_alone(body, arm, places)]
    return summed(columns, columns[0]) if columns and all(columns) else []


def of_alone(body: Body, arm: Body, places: Sequence[int]) -> list[Body]:
    """What was measured of these layers alone; nothing where one is missing."""
    found: dict[str, Body] = {}
    for group in body["alone"]:
        found |= group["layers"]
    likenesses = [arm["layers"][place]["alike"] for place in places]
    return [found[one] for one in likenesses] if all(one in found for one in likenesses) else []


def copy_rate(body: Body, arm: Body, place: int) -> float | None:
    """Bytes per second of a copy of what the layer sees."""
    likeness = arm["layers"][place]["alike"]
    for group in body["alone"]:
        if likeness in group["layers"]:
            return float(2 * group["tensor_bytes"] / Spread.of(group["copy_s"]).median)
    return None


def moved(arm: Body, places: Sequence[int], which: str) -> int | None:
    """Bytes that these layers have to move; None where it is not known of one."""
    found: list[Any] = [arm["layers"][place][f"{which}_bytes"] for place in places]
    return None if None in found else sum(found)
