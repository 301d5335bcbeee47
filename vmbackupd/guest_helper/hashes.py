"""The names of a disk's chunks, made in the guest: the host compares them with what it has, and only fetches what
differs.

Sixteen bytes for each chunk, keyed by the host for each time it asks, so that nobody in the guest can prepare two
chunks of the same name. A chunk of zeros has the name zero.
"""

import hashlib
from typing import Iterator

from .bitmaps import CHUNK, chunks_of
from .blocks import Block, Export

NAME = 16
_AT_ONCE = 4096  # bytes of names: 16 MiB of the disk are read for one block of the reply
_ZERO = bytes(NAME)


class Hashes(Export):
    """Read while the client reads: a short read hashes only what it asks for."""

    def __init__(self, disk: Export, key: bytes) -> None:
        """``key``: at most 64 bytes."""
        self.size = chunks_of(disk.size) * NAME
        self._disk, self._key = disk, key

    def read(self, offset: int, length: int) -> Iterator[Block]:
        end = offset + length
        for at in range(offset, end, _AT_ONCE):
            stop = min(at + _AT_ONCE, end)
            first = at // NAME
            names = self._names(first, -(-stop // NAME))
            yield Block(at, stop - at, names[at - first * NAME : stop - first * NAME])

    def _names(self, first: int, end: int) -> bytes:
        start = first * CHUNK
        return b"".join(
            _ZERO if block.data is None else self._name(block.data)
            for block in self._disk.read(start, min(end * CHUNK, self._disk.size) - start)
        )

    def _name(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=NAME, key=self._key).digest()
