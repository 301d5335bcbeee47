"""Comparison of chunks with those of a stored image, by name."""

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.sink import ChunkSink

class AuditSink(ChunkSink):
    """A sink that keeps nothing: ``copy_in(source, AuditSink(base), progress, only=sample)`` tells which chunks of the
    sample are not as they are in ``base``. Chunks are hashed and their names compared; only nodes of the tree are read.

    InvalidArgument for what is no chunk of ``base``, RepositoryCorrupt, StorageError. One thread at a time, ``base``
    included.
    """

    compared: int
    """Chunks that were put so far."""
    missed: Bitmap
    """One bit for each chunk of ``base``: those that were put and differ."""
    def __init__(self, base: ImageSource) -> None: ...
