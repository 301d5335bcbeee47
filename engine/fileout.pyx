# cython: cdivision=True
"""An image of the repository straight into a file or block device, by several threads.

The threads of a ReadPool write what they have read: chunks need no order in a file, and the copy into the page cache is
as much work as a third of the decompression.
"""

import os
import stat

from libc.errno cimport EINTR, EINVAL, ENXIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.types cimport off_t
from posix.unistd cimport SEEK_SET, lseek, pread, pwrite

from vmbackupd.engine.image cimport ImageSource
from vmbackupd.engine.prefetch cimport (
    CHUNK_READ,
    CHUNK_SAME,
    CHUNK_ZERO,
    BatchRing,
    ReadPool,
    Worker,
    batch_t,
    want_t,
)
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.sink cimport chunk_count
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import Cancelled, TargetError, TargetRefused

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, off_t offset, off_t length)
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE

cdef enum:
    SEEK_DATA = 3            # <unistd.h> has them with _GNU_SOURCE only
    SEEK_HOLE = 4
    POLL_MS = 100            # longest wait before the cancel flag is looked at again
    BLOCK = 4096             # zeros inside of chunks are left out of new files in such blocks
    WORTH_A_HOLE = 4         # so many of them in a row at least


cdef class _FilePool(ReadPool):
    """Workers that write each batch to the file."""

    cdef int fd
    cdef bint in_place
    cdef object label

    def __init__(self, image, int fd, *, label, bint in_place, workers=0):
        self.fd = fd
        self.label = label
        self.in_place = in_place

    # What is at the target now.
    cdef int before(self, Worker worker, batch_t *batch) except -1 nogil:
        cdef size_t done = 0
        cdef ssize_t got
        while batch.compare and done < batch.length:
            got = pread(self.fd, batch.data + done, batch.length - done, batch.offset + done)
            if got < 0 and errno == EINTR:
                continue
            if got < 0:
                return self.fail("reading", batch.offset + done, batch.length - done, errno)
            if got == 0:
                memset(batch.data + done, 0, batch.length - done)
                break
            done += got
        return 0

    cdef int after(self, Worker worker, batch_t *batch) except -1 nogil:
        cdef uint32_t start = 0, end
        cdef uint64_t offset
        cdef size_t length
        cdef int state
        while start < batch.count:
            state = batch.wants[start].state
            offset = batch.offset + <uint64_t>(batch.wants[start].into - batch.data)
            length = 0
            end = start
            while end < batch.count and batch.wants[end].state == state:
                length += batch.wants[end].length
                end += 1
            if state == CHUNK_READ and self.in_place:
                self.write(batch, batch.wants[start].into, offset, length)
            elif state == CHUNK_READ:
                self.write_data(batch, batch.wants[start].into, offset, length)
            elif state == CHUNK_ZERO and self.in_place:
                self.clear(batch, batch.wants[start].into, offset, length)
            start = end
        return 0

    # Into a file that reads as zeros: leaves out longer runs of zeros, which the source's own file may not have had.
    cdef int write_data(self, batch_t *batch, const uint8_t *data, uint64_t offset, size_t length) except -1 nogil:
        cdef size_t written = 0, at = 0, zeros = 0, part
        while at < length:
            part = min(<size_t>BLOCK, length - at)
            if is_zero(data + at, part):
                zeros += part
            else:
                if zeros >= WORTH_A_HOLE * BLOCK:
                    self.write(batch, data + written, offset + written, at - zeros - written)
                    written = at
                zeros = 0
            at += part
        if zeros < WORTH_A_HOLE * BLOCK:
            zeros = 0
        return self.write(batch, data + written, offset + written, length - zeros - written)

    cdef int write(self, batch_t *batch, const uint8_t *data, uint64_t offset, size_t length) except -1 nogil:
        cdef size_t done = 0
        cdef ssize_t put
        while done < length:
            put = pwrite(self.fd, data + done, length - done, offset + done)
            if put < 0 and errno == EINTR:
                continue
            if put < 0:
                return self.fail("writing", offset + done, length - done, errno)
            done += put
        batch.written += length
        return 0

    # Makes a range read as zeros; `zeros` are as many.
    cdef int clear(self, batch_t *batch, const uint8_t *zeros, uint64_t offset, size_t length) except -1 nogil:
        while fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0:
            if errno == EINTR:
                continue
            if errno == EOPNOTSUPP or errno == EINVAL:       # no filesystem that knows holes, no such device
                return self.write(batch, zeros, offset, length)
            return self.fail("clearing", offset, length, errno)
        batch.written += length
        return 0

    cdef int fail(self, const char *what, uint64_t offset, size_t length, int error) except -1 nogil:
        with gil:
            raise TargetError(f"{self.label}: {what.decode()} {length} bytes at {offset}: {os.strerror(error)}")


cdef class _WriteFile:
    """The state of one write_file."""

    cdef ImageSource image
    cdef _FilePool pool
    cdef BatchRing ring
    cdef Progress progress
    cdef uint64_t chunks

    def __cinit__(self, _FilePool pool not None, Progress progress not None):
        self.pool = pool
        self.image = pool.image
        self.ring = BatchRing(pool, pool.window)
        self.progress = progress
        self.chunks = chunk_count(self.image.size, self.image.chunk_size)

    cdef int run(self) except -1 nogil:
        cdef uint64_t at = 0, data = 0, data_end = 0, held = 0, held_end = 0, end
        while at < self.chunks:
            if data_end <= at:
                self.next_data(at, &data, &data_end)
            if held_end <= at:
                self.next_held(at, &held, &held_end)
            if at < data and at < held:
                # a hole in both
                end = min(data, held)
                self.skip(at, end)
            elif at >= held:
                end = min(held_end, self.batch_end(at))
                self.submit(at, end, True)
            else:
                end = min(min(data_end, held), self.batch_end(at))
                self.submit(at, end, False)
            at = end
        while self.ring.busy:
            self.collect()
        return 0

    # The image's next chunks that are no holes; from `chunks` on if there are no more.
    cdef int next_data(self, uint64_t at, uint64_t *first, uint64_t *end) except -1 nogil:
        cdef uint64_t count = 0
        self.image.names.next_data(at, first, &count)
        if count == 0:
            first[0] = self.chunks
            count = 1
        end[0] = first[0] + count
        return 0

    # The next chunks where the target may hold anything but zeros, likewise.
    cdef int next_held(self, uint64_t at, uint64_t *first, uint64_t *end) except -1 nogil:
        cdef off_t start, stop
        cdef uint64_t chunk = self.image.chunk_size
        first[0] = self.chunks
        end[0] = self.chunks + 1
        if not self.pool.in_place:
            return 0
        start = lseek(self.pool.fd, at * chunk, SEEK_DATA)
        if start < 0 and errno == ENXIO:
            return 0
        stop = lseek(self.pool.fd, start, SEEK_HOLE) if start >= 0 else -1
        if start < 0 or stop < 0:
            first[0] = at                        # devices cannot tell
        elif <uint64_t>start < self.image.size:
            first[0] = max(at, <uint64_t>start // chunk)
            end[0] = min(self.chunks, (<uint64_t>stop + chunk - 1) // chunk)
        return 0

    # Batches end at multiples of their size: where one run ends does not shift all that follow.
    cdef uint64_t batch_end(self, uint64_t at) noexcept nogil:
        return min(self.chunks, (at // self.pool.batch_chunks + 1) * self.pool.batch_chunks)

    cdef int skip(self, uint64_t first, uint64_t end) except -1 nogil:
        cdef uint64_t length = min(end * self.image.chunk_size, self.image.size) - first * self.image.chunk_size
        self.progress.bytes_done = self.progress.bytes_done + length
        self.progress.zero_bytes = self.progress.zero_bytes + length
        return self.stopped()

    cdef int stopped(self) except -1 nogil:
        if self.progress.cancel_flag:
            with gil:
                raise Cancelled(f"{self.pool.label}: cancelled")
        return 0

    cdef int submit(self, uint64_t first, uint64_t end, bint compare) except -1 nogil:
        cdef batch_t *batch = self.ring.begin()
        if batch == NULL:
            self.collect()
            batch = self.ring.begin()
        batch.compare = compare
        self.pool.describe(batch, first, <uint32_t>(end - first))
        self.pool.submit(batch)
        return 0

    # Waits for the oldest batch.
    cdef int collect(self) except -1 nogil:
        cdef batch_t *batch = self.ring.oldest()
        cdef uint32_t i
        self.stopped()
        while not self.pool.wait(batch, POLL_MS):
            self.stopped()
        self.pool.check(batch)
        for i in range(batch.count):
            if batch.wants[i].state == CHUNK_ZERO:
                self.progress.zero_bytes = self.progress.zero_bytes + batch.wants[i].length
        self.progress.bytes_done = self.progress.bytes_done + batch.length
        self.progress.bytes_read = self.progress.bytes_read + batch.read
        self.progress.bytes_written = self.progress.bytes_written + batch.written
        self.ring.end()
        return 0


def write_file(ImageSource image not None, int fd, Progress progress not None, *, label, bint in_place=False, workers=0):
    cdef _WriteFile work
    cdef _FilePool pool
    status = os.fstat(fd)
    if progress.cancel_flag:
        raise Cancelled(f"{label}: cancelled before anything was written")
    if progress.bytes_total == 0:
        progress.bytes_total = image.size
    if stat.S_ISREG(status.st_mode):
        try:
            if not in_place:
                os.ftruncate(fd, 0)         # whatever was there would show through the holes
            if not in_place or status.st_size != image.size:
                os.ftruncate(fd, image.size)
        except OSError as reason:
            raise TargetError(f"{label}: setting its size to {image.size} bytes: {reason.strerror}") from reason
    else:
        size = os.lseek(fd, 0, os.SEEK_END)
        if size < image.size:
            raise TargetRefused(f"{label}: it has {size} bytes, the image to be written {image.size}")
    pool = _FilePool(image, fd, label=label, in_place=in_place, workers=workers)
    try:
        work = _WriteFile(pool, progress)
        with nogil:
            work.run()
    finally:
        pool.close()
