# One connection to an NBD export over libnbd. Everything waits in step(): with a bounded poll, so that a peer that
# hangs can be cancelled.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from vmbackupd.engine.libnbd cimport nbd_completion_callback, nbd_handle
from vmbackupd.engine.progress cimport Progress

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

cdef enum:
    POLL_MS = 100                    # longest wait before the cancel flags are looked at again
    REQUEST_LIMIT = 32 << 20         # bytes of one read or write, unless the server says less
    ZERO_LIMIT = 128 << 20           # bytes of one write-zeroes: some servers really write them
    STATUS_LIMIT = 1 << 30           # bytes asked about in one block status


# a request and its answer; it must live until `pending` is 0 or the connection is abandoned
cdef struct Request:
    uint32_t pending        # commands on their way
    int error               # errno of the first that failed, or 0


# for a libnbd call: counts `request.pending` down
cdef nbd_completion_callback completion(Request *request) noexcept nogil


cdef class NbdConnection:
    cdef nbd_handle *handle              # NULL once closed
    cdef pthread_mutex_t mutex           # held while a call uses the handle
    cdef readonly str export
    cdef readonly uint64_t size
    cdef readonly bint read_only
    cdef readonly bint can_block_status
    cdef readonly bint has_bitmap
    cdef bytes bitmap_context            # name of the meta context of the dirty bitmap asked for, or None
    cdef readonly bint can_zero
    cdef readonly bint can_flush
    cdef readonly uint32_t min_block     # bytes; offsets and lengths of requests are multiples of it
    cdef readonly uint32_t max_request   # bytes of one read or write
    cdef int cancel_flag                 # of this connection
    cdef const int *other_flag           # of the progress of the running call, or NULL
    cdef int in_use
    cdef bint writing                    # failures are the target's
    cdef uint32_t idle_ms
    cdef uint32_t stall_ms

    # use of the handle by one call at a time
    cdef int enter(self, const int *cancel_flag) except -1 nogil
    cdef void leave(self) noexcept nogil
    # waits up to `wait_ms` for the socket and does what can be done. Raises Cancelled, or an error of the connection,
    # after abandoning it
    cdef int step(self, uint32_t wait_ms) except -1 nogil
    # both raise if the request cannot even be queued
    cdef int start_read(self, Request *request, uint8_t *into, size_t length, uint64_t offset) except -1 nogil
    cdef int start_write(self, Request *request, const uint8_t *data, size_t length, uint64_t offset) except -1 nogil
    cdef int start_zero(self, Request *request, uint64_t length, uint64_t offset) except -1 nogil
    cdef int wait(self, Request *request, const char *what, uint64_t offset, uint64_t length) except -1 nogil
    # synchronous, aligned or not, inside enter/leave
    cdef int read_into(self, uint8_t *into, size_t length, uint64_t offset) except -1 nogil
    cdef int flush(self) except -1 nogil
    cdef int fail(self, const char *what, uint64_t offset, uint64_t length, int error) except -1 nogil
    cdef int fail_connection(self, const char *what) except -1 nogil
    # closes at once, forgetting what is in flight: nothing of libnbd touches a buffer afterwards
    cdef void abandon(self) noexcept nogil
