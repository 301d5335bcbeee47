# The way into the repository: workers name, look up and compress chunks, and fill packs.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.index cimport EntryTable, IndexSet
from vmbackupd.engine.layout cimport Entry
from vmbackupd.engine.pack cimport pack_t
from vmbackupd.engine.threads cimport pthread_cond_t, pthread_mutex_t
from vmbackupd.engine.zstd cimport Codec

cdef enum:
    JOB_IDLE = 0
    JOB_QUEUED = 1
    JOB_RUNNING = 2
    JOB_DONE = 3

cdef enum:
    NO_FAILURE = 0
    FAILURE = 1             # `error` says what
    NO_MEMORY = 2

cdef enum:
    BUFFERS = 3             # packs in memory: one open, two being written


# Bytes of content in one job, or one chunk if that is more: what a core's second level cache holds, and few enough jobs
# that handing them over costs nothing.
cdef enum:
    JOB_BYTES = 256 << 10


# Some adjacent chunks on their way through a worker. Its owner fills it, queues it, and takes the names when it is done.
cdef struct job_t:
    job_t *next
    uint8_t *data           # the content, if fd is -1
    size_t length           # bytes of content
    size_t chunk            # bytes of a chunk; the last one may be shorter
    uint64_t index          # number of the first chunk
    int fd                  # a file that has the content, for the worker to read
    uint64_t offset         # where in the file it begins
    int problem             # of reading: an errno, -1 if the file ended early
    int state
    bint awaited            # somebody sleeps until it is done
    uint32_t fresh          # chunks that were not known
    uint64_t added          # bytes they added to the packs
    uint8_t *names          # 32 bytes a chunk; zeros for a chunk of zeros


cdef class ChunkStore:
    cdef IndexSet index                   # what was published when this writer began
    cdef IndexSet segments                # own entries that left the table
    cdef EntryTable table                 # own entries since
    cdef object kept                      # earlier `segments`: a thread may be searching one still
    cdef object segment_files
    cdef object put_pack
    cdef object spill_file
    cdef object threads
    cdef object local                     # of each thread that copies records
    cdef object error
    cdef bytes chunk_key, node_key, seal_key, repository, writer
    cdef uint8_t *keys                    # chunk, node, seal, content key (32 bytes each), repository (16), writer (12)
    cdef readonly int cipher              # of the packs; 0: none
    cdef readonly size_t pack_size
    cdef readonly int level
    cdef readonly size_t largest          # bytes of the longest content
    cdef readonly int workers
    cdef uint32_t segment_entries
    cdef uint32_t first_pack              # first pack whose entries are in `table`
    cdef readonly uint32_t packs          # packs begun so far
    cdef readonly uint64_t bytes_stored   # bytes of all records begun so far
    cdef pack_t buffers[3]                # BUFFERS
    cdef pack_t *open
    cdef job_t *head
    cdef job_t *tail
    cdef uint32_t unplaced                # entries in the table whose place in a pack is not known yet
    cdef int spilling                     # 1: wanted, 2: under way
    cdef int watchers                     # threads that wait for a record to be complete
    cdef int failed
    cdef bint closing
    cdef pthread_mutex_t lock
    cdef pthread_cond_t work              # a job was queued, or closing
    cdef pthread_cond_t done              # a job was done, or failed
    cdef pthread_cond_t changed           # a pack, the table or the failure changed
    # Stores content under its name unless it is known: 0, or -1 when the store has failed.
    cdef int keep(
        self, Codec codec, const uint8_t *data, size_t length, int kind, uint8_t *name, uint32_t *added
    ) noexcept nogil
    # Notes in the table that this content is to be stored: 1, 0 where this writer has it already, -1 failed. Whoever
    # gets 1 must place it.
    cdef int _announce(self, const uint8_t *name, Entry *entry) noexcept nogil
    cdef int _place(
        self, Codec codec, const uint8_t *name, Entry *entry, int compression, const uint8_t *payload
    ) noexcept nogil
    cdef pack_t *_room(self, size_t stored) noexcept nogil
    cdef Codec copier(self)
    cdef void submit(self, job_t *job) noexcept nogil
    cdef void await_job(self, job_t *job) noexcept nogil
    cdef void _work(self, Codec codec, uint8_t *room) noexcept nogil
    cdef void _do(self, job_t *job, Codec codec, uint8_t *room) noexcept nogil
    cdef pack_t *_next_full(self) noexcept nogil
    cdef void _watch(self) noexcept nogil
    cdef void _set_failed(self, int failure) noexcept nogil
    cdef int check(self) except -1 nogil
    cdef void pack_id(self, uint32_t number, uint8_t *into) noexcept nogil
    # Where a chunk of this writer lies. 0: not here; 1: in pack `pack_id` on storage; 2: header and payload were copied
    # to `into` (if they fit `capacity`), because the pack is still in memory.
    cdef int locate(
        self, const uint8_t *name, Entry *entry, uint8_t *pack_id, uint8_t *into, size_t capacity
    ) noexcept nogil
