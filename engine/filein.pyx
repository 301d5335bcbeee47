# cython: cdivision=True
"""A raw image file, or a block device, into a sink: its holes are asked for and never read.

One thread, no GIL; into the repository it plans only, and the repository's workers read. The page cache does the work of several reads in flight: the kernel is told a window ahead what will
be wanted, so that the device is busy with the next reads while this thread hands chunks to the sink. docs/performance.md
has the comparison with O_DIRECT.
"""

import os

from libc.errno cimport EINTR, EINVAL, ENXIO, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.types cimport off_t
from posix.unistd cimport SEEK_END, lseek, pread

from vmbackupd.engine.buffers cimport AlignedBuffer
from vmbackupd.engine.image cimport ImageSink
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.sink cimport ChunkSink, chunk_count, chunk_length
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import Cancelled, SourceError

cdef extern from "<fcntl.h>" nogil:
    int posix_fadvise(int fd, off_t offset, off_t length, int advice)
    int POSIX_FADV_SEQUENTIAL
    int POSIX_FADV_WILLNEED
    int POSIX_FADV_DONTNEED

cdef extern from *:
    """
    #ifndef SEEK_DATA
    #define SEEK_DATA 3
    #define SEEK_HOLE 4
    #endif
    """
    int SEEK_DATA
    int SEEK_HOLE

cdef enum:
    READ = 256 << 10                # bytes of one read: they stay in the CPU's cache until the sink has them
    CHUNK_MAX = 4 << 20
    STEP = 1 << 20                  # bytes of one announcement to the kernel
    LAG = 16 << 20                  # bytes that may be on their way through the repository's workers


cdef class _FileIn:
    """The state of one read_file."""

    cdef int fd
    cdef str label
    cdef ChunkSink sink
    cdef Progress progress
    cdef AlignedBuffer buffer
    cdef uint64_t size
    cdef uint64_t chunk
    cdef uint64_t done              # chunks from 0 that are in the sink
    cdef uint64_t window            # bytes announced ahead
    cdef uint64_t announced         # bytes from 0 the kernel was told of
    cdef bint drop                  # what was read leaves the page cache
    cdef uint64_t dropped           # bytes from 0 that left it
    cdef ImageSink image            # the sink, if its workers can read by themselves; else None

    def __cinit__(self, int fd, str label, ChunkSink sink, Progress progress, uint64_t window, bint drop):
        self.fd = fd
        self.label = label
        self.sink = sink
        self.image = sink if isinstance(sink, ImageSink) else None
        self.progress = progress
        self.size = sink.size
        self.chunk = sink.chunk_size
        self.window = window
        self.drop = drop
        self.buffer = AlignedBuffer(max(<uint64_t>READ // self.chunk, 1) * self.chunk)

    cdef int run(self) except -1 nogil:
        cdef uint64_t at = 0, start = 0, end = 0
        # an error here only costs speed
        posix_fadvise(self.fd, 0, 0, POSIX_FADV_SEQUENTIAL)
        while at < self.size:
            self.next_data(at, &start, &end)
            self.holes(start)
            if start < end:
                self.data(chunk_count(end, <uint32_t>self.chunk), end)
            at = end
        if self.image is not None:
            self.image.settle()
        if self.drop:
            self.forget(self.size)
        return 0

    cdef int next_data(self, uint64_t at, uint64_t *start, uint64_t *end) except -1 nogil:
        """The next bytes that are no hole, clipped to the image; start = end = size if there are none."""
        cdef off_t found = lseek(self.fd, at, SEEK_DATA)
        if found < 0:
            if errno != ENXIO:
                return self.all_data(at, start, end)
            start[0] = end[0] = self.size
            return 0
        start[0] = min(<uint64_t>found, self.size)
        found = lseek(self.fd, found, SEEK_HOLE)
        if found < 0:
            return self.all_data(at, start, end)
        end[0] = min(<uint64_t>found, self.size)
        if end[0] <= at:
            with gil:
                raise SourceError(f"{self.label}: it says that data at byte {at} ends at {end[0]}: it is changing")
        return 0

    cdef int all_data(self, uint64_t at, uint64_t *start, uint64_t *end) except -1 nogil:
        """A file or device that knows no holes."""
        if errno != EINVAL and errno != EOPNOTSUPP:
            with gil:
                raise SourceError(f"{self.label}: looking for data at byte {at}: {os.strerror(errno)}")
        start[0] = at
        end[0] = self.size
        return 0

    cdef int holes(self, uint64_t start) except -1 nogil:
        """Whole chunks before byte ``start`` are zeros; all of them if there is no more data."""
        cdef uint64_t first = self.done * self.chunk, stop
        cdef uint64_t end = start // self.chunk
        if start >= self.size:
            end = chunk_count(self.size, <uint32_t>self.chunk)
        if end > self.done:
            stop = min(end * self.chunk, self.size)
            self.sink.put_zero(self.done, end - self.done)
            self.progress.bytes_done = self.progress.bytes_done + stop - first
            self.progress.zero_bytes = self.progress.zero_bytes + stop - first
            self.done = end
        return 0

    cdef int data(self, uint64_t end, uint64_t stop) except -1 nogil:
        """Reads the chunks up to ``end``; data ends at byte ``stop``."""
        cdef uint64_t at, length, group = self.buffer.size // self.chunk, count
        while self.done < end:
            if self.progress.cancel_flag:
                with gil:
                    raise Cancelled(f"{self.label}: cancelled")
            # groups end at multiples of the buffer: the same reads whatever the holes before
            count = min(group - self.done % group, end - self.done)
            at = self.done * self.chunk
            length = min(count * self.chunk, self.size - at)
            self.announce(at, stop)
            if self.image is not None:      # its workers read: see chunkstore
                self.image.put_file(self.fd, self.done, count)
                self.progress.bytes_read = self.progress.bytes_read + length
                self.progress.bytes_done = self.progress.bytes_done + length
                self.done += count
            else:
                self.read(at, length)
                self.deliver(length)
            if self.drop:
                self.forget(at + length)
        return 0

    cdef void forget(self, uint64_t end) noexcept nogil:
        """Drops the file's pages up to ``end``, but those the repository's workers may not have read yet."""
        cdef uint64_t lag = LAG if self.image is not None and end < self.size else 0
        if end > self.dropped + lag:
            posix_fadvise(self.fd, self.dropped, end - lag - self.dropped, POSIX_FADV_DONTNEED)
            self.dropped = end - lag

    cdef void announce(self, uint64_t at, uint64_t stop) noexcept nogil:
        """Tells the kernel what will be wanted, as long as it is data."""
        cdef uint64_t ahead = min(at + self.window, stop), part
        if self.announced < at:
            self.announced = at
        # whole steps: an announcement is a system call
        while self.announced < ahead and (ahead - self.announced >= STEP or ahead == stop):
            part = min(<uint64_t>STEP, ahead - self.announced)
            posix_fadvise(self.fd, self.announced, part, POSIX_FADV_WILLNEED)
            self.announced += part

    cdef int read(self, uint64_t at, uint64_t length) except -1 nogil:
        cdef uint64_t have = 0
        cdef ssize_t got
        while have < length:
            got = pread(self.fd, self.buffer.data + have, length - have, at + have)
            if got < 0:
                if errno == EINTR:
                    continue
                with gil:
                    raise SourceError(
                        f"{self.label}: reading {length - have} bytes at {at + have}: {os.strerror(errno)}")
            if got == 0:
                with gil:
                    raise SourceError(
                        f"{self.label}: it ends at byte {at + have}, expected {self.size}: it was truncated meanwhile")
            have += got
        self.progress.bytes_read = self.progress.bytes_read + length
        return 0

    cdef int deliver(self, uint64_t length) except -1 nogil:
        cdef uint64_t at = 0, part
        while at < length:
            part = chunk_length(self.size, <uint32_t>self.chunk, self.done)
            if is_zero(self.buffer.data + at, part):
                self.sink.put_zero(self.done, 1)
                self.progress.zero_bytes = self.progress.zero_bytes + part
            else:
                self.sink.put(self.done, self.buffer.data + at, part)
            self.progress.bytes_done = self.progress.bytes_done + part
            self.done += 1
            at += part
        return 0


def file_size(int fd, str label="file"):
    cdef off_t end
    with nogil:
        end = lseek(fd, 0, SEEK_END)
    if end < 0:
        raise SourceError(f"{label}: its size is not to be had: {os.strerror(errno)}")
    return end


def read_file(int fd, ChunkSink sink not None, Progress progress not None, *, str label="file",
              uint64_t window=8 << 20, bint drop_cache=False):
    cdef _FileIn work
    if sink.chunk_size == 0 or sink.chunk_size > CHUNK_MAX or sink.chunk_size & (sink.chunk_size - 1):
        raise ValueError(f"chunk size {sink.chunk_size} is not a power of two up to {CHUNK_MAX}")
    size = file_size(fd, label)
    if size < sink.size:
        raise SourceError(f"{label}: it has {size} bytes, the image to be taken from it {sink.size}")
    if progress.cancel_flag:
        raise Cancelled(f"{label}: cancelled before it was read")
    if progress.bytes_total == 0:
        progress.bytes_total = sink.size
    work = _FileIn(fd, label, sink, progress, window, drop_cache)
    if work.image is not None:
        work.image.label = label
    try:
        with nogil:
            work.run()
    finally:
        if work.image is not None:
            with nogil:
                work.image.wait()
