"""The tree of an image: nodes of chunk names."""

from collections.abc import Callable, Iterator

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore

class TreeReader:
    """The names in a stored tree. One thread at a time."""

    def __init__(self, reader: ChunkReader, tree: str) -> None:
        """InvalidArgument for what is no tree id, RepositoryCorrupt, StorageError."""

    @property
    def size(self) -> int:
        """Bytes of the image."""

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk."""

    def data_bytes(self) -> int:
        """Bytes of the image that are no holes: what a full read moves. Reads all nodes."""

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """Iterate over (name, kind) of every chunk of the tree but its root record: nodes before what is below them."""

class TreeBuilder:
    """A tree from names in any order, new or starting from a stored one. One thread at a time.

    Memory: 512 leaves, names of all nodes (32 bytes for 16 MiB of image, untouched parts are never made), beyond that a
    temporary file.
    """

    bytes_stored: int
    nodes_new: int

    def __init__(
        self,
        store: ChunkStore,
        reader: ChunkReader,
        make_spill: Callable[[], int],
        *,
        tree: str | None = None,
        size: int = 0,
        chunk_size: int = 65536,
        fanout: int = 256,
    ) -> None:
        """A new tree of ``size`` bytes, or one that starts as ``tree``. ``make_spill()`` opens a temporary file.

        InvalidArgument above 1 PiB, RepositoryCorrupt, StorageError.
        """

    def finish(self) -> str:
        """Store what is left of the nodes and the root record; the tree's id."""
