"""Where a copy comes from and where it goes. The methods that move bytes are C only: subclasses are engine modules."""

class ChunkSink:
    """An image being written, chunk by chunk, in any order."""

    size: int
    """Bytes of the image."""
    chunk_size: int
    """Bytes of a chunk; the last chunk may be short."""

class ChunkSource:
    """An image that is read, chunk by chunk."""

    size: int
    """Bytes of the image."""
    chunk_size: int
    """Bytes of a chunk; the last chunk may be short."""
