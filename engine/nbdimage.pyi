"""NBD exports as the ends of a copy or a revert."""

from collections.abc import Iterator

from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.sink import ChunkSink, ChunkSource

class NbdSource(ChunkSource):
    """Chunks out of an export, one at a time: for the few chunks of a revert. A whole image goes through copy_in.

    ``size`` may leave out the end of the export. The connection stays the caller's to close.
    """

    connection: NbdConnection
    def __init__(self, connection: NbdConnection, *, size: int | None = None, chunk_size: int = 65536) -> None: ...
    def data_runs(self) -> Iterator[tuple[int, int]]:
        """Runs ``(first, count)`` of chunks that are not known to be zeros, ascending. Blocking."""

class NbdSink(ChunkSink):
    """Chunks into an export, up to 16 on their way at once.

    An error shows in a later call, at the latest in ``finish``. TargetRefused at once if the export is read-only or
    smaller than ``size``. The connection stays the caller's to close.
    """

    connection: NbdConnection
    def __init__(self, connection: NbdConnection, *, size: int | None = None, chunk_size: int = 65536) -> None: ...
    def finish(self) -> None:
        """Waits until everything is written, and flushes. Blocking."""
