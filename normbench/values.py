"""What a value may be: checks shared by configuration, layers, models and data, each with one wording."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


class Refused(ValueError):
    """A person's mistake; its text is the one line the person reads. The doors exit with code 2."""


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """What `name` was probably meant to be, if anything allowed looks like it."""
    lower = {str(a).lower(): str(a) for a in allowed}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.55)
    return lower[close[0]] if close else None


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'stride'?` when something allowed looks like `name`, else the empty string."""
    close = closest(name, allowed)
    return f"; did you mean {close!r}?" if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def int_from(key: str, value: Any, low: int) -> int:
    """An int not below `low`; ValueError otherwise."""
    if not _is_int(value) or value < low:
        raise ValueError(f"{key} must be an int ≥ {low}, got {value!r}")
    return int(value)


def positive_int(key: str, value: Any) -> int:
    """An int ≥ 1; ValueError otherwise."""
    return int_from(key, value, 1)


def number_from(key: str, value: Any, low: float) -> float:
    """A finite number not below `low`; ValueError otherwise."""
    if not _is_number(value) or value < low:
        raise ValueError(f"{key} must be a number ≥ {low:g}, got {value!r}")
    return float(value)


def above_zero(key: str, value: Any) -> float:
    """A finite number > 0; ValueError otherwise."""
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{key} must be a number > 0, got {value!r}")
    return float(value)


def fraction(key: str, value: Any) -> float:
    """A number from 0 to 1, both included; ValueError otherwise."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{key} must be a number from 0 to 1, got {value!r}")
    return float(value)


def below_one(key: str, value: Any) -> float:
    """A number from 0 up to but not including 1; ValueError otherwise."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{key} must be a number ≥ 0 and < 1, got {value!r}")
    return float(value)


def flag(key: str, value: Any) -> bool:
    """True or False; ValueError otherwise (the string "False" is not False)."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value


def one_of(key: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the `allowed` names; ValueError naming the nearest otherwise."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{key} must be one of {', '.join(names)}, got {value!r}{nearest(value, names)}")
    return str(value)
