"""Any byte range of a chunked image. The last few chunks are kept: neighbours are usually asked for one after the other."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from vmbackupd.engine.sink cimport ChunkSource, chunk_length


cdef class ReadableSource:
    def __cinit__(self, ChunkSource source not None):
        if source.chunk_size == 0:
            raise ValueError("chunk size 0")
        self.source = source
        self.cache = <uint8_t *>calloc(CACHED, source.chunk_size)
        if self.cache == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.cache)

    @property
    def size(self):
        return self.source.size

    cdef const uint8_t *chunk(self, uint64_t index) except NULL nogil:
        cdef unsigned int i, slot
        for i in range(CACHED):
            if self.full[i] and self.cached[i] == index:
                return self.cache + i * <size_t>self.source.chunk_size
        slot = self.turn
        self.turn = (self.turn + 1) % CACHED
        self.full[slot] = False
        self.source.get(index, self.cache + slot * <size_t>self.source.chunk_size,
                        chunk_length(self.source.size, self.source.chunk_size, index))
        self.cached[slot] = index
        self.full[slot] = True
        return self.cache + slot * <size_t>self.source.chunk_size

    cdef bint holds(self, uint64_t index) noexcept nogil:
        cdef unsigned int i
        for i in range(CACHED):
            if self.full[i] and self.cached[i] == index:
                return True
        return False

    cdef int read_into(self, uint8_t *into, size_t length, uint64_t offset) except -1 nogil:
        cdef uint64_t chunk_size = self.source.chunk_size
        cdef size_t inside, part, whole
        if offset > self.source.size or length > self.source.size - offset:
            with gil:
                raise ValueError(f"{length} bytes at {offset} are not inside {self.source.size} bytes")
        while length > 0:
            inside = offset % chunk_size
            part = chunk_size - inside
            if part > length:
                part = length
            whole = chunk_length(self.source.size, self.source.chunk_size, offset // chunk_size)
            if part == whole and not self.holds(offset // chunk_size):
                # whoever reads whole chunks does not come back for them
                self.source.get(offset // chunk_size, into, whole)
            else:
                memcpy(into, self.chunk(offset // chunk_size) + inside, part)
            into += part
            offset += part
            length -= part
        return 0

    def read(self, offset, length):
        cdef uint64_t start
        cdef size_t count
        cdef bytes data
        cdef uint8_t *into
        if offset < 0 or length < 0 or offset + length > self.source.size:
            raise ValueError(f"{length} bytes at {offset} are not inside {self.source.size} bytes")
        start, count = offset, length
        data = PyBytes_FromStringAndSize(NULL, count)
        into = <uint8_t *>PyBytes_AS_STRING(data)
        with nogil:
            self.read_into(into, count, start)
        return data

    def read_buffer(self, offset, uint8_t[::1] buffer not None):
        cdef uint64_t start
        cdef size_t length = buffer.shape[0]
        if offset < 0 or offset + length > self.source.size:
            raise ValueError(f"{length} bytes at {offset} are not inside {self.source.size} bytes")
        start = offset
        if length > 0:
            with nogil:
                self.read_into(&buffer[0], length, start)

    def extents(self, offset, length, limit=1 << 16):
        cdef uint64_t first = 0, count = 0, at, stop, start
        cdef uint64_t chunk_size = self.source.chunk_size
        if offset < 0 or length < 0 or offset + length > self.source.size:
            raise ValueError(f"{length} bytes at {offset} are not inside {self.source.size} bytes")
        at, stop = offset, offset + length
        found = []
        while at < stop and len(found) < limit:
            with nogil:
                self.source.next_data(at // chunk_size, &first, &count)
            start = stop if count == 0 or first > stop // chunk_size else min(first * chunk_size, stop)
            if start > at:
                _extend(found, at, start, False)
                at = start
            if at < stop and count > 0:
                start = stop if first + count > stop // chunk_size else (first + count) * chunk_size
                _extend(found, at, start, True)
                at = start
        return found


def _extend(list found, at, end, data):
    """Adds an extent; one that goes on like the last one makes that longer."""
    if found and found[-1][2] == data:
        found[-1] = (found[-1][0], end - found[-1][0], data)
    else:
        found.append((at, end - at, data))
