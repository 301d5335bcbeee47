# A ring of buffers with requests in flight over one connection: first in, first out.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vmbackupd.engine.buffers cimport BufferPool
from vmbackupd.engine.nbd cimport NbdConnection, Request


# one buffer and what goes on with it
cdef struct Slot:
    Request request         # first: commands in flight that use `data`
    uint8_t *data           # buffer_size bytes, aligned
    uint64_t offset         # of the image, where data[0] belongs
    size_t length           # bytes of the image this slot stands for
    uint64_t zero_bytes     # of these, found to be zeros (the owner's business)


cdef class Pipeline:
    cdef NbdConnection connection
    cdef BufferPool pool
    cdef Slot *slots
    cdef readonly size_t buffer_size
    cdef uint32_t count                 # slots
    cdef uint32_t first                 # index of the oldest busy slot
    cdef uint32_t busy
    # the next free slot, now busy, cleared; NULL when all are busy
    cdef Slot *begin(self, uint64_t offset, size_t length) noexcept nogil
    # the oldest busy slot, or NULL
    cdef Slot *oldest(self) noexcept nogil
    # the oldest slot becomes free; it must have nothing pending
    cdef void end(self) noexcept nogil
