"""An image in blocks of 64 KiB, each with its bytes or known to be zero.

A client asks for block status first and reads afterwards. Finding zeros needs the bytes, so they are kept for the
read that follows: a bounded number of them, each given away once.
"""

from collections import OrderedDict
from typing import Iterator, List, NamedTuple, Optional, Tuple

from .image import PIECE, Image

BLOCK = 65536
KEPT = 1024  # blocks: 64 MiB
WINDOW = 16 << 20  # bytes that one status request looks at
ZERO_WINDOW = 64 << 20  # while it has met nothing but zeros
_ZEROS = bytes(BLOCK)


class Block(NamedTuple):
    """``length`` bytes from ``offset``; ``data`` is None when all are zero."""

    offset: int
    length: int
    data: Optional[bytes]


class Blocks:
    """Reads of one image."""

    def __init__(self, image: Image) -> None:
        self.size = image.size
        self._image = image
        self._kept: OrderedDict[int, Optional[bytes]] = OrderedDict()

    def read(self, offset: int, length: int) -> Iterator[Block]:
        """The blocks of ``length`` bytes from ``offset``, the first and the last cut to it. Raises ``OSError``."""
        return self._blocks(offset, length, False)

    def extents(self, offset: int, length: int) -> List[Tuple[int, bool]]:
        """(length, zero) of adjacent extents from ``offset``, at least one, not necessarily up to ``length``."""
        found: List[Tuple[int, bool]] = []
        seen, data = 0, False
        for block in self._blocks(offset, length, True):
            zero = block.data is None
            if found and found[-1][1] == zero:
                found[-1] = (found[-1][0] + block.length, zero)
            else:
                found.append((block.length, zero))
            seen, data = seen + block.length, data or not zero
            if seen >= (WINDOW if data else ZERO_WINDOW):
                break
        return found

    def _blocks(self, offset: int, length: int, keep: bool) -> Iterator[Block]:
        end = offset + length
        index = offset // BLOCK
        while index * BLOCK < end:
            if index in self._kept:
                fetched = [self._kept[index] if keep else self._kept.pop(index)]
            else:
                fetched = self._fetch(index, end)
                if keep:
                    self._keep(index, fetched)
            for data in fetched:
                yield self._cut(index, data, offset, end)
                index += 1

    def _fetch(self, index: int, end: int) -> List[Optional[bytes]]:
        """Whole blocks from ``index`` up to one that is kept, to ``end`` or as many as are read at once."""
        count = 1
        while count < PIECE // BLOCK and (index + count) * BLOCK < end and index + count not in self._kept:
            count += 1
        start = index * BLOCK
        data = self._image.read(start, min(count * BLOCK, self.size - start))
        found = []
        for at in range(0, len(data), BLOCK):
            block = data[at : at + BLOCK]
            found.append(None if block == (_ZEROS if len(block) == BLOCK else bytes(len(block))) else block)
        return found

    def _keep(self, index: int, fetched: List[Optional[bytes]]) -> None:
        for number, data in enumerate(fetched):
            self._kept[index + number] = data
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def _cut(self, index: int, data: Optional[bytes], offset: int, end: int) -> Block:
        start = index * BLOCK
        stop = min(start + BLOCK, self.size)
        first, last = max(start, offset), min(stop, end)
        if data is not None and (first, last) != (start, stop):
            data = data[first - start : last - start]
        return Block(first, last - first, data)
