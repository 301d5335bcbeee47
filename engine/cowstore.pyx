"""Parser of the dm-snapshot persistent exception store ("P"), as Linux writes it.

Source of the format: drivers/md/dm-snap-persistent.c, unchanged from 2.6 to 6.12. All integers are little-endian, the
unit is the chunk:

    chunk 0             struct disk_header { u32 magic "SnAp"; u32 valid; u32 version = 1; u32 chunk_size; /* sectors */ }
    chunk 1 + (E+1)*a   area a: E = chunk bytes / 16 times struct disk_exception { u64 old_chunk; u64 new_chunk }
    the E chunks after  the old content of the area's exceptions, in their order

old_chunk is a chunk of the origin, new_chunk one of the store, counted from its start. The first entry with new_chunk 0
ends everything; the kernel zeroes an area before it fills it.

A guest controls these bytes. So the parser believes nothing, and it is stricter than the kernel: entries are in
allocation order (entry i of area a has its data at area + 1 + i), no origin chunk appears twice, and nothing follows the
end within its area. A store that the kernel made, and that was never merged, keeps all of this.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy
from vmbackupd.engine.cursor cimport Cursor, cursor_over, read_u32le, read_u64le
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import StoreCorrupt

cdef enum:
    MAGIC = 0x70416E53
    VERSION = 1
    HEADER = 16
    ENTRY = 16
    SECTOR = 512
    LARGEST_CHUNK = 16 << 20        # the kernel takes more, nobody makes more (LVM: 512 KiB)


cdef int _compare(const void *left, const void *right) noexcept nogil:
    cdef uint64_t a = (<const uint64_t *>left)[0], b = (<const uint64_t *>right)[0]
    return (a > b) - (a < b)


cdef class CowStore:
    def __init__(self, read, length, origin_size):
        if not 0 <= length < 1 << 63 or not 0 <= origin_size < 1 << 63:
            raise ValueError(f"store of {length} bytes, origin of {origin_size} bytes")
        if self.chunk_size:
            raise ValueError("read already")
        self._read = read
        self.length = length
        self.origin_size = origin_size
        self._header()

    def __dealloc__(self):
        free(self.olds)

    cdef bytes _fetch(self, uint64_t offset, uint64_t length):
        if length > self.length or offset > self.length - length:
            raise StoreCorrupt(
                f"COW store: it ends at byte {self.length}, but bytes {offset} to {offset + length} should hold metadata")
        data = bytes(self._read(offset, length))
        if len(data) != length:
            raise StoreCorrupt(f"COW store: {len(data)} bytes instead of {length} at byte {offset}: truncated")
        return data

    cdef int _header(self) except -1:
        cdef bytes raw = self._fetch(0, HEADER)
        cdef Cursor cursor = cursor_over(<const uint8_t *>raw, HEADER)
        cdef uint32_t magic = read_u32le(&cursor), valid = read_u32le(&cursor)
        cdef uint32_t version = read_u32le(&cursor), sectors = read_u32le(&cursor)
        if magic != MAGIC:
            raise StoreCorrupt(f"COW store: magic is {magic:#010x}, not {MAGIC:#010x}: this is no snapshot store")
        if version != VERSION:
            raise StoreCorrupt(f"COW store: version {version}, only {VERSION} is known")
        if valid != 1:
            raise StoreCorrupt(
                f"COW store: marked invalid ({valid}): the guest dropped the snapshot (store full or an I/O error)")
        if sectors == 0 or sectors & (sectors - 1) or sectors > LARGEST_CHUNK // SECTOR:
            raise StoreCorrupt(f"COW store: chunk size of {sectors} sectors is not a power of two up to 16 MiB")
        self.chunk_size = sectors * SECTOR
        if self.length // self.chunk_size < 2:
            raise StoreCorrupt(
                f"COW store: {self.length} bytes have no room for a header and an area of {self.chunk_size} bytes each")
        self.entries_per_area = self.chunk_size // ENTRY
        self.origin_chunks = (self.origin_size + self.chunk_size - 1) // self.chunk_size
        return 0

    cdef int parse(self) except -1:
        cdef uint64_t area = 0
        if self.parsed:
            return 0
        self.found = 0
        # each turn reads an area that is really there, so a store can't keep us longer than its own length
        while self._area(area):
            area += 1
        self._unique()
        self.parsed = True
        return 0

    cdef int _area(self, uint64_t area) except -1:
        """Reads one area: 1 if it is full and another follows, else 0."""
        cdef uint64_t at = 1 + (self.entries_per_area + 1) * area, entry, old, new, chunks
        cdef bytes raw = self._fetch(at * self.chunk_size, self.chunk_size)
        cdef const uint8_t *data = <const uint8_t *>raw
        cdef Cursor cursor = cursor_over(data, self.chunk_size)
        chunks = self.length // self.chunk_size
        for entry in range(self.entries_per_area):
            old = read_u64le(&cursor)
            new = read_u64le(&cursor)
            if new == 0:
                if not is_zero(data + entry * ENTRY, self.chunk_size - entry * ENTRY):
                    raise StoreCorrupt(f"COW store: bytes after the end of the exceptions (area {area}, entry {entry})")
                return 0
            if new != at + 1 + entry:
                raise StoreCorrupt(
                    f"COW store: area {area}, entry {entry} says store chunk {new}, its place is {at + 1 + entry}: "
                    "damaged, merged in part, or made by a kernel older than 2.6.30")
            if new >= chunks:
                raise StoreCorrupt(
                    f"COW store: area {area}, entry {entry}: store chunk {new} is beyond the last one, {chunks - 1}")
            if old >= self.origin_chunks:
                raise StoreCorrupt(
                    f"COW store: area {area}, entry {entry}: origin chunk {old} is beyond the volume's end "
                    f"({self.origin_chunks} chunks)")
            if self.found >= self.origin_chunks:
                raise StoreCorrupt(f"COW store: more exceptions than the volume has chunks ({self.origin_chunks})")
            self._append(old)
        return 1

    cdef int _append(self, uint64_t old) except -1:
        cdef uint64_t *more
        cdef size_t room
        if self.found == self.room:
            room = self.room * 2 if self.room else 256
            more = <uint64_t *>realloc(self.olds, room * sizeof(uint64_t))
            if more == NULL:
                raise MemoryError()
            self.olds = more
            self.room = room
        self.olds[self.found] = old
        self.found += 1
        return 0

    cdef int _unique(self) except -1:
        """No origin chunk twice: else the result would depend on the order."""
        cdef uint64_t i, twice = 0
        cdef bint repeats = False
        cdef uint64_t *sorted_olds
        if self.found < 2:
            return 0
        sorted_olds = <uint64_t *>malloc(self.found * sizeof(uint64_t))
        if sorted_olds == NULL:
            raise MemoryError()
        with nogil:
            memcpy(sorted_olds, self.olds, self.found * sizeof(uint64_t))
            qsort(sorted_olds, self.found, sizeof(uint64_t), _compare)
            for i in range(1, self.found):
                if sorted_olds[i] == sorted_olds[i - 1]:
                    repeats = True
                    twice = sorted_olds[i]
                    break
        free(sorted_olds)
        if repeats:
            raise StoreCorrupt(f"COW store: origin chunk {twice} has more than one exception")
        return 0

    cdef uint64_t new_of(self, uint64_t index) noexcept nogil:
        return 2 + index + index // self.entries_per_area

    @property
    def count(self):
        self.parse()
        return self.found

    def __len__(self):
        self.parse()
        return self.found

    cdef uint64_t _index(self, index) except? 0xFFFFFFFFFFFFFFFF:
        self.parse()
        if not 0 <= index < self.found:
            raise IndexError(f"exception {index} of {self.found}")
        return index

    def old(self, index):
        return self.olds[self._index(index)]

    def new(self, index):
        return self.new_of(self._index(index))

    def exceptions(self):
        cdef uint64_t i = 0
        self.parse()
        while i < self.found:
            yield (self.olds[i], self.new_of(i))
            i += 1
