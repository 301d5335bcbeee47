# cython: cdivision=True
"""The tree of an image.

Level 0 nodes ("leaves") hold names of chunks, a node of level n + 1 names of nodes of level n, the root record the name
of the top node with the image's size. A zero name is a hole of whatever size lies below it. Nodes are chunks in packs,
so trees share the nodes that are equal.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport close, pread, pwrite

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.chunkstore cimport ChunkStore
from vmbackupd.engine.cursor cimport (
    Cursor,
    cursor_over,
    read_u8,
    read_u16le,
    read_u32le,
    read_u64le,
    remaining,
    take,
)
from vmbackupd.engine.layout cimport (
    KIND_CHUNK,
    KIND_NODE,
    KIND_ROOT,
    MAX_DEPTH,
    MAX_FANOUT,
    MAX_RAW,
    MIN_FANOUT,
    NAME,
    NODE_HEADER,
    ROOT_LENGTH,
    is_zero_name,
    store_u16,
    store_u32,
    store_u64,
)
from vmbackupd.engine.zstd cimport Codec

from vmbackupd.errors import InvalidArgument, RepositoryCorrupt, StorageError

cdef enum:
    VERSION = 1
    MAX_LEAVES = 512         # leaves in memory at most: 4 MiB at 256 names a leaf

cdef bytes ROOT_MAGIC = b"VMBKTREE"
cdef uint64_t MAX_SIZE = 1ULL << 50


# ---- shape and bytes of nodes

cdef int shape_init(shape_t *shape, uint64_t size, uint32_t chunk_size, uint32_t fanout) except -1:
    cdef uint64_t count
    cdef uint64_t span = 1
    if size > MAX_SIZE:
        raise InvalidArgument(f"an image of {size} bytes is too large: the limit is 1 PiB")
    if not 512 <= chunk_size <= MAX_RAW or not MIN_FANOUT <= fanout <= MAX_FANOUT:
        raise ValueError(f"chunk size {chunk_size} or fan-out {fanout} is out of range")
    shape.size = size
    shape.chunk_size = chunk_size
    shape.fanout = fanout
    shape.chunks = size // chunk_size + (1 if size % chunk_size else 0)
    count = shape.chunks
    shape.depth = 0
    while shape.depth == 0 or count > 1:
        if shape.depth == MAX_DEPTH:
            raise InvalidArgument(f"an image of {size} bytes needs a tree of more than {MAX_DEPTH} levels")
        count = (count + fanout - 1) // fanout if count else 1
        span *= fanout
        shape.counts[shape.depth] = count
        shape.spans[shape.depth] = span
        shape.depth += 1
    return 0


cdef uint32_t node_width(const shape_t *shape, int level, uint64_t index) noexcept nogil:
    cdef uint64_t below = shape.counts[level - 1] if level else shape.chunks
    cdef uint64_t first = index * shape.fanout
    if first >= below:
        return 0
    return <uint32_t>min(<uint64_t>shape.fanout, below - first)


cdef size_t node_encode(uint8_t *into, int level, const uint8_t *names, uint32_t width) noexcept nogil:
    while width and is_zero_name(names + (width - 1) * <size_t>NAME):
        width -= 1
    if width == 0:
        return 0
    memset(into, 0, NODE_HEADER)
    memcpy(into, b"NODE", 4)
    into[4] = <uint8_t>level
    store_u16(into + 6, <uint16_t>width)
    memcpy(into + NODE_HEADER, names, width * <size_t>NAME)
    return NODE_HEADER + width * <size_t>NAME


cdef bint node_decode(const uint8_t *data, size_t length, int level, uint8_t *names, uint32_t width) noexcept nogil:
    cdef Cursor cursor = cursor_over(data, length)
    cdef const uint8_t *magic = take(&cursor, 4)
    cdef uint8_t own_level = read_u8(&cursor)
    cdef uint8_t reserved = read_u8(&cursor)
    cdef uint16_t count = read_u16le(&cursor)
    cdef uint64_t more = read_u64le(&cursor)
    cdef const uint8_t *own = take(&cursor, count * <size_t>NAME)
    if (
        cursor.failed
        or remaining(&cursor) != 0
        or memcmp(magic, b"NODE", 4) != 0
        or own_level != level
        or reserved != 0
        or more != 0
        or count > width
    ):
        return False
    memcpy(names, own, count * <size_t>NAME)
    memset(names + count * <size_t>NAME, 0, (width - count) * <size_t>NAME)
    return True


cdef void root_encode(const shape_t *shape, const uint8_t *top, uint8_t *into) noexcept nogil:
    memset(into, 0, ROOT_LENGTH)
    memcpy(into, b"VMBKTREE", 8)
    store_u16(into + 8, VERSION)
    into[10] = <uint8_t>shape.depth
    store_u32(into + 12, shape.chunk_size)
    store_u32(into + 16, shape.fanout)
    store_u64(into + 24, shape.size)
    memcpy(into + 32, top, NAME)


cdef int root_decode(bytes data, shape_t *shape, uint8_t *top, str tree) except -1:
    cdef Cursor cursor = cursor_over(<const uint8_t *><char *>data, len(data))
    cdef const uint8_t *magic = take(&cursor, 8)
    cdef uint16_t version = read_u16le(&cursor)
    cdef uint8_t depth = read_u8(&cursor)
    cdef uint32_t chunk_size, fanout
    cdef uint64_t size
    cdef const uint8_t *name
    read_u8(&cursor)
    chunk_size = read_u32le(&cursor)
    fanout = read_u32le(&cursor)
    read_u32le(&cursor)
    size = read_u64le(&cursor)
    name = take(&cursor, NAME)
    if cursor.failed or remaining(&cursor) or memcmp(magic, <char *>ROOT_MAGIC, 8) != 0:
        raise RepositoryCorrupt(f"tree {tree}: its root record is none")
    if version != VERSION:
        raise RepositoryCorrupt(f"tree {tree} has format {version}, this program reads {VERSION}")
    try:
        shape_init(shape, size, chunk_size, fanout)
    except (ValueError, InvalidArgument) as reason:
        raise RepositoryCorrupt(f"tree {tree}: {reason}") from reason
    if shape.depth != depth:
        raise RepositoryCorrupt(f"tree {tree} has {depth} levels, its size needs {shape.depth}")
    memcpy(top, name, NAME)
    return 0


cdef bytes tree_name(str tree):
    """The name in a tree's id: 64 hexadecimal digits."""
    try:
        name = bytes.fromhex(tree)
    except ValueError:
        name = b""
    if len(name) != NAME or name.hex() != tree:
        raise InvalidArgument(f"{tree!r} is no tree id")
    return name


# ---- reading

cdef class TreeReader:
    """The names in a stored tree. One thread at a time."""

    def __cinit__(self, ChunkReader reader not None, str tree not None):
        cdef int i
        self.reader = reader
        self.codec = reader.codec()
        root_decode(reader.content(tree_name(tree), KIND_ROOT), &self.shape, self.top, tree)
        if NODE_HEADER + self.shape.fanout * <size_t>NAME > reader.largest or self.shape.chunk_size > reader.largest:
            raise RepositoryCorrupt(f"tree {tree} has larger nodes or chunks than its repository")
        self.room = <uint8_t *>malloc(reader.largest)
        if self.room == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int i
        free(self.room)
        for i in range(NODE_CACHE):
            free(self.cache[i].names)

    cdef int node(self, int level, uint64_t index, const uint8_t **names) except -1 nogil:
        cdef uint8_t name[32]
        cdef const uint8_t *above = NULL
        cdef uint32_t length = 0
        cdef uint32_t width = node_width(&self.shape, level, index)
        # neighbours on one level fall into different places; so do a node and the nodes above it, nearly always
        cdef cached_t *place = &self.cache[(index + level * 37) % NODE_CACHE]
        if place.index == index + 1 and place.level == level:
            names[0] = place.names
            return 0
        if level == self.shape.depth - 1:
            memcpy(name, self.top, NAME)
        else:
            self.node(level + 1, index // self.shape.fanout, &above)
            if above == NULL:
                names[0] = NULL
                return 0
            memcpy(name, above + (index % self.shape.fanout) * NAME, NAME)
        if is_zero_name(name):
            names[0] = NULL
            return 0
        self.reader.read(self.codec, name, KIND_NODE, self.room, self.reader.largest, &length)
        if place.names == NULL:
            place.names = <uint8_t *>malloc(self.shape.fanout * <size_t>NAME)
            if place.names == NULL:
                with gil:
                    raise MemoryError
        place.index = 0
        if not node_decode(self.room, length, level, place.names, width):
            self._wrong(name)
        place.level = level
        place.index = index + 1
        names[0] = place.names
        return 0

    cdef int _wrong(self, const uint8_t *name) except -1 nogil:
        with gil:
            raise RepositoryCorrupt(f"chunk {name[:NAME].hex()} is no node of the tree that names it")

    cdef int name(self, uint64_t index, uint8_t *into) except -1 nogil:
        cdef const uint8_t *names = NULL
        self.node(0, index // self.shape.fanout, &names)
        if names == NULL:
            memset(into, 0, NAME)
        else:
            memcpy(into, names + (index % self.shape.fanout) * NAME, NAME)
        return 0

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        cdef const uint8_t *names = NULL
        cdef uint64_t leaf, start, span
        cdef uint32_t at, end, width
        cdef int level
        count[0] = 0
        first[0] = self.shape.chunks
        while index < self.shape.chunks:
            # the largest hole that begins at or around this chunk is skipped whole
            for level in range(self.shape.depth - 1, -1, -1):
                span = self.shape.spans[level]
                self.node(level, index // span, &names)
                if names == NULL:
                    index = (index // span + 1) * span
                    break
            else:
                leaf = index // self.shape.fanout
                start = leaf * self.shape.fanout
                width = node_width(&self.shape, 0, leaf)
                at = <uint32_t>(index - start)
                while at < width and is_zero_name(names + at * <size_t>NAME):
                    at += 1
                if at < width:
                    end = at + 1
                    while end < width and not is_zero_name(names + end * <size_t>NAME):
                        end += 1
                    first[0] = start + at
                    count[0] = end - at
                    return 0
                index = start + width
        return 0

    @property
    def size(self):
        """Bytes of the image."""
        return self.shape.size

    @property
    def chunk_size(self):
        """Bytes of a chunk."""
        return self.shape.chunk_size

    def data_bytes(self):
        """Bytes of the image that are no holes: what a full read moves. Reads all nodes."""
        cdef uint64_t first = 0
        cdef uint64_t count = 0
        cdef uint64_t chunks = 0
        cdef uint64_t index = 0
        cdef bint last = False
        with nogil:
            while True:
                self.next_data(index, &first, &count)
                if count == 0:
                    break
                chunks += count
                index = first + count
                last = index == self.shape.chunks
        result = chunks * <object>self.shape.chunk_size
        if last and self.shape.size % self.shape.chunk_size:
            result -= self.shape.chunk_size - self.shape.size % self.shape.chunk_size
        return result

    def walk(self):
        """Iterate over (name, kind) of every chunk of the tree but its root record: nodes before what is below them."""
        cdef const uint8_t *names = NULL
        cdef int level
        cdef uint64_t index
        if not is_zero_name(self.top):
            yield self.top[:NAME], KIND_NODE
        for level in range(self.shape.depth - 1, -1, -1):
            index = 0
            while index < self.shape.counts[level]:
                with nogil:
                    self.node(level, index, &names)
                if names == NULL:
                    index = self._after_hole(level, index)
                    continue
                width = node_width(&self.shape, level, index)
                below = names[:width * NAME]
                for at in range(0, width * NAME, NAME):
                    name = below[at : at + NAME]
                    if name != bytes(NAME):
                        yield name, KIND_NODE if level else KIND_CHUNK
                index += 1

    def _after_hole(self, int level, uint64_t index):
        """The first node of this level after the largest hole that node ``index`` lies in."""
        cdef const uint8_t *names = NULL
        cdef uint64_t span = 1
        cdef uint64_t after = index + 1
        for above in range(level + 1, self.shape.depth):
            span *= self.shape.fanout
            self.node(above, index // span, &names)
            if names != NULL:
                break
            after = (index // span + 1) * span
        return after


# ---- building

cdef class TreeBuilder:
    """A tree from names in any order, new or starting from a stored one. One thread at a time.

    Memory: 512 leaves, names of all nodes (32 bytes for 16 MiB of image, untouched parts are never made), beyond that a
    temporary file.
    """

    def __cinit__(
        self, ChunkStore store not None, ChunkReader reader not None, object make_spill, *, str tree=None,
        uint64_t size=0, uint32_t chunk_size=65536, uint32_t fanout=256
    ):
        cdef int level
        cdef uint8_t top[32]
        self.spill = -1
        self.store = store
        self.reader = reader
        self.make_spill = make_spill
        if tree is None:
            memset(top, 0, NAME)
            shape_init(&self.shape, size, chunk_size, fanout)
        else:
            root_decode(reader.content(tree_name(tree), KIND_ROOT), &self.shape, top, tree)
        if NODE_HEADER + self.shape.fanout * <size_t>NAME > store.largest or self.shape.chunk_size > store.largest:
            raise RepositoryCorrupt(f"tree {tree} has larger nodes or chunks than its repository")
        # compresses nodes and reads records: a record's header and payload must fit
        self.codec = Codec(store.level, store.largest + 4096)
        self.leaf_bytes = self.shape.fanout * <size_t>NAME + (self.shape.fanout + 7) // 8
        self.room = <uint8_t *>malloc(store.largest)
        self.leaf_room = MAX_LEAVES
        self.leaves = <leaf_t *>calloc(MAX_LEAVES, sizeof(leaf_t))
        self.places = <int *>calloc(self.shape.counts[0], sizeof(int))
        if self.room == NULL or self.leaves == NULL or self.places == NULL:
            raise MemoryError
        for level in range(self.shape.depth):
            # calloc: pages that are not touched do not exist
            self.names[level] = <uint8_t *>calloc(self.shape.counts[level], NAME)
            self.opened[level] = <uint8_t *>calloc(self.shape.counts[level], 1)
            if self.names[level] == NULL or self.opened[level] == NULL:
                raise MemoryError
        memcpy(self.names[self.shape.depth - 1], top, NAME)

    def __dealloc__(self):
        cdef int i
        free(self.room)
        free(self.places)
        for i in range(MAX_DEPTH):
            free(self.names[i])
            free(self.opened[i])
        if self.leaves != NULL:
            for i in range(self.leaf_room):
                free(self.leaves[i].names)
            free(self.leaves)
        if self.spill >= 0:
            close(self.spill)

    cdef int set(self, uint64_t index, const uint8_t *name) except -1 nogil:
        cdef leaf_t *leaf = self._leaf(index // self.shape.fanout)
        cdef uint32_t at = <uint32_t>(index % self.shape.fanout)
        memcpy(leaf.names + at * <size_t>NAME, name, NAME)
        if not leaf.seen[at >> 3] & (1 << (at & 7)):
            leaf.seen[at >> 3] |= <uint8_t>(1 << (at & 7))
            leaf.missing -= 1
            if leaf.missing == 0:
                self._seal_leaf(leaf)
        return 0

    cdef int set_zero(self, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint8_t zero[32]
        cdef uint64_t end = first + count
        cdef uint64_t leaf
        cdef leaf_t *open_leaf
        memset(zero, 0, NAME)
        while first < end:
            leaf = first // self.shape.fanout
            if first % self.shape.fanout == 0 and end - first >= node_width(&self.shape, 0, leaf):
                # a whole leaf becomes a hole
                self._open_path(leaf)
                if self.places[leaf] > 0:
                    open_leaf = &self.leaves[self.places[leaf] - 1]
                    open_leaf.width = 0          # its place is free
                    self.leaf_used = self.leaf_used - 1
                self.places[leaf] = 0
                if not is_zero_name(self.names[0] + leaf * NAME):
                    memset(self.names[0] + leaf * NAME, 0, NAME)      # writes only where it must: untouched pages stay so
                first += node_width(&self.shape, 0, leaf)
            else:
                self.set(first, zero)
                first += 1
        return 0

    # Makes sure that names[0] tells the name of this leaf.
    cdef int _open_path(self, uint64_t leaf) except -1 nogil:
        cdef int level
        cdef uint64_t index
        cdef uint64_t span = self.shape.fanout
        if self.shape.depth == 1 or self.opened[1][leaf // span]:
            return 0
        for level in range(self.shape.depth - 1, 0, -1):
            index = leaf // (self.shape.spans[level] // span)
            if not self.opened[level][index]:
                if not is_zero_name(self.names[level] + index * NAME):
                    self._read_node(
                        self.names[level] + index * NAME, level, self.names[level - 1] + index * span * NAME,
                        node_width(&self.shape, level, index)
                    )
                self.opened[level][index] = 1
        return 0

    cdef int _read_node(self, const uint8_t *name, int level, uint8_t *names, uint32_t width) except -1 nogil:
        cdef uint32_t length = 0
        self.reader.read(self.codec, name, KIND_NODE, self.room, self.store.largest, &length)
        if not node_decode(self.room, length, level, names, width):
            with gil:
                raise RepositoryCorrupt(f"chunk {name[:NAME].hex()} is no node of the tree that names it")
        return 0

    # The leaf in memory, wherever it was.
    cdef leaf_t *_leaf(self, uint64_t index) except NULL nogil:
        cdef leaf_t *leaf
        cdef int place = self.places[index]
        cdef int number
        if place > 0:
            return &self.leaves[place - 1]
        self._open_path(index)
        number = self._free_place()
        leaf = &self.leaves[number]
        if leaf.names == NULL:
            leaf.names = <uint8_t *>malloc(self.leaf_bytes)
            if leaf.names == NULL:
                with gil:
                    raise MemoryError
        leaf.seen = leaf.names + self.shape.fanout * <size_t>NAME
        leaf.index = index
        if place < 0:
            self._swap(index, leaf, False)
        else:
            memset(leaf.names, 0, self.leaf_bytes)
            leaf.missing = node_width(&self.shape, 0, index)
            if not is_zero_name(self.names[0] + index * NAME):
                self._read_node(self.names[0] + index * NAME, 0, leaf.names, leaf.missing)
        leaf.width = node_width(&self.shape, 0, index)
        self.leaf_used = self.leaf_used + 1
        self.places[index] = number + 1
        return leaf

    # A place for one more leaf; another goes to the spill file if there is none.
    cdef int _free_place(self) except -1 nogil:
        cdef leaf_t *leaf
        cdef int number
        if self.leaf_used < self.leaf_room:
            for number in range(self.leaf_room):
                if self.leaves[number].width == 0:
                    return number
        number = self.hand
        self.hand = (self.hand + 1) % self.leaf_room
        leaf = &self.leaves[number]
        self._swap(leaf.index, leaf, True)
        self.places[leaf.index] = -1
        leaf.width = 0
        self.leaf_used = self.leaf_used - 1
        return number

    cdef int _swap(self, uint64_t index, leaf_t *leaf, bint out) except -1 nogil:
        cdef ssize_t moved
        cdef uint32_t i
        if self.spill < 0:
            with gil:
                self.spill = self.make_spill()
        if out:
            moved = pwrite(self.spill, leaf.names, self.leaf_bytes, index * self.leaf_bytes)
        else:
            moved = pread(self.spill, leaf.names, self.leaf_bytes, index * self.leaf_bytes)
            leaf.missing = node_width(&self.shape, 0, index)
            for i in range(self.shape.fanout):
                if leaf.seen[i >> 3] & (1 << (i & 7)):
                    leaf.missing -= 1
        if moved != <ssize_t>self.leaf_bytes:
            with gil:
                reason = os.strerror(errno) if moved < 0 else "short write or read"
                raise StorageError(f"temporary file of an image that is being written: {reason}")
        return 0

    cdef int _seal_leaf(self, leaf_t *leaf) except -1 nogil:
        self._store_node(0, leaf.names, leaf.width, self.names[0] + leaf.index * NAME)
        self.places[leaf.index] = 0
        leaf.width = 0
        self.leaf_used = self.leaf_used - 1
        return 0

    cdef int _store_node(self, int level, const uint8_t *names, uint32_t width, uint8_t *name) except -1 nogil:
        cdef uint32_t added = 0
        cdef size_t length = node_encode(self.room, level, names, width)
        if length == 0:
            memset(name, 0, NAME)
            return 0
        if self.store.keep(self.codec, self.room, length, KIND_NODE, name, &added) < 0:
            self.store.check()
        self.bytes_stored = self.bytes_stored + added
        self.nodes_new = self.nodes_new + (added != 0)
        return 0

    def finish(self):
        """Store what is left of the nodes and the root record; the tree's id."""
        cdef uint8_t root[32]
        with nogil:
            self._build(root)
        return root[:NAME].hex()

    cdef int _build(self, uint8_t *root) except -1 nogil:
        cdef uint8_t record[64]
        cdef uint32_t added = 0
        cdef uint64_t index
        cdef int level
        for index in range(self.shape.counts[0]):
            if self.places[index]:
                self._seal_leaf(self._leaf(index))
        for level in range(1, self.shape.depth):
            for index in range(self.shape.counts[level]):
                if self.opened[level][index]:
                    self._store_node(
                        level, self.names[level - 1] + index * self.shape.fanout * NAME,
                        node_width(&self.shape, level, index), self.names[level] + index * NAME
                    )
        root_encode(&self.shape, self.names[self.shape.depth - 1], record)
        if self.store.keep(self.codec, record, ROOT_LENGTH, KIND_ROOT, root, &added) < 0:
            self.store.check()
        self.bytes_stored = self.bytes_stored + added
        return 0
