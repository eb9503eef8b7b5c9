"""Which code a plan runs on: one hash, so that a job that starts later refuses other code than was meant.

A process that starts after an edit would train with the new layers and the old configuration. The plan holds
the configuration; this hash holds the code: normbench's own files, and the files of layers from outside it.
"""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from normbench.config import conf_dir
from normbench.plan import Plan
from normbench.values import Refused


def code_hash(plan: Plan) -> str:
    """Hash of every Python file of normbench and of the modules that the plan's arms name in `_target_`."""
    digest = hashlib.sha256(own_hash().encode())
    for path in strangers(plan):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:10]


@cache
def own_hash() -> str:
    """Of the package as it was when this process first asked."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*.py") if conf_dir() not in path.parents):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def strangers(plan: Plan) -> list[Path]:
    """The files of `_target_`s outside normbench and installed packages, sorted by name."""
    paths = set()
    for arm in plan.arms:
        for node in arm.values.values():
            target = node.get("_target_") if isinstance(node, dict) else None
            if target is not None and (path := source_of(str(target))) is not None:
                paths.add(path)
    return sorted(paths)


@cache
def source_of(target: str) -> Path | None:
    """The file of the module in `package.module.Class`; None for ours, installed ones, and one not found."""
    name = target
    while "." in name:
        name = name.rpartition(".")[0]
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # their package may fail to import in any way; the session will say so
            continue
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin)
            outside = name.partition(".")[0] != "normbench" and "site-packages" not in path.parts
            return path if outside and path.is_file() else None
    return None


def check_code(plan: Plan, expected: str | None) -> None:
    """Refused where this process would run other code than the command that made the plan."""
    if expected is None or (found := code_hash(plan)) == expected:
        return
    raise Refused(
        f"the code is not what was submitted ({found}, not {expected}): it was edited since; "
        "give the command again, or put the code back"
    )
