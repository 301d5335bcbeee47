"""The chunks that a dirty bitmap of QEMU's marks, and those that hold data, read over NBD."""

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress

def dirty_chunks(connection: NbdConnection, chunk_size: int, progress: Progress) -> Bitmap:
    """The chunks of which any byte is marked in the bitmap that ``connection`` was made for. Blocking; without the GIL.

    One bit for each chunk of the export, the last one may be short; granularity of the bitmap and chunk size need not
    agree. Of ``progress`` only the cancel flag is used: Cancelled within about 200 ms. SourceError if the server does
    not have the bitmap (the connection stays usable), or cannot tell all of it (it is closed).
    """

def data_chunks(connection: NbdConnection, chunk_size: int, progress: Progress) -> Bitmap:
    """The chunks of which the server does not say that they read as zeros. Like :func:`dirty_chunks` in the rest; of
    what has no block status SourceError."""
