# BLAKE3 with 32 bytes of output: the name of a chunk. The kernel is in blake3_kernel.h.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

# any thread, no state; about 13 us for 64 KiB
cdef void keyed_hash(const uint8_t *key, const uint8_t *data, size_t length, uint8_t *out) noexcept nogil
