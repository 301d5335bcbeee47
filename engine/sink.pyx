"""Where a copy comes from and where it goes: base classes of everything that holds an image in chunks."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef class ChunkSink:
    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        with gil:
            raise NotImplementedError(f"{type(self).__name__}.put")

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        with gil:
            raise NotImplementedError(f"{type(self).__name__}.put_zero")


cdef class ChunkSource:
    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil:
        with gil:
            raise NotImplementedError(f"{type(self).__name__}.get")

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        with gil:
            raise NotImplementedError(f"{type(self).__name__}.next_data")
