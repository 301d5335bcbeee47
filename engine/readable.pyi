"""Any byte range of a chunked image."""

from vmbackupd.engine.sink import ChunkSource

class ReadableSource:
    """Python reads over any ChunkSource; keeps the last 8 chunks that were read in part. One thread at a time."""

    source: ChunkSource
    def __init__(self, source: ChunkSource) -> None: ...
    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; ValueError if they are not inside the image."""

    def read_buffer(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from byte ``offset``; ValueError if that is not inside the image."""

    def extents(self, offset: int, length: int, limit: int = 1 << 16) -> list[tuple[int, int, bool]]:
        """``(offset, length, is data)`` from ``offset`` on, adjacent and in turn data and hole; at least one if
        ``length`` is not 0, all there are within ``length`` or about ``limit`` from its beginning.
        Reads nodes, no chunks."""
