"""A bitmap of fixed length, one bit for each chunk of an image."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

cdef extern from "<endian.h>" nogil:
    uint64_t htole64(uint64_t)
    uint64_t le64toh(uint64_t)

cdef extern from *:
    int __builtin_popcountll(unsigned long long) nogil
    int __builtin_ctzll(unsigned long long) nogil

MAX_BITS = 1 << 36          # 4 PiB in 64 KiB chunks


cdef class Bitmap:
    def __cinit__(self, length):
        if not 0 <= length <= MAX_BITS:
            raise ValueError(f"no bitmap of {length} bits")
        self.length = length
        self.word_count = (self.length + 63) // 64
        self.words = <uint64_t *>calloc(self.word_count if self.word_count else 1, 8)
        if self.words == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.words)

    cdef int _check(self, uint64_t first, uint64_t count) except -1 nogil:
        if first > self.length or count > self.length - first:
            with gil:
                raise IndexError(f"{count} bits at {first} are not inside {self.length}")
        return 0

    cdef int set_range(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint64_t end = first + count, bits
        self._check(first, count)
        while first < end:
            bits = min(<uint64_t>64 - first % 64, end - first)
            self.words[first // 64] |= (~<uint64_t>0 >> (64 - bits)) << (first % 64)
            first += bits
        return 0

    cdef int clear_range(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint64_t end = first + count, bits
        self._check(first, count)
        while first < end:
            bits = min(<uint64_t>64 - first % 64, end - first)
            self.words[first // 64] &= ~((~<uint64_t>0 >> (64 - bits)) << (first % 64))
            first += bits
        return 0

    cdef bint test(self, uint64_t index) noexcept nogil:
        return index < self.length and (self.words[index // 64] >> (index % 64)) & 1

    cdef uint64_t next_set(self, uint64_t index) noexcept nogil:
        cdef uint64_t word
        cdef size_t at = index // 64
        if index >= self.length:
            return self.length
        word = self.words[at] & (~<uint64_t>0 << (index % 64))
        while word == 0:
            at += 1
            if at >= self.word_count:
                return self.length
            word = self.words[at]
        return at * 64 + <uint64_t>__builtin_ctzll(word)

    cdef uint64_t next_clear(self, uint64_t index) noexcept nogil:
        cdef uint64_t word
        cdef size_t at = index // 64
        if index >= self.length:
            return self.length
        word = ~self.words[at] & (~<uint64_t>0 << (index % 64))
        while word == 0:
            at += 1
            if at >= self.word_count:
                return self.length
            word = ~self.words[at]
        return min(at * 64 + <uint64_t>__builtin_ctzll(word), self.length)

    def set(self, first, count=1):
        if first < 0 or count < 0:
            raise IndexError(f"{count} bits at {first}")
        self.set_range(first, count)

    def clear(self, first, count=1):
        if first < 0 or count < 0:
            raise IndexError(f"{count} bits at {first}")
        self.clear_range(first, count)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return bool(self.test(index))

    def __eq__(self, other):
        if not isinstance(other, Bitmap):
            return NotImplemented
        cdef Bitmap that = other
        return self.length == that.length and memcmp(self.words, that.words, self.word_count * 8) == 0

    __hash__ = None

    def count(self):
        cdef size_t i
        cdef uint64_t total = 0
        for i in range(self.word_count):
            total += <uint64_t>__builtin_popcountll(self.words[i])
        return total

    cdef int _same_length(self, Bitmap other) except -1:
        if self.length != other.length:
            raise ValueError(f"bitmaps of {self.length} and {other.length} bits")
        return 0

    def merge(self, Bitmap other not None):
        cdef size_t i
        self._same_length(other)
        for i in range(self.word_count):
            self.words[i] |= other.words[i]

    def intersect(self, Bitmap other not None):
        cdef size_t i
        self._same_length(other)
        for i in range(self.word_count):
            self.words[i] &= other.words[i]

    def subtract(self, Bitmap other not None):
        cdef size_t i
        self._same_length(other)
        for i in range(self.word_count):
            self.words[i] &= ~other.words[i]

    def copy(self):
        cdef Bitmap made = Bitmap(self.length)
        memcpy(made.words, self.words, self.word_count * 8)
        return made

    @staticmethod
    def from_bytes(const uint8_t[::1] data not None, length):
        cdef Bitmap made = Bitmap(length)
        cdef size_t i
        if data.shape[0] != (made.length + 7) // 8:
            raise ValueError(f"{data.shape[0]} bytes are no bitmap of {length} bits")
        if made.length == 0:
            return made
        memcpy(made.words, &data[0], data.shape[0])
        for i in range(made.word_count):
            made.words[i] = le64toh(made.words[i])
        if made.length % 64 and made.words[made.word_count - 1] >> (made.length % 64):
            raise ValueError(f"bits are set behind the last of {length}")
        return made

    def to_bytes(self):
        cdef bytes data = PyBytes_FromStringAndSize(NULL, (self.length + 7) // 8)
        cdef uint8_t *into = <uint8_t *>PyBytes_AS_STRING(data)
        cdef size_t i
        cdef uint64_t word
        for i in range(self.word_count):
            word = htole64(self.words[i])
            memcpy(into + 8 * i, &word, min(<size_t>8, len(data) - 8 * i))
        return data

    def runs(self):
        cdef uint64_t first = self.next_set(0), end
        while first < self.length:
            end = self.next_clear(first)
            yield (first, end - first)
            first = self.next_set(end)
