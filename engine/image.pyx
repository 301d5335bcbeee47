# cython: cdivision=True
"""Images in the repository: written chunk by chunk in any order, read by chunk or by range."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.chunkstore cimport JOB_IDLE, ChunkStore, job_t
from vmbackupd.engine.layout cimport KIND_CHUNK, is_zero_name
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource, chunk_length
from vmbackupd.engine.tree cimport TreeBuilder, TreeReader
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import InvalidArgument, RepositoryCorrupt

cdef enum:
    RING = 32               # chunks of an image on their way at once: 2 MiB of memory at 64 KiB a chunk


@cython.no_gc_clear          # __dealloc__ needs the store
cdef class ImageSink(ChunkSink):
    """An image on its way into the repository. Chunks never given read as they do in the tree it started from, or as
    zeros. A chunk given twice holds what came last."""

    def __cinit__(self, ChunkStore store not None, TreeBuilder builder not None):
        cdef int i
        self.store = store
        self.builder = builder
        self.size = builder.shape.size
        self.chunk_size = builder.shape.chunk_size
        self.length = RING
        self.ring = <job_t *>calloc(self.length, sizeof(job_t))
        self.memory = <uint8_t *>malloc(self.length * <size_t>self.chunk_size)
        if self.ring == NULL or self.memory == NULL:
            raise MemoryError
        for i in range(self.length):
            self.ring[i].data = self.memory + i * <size_t>self.chunk_size

    def __dealloc__(self):
        cdef int i
        if self.ring != NULL and self.memory != NULL:
            with nogil:
                for i in range(self.length):      # a worker may still be reading from this memory
                    self.store.await_job(&self.ring[i])
        free(self.ring)
        free(self.memory)

    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        cdef job_t *job
        if self.finished or length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            self._refuse(index, 1, length)
        if is_zero(data, length):
            return self.put_zero(index, 1)
        job = &self.ring[self.next]
        if job.state != JOB_IDLE:
            # The ring is full. Sleep until half of it is done, not for every single job.
            self.store.await_job(&self.ring[(self.next + self.length // 2) % self.length])
            self._collect(job)
        memcpy(job.data, data, length)
        job.index = index
        job.length = length
        self.next = (self.next + 1) % self.length
        self.store.submit(job)
        return 0

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef int i
        if self.finished or first > self.builder.shape.chunks or count > self.builder.shape.chunks - first:
            self._refuse(first, count, 0)
        for i in range(self.length):
            if self.ring[i].state != JOB_IDLE and first <= self.ring[i].index < first + count:
                self._drain()
                break
        return self.builder.set_zero(first, count)

    # Waits for a job, enters its name into the tree and makes the job free.
    cdef int _collect(self, job_t *job) except -1 nogil:
        if job.state != JOB_IDLE:
            self.store.await_job(job)
            self.store.check()
            job.state = JOB_IDLE
            if job.added:
                self.chunks_new = self.chunks_new + 1
                self.chunk_bytes = self.chunk_bytes + job.added
            self.builder.set(job.index, job.name)
        return 0

    cdef int _drain(self) except -1 nogil:
        cdef int i
        for i in range(self.length):
            self._collect(&self.ring[(self.next + i) % self.length])
        return 0

    cdef int _refuse(self, uint64_t index, uint64_t count, size_t length) except -1 nogil:
        with gil:
            if self.finished:
                raise InvalidArgument("the image is finished")
            raise InvalidArgument(
                f"{count} chunk(s) of {length} bytes from number {index} are not part of an image of {self.size} bytes"
            )

    @property
    def bytes_stored(self):
        """Bytes this image added to the repository's packs so far: chunks and nodes that were not known, compressed."""
        return self.chunk_bytes + self.builder.bytes_stored

    @property
    def nodes_new(self):
        """Nodes of the tree this image added to the repository so far."""
        return self.builder.nodes_new

    def write(self, uint64_t offset, const uint8_t[::1] data not None):
        """Put ``data`` at byte ``offset``. Both are on chunk borders, or ``data`` ends with the image."""
        cdef size_t length = data.shape[0]
        cdef size_t done = 0
        cdef size_t part
        if offset > self.size or length > self.size - offset or offset % self.chunk_size or (
            length % self.chunk_size and offset + length != self.size
        ):
            raise InvalidArgument(f"{length} bytes at {offset} are no whole chunks of the image")
        if length == 0:
            return
        with nogil:
            while done < length:
                part = min(<size_t>self.chunk_size, length - done)
                self.put((offset + done) // self.chunk_size, &data[0] + done, part)
                done += part

    def zero(self, uint64_t first, uint64_t count):
        """Make ``count`` chunks from number ``first`` read as zeros."""
        with nogil:
            self.put_zero(first, count)

    def finish(self):
        """Complete the tree; its id. Nothing is visible to others before the writer publishes a manifest."""
        if self.finished:
            raise InvalidArgument("the image is finished")
        with nogil:
            self._drain()
        tree = self.builder.finish()
        self.store.check()
        self.finished = True
        return tree


cdef class ImageSource(ChunkSource):
    """A stored image. Every chunk is checked against its name when it is read."""

    def __cinit__(self, ChunkReader reader not None, str tree not None):
        self.tree = tree
        self.names = TreeReader(reader, tree)
        self.size = self.names.shape.size
        self.chunk_size = self.names.shape.chunk_size
        self.room = <uint8_t *>malloc(self.chunk_size)
        if self.room == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.room)

    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil:
        cdef uint8_t name[32]
        cdef uint32_t found = 0
        if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            with gil:
                raise InvalidArgument(f"chunk {index} of {length} bytes is not part of an image of {self.size} bytes")
        self.names.name(index, name)
        if is_zero_name(name):
            memset(into, 0, length)
            return 0
        self.names.reader.read(self.names.codec, name, KIND_CHUNK, into, length, &found)
        if found != length:
            with gil:
                raise RepositoryCorrupt(
                    f"chunk {name[:32].hex()} has {found} bytes, the tree {self.tree} needs {length} at chunk {index}"
                )
        return 0

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        return self.names.next_data(index, first, count)

    cdef int _read(self, uint64_t offset, uint8_t *into, size_t length) except -1 nogil:
        cdef uint64_t index
        cdef size_t within, part, whole
        while length:
            index = offset // self.chunk_size
            within = <size_t>(offset % self.chunk_size)
            whole = chunk_length(self.size, self.chunk_size, index)
            part = min(length, whole - within)
            if part == whole:
                self.get(index, into, whole)
            else:
                self.get(index, self.room, whole)
                memcpy(into, self.room + within, part)
            offset += part
            into += part
            length -= part
        return 0

    def read(self, uint64_t offset, size_t length):
        """``length`` bytes from byte ``offset``. InvalidArgument beyond the end, RepositoryCorrupt, StorageError."""
        cdef bytes out
        cdef uint8_t *into
        if offset > self.size or length > self.size - offset:
            raise InvalidArgument(f"{length} bytes at {offset} are beyond the image's {self.size} bytes")
        out = PyBytes_FromStringAndSize(NULL, length)
        into = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            self._read(offset, into, length)
        return out

    def extents(self):
        """Iterate over (offset, length) of the parts that are no holes, in bytes, ascending; adjacent parts occur."""
        cdef uint64_t first = 0
        cdef uint64_t count = 0
        cdef uint64_t index = 0
        while True:
            with nogil:
                self.names.next_data(index, &first, &count)
            if count == 0:
                return
            start = first * <object>self.chunk_size
            yield start, min(count * <object>self.chunk_size, self.size - start)
            index = first + count

    def data_bytes(self):
        """Bytes that are no holes: what a full read moves. Reads the tree's nodes."""
        return self.names.data_bytes()

    def walk(self):
        """Iterate over (name, kind) of all nodes (2) and chunks (1) of the tree, but its root record."""
        return self.names.walk()
