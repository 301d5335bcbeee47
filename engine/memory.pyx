"""Images in memory: for tests, measurements and very small images."""

from bisect import bisect_left

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset
from vmbackupd.engine.blake3 cimport keyed_hash
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource, chunk_count, chunk_length


cdef class MemorySource(ChunkSource):
    def __init__(self, size, chunk_size, chunks=()):
        self.size = size
        self.chunk_size = chunk_size
        self.chunks = dict(chunks)
        self.indexes = sorted(self.chunks)
        for index, data in self.chunks.items():
            if len(data) != chunk_length(self.size, self.chunk_size, index):
                raise ValueError(f"chunk {index} of {len(data)} bytes")

    @classmethod
    def over(cls, data, chunk_size):
        """All of ``data``, chunks of zeros as holes."""
        pieces = ((at // chunk_size, bytes(data[at:at + chunk_size])) for at in range(0, len(data), chunk_size))
        return cls(len(data), chunk_size, {index: piece for index, piece in pieces if any(piece)})

    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil:
        with gil:
            if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
                raise IndexError(f"chunk {index} of {length} bytes")
            if self.on_get is not None:
                self.on_get(index)
            data = self.chunks.get(index)
            if data is None:
                memset(into, 0, length)
            else:
                memcpy(into, <const uint8_t *>(<bytes>data), length)
        return 0

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        with gil:
            at = bisect_left(self.indexes, index)
            count[0] = 0
            if at < len(self.indexes):
                first[0] = self.indexes[at]
                count[0] = 1
        return 0


cdef class MemorySink(ChunkSink):
    def __init__(self, size, chunk_size):
        self.size = size
        self.chunk_size = chunk_size
        self.chunks = {}
        self.zeros = set()

    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        with gil:
            if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
                raise IndexError(f"chunk {index} of {length} bytes")
            if self.on_put is not None:
                self.on_put(index)
            self.chunks[index] = (<const char *>data)[:length]
            self.zeros.discard(index)
        return 0

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        with gil:
            chunks = chunk_count(self.size, self.chunk_size)
            if first + count > chunks:
                raise IndexError(f"{count} chunks at {first} of {chunks}")
            self.zeros.update(range(first, first + count))
            for index in range(first, first + count):
                self.chunks.pop(index, None)
        return 0

    def complete(self):
        """Whether every chunk was put."""
        return len(self.chunks) + len(self.zeros) == chunk_count(self.size, self.chunk_size)

    def __bytes__(self):
        zero = bytes(self.chunk_size)
        whole = b"".join(self.chunks.get(i, zero) for i in range(chunk_count(self.size, self.chunk_size)))
        return whole[:self.size]


cdef class DigestSink(ChunkSink):
    def __init__(self, size, chunk_size):
        self.size = size
        self.chunk_size = chunk_size

    cdef int add(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        cdef uint64_t digest[4]
        cdef int i
        memcpy(self.key, &index, 8)
        keyed_hash(self.key, data, length, <uint8_t *>digest)
        for i in range(4):
            self.sums[i] += digest[i]
        return 0

    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        self.add(index, data, length)
        self.data_chunks += 1
        return 0

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        self.zero_chunks += count
        return 0

    def update(self, uint64_t index, const uint8_t[::1] data not None):
        """As if chunk ``index`` had been put."""
        self.add(index, &data[0], data.shape[0])
        self.data_chunks += 1

    def digest(self):
        return b"".join(int(self.sums[i]).to_bytes(8, "little") for i in range(4))
