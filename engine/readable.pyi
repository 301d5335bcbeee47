"""Any byte range of a chunked image."""

from vmbackupd.engine.sink import ChunkSource

class ReadableSource:
    """Python reads over any ChunkSource; keeps the last 8 chunks. One thread at a time."""

    source: ChunkSource
    def __init__(self, source: ChunkSource) -> None: ...
    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; ValueError if they are not inside the image."""
