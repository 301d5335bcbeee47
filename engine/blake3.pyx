"""BLAKE3 as a kernel of our own: Debian 12 and 13 carry no C library for it."""

from libc.stdint cimport uint8_t

cdef extern from "blake3_kernel.h" nogil:
    enum:
        BLAKE3_AUTO
    int blake3_widest()
    void blake3_digest(const uint8_t *key, const uint8_t *data, size_t length, int lanes, uint8_t *out)


cdef void keyed_hash(const uint8_t *key, const uint8_t *data, size_t length, uint8_t *out) noexcept nogil:
    blake3_digest(key, data, length, BLAKE3_AUTO, out)


cdef bytes _digest(const uint8_t *key, const uint8_t[::1] data, int lanes):
    cdef uint8_t out[32]
    cdef size_t length = data.shape[0]
    cdef const uint8_t *start = &data[0] if length else out
    if lanes not in (0, 1, 4, 8, 16) or lanes > blake3_widest():
        raise ValueError(f"no kernel of {lanes} lanes on this machine")
    with nogil:
        blake3_digest(key, start, length, lanes, out)
    return out[:32]


def digest(const uint8_t[::1] data not None, *, int lanes=0):
    """The plain hash."""
    return _digest(NULL, data, lanes)


def keyed_digest(bytes key not None, const uint8_t[::1] data not None, *, int lanes=0):
    """The keyed hash."""
    if len(key) != 32:
        raise ValueError(f"a key has 32 bytes, not {len(key)}")
    return _digest(<const uint8_t *>key, data, lanes)


# The C function above has the name in this file; Python callers get the same name.
globals()["keyed_hash"] = globals().pop("keyed_digest")


def kernels():
    """The widths (lanes) of the kernels that run here, narrowest first."""
    return [lanes for lanes in (1, 4, 8, 16) if lanes <= blake3_widest()]
