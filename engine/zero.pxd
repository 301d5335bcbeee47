# Is this memory all zeros?

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.string cimport memcmp


cdef extern from *:
    """
    static const unsigned char vmbackupd_zeros[64] __attribute__((aligned(64)));
    """
    const unsigned char *vmbackupd_zeros


# True for an empty range. The first bytes are looked at, then the range is compared with itself 64 bytes on: the C
# library's memcmp is the fastest portable loop there is, stops at the first difference, and reads nothing out of range.
cdef inline bint is_zero(const uint8_t *data, size_t length) noexcept nogil:
    if length <= 64:
        return memcmp(data, vmbackupd_zeros, length) == 0
    return memcmp(data, vmbackupd_zeros, 64) == 0 and memcmp(data, data + 64, length - 64) == 0
