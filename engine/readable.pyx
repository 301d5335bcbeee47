"""Any byte range of a chunked image. The last few chunks are kept: neighbours are usually asked for one after the other."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from vmbackupd.engine.sink cimport ChunkSource, chunk_length


cdef class ReadableSource:
    def __cinit__(self, ChunkSource source not None):
        if source.chunk_size == 0:
            raise ValueError("chunk size 0")
        self.source = source
        self.cache = <uint8_t *>calloc(CACHED, source.chunk_size)
        if self.cache == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.cache)

    @property
    def size(self):
        return self.source.size

    cdef const uint8_t *chunk(self, uint64_t index) except NULL nogil:
        cdef unsigned int i, slot
        for i in range(CACHED):
            if self.full[i] and self.cached[i] == index:
                return self.cache + i * <size_t>self.source.chunk_size
        slot = self.turn
        self.turn = (self.turn + 1) % CACHED
        self.full[slot] = False
        self.source.get(index, self.cache + slot * <size_t>self.source.chunk_size,
                        chunk_length(self.source.size, self.source.chunk_size, index))
        self.cached[slot] = index
        self.full[slot] = True
        return self.cache + slot * <size_t>self.source.chunk_size

    cdef int read_into(self, uint8_t *into, size_t length, uint64_t offset) except -1 nogil:
        cdef uint64_t chunk_size = self.source.chunk_size
        cdef size_t inside, part
        if offset > self.source.size or length > self.source.size - offset:
            with gil:
                raise ValueError(f"{length} bytes at {offset} are not inside {self.source.size} bytes")
        while length > 0:
            inside = offset % chunk_size
            part = chunk_size - inside
            if part > length:
                part = length
            memcpy(into, self.chunk(offset // chunk_size) + inside, part)
            into += part
            offset += part
            length -= part
        return 0

    def read(self, offset, length):
        cdef uint64_t start
        cdef size_t count
        cdef bytes data
        cdef uint8_t *into
        if offset < 0 or length < 0 or offset + length > self.source.size:
            raise ValueError(f"{length} bytes at {offset} are not inside {self.source.size} bytes")
        start, count = offset, length
        data = PyBytes_FromStringAndSize(NULL, count)
        into = <uint8_t *>PyBytes_AS_STRING(data)
        with nogil:
            self.read_into(into, count, start)
        return data
