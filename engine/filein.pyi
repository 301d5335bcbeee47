"""A raw image file, or a block device, into a sink: its holes are asked for and never read."""

from vmbackupd.engine.progress import Progress
from vmbackupd.engine.sink import ChunkSink

def file_size(fd: int, label: str = "file") -> int:
    """Bytes of a regular file or a block device. Moves its file offset. SourceError."""

def read_file(
    fd: int,
    sink: ChunkSink,
    progress: Progress,
    *,
    label: str = "file",
    window: int = 8 << 20,
    drop_cache: bool = False,
) -> None:
    """Read the first ``sink.size`` bytes of ``fd`` into ``sink``, in image order. Blocking; runs without the GIL.

    Holes (SEEK_HOLE) are handed over as such, and so are chunks that turn out to be zeros. ``window``: bytes the kernel
    is told to read ahead; with 0 it decides alone. ``drop_cache``: what was read leaves the page cache, also what others
    had brought there. ``label`` names the file in errors. Memory: one buffer of 256 KiB, or one chunk if that is more.
    Moves the file offset. Errors: SourceError (it is too small, shrinks meanwhile, or cannot be read), Cancelled, and
    whatever the sink raises.
    """
