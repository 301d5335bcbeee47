"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[str] = frozenset()) -> str:
    """``rows`` under ``head``, columns two spaces apart; columns named in ``right`` are aligned to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def format_line(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) if name in right else cell.ljust(width)
                 for cell, width, name in zip(line, widths, head, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join(format_line(line) for line in lines)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """``name: value`` lines with the values in one column; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in shown)
