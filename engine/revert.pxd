# The pieces of one disk that a revert replaces.

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t


# 24 bytes
cdef struct Piece:
    uint64_t disk_offset
    uint64_t store_offset       # on the scratch disk
    uint32_t length
    uint32_t volume             # index in the plan's list, for messages


cdef class RevertPlan:
    cdef readonly uint64_t disk_size
    cdef Piece *pieces
    cdef size_t piece_count
    cdef size_t room
    cdef uint64_t exceptions
    cdef uint64_t store_end             # no piece's store bytes end beyond
    cdef bint finished
    cdef list volumes                   # names
    cdef int _add(self, const Piece *piece) except -1
    cdef int _ready(self) except -1
    # first piece that ends after `offset`; piece_count if none
    cdef size_t find(self, uint64_t offset) noexcept nogil
