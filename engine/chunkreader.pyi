"""The way out of the repository: a chunk's content by its name, checked."""

from collections.abc import Callable
from typing import Protocol

from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.index import IndexSet
from vmbackupd.engine.zstd import Codec

class PackReader(Protocol):
    def open_pack(self, pack_id: bytes) -> int | None: ...
    def read_pack(self, pack_id: bytes, offset: int, length: int) -> bytes: ...

class ChunkReader:
    """Chunks by name. Any number of threads at once."""

    largest: int
    encrypted: bool

    def __init__(
        self,
        index: IndexSet,
        *,
        chunk_key: bytes,
        node_key: bytes,
        storage: PackReader,
        recover: Callable[[bytes, IndexSet], IndexSet | None] | None = None,
        session: ChunkStore | None = None,
        largest: int = 65536,
        content_key: bytes | None = None,
    ) -> None:
        """``storage`` has ``open_pack(pack_id)``, a descriptor of our own or None where there are no files, and
        ``read_pack(pack_id, offset, length)``. ``largest``: bytes of the longest content. ``recover(name, index)`` is
        asked once for every chunk that cannot be read: a new set of index files to search, or None. ``content_key``:
        that of an encrypted repository.
        """

    def close(self) -> None:
        """Close the packs that are open and not in use."""

    def codec(self) -> Codec:
        """What a thread needs to read chunks."""

    def searches(self, index: IndexSet) -> bool:
        """Is this the set of files that is searched?"""

    def replace_index(self, index: IndexSet) -> None:
        """Search these files from now on."""

    def record(self, name: bytes, kind: int) -> tuple[int, int, bytes]:
        """(compression, bytes of the content, payload) of a chunk, checked as ``content`` does.

        The payload is decrypted, and compressed if ``compression`` is 1: what ``ChunkStore.copy_record`` takes.
        """

    def content(self, name: bytes, kind: int) -> bytes:
        """The content of a chunk of this kind (1 chunk, 2 node, 3 root), for what is read once.

        RepositoryCorrupt naming chunk and pack, StorageError.
        """
