"""Figures of a study's traces.

python -m normbench.traces outputs/adhoc              SVG files by layer and arm, under its figures/
python -m normbench.traces outputs/adhoc --session 3  of session 3 alone
"""

import argparse
from pathlib import Path

from normbench.doors import one_line_errors, say
from normbench.results import session_names
from normbench.values import Refused


def main() -> None:
    """The door."""
    parser = argparse.ArgumentParser(prog="normbench traces", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("outputs/adhoc"),
                        help="a study's folder (default: outputs/adhoc)")  # fmt: skip
    parser.add_argument("--session", help="draw this session alone: 3, or its folder's name like seed1-s3")
    given = parser.parse_args()
    study, session = given.study, given.session
    if session is not None and session.isdigit():
        session = f"s{session}"
    with one_line_errors("traces"):
        names = list(session_names(study))
        if not names:
            raise Refused(f"no sessions under {study}; give a study's folder like outputs/adhoc")
        there = sorted({name.split("/")[1] for name in names})
        if session is not None and session not in there:
            raise Refused(f"--session {given.session}: no such session; there are {', '.join(there[:8])}")
        from normbench.traces.figures import draw  # dear to import, so after what may be refused

        notices: list[str] = []
        paths = draw(study, session, notices)
        for notice in notices:
            say(f"passed over: {notice}", error=True)
        if not paths:
            raise Refused(f"no traces under {study}; train with trace=norms, trace=features or both")
    for path in paths:
        say(f"written: {path}")


if __name__ == "__main__":
    main()
