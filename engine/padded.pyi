"""An image that goes on with zeros, for targets that take whole blocks only."""

from vmbackupd.engine.sink import ChunkSource

class PaddedSource(ChunkSource):
    """``source``, then zeros up to ``size`` bytes, less than a chunk of them (ValueError). One thread at a time."""

    def __init__(self, source: ChunkSource, size: int) -> None: ...
