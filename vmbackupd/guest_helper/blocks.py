"""What a data server exports: bytes in blocks of 64 KiB, each with its bytes or known to be zero.

A client asks for block status first and reads afterwards. Finding zeros needs the bytes, so they are kept for the
read that follows: a bounded number of them, each given away once. Of what changes while it is served nothing is kept:
all of it is called data, and its zeros are left out of the replies to reads.
"""

from collections import OrderedDict
from typing import Iterator, List, NamedTuple, Optional, Tuple, Union

from .bitmaps import CHUNK
from .image import PIECE, Source

BLOCK = CHUNK
KEPT = 1024  # blocks: 64 MiB
WINDOW = 16 << 20  # bytes that one status request looks at
ZERO_WINDOW = 64 << 20  # while it has met nothing but zeros
_ZEROS = bytes(BLOCK)


class Block(NamedTuple):
    """``length`` bytes from ``offset``; ``data`` is None when all are zero."""

    offset: int
    length: int
    data: Optional[bytes]


class Export:
    """``size`` bytes that a client may read."""

    size = 0

    def open(self) -> None:
        """A client is about to choose it. Raises ``OSError`` or ``HelperError`` where it cannot be read now."""

    def read(self, offset: int, length: int) -> Iterator[Block]:
        """The blocks of ``length`` bytes from ``offset``, the first and the last cut to it. Raises ``OSError``."""
        raise NotImplementedError

    def extents(self, offset: int, length: int) -> List[Tuple[int, bool]]:
        """(length, zero) of adjacent extents from ``offset``, at least one, not necessarily up to ``length``."""
        return [(length, False)]


class Table(Export):
    """Bytes in memory, as they are at the moment of each read."""

    def __init__(self, memory: Union[bytearray, memoryview]) -> None:
        self.size = len(memory)
        self._memory = memory

    def read(self, offset: int, length: int) -> Iterator[Block]:
        for at in range(offset, offset + length, BLOCK):
            data = bytes(self._memory[at : min(at + BLOCK, offset + length)])
            yield Block(at, len(data), _content(data))


class Blocks(Export):
    """Reads of one image."""

    def __init__(self, image: Source, still: bool = True) -> None:
        """``still``: whether nobody changes the image any more, so that what was read for one request may be the
        answer to another."""
        self.size = image.size
        self._image, self._still = image, still
        self._kept: OrderedDict[int, Optional[bytes]] = OrderedDict()

    def read(self, offset: int, length: int) -> Iterator[Block]:
        return self._blocks(offset, length, False)

    def extents(self, offset: int, length: int) -> List[Tuple[int, bool]]:
        if not self._still:
            return super().extents(offset, length)
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
        return [_content(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]

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


def _content(data: bytes) -> Optional[bytes]:
    """None for zeros: at most a block of them."""
    return None if data == (_ZEROS if len(data) == BLOCK else bytes(len(data))) else data
