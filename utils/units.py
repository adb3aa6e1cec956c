"""Bytes and seconds as people read them."""

from __future__ import annotations


def size_text(count: float) -> str:
    """A number of bytes with its unit, decimal: 999 B, 1.5 kB, 12.0 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def time_text(seconds: float | None) -> str:
    """Seconds in the largest unit of which there are two: 90.0 s, 2.5 min, 3.0 days; – where unknown."""
    if seconds is None:
        return "–"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
