# A bounds-checked reader over bytes that nobody vouches for. A read beyond the end moves nothing, returns 0 and sets
# `failed` for good, so a parser reads a whole structure and checks `failed` once, before it uses any field.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from "<endian.h>" nogil:
    uint16_t le16toh(uint16_t)
    uint32_t le32toh(uint32_t)
    uint64_t le64toh(uint64_t)
    uint16_t be16toh(uint16_t)
    uint32_t be32toh(uint32_t)
    uint64_t be64toh(uint64_t)


cdef struct Cursor:
    const uint8_t *data
    size_t length
    size_t at           # next byte to read, never above length
    bint failed


cdef inline Cursor cursor_over(const uint8_t *data, size_t length) noexcept nogil:
    cdef Cursor made
    made.data = data
    made.length = length
    made.at = 0
    made.failed = False
    return made


cdef inline size_t remaining(const Cursor *cursor) noexcept nogil:
    return cursor.length - cursor.at


# `count` bytes in place and on; NULL (and failed) if there are fewer
cdef inline const uint8_t *take(Cursor *cursor, size_t count) noexcept nogil:
    cdef const uint8_t *found
    if cursor.failed or count > cursor.length - cursor.at:
        cursor.failed = True
        return NULL
    found = cursor.data + cursor.at
    cursor.at += count
    return found


# to an absolute position
cdef inline void seek(Cursor *cursor, size_t position) noexcept nogil:
    if position > cursor.length:
        cursor.failed = True
    else:
        cursor.at = position


cdef inline uint8_t read_u8(Cursor *cursor) noexcept nogil:
    cdef const uint8_t *raw = take(cursor, 1)
    return raw[0] if raw != NULL else 0


cdef inline uint16_t read_u16le(Cursor *cursor) noexcept nogil:
    cdef uint16_t value = 0
    cdef const uint8_t *raw = take(cursor, 2)
    if raw != NULL:
        memcpy(&value, raw, 2)
    return le16toh(value)


cdef inline uint32_t read_u32le(Cursor *cursor) noexcept nogil:
    cdef uint32_t value = 0
    cdef const uint8_t *raw = take(cursor, 4)
    if raw != NULL:
        memcpy(&value, raw, 4)
    return le32toh(value)


cdef inline uint64_t read_u64le(Cursor *cursor) noexcept nogil:
    cdef uint64_t value = 0
    cdef const uint8_t *raw = take(cursor, 8)
    if raw != NULL:
        memcpy(&value, raw, 8)
    return le64toh(value)


cdef inline uint16_t read_u16be(Cursor *cursor) noexcept nogil:
    cdef uint16_t value = 0
    cdef const uint8_t *raw = take(cursor, 2)
    if raw != NULL:
        memcpy(&value, raw, 2)
    return be16toh(value)


cdef inline uint32_t read_u32be(Cursor *cursor) noexcept nogil:
    cdef uint32_t value = 0
    cdef const uint8_t *raw = take(cursor, 4)
    if raw != NULL:
        memcpy(&value, raw, 4)
    return be32toh(value)


cdef inline uint64_t read_u64be(Cursor *cursor) noexcept nogil:
    cdef uint64_t value = 0
    cdef const uint8_t *raw = take(cursor, 8)
    if raw != NULL:
        memcpy(&value, raw, 8)
    return be64toh(value)
