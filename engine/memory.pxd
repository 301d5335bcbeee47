# Images in memory.

from libc.stdint cimport uint64_t
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource


cdef class MemorySource(ChunkSource):
    cdef readonly dict chunks
    cdef list indexes
    cdef public object on_get


cdef class MemorySink(ChunkSink):
    cdef readonly dict chunks
    cdef readonly set zeros
    cdef public object on_put


cdef class DigestSink(ChunkSink):
    cdef unsigned char key[32]
    cdef uint64_t sums[4]
    cdef readonly uint64_t data_chunks
    cdef readonly uint64_t zero_chunks
    cdef int add(self, uint64_t index, const unsigned char *data, size_t length) except -1 nogil
