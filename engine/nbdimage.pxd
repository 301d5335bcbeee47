# NBD exports as the ends of a copy or a revert.

from libc.stdint cimport uint64_t
from vmbackupd.engine.blockstatus cimport BlockStatus
from vmbackupd.engine.nbd cimport NbdConnection
from vmbackupd.engine.pipeline cimport Pipeline
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource


cdef class NbdSource(ChunkSource):
    cdef readonly NbdConnection connection
    cdef BlockStatus map
    cdef int _next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil


cdef class NbdSink(ChunkSink):
    cdef readonly NbdConnection connection
    cdef Pipeline ring
    cdef int _room(self) except -1 nogil
    cdef int _drain(self) except -1 nogil
    cdef int _zero(self, uint64_t first, uint64_t count) except -1 nogil
