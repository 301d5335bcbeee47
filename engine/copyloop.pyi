"""The copy loops: an NBD export into a sink, a source onto an NBD export."""

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress as Progress
from vmbackupd.engine.sink import ChunkSink, ChunkSource

def copy_in(
    source: NbdConnection,
    sink: ChunkSink,
    progress: Progress,
    *,
    only: Bitmap | None = None,
    in_flight: int = 16,
    request: int = 256 << 10,
) -> None:
    """Copy a whole export into ``sink``, or the chunks of ``only``, in image order. Blocking; runs without the GIL.

    ``only`` has one bit for each of the sink's chunks (ValueError if not); other chunks are neither read nor put, nor
    counted. A sink may be filled by several calls, also from different connections.

    Block status is asked first: what the server says is zero does not travel, and chunks that turn out to be zeros are
    handed over as such. ``in_flight`` buffers of ``request`` bytes (at most 4 MiB, whole chunks) are the memory it
    takes, 64 MiB at most; with the defaults 4 MiB. Errors: SourceError (also if the export is smaller than the sink's
    image), Cancelled within about 200 ms of ``progress.cancel()``, and whatever the sink raises; each of them closes the
    connection.
    """

def copy_out(
    source: ChunkSource,
    target: NbdConnection,
    progress: Progress,
    *,
    target_is_zero: bool,
    in_place: bool = False,
    in_flight: int = 32,
    request: int = 256 << 10,
    workers: int = 0,
) -> None:
    """Copy a whole image onto an export, then flush it. Blocking; runs without the GIL.

    Zeros are written as zeroes, or left out if ``target_is_zero``. With ``in_place`` (images of the repository only)
    what the target holds is read and compared with the names of the image's chunks; only chunks that differ are read
    from the repository and written, ``progress.bytes_written`` tells how much that was.

    An image of the repository is read by ``workers`` threads (0: one a processor, at most 8; 8 where packs are no
    files), which are gone when this returns. Errors: TargetRefused (read-only or too small;
    nothing was written), TargetError, Cancelled, and whatever the source raises; all but the first close the connection.
    """
