"""NBD exports as the ends of a copy or a revert: chunks out of one, chunks into one."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from vmbackupd.engine.blockstatus cimport BlockStatus
from vmbackupd.engine.nbd cimport POLL_MS, STATUS_LIMIT, ZERO_LIMIT, NbdConnection
from vmbackupd.engine.pipeline cimport Pipeline, Slot
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource, chunk_count, chunk_length

from vmbackupd.errors import TargetRefused

cdef enum:
    IN_FLIGHT = 16


cdef _check_chunk_size(NbdConnection connection, chunk_size):
    if not 512 <= chunk_size <= 4 << 20 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk size {chunk_size} is not a power of two from 512 to 4 MiB")
    if chunk_size % connection.min_block:
        raise ValueError(f"chunks of {chunk_size} bytes are not whole blocks of {connection.min_block}")


cdef class NbdSource(ChunkSource):
    def __init__(self, NbdConnection connection not None, *, size=None, chunk_size=65536):
        _check_chunk_size(connection, chunk_size)
        if size is not None and not 0 <= size <= connection.size:
            raise ValueError(f"NBD export {connection.export!r} has {connection.size} bytes, not {size}")
        self.connection = connection
        self.size = connection.size if size is None else size
        self.chunk_size = chunk_size
        self.map = BlockStatus(connection, 256)

    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil:
        if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            with gil:
                raise IndexError(f"chunk {index} of {length} bytes")
        self.connection.enter(NULL)
        try:
            self.connection.read_into(into, length, index * self.chunk_size)
        finally:
            self.connection.leave()
        return 0

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        self.connection.enter(NULL)
        try:
            self._next_data(index, first, count)
        finally:
            self.connection.leave()
        return 0

    cdef int _next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        """Asks on until there is data. What the server cannot say is data, as far as a question goes."""
        cdef uint64_t chunks = chunk_count(self.size, self.chunk_size), at = index * self.chunk_size, length, end
        cdef uint32_t i
        count[0] = 0
        while index < chunks and at < self.size:
            if not self.connection.can_block_status:
                self.map.answer.count = 0
            else:
                self.map.ask(at, self.size - at)
                while self.map.answer.request.pending > 0:
                    self.connection.step(POLL_MS)
                self.map.take(at)
            if self.map.answer.count == 0:
                self.map.answer.extents[0].length = STATUS_LIMIT
                self.map.answer.extents[0].data = True
                self.map.answer.count = 1
            for i in range(self.map.answer.count):
                length = self.map.answer.extents[i].length
                if length > self.size - at:
                    length = self.size - at
                if self.map.answer.extents[i].data and length > 0:
                    first[0] = at // self.chunk_size
                    end = chunk_count(at + length, self.chunk_size)
                    count[0] = end - first[0]
                    return 0
                at += length
        return 0

    def data_runs(self):
        cdef uint64_t index = 0, first = 0, count = 0
        while True:
            with nogil:
                self.next_data(index, &first, &count)
            if count == 0:
                return
            index = first + count
            yield (first, count)


cdef class NbdSink(ChunkSink):
    def __init__(self, NbdConnection connection not None, *, size=None, chunk_size=65536):
        _check_chunk_size(connection, chunk_size)
        if connection.read_only:
            raise TargetRefused(f"NBD export {connection.export!r}: it is read-only")
        if size is not None and not 0 <= size <= connection.size:
            raise TargetRefused(
                f"NBD export {connection.export!r}: it has {connection.size} bytes, the image to be written {size}")
        self.connection = connection
        self.size = connection.size if size is None else size
        self.chunk_size = chunk_size
        self.ring = Pipeline(connection, chunk_size, IN_FLIGHT)
        connection.writing = True

    cdef int _room(self) except -1 nogil:
        """Ends what is written; waits until a buffer is free."""
        cdef Slot *slot = self.ring.oldest()
        while slot != NULL and (slot.request.pending == 0 or self.ring.busy == IN_FLIGHT):
            while slot.request.pending > 0:
                self.connection.step(POLL_MS)
            self.ring.end()
            if slot.request.error != 0:
                return self.connection.fail("writing", slot.offset, slot.length, slot.request.error)
            slot = self.ring.oldest()
        return 0

    cdef int _drain(self) except -1 nogil:
        cdef Slot *slot = self.ring.oldest()
        while slot != NULL:
            while slot.request.pending > 0:
                self.connection.step(POLL_MS)
            self._room()
            slot = self.ring.oldest()
        return 0

    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        cdef Slot *slot
        if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            with gil:
                raise IndexError(f"chunk {index} of {length} bytes")
        self.connection.enter(NULL)
        try:
            self._room()
            slot = self.ring.begin(index * self.chunk_size, length)
            memcpy(slot.data, data, length)
            self.connection.start_write(&slot.request, slot.data, length, slot.offset)
            self.connection.step(0)
        finally:
            self.connection.leave()
        return 0

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint64_t chunks = chunk_count(self.size, self.chunk_size)
        if first > chunks or count > chunks - first:
            with gil:
                raise IndexError(f"{count} chunks at {first} of {chunks}")
        self.connection.enter(NULL)
        try:
            self._zero(first, count)
        finally:
            self.connection.leave()
        return 0

    cdef int _zero(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint64_t at = first * self.chunk_size, end = (first + count) * self.chunk_size, part
        cdef Slot *slot
        if end > self.size:
            end = self.size
        while at < end:
            part = end - at
            if part > ZERO_LIMIT:
                part = ZERO_LIMIT
            if part > self.chunk_size and not self.connection.can_zero:
                part = self.chunk_size
            self._room()
            slot = self.ring.begin(at, part)
            if self.connection.can_zero:
                self.connection.start_zero(&slot.request, part, at)
            else:
                memset(slot.data, 0, part)
                self.connection.start_write(&slot.request, slot.data, part, at)
            at += part
        return 0

    def finish(self):
        with nogil:
            self.connection.enter(NULL)
            try:
                self._drain()
                self.connection.flush()
            finally:
                self.connection.leave()
