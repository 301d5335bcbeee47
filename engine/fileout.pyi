"""An image of the repository straight into a file or block device, by several threads."""

from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.progress import Progress

def write_file(
    image: ImageSource, fd: int, progress: Progress, *, label: str, in_place: bool = False, workers: int = 0
) -> None:
    """Write a whole image to the file behind ``fd`` (open for reading and writing). Blocking; runs without the GIL.

    A regular file has the image's size afterwards, a device must have it. Without ``in_place`` a regular file is emptied
    first, and a device must read as zeros: holes of the image are left out. With it, what is there is
    compared with the names of the image's chunks, and only chunks that differ are read from the repository and written;
    holes are punched. ``progress.bytes_written`` tells how much that was. Nothing is flushed: that is the caller's.
    ``label`` names the target in messages.

    Errors: TargetRefused (too small a device; nothing was written), TargetError, Cancelled, RepositoryCorrupt,
    StorageError. Memory: a few MiB for each of the ``workers`` (0: one a processor, at most 8).
    """
