"""An image that goes on with zeros, for targets that take whole blocks only."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from vmbackupd.engine.sink cimport ChunkSource, chunk_count, chunk_length


cdef class PaddedSource(ChunkSource):
    cdef ChunkSource source

    def __init__(self, ChunkSource source not None, uint64_t size):
        if size < source.size or size - source.size >= source.chunk_size:
            raise ValueError(f"{source.size} bytes in chunks of {source.chunk_size} are not padded to {size}")
        self.source = source
        self.size = size
        self.chunk_size = source.chunk_size

    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil:
        cdef size_t inner = chunk_length(self.source.size, self.chunk_size, index)
        if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            with gil:
                raise IndexError(f"chunk {index} of {length} bytes")
        if inner > 0:
            self.source.get(index, into, inner)
        memset(into + inner, 0, length - inner)
        return 0

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        if index >= chunk_count(self.source.size, self.chunk_size):
            first[0] = count[0] = 0
            return 0
        return self.source.next_data(index, first, count)
