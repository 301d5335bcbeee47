# Where a copy comes from and where it goes: the border between the copy loop, the revert and the repository.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef class ChunkSink:            # where a copy goes; base class, methods raise NotImplementedError
    cdef readonly uint64_t size          # bytes of the image
    cdef readonly uint32_t chunk_size    # bytes; the last chunk may be short
    # one whole chunk; any order; one thread at a time per image
    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil
    # chunks that read as zeros
    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil


cdef class ChunkSource:          # where a copy comes from; base class, methods raise NotImplementedError
    cdef readonly uint64_t size
    cdef readonly uint32_t chunk_size
    # one whole chunk; length is that of the chunk (short for the last one)
    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil
    # next run of non-hole chunks at or after index, bounded length; count 0 = none
    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil


# bytes of chunk `index` of an image: chunk_size, less for the last one, 0 beyond the end
cdef inline size_t chunk_length(uint64_t size, uint32_t chunk_size, uint64_t index) noexcept nogil:
    cdef uint64_t start
    if chunk_size == 0 or index > size // chunk_size:
        return 0
    start = index * chunk_size
    return <size_t>(chunk_size if size - start >= chunk_size else size - start)


# number of chunks of an image
cdef inline uint64_t chunk_count(uint64_t size, uint32_t chunk_size) noexcept nogil:
    if chunk_size == 0:
        return 0
    return size // chunk_size + (1 if size % chunk_size else 0)
