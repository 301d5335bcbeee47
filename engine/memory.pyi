"""Images in memory: for tests, measurements and very small images."""

from collections.abc import Callable, Mapping
from typing import Self

from typing_extensions import Buffer

from vmbackupd.engine.sink import ChunkSink, ChunkSource

class MemorySource(ChunkSource):
    """Holds some chunks; the others are holes."""

    chunks: dict[int, bytes]
    on_get: Callable[[int], object] | None
    """Called with each index that is read; what it raises stops the copy."""
    def __init__(self, size: int, chunk_size: int, chunks: Mapping[int, bytes] = ...) -> None: ...
    @classmethod
    def over(cls, data: Buffer, chunk_size: int) -> Self:
        """All of ``data``, chunks of zeros as holes."""

class MemorySink(ChunkSink):
    """Keeps what is put; the last put of a chunk counts."""

    chunks: dict[int, bytes]
    zeros: set[int]
    on_put: Callable[[int], object] | None
    """Called with each index that is put (not for zeros); what it raises stops the copy."""
    def __init__(self, size: int, chunk_size: int) -> None: ...
    def complete(self) -> bool:
        """Whether every chunk was put."""

    def __bytes__(self) -> bytes: ...

class DigestSink(ChunkSink):
    """Keeps nothing but a sum over the chunks' hashes, whatever their order, and counts."""

    data_chunks: int
    zero_chunks: int
    def __init__(self, size: int, chunk_size: int) -> None: ...
    def update(self, index: int, data: Buffer) -> None:
        """As if chunk ``index`` had been put."""

    def digest(self) -> bytes:
        """32 bytes; equal for equal sets of data chunks."""
