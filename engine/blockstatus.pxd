# What an NBD server says of areas (block status): which read as zeros, or which are marked in a dirty bitmap.

from libc.stdint cimport uint32_t, uint64_t
from vmbackupd.engine.nbd cimport NbdConnection, Request


cdef struct MapExtent:
    uint64_t length
    bint data               # not known to read as zeros; of a bitmap: marked


# an answer as it arrives; a plain structure, for the callback runs without the GIL
cdef struct Answer:
    Request request         # pending until all of it is here
    const char *context     # the one that is asked about; a server tells of all that were negotiated
    uint32_t flag           # of an extent's flags, the one that counts
    bint flagged            # what `data` is where it is set
    uint64_t expected       # where the next extent must start
    uint32_t count
    uint32_t room
    bint broken             # one did not start there, or was empty
    MapExtent *extents      # they follow each other from the offset asked for


cdef class BlockStatus:
    cdef Answer answer
    cdef NbdConnection connection
    cdef bytes context      # keeps answer.context
    # asks about [offset, offset + length) or the first part of it
    cdef int ask(self, uint64_t offset, uint64_t length) except -1 nogil
    # once nothing is pending: 1, or 0 if the server cannot say and all is to be taken for data
    cdef int take(self, uint64_t offset) except -1 nogil
