"""Parser of the dm-snapshot persistent exception store."""

from collections.abc import Callable, Iterator

class CowStore:
    """A store of ``length`` bytes for an origin of ``origin_size`` bytes, read through ``read(offset, length)``.

    The header is read at once, the areas when they are first needed. StoreCorrupt, with a sentence, if it is no store, is
    marked invalid, is truncated, or breaks any rule of the format; what ``read`` raises passes through.
    Memory: 8 bytes an exception.
    """

    length: int
    origin_size: int
    chunk_size: int
    """Bytes of a chunk of the snapshot."""
    def __init__(self, read: Callable[[int, int], bytes], length: int, origin_size: int) -> None: ...
    @property
    def count(self) -> int:
        """Exceptions in the store."""

    def __len__(self) -> int: ...
    def old(self, index: int) -> int:
        """The origin's chunk of exception ``index``."""

    def new(self, index: int) -> int:
        """The store's chunk that holds its old content."""

    def exceptions(self) -> Iterator[tuple[int, int]]:
        """``(old, new)`` of each, in the order in which they happened."""
