"""Lists of byte runs, such as the data areas of a disk. Bytes, below 2^64."""

from collections.abc import Iterable, Iterator

class ExtentList:
    """A set of bytes as runs ``(start, length)``. Iterating gives them sorted, not overlapping, not touching."""

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None: ...
    def add(self, start: int, length: int) -> None:
        """Any order, overlaps allowed; ValueError if a number is negative or the end beyond 2^64."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[int, int]]: ...
    @property
    def total(self) -> int:
        """Bytes in all runs."""

    def union(self, other: ExtentList) -> ExtentList: ...
    def intersect(self, other: ExtentList) -> ExtentList: ...
    def subtract(self, other: ExtentList) -> ExtentList: ...
    def chunks(self, chunk_size: int) -> Iterator[tuple[int, int]]:
        """Runs ``(first, count)`` of the chunks that are touched, each chunk once, ascending."""
