# cython: cdivision=True
"""Where chunks lie. Files are read in blocks of 4 KiB, each checked against its keyed hash, through a bounded cache.

Not memory-mapped: an I/O error in a mapping is a SIGBUS that ends the daemon, and mapped pages count as its memory; a
``pread`` of one block costs about 2 us with its hash. A block that cannot be read or does not match counts as empty:
a writer then stores the chunk again, a reader falls back to the packs, which are the truth.
"""

import os

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport close, pread

from vmbackupd.engine.blake3 cimport keyed_hash
from vmbackupd.engine.cursor cimport Cursor, cursor_over, read_u8, read_u16le, read_u32le, read_u64le, take
from vmbackupd.engine.layout cimport (
    BLOCK,
    BLOCK_ENTRIES,
    DIRECTORY_ENTRY,
    ENTRY,
    KIND_CHUNK,
    KIND_ROOT,
    MAX_RAW,
    NAME,
    PACK_HEADER,
    PACK_ID,
    RECORD_HEADER,
    Entry,
    decode_entry,
    encode_entry,
    load_u32,
    name_prefix,
    store_u16,
    store_u32,
    store_u64,
)
from vmbackupd.engine.threads cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)

from vmbackupd.errors import RepositoryCorrupt, StorageError

cdef enum:
    VERSION = 1
    CACHE_SLOTS = 8192      # blocks kept in memory at most: 32 MiB
    MAX_TAIL = 1 << 30      # bytes of pack table and directory that are believed: 26 million blocks

cdef bytes MAGIC = b"VMBKINDX"
cdef uint32_t next_serial = 1


# ---- the table a writer fills

cdef class EntryTable:
    """Entries by name, in memory: 48 bytes an entry and 4 to 8 for finding it."""

    def __cinit__(self):
        self.room = 1024
        self.mask = 4095
        self.entries = <uint8_t *>malloc(self.room * <size_t>ENTRY)
        self.slots = <uint32_t *>calloc(self.mask + 1, sizeof(uint32_t))
        if self.entries == NULL or self.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.entries)
        free(self.slots)

    def __len__(self):
        return self.count

    # The slot that holds the name, or the free one where it would go. Names are hashes: their bits need no mixing.
    cdef uint32_t *_slot(self, const uint8_t *name) noexcept nogil:
        cdef uint32_t at = load_u32(name) & self.mask
        while self.slots[at] and memcmp(self.entries + (self.slots[at] - 1) * <size_t>ENTRY, name, NAME) != 0:
            at = (at + 1) & self.mask
        return &self.slots[at]

    cdef bint find(self, const uint8_t *name, Entry *entry) noexcept nogil:
        cdef uint32_t *slot = self._slot(name)
        if slot[0] == 0:
            return False
        decode_entry(self.entries + (slot[0] - 1) * <size_t>ENTRY, entry)
        return True

    cdef int add(self, const uint8_t *name, const Entry *entry) noexcept nogil:
        cdef uint32_t *slot = self._slot(name)
        if slot[0]:
            return 0
        if self.count == self.room:
            if self._grow() < 0:
                return -1
            slot = self._slot(name)
        encode_entry(self.entries + self.count * <size_t>ENTRY, name, entry)
        self.count = self.count + 1
        slot[0] = self.count
        return 1

    cdef void replace(self, const uint8_t *name, const Entry *entry) noexcept nogil:
        cdef uint32_t *slot = self._slot(name)
        if slot[0]:
            encode_entry(self.entries + (slot[0] - 1) * <size_t>ENTRY, name, entry)

    cdef int _grow(self) noexcept nogil:
        cdef uint32_t room = self.room * 2
        cdef uint32_t mask = room * 2 - 1
        cdef uint8_t *entries
        cdef uint32_t *slots
        cdef uint32_t number
        if self.room >= 1 << 30:
            return -1
        entries = <uint8_t *>realloc(self.entries, room * <size_t>ENTRY)
        if entries == NULL:
            return -1
        self.entries = entries
        self.room = room
        if mask > self.mask:
            slots = <uint32_t *>calloc(<size_t>mask + 1, sizeof(uint32_t))
            if slots == NULL:
                return -1
            free(self.slots)
            self.slots = slots
            self.mask = mask
            for number in range(self.count):
                self._slot(self.entries + number * <size_t>ENTRY)[0] = number + 1
        return 0

    def add_pack(self, const uint8_t[::1] entries not None, uint32_t pack, uint64_t limit, str label not None):
        """Take in a pack's own index as pack number ``pack``; names that are here already stay as they are.

        ``limit`` is where the pack's records end. RepositoryCorrupt if an entry points outside of them.
        """
        cdef bytearray made = pack_entries(entries, pack, limit, label)
        cdef const uint8_t *start = <const uint8_t *><char *>made
        cdef size_t number
        cdef Entry entry
        for number in range(<size_t>len(made) // ENTRY):
            decode_entry(start + number * ENTRY, &entry)
            if self.add(start + number * ENTRY, &entry) < 0:
                raise MemoryError

    def contains(self, bytes name not None):
        """Is this 32 byte name here?"""
        cdef Entry entry
        if len(name) != NAME:
            raise ValueError(f"a name has {NAME} bytes, not {len(name)}")
        return bool(self.find(<const uint8_t *>name, &entry))

    def clear(self):
        """Forget all entries, keep the memory."""
        self.count = 0
        memset(self.slots, 0, (<size_t>self.mask + 1) * sizeof(uint32_t))

    def encode(self, bytes key not None, bytes repository not None, bytes index not None, list packs not None, uint32_t first=0):
        """The table as the bytes of an index file (a list of buffers to be written one after another).

        ``packs`` are the ids of the packs numbered ``first`` and up in the entries, ``key`` the seal key,
        ``repository`` and ``index`` 16 byte ids. Sorts the entries in place, so the table is cleared afterwards.
        """
        cdef uint32_t number
        cdef uint8_t *at
        with nogil:
            for number in range(self.count):
                at = self.entries + number * <size_t>ENTRY + NAME
                store_u32(at, load_u32(at) - first)
        parts = _encode(self.entries, self.count, key, repository, index, packs)
        self.clear()
        return parts


def pack_entries(const uint8_t[::1] entries not None, uint32_t pack, uint64_t limit, str label not None):
    """A pack's own index as entries of pack number ``pack``, a bytearray.

    ``limit`` is where the pack's records end. RepositoryCorrupt if an entry points outside of them.
    """
    cdef size_t length = entries.shape[0]
    cdef size_t number
    cdef Entry entry
    cdef bytearray made
    if length % ENTRY:
        raise RepositoryCorrupt(f"{label}: its index has {length} bytes, no whole number of entries")
    made = bytearray(entries)
    for number in range(length // ENTRY):
        decode_entry(&entries[number * ENTRY], &entry)
        if not plausible(&entry) or entry.offset + <uint64_t>entry.stored + RECORD_HEADER > limit:
            raise RepositoryCorrupt(f"{label}: entry {number} of its index points outside of the pack")
        store_u32(<uint8_t *><char *>made + number * ENTRY + NAME, pack)
    return made


def encode_entries(bytearray entries not None, bytes key not None, bytes repository not None, bytes index not None, list packs not None):
    """Entries in any order, which it sorts in place, as the bytes of an index file (a list of buffers).

    Of several entries of one name in one pack one is kept. The rest as for ``EntryTable.encode``.
    """
    cdef uint8_t *data = <uint8_t *><char *>entries
    cdef size_t count = len(entries) // ENTRY
    cdef size_t kept = 0
    cdef size_t number
    if len(entries) % ENTRY:
        raise ValueError("no whole number of entries")
    with nogil:
        qsort(data, count, ENTRY, compare_entries)
        for number in range(count):
            if number and memcmp(data + number * ENTRY, data + (kept - 1) * ENTRY, NAME + 4) == 0:
                continue
            if kept != number:
                memcpy(data + kept * ENTRY, data + number * ENTRY, ENTRY)
            kept += 1
    return _encode(data, kept, key, repository, index, packs)


# The file of these entries, which it sorts in place.
cdef list _encode(uint8_t *entries, uint64_t count, bytes key, bytes repository, bytes index, list packs):
    cdef uint64_t blocks = (count + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
    cdef bytearray body = bytearray(blocks * BLOCK)
    cdef bytearray directory = bytearray(blocks * DIRECTORY_ENTRY)
    cdef uint8_t *out = <uint8_t *><char *>body
    cdef uint8_t *line = <uint8_t *><char *>directory
    cdef const uint8_t *secret = <const uint8_t *><char *>key
    cdef uint64_t block, start, length
    cdef bytes header = encode_header(count, key, repository, index, packs)
    with nogil:
        qsort(entries, count, ENTRY, compare_entries)
        for block in range(blocks):
            start = block * BLOCK_ENTRIES
            length = min(<uint64_t>BLOCK_ENTRIES, count - start)
            memcpy(out + block * BLOCK, entries + start * ENTRY, length * ENTRY)
            seal_block(secret, out + block * BLOCK, line + block * DIRECTORY_ENTRY)
    tail = b"".join(packs) + directory
    return [header, body, tail, seal_of(key, header + tail)]


# The directory's line for a block that is complete.
cdef void seal_block(const uint8_t *key, const uint8_t *block, uint8_t *line) noexcept nogil:
    memcpy(line, block, 8)
    keyed_hash(key, block, BLOCK, line + 8)


cdef bytes encode_header(uint64_t count, bytes key, bytes repository, bytes index, list packs):
    """The first 64 bytes of an index of ``count`` entries."""
    cdef uint8_t head[64]
    if len(key) != 32 or len(repository) != 16 or len(index) != 16:
        raise ValueError("ids have 16 bytes, keys 32")
    for pack in packs:
        if len(pack) != PACK_ID:
            raise ValueError("ids have 16 bytes")
    memset(head, 0, INDEX_HEADER)
    memcpy(head, <char *>MAGIC, 8)
    store_u16(head + 8, VERSION)
    memcpy(head + 16, <char *>repository, 16)
    memcpy(head + 32, <char *>index, 16)
    store_u64(head + 48, count)
    store_u32(head + 56, <uint32_t>len(packs))
    store_u32(head + 60, <uint32_t>((count + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES))
    return head[:INDEX_HEADER]


cdef int compare_entries(const void *left, const void *right) noexcept nogil:
    cdef int order = memcmp(left, right, NAME)
    cdef uint32_t one, two
    if order:
        return order
    one = load_u32(<const uint8_t *>left + NAME)
    two = load_u32(<const uint8_t *>right + NAME)
    return (one > two) - (one < two)


cdef bint plausible(const Entry *entry) noexcept nogil:
    return (
        KIND_CHUNK <= entry.kind <= KIND_ROOT and 0 < entry.raw <= MAX_RAW and 0 < entry.stored <= MAX_RAW + BLOCK
        and entry.offset >= PACK_HEADER
    )


cdef bytes seal_of(bytes key, bytes data):
    cdef uint8_t tag[32]
    cdef const uint8_t *start = <const uint8_t *><char *>data
    cdef const uint8_t *secret = <const uint8_t *><char *>key
    cdef size_t length = len(data)
    with nogil:
        keyed_hash(secret, start, length, tag)
    return tag[:INDEX_TAG]


# ---- one file

cdef class IndexFile:
    """An index file that is open. Keeps its directory in memory: 40 bytes for each 4 KiB block."""

    def __cinit__(self, int fd, bytes key not None, bytes repository not None, object label, bytes index=None):
        """Takes over ``fd``, also when this raises. ``index`` is the id the file must carry, if it is known.

        RepositoryCorrupt if the file is no index of this repository, truncated or damaged outside of its blocks.
        """
        global next_serial
        self.index.fd = fd
        self.label = label
        self.index.serial = next_serial
        next_serial += 1
        if len(key) != 32 or len(repository) != 16:
            raise ValueError("a key has 32 bytes, an id 16")
        memcpy(self.index.key, <char *>key, 32)
        header, tail = self._read()
        self._parse_header(header, repository, index, len(tail))
        if seal_of(key, header + tail[:-INDEX_TAG]) != tail[-INDEX_TAG:]:
            raise RepositoryCorrupt(f"index {self.label} does not match its checksum")
        self._parse_tail(tail)

    def __dealloc__(self):
        if self.index.fd >= 0:
            close(self.index.fd)
        free(self.index.prefixes)
        free(self.index.tags)
        free(self.index.packs)

    def _read(self):
        """Header and tail of the file; the length of the blocks between them is checked against the file's."""
        try:
            size = os.fstat(self.index.fd).st_size
            header = os.pread(self.index.fd, INDEX_HEADER, 0)
            blocks = int.from_bytes(header[60:64], "little")
            at = INDEX_HEADER + blocks * BLOCK
            if len(header) < INDEX_HEADER or at + INDEX_TAG > size or size - at > MAX_TAIL:
                raise RepositoryCorrupt(f"index {self.label} is truncated or no index: it has {size} bytes")
            tail = b""
            while len(tail) < size - at:
                part = os.pread(self.index.fd, size - at - len(tail), at + len(tail))
                if not part:
                    raise RepositoryCorrupt(f"index {self.label} became shorter while it was read")
                tail += part
        except OSError as reason:
            raise StorageError(f"index {self.label}: {reason}") from reason
        return header, tail

    cdef int _parse_header(self, bytes header, bytes repository, bytes expected, size_t tail) except -1:
        cdef Cursor cursor = cursor_over(<const uint8_t *><char *>header, len(header))
        cdef const uint8_t *magic = take(&cursor, 8)
        cdef uint32_t version = read_u16le(&cursor)
        cdef uint8_t cipher = read_u8(&cursor)
        cdef const uint8_t *owner
        cdef const uint8_t *own
        take(&cursor, 5)
        owner = take(&cursor, 16)
        own = take(&cursor, 16)
        self.index.entries = read_u64le(&cursor)
        self.index.pack_count = read_u32le(&cursor)
        self.index.blocks = read_u32le(&cursor)
        if cursor.failed or memcmp(magic, <char *>MAGIC, 8) != 0:
            raise RepositoryCorrupt(f"index {self.label} is no index")
        if version != VERSION or cipher != 0:
            raise RepositoryCorrupt(f"index {self.label} has format {version}.{cipher}, this program reads {VERSION}.0")
        if memcmp(owner, <char *>repository, 16) != 0:
            raise RepositoryCorrupt(f"index {self.label} belongs to another repository")
        if expected is not None and own[:16] != expected:
            raise RepositoryCorrupt(f"index {self.label} is stored under the wrong name: it is index {own[:16].hex()}")
        if (
            self.index.entries > self.index.blocks * <uint64_t>BLOCK_ENTRIES      # first: the sum below may overflow
            or self.index.blocks != (self.index.entries + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES
            or tail != self.index.pack_count * <uint64_t>PACK_ID + self.index.blocks * DIRECTORY_ENTRY + INDEX_TAG
        ):
            raise RepositoryCorrupt(f"index {self.label} has not the length its header tells")
        return 0

    cdef int _parse_tail(self, bytes tail) except -1:
        cdef Cursor cursor = cursor_over(<const uint8_t *><char *>tail, len(tail))
        cdef index_t *index = &self.index
        cdef const uint8_t *packs = take(&cursor, index.pack_count * <size_t>PACK_ID)
        cdef const uint8_t *prefix
        cdef const uint8_t *tag
        cdef uint64_t block
        # one byte more than needed: malloc(0) may be NULL
        index.prefixes = <uint64_t *>malloc(index.blocks * sizeof(uint64_t) + 1)
        index.tags = <uint8_t *>malloc(index.blocks * INDEX_TAG + 1)
        index.packs = <uint8_t *>malloc(index.pack_count * <size_t>PACK_ID + 1)
        if index.prefixes == NULL or index.tags == NULL or index.packs == NULL:
            raise MemoryError
        if packs != NULL:
            memcpy(index.packs, packs, index.pack_count * <size_t>PACK_ID)
        for block in range(index.blocks):
            prefix = take(&cursor, 8)
            tag = take(&cursor, INDEX_TAG)
            if cursor.failed:
                raise RepositoryCorrupt(f"index {self.label}: its directory is truncated")
            index.prefixes[block] = name_prefix(prefix)
            memcpy(index.tags + block * INDEX_TAG, tag, INDEX_TAG)
            if block and index.prefixes[block] < index.prefixes[block - 1]:
                raise RepositoryCorrupt(f"index {self.label}: its directory is not sorted")
        return 0

    @property
    def count(self):
        """Number of entries."""
        return self.index.entries

    @property
    def damaged(self):
        """How many times a block was found damaged or unreadable since the file was opened."""
        return self.index.damaged

    def pack_ids(self):
        """The 16 byte ids of the packs this index covers."""
        return [self.index.packs[number * PACK_ID:(number + 1) * PACK_ID] for number in range(self.index.pack_count)]

    def parts(self):
        """The file's bytes, 1 MiB at a time: to be iterated any number of times. StorageError."""
        return _Parts(self)

    def check(self):
        """Read every block. RepositoryCorrupt if one is damaged, out of order or points to no pack."""
        for _ in self._blocks():
            pass

    def names(self):
        """Iterate over (name, kind, pack number) of all entries, sorted. RepositoryCorrupt as for ``check``."""
        cdef Entry entry
        cdef bytes data
        cdef size_t at, number, length
        for data, length in self._blocks():
            for number in range(length):
                at = number * ENTRY
                decode_entry(<const uint8_t *><char *>data + at, &entry)
                yield data[at : at + NAME], entry.kind, entry.pack

    def _blocks(self):
        cdef bytes last = b""
        cdef bytes data, own
        cdef Entry entry
        cdef uint64_t block
        cdef size_t at, number, length
        for block in range(self.index.blocks):
            length = min(<uint64_t>BLOCK_ENTRIES, self.index.entries - block * BLOCK_ENTRIES)
            try:
                data = os.pread(self.index.fd, BLOCK, INDEX_HEADER + block * BLOCK)
            except OSError as reason:
                raise StorageError(f"index {self.label}: {reason}") from reason
            if seal_of(self.index.key[:32], data) != self.index.tags[block * INDEX_TAG:(block + 1) * INDEX_TAG]:
                raise RepositoryCorrupt(f"index {self.label}: block {block} does not match its checksum")
            for number in range(length):
                at = number * ENTRY
                decode_entry(<const uint8_t *><char *>data + at, &entry)
                own = data[at : at + ENTRY]
                if (
                    (last and compare_entries(<char *>own, <char *>last) <= 0)
                    or entry.pack >= self.index.pack_count or not plausible(&entry)
                ):
                    raise RepositoryCorrupt(f"index {self.label}: block {block} holds an impossible entry")
                last = own
            yield data, length


class _Parts:
    """An index file's bytes. Not a generator, so that an upload can begin anew."""

    def __init__(self, file):
        self.file = file

    def __iter__(self):
        cdef IndexFile file = self.file
        offset = 0
        while True:
            try:
                part = os.pread(file.index.fd, 1 << 20, offset)
            except OSError as reason:
                raise StorageError(f"index {file.label}: {reason}") from reason
            if not part:
                return
            yield part
            offset += len(part)


# ---- the files together

cdef class BlockCache:
    """Blocks of index files, read and checked. Any number of threads and sets at once."""

    def __cinit__(self, uint64_t blocks=CACHE_SLOTS):
        """Room for so many blocks of 4 KiB, or a few more; at most 32 MiB. Memory is taken as it is used."""
        cdef size_t slots = 16
        cdef int i
        while slots < blocks and slots < CACHE_SLOTS:
            slots *= 2
        self.mask = slots - 1
        self.keys = <uint64_t *>calloc(slots, sizeof(uint64_t))
        self.data = <uint8_t *>malloc(slots * BLOCK)
        if self.keys == NULL or self.data == NULL:
            raise MemoryError
        for i in range(STRIPES):
            pthread_mutex_init(&self.locks[i], NULL)

    def __dealloc__(self):
        cdef int i
        free(self.keys)
        free(self.data)
        for i in range(STRIPES):
            pthread_mutex_destroy(&self.locks[i])

    cdef const uint8_t *borrow(self, index_t *index, uint64_t block, pthread_mutex_t **lock) noexcept nogil:
        cdef uint64_t key = ((<uint64_t>index.serial << 32) | block) + 1
        cdef size_t slot = <size_t>((key * 0x9E3779B97F4A7C15ULL) >> 40) & self.mask
        cdef uint8_t *data = self.data + slot * BLOCK
        cdef uint8_t tag[32]
        lock[0] = &self.locks[slot % STRIPES]
        pthread_mutex_lock(lock[0])
        if self.keys[slot] == key:
            return data
        self.keys[slot] = 0
        if pread(index.fd, data, BLOCK, INDEX_HEADER + block * BLOCK) == BLOCK:
            keyed_hash(index.key, data, BLOCK, tag)
            if memcmp(tag, index.tags + block * INDEX_TAG, INDEX_TAG) == 0:
                self.keys[slot] = key
                return data
        index.damaged += 1
        return NULL


cdef class IndexSet:
    """Index files that are searched together."""

    def __cinit__(self, files=(), *, present=None, condemned=(), BlockCache cache=None):
        """Entries are passed over if their pack is not among ``present`` (None: all are) or is among ``condemned``:
        collections of 16 byte ids. ``cache``: blocks shared with other sets.
        """
        cdef size_t blocks = 0
        cdef size_t i
        cdef IndexFile file
        self.files = tuple(files)
        self.length = len(self.files)
        self.indexes = <index_t **>calloc(self.length + 1, sizeof(index_t *))
        self.usable = <uint8_t **>calloc(self.length + 1, sizeof(uint8_t *))
        if self.indexes == NULL or self.usable == NULL:
            raise MemoryError
        for i in range(self.length):
            file = self.files[i]
            self.indexes[i] = &file.index
            blocks += file.index.blocks
            if present is not None or condemned:
                self._flag(i, present, condemned)
        self.cache = BlockCache(blocks) if cache is None else cache

    def __dealloc__(self):
        cdef size_t i
        if self.usable != NULL:
            for i in range(self.length):
                free(self.usable[i])
        free(self.usable)
        free(self.indexes)

    def __len__(self):
        return sum(file.count for file in self.files)

    def _flag(self, size_t which, present, condemned):
        cdef index_t *index = self.indexes[which]
        cdef uint32_t number
        cdef uint8_t *flags = <uint8_t *>malloc(index.pack_count + <size_t>1)
        if flags == NULL:
            raise MemoryError
        self.usable[which] = flags
        for number in range(index.pack_count):
            pack_id = index.packs[number * PACK_ID:(number + 1) * PACK_ID]
            flags[number] = (present is None or pack_id in present) and pack_id not in condemned

    cdef Py_ssize_t find(self, const uint8_t *name, size_t start, Entry *entry) noexcept nogil:
        cdef size_t which = start >> PLACE_BITS
        cdef int64_t number = <int64_t>(start & ((<size_t>1 << PLACE_BITS) - 1))
        if which < self.length and number and not self._is_at(self.indexes[which], number, name, entry):
            which += 1
            number = 0
        while which < self.length:
            if number == 0:
                number = self._first(self.indexes[which], name, entry)
            # copies in this file lie side by side
            while number >= 0:
                if self.counts(which, entry):
                    return <Py_ssize_t>place_of(which, number)
                number += 1
                if not self._is_at(self.indexes[which], number, name, entry):
                    break
            which += 1
            number = 0
        return -1

    # The number of the first entry of this name in a file, or -1.
    cdef int64_t _first(self, index_t *index, const uint8_t *name, Entry *entry) noexcept nogil:
        cdef uint64_t prefix = name_prefix(name)
        cdef uint64_t low = 0
        cdef uint64_t high = index.blocks
        cdef uint64_t middle
        cdef int64_t found = -1
        cdef Entry earlier
        cdef int at
        # the first block whose first name is surely above the one that is looked for
        while low < high:
            middle = (low + high) // 2
            if index.prefixes[middle] > prefix:
                high = middle
            else:
                low = middle + 1
        # the block before it, and those before that begin with the same prefix
        while low > 0:
            low -= 1
            at = self._search(index, low, name, &earlier)
            if at >= 0:
                found = low * BLOCK_ENTRIES + at
                entry[0] = earlier
            if at > 0 or index.prefixes[low] < prefix:
                break
        return found

    # Does this entry of a file exist and have this name?
    cdef bint _is_at(self, index_t *index, uint64_t number, const uint8_t *name, Entry *entry) noexcept nogil:
        cdef pthread_mutex_t *lock = NULL
        cdef const uint8_t *data
        cdef bint found = False
        if number >= index.entries:
            return False
        data = self.cache.borrow(index, number // BLOCK_ENTRIES, &lock)
        if data != NULL:
            data += (number % BLOCK_ENTRIES) * ENTRY
            found = memcmp(data, name, NAME) == 0
            if found:
                decode_entry(data, entry)
        pthread_mutex_unlock(lock)
        return found

    # Number within a block of the first entry of this name, or -1. A damaged block is an empty one.
    cdef int _search(self, index_t *index, uint64_t block, const uint8_t *name, Entry *entry) noexcept nogil:
        cdef pthread_mutex_t *lock = NULL
        cdef const uint8_t *data = self.cache.borrow(index, block, &lock)
        cdef uint64_t length = min(<uint64_t>BLOCK_ENTRIES, index.entries - block * BLOCK_ENTRIES)
        cdef uint64_t low = 0
        cdef uint64_t high = length
        cdef uint64_t middle
        cdef int found = -1
        if data != NULL:
            while low < high:
                middle = (low + high) // 2
                if memcmp(data + middle * ENTRY, name, NAME) < 0:
                    low = middle + 1
                else:
                    high = middle
            if low < length and memcmp(data + low * ENTRY, name, NAME) == 0:
                decode_entry(data + low * ENTRY, entry)
                found = <int>low
        pthread_mutex_unlock(lock)
        return found

    # May this entry be relied on?
    cdef bint counts(self, size_t which, const Entry *entry) noexcept nogil:
        if not plausible(entry) or entry.pack >= self.indexes[which].pack_count:
            return False
        return self.usable[which] == NULL or self.usable[which][entry.pack] != 0

    cdef const uint8_t *pack_id(self, size_t place, uint32_t pack) noexcept nogil:
        return self.indexes[place >> PLACE_BITS].packs + pack * <size_t>PACK_ID

    cdef Py_ssize_t locate(self, const uint8_t *name, size_t start, Entry *entry, uint8_t *pack_id) noexcept nogil:
        cdef Py_ssize_t which = self.find(name, start, entry)
        if which >= 0:
            memcpy(pack_id, self.pack_id(<size_t>which, entry.pack), PACK_ID)
        return which

    def lookup(self, bytes name not None):
        """(pack id, offset, stored, raw, kind) of a 32 byte name, or None."""
        found = self.copies(name, 1)
        return found[0] if found else None

    def copies(self, bytes name not None, size_t limit=1000):
        """(pack id, offset, stored, raw, kind) of every record of a 32 byte name, up to ``limit``."""
        cdef Entry entry
        cdef Py_ssize_t place = -1
        cdef const uint8_t *start = <const uint8_t *><char *>name
        if len(name) != NAME:
            raise ValueError(f"a name has {NAME} bytes, not {len(name)}")
        found = []
        while <size_t>len(found) < limit:
            with nogil:
                place = self.find(start, <size_t>(place + 1), &entry)
            if place < 0:
                break
            pack_id = self.pack_id(place, entry.pack)[:PACK_ID]
            found.append((pack_id, entry.offset, entry.stored, entry.raw, entry.kind))
        return found
