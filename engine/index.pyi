"""Where chunks lie: the table a writer fills, the sorted files on storage, and the set of files that is searched."""

from collections.abc import Collection, Iterable, Iterator

from typing_extensions import Buffer

class EntryTable:
    """Entries by name, in memory. Callers lock."""

    count: int
    """Number of entries."""

    def __len__(self) -> int: ...
    def add_pack(self, entries: Buffer, pack: int, limit: int, label: str) -> None:
        """Take in a pack's own index as pack number ``pack``; names that are here already stay as they are.

        ``limit`` is where the pack's records end. RepositoryCorrupt if an entry points outside of them.
        """

    def contains(self, name: bytes) -> bool:
        """Is this 32 byte name here?"""

    def clear(self) -> None:
        """Forget all entries, keep the memory."""

    def encode(self, key: bytes, repository: bytes, index: bytes, packs: list[bytes], first: int = 0) -> list[Buffer]:
        """The table as the bytes of an index file (a list of buffers to be written one after another).

        ``packs`` are the ids of the packs numbered ``first`` and up in the entries, ``key`` the seal key,
        ``repository`` and ``index`` 16 byte ids. The table is empty afterwards.
        """

def pack_entries(entries: Buffer, pack: int, limit: int, label: str) -> bytearray:
    """A pack's own index as entries of pack number ``pack``.

    ``limit`` is where the pack's records end. RepositoryCorrupt if an entry points outside of them.
    """

def encode_entries(entries: bytearray, key: bytes, repository: bytes, index: bytes, packs: list[bytes]) -> list[Buffer]:
    """Entries in any order, which it sorts in place, as the bytes of an index file (a list of buffers).

    Of several entries of one name in one pack one is kept. The rest as for ``EntryTable.encode``.
    """

class IndexFile:
    """An index file that is open. Any number of threads at once."""

    label: str
    """The object's name, for messages."""

    def __init__(self, fd: int, key: bytes, repository: bytes, label: str, index: bytes | None = None) -> None:
        """Takes over ``fd``, also when this raises. ``index`` is the id the file must carry, if it is known.

        RepositoryCorrupt if the file is no index of this repository, truncated or damaged outside of its blocks;
        StorageError if it cannot be read.
        """

    @property
    def count(self) -> int:
        """Number of entries."""

    @property
    def damaged(self) -> int:
        """How many times a block was found damaged or unreadable since the file was opened."""

    def pack_ids(self) -> list[bytes]:
        """The 16 byte ids of the packs this index covers."""

    def parts(self) -> Iterable[bytes]:
        """The file's bytes, 1 MiB at a time: to be iterated any number of times. StorageError."""

    def check(self) -> None:
        """Read every block. RepositoryCorrupt if one is damaged, out of order or points to no pack."""

    def names(self) -> Iterator[tuple[bytes, int, int]]:
        """Iterate over (name, kind, pack number) of all entries, sorted by name, then pack number. RepositoryCorrupt as for ``check``."""

class BlockCache:
    """Blocks of index files, read and checked. Any number of threads and sets at once."""

    def __init__(self, blocks: int = 8192) -> None:
        """Room for so many blocks of 4 KiB, or a few more; at most 32 MiB. Memory is taken as it is used."""

class IndexSet:
    """Index files that are searched together. Any number of threads."""

    files: tuple[IndexFile, ...]

    def __init__(
        self,
        files: Iterable[IndexFile] = (),
        *,
        present: Collection[bytes] | None = None,
        condemned: Collection[bytes] = (),
        cache: BlockCache | None = None,
    ) -> None:
        """Entries are passed over if their pack is not among ``present`` (None: all are) or is among ``condemned``:
        collections of 16 byte ids, best sets. ``cache``: blocks shared with other sets; a set has its own otherwise.
        """

    def __len__(self) -> int:
        """Entries of all files together, also those that are passed over."""

    def lookup(self, name: bytes) -> tuple[bytes, int, int, int, int] | None:
        """(pack id, offset, stored, raw, kind) of a 32 byte name, or None."""

    def copies(self, name: bytes, limit: int = 1000) -> list[tuple[bytes, int, int, int, int]]:
        """(pack id, offset, stored, raw, kind) of every record of a 32 byte name, up to ``limit``."""
