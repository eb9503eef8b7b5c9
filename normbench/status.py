"""The door `python -m normbench.status`: what a sweep has done, is doing, has failed; time to go.

python -m normbench.status outputs/mbn_stride
python -m normbench.status outputs/mbn_stride --watch
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from normbench.doors import one_line_errors
from normbench.overview import Arm, Overview, Running, look, since

SILENT_S = 30.0
SHOWN = 20  # lines of each kind below the table


def headline(sweep: Overview) -> str:
    """`42 of 60 done, 3 running, 1 failed, 14 to run`."""
    counts = {
        "interrupted": sum(len(arm.interrupted) for arm in sweep.arms),
        "running": sweep.at_once,
        "failed": sum(len(arm.failed) for arm in sweep.arms),
        "of settled arms left out": sum(arm.settled for arm in sweep.arms),
        "to run": sum(arm.waiting for arm in sweep.arms),
    }
    done, planned = sum(arm.done for arm in sweep.arms), sum(arm.planned for arm in sweep.arms)
    return ", ".join([f"{done} of {planned} done", *(f"{n} {what}" for what, n in counts.items() if n)])


def to_go(sweep: Overview) -> str:
    """`about 12 min to go`, or why nobody knows; "" where all has ended."""
    seconds = sweep.to_go_s()
    if sweep.ended:
        return ""
    if not sweep.at_once:
        return "nothing runs"
    return "time to go unknown" if seconds is None else f"about {duration(seconds)} to go"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def shown(sweep: Overview) -> Group:
    """Headline, table by arm, and below it what runs, failed and was interrupted."""
    line = "; ".join(filter(None, (headline(sweep), to_go(sweep))))
    parts = [("running", running_lines(sweep)), ("failed", failed_lines(sweep)),
             ("interrupted", interrupted_lines(sweep))]  # fmt: skip
    below = [below_the_table(title, list(lines)) for title, lines in parts]
    return Group(Text(line), Text(""), by_arm(sweep), *itertools.chain.from_iterable(below))


def by_arm(sweep: Overview) -> Table:
    """One line an arm; kinds that no session is of have no column."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    columns = {
        "done": [f"{arm.done}/{arm.planned}" for arm in sweep.arms],
        "running": [str(len(arm.running)) for arm in sweep.arms],
        "failed": [str(len(arm.failed)) for arm in sweep.arms],
        "interrupted": [str(len(arm.interrupted)) for arm in sweep.arms],
        "to run": [str(arm.waiting) for arm in sweep.arms],
        "a session": ["?" if arm.session_s is None else duration(arm.session_s) for arm in sweep.arms],
        "to go": [arm_to_go(sweep, arm) for arm in sweep.arms],
    }
    kept = {head: cells for head, cells in columns.items() if head == "done" or set(cells) - {"0", ""}}
    table.add_column("arm", overflow="fold")
    for head in kept:
        table.add_column(head, justify="right", no_wrap=True)
    for arm, *cells in zip(sweep.arms, *kept.values(), strict=True):
        table.add_row(Text(arm.name), *cells)
    return table


def arm_to_go(sweep: Overview, arm: Arm) -> str:
    """An arm's time to go, as a cell."""
    if not arm.left:
        return ""
    seconds = sweep.to_go_s(arm)
    return "?" if seconds is None else duration(seconds)


def running_lines(sweep: Overview) -> Iterable[tuple[str, str]]:
    """Every session that runs, and how far it is."""
    for arm in sweep.arms:
        for running in arm.running:
            yield f"{arm.name} {running.name}", progress(running, sweep)


def progress(running: Running, sweep: Overview) -> str:
    """`epoch 7 of 10, step 84, 1,386 images/s on node3 for 12 min; no sign for 45 s`."""
    reached, row = running.reached, running.claim.row
    said = ["no epoch yet"]
    if reached.epoch is not None:
        of = f" of {row['epochs']}" if row.get("epochs") and row.get("steps") is None else ""
        steps = f" of {row['steps']}" if row.get("steps") is not None else ""
        said = [f"epoch {reached.epoch}{of}, step {reached.step}{steps}"]
    if reached.images_per_s is not None:
        said.append(f"{reached.images_per_s:,.0f} images/s")
    began = since(running.claim)
    held = "" if began is None else f" for {duration(max(0.0, (sweep.now - began).total_seconds()))}"
    silent = f"; no sign for {duration(running.silent_s)}" if running.silent_s > SILENT_S else ""
    return f"{', '.join(said)} on {running.claim.host}{held}{silent}"


def failed_lines(sweep: Overview) -> Iterable[tuple[str, str]]:
    """Failures, equal ones of an arm together."""
    for arm in sweep.arms:
        for error in dict.fromkeys(failure.error for failure in arm.failed):
            alike = [failure for failure in arm.failed if failure.error == error]
            most = max(failure.attempts for failure in alike)
            tried = f" ({most} attempts)" if most > 1 else ""
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            yield f"{arm.name} {alike[0].name}{more}", f"{error}{tried}"


def interrupted_lines(sweep: Overview) -> Iterable[tuple[str, str]]:
    """Interrupted sessions, those of an arm at one epoch together."""
    for arm in sweep.arms:
        for epoch in dict.fromkeys(epoch for _, epoch in arm.interrupted):
            alike = [name for name, at in arm.interrupted if at == epoch]
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            yield f"{arm.name} {alike[0]}{more}", f"at epoch {epoch}" if epoch else "before a checkpoint"


def below_the_table(title: str, lines: list[tuple[str, str]]) -> list[Text | Table]:
    """One kind of sessions, a line each, the first SHOWN of them; nothing where there is none."""
    if not lines:
        return []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, what in lines[:SHOWN]:
        table.add_row(Text(f"  {name}"), Text(what))
    more = [Text(f"  and {len(lines) - SHOWN} more lines")] if len(lines) > SHOWN else []
    return [Text(f"\n{title}"), table, *more]


def watch(study: Path, everything: bool, every_s: float, console: Console) -> None:
    """Show it until all has ended: in place on a terminal, in a log a line whenever it changes."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                sweep = look(study, everything)
                live.update(shown(sweep), refresh=True)
                if sweep.ended:
                    return
                time.sleep(every_s)
    said = ""
    while True:
        sweep = look(study, everything)
        if headline(sweep) != said:
            said = headline(sweep)
            line = "; ".join(filter(None, (said, to_go(sweep))))
            print(f"{sweep.now:%Y-%m-%d %H:%M:%S}Z  {line}", flush=True)
        if sweep.ended:
            console.print(shown(sweep))
            return
        time.sleep(every_s)


def seconds(text: str) -> float:
    """A time to wait between two looks."""
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise ValueError
    return value


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="normbench status", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("outputs/adhoc"),
                        help="a study's folder (default: outputs/adhoc)")  # fmt: skip
    parser.add_argument("--watch", type=seconds, nargs="?", const=5.0, metavar="SECONDS",
                        help="look again every so many seconds (5) until all has ended")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every folder of the study, not the newest plan")
    given = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with one_line_errors("status"):
        try:
            if given.watch is None:
                console.print(shown(look(given.study, given.all)))
            else:
                watch(given.study, given.all, given.watch, console)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
