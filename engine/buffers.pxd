# Page-aligned memory with one owner, and a pool of equal buffers cut from one such block.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

cdef enum:
    ALIGNMENT = 4096     # what O_DIRECT and every block device are content with


cdef class AlignedBuffer:
    cdef uint8_t *data
    cdef readonly size_t size


cdef class BufferPool:
    cdef AlignedBuffer block
    cdef uint8_t **free
    cdef readonly size_t buffer_size     # bytes of one buffer, as asked for
    cdef readonly size_t count
    cdef readonly size_t available
    # a buffer, or NULL if all are taken; not for several threads at once
    cdef uint8_t *take(self) noexcept nogil
    cdef void give(self, uint8_t *buffer) noexcept nogil
