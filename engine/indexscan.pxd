# The entries of several index files in one order: what merging and liveness are made of.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.index cimport index_t

cdef enum:
    DROPPED = 0xFFFFFFFF    # number of a pack whose entries are left out


# One file being read from front to end.
cdef struct stream_t:
    index_t *index
    uint32_t *numbers       # for each of its packs: the number in the common table, or DROPPED
    uint64_t next           # number of the entry after the current one
    uint64_t loaded         # blocks [loaded - held, loaded) are in `room`
    uint64_t held
    uint8_t *room
    const uint8_t *current  # NULL: the end
    uint8_t last[36]        # name and pack of the entry before, to see that they are sorted


# An entry with the place it was found at.
cdef struct item_t:
    uint8_t wire[48]        # ENTRY bytes; its pack counts in the common table
    uint64_t place


cdef class EntryScan:                     # one thread at a time
    cdef tuple files
    cdef readonly list packs              # the common table: ids
    cdef stream_t *streams
    cdef size_t length
    cdef size_t *heap                     # streams that are not at their end, the one with the least name first
    cdef size_t alive
    cdef item_t *group                    # entries of one name
    cdef size_t grouped
    cdef size_t room                      # items that fit
    cdef size_t at                        # next of the group to hand out
    # The next entry, valid until the next call; NULL: the end.
    cdef const item_t *next(self) except? NULL nogil
    cdef int _fill(self) except -1 nogil
    cdef int _keep(self, size_t which) except -1 nogil
    cdef int _advance(self, size_t which) except -1 nogil
    cdef int _load(self, size_t which) except -1 nogil
    cdef void _sink(self, size_t at) noexcept nogil
    cdef int _complain(self, size_t which, uint64_t block, bint unreadable) except -1 nogil
