# A bitmap of fixed length, one bit for each chunk of an image.

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t


cdef class Bitmap:
    cdef uint64_t *words
    cdef size_t word_count
    cdef readonly uint64_t length       # bits; those above it in the last word are 0
    cdef int _check(self, uint64_t first, uint64_t count) except -1 nogil
    cdef int _same_length(self, Bitmap other) except -1
    cdef int set_range(self, uint64_t first, uint64_t count) except -1 nogil
    cdef int clear_range(self, uint64_t first, uint64_t count) except -1 nogil
    cdef bint test(self, uint64_t index) noexcept nogil
    # first bit at or after `index` that is set (or clear); `length` if there is none
    cdef uint64_t next_set(self, uint64_t index) noexcept nogil
    cdef uint64_t next_clear(self, uint64_t index) noexcept nogil
