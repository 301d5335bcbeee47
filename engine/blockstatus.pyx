"""What an NBD server says of areas: which read as zeros, or which are marked in a dirty bitmap. One question at a time,
in bounded memory."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport strcmp
from vmbackupd.engine.libnbd cimport (
    LIBNBD_CONTEXT_BASE_ALLOCATION, LIBNBD_STATE_ZERO, nbd_aio_block_status, nbd_extent_callback)
from vmbackupd.engine.nbd cimport STATUS_LIMIT, NbdConnection, completion

from vmbackupd.errors import SourceError

cdef enum:
    STATE_DIRTY = 1         # of QEMU's bitmap contexts (docs/interop/nbd.txt there)


cdef int _keep(void *user_data, const char *metacontext, uint64_t offset, uint32_t *entries, size_t nr_entries,
               int *error) noexcept nogil:
    """What finds no room is dropped: the caller asks again from there."""
    cdef Answer *answer = <Answer *>user_data
    cdef size_t i
    cdef bint data
    if strcmp(metacontext, answer.context) != 0:
        return 0
    if offset != answer.expected:
        answer.broken = True
        return 0
    for i in range(0, nr_entries - nr_entries % 2, 2):
        if entries[i] == 0:
            answer.broken = True
            return 0
        data = ((entries[i + 1] & answer.flag) != 0) == answer.flagged
        if answer.count > 0 and answer.extents[answer.count - 1].data == data:
            answer.extents[answer.count - 1].length += entries[i]
        elif answer.count == answer.room:
            return 0
        else:
            answer.extents[answer.count].length = entries[i]
            answer.extents[answer.count].data = data
            answer.count += 1
        answer.expected += entries[i]
    return 0


cdef class BlockStatus:
    def __cinit__(self, NbdConnection connection not None, uint32_t room, *, bint bitmap=False):
        self.connection = connection
        self.context = connection.bitmap_context if bitmap else <bytes>LIBNBD_CONTEXT_BASE_ALLOCATION
        self.answer.context = self.context
        self.answer.flag = STATE_DIRTY if bitmap else LIBNBD_STATE_ZERO
        self.answer.flagged = bitmap
        self.answer.room = room
        self.answer.extents = <MapExtent *>malloc(room * sizeof(MapExtent))
        if self.answer.extents == NULL:
            raise MemoryError()

    def __dealloc__(self):
        # libnbd still points here: better no connection than a write to freed memory
        if self.answer.request.pending > 0 and self.connection is not None:
            self.connection.abandon()
        free(self.answer.extents)

    cdef int ask(self, uint64_t offset, uint64_t length) except -1 nogil:
        cdef nbd_extent_callback callback
        cdef uint32_t block = self.connection.min_block
        if length > STATUS_LIMIT:
            length = STATUS_LIMIT
        # to whole blocks, as servers want it, but not beyond the end
        length += (block - length % block) % block
        if length > self.connection.size - offset:
            length = self.connection.size - offset
        self.answer.expected = offset
        self.answer.count = 0
        self.answer.broken = False
        self.answer.request.error = 0
        self.answer.request.pending = 1
        callback.callback = _keep
        callback.user_data = &self.answer
        callback.free = NULL
        if nbd_aio_block_status(self.connection.handle, length, offset, callback, completion(&self.answer.request),
                                0) == -1:
            self.answer.request.pending = 0
            return self.connection.fail_connection("block status")
        return 0

    cdef int take(self, uint64_t offset) except -1 nogil:
        if self.answer.broken:
            with gil:
                raise SourceError(f"NBD export {self.connection.export!r}: malformed block status at {offset}")
        if self.answer.request.error != 0 or self.answer.count == 0:
            self.answer.count = 0
            return 0
        return 1
