"""Which records the trees of some backups refer to: one bit for each entry of an index, no sets of names."""

from collections.abc import Collection, Iterator

from typing_extensions import Buffer

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.index import IndexSet

Record = tuple[bytes, int, int, int, int]

class LiveSet:
    """What is referred to. One thread at a time; of no use after an error.

    Memory: a bit for each entry of the index, and 36 MiB for names that wait to be looked up together.
    """

    missing: list[tuple[bytes, int, bytes]]
    """(name, kind, name of the root record) of what trees refer to and no usable pack holds: the first 65536, complete
    after ``finish``. Below a node that two trees share only the first one is named."""
    missing_count: int
    """How many there are."""

    def __init__(self, index: IndexSet) -> None:
        """``index`` says where records lie. Entries that it passes over are never marked."""

    def add_tree(self, reader: ChunkReader, root: bytes) -> None:
        """Mark all records of a tree: its root record (``root`` is its name, 32 bytes), nodes and chunks.

        What no usable pack holds is noted in ``missing``. RepositoryCorrupt if a node cannot be read at all, even by
        ``reader``, StorageError.
        """

    def finish(self) -> None:
        """Look up what is waiting to be: ``missing`` is complete then. Every question does it first."""

    def is_live(self, name: bytes) -> bool:
        """Does a tree refer to this 32 byte name, and does a usable pack hold it?"""

    def live_among(self, entries: Buffer) -> list[Record]:
        """(name, kind, offset, stored, raw) of those of a pack's own ``entries`` that are live, in their order."""

    def live_entries(self, pack_id: bytes) -> Iterator[Record]:
        """As ``live_among`` the entries that the index has of this pack, in order of offset. Reads the whole index."""

    def pack_usage(self, among: Collection[bytes] | None = None) -> dict[bytes, tuple[int, int, int, int]]:
        """For every usable pack in the index, or those ``among`` them (live records, records, their bytes, bytes of all): a
        dictionary by id.

        Of the copies of a record in these packs one counts as live. Bytes are those of records with their headers.
        Reads the whole index: RepositoryCorrupt if it is damaged.
        """
