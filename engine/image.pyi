"""Images in the repository: written chunk by chunk in any order, read by chunk or by range."""

from collections.abc import Iterator

from typing_extensions import Buffer

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.sink import ChunkSink, ChunkSource
from vmbackupd.engine.tree import TreeBuilder

class ImageSink(ChunkSink):
    """An image on its way into the repository; one thread at a time. Chunks never given read as they do in the tree it
    started from, or as zeros. A chunk given twice holds what came last."""

    chunks_new: int
    """Chunks this image added to the repository so far (collected: the last few may be missing before finish())."""

    def __init__(self, store: ChunkStore, builder: TreeBuilder) -> None: ...
    @property
    def bytes_stored(self) -> int:
        """Bytes this image added to the repository's packs so far: chunks and nodes that were not known, compressed."""

    @property
    def nodes_new(self) -> int:
        """Nodes of the tree this image added to the repository so far."""

    def write(self, offset: int, data: Buffer) -> None:
        """Put ``data`` at byte ``offset``. Both are on chunk borders, or ``data`` ends with the image.

        InvalidArgument, and whatever made the writer fail: RepositoryFull, StorageError.
        """

    def zero(self, first: int, count: int) -> None:
        """Make ``count`` chunks from number ``first`` read as zeros."""

    def finish(self) -> str:
        """Complete the tree; its id. Nothing is visible to others before the writer publishes a manifest."""

class ImageSource(ChunkSource):
    """A stored image; one thread at a time. Every chunk is checked against its name when it is read."""

    tree: str
    """The tree's id."""

    def __init__(self, reader: ChunkReader, tree: str) -> None:
        """InvalidArgument for what is no tree id, RepositoryCorrupt, StorageError."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from byte ``offset``. InvalidArgument beyond the end, RepositoryCorrupt, StorageError."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """Iterate over (offset, length) of the parts that are no holes, in bytes, ascending; adjacent parts occur."""

    def data_bytes(self) -> int:
        """Bytes that are no holes: what a full read moves. Reads the tree's nodes."""

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Iterate over (name, kind) of all nodes (2) and chunks (1) of the tree, but its root record."""
