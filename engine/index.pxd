# Where chunks lie: the table a writer fills, the sorted files on storage, and the set of files that is searched.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vmbackupd.engine.layout cimport Entry
from vmbackupd.engine.threads cimport pthread_mutex_t

cdef enum:
    STRIPES = 16            # locks of the block cache
    INDEX_HEADER = 64       # bytes before the first block
    INDEX_TAG = 32          # bytes of the seal at the end


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


# Blocks that were read and checked, shared by any number of sets. Any number of threads at once.
cdef class BlockCache:
    cdef size_t mask                      # number of slots - 1
    cdef uint64_t *keys                   # which block is in a slot: serial and block number + 1; 0 is none
    cdef uint8_t *data
    cdef pthread_mutex_t locks[16]        # STRIPES
    # The block, checked, or NULL if it is damaged. Holds *lock, which the caller gives back in either case.
    cdef const uint8_t *borrow(self, index_t *index, uint64_t block, pthread_mutex_t **lock) noexcept nogil


# An entry's place in a set: number of the file and of the entry in it. Opaque to whoever searches, but for its order.
cdef enum:
    PLACE_BITS = 40                       # of the entry's number


cdef class IndexSet:                      # immutable; any number of threads at once
    cdef readonly tuple files
    cdef BlockCache cache
    cdef index_t **indexes
    cdef uint8_t **usable                 # for each file: NULL, or a byte for each pack, 0: pass over its entries
    cdef size_t length
    # Searches from the place `start` on (0: everywhere): the place of an entry of this name in a usable pack, or -1.
    # The next copy: from the place after it on.
    cdef Py_ssize_t find(self, const uint8_t *name, size_t start, Entry *entry) noexcept nogil
    # The same, with the pack's id: for callers whose set may be exchanged between two calls.
    cdef Py_ssize_t locate(self, const uint8_t *name, size_t start, Entry *entry, uint8_t *pack_id) noexcept nogil
    cdef int64_t _first(self, index_t *index, const uint8_t *name, Entry *entry) noexcept nogil
    cdef bint _is_at(self, index_t *index, uint64_t number, const uint8_t *name, Entry *entry) noexcept nogil
    cdef int _search(self, index_t *index, uint64_t block, const uint8_t *name, Entry *entry) noexcept nogil
    cdef bint counts(self, size_t which, const Entry *entry) noexcept nogil
    cdef const uint8_t *pack_id(self, size_t place, uint32_t pack) noexcept nogil


cdef inline size_t place_of(size_t which, uint64_t number) noexcept nogil:
    return (which << PLACE_BITS) | <size_t>number


# Could a writer have made this entry? Keeps every later sum of its fields far from overflow.
cdef bint plausible(const Entry *entry) noexcept nogil
# Order of entries in a file: by name, then by number of the pack.
cdef int compare_entries(const void *left, const void *right) noexcept nogil
# The directory's line (DIRECTORY_ENTRY bytes) for a block that is complete.
cdef void seal_block(const uint8_t *key, const uint8_t *block, uint8_t *line) noexcept nogil
cdef bytes encode_header(uint64_t count, bytes key, bytes repository, bytes index, list packs)
cdef bytes seal_of(bytes key, bytes data)
