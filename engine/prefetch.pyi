"""Many chunks at once: threads that read, decrypt, decompress and check what an image's next chunks are."""

from vmbackupd.engine.image import ImageSource

class ReadPool:
    """Threads that read batches of an image's chunks; used by engine modules only."""

    image: ImageSource
    batch_chunks: int
    """Chunks of a batch at most."""
    batch_bytes: int
    """Bytes of a batch at most."""
    window: int
    """Batches that keep all threads busy."""

    def __init__(self, image: ImageSource, *, workers: int = 0, batch: int = 1 << 20) -> None:
        """``workers`` 0: one a processor, at most 8, and 8 where packs are no files."""

    def close(self) -> None:
        """End the threads; returns when the last one has ended. Safe to call twice."""

class Worker:
    """What one thread needs."""

class BatchRing:
    """Memory for batches in a ring."""

    def __init__(self, pool: ReadPool, count: int) -> None: ...
