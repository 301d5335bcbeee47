# What a thread needs to store and read chunks: compression (and encryption) with contexts that are made once.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from vmbackupd.engine.aead cimport Aead


cdef class Codec:                      # one thread at a time
    cdef void *compressor              # ZSTD_CCtx, made on the first use
    cdef void *decompressor            # ZSTD_DCtx, likewise
    cdef Aead aead                     # for a repository that is encrypted
    cdef readonly int level
    cdef readonly size_t capacity      # bytes of `room`
    cdef uint8_t *room                 # holds the compressed form of the longest content this codec is for
    # bytes put into `room`; 0: does not shrink, store it as it is; -1: out of memory (no exception is set)
    cdef Py_ssize_t pack(self, const uint8_t *data, size_t length) noexcept nogil
    # True if `data` is exactly one frame of exactly `length` bytes of content, which are then at `into`
    cdef bint unpack(self, const uint8_t *data, size_t stored, uint8_t *into, size_t length) noexcept nogil
