"""A profile in words: tables for the terminal, and a page of Markdown with its figures."""

import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from normbench.bench.page import CROWDED, unit_of
from normbench.bench.page import table as markdown_table
from normbench.bench.spread import Spread
from normbench.profile import groups
from normbench.profile.record import ODD, Body, Row, in_rounds, step_rows, summed

COLUMNS = ("layer", "shape", "in model: forward", "in model: backward", "alone: forward", "alone: backward",
           "of copy: forward", "of copy: backward", "peak MiB", "share of step")  # fmt: skip
STEP_COLUMNS = ("arm", "step", "without norms", "norms, by difference", "norms, by layers",
                "gap, 95 % interval", "agree")  # fmt: skip
ABOUT = """\
Medians over {rounds} rounds, in brackets the 20th and 80th percentile. *of copy*: the bytes per second that
the layer alone has to move at least, over those of a copy of its input in the same rounds. *peak*: what one
pass forward and backward of the layer alone holds at once, above its input and its output's gradient. *by
difference*: the step less the same step without norms; *by layers*: the layers' own times inside the step,
added up. *gap*: by layers less by difference, the rounds' median and its interval."""
RELU = """\
Some layers do the ReLU behind them as well: their times hold it, and *by layers* is less what the same ReLUs
take in the step without norms."""
METHOD = """\
`python -m normbench.profile` measures every norm layer of a model, whatever its class, at the shapes it
really sees. All arms live in one process, and so does a copy of the model without norms (`norm=nn`); every
round measures each once, in an order of its own, so that a machine's drift hits all alike.

- **In the model.** A sample is one real training step (forward, loss, backward, update; where steps are
  quick, as many as last 30 ms) as it is, then one that is watched: hooks mark when a layer is entered and
  left and, in the backward pass, when the gradient of its output is complete and when its input's is, which
  includes the gradients of its own parameters. The learning rate is 1e-12, so that weights stay as they are
  and every round is the same work. A share is of the step as it is; `observing` in steps.csv is what
  watching added to a step.
- **Alone.** The same layer, called as the model calls it, on random inputs of the same shape, type and
  layout. Inputs and their gradients are made off the clock and take turns, 128 MiB of them on a CPU (at
  least one pair), so that no cache has the next one. What is quicker than 30 ms is repeated to last as long;
  layers of an arm that are alike are measured once.
- **Time** is the processor's monotonic counter; on CUDA, its events (untested: no CUDA device was at hand).
  The allocator is tuned as a session tunes its own.
- **Bytes** are the least that an algorithm has to move. Forward reads the input and writes the output, 2
  tensors, and reads the share f of the input once more that has to be seen before anything can be written;
  backward reads input and gradient, writes a gradient, 3 tensors, and reads the same share of both once more:
  2 + f and 3 + 2f. f is 1 for batch norm, the sample's share where statistics come from a sample (in whole
  rows of memory unless channels are last), 0 for layers that stay within one image, which a cache is
  taken to hold. f is not declared: it is found by probing which inputs the layer's output and gradient depend
  on. ReLU inside a layer adds no bytes.
- **A copy** of the same tensor, reading and writing it once, takes its turn in the same rounds: the roof. A
  layer can stand above it where a cache holds what is counted as read twice.
- **Peak memory** is what torch's allocator handed out at once: on CUDA by its counter, on the CPU by the
  profiler's record of every allocation, which does not see what a kernel allocates past torch.
- **By difference and by layers** mean the same: from the sum of the layers' times is taken off what the step
  without norms spends in the same places, the call of a layer that does nothing with its marks
  (`empty_layers`) and the ReLU in place of one inside a layer (`relu_inside`), measured in the same rounds.
- **Agreement.** A round gives one gap, the share by layers less the share by difference. The interval is that
  of the rounds' median by their order statistics (of 15 rounds the 4th least to the 4th greatest gap: at
  least 95 %, 6 rounds or more). It takes rounds for independent, assumes nothing else of their distribution,
  and speaks of one process on one machine. The two *agree* where it contains 0. Nothing is said where it is
  so wide that it would contain 0 were the layers' times all zero, or where more than 0.1 % of the values at
  the layers' outputs or of their gradients are not finite or denormal, which has other speeds.
- **What a gap may be.** The difference also holds what is in no layer's own time: the update of the norms'
  parameters, and what a norm does to the caches and the memory that its neighbours find."""
PLACES = {
    "layers-model": "Forward and backward time of every norm layer inside the running step",
    "layers-alone": "Forward and backward time of every norm layer alone",
    "roofline": "Bytes per second that norm layers have to move, against a copy of their input",
    "steps": "Share of the step that the norms take, by layers and by difference",
    "compare": "Layer times of another table over ours",
}


def show(body: Body) -> None:
    """Print a table for every arm, then their steps."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    for arm in body["arms"]:
        lines = ([cell.partition(" (")[0] for cell in line] for line in layer_lines(body, arm))
        console.print(rich(arm["arm"], COLUMNS, lines))
        console.print()
    console.print(rich("steps", STEP_COLUMNS, map(step_line, step_rows(body))))
    said = " ".join([*about(body), *missing(body), *odd(body), crowded(body)])
    console.print("\n" + said.replace("*", "'").replace("\n", " "), style="dim", markup=False, width=110)


def rich(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A table without lines, numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < 1 + (columns is COLUMNS) else "right")
    for line in lines:
        made.add_row(*line)
    return made


def layer_lines(body: Body, arm: Body) -> Iterator[list[str]]:
    """An arm's lines."""
    for one in groups.shown(body):
        cells = [one.name, one.shape]
        cells += [ms(groups.in_model(arm, one.layers, which)) for which in ("forward", "backward")]
        cells += [ms(groups.alone(body, arm, one.layers, which)) for which in ("forward", "backward")]
        cells += [of_copy(body, arm, one, which) for which in ("forward", "backward")]
        peaks = [found["peak_memory_bytes"] for found in groups.of_alone(body, arm, one.layers)]
        cells.append(f"{max(peaks) / 2**20:.3g}" if peaks and None not in peaks else "–")
        times = [in_rounds(arm["layers"][place]) for place in one.layers]
        shares = Spread.of_ratio(summed(times, arm["step_s"]), arm["step_s"])
        yield [*cells, percent(shares)]


def of_copy(body: Body, arm: Body, one: groups.Shown, which: str) -> str:
    """A layer's bytes per second as a percentage of a copy's."""
    times, moved = groups.alone(body, arm, one.layers, which), groups.moved(arm, one.layers, which)
    rate = groups.copy_rate(body, arm, one.layers[0])
    if not times or not moved or not rate:
        return "–"
    return f"{moved / Spread.of(times).median / rate:.0%}"


def step_line(row: Row) -> list[str]:
    """An arm's step."""
    cells = [row["arm"], spread_ms(row, "step", "_s"), spread_ms(row, "without_norms", "_s")]
    for how in ("difference", "layers"):
        name = f"norm_share_by_{how}"
        cells.append(percent(Spread(row[name], row[f"{name}_p20"], row[f"{name}_p80"])))
    if row["gap_low"] is None:
        return [*cells, f"{100 * row['gap']:+.2f} %, no interval", "–"]
    interval = f"{100 * row['gap']:+.2f} % ({100 * row['gap_low']:+.2f} to {100 * row['gap_high']:+.2f})"
    return [*cells, interval, {True: "yes", False: "no", None: "cannot tell"}[row["agrees"]]]


def spread_ms(row: Row, name: str, end: str) -> str:
    """A step's time."""
    return in_unit(Spread(*(row[f"{name}_{kind}{end}"] for kind in ("median", "p20", "p80"))))


def ms(times: Sequence[float]) -> str:
    """A pass's time."""
    return in_unit(Spread.of(times)) if times else "–"


def in_unit(spread: Spread) -> str:
    """`1.23 ms (1.2–1.3)`."""
    scale, unit = unit_of(spread.median)
    middle, low, high = (
        f"{seconds / scale:.0f}" if seconds >= 1000 * scale else f"{seconds / scale:.3g}"
        for seconds in (spread.median, spread.p20, spread.p80)
    )
    return f"{middle} {unit} ({low}–{high})"


def percent(spread: Spread) -> str:
    """`3.1 % (3.0–3.2)`."""
    return f"{100 * spread.median:.2f} % ({100 * spread.p20:.2f}–{100 * spread.p80:.2f})"


def missing(body: Body) -> Iterator[str]:
    """Why layers have no times alone, each reason once."""
    alone = {likeness: one for group in body["alone"] for likeness, one in group["layers"].items()}
    for arm in body["arms"]:
        reasons = {alone[layer["alike"]]["missing"] for layer in arm["layers"] if layer["alike"] in alone}
        for reason in sorted(filter(None, reasons)):
            yield f"{arm['arm']} cannot be measured alone: {reason}."


def caveat(body: Body) -> str:
    """A sentence where a profile is no whole measurement."""
    if body["quick"]:
        return "A quick run: it says nothing about speed."
    return "" if body["complete"] else "Interrupted: what was measured by then."


def odd(body: Body) -> Iterator[str]:
    """Which steps calculate with other than ordinary numbers."""
    for name, share in [
        *((arm["arm"], arm["odd_share"]) for arm in body["arms"]),
        *((f"the step {name}", without["odd_share"]) for name, without in body["without"].items()),
    ]:
        if share > ODD:
            yield (
                f"{name}: {share:.1%} of the values at norm layers are denormal or not finite, which has "
                "other speeds; its differences tell little."
            )


def crowded(body: Body) -> str:
    """A sentence where other work took processor time from the steps."""
    machine, share = body["machine"], body["cpu_share"]
    if machine["device"] != "cpu" or machine["threads"] != 1 or share is None or share >= CROWDED:
        return ""
    return (
        f"Other work was running: a step had {share:.0%} of its processor. Measure again on a quiet machine."
    )


def about(body: Body) -> Iterator[str]:
    """How to read the tables."""
    yield ABOUT.format(rounds=len(body["arms"][0]["step_s"]))
    if any(layer["relu_inside"] for arm in body["arms"] for layer in arm["layers"]):
        yield RELU


def page(sections: Iterable[Iterable[str]]) -> str:
    """Markdown of several profiles."""
    lines = ["# What norm layers cost", "", METHOD, "", *(line for section in sections for line in section)]
    return "\n".join(lines).rstrip() + "\n"


def section(body: Body, folder: str, label: str, drawn: Collection[str]) -> Iterator[str]:
    """One profile, whose figures lie in `folder` beside the page as `<label>-<drawn>.svg`."""
    machine = body["machine"]
    yield f"## {body['model']}, {body['dataset']}'s images ({'×'.join(map(str, body['image']))})"
    yield ""
    if why := caveat(body):
        yield f"**{why}**"
        yield ""
    on = "CUDA" if machine["device"].startswith("cuda") else "the CPU"
    yield (
        f"`{shlex.join(body['command'])}`, {body['made_at'][:10]}, {body['wall_s']:.0f} s on {on}: "
        f"{machine['device_name']}, threads={machine['threads']}, driver {machine['driver_version']}, torch "
        f"{machine['torch']}; allocator {machine['allocator']}; load before {machine['load_before']}."
    )
    if crowded(body):
        yield f"**{crowded(body)}**"
    if not machine["cuda"]:
        yield "This machine has no CUDA device: timing by CUDA events is untested here."
    yield ""
    yield from about(body)
    yield from missing(body)
    yield from odd(body)
    yield ""
    yield from markdown_table(STEP_COLUMNS, map(step_line, step_rows(body)))
    for name in drawn:
        yield f"![{PLACES.get(name, name)}, {body['model']}]({folder}/{label}-{name}.svg)"
        yield ""
    yield "<details><summary>All layers</summary>"
    yield ""
    for arm in body["arms"]:
        yield f"**{arm['arm']}**, batch {arm['batch_size']}, {arm['precision']}"
        yield ""
        yield from markdown_table(COLUMNS, layer_lines(body, arm))
    yield "</details>"
    yield ""
