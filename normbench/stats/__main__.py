"""The door `python -m normbench.stats`: every arm against a baseline, and a verdict with its reason.

python -m normbench.stats outputs/adhoc --baseline obn
python -m normbench.stats OBN=obn.csv MBN=mbn.csv --margin test_acc=0.01
python -m normbench.stats --plan --sd 0.0018 --difference 0.001
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from normbench.doors import one_line_errors
from normbench.stats.choices import add_choices, analysis_of, check_choices, columns_of, margins_of
from normbench.values import Refused


def parser() -> argparse.ArgumentParser:
    """The door's options."""
    made = argparse.ArgumentParser(
        prog="normbench stats",
        description="Compare every arm with a baseline: a verdict, its reason, and all the numbers.",
        epilog="How verdicts are given: the README, or normbench/stats/verdicts.py.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a study's folder, a results CSV, a glob, or name=file.csv in the studies' format "
        "Model No.,Time(s),Accuracy (default: outputs/adhoc)",
    )
    add_choices(made)
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for comparisons.csv and figures (default: the study's folder, else here)",
    )
    add("--figures", action="store_true", help="draw sessions, differences and launch order as PNG files")
    add("--format", choices=("text", "md", "latex"), default="text", help="tables as text, Markdown or LaTeX")
    add("--json", action="store_true", help="print everything as JSON instead of tables")
    plan = made.add_argument_group("planning")
    plan.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="PILOT",
        help="print the sessions needed; with a pilot's folder or CSV, by the sd of its rows",
    )
    plan.add_argument("--sd", type=float, metavar="X", help="standard deviation of one session")
    plan.add_argument(
        "--difference",
        action="append",
        metavar="[METRIC=]X",
        help="the smallest true difference worth finding",
    )
    plan.add_argument(
        "--correlation",
        type=float,
        metavar="R",
        help="of sessions that share random numbers: plan for the paired test",
    )
    plan.add_argument(
        "--comparisons",
        type=int,
        metavar="N",
        help="how many tests will share alpha (default: 1, or the pilot's)",
    )
    return made


def main() -> None:
    """The door."""
    arguments = parser().parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without ± still gets its table
    with one_line_errors("stats"):
        check(arguments)
        try:
            (report if arguments.plan is None else plan)(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, like `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is out of range or does not go together."""
    check_choices(arguments)
    if arguments.comparisons is not None and arguments.comparisons < 1:
        raise Refused(f"--comparisons must be an int ≥ 1, got {arguments.comparisons}")
    if arguments.plan is None:
        for name in ("sd", "difference", "correlation", "comparisons"):
            if getattr(arguments, name) is not None:
                raise Refused(f"--{name} belongs to planning; add --plan")
    else:
        check_plan(arguments)


def check_plan(arguments: argparse.Namespace) -> None:
    """Refuse what a plan would not use."""
    if arguments.inputs:
        raise Refused(f"--plan takes one pilot; {' '.join(arguments.inputs)} would not be read")
    useless = ["metric", "test_images", "look_every", "out", "figures", "json"]
    useless += [] if arguments.plan else ["baseline", "by", "all"]
    for name in useless:
        if getattr(arguments, name):
            raise Refused(f"--{name.replace('_', '-')} does nothing with --plan; leave it out")
    if arguments.format != "text":
        raise Refused("--format does nothing with --plan; leave it out")


def report(arguments: argparse.Namespace) -> None:
    """Read, test, print, write."""
    inputs = arguments.inputs or ["outputs/adhoc"]
    analysis = analysis_of(inputs, arguments)

    from normbench.stats import tables  # dear, as all that follows; what is read may be refused first

    where = " ".join(inputs)
    folder = arguments.out or analysis.sessions.folder or Path()
    written = [tables.write(analysis, folder)]
    if arguments.figures:
        from normbench.stats.figures import draw

        written += draw(analysis, folder)
    if arguments.json:
        print(tables.json_text(analysis, where))
    elif arguments.format == "md":
        print(tables.markdown(analysis, where), end="")
    elif arguments.format == "latex":
        print(tables.latex(analysis, where), end="")
    else:
        console = Console() if sys.stdout.isatty() else tables.plain_console()
        print(tables.text(analysis, where, console))
        print("written: " + ", ".join(map(str, written)))


def plan(arguments: argparse.Namespace) -> None:
    """Print the sessions that a question needs."""
    from normbench.stats.planning import Question

    if arguments.plan:
        plan_by_pilot(arguments)
        return
    if arguments.sd is None:
        raise Refused("--plan needs --sd, or a pilot: --plan outputs/pilot")
    difference, margin = (
        one_number(name, texts)
        for name, texts in (("difference", arguments.difference), ("margin", arguments.margin))
    )
    comparisons = 1 if arguments.comparisons is None else arguments.comparisons
    question = Question(
        arguments.sd, arguments.alpha, arguments.power, difference, margin, arguments.correlation, comparisons
    )
    for line in question.describe():
        print(line)


def plan_by_pilot(arguments: argparse.Namespace) -> None:
    """The same, with the spread from a pilot's rows."""
    from normbench.stats.comparison import Options
    from normbench.stats.pilot import sessions_needed

    for name in ("sd", "correlation"):
        if getattr(arguments, name) is not None:
            raise Refused(f"--plan {arguments.plan}: the pilot's rows give the sd; leave --{name} out")
    if not (arguments.difference or arguments.margin):
        raise Refused("--plan needs --difference (to be found) or --margin (to be equivalent within)")
    differences: dict[str, float] = {}
    for text in arguments.difference or []:
        name, value = named_number("difference", text)
        if name in differences:
            raise Refused(f"--difference {text}: {name} has two")
        differences[name] = value
    names = [text.rpartition("=")[0] or "test_acc" for text in arguments.margin or []]
    texts = [text if "=" in text else f"test_acc={text}" for text in arguments.margin or []]
    options = Options(
        arguments.alpha, arguments.power, margins_of(texts, names), resamples=0, seed=arguments.seed
    )
    by = columns_of(arguments.by)
    for line in sessions_needed(arguments.plan, options, differences, arguments.baseline, by,
                                arguments.comparisons, arguments.all):  # fmt: skip
        print(line)


def named_number(option: str, text: str) -> tuple[str, float]:
    """`test_acc=0.001`, or `0.001` of test_acc."""
    name, _, value = text.rpartition("=")
    return name or "test_acc", positive(option, value)


def one_number(option: str, texts: Sequence[str] | None) -> float | None:
    """The one value that a plan without rows can use."""
    if not texts:
        return None
    if len(texts) > 1:
        raise Refused(f"--{option}: give it once with --plan --sd")
    return positive(option, texts[0].rpartition("=")[2])


def positive(option: str, text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise Refused(f"--{option} must be a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    main()
