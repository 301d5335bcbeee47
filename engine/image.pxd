# Images in the repository, as the copy loop and the revert see them.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from vmbackupd.engine.chunkstore cimport ChunkStore, job_t
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource
from vmbackupd.engine.tree cimport TreeBuilder, TreeReader


cdef class ImageSink(ChunkSink):           # one thread at a time
    cdef ChunkStore store
    cdef TreeBuilder builder
    cdef job_t *ring                       # jobs are taken back in the order they were given
    cdef uint8_t *memory                   # a chunk for each of them
    cdef int length                        # jobs in the ring
    cdef int next                          # where the next one goes
    cdef bint finished
    cdef readonly uint64_t chunks_new
    cdef uint64_t chunk_bytes
    cdef int _collect(self, job_t *job) except -1 nogil
    cdef int _drain(self) except -1 nogil
    cdef int _refuse(self, uint64_t index, uint64_t count, size_t length) except -1 nogil


cdef class ImageSource(ChunkSource):       # one thread at a time
    cdef readonly str tree                 # its id
    cdef TreeReader names
    cdef uint8_t *room                     # a chunk
    cdef int _read(self, uint64_t offset, uint8_t *into, size_t length) except -1 nogil
