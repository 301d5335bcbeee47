# What a running copy has done so far, and the flag that stops it.

from libc.stdint cimport uint64_t


cdef class Progress:
    cdef public uint64_t bytes_total    # bytes of the image(s)
    cdef public uint64_t bytes_done     # bytes that are in the sink (or target) now, zeros included
    cdef public uint64_t bytes_read     # bytes that travelled from the source
    cdef public uint64_t bytes_written  # bytes that were written to the target, cleared ones included
    cdef public uint64_t zero_bytes     # of bytes_done: known or found to be zeros
    cdef int cancel_flag                # read by engine loops without the GIL
