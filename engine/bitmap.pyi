"""A bitmap of fixed length, one bit for each chunk of an image."""

from collections.abc import Iterator

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
    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs ``(first, count)`` of set bits, ascending."""
