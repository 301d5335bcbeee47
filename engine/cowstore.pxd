# The exceptions of a dm-snapshot persistent store. Only old_chunk is kept: new_chunk follows from the allocation order,
# which the parser insists on.

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t


cdef class CowStore:
    cdef object _read                   # (offset, length) -> bytes
    cdef readonly uint64_t length       # bytes of the store
    cdef readonly uint64_t origin_size  # bytes of the origin
    cdef readonly uint32_t chunk_size   # bytes
    cdef uint64_t entries_per_area
    cdef uint64_t origin_chunks
    cdef bint parsed
    cdef uint64_t *olds                 # old_chunk of exception i
    cdef size_t room
    cdef uint64_t found                 # exceptions
    cdef bytes _fetch(self, uint64_t offset, uint64_t length)
    cdef int _header(self) except -1
    cdef int parse(self) except -1      # reads the areas, once
    cdef int _area(self, uint64_t area) except -1
    cdef int _append(self, uint64_t old) except -1
    cdef int _unique(self) except -1
    cdef uint64_t _index(self, index) except? 0xFFFFFFFFFFFFFFFF
    cdef uint64_t new_of(self, uint64_t index) noexcept nogil     # new_chunk of exception i
