"""Revert: the T1 image of a disk out of its T2 image and the COW stores that were captured with it."""

from collections.abc import Callable, Iterator

from vmbackupd.engine.cowstore import CowStore
from vmbackupd.engine.nbdimage import NbdSink as NbdSink
from vmbackupd.engine.nbdimage import NbdSource as NbdSource
from vmbackupd.engine.progress import Progress
from vmbackupd.engine.readable import ReadableSource as ReadableSource
from vmbackupd.engine.sink import ChunkSink, ChunkSource
from vmbackupd.model import VolumeMap

class RevertPlan:
    """Which bytes of one disk (of ``disk_size`` bytes) are replaced by which bytes of the scratch disk.

    Add every volume that touches the disk, then ``finish``. Memory: 24 bytes a piece, about one piece an exception.
    """

    disk_size: int
    def __init__(self, disk_size: int) -> None: ...
    def add_volume(self, volume: VolumeMap, disk: str, store: CowStore) -> None:
        """The pieces of ``volume`` that lie on disk id ``disk``. StoreCorrupt if the map is no good or the store is not."""

    def finish(self) -> None:
        """Sorts the pieces. StoreCorrupt if two of them claim the same byte."""

    @property
    def count(self) -> int:
        """Exceptions that touch this disk. One that spans two disks counts on both."""

    @property
    def piece_bytes(self) -> int:
        """Bytes that are replaced."""

    def __len__(self) -> int:
        """Pieces: at least ``count``; an exception over a segment's border makes several."""

    def pieces_list(self) -> list[tuple[int, int, int]]:
        """``(disk offset, scratch disk offset, length)`` of each, sorted. For tests and small plans."""

    def chunks(self, chunk_size: int) -> Iterator[int]:
        """Indexes of the chunks that are touched, ascending, each once."""

class RevertedSource(ChunkSource):
    """The T1 image of a disk, made while it is read, from its T2 ``image`` and the ``store`` (the scratch disk at T2).

    One thread at a time. ValueError and StoreCorrupt as ``revert_image``.
    """

    def __init__(self, plan: RevertPlan, image: ChunkSource, store: ChunkSource) -> None: ...

def patch(
    plan: RevertPlan, offset: int, buffer: bytearray | memoryview, read_store: Callable[[int, int], bytes]
) -> int:
    """Set the image bytes ``[offset, offset + len(buffer))`` in ``buffer`` back to T1; returns the number of pieces used.

    ``read_store(offset, length)`` reads the T2 image of the scratch disk.
    """

def revert_image(
    plan: RevertPlan, image: ChunkSource, store: ChunkSource, sink: ChunkSink, progress: Progress | None = None
) -> int:
    """Set a whole image back: every chunk that is touched is taken from ``image``, patched from ``store`` (the T2 image of
    the scratch disk) and put into ``sink``. Returns the number of chunks put.

    ``image`` and ``sink`` have the same size and chunk size and may be the same disk; ``store`` may have others. Blocking,
    without the GIL; ``progress`` is used for its cancel flag only (Cancelled). What is done may be done again.
    """
