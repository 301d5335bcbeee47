"""Page-aligned buffers: one block, and a pool of equal buffers cut from one block."""

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **pointer, size_t alignment, size_t size)


cdef class AlignedBuffer:
    def __cinit__(self, size_t size):
        cdef void *made = NULL
        if size == 0 or posix_memalign(&made, ALIGNMENT, size) != 0:
            raise MemoryError(f"no aligned buffer of {size} bytes")
        # what lay here before may be another guest's: a short answer of a server must not show it
        memset(made, 0, size)
        self.data = <uint8_t *>made
        self.size = size

    def __dealloc__(self):
        free(self.data)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, <Py_ssize_t>self.size, 0, flags)

    def __len__(self):
        return self.size


cdef class BufferPool:
    def __cinit__(self, size_t buffer_size, size_t count):
        cdef size_t stride, i
        if buffer_size == 0 or count == 0 or buffer_size > (<size_t>1 << 40) or count > (1 << 20):
            raise ValueError(f"no pool of {count} buffers of {buffer_size} bytes")
        stride = (buffer_size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        self.block = AlignedBuffer(stride * count)
        self.free = <uint8_t **>calloc(count, sizeof(uint8_t *))
        if self.free == NULL:
            raise MemoryError()
        for i in range(count):
            self.free[count - 1 - i] = self.block.data + i * stride
        self.buffer_size = buffer_size
        self.count = count
        self.available = count

    def __dealloc__(self):
        free(self.free)

    cdef uint8_t *take(self) noexcept nogil:
        if self.available == 0:
            return NULL
        self.available -= 1
        return self.free[self.available]

    cdef void give(self, uint8_t *buffer) noexcept nogil:
        if buffer == NULL or self.available >= self.count:
            return
        self.free[self.available] = buffer
        self.available += 1
