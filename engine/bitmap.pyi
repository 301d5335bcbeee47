"""A bitmap of fixed length, one bit for each chunk of an image."""

from collections.abc import Iterator

from typing_extensions import Buffer

class Bitmap:
    """``length`` bits, all clear at first. An index out of range raises IndexError, unequal lengths ValueError."""

    length: int
    def __init__(self, length: int) -> None: ...
    def set(self, first: int, count: int = 1) -> None: ...
    def clear(self, first: int, count: int = 1) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> bool: ...
    def count(self) -> int:
        """How many bits are set."""

    def merge(self, other: Bitmap) -> None:
        """Set what is set in ``other``."""

    def intersect(self, other: Bitmap) -> None:
        """Clear what is clear in ``other``."""

    def subtract(self, other: Bitmap) -> None:
        """Clear what is set in ``other``."""

    def copy(self) -> Bitmap: ...
    @staticmethod
    def from_bytes(data: Buffer, length: int) -> Bitmap:
        """The bitmap whose bit i is bit i % 8 of byte i // 8, counted from the least significant. ValueError unless
        ``data`` has just the bytes for ``length`` bits, and none is set behind the last."""

    def to_bytes(self) -> bytes:
        """What ``from_bytes`` takes."""

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs ``(first, count)`` of set bits, ascending."""
