"""The door `python -m normbench.report`: a study as one HTML page that opens from disk, or as Markdown.

python -m normbench.report outputs/mbn_stride --margin test_acc=0.005
python -m normbench.report outputs/mbn_stride --watch
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from normbench.doors import one_line_errors, say
from normbench.overview import look
from normbench.profile.record import read_profile
from normbench.results import session_names
from normbench.stats.choices import add_choices, check_choices
from normbench.status import headline, seconds
from normbench.values import Refused

MOST_AT_ONCE = 4  # processes that draw; one where a sweep is watched, whose times matter more


def parser() -> argparse.ArgumentParser:
    """The door's options."""
    made = argparse.ArgumentParser(
        prog="normbench report",
        description="Gather a study on one page: finding, tables, figures, warnings, provenance.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("study", type=Path, nargs="?", default=Path("outputs/adhoc"),
        help="a study's folder (default: outputs/adhoc)")  # fmt: skip
    add_choices(made)
    add("--profile", type=Path, metavar="FOLDER",
        help="layer times that `profile` wrote (default: the newest below the study's profile/)")  # fmt: skip
    add("--format", choices=("html", "md"), default="html", help="report.html, or report.md (default: html)")
    add("--out", type=Path, metavar="FOLDER",
        help="for the report, comparisons.csv and figures/ (default: the study's folder)")  # fmt: skip
    add("--watch", type=seconds, nargs="?", const=30.0, metavar="SECONDS",
        help="write it again every so many seconds (30) where something changed, until all has ended; "
        "the page loads itself anew")  # fmt: skip
    return made


def main() -> None:
    """The door."""
    given = parser().parse_args()
    with one_line_errors("report"):
        check(given)
        if given.watch is None:
            say(f"written: {', '.join(map(str, write(given)))}")
        else:
            watch(given)


def check(given: argparse.Namespace) -> None:
    """Refuse what is wrong before anything dear is imported."""
    check_choices(given)
    if given.study.is_file():
        raise Refused(f"{given.study} is a file; give a study's folder like outputs/adhoc")
    if given.out is not None and not given.out.is_dir() and given.out.exists():
        raise Refused(f"--out={given.out} is a file; give a folder")
    look(given.study, given.all)
    if given.profile is not None:
        read_profile("--profile", str(given.profile))


def write(given: argparse.Namespace, patient: bool = False, reload_s: float | None = None) -> list[Path]:
    """Read the study, write the report and what it rests on; returns the files a person opens."""
    from normbench.plan import write_whole
    from normbench.report.layers import profile_of
    from normbench.report.markdown import markdown_of
    from normbench.report.page import html_of
    from normbench.report.sections import Builder
    from normbench.report.study import read_study
    from normbench.stats import tables

    study = read_study(given.study, given, patient)
    folder: Path = given.out or given.study
    profile = profile_of(given.study, given.profile, study.notices)
    written = [tables.write(study.analysis, folder)] if study.analysis else []
    typed = sys.argv[1:]
    at_once = 1 if given.watch else min(MOST_AT_ONCE, os.cpu_count() or 1)
    report = Builder(study, folder, profile, typed, comparison_options(given), at_once).report(made_by())
    path = folder / f"report.{given.format}"
    write_whole(path, markdown_of(report, folder) if given.format == "md" else html_of(report, reload_s))
    return [path, *written]


def comparison_options(given: argparse.Namespace) -> list[str]:
    """The options that `stats` takes too, as a person types them."""
    choices = argparse.ArgumentParser()
    add_choices(choices)
    words: list[str] = []
    for action in choices._actions[1:]:
        value = getattr(given, action.dest)
        if value == action.default:
            continue
        option = action.option_strings[0]
        if value is True:
            words.append(option)
        else:
            words += [
                word
                for item in (value if isinstance(value, list) else [value])
                for word in (option, str(item))
            ]
    return words


def made_by() -> str:
    """When and by which versions the page was made."""
    from importlib.metadata import version

    packages = ("numpy", "scipy", "statsmodels", "pandas", "matplotlib")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    now, python = f"{datetime.now(UTC):%Y-%m-%d %H:%M}", platform.python_version()
    return f"Made {now} UTC by normbench on Python {python}, {versions}."


def watch(given: argparse.Namespace) -> None:
    """Write the report whenever a session's files have changed, until all has ended."""
    os.nice(19)  # a page takes seconds of a core, and what trains beside it is timed
    seen: Sequence[object] | None = None
    try:
        while True:
            now = state_of(given)
            sweep = look(given.study, given.all)
            if now != seen or sweep.ended:
                seen = now
                try:
                    path, *_ = write(given, patient=True, reload_s=None if sweep.ended else given.watch)
                    say(f"{sweep.now:%Y-%m-%d %H:%M:%S}Z  {headline(sweep)}; written: {path}")
                except Refused as refused:
                    if sweep.ended:
                        raise
                    say(f"{sweep.now:%Y-%m-%d %H:%M:%S}Z  {refused}; looks again", error=True)
            if sweep.ended:
                return
            time.sleep(given.watch)
    except KeyboardInterrupt:
        write(given, patient=True)  # a page that nobody keeps up to date need not load itself anew


def state_of(given: argparse.Namespace) -> list[object]:
    """What the page rests on: names, sizes and times of the sessions' files, the plans and the profile."""
    folders = [given.study / name for name in session_names(given.study)]
    files = [folder / name for folder in folders for name in ("session.json", "failure.json", "epochs.csv")]
    files += [*given.study.glob("plan-*.json"), *given.study.glob("profile/*/profile.json")]
    states: list[object] = []
    for path in files:
        try:
            at = path.stat()
        except OSError:
            continue
        states.append((str(path), at.st_mtime_ns, at.st_size))
    return states


if __name__ == "__main__":
    main()
