# Checking what is stored: packs byte by byte, trees name by name.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.index cimport IndexSet
from vmbackupd.engine.layout cimport Entry
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.threads cimport pthread_cond_t, pthread_mutex_t
from vmbackupd.engine.tree cimport shape_t
from vmbackupd.engine.zstd cimport Codec


# What one thread of a PackVerifier needs.
cdef class PackWorker:
    cdef Codec codec
    cdef uint8_t *window                   # records as they lie in the pack
    cdef size_t capacity
    cdef uint8_t *content                  # a record's content
    cdef uint64_t start                    # where in the pack the window begins
    cdef size_t length                     # bytes in it
    cdef uint64_t counted                  # bytes of the pack that progress knows of
    cdef int fd                            # of the pack, or -1
    cdef uint8_t pack_id[16]


cdef class PackVerifier:
    cdef ChunkReader reader
    cdef object storage
    cdef bytes seal_key, repository
    cdef Progress progress
    cdef object packs, sink, error, guard
    cdef int workers
    cdef double rate
    cdef double free_at                    # when the next byte may be read, if there is a rate
    cdef pthread_mutex_t lock
    cdef pthread_cond_t never              # waited for by those that pause
    cdef int _check(self, PackWorker worker, const uint8_t *entries, uint32_t count, uint64_t end, uint8_t *bad) except -1 nogil
    cdef int _window(self, PackWorker worker, uint64_t start, size_t length) except -1 nogil
    cdef int _read(self, PackWorker worker, uint64_t start, uint8_t *into, size_t length) except -1 nogil
    cdef int _pause(self, size_t length) except -1 nogil


cdef struct level_t:
    uint8_t *names


cdef class TreeChecker:
    cdef ChunkReader reader
    cdef Codec codec
    cdef IndexSet index
    cdef Progress progress
    cdef bint counts
    cdef object sound, damage
    cdef uint8_t **states                  # for each index file and each of its packs: how it stands with it
    cdef uint64_t **sizes                  # and its bytes
    cdef size_t files
    cdef shape_t shape
    cdef level_t levels[8]                 # MAX_DEPTH
    cdef uint8_t *room                     # a node as it is stored, or a chunk
    cdef readonly uint64_t nodes
    cdef readonly uint64_t chunks
    cdef int _node(self, int level, uint64_t index, const uint8_t *name) except -1 nogil
    cdef int _below(self, int level, uint64_t index, const uint8_t *names) except -1 nogil
    cdef int _find(self, const uint8_t *name, int kind, uint32_t raw, uint8_t *pack_id) except -1 nogil
    cdef int _tell(self, int level, uint64_t index, int problem, const uint8_t *name, const uint8_t *pack_id) except -1 nogil
    cdef int _skip(self, int level, uint64_t index) except -1 nogil
