# cython: cdivision=True
"""Which records the trees of some backups refer to: one bit for each entry of an index, no sets of names.

Subtrees that were walked before are not walked again. Chunks' names are collected, sorted and merged with the index, so
that each block is read once for a million of them instead of once for each.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport pread

from vmbackupd.engine.blake3 cimport keyed_hash
from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.index cimport INDEX_HEADER, INDEX_TAG, PLACE_BITS, IndexSet, index_t
from vmbackupd.engine.indexscan cimport EntryScan, item_t
from vmbackupd.engine.layout cimport (
    BLOCK,
    BLOCK_ENTRIES,
    ENTRY,
    KIND_CHUNK,
    KIND_NODE,
    KIND_ROOT,
    MAX_DEPTH,
    NAME,
    NODE_HEADER,
    RECORD_HEADER,
    Entry,
    decode_entry,
    is_zero_name,
    load_u32,
    name_prefix,
    store_u32,
)
from vmbackupd.engine.tree cimport node_decode, root_decode, shape_t
from vmbackupd.engine.zstd cimport Codec

from vmbackupd.errors import RepositoryCorrupt

cdef enum:
    PENDING = 1 << 20       # names that are looked up together: 36 MiB
    ITEM = 36               # bytes of one of them
    FOUND = 1 << 31         # flag beside the number of its root: a usable pack holds it
    WINDOW = 16             # blocks of an index that are read at once
    MOST_MISSING = 65536    # that are told one by one


cdef class LiveSet:
    """What is referred to. One thread at a time; of no use after an error."""

    def __cinit__(self, IndexSet index not None):
        """``index`` says where records lie. Entries that it passes over are never marked."""
        cdef size_t i
        self.index = index
        self.roots = []
        self.missing = []
        self.bits = <uint8_t **>calloc(index.length + 1, sizeof(uint8_t *))
        self.pending = <uint8_t *>malloc(PENDING * <size_t>ITEM)
        self.checked = <uint8_t **>calloc(index.length + 1, sizeof(uint8_t *))
        self.window = <uint8_t *>malloc(WINDOW * BLOCK)
        if self.bits == NULL or self.pending == NULL or self.checked == NULL or self.window == NULL:
            raise MemoryError
        self.files = index.length
        for i in range(index.length):
            self.bits[i] = <uint8_t *>calloc(index.indexes[i].entries // 8 + 1, 1)
            self.checked[i] = <uint8_t *>calloc(index.indexes[i].blocks // 8 + 1, 1)
            if self.bits[i] == NULL or self.checked[i] == NULL:
                raise MemoryError

    def __dealloc__(self):
        cdef size_t i
        if self.bits != NULL and self.checked != NULL:
            for i in range(self.files):         # not index.length: a garbage collection may have cleared the index
                free(self.bits[i])
                free(self.checked[i])
        free(self.bits)
        free(self.checked)
        free(self.window)
        free(self.pending)
        free(self.room)
        for i in range(MAX_DEPTH):
            free(self.names[i])

    # ---- marking

    def add_tree(self, ChunkReader reader not None, bytes root not None):
        """Mark all records of a tree: its root record (``root`` is its name, 32 bytes), nodes and chunks.

        What no usable pack holds is noted in ``missing``. RepositoryCorrupt if a node cannot be read at all, even by
        ``reader``, StorageError.
        """
        cdef Codec codec
        cdef shape_t shape
        cdef uint8_t top[32]
        cdef const uint8_t *start = <const uint8_t *><char *>root
        cdef uint32_t number = <uint32_t>len(self.roots)
        cdef int level
        cdef int known
        if len(root) != NAME:
            raise ValueError(f"a name has {NAME} bytes, not {len(root)}")
        if number >= FOUND:
            raise ValueError("too many trees")
        known = self._mark(start)
        if known == MARKED_BEFORE:
            return
        self.roots.append(root)
        if known == UNKNOWN:
            self._miss(start, KIND_ROOT, number)
        root_decode(reader.content(root, KIND_ROOT), &shape, top, root.hex())
        if NODE_HEADER + shape.fanout * <size_t>NAME > reader.largest:
            raise RepositoryCorrupt(f"tree {root.hex()} has larger nodes than its repository")
        self._make_room(shape.fanout, shape.depth, reader.largest)
        if not is_zero_name(top):
            codec = reader.codec()
            with nogil:
                self._walk(reader, codec, top, shape.depth - 1, shape.fanout, number)

    def _make_room(self, uint32_t fanout, int depth, size_t largest):
        cdef int level
        if self.room_length < largest:
            free(self.room)
            self.room = <uint8_t *>malloc(largest)
            for level in range(MAX_DEPTH):
                free(self.names[level])
                self.names[level] = NULL
            self.room_length = 0 if self.room == NULL else largest
        for level in range(depth):
            if self.names[level] == NULL:
                self.names[level] = <uint8_t *>malloc(largest)      # more than the names of any node that is read
            if self.names[level] == NULL or self.room == NULL:
                raise MemoryError

    # Marks a node and what lies below it.
    cdef int _walk(
        self, ChunkReader reader, Codec codec, const uint8_t *name, int level, uint32_t fanout, uint32_t root
    ) except -1 nogil:
        cdef uint8_t *names = self.names[level]
        cdef uint32_t length = 0
        cdef uint32_t i
        cdef int known = self._mark(name)
        if known == MARKED_BEFORE:
            return 0
        if known == UNKNOWN:
            self._miss(name, KIND_NODE, root)
        reader.read(codec, name, KIND_NODE, self.room, self.room_length, &length)
        if not node_decode(self.room, length, level, names, fanout):
            with gil:
                raise RepositoryCorrupt(f"chunk {name[:NAME].hex()} is no node of the tree that names it")
        for i in range(fanout):
            if is_zero_name(names + i * NAME):
                continue
            if level:
                self._walk(reader, codec, names + i * NAME, level - 1, fanout, root)
                continue
            if self.waiting == PENDING:
                self._flush()
            memcpy(self.pending + self.waiting * ITEM, names + i * NAME, NAME)
            store_u32(self.pending + self.waiting * ITEM + NAME, root)
            self.waiting += 1
        return 0

    # Marks all copies of a record.
    cdef int _mark(self, const uint8_t *name) noexcept nogil:
        cdef Entry entry
        cdef Py_ssize_t place = -1
        cdef size_t number
        cdef uint8_t *byte
        cdef uint8_t bit
        cdef int known = UNKNOWN
        while True:
            place = self.index.find(name, <size_t>(place + 1), &entry)
            if place < 0:
                return known
            number = <size_t>place & ((<size_t>1 << PLACE_BITS) - 1)
            byte = self.bits[<size_t>place >> PLACE_BITS] + (number >> 3)
            bit = <uint8_t>(1 << (number & 7))
            if byte[0] & bit:
                return MARKED_BEFORE
            byte[0] |= bit
            known = MARKED

    # Looks up the chunks that were collected: their sorted names are merged with each file's blocks.
    cdef int _flush(self) except -1 nogil:
        cdef size_t i
        cdef size_t count = 0
        cdef const uint8_t *item
        qsort(self.pending, self.waiting, ITEM, _by_name)
        for i in range(self.waiting):
            item = self.pending + i * ITEM
            if count == 0 or memcmp(item, self.pending + (count - 1) * ITEM, NAME) != 0:
                if count != i:
                    memcpy(self.pending + count * ITEM, item, ITEM)
                count += 1
        self.waiting = 0
        for i in range(self.index.length):
            self._join(i, count)
        for i in range(count):
            item = self.pending + i * ITEM
            if not load_u32(item + NAME) & FOUND:
                self._miss(item, KIND_CHUNK, load_u32(item + NAME))
        return 0

    # Marks the first `count` names that wait in one file. Only blocks that may hold some of them are read.
    cdef void _join(self, size_t which, size_t count) noexcept nogil:
        cdef index_t *index = self.index.indexes[which]
        # many names: nearly every block is needed, and reading several at once saves calls
        cdef uint64_t ahead = WINDOW if count > index.blocks else 1
        cdef const uint8_t *data
        cdef uint64_t block, last
        cdef size_t first = 0
        self.held = 0
        for block in range(index.blocks):
            if first == count:
                return
            # a name that sorts after the block's last one may begin as that does, so the next block's prefix counts too
            last = index.prefixes[block + 1] if block + 1 < index.blocks else <uint64_t>-1
            if name_prefix(self.pending + first * ITEM) > last:
                continue
            data = self._block(which, block, ahead)
            if data != NULL:
                self._join_block(which, block, data, first, count)
            # names below the next block's first one are done with
            while first < count and name_prefix(self.pending + first * ITEM) < last:
                first += 1

    # A block of a file, or NULL if it is damaged. Not through the index's cache, where it would push out what writers
    # need; checked against its seal the first time only, as a cached block is.
    cdef const uint8_t *_block(self, size_t which, uint64_t block, uint64_t ahead) noexcept nogil:
        cdef index_t *index = self.index.indexes[which]
        cdef uint8_t *data
        cdef uint8_t tag[32]
        cdef ssize_t got
        if not self.first <= block < self.first + self.held:
            self.first = block
            ahead = min(ahead, index.blocks - block)
            got = pread(index.fd, self.window, ahead * BLOCK, INDEX_HEADER + block * BLOCK)
            self.held = <uint64_t>got // BLOCK if got > 0 else 0
            if self.held == 0:
                index.damaged += 1
                return NULL
        data = self.window + (block - self.first) * BLOCK
        if not self.checked[which][block >> 3] & (1 << (block & 7)):
            keyed_hash(index.key, data, BLOCK, tag)
            if memcmp(tag, index.tags + block * INDEX_TAG, INDEX_TAG) != 0:
                index.damaged += 1
                return NULL
            self.checked[which][block >> 3] |= <uint8_t>(1 << (block & 7))
        return data

    cdef void _join_block(
        self, size_t which, uint64_t block, const uint8_t *data, size_t at, size_t count
    ) noexcept nogil:
        cdef index_t *index = self.index.indexes[which]
        cdef uint64_t length = min(<uint64_t>BLOCK_ENTRIES, index.entries - block * BLOCK_ENTRIES)
        cdef uint64_t number = 0
        cdef uint64_t place
        cdef uint8_t *item = self.pending + at * ITEM
        cdef Entry entry
        cdef int order
        while number < length and at < count:
            order = memcmp(data + number * ENTRY, item, NAME)
            if order < 0:
                number += 1
            elif order > 0:
                at += 1
                item += ITEM
            else:
                decode_entry(data + number * ENTRY, &entry)
                if self.index.counts(which, &entry):
                    place = block * BLOCK_ENTRIES + number
                    self.bits[which][place >> 3] |= <uint8_t>(1 << (place & 7))
                    store_u32(item + NAME, load_u32(item + NAME) | FOUND)
                number += 1          # other copies may follow

    cdef int _miss(self, const uint8_t *name, int kind, uint32_t root) except -1 nogil:
        self.missing_count += 1
        if self.missing_count <= MOST_MISSING:
            with gil:
                self.missing.append((name[:NAME], kind, self.roots[root]))
        return 0

    def finish(self):
        """Look up what is waiting to be: ``missing`` is complete then. Every question does it first."""
        with nogil:
            self._flush()

    # ---- questions

    cdef bint _is_marked(self, const uint8_t *name) noexcept nogil:
        cdef Entry entry
        cdef Py_ssize_t place = self.index.find(name, 0, &entry)
        cdef size_t number
        if place < 0:
            return False
        number = <size_t>place & ((<size_t>1 << PLACE_BITS) - 1)
        return (self.bits[<size_t>place >> PLACE_BITS][number >> 3] >> (number & 7)) & 1

    def is_live(self, bytes name not None):
        """Does a tree refer to this 32 byte name, and does a usable pack hold it?"""
        if len(name) != NAME:
            raise ValueError(f"a name has {NAME} bytes, not {len(name)}")
        self.finish()
        return bool(self._is_marked(<const uint8_t *><char *>name))

    def live_among(self, const uint8_t[::1] entries not None):
        """(name, kind, offset, stored, raw) of those of a pack's own ``entries`` that are live, in their order."""
        cdef size_t number
        cdef const uint8_t *at
        cdef Entry entry
        self.finish()
        found = []
        for number in range(<size_t>entries.shape[0] // ENTRY):
            at = &entries[number * ENTRY]
            if self._is_marked(at):
                decode_entry(at, &entry)
                found.append((at[:NAME], entry.kind, entry.offset, entry.stored, entry.raw))
        return found

    def live_entries(self, bytes pack_id not None):
        """As ``live_among`` the entries that the index has of this pack, in order of offset. Reads the whole index."""
        cdef EntryScan scan
        cdef const item_t *item
        cdef Entry entry
        self.finish()
        scan = EntryScan(self.index.files, pack_id.__eq__)
        found = []
        while True:
            item = scan.next()
            if item == NULL:
                break
            if self._is_marked(item.wire):
                decode_entry(item.wire, &entry)
                found.append((item.wire[:NAME], entry.kind, entry.offset, entry.stored, entry.raw))
        return iter(sorted(found, key=_offset))

    def pack_usage(self, among=None):
        """For every usable pack in the index, or those ``among`` them (live records, records, their bytes, bytes of all): a
        dictionary by id.

        Of the copies of a record in these packs one counts as live. Bytes are those of records with their headers.
        Reads the whole index: RepositoryCorrupt if it is damaged.
        """
        cdef EntryScan scan
        cdef uint64_t *sums
        cdef size_t i
        self.finish()
        packs = self._usable_packs()
        scan = EntryScan(self.index.files, (packs if among is None else packs.intersection(among)).__contains__)
        sums = <uint64_t *>calloc(len(scan.packs) + 1, 4 * sizeof(uint64_t))
        if sums == NULL:
            raise MemoryError
        try:
            with nogil:
                self._sum(scan, sums)
            return {
                pack_id: (sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3])
                for i, pack_id in enumerate(scan.packs)
            }
        finally:
            free(sums)

    def _usable_packs(self):
        cdef uint32_t number
        cdef size_t which
        return {
            self.index.indexes[which].packs[number * 16:(number + 1) * 16]
            for which in range(self.index.length)
            for number in range(self.index.indexes[which].pack_count)
            if self.index.usable[which] == NULL or self.index.usable[which][number]
        }

    cdef int _sum(self, EntryScan scan, uint64_t *sums) except -1 nogil:
        cdef const item_t *item
        cdef Entry entry
        cdef uint64_t *own
        cdef uint64_t number
        cdef uint8_t counted[32]                # the zero name names nothing
        memset(counted, 0, NAME)
        while True:
            item = scan.next()
            if item == NULL:
                return 0
            decode_entry(item.wire, &entry)
            own = sums + 4 * <size_t>entry.pack
            number = item.place & ((<uint64_t>1 << PLACE_BITS) - 1)
            own[1] += 1
            own[3] += RECORD_HEADER + <uint64_t>entry.stored
            if (
                (self.bits[item.place >> PLACE_BITS][number >> 3] >> (number & 7)) & 1
                and memcmp(item.wire, counted, NAME) != 0
            ):
                memcpy(counted, item.wire, NAME)
                own[0] += 1
                own[2] += RECORD_HEADER + <uint64_t>entry.stored


cdef int _by_name(const void *left, const void *right) noexcept nogil:
    return memcmp(left, right, NAME)


def _offset(found):
    return found[2]
