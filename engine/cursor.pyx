"""A bounds-checked little- and big-endian reader; the code that matters is in cursor.pxd, for other engine modules."""

from libc.stdint cimport uint8_t


cdef class Reader:
    """The same reads for Python: each raises ValueError where the C ones set ``failed``."""

    cdef bytes _data            # owns what _cursor points into
    cdef Cursor _cursor

    def __init__(self, data):
        self._data = bytes(data)
        self._cursor = cursor_over(<const uint8_t *>self._data, len(self._data))

    cdef int _check(self) except -1:
        if self._cursor.failed:
            self._cursor.failed = False
            raise ValueError(f"read beyond the end: {remaining(&self._cursor)} bytes left of {self._cursor.length}")
        return 0

    @property
    def remaining(self):
        return remaining(&self._cursor)

    def seek(self, size_t position):
        seek(&self._cursor, position)
        self._check()

    def take(self, size_t count):
        cdef const uint8_t *raw = take(&self._cursor, count)
        self._check()
        return raw[:count]

    def u8(self):
        cdef object value = read_u8(&self._cursor)
        self._check()
        return value

    def u16le(self):
        cdef object value = read_u16le(&self._cursor)
        self._check()
        return value

    def u32le(self):
        cdef object value = read_u32le(&self._cursor)
        self._check()
        return value

    def u64le(self):
        cdef object value = read_u64le(&self._cursor)
        self._check()
        return value

    def u16be(self):
        cdef object value = read_u16be(&self._cursor)
        self._check()
        return value

    def u32be(self):
        cdef object value = read_u32be(&self._cursor)
        self._check()
        return value

    def u64be(self):
        cdef object value = read_u64be(&self._cursor)
        self._check()
        return value
