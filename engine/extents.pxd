# Lists of byte runs: sorted, not overlapping, not touching.

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t


cdef struct Run:
    uint64_t start
    uint64_t length


cdef class ExtentList:
    cdef Run *runs
    cdef size_t count
    cdef size_t room
    cdef bint sorted            # runs are in their final form
    # any order, overlaps allowed
    cdef int add_run(self, uint64_t start, uint64_t length) except -1 nogil
    # brings the runs into their final form
    cdef void settle(self) noexcept nogil
