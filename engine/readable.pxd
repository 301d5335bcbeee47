# Any byte range of a chunked image.

from libc.stdint cimport uint8_t, uint64_t
from vmbackupd.engine.sink cimport ChunkSource

cdef enum:
    CACHED = 8


cdef class ReadableSource:
    cdef readonly ChunkSource source
    cdef uint8_t *cache                 # CACHED chunks
    cdef uint64_t cached[CACHED]        # which chunks
    cdef bint full[CACHED]
    cdef unsigned int turn              # which is thrown out next
    cdef const uint8_t *chunk(self, uint64_t index) except NULL nogil
    cdef bint holds(self, uint64_t index) noexcept nogil
    cdef int read_into(self, uint8_t *into, size_t length, uint64_t offset) except -1 nogil
