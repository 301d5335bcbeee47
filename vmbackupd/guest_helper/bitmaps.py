"""Bitmaps with one bit for each chunk of a disk, bit i of byte i // 8 counted from the least significant."""

import re
from typing import Iterator, List, Tuple, Union

CHUNK = 65536
"""Bytes of a disk that one bit stands for."""

Buffer = Union[bytes, bytearray, memoryview]
Run = Tuple[int, int]
"""Chunks from the first up to, and without, the second."""

_PARTS = re.compile(b"\xff+|[^\0]")


def chunks_of(size: int) -> int:
    """How many chunks ``size`` bytes have; the last may be short."""
    return -(-size // CHUNK)


def length(chunks: int) -> int:
    """Bytes of a bitmap of so many chunks."""
    return -(-chunks // 8)


def runs(bitmap: Buffer, chunks: int) -> Iterator[Run]:
    """The runs of set bits among the first ``chunks``, in their order. Costs little where nothing is set."""
    first = end = 0
    for part in _PARTS.finditer(bitmap):
        at, stop = part.span()
        spans = [(0, (stop - at) * 8)] if bitmap[at] == 0xFF else _RUNS[bitmap[at]]
        for begin, over in spans:
            if at * 8 + begin != end:
                if first < min(end, chunks):
                    yield first, min(end, chunks)
                first = at * 8 + begin
            end = at * 8 + over
    if first < min(end, chunks):
        yield first, min(end, chunks)


def mark(bitmap: "bytearray | memoryview", first: int, end: int) -> None:
    """Set the bits ``first`` to ``end - 1``."""
    if first >= end:
        return
    low, high = first // 8, (end - 1) // 8
    head, tail = 0xFF << first % 8 & 0xFF, 0xFF >> 7 - (end - 1) % 8
    if low == high:
        bitmap[low] |= head & tail
        return
    bitmap[low] |= head
    bitmap[high] |= tail
    bitmap[low + 1 : high] = b"\xff" * (high - low - 1)


def clear(bitmap: bytearray, first: int, end: int) -> None:
    """Clear the bits ``first`` to ``end - 1``."""
    if first >= end:
        return
    low, high = first // 8, (end - 1) // 8
    head, tail = 0xFF << first % 8 & 0xFF, 0xFF >> 7 - (end - 1) % 8
    if low == high:
        bitmap[low] &= ~(head & tail) & 0xFF
        return
    bitmap[low] &= ~head & 0xFF
    bitmap[high] &= ~tail & 0xFF
    bitmap[low + 1 : high] = bytes(high - low - 1)


def _runs_of(value: int) -> List[Run]:
    found: List[Run] = []
    for bit in range(8):
        if value >> bit & 1:
            if found and found[-1][1] == bit:
                found[-1] = (found[-1][0], bit + 1)
            else:
                found.append((bit, bit + 1))
    return found


_RUNS = [_runs_of(value) for value in range(256)]
