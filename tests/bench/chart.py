"""A chart of throughput by tool, as SVG, drawn by hand: bars need no library."""

from __future__ import annotations

from collections.abc import Sequence
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


def draw(rows: Sequence[Row], limits: dict[str, str], caption: str) -> str:
    """The SVG document. ``limits`` names, for a work, the work that is its limit."""
    parts, y = [], TITLE
    by_work: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds > 0 and row.bytes_in > 0:
            by_work.setdefault(row.work, []).append(row)
    for work in [work for work in by_work if work not in limits.values()]:
        bars = sorted([*by_work[work], *by_work.get(limits.get(work, ""), [])], key=speed, reverse=True)
        if len(bars) > 1:
            drawn, y = _work(work, bars, y)
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


def _work(work: str, bars: Sequence[Row], y: int) -> tuple[list[str], int]:
    parts = [f'<text x="10" y="{y + 18}" font-weight="bold">{escape(work)}</text>']
    y += 28
    scale = (WIDTH - LABEL - 110) / speed(bars[0])
    for row in bars:
        width = max(1.0, speed(row) * scale)
        colour = COLOURS.get(row.tool, PEER)
        parts.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row.tool)}</text>')
        parts.append(f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(f'<text x="{LABEL + width + 6:.1f}" y="{y + 15}" fill="#57606a">{speed(row):.0f} MiB/s</text>')
        y += BAR + GAP
    return parts, y + 8
