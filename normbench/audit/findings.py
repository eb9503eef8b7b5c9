"""What a check answers: pass, warn or fail, with what was seen."""

from dataclasses import dataclass

PASS, WARN, FAIL = "pass", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One row of a card."""

    check: str
    status: str
    seen: str


class Broken(Exception):
    """What a check found wrong; its text is the row of the card."""


class Doubtful(Exception):
    """What a check found unusual: right for some layers, a mistake in others."""


def require(holds: bool, otherwise: str) -> None:
    """Broken where it does not hold."""
    if not holds:
        raise Broken(otherwise)
