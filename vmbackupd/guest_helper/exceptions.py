"""Which chunks of a disk were overwritten since T1: read from the COW stores while the kernel goes on writing them.

The store (drivers/md/dm-snap-persistent.c), in chunks: a header, then areas, each one chunk of entries followed by the
chunks whose places it lists. An entry is (chunk of the volume, chunk of the store), both u64, little-endian; the first
with 0 as its second ends the list. The kernel completes an entry before it lets the write pass that made it
necessary. So bytes that were read from the volume's own disk are those of T1 if, afterwards, there is no entry for
them here. An area is zeroed before the one before it gets its last entry, and entries never change, so a later look
goes on at the last area that had any: its writing may have been half done when it was read.
"""

import bisect
import struct
from typing import List, Sequence, Tuple

from .bitmaps import CHUNK, chunks_of, length, mark
from .blocks import Table
from .failures import HelperError
from .image import PIECE, Device
from .stack import SECTOR, Piece

MAGIC, VERSION = 0x70416E53, 1
_HEADER, _ENTRY = struct.Struct("<4I"), struct.Struct("<2Q")
_TRIES = 3  # an entry that is being written may look damaged


class Store:
    """The entries of one COW store."""

    def __init__(self, device: Device, volume_size: int) -> None:
        """``volume_size``: bytes of the volume whose old chunks it keeps."""
        self._device, self._volume_size, self._area = device, volume_size, 0

    def ranges(self) -> List[Tuple[int, int]]:
        """(start, end) bytes of the volume that have an entry, sorted; after the first call those that are new, and
        some of the last. Raises ``OSError``, or ``HelperError`` when the store is full or damaged: then nobody knows.
        """
        chunk = self._header()
        found = entries = self._entries(self._area, chunk)
        while len(entries) == chunk // _ENTRY.size:
            entries = self._entries(self._area + 1, chunk)
            if not entries:
                break
            found, self._area = found + entries, self._area + 1
        self._header()  # invalid by now, it may have missed a write
        ranges: List[Tuple[int, int]] = []
        for old in sorted(found):
            start, end = old * chunk, min((old + 1) * chunk, self._volume_size)
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, end))
        return ranges

    def _header(self) -> int:
        """Bytes of a chunk."""
        magic, valid, version, sectors = _HEADER.unpack(self._device.read(0, _HEADER.size))
        if magic != MAGIC or version != VERSION or valid != 1:
            raise HelperError("StoreInvalid", "a COW store has overflowed, or is none any more")
        if not 0 < sectors <= PIECE // SECTOR or sectors & (sectors - 1):
            raise HelperError("StoreInvalid", "a COW store claims chunks of %d sectors" % sectors)
        return int(sectors) * SECTOR

    def _entries(self, area: int, chunk: int) -> List[int]:
        """The volume's chunks in an area."""
        place = 1 + (chunk // _ENTRY.size + 1) * area
        if (place + 1) * chunk > self._device.size:
            return []
        for _ in range(_TRIES):
            found = self._sound(bytes(self._device.read(place * chunk, chunk)), place, chunk)
            if found is not None:
                return found
        raise HelperError("StoreInvalid", "a COW store is damaged: area %d lists what cannot be" % area)

    def _sound(self, data: bytes, place: int, chunk: int) -> "List[int] | None":
        found: List[int] = []
        for old, new in _ENTRY.iter_unpack(data):
            if new == 0:
                break
            if new != place + 1 + len(found) or old * chunk >= self._volume_size:
                return None
            found.append(old)
        return found


class Exceptions(Table):
    """The bitmap of one disk, as it is when the export is opened."""

    def __init__(self, disk: str, size: int, volumes: Sequence[Tuple[Store, List[Piece]]]) -> None:
        """``disk`` has ``size`` bytes; the ``volumes`` have their bytes in these pieces, sorted by offset."""
        self._bitmap = bytearray(length(chunks_of(size)))
        super().__init__(self._bitmap)
        self._disk, self._end = disk, size
        self._volumes = [(store, pieces, [piece.offset for piece in pieces]) for store, pieces in volumes]

    def open(self) -> None:
        for store, pieces, offsets in self._volumes:
            for start, end in store.ranges():
                for at in range(bisect.bisect_right(offsets, start) - 1, bisect.bisect_left(offsets, end)):
                    if pieces[at].disk == self._disk:
                        self._mark(pieces[at], start, end)

    def _mark(self, piece: Piece, start: int, end: int) -> None:
        """What of the volume's bytes ``start`` to ``end`` lies in this piece."""
        first = piece.disk_offset + max(0, start - piece.offset)
        over = piece.disk_offset + min(piece.length, end - piece.offset)
        mark(self._bitmap, first // CHUNK, chunks_of(min(over, self._end)))
