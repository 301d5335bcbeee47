# Which records the trees of some backups refer to.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.index cimport IndexSet
from vmbackupd.engine.indexscan cimport EntryScan
from vmbackupd.engine.zstd cimport Codec

cdef enum:
    UNKNOWN = 0             # no usable pack holds the name
    MARKED = 1
    MARKED_BEFORE = 2


cdef class LiveSet:                       # one thread at a time
    cdef IndexSet index
    cdef size_t files
    cdef uint8_t **bits                   # for each file of the index one bit for each entry
    cdef uint8_t **checked                # for each file one bit for each block whose seal was found right
    cdef uint8_t *window                  # blocks [first, first + held) of the file that is being joined
    cdef uint64_t first
    cdef uint64_t held
    cdef uint8_t *pending                 # names of chunks to be marked, with the number of their root: ITEM bytes each
    cdef size_t waiting
    cdef list roots
    cdef readonly list missing
    cdef readonly uint64_t missing_count
    cdef uint8_t *room                    # a node as it is stored
    cdef uint8_t *names[8]                # MAX_DEPTH: names of the node of each level that is being walked
    cdef size_t room_length
    cdef int _mark(self, const uint8_t *name) noexcept nogil
    cdef int _flush(self) except -1 nogil
    cdef void _join(self, size_t which, size_t count) noexcept nogil
    cdef const uint8_t *_block(self, size_t which, uint64_t block, uint64_t ahead) noexcept nogil
    cdef void _join_block(
        self, size_t which, uint64_t block, const uint8_t *data, size_t at, size_t count
    ) noexcept nogil
    cdef int _miss(self, const uint8_t *name, int kind, uint32_t root) except -1 nogil
    cdef int _walk(
        self, ChunkReader reader, Codec codec, const uint8_t *name, int level, uint32_t fanout, uint32_t root
    ) except -1 nogil
    cdef bint _is_marked(self, const uint8_t *name) noexcept nogil
    cdef int _sum(self, EntryScan scan, uint64_t *sums) except -1 nogil
