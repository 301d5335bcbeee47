"""The chunks that a dirty bitmap of QEMU's marks, and those that hold data, read over NBD."""

from libc.errno cimport EPROTO
from libc.stdint cimport uint32_t, uint64_t
from vmbackupd.engine.bitmap cimport Bitmap
from vmbackupd.engine.blockstatus cimport BlockStatus
from vmbackupd.engine.nbd cimport POLL_MS, NbdConnection
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.sink cimport chunk_count

from vmbackupd.errors import SourceError

cdef enum:
    ROOM = 16384                # extents kept of one answer, 256 KiB: all that one question has in chunks of 64 KiB


cdef int _read(NbdConnection source, BlockStatus status, uint64_t chunk, Bitmap marked, bint bitmap) except -1 nogil:
    cdef uint64_t at = 0, length
    cdef uint32_t i
    while at < source.size:
        status.ask(at, source.size - at)
        while status.answer.request.pending > 0:
            source.step(POLL_MS)
        if not status.take(at):
            # an answer about allocation alone must never pass for "nothing is marked"
            return source.fail("reading the bitmap of" if bitmap else "reading the allocation of", at, source.size - at,
                               status.answer.request.error if status.answer.request.error != 0 else EPROTO)
        for i in range(status.answer.count):
            length = min(status.answer.extents[i].length, source.size - at)
            if status.answer.extents[i].data and length > 0:
                marked.set_range(at // chunk, (at + length - 1) // chunk - at // chunk + 1)
            at += length
    return 0


def dirty_chunks(NbdConnection connection not None, chunk_size, Progress progress not None):
    if not connection.has_bitmap:
        raise SourceError(f"NBD export {connection.export!r}: the server does not have the bitmap that is asked for")
    return _chunks(connection, chunk_size, progress, True)


def data_chunks(NbdConnection connection not None, chunk_size, Progress progress not None):
    if not connection.can_block_status:
        raise SourceError(f"NBD export {connection.export!r}: the server does not tell which parts read as zeros")
    return _chunks(connection, chunk_size, progress, False)


cdef Bitmap _chunks(NbdConnection connection, object chunk_size, Progress progress, bint bitmap):
    if chunk_size <= 0:
        raise ValueError(f"chunk size {chunk_size}")
    cdef uint64_t chunk = chunk_size
    cdef Bitmap marked = Bitmap(chunk_count(connection.size, chunk_size))
    cdef BlockStatus status = BlockStatus(connection, ROOM, bitmap=bitmap)
    connection.enter(&progress.cancel_flag)
    try:
        with nogil:
            _read(connection, status, chunk, marked, bitmap)
    except BaseException:
        # what is asked still points into our memory
        connection.abandon()
        raise
    finally:
        connection.leave()
    return marked
