"""Lists of byte runs, such as the data areas of a disk, and what can be asked of two of them."""

from libc.stdint cimport UINT64_MAX, uint64_t
from libc.stdlib cimport free, qsort, realloc


cdef int _by_start(const void *left, const void *right) noexcept nogil:
    cdef uint64_t a = (<const Run *>left).start, b = (<const Run *>right).start
    return (a > b) - (a < b)


cdef class ExtentList:
    def __init__(self, runs=()):
        self.count = 0
        self.sorted = True
        for start, length in runs:
            self.add(start, length)

    def __dealloc__(self):
        free(self.runs)

    cdef int add_run(self, uint64_t start, uint64_t length) except -1 nogil:
        cdef Run *more
        cdef Run *last
        cdef size_t room
        if length == 0:
            return 0
        if length > UINT64_MAX - start:
            with gil:
                raise ValueError(f"{length} bytes at {start} end beyond 2^64")
        if self.count > 0 and self.sorted:
            last = &self.runs[self.count - 1]
            if start >= last.start and start <= last.start + last.length:
                if start + length > last.start + last.length:
                    last.length = start + length - last.start
                return 0
            if start < last.start:
                self.sorted = False
        if self.count == self.room:
            room = self.room * 2 if self.room else 16
            more = <Run *>realloc(self.runs, room * sizeof(Run))
            if more == NULL:
                with gil:
                    raise MemoryError()
            self.runs = more
            self.room = room
        self.runs[self.count].start = start
        self.runs[self.count].length = length
        self.count += 1
        return 0

    cdef void settle(self) noexcept nogil:
        cdef size_t i, kept = 0
        cdef uint64_t end
        if self.sorted:
            return
        qsort(self.runs, self.count, sizeof(Run), _by_start)
        for i in range(1, self.count):
            end = self.runs[kept].start + self.runs[kept].length
            if self.runs[i].start <= end:
                if self.runs[i].start + self.runs[i].length > end:
                    self.runs[kept].length = self.runs[i].start + self.runs[i].length - self.runs[kept].start
            else:
                kept += 1
                self.runs[kept] = self.runs[i]
        self.count = kept + 1
        self.sorted = True

    def add(self, start, length):
        if start < 0 or length < 0:
            raise ValueError(f"{length} bytes at {start}")
        self.add_run(start, length)

    def __len__(self):
        self.settle()
        return self.count

    def __iter__(self):
        cdef size_t i = 0
        self.settle()
        while i < self.count:
            yield (self.runs[i].start, self.runs[i].length)
            i += 1

    def __eq__(self, other):
        return isinstance(other, ExtentList) and list(self) == list(other)

    __hash__ = None

    def __repr__(self):
        return f"ExtentList({list(self)})"

    @property
    def total(self):
        cdef size_t i
        cdef uint64_t total = 0
        self.settle()
        for i in range(self.count):
            total += self.runs[i].length
        return total

    def union(self, ExtentList other not None):
        cdef size_t i
        cdef ExtentList made = ExtentList()
        self.settle()
        other.settle()
        for i in range(self.count):
            made.add_run(self.runs[i].start, self.runs[i].length)
        for i in range(other.count):
            made.add_run(other.runs[i].start, other.runs[i].length)
        made.settle()
        return made

    def intersect(self, ExtentList other not None):
        cdef size_t i = 0, j = 0
        cdef uint64_t start, end, a_end, b_end
        cdef ExtentList made = ExtentList()
        self.settle()
        other.settle()
        while i < self.count and j < other.count:
            a_end = self.runs[i].start + self.runs[i].length
            b_end = other.runs[j].start + other.runs[j].length
            start = max(self.runs[i].start, other.runs[j].start)
            end = min(a_end, b_end)
            if start < end:
                made.add_run(start, end - start)
            if a_end < b_end:
                i += 1
            else:
                j += 1
        return made

    def subtract(self, ExtentList other not None):
        cdef size_t i, j = 0, k
        cdef uint64_t at, end, hole_end
        cdef ExtentList made = ExtentList()
        self.settle()
        other.settle()
        for i in range(self.count):
            at = self.runs[i].start
            end = at + self.runs[i].length
            while j < other.count and other.runs[j].start + other.runs[j].length <= at:
                j += 1
            k = j
            while k < other.count and other.runs[k].start < end:
                if other.runs[k].start > at:
                    made.add_run(at, other.runs[k].start - at)
                hole_end = other.runs[k].start + other.runs[k].length
                at = max(at, hole_end)
                k += 1
            if at < end:
                made.add_run(at, end - at)
        return made

    def chunks(self, uint64_t chunk_size):
        cdef size_t i = 0
        cdef uint64_t first, end, next_chunk = 0
        if chunk_size == 0:
            raise ValueError("chunk size 0")
        self.settle()
        while i < self.count:
            first = max(next_chunk, self.runs[i].start // chunk_size)
            end = (self.runs[i].start + self.runs[i].length - 1) // chunk_size + 1
            i += 1
            if first < end:
                next_chunk = end
                yield (first, end - first)
