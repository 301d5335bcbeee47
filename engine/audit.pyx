# cython: cdivision=True
"""Comparison of chunks with those of a stored image, by name: nothing of the stored image's data is read."""

from libc.stdint cimport uint8_t, uint64_t

from vmbackupd.engine.bitmap cimport Bitmap
from vmbackupd.engine.image cimport ImageSource
from vmbackupd.engine.layout cimport KIND_CHUNK, is_zero_name
from vmbackupd.engine.sink cimport ChunkSink, chunk_count, chunk_length
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import InvalidArgument


cdef class AuditSink(ChunkSink):
    cdef ImageSource base
    cdef uint64_t chunks
    cdef readonly uint64_t compared
    cdef readonly Bitmap missed

    def __cinit__(self, ImageSource base not None):
        self.base = base
        self.size = base.size
        self.chunk_size = base.chunk_size
        self.chunks = chunk_count(base.size, base.chunk_size)
        self.missed = Bitmap(self.chunks)

    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        cdef uint8_t name[32]
        cdef bint same
        if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            self._refuse(index, 1)
        self.base.names.name(index, name)
        if is_zero_name(name):
            same = is_zero(data, length)
        else:
            same = self.base.names.reader.is_named(KIND_CHUNK, data, length, name)
        if not same:
            self.missed.set_range(index, 1)
        self.compared += 1
        return 0

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint64_t end = first + count, at = first, data = 0, run = 0
        if first > self.chunks or count > self.chunks - first:
            self._refuse(first, count)
        self.compared += count
        while at < end:
            self.base.names.next_data(at, &data, &run)
            if run == 0 or data >= end:
                return 0
            at = min(data + run, end)
            self.missed.set_range(data, at - data)
        return 0

    cdef int _refuse(self, uint64_t first, uint64_t count) except -1 nogil:
        with gil:
            raise InvalidArgument(f"{count} chunk(s) from number {first} are not part of an image of {self.size} bytes")
