"""The memory that a disk's programs mark changed chunks in, and what has been collected of it.

It is the value of one BPF map, so it outlives this process. A first page with flags and a record; two sides, of which
programs mark one, with a byte for each chunk of 64 KiB and one for each group; and the bitmap of all that was collected
since the record's generation. What is moved from a side is in the bitmap before it is cleared: a process that dies at
any point loses nothing.
"""

import json
import mmap
import struct
import zlib
from typing import Any, Dict, NamedTuple, Optional

from . import bpf
from .bitmaps import chunks_of, length
from .program import BEYOND, FLAGS, GROUP, LOST, PAGE, PASSED

_PAGE = 1 << PAGE
_ZEROS = bytes(_PAGE)
_DIGITS = b"0" + b"1" * 255  # of a mark
_RECORD, _HEADER = 64, struct.Struct("=II")
_WHY = {
    PASSED: "a program in the guest sent the disk commands of its own",
    BEYOND: "something was written behind the disk's former end",
    LOST: "a request had more parts than are followed",
}


class Layout(NamedTuple):
    """Where everything is, in bytes from the start; side 1 lies ``stride`` bytes behind side 0."""

    chunks: int
    fine: int
    coarse: int
    stride: int
    changed: int
    length: int


def layout(size: int) -> Layout:
    """That of a disk of ``size`` bytes."""
    chunks = chunks_of(size)
    fine, coarse = _pages(chunks), _pages(-(-chunks >> GROUP))
    stride = fine + coarse
    changed = _PAGE + 2 * stride
    return Layout(chunks, _PAGE, _PAGE + fine, stride, changed, changed + _pages(length(chunks)))


class Marks:
    """One disk's. ``changed``: one bit for each chunk that changed since the generation, as far as it was collected,
    least significant first; ``fresh``: those that the latest :meth:`take` gave out. Forked children see both."""

    def __init__(self, descriptor: int, where: Layout) -> None:
        self.where = where
        self._memory = bpf.map_memory(descriptor, where.length)
        self._length = length(where.chunks)
        view = memoryview(self._memory)
        self.changed = view[where.changed : where.changed + self._length]
        self.fresh = memoryview(mmap.mmap(-1, self._length))
        self._moved = bytearray(self._length)  # since the latest take
        self.why = ""

    def record(self) -> Optional[Dict[str, Any]]:
        """What was kept; None when it is damaged."""
        count, check = _HEADER.unpack_from(self._memory, _RECORD)
        text = self._memory[_RECORD + _HEADER.size : min(_RECORD + _HEADER.size + count, _PAGE)]
        if len(text) != count or zlib.crc32(text) != check:
            return None
        try:
            record = json.loads(text.decode())
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    def keep(self, record: Dict[str, Any]) -> None:
        """Replace the record. A death half way leaves a damaged one."""
        text = json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
        if _RECORD + _HEADER.size + len(text) > _PAGE:
            raise ValueError("the record of a disk has %d bytes" % len(text))
        self._memory[_RECORD : _RECORD + _HEADER.size] = bytes(_HEADER.size)
        self._memory[_RECORD + _HEADER.size : _RECORD + _HEADER.size + len(text)] = text
        _HEADER.pack_into(self._memory, _RECORD, len(text), zlib.crc32(text))

    def move(self, side: int) -> None:
        """Collect what is marked on a side that no program marks now, and clear it."""
        flags = bytes(self._memory[side * FLAGS : (side + 1) * FLAGS])
        for flag in _WHY:
            if flags[flag]:
                self.everything(_WHY[flag])
        fine = self.where.fine + side * self.where.stride
        for at in range(fine, fine + _pages(self.where.chunks), _PAGE):
            page = self._memory[at : at + _PAGE]
            if page != _ZEROS:
                bits = int(page.translate(_DIGITS)[::-1], 2).to_bytes(_PAGE // 8, "little")
                self._add((at - fine) // 8, bits)
                self._memory[at : at + _PAGE] = _ZEROS
        self._move_groups(side)
        self._memory[side * FLAGS : (side + 1) * FLAGS] = bytes(FLAGS)

    def mark(self, side: int, first: int, end: int) -> None:
        """Mark chunks ``first`` to ``end - 1`` as programs do."""
        start = self.where.fine + side * self.where.stride
        self._memory[start + first : start + end] = b"\1" * (end - first)

    def _move_groups(self, side: int) -> None:
        coarse, bits = self.where.coarse + side * self.where.stride, b"\xff" * ((1 << GROUP) // 8)
        end = self.where.fine + (side + 1) * self.where.stride
        for at in range(coarse, end, _PAGE):
            page = self._memory[at : at + _PAGE]
            if page != _ZEROS:
                for number, mark in enumerate(page, at - coarse):
                    if mark:
                        self._add(number * len(bits), bits)
                self._memory[at : at + _PAGE] = _ZEROS

    def everything(self, why: str) -> None:
        """All chunks count as changed."""
        self.why = why
        self._add(0, b"\xff" * self._length)

    def take(self) -> int:
        """Give out in ``fresh`` what was moved since the last time; the number of chunks."""
        self.fresh[:] = bytes(self._moved)
        self._moved = bytearray(self._length)
        pieces = (self.fresh[at : at + _PAGE] for at in range(0, self._length, _PAGE))
        return sum(bin(int.from_bytes(piece, "little")).count("1") for piece in pieces)

    def forget(self) -> None:
        """Nothing has changed since the generation, as far as it was collected."""
        self.changed[:] = bytes(self._length)

    def _add(self, start: int, bits: bytes) -> None:
        """Bits from byte ``start`` of the bitmap on; those behind the last chunk are dropped."""
        end = min(start + len(bits), self._length)
        added = int.from_bytes(bits[: end - start], "little")
        if end * 8 > self.where.chunks:
            added &= (1 << self.where.chunks - start * 8) - 1
        for bitmap in (self.changed, self._moved):
            old = int.from_bytes(bitmap[start:end], "little")
            bitmap[start:end] = (old | added).to_bytes(end - start, "little")


def _pages(length: int) -> int:
    """``length`` bytes in whole pages."""
    return -(-length // _PAGE) * _PAGE
