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
    cdef uint8_t *memory                   # content of each of them
    cdef uint8_t *names                    # names of each of them
    cdef size_t room                       # bytes of content of a job
    cdef int length                        # jobs in the ring
    cdef int next                          # where the next one goes
    cdef bint filling                      # that one has chunks already and waits for more
    cdef bint finished
    cdef readonly uint64_t chunks_new
    cdef uint64_t chunk_bytes
    cdef str label                         # of the file that is read, for errors
    # `count` chunks from number `first` on, which a worker of the store reads from the same place in a file. The
    # descriptor must stay open until settle() or wait(). An error of reading is a SourceError of a later call.
    cdef int put_file(self, int fd, uint64_t first, uint64_t count) except -1 nogil
    # Everything that was put is in the tree.
    cdef int settle(self) except -1 nogil
    # No worker reads a file or our memory any more, whatever went wrong.
    cdef void wait(self) noexcept nogil
    cdef job_t *_begin(self, uint64_t index) except NULL nogil
    cdef int _reclaim(self, int number, int count) except -1 nogil
    cdef void _submit(self) noexcept nogil
    cdef int _collect(self, job_t *job) except -1 nogil
    cdef int _unread(self, job_t *job) except -1 nogil
    cdef int _drain(self) except -1 nogil
    cdef int _refuse(self, uint64_t index, uint64_t count, size_t length) except -1 nogil


cdef class ImageSource(ChunkSource):       # one thread at a time
    cdef readonly str tree                 # its id
    cdef TreeReader names
    cdef uint8_t *room                     # a chunk
    cdef int _read(self, uint64_t offset, uint8_t *into, size_t length) except -1 nogil
