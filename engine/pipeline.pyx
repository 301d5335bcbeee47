"""A ring of buffers with requests in flight over one NBD connection. First in, first out: a copy is in image order,
whatever the order of the server's answers, and memory is bounded by the ring."""

from libc.stdlib cimport calloc, free


cdef class Pipeline:
    def __cinit__(self, NbdConnection connection not None, size_t buffer_size, uint32_t count):
        cdef uint32_t i
        self.pool = BufferPool(buffer_size, count)
        self.slots = <Slot *>calloc(count, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError()
        for i in range(count):
            self.slots[i].data = self.pool.take()
        self.connection = connection
        self.buffer_size = buffer_size
        self.count = count

    def __dealloc__(self):
        cdef uint32_t i, pending = 0
        if self.slots != NULL:
            for i in range(self.busy):
                pending += self.slots[(self.first + i) % self.count].request.pending
            # libnbd still points into our buffers: better no connection than a write to freed memory
            if pending > 0 and self.connection is not None:
                self.connection.abandon()
        free(self.slots)

    cdef Slot *begin(self, uint64_t offset, size_t length) noexcept nogil:
        cdef Slot *slot
        if self.busy == self.count:
            return NULL
        slot = &self.slots[(self.first + self.busy) % self.count]
        self.busy += 1
        slot.request.pending = 0
        slot.request.error = 0
        slot.offset = offset
        slot.length = length
        slot.zero_bytes = 0
        return slot

    cdef Slot *oldest(self) noexcept nogil:
        return &self.slots[self.first] if self.busy > 0 else NULL

    cdef void end(self) noexcept nogil:
        self.first = (self.first + 1) % self.count
        self.busy -= 1
