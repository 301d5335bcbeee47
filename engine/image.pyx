# cython: cdivision=True
"""Images in the repository: written chunk by chunk in any order, read by chunk or by range."""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.chunkstore cimport JOB_BYTES, JOB_IDLE, ChunkStore, job_t
from vmbackupd.engine.layout cimport KIND_CHUNK, NAME, is_zero_name
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource, chunk_length
from vmbackupd.engine.tree cimport TreeBuilder, TreeReader
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import InvalidArgument, RepositoryCorrupt, SourceError

cdef enum:
    RING = 48               # jobs of an image on their way at once; waiting for half of them is rare then
    MEMORY = 8              # those of them whose content we hold: 2 MiB


@cython.no_gc_clear          # __dealloc__ needs the store
cdef class ImageSink(ChunkSink):
    """An image on its way into the repository. Chunks never given read as they do in the tree it started from, or as
    zeros. A chunk given twice holds what came last."""

    def __cinit__(self, ChunkStore store not None, TreeBuilder builder not None):
        cdef int i
        cdef size_t chunks
        self.store = store
        self.builder = builder
        self.size = builder.shape.size
        self.chunk_size = builder.shape.chunk_size
        self.length = RING
        self.label = "file"
        chunks = max(<size_t>1, <size_t>JOB_BYTES // self.chunk_size)
        self.room = chunks * self.chunk_size
        self.ring = <job_t *>calloc(self.length, sizeof(job_t))
        self.memory = <uint8_t *>malloc(MEMORY * self.room)
        self.names = <uint8_t *>malloc(self.length * chunks * NAME)
        if self.ring == NULL or self.memory == NULL or self.names == NULL:
            raise MemoryError
        for i in range(self.length):
            self.ring[i].data = self.memory + i % MEMORY * self.room
            self.ring[i].names = self.names + i * chunks * NAME
            self.ring[i].chunk = self.chunk_size

    def __dealloc__(self):
        if self.ring != NULL:
            with nogil:
                self.wait()      # a worker may still be reading from this memory
        free(self.ring)
        free(self.memory)
        free(self.names)

    cdef int put(self, uint64_t index, const uint8_t *data, size_t length) except -1 nogil:
        cdef job_t *job
        if self.finished or length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            self._refuse(index, 1, length)
        if is_zero(data, length):
            return self.put_zero(index, 1)
        job = &self.ring[self.next]
        if self.filling and index != job.index + job.length // self.chunk_size:
            self._submit()
        if not self.filling:
            job = self._begin(index)
            self._reclaim(self.next + self.length - MEMORY, MEMORY // 2)      # the first of them has the same memory
            self.filling = True
        memcpy(job.data + job.length, data, length)
        job.length += length
        if job.length == self.room or length < self.chunk_size:
            self._submit()
        return 0

    cdef int put_file(self, int fd, uint64_t first, uint64_t count) except -1 nogil:
        cdef job_t *job
        cdef uint64_t part
        if self.finished or first > self.builder.shape.chunks or count > self.builder.shape.chunks - first:
            self._refuse(first, count, 0)
        self._submit()
        while count:
            part = min(count, self.room // self.chunk_size)
            job = self._begin(first)
            job.fd = fd
            job.offset = first * self.chunk_size
            job.length = min(part * self.chunk_size, self.size - job.offset)
            self.filling = True
            self._submit()
            first += part
            count -= part
        return 0

    cdef int put_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef int i
        cdef job_t *job
        if self.finished or first > self.builder.shape.chunks or count > self.builder.shape.chunks - first:
            self._refuse(first, count, 0)
        for i in range(self.length):
            job = &self.ring[i]
            if job.length and job.index < first + count and first < job.index + (
                job.length + self.chunk_size - 1
            ) // self.chunk_size:
                self._drain()
                break
        return self.builder.set_zero(first, count)

    # The next job of the ring, free and with nothing in it.
    cdef job_t *_begin(self, uint64_t index) except NULL nogil:
        cdef job_t *job = &self.ring[self.next]
        self._reclaim(self.next, self.length // 2)
        job.index = index
        job.length = 0
        job.fd = -1
        job.problem = 0
        job.fresh = 0
        job.added = 0
        return job

    # Makes job `number` free. If it is not yet, sleeps until the `count` jobs from there on are done: waking up for every
    # single one would cost more than the rest of this thread's work.
    cdef int _reclaim(self, int number, int count) except -1 nogil:
        cdef int i
        if self.ring[number % self.length].state == JOB_IDLE:
            return 0
        self.store.await_job(&self.ring[(number + count - 1) % self.length])
        for i in range(count):
            self._collect(&self.ring[(number + i) % self.length])
        return 0

    # Hands over the job that is being filled, if there is one.
    cdef void _submit(self) noexcept nogil:
        if self.filling:
            self.filling = False
            self.store.submit(&self.ring[self.next])
            self.next = (self.next + 1) % self.length

    cdef int settle(self) except -1 nogil:
        return self._drain()

    cdef void wait(self) noexcept nogil:
        cdef int i
        for i in range(self.length):
            self.store.await_job(&self.ring[i])

    # Waits for a job, enters its names into the tree and makes the job free.
    cdef int _collect(self, job_t *job) except -1 nogil:
        cdef size_t number
        if job.state == JOB_IDLE:
            return 0
        self.store.await_job(job)
        self.store.check()
        job.state = JOB_IDLE
        if job.problem:
            self._unread(job)
        self.chunks_new = self.chunks_new + job.fresh
        self.chunk_bytes = self.chunk_bytes + job.added
        for number in range((job.length + self.chunk_size - 1) // self.chunk_size):
            self.builder.set(job.index + number, job.names + number * NAME)
        job.length = 0
        return 0

    cdef int _unread(self, job_t *job) except -1 nogil:
        with gil:
            if job.problem < 0:
                raise SourceError(f"{self.label}: it ends before byte {job.offset + job.length}: it was truncated meanwhile")
            raise SourceError(f"{self.label}: reading {job.length} bytes at {job.offset}: {os.strerror(job.problem)}")

    cdef int _drain(self) except -1 nogil:
        cdef int i
        self._submit()
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
