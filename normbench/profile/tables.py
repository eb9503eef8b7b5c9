"""A profile in words: tables for the terminal, and a page of Markdown with its figures."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from normbench.bench.page import CROWDED, unit_of
from normbench.bench.page import table as markdown_table
from normbench.bench.spread import Spread
from normbench.profile import groups
from normbench.profile.record import Body, Row, in_rounds, step_rows, summed

COLUMNS = ("layer", "shape", "in model: forward", "backward", "alone: forward", "backward",
           "of copy: forward", "backward", "peak MiB", "share of step")  # fmt: skip
STEP_COLUMNS = ("arm", "step", "without norms", "norms, by difference", "norms, by layers",
                "gap, 95 % interval", "agree")  # fmt: skip
ABOUT = """\
Medians over {rounds} rounds, in brackets the 20th and 80th percentile. *of copy*: the bytes per second that
the layer alone has to move at least, over those of a copy of its input in the same rounds. *peak*: what one
pass forward and backward holds at once above input and gradient. *by difference*: the step less the same step
without norms; *by layers*: the layers' own times inside the step, added up. *gap*: by layers less by
difference, the rounds' median."""
RELU = """\
Layers with ReLU inside (fused ones, before a ReLU) are timed with it, while the step without norms has it as
an operator of its own: *by layers* is less that ReLU's time, measured in the step without norms."""
METHOD = """\
`python -m normbench.profile` measures every norm layer of a model, whatever its class, at the shapes it
really sees. All arms live in one process and take turns: a round runs every side once, in an order of its
own.

- **In the model.** Sides are real training steps (forward, loss, backward, update; the learning rate is so
  small that weights stay). A sample is a step as it is and then one that is watched: hooks mark where a
  layer is entered and left; its backward pass lasts from the moment its output's gradient is complete until
  its input's is, so gradients of its own parameters count. Shares are of the step as it is. `observing` in
  steps.csv is what watching cost.
- **Alone.** The same layer, called as the model calls it, on inputs of the same shape, type and layout that
  take turns (128 MiB of them on a CPU), made like the gradients off the clock; what is quicker than 30 ms
  is repeated within a sample. Layers of an arm that are alike are measured once.
- **Time** is the CPU's counter; on CUDA its events (untested: no CUDA device was at hand). The allocator is
  tuned as a session tunes its own.
- **Bytes** are the least that an algorithm has to move: 2 + f tensors forward and 3 + 2f backward, f being
  the share of the tensor that has to be seen before anything can be written: 1 for batch norm, a sample's
  share where statistics come from a sample (in whole rows of memory unless channels are last), 0 for layers
  that stay within a sample. f is found by probing the layer: which inputs its output and its gradient
  depend on.
- **A copy** of the same tensor, reading and writing it once, takes its turn in the same rounds: the roof.
- **Peak memory** is what torch's allocator handed out at once during one pass forward and backward, above
  input and output's gradient: on CUDA by its counter, on the CPU by the profiler's record of every
  allocation, which does not see what a kernel allocates past torch.
- **ReLU.** A fused layer before a ReLU has it inside and in its time (`relu_inside`), alone and in the
  model. The step without norms runs that ReLU as an operator; its time there is measured in the same rounds
  and taken off the sum of the layers, not off their rows.
- **Agreement.** Each round gives the layers' share less the difference's share. Their median has an
  interval from order statistics (95 %, 6 rounds or more, nothing assumed of their distribution); the two
  agree where it contains 0, and nothing is said where it is so wide that it contains the whole share too.
  The difference also holds what no layer's own time can: calls of modules, the update of the norms'
  parameters, and what caches and allocator do for the layers in between."""
PLACES = {
    "layers-model": "Forward and backward time of every norm layer inside the running step",
    "layers-alone": "Forward and backward time of every norm layer alone",
    "roofline": "Bytes per second that norm layers have to move, against a copy of their input",
    "steps": "Share of the step that the norms take, by layers and by difference",
}


def show(body: Body) -> None:
    """Print a table for every arm, then their steps."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    for arm in body["arms"]:
        lines = ([cell.partition(" (")[0] for cell in line] for line in layer_lines(body, arm))
        console.print(rich(arm["arm"], COLUMNS, lines))
        console.print()
    console.print(rich("steps", STEP_COLUMNS, map(step_line, step_rows(body))))
    said = " ".join([*about(body), *missing(body), crowded(body)]).replace("*", "").replace("\n", " ")
    console.print("\n" + said, style="dim", markup=False, width=110)


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
        return [*cells, f"{row['gap']:+.2%}, no interval", "–"]
    interval = f"{row['gap']:+.2%} ({row['gap_low']:+.2%} to {row['gap_high']:+.2%})"
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
    return f"{spread.median / scale:.3g} {unit} ({spread.p20 / scale:.3g}–{spread.p80 / scale:.3g})"


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


def page(bodies: Sequence[Body], folder: str, label: Callable[[Body], str]) -> str:
    """Markdown of several profiles, whose figures lie in `folder` beside it."""
    lines = ["# What norm layers cost", "", METHOD, ""]
    for body in bodies:
        lines += section(body, folder, label(body))
    return "\n".join(lines).rstrip() + "\n"


def section(body: Body, folder: str, label: str) -> Iterator[str]:
    """One profile."""
    machine = body["machine"]
    yield f"## {body['model']}, {body['dataset']}'s images ({'×'.join(map(str, body['image']))})"
    yield ""
    if why := caveat(body):
        yield f"**{why}**"
        yield ""
    on = "CUDA" if machine["device"].startswith("cuda") else "the CPU"
    yield (
        f"`{' '.join(body['command'])}`, {body['made_at'][:10]}, {body['wall_s']:.0f} s on {on}: "
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
    yield ""
    yield from markdown_table(STEP_COLUMNS, map(step_line, step_rows(body)))
    for name, what in PLACES.items():
        if body["alone"] or name in ("layers-model", "steps"):
            yield f"![{what}, {body['model']}]({folder}/{label}-{name}.svg)"
            yield ""
    yield "<details><summary>All layers</summary>"
    yield ""
    for arm in body["arms"]:
        yield f"**{arm['arm']}**, batch {arm['batch_size']}, {arm['precision']}"
        yield ""
        yield from markdown_table(COLUMNS, layer_lines(body, arm))
    yield "</details>"
    yield ""
