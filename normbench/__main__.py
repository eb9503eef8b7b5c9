"""`normbench <door> …` and `python -m normbench <door> …`."""

import runpy
import sys

DOORS = {
    "train": "train one session, or a sweep of them",
    "stats": "compare the arms of a study",
    "results": "rebuild results.csv from the sessions' own files",
}


def main() -> None:
    """Open the door that the first argument names."""
    door = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if door in ("-h", "--help"):
        print("normbench <door> …\n\n" + "\n".join(f"  {name:8} {what}" for name, what in DOORS.items()))
        return
    if door not in DOORS:
        from normbench.values import nearest

        print(
            f"normbench: no door {door!r}{nearest(door, DOORS)}; there are {', '.join(DOORS)}",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = [f"normbench {door}", *sys.argv[2:]]
    runpy.run_module(f"normbench.{door}", run_name="__main__")


if __name__ == "__main__":
    main()
