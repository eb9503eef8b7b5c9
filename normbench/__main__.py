"""`normbench <door> …` and `python -m normbench <door> …`.

eval "$(normbench -sc install=bash)"        completes doors, groups, keys and values (zsh and fish likewise)
"""

import os
import runpy
import sys

from normbench.values import nearest

DOORS = {
    "train": "train one session, or a sweep of them",
    "audit": "check one norm layer, yours included, against the contract",
    "lr_limit": "the largest learning rate that still trains, per norm, with its interval",
    "bench": "how fast the layers, a step, the data, sweeps are: ratios with spread",
    "profile": "what a model's norm layers cost, alone and inside the running step",
    "stats": "compare the arms of a study",
    "traces": "figures of what trace=norms and trace=features saw",
    "report": "a study on one page: finding, tables, figures, warnings, provenance",
    "status": "what a sweep has done, is doing, has failed; time to go",
    "predict": "predict images with a session's weights; accuracy, F1, confusion where labels are known",
    "results": "rebuild results.csv from the sessions' own files",
}
HYDRA_DOORS = ("train", "audit", "lr_limit", "bench", "profile")


def main() -> None:
    """Open the door that the first argument names."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("-h", "--help"):
        print("normbench <door> …\n\n" + "\n".join(f"  {name:8} {what}" for name, what in DOORS.items()))
    elif first in ("-sc", "--shell-completion"):
        complete(sys.argv[2:])
    elif first in DOORS:
        open_door(first, sys.argv[2:], f"normbench {first}")
    else:
        there = f"there are {', '.join(DOORS)}"
        print(f"normbench: no door {first!r}{nearest(first, DOORS)}; {there}", file=sys.stderr)
        sys.exit(2)


def open_door(door: str, arguments: list[str], program: str) -> None:
    """Run one door's module with these arguments."""
    sys.argv = [program, *arguments]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # where one's own layers are, as with python -m
    runpy.run_module(f"normbench.{door}", run_name="__main__")


def complete(arguments: list[str]) -> None:
    """Hydra's completion, with the door taken out of the line that it completes."""
    words = os.environ.get("COMP_LINE", "").split()
    if not any(a.startswith("query=") for a in arguments):
        open_door("train", ["-sc", *arguments], "normbench")
    elif len(words) < 2 or (len(words) == 2 and not os.environ["COMP_LINE"].endswith(" ")):
        print(" ".join(door for door in DOORS if door.startswith(words[1] if len(words) == 2 else "")))
    elif words[1] in HYDRA_DOORS:
        typed = os.environ["COMP_LINE"].split(maxsplit=1)[1].removeprefix(words[1])
        os.environ["COMP_LINE"] = f"normbench{typed}"
        open_door(words[1], ["-sc", *arguments], "normbench")


if __name__ == "__main__":
    main()
