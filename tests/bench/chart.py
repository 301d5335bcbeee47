"""A chart of throughput by tool, or of time where less is better, as SVG, drawn by hand: bars need no library."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

from tests.bench.table import Row
from tests.bench.works import LIMIT, OURS

WIDTH = 760
LABEL = 130
BAR = 20
GAP = 6
TITLE = 34
COLOURS = {OURS: "#1f6feb", LIMIT: "#8c959f"}
PEER = "#bf8700"


def draw(rows: Sequence[Row], limits: dict[str, str], caption: str, by_time: Collection[str] = ()) -> str:
    """The SVG document. ``limits`` names, for a work, the work that is its limit; of ``by_time`` the seconds count."""
    parts, y = [], TITLE
    by_work: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds > 0 and (row.bytes_in > 0 or row.work in by_time):
            by_work.setdefault(row.work, []).append(row)
    for work in [work for work in by_work if work not in limits.values()]:
        bars = [*by_work[work], *by_work.get(limits.get(work, ""), [])]
        if len(bars) > 1:
            drawn, y = _timed(work, bars, y) if work in by_time else _work(work, bars, y)
            parts += drawn
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="10" y="20" fill="#57606a">{escape(caption)}</text>\n{body}\n</svg>\n'
    )


def speed(row: Row) -> float:
    """MiB of the image's data in a second."""
    return row.bytes_in / row.seconds / 2**20


def _work(work: str, rows: Sequence[Row], y: int) -> tuple[list[str], int]:
    bars = sorted(rows, key=speed, reverse=True)
    return _bars(work, [(row.tool, speed(row), f"{speed(row):.0f} MiB/s") for row in bars], y)


def _timed(work: str, rows: Sequence[Row], y: int) -> tuple[list[str], int]:
    bars = sorted(rows, key=lambda row: row.seconds)
    return _bars(f"{work} (shorter is better)", [(row.tool, row.seconds, _duration(row.seconds)) for row in bars], y)


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _bars(title: str, bars: Sequence[tuple[str, float, str]], y: int) -> tuple[list[str], int]:
    """A title and a bar for each (tool, value, label); the y below them."""
    parts = [f'<text x="10" y="{y + 18}" font-weight="bold">{escape(title)}</text>']
    y += 28
    scale = (WIDTH - LABEL - 110) / max(value for _, value, _ in bars)
    for tool, value, label in bars:
        width = max(1.0, value * scale)
        colour = COLOURS.get(tool, PEER)
        parts.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(tool)}</text>')
        parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(f'<text x="{LABEL + width + 6:.1f}" y="{y + 15}" fill="#57606a">{escape(label)}</text>')
        y += BAR + GAP
    return parts, y + 8
