# Where chunks lie: the table a writer fills, the sorted files on storage, and the set of files that is searched.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.layout cimport Entry
from vmbackupd.engine.threads cimport pthread_mutex_t

cdef enum:
    STRIPES = 16            # locks of the block cache


cdef class EntryTable:                    # callers lock; grows without bound: whoever fills it watches `count`
    cdef uint8_t *entries                 # wire form, ENTRY bytes each
    cdef uint32_t *slots                  # open addressing; entry number + 1, 0 is free
    cdef readonly uint32_t count
    cdef uint32_t room                    # entries that fit
    cdef uint32_t mask                    # number of slots - 1
    # True and *entry filled if the name is here
    cdef bint find(self, const uint8_t *name, Entry *entry) noexcept nogil
    # 1: added; 0: the name was here and stays as it was; -1: out of memory (no exception is set)
    cdef int add(self, const uint8_t *name, const Entry *entry) noexcept nogil
    # sets the place of a name that is here
    cdef void replace(self, const uint8_t *name, const Entry *entry) noexcept nogil
    cdef uint32_t *_slot(self, const uint8_t *name) noexcept nogil
    cdef int _grow(self) noexcept nogil


cdef struct index_t:
    int fd
    uint32_t serial         # differs between all indexes of a process: names blocks in the cache
    uint32_t pack_count
    uint64_t blocks
    uint64_t entries
    uint64_t *prefixes      # first 8 bytes of each block's first name, as a number
    uint8_t *tags           # keyed hash of each block
    uint8_t *packs          # PACK_ID bytes each
    uint8_t key[32]
    uint64_t damaged        # blocks found damaged so far: a hint, counted without a lock


cdef class IndexFile:
    cdef index_t index
    cdef readonly object label            # the object's name, for messages
    cdef int _parse_header(self, bytes header, bytes repository, bytes expected, size_t tail) except -1
    cdef int _parse_tail(self, bytes tail) except -1


cdef class IndexSet:                      # immutable; any number of threads at once
    cdef readonly tuple files
    cdef index_t **indexes
    cdef size_t length
    cdef size_t mask                      # number of cache slots - 1
    cdef uint64_t *keys                   # which block is in a slot: serial and block number + 1; 0 is none
    cdef uint8_t *cache
    cdef pthread_mutex_t locks[16]        # STRIPES
    # Searches the files from `start` on: the number of the file that has the name, or -1.
    cdef Py_ssize_t find(self, const uint8_t *name, size_t start, Entry *entry) noexcept nogil
    cdef int _search(self, index_t *index, uint64_t block, const uint8_t *name, Entry *entry) noexcept nogil
    cdef const uint8_t *pack_id(self, size_t which, uint32_t pack) noexcept nogil
