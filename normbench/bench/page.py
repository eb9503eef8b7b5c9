"""A run's JSON as one page of Markdown: every number in it is one of the JSON's."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from normbench.bench.record import Body
from normbench.bench.targets import BN, BOTH, case_name
from normbench.rules import SUITES

SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
RATES = {
    "image": (1.0, "images/s"),
    "session": (60.0, "sessions/min"),
    "session-step": (1.0, "session-steps/s"),
}
TITLES = {
    "layer": "Norm layers alone",
    "step": "One training step",
    "loader": "Batches of augmented images",
    "naive": "A session against the plain loop",
    "pack": "Sessions packed into one network",
    "startup": "Start-up of a session",
    "sweep": "A small sweep",
    "session": "Whole sessions on CUDA",
}
CROWDED = 0.95  # of its processor
METHOD = """\
A side is one way to do a piece of work. All sides of a table take turns in one run: a round runs each once,
in an order of its own, so that drift of the machine hits all alike. **×** is the time of the table's
baseline over the side's, each ratio within one round: the rounds' median, in brackets their 20th and 80th
percentile. More than 1 is faster than the baseline. Times are medians with the same brackets. All processes
that are measured, on either side, have the same allocator settings and as many threads. Inputs and
gradients are made off the clock and take turns, so that no cache holds the next one; work that is quicker
than 30 ms is repeated within a sample. CUDA is timed by its events, the CPU by its counter. A cell without
a time says why."""
LAYER_NOTE = f"""\
`readable` is plain tensor operations, `fused` one operator of ours; `obn` is torch's own operator in our
class and, like `{BN}`, the baseline, so that its × shows the noise. With ReLU, fused layers have it inside,
the others eager behind them. *s=1* beside a strided layer is the × of the same layer without stride: what
of its gain is fusion and not striding. *floor* is the time over that of as many copies of the tensor as an
ideal batch norm's memory traffic (4 for both passes: 8 units, of which a copy is 2). *GB/s* counts what the
layer has to read and write at least: 8 units, with statistics on a share f of the tensor 5 + 3f, with eager
ReLU 5 more; a copy's, in the same run, is in each table's head. *large*: 32 MiB or more in float32."""


EMPTY: Body = {"groups": []}


def page(run: Body) -> str:
    """The whole page."""
    return "\n".join([*head(run), *target_table(run), *sections(run)]).rstrip() + "\n"


def head(run: Body) -> Iterator[str]:
    """What was measured where, when and how."""
    machine = run["machine"]
    yield "# Performance"
    yield ""
    if run["quick"]:
        yield "**A quick run: it shows that everything runs, and nothing about speed.**"
        yield ""
    if not run["complete"]:
        yield "**Interrupted: what was measured until then.**"
        yield ""
    on = "CUDA" if machine["device"].startswith("cuda") else "the CPU"
    yield (
        f"Measured {run['made_at'][:10]} on {on}: {machine['device_name']}, {machine['cores']} cores, "
        f"threads={machine['threads']}; torch {machine['torch']}, torchvision {machine['torchvision']}, "
        f"Python {machine['python']}, {machine['system']}. Allocator: {machine['allocator']}. "
        f"Load average before: {machine['load_before']}. Commit {(machine['git_commit'] or 'unknown')[:10]}."
    )
    if machine["threads"] == 1 and machine["device"] == "cpu":
        # where this process itself computes
        groups = [group for name in ("layer", "step") for group in run["suites"].get(name, EMPTY)["groups"]]
        busy = sum(map(crowded, groups))
        if busy:
            yield ""
            yield (
                f"**Other work was running: in {busy} of {len(groups)} tables a side had less than "
                f"{CROWDED:.0%} of its processor. Measure again on a quiet machine.**"
            )
    if not machine["cuda"]:
        yield ""
        yield "This machine has no CUDA device: **everything about CUDA is untested here.**"
    yield ""
    yield METHOD
    yield ""


def target_table(run: Body, suites: Collection[str] | None = None) -> Iterator[str]:
    """The targets, of all suites or of some, beside what was measured."""
    shown = [t for t in run["targets"] if suites is None or t["suite"] in suites]
    if not shown:
        return
    yield "## Targets"
    yield ""
    yield "Of several cases the worst stands here."
    yield ""
    yield from table(
        ["what", "target", "measured", "met", "at"],
        ([t["what"], bound(t), measured(t), verdict(t), t["case"] or t["why"]] for t in shown),
    )


def bound(target: Body) -> str:
    """`≥ 1.6`, `≤ 190 µs`."""
    value = seconds(target["bound"]) if target["unit"] == "s" else f"{target['bound']:g}"
    return f"{'≤' if target['at_most'] else '≥'} {value}"


def measured(target: Body) -> str:
    """Median and brackets."""
    found = target["measured"]
    if found is None:
        return ""
    return spread_s(found) if target["unit"] == "s" else ratio(found)


def verdict(target: Body) -> str:
    """In a word or two."""
    return {True: "yes", False: "**no**", None: target["why"].split(":")[0] if target["why"] else ""}[
        target["met"]
    ]


def sections(run: Body) -> Iterator[str]:
    """One for every suite."""
    for suite in sorted(run["suites"], key=SUITES.index):
        body = run["suites"][suite]
        yield f"## {TITLES[suite]}"
        yield ""
        yield f"`{body['command']}`, {body['made_at'][:10]}, {body['wall_s']:.0f} s."
        yield ""
        if suite == "layer":
            yield LAYER_NOTE
            yield ""
            yield from overview(body["groups"])
            yield from folded("All sides, all passes", body["groups"])
        else:
            for group in body["groups"]:
                yield from group_table(group)


def overview(groups: Sequence[Body]) -> Iterator[str]:
    """Forward + backward of the fused layers in one table, a line a case."""
    names = list(
        dict.fromkeys(n for g in groups for n in g["sides"] if n.startswith(("bn fused", "mbn fused")))
    )
    if not names:
        return
    yield f"Forward + backward, × `{BN}` (with ReLU: eager, behind it):"
    yield ""
    yield from table(
        ["case", *names],
        ([case_name(g["case"]), *(short_cell(g["sides"].get(name)) for name in names)] for g in groups),
    )
    for why, count in reasons(groups, names).items():
        yield f"- {count} cells: {why}"
    yield ""


def reasons(groups: Sequence[Body], names: Sequence[str]) -> dict[str, int]:
    """Why cells of these sides are empty, and how many each time."""
    found: dict[str, int] = {}
    for group in groups:
        for name in names:
            why = group["sides"].get(name, {}).get("missing")
            if why:
                found[why] = found.get(why, 0) + 1
    return found


def short_cell(side: Body | None) -> str:
    """A side's × of both passes."""
    if side is None or BOTH not in side["parts"]:
        return "–"
    found = side["parts"][BOTH]["speedup"]
    return ratio(found) if found else "–"


def folded(title: str, groups: Sequence[Body]) -> Iterator[str]:
    """Tables that a reader opens."""
    yield f"<details><summary>{title}</summary>"
    yield ""
    for group in groups:
        yield from group_table(group)
    yield "</details>"
    yield ""


def group_table(group: Body) -> Iterator[str]:
    """One group: a line a side."""
    copy = group["sides"].get("copy", {"parts": {}})["parts"].get("copy")
    named = f"**{case_name(group['case'])}**"
    if copy:
        named += f", seen by {group['case']['seen_by']}; a copy takes {spread_s(copy)}, "
        named += f"{copy['gb_per_s']:.1f} GB/s"
    yield named
    yield ""
    if group["note"]:
        yield group["note"]
        yield ""
    sides = {name: side for name, side in group["sides"].items() if name != "copy"}
    parts = list(dict.fromkeys(part for side in sides.values() for part in side["parts"]))
    rate = RATES.get(group["per"])
    bytes_counted = any("gb_per_s" in f for side in sides.values() for f in side["parts"].values())
    columns = ["side"]
    for part in parts:
        columns += [part, "×"]
    columns += ["s=1", "floor", "GB/s"] if bytes_counted else []
    columns += [rate[1]] if rate else []
    columns += ["note"]
    yield from table(columns, (line(group, name, parts, bytes_counted) for name in sides))


def line(group: Body, name: str, parts: Sequence[str], bytes_counted: bool) -> list[str]:
    """One side's cells."""
    side = group["sides"][name]
    cells = [f"{name} (baseline)" if name == group["baseline"] else name]
    for part in parts:
        found = side["parts"].get(part)
        cells += [spread_s(found), speedup(found, name == group["baseline"])] if found else ["–", ""]
    last = side["parts"].get(parts[-1]) if parts else None
    if bytes_counted:
        control = group["sides"].get(group["controls"].get(name), {"parts": {}})["parts"].get(parts[-1])
        cells.append(ratio(control["speedup"]) if control and control["speedup"] else "")
        cells.append(ratio(last["over_floor"]) if last and "over_floor" in last else "")
        cells.append(f"{last['gb_per_s']:.1f}" if last and "gb_per_s" in last else "")
    if group["per"] in RATES:
        first = side["parts"].get(parts[0]) if parts else None
        cells.append(f"{RATES[group['per']][0] / first['median_s']:,.4g}" if first else "")
    return [*cells, side["missing"] or side["note"]]


def crowded(group: Body) -> bool:
    """Whether other work took processor time from a side."""
    shares = [side["cpu_share"] for side in group["sides"].values()]
    return any(share is not None and share < CROWDED for share in shares)


def speedup(part: Body, is_baseline: bool) -> str:
    """A part's ×."""
    return "1" if is_baseline else ratio(part["speedup"]) if part["speedup"] else ""


def ratio(found: Mapping[str, float]) -> str:
    """`1.65 (1.60–1.71)`."""
    low, high = f"{found['p20']:.3g}", f"{found['p80']:.3g}"
    return f"{found['median']:.3g}" + (f" ({low}–{high})" if found["p20"] < found["p80"] else "")


def spread_s(found: Mapping[str, float]) -> str:
    """`41.2 ms (40.9–42.0)`, from a part's figures or a target's."""
    median, p20, p80 = (found.get(f"{key}_s", found.get(key, 0.0)) for key in ("median", "p20", "p80"))
    scale, unit = unit_of(median)
    brackets = f" ({p20 / scale:.4g}–{p80 / scale:.4g})" if p20 < p80 else ""
    return f"{median / scale:.4g} {unit}{brackets}"


def seconds(value: float) -> str:
    """`190 µs`."""
    scale, unit = unit_of(value)
    return f"{value / scale:.4g} {unit}"


def unit_of(value: float) -> tuple[float, str]:
    """In which unit a time is short to read."""
    return next(((scale, unit) for scale, unit in SCALES if value >= scale), SCALES[-1])


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A Markdown table and an empty line."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
    yield ""


def comparison(now: Body, then: Body, named: str) -> Iterator[str]:
    """The medians of an earlier run over this run's, for every side that both have: below 1 is slower now."""
    yield f"## Against {named} of {then['made_at'][:10]}"
    yield ""
    for what in ("device_name", "torch", "threads", "allocator"):
        if now["machine"][what] != then["machine"][what]:
            yield f"**{what} was {then['machine'][what]}, and is {now['machine'][what]} now.**"
            yield ""
    rows = sorted(changes(now, then), key=lambda row: row[-1])
    if not rows:
        yield "The two runs have no case in common."
        yield ""
        return
    yield "Median then over median now; the slowest against then come first."
    yield ""
    yield from table(
        ["suite", "case", "side", "part", "then", "now", "then / now"],
        ([*words, seconds(a), seconds(b), f"{quotient:.3g}"] for *words, a, b, quotient in rows),
    )


def changes(now: Body, then: Body) -> Iterator[tuple[str, str, str, str, float, float, float]]:
    """Suite, case, side, part, seconds then, seconds now, their ratio."""
    before = {tuple(key): median for *key, median in medians(then)}
    for suite, case, side, part, median in medians(now):
        old = before.get((suite, case, side, part))
        if old is not None:
            yield suite, case, side, part, old, median, old / median


def medians(run: Body) -> Iterator[tuple[str, str, str, str, float]]:
    """Every median of a run by suite, case, side and part."""
    for suite, body in run["suites"].items():
        for group in body["groups"]:
            for name, side in group["sides"].items():
                for part, figures in side["parts"].items():
                    yield suite, case_name(group["case"]), name, part, figures["median_s"]
