"""Values for people to read."""

from __future__ import annotations

from datetime import UTC, datetime

from vmbackupd import units


def moment(value: object) -> str:
    """A point in time, in UTC: from Unix seconds, or from text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    try:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        return str(value)


def precise_moment(value: object) -> str:
    """:func:`moment` with milliseconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return moment(value)
    return f"{moment(value).removesuffix('Z')}.{int(value * 1000) % 1000:03d}Z"


def amount(value: object) -> str:
    """A number of bytes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return units.human(value)


def word(value: object) -> str:
    """Anything else on one line: nothing for None, lists with commas."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(word(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={word(inner)}" for key, inner in value.items())
    return printable(str(value))


def printable(value: str) -> str:
    """``value`` without control characters, which a guest may have put there."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
