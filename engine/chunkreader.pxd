# The way out of the repository: a chunk's content by its name, checked.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.chunkstore cimport ChunkStore
from vmbackupd.engine.index cimport IndexSet
from vmbackupd.engine.layout cimport Entry
from vmbackupd.engine.threads cimport pthread_mutex_t
from vmbackupd.engine.zstd cimport Codec

cdef enum:
    OPEN_PACKS = 64           # descriptors kept


cdef struct pack_file_t:
    int fd                    # -1: free
    int users
    uint64_t stamp            # when it was used last
    uint8_t pack_id[16]


# why a copy of a chunk could not be read
cdef enum:
    FINE = 0
    NOT_INDEXED = 1
    PACK_MISSING = 2
    UNREADABLE = 3            # the storage failed
    TRUNCATED = 4
    BAD_RECORD = 5
    BAD_CONTENT = 6
    BAD_SEAL = 7              # encrypted, and not what was encrypted for this place


cdef class ChunkReader:                    # any number of threads at once
    cdef IndexSet index
    cdef ChunkStore session                # the writer whose unpublished chunks are seen too, or None
    cdef object storage                    # open_pack(pack_id) -> fd or None; read_pack(pack_id, offset, length) -> bytes
    cdef object recover                    # called with a name and the index that did not lead to it: a new IndexSet, or None
    cdef object kept                       # earlier indexes: a thread may be searching one still
    cdef object last_error
    cdef object local                      # of each thread that asks for records
    cdef uint8_t *keys                     # chunk, node and content key
    cdef readonly bint encrypted
    cdef readonly size_t largest
    cdef pack_file_t files[64]             # OPEN_PACKS
    cdef uint64_t clock
    cdef bint remote                       # packs are no files: reading one takes a round trip
    cdef pthread_mutex_t lock
    # Puts the content of chunk `name` (`kind` says which key names it) at `into`, at most `capacity` bytes; *length is
    # its length. `codec` belongs to the calling thread.
    cdef int read(
        self, Codec codec, const uint8_t *name, int kind, uint8_t *into, size_t capacity, uint32_t *length
    ) except -1 nogil
    cdef int _attempt(
        self, Codec codec, const uint8_t *name, int kind, uint8_t *into, size_t capacity, uint32_t *length,
        uint8_t *pack_id
    ) except -1 nogil
    # A record (header and entry.stored bytes) of pack `pack_id`: FINE, and its content (entry.raw bytes) at `into`, or
    # what is wrong with it. `record` may be codec.room; where it is not, it stays as it is and codec.room is used.
    cdef int open_record(
        self, Codec codec, const uint8_t *pack_id, const uint8_t *record, const uint8_t *name, int kind,
        const Entry *entry, uint8_t *into, size_t capacity
    ) noexcept nogil
    # Is this the name of these bytes?
    cdef bint is_named(self, int kind, const uint8_t *data, size_t length, const uint8_t *name) noexcept nogil
    # Any range of a pack: FINE, PACK_MISSING, UNREADABLE or TRUNCATED.
    cdef int fetch_range(self, const uint8_t *pack_id, uint64_t offset, uint8_t *into, size_t wanted) except -1 nogil
    cdef int _fetch(
        self, Codec codec, const uint8_t *pack_id, const Entry *entry
    ) except -1 nogil
    cdef int _borrow(self, const uint8_t *pack_id, pack_file_t **slot, int *fd) except -2 nogil
    cdef void _give_back(self, pack_file_t *slot, int fd) noexcept nogil
    cdef int _recovered(self, const uint8_t *name) except -1 nogil
    cdef int _complain(self, const uint8_t *name, int problem, const uint8_t *pack_id) except -1 nogil
