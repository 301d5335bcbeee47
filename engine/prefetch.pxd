# Many chunks at once: threads that read, decrypt, decompress and check what an image's next chunks are.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.image cimport ImageSource
from vmbackupd.engine.layout cimport Entry
from vmbackupd.engine.threads cimport pthread_cond_t, pthread_mutex_t
from vmbackupd.engine.zstd cimport Codec

cdef enum:
    BATCH_IDLE = 0
    BATCH_QUEUED = 1
    BATCH_RUNNING = 2
    BATCH_DONE = 3
    BATCH_FAILED = 4         # `error` of the pool says why

# what came of a chunk of a batch
cdef enum:
    CHUNK_READ = 1           # its content was read from the repository
    CHUNK_ZERO = 2           # a hole: zeros were put there
    CHUNK_SAME = 3           # what was there already is right


cdef struct want_t:
    uint8_t name[32]
    uint8_t *into
    uint32_t length
    int state                # CHUNK_READ and so on
    Entry entry
    uint8_t pack_id[16]


# Neighbouring chunks of an image, read by one worker. Its owner fills it, submits it and waits; it must live until then.
cdef struct batch_t:
    batch_t *next
    int state
    bint compare             # `data` holds what is at the target: only what differs is read
    uint64_t first           # chunk of the image
    uint32_t count
    uint64_t offset          # bytes: place in the image, and length of it
    size_t length
    uint8_t *data            # where the content goes; `length` bytes
    want_t *wants
    uint64_t read            # bytes of chunks that were read
    uint64_t written         # for whoever writes in the worker


cdef class Worker:                         # what one thread needs
    cdef Codec codec
    cdef uint8_t *scratch                  # records as they lie in a pack
    cdef size_t capacity
    cdef uint16_t *order                   # chunks of the batch that are to be fetched
    cdef batch_t *batch                    # being worked on


cdef class ReadPool:
    cdef readonly ImageSource image
    cdef ChunkReader reader
    cdef object threads
    cdef object error
    cdef readonly uint32_t batch_chunks    # chunks of a batch at most
    cdef readonly size_t batch_bytes       # bytes of them
    cdef readonly uint32_t window          # batches that keep all threads busy
    cdef uint32_t batch_limit
    cdef batch_t *head
    cdef batch_t *tail
    cdef bint closing
    cdef pthread_mutex_t lock
    cdef pthread_cond_t work               # a batch was queued, or closing
    cdef pthread_cond_t done               # a batch is done
    # Sets place and names of a batch; `batch.data` and `batch.wants` are the owner's.
    cdef int describe(self, batch_t *batch, uint64_t first, uint32_t count) except -1 nogil
    cdef void submit(self, batch_t *batch) noexcept nogil
    # Is it done (or failed)? Waits for that, so many milliseconds at most.
    cdef bint wait(self, batch_t *batch, uint32_t ms) noexcept nogil
    # Raises what made a batch fail.
    cdef int check(self, batch_t *batch) except -1 nogil
    cdef batch_t *_take(self) noexcept nogil
    cdef void _end(self, batch_t *batch, int state) noexcept nogil
    cdef int _loop(self, Worker worker) except -1 nogil
    cdef int _fill(self, Worker worker, batch_t *batch) except -1 nogil
    cdef uint32_t _decide(self, Worker worker, batch_t *batch) noexcept nogil
    cdef int _fetch(self, Worker worker, batch_t *batch, const uint16_t *order, uint32_t count) except -1 nogil
    cdef int _fetch_alone(self, Worker worker, want_t *want) except -1 nogil
    # For subclasses, in the worker: before anything is read, and when the content is there.
    cdef int before(self, Worker worker, batch_t *batch) except -1 nogil
    cdef int after(self, Worker worker, batch_t *batch) except -1 nogil


# Memory for batches in a ring: one owner, first in, first out.
cdef class BatchRing:
    cdef batch_t *batches
    cdef want_t *wants
    cdef uint8_t *memory
    cdef uint32_t count
    cdef uint32_t first                    # the oldest busy one
    cdef uint32_t busy
    cdef batch_t *begin(self) noexcept nogil      # a free one, busy from now on; NULL if there is none
    cdef batch_t *oldest(self) noexcept nogil     # NULL: none is busy
    cdef void end(self) noexcept nogil            # the oldest is free
