"""Units of size. Everything in the project counts bytes unless a name says otherwise."""

SECTOR = 512
KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB


def round_down(value: int, unit: int) -> int:
    """The largest multiple of ``unit`` that is at most ``value``."""
    return value - value % unit


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is at least ``value``."""
    return -(-value // unit) * unit


def human(size: float) -> str:
    """``size`` bytes for a person to read, in IEC units: ``human(1536) == '1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < KiB:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= KiB
    return f"{size:.1f} TiB"
