"""Zero detection for Python callers; engine modules cimport ``is_zero`` from zero.pxd."""

from libc.stdint cimport uint8_t


def zero_chunks(const uint8_t[::1] data not None, size_t chunk_size):
    """One bool for each chunk of ``data`` (the last may be short): whether it is all zeros."""
    cdef size_t length = data.shape[0], start, size
    if chunk_size == 0:
        raise ValueError("chunk size 0")
    found = []
    start = 0
    while start < length:
        size = chunk_size if length - start > chunk_size else length - start
        found.append(bool(is_zero(&data[start], size)))
        start += size
    return found


def all_zero(const uint8_t[::1] data not None):
    """Whether every byte of ``data`` is zero; true for no bytes."""
    return data.shape[0] == 0 or bool(is_zero(&data[0], data.shape[0]))
