"""User errors, reported in one line, and the checks of plain values that raise them."""

from __future__ import annotations

import math
from typing import Any


class InputError(ValueError):
    """A user error: one line that names the file, flag or value, what was expected and what to do."""


def one_line(text: object, limit: int = 600) -> str:
    """Fold any text to a single line of at most `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def check_fraction(flag: str, value: float) -> float:
    """Return `value` if it lies in [0, 1]; raises InputError naming `flag` otherwise."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{flag} {value:g}: expected a number from 0 to 1")
    return value


def check_positive(flag: str, value: float) -> float:
    """Return `value` if it is finite and above 0; raises InputError naming `flag` otherwise."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{flag} {value:g}: expected a number above 0")
    return value


def check_at_least(least: float, arguments: Any, *names: str) -> None:
    """Check that each flag in `names` that has a value is `least` or more. Raises InputError."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name} {value}: expected {least} or more")
