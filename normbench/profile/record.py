"""What a profile found: one JSON body with the raw times, and the rows of layers.csv and steps.csv from it.

layers.csv   one row per arm, layer and place: `alone`, called by itself, or `model`, inside the running step
steps.csv    one row per arm: what the norms take of a step, by their own times and by a step without them

A `share` is of the step's time, round by round. `…_by_layers` adds the layers' times up, less what the step
without norms spends in the same places: the call of a layer that does nothing and its marks, and the eager
ReLU in place of one inside a layer. So it means what `…_by_difference` does.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normbench.bench.spread import Spread
from normbench.plan import read_json
from normbench.values import Refused

FORMAT = 2
Body = dict[str, Any]
Row = dict[str, Any]
PASSES = ("forward", "backward")
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of what is read back
CONFIDENCE = 0.95
ODD = 1e-3  # a share of values that are no ordinary numbers from which on steps are not compared
LAYER_COLUMNS = """
    model dataset arm norm norm_options stride layer layer_index shape channels_last precision batch_size
    place fused forward_median_s forward_p20_s forward_p80_s backward_median_s backward_p20_s backward_p80_s
    forward_bytes backward_bytes forward_gb_per_s backward_gb_per_s copy_gb_per_s peak_memory_mib
    forward_operators backward_operators share_of_step share_p20 share_p80 threads device device_name
    driver_version torch_version cuda_version made_at relu_inside
""".split()  # noqa: SIM905
SPREADS = ("median", "p20", "p80")
STEPS = ("step", "without_norms", "relu_inside", "empty_layers")
STEP_COLUMNS = [
    "arm",
    *(f"{what}_{kind}_s" for what in STEPS for kind in SPREADS),
    *(f"norm_share_by_{how}{end}" for how in ("difference", "layers") for end in ("", "_p20", "_p80")),
    *("gap", "gap_low", "gap_high", "agrees", "odd_share", "observing", "rounds"),
]


def layer_rows(body: Body) -> Iterator[Row]:
    """The rows of layers.csv."""
    groups = {likeness: group for group in body["alone"] for likeness in group["layers"]}
    for arm in body["arms"]:
        for layer in arm["layers"]:
            group = groups.get(layer["alike"])
            common = common_columns(body, arm, layer)
            copy = None
            if group is not None:
                copy = 2 * group["tensor_bytes"] / Spread.of(group["copy_s"]).median / 1e9
                alone = group["layers"][layer["alike"]]
                peak = alone["peak_memory_bytes"]
                yield {
                    **common,
                    "place": "alone",
                    **times_of(alone, layer),
                    "copy_gb_per_s": copy,
                    "peak_memory_mib": None if peak is None else peak / 2**20,
                }
            yield {
                **common,
                "place": "model",
                **times_of(layer, layer),
                "copy_gb_per_s": copy,
                **dict(zip(("share_of_step", "share_p20", "share_p80"), share_of(arm, layer), strict=True)),
            }


def common_columns(body: Body, arm: Body, layer: Body) -> Row:
    """What a layer's rows have in common."""
    machine = body["machine"]
    return {
        "model": body["model"],
        "dataset": body["dataset"],
        **{key: arm[key] for key in ("arm", "norm", "stride", "channels_last", "precision", "batch_size")},
        "norm_options": json.dumps(arm["norm_options"]),
        "layer": layer["layer"],
        "layer_index": layer["layer_index"],
        "shape": "x".join(map(str, layer["shape"])),
        "fused": layer["fused"],
        "relu_inside": layer["relu_inside"],
        **{f"{which}_operators": counted(layer[f"{which}_operators"]) for which in PASSES},
        "threads": machine["threads"],
        "device": machine["device"],
        "device_name": machine["device_name"],
        "driver_version": machine["driver_version"],
        "torch_version": machine["torch"],
        "cuda_version": machine["cuda_version"],
        "made_at": body["made_at"],
    }


def times_of(measured: Body, layer: Body) -> Row:
    """Spread, bytes and rate of both passes; empty where a pass was not measured."""
    row: Row = {}
    for which in PASSES:
        times, moved = measured[f"{which}_s"], layer[f"{which}_bytes"]
        row[f"{which}_bytes"] = moved
        if times:
            spread = Spread.of(times)
            row |= {f"{which}_{kind}_s": value for kind, value in asdict(spread).items()}
            if moved:
                row[f"{which}_gb_per_s"] = moved / max(spread.median, 1e-12) / 1e9
    return row


def counted(operators: Mapping[str, int]) -> str:
    """`aten.mul aten.add×2`."""
    return " ".join(name if count == 1 else f"{name}×{count}" for name, count in operators.items())


def in_rounds(measured: Body) -> list[float]:
    """Forward and backward together, a round each; a pass without times counts as none."""
    passes = [measured[f"{which}_s"] for which in PASSES if measured[f"{which}_s"]]
    return [sum(times) for times in zip(*passes, strict=True)]


def share_of(arm: Body, layer: Body) -> tuple[float | None, ...]:
    """Median, p20 and p80 of the layer's share of the step, ReLU inside it included."""
    times = in_rounds(layer)
    if not times:
        return None, None, None
    spread = Spread.of_ratio(times, arm["step_s"])
    return spread.median, spread.p20, spread.p80


def step_rows(body: Body) -> Iterator[Row]:
    """The rows of steps.csv."""
    for arm in body["arms"]:
        yield step_row(arm, body["without"][arm["without"]])


def step_row(arm: Body, without: Body) -> Row:
    """An arm's step, what the norms take of it both ways, and whether the two agree.

    `gap` is the share by layers less the share by difference, of one round's four steps: with and without
    norms, as they are and watched. Its interval is that of the rounds' median by their order statistics
    (`interval_of_median`), which takes the rounds for independent and nothing for granted about their
    distribution. It speaks of this process: another has its tensors elsewhere in memory.
    """
    step, bare = arm["step_s"], without["step_s"]
    inside = [layer["layer"] for layer in arm["layers"] if layer["relu_inside"]]
    relus = summed([in_rounds(without["relus"][name]) for name in inside if name in without["relus"]], step)
    names = [layer["layer"] for layer in arm["layers"]]
    empty = summed([in_rounds(without["empty"][name]) for name in names if name in without["empty"]], step)
    layers = summed([in_rounds(layer) for layer in arm["layers"]], step)
    by_difference = [(a - b) / a for a, b in zip(step, bare, strict=True)]
    by_layers = [(a - b - c) / d for a, b, c, d in zip(layers, empty, relus, step, strict=True)]
    gaps = [a - b for a, b in zip(by_layers, by_difference, strict=True)]
    low, high = interval_of_median(gaps)
    odd = max(arm["odd_share"], without["odd_share"])
    row: Row = {"arm": arm["arm"], "rounds": len(step), "odd_share": odd}
    for what, times in zip(STEPS, (step, bare, relus, empty), strict=True):
        row |= {f"{what}_{kind}_s": value for kind, value in asdict(Spread.of(times)).items()}
    for how, shares in (("difference", by_difference), ("layers", by_layers)):
        spread = Spread.of(shares)
        name = f"norm_share_by_{how}"
        row |= {name: spread.median, f"{name}_p20": spread.p20, f"{name}_p80": spread.p80}
    return row | {
        "gap": Spread.of(gaps).median,
        "gap_low": low,
        "gap_high": high,
        "agrees": None if odd > ODD else agreement(low, high, Spread.of(by_difference).median),
        "observing": Spread.of_ratio(arm["observed_step_s"], step).median - 1,
    }


def agreement(low: float | None, high: float | None, share: float) -> bool | None:
    """Whether the interval of a gap contains 0; None where it is so wide that it also contains the gap that
    layers without any time would have, the share itself, or where there is no interval."""
    if low is None or high is None or low <= min(0.0, -share) <= max(0.0, -share) <= high:
        return None
    return low <= 0 <= high


def summed(columns: Sequence[Sequence[float]], like: Sequence[float]) -> list[float]:
    """Sums over columns, round by round; zeros where there is none."""
    return [sum(column[i] for column in columns if column) for i in range(len(like))]


def interval_of_median(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """From the k-th least to the k-th greatest number, the narrowest such that the median lies within it with
    a probability of CONFIDENCE at least (binomial; 4th to 12th of 15); None for fewer than 6 numbers."""
    from scipy import stats

    found: Any = stats.quantile_test(numbers).confidence_interval(CONFIDENCE)
    low, high = float(found.low), float(found.high)
    return (None, None) if low != low or high != high else (low, high)


def as_csv(columns: Sequence[str], rows: Iterator[Row]) -> str:
    """A table; empty where a row has no such thing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([said(row.get(column)) for column in columns])
    return text.getvalue()


def said(value: Any) -> Any:
    """true and false as YAML has them."""
    return str(value).lower() if isinstance(value, bool) else value


def read_profile(key: str, path: str) -> Body:
    """What an earlier profile has written; Refused where there is none."""
    file = Path(path) / "profile.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise Refused(f"{key}={path}: no such file; give the folder of an earlier profile")
    try:
        body = read_json(file)
    except Refused:  # whose cure, to remove the file, is meant for our own
        body = None
    if not isinstance(body, dict) or body.get("format") != FORMAT or not body.get("arms"):
        raise Refused(f"{key}={path} is no result of this version's profile")
    try:
        list(layer_rows(body))
        list(step_rows(body))
    except DAMAGE as error:
        raise Refused(f"{key}={path}: what it holds is damaged; give another profile's folder") from error
    found: Body = body
    return found
