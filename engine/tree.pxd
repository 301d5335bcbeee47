# The tree of an image: nodes of chunk names. Reading walks down one path, building goes up.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.chunkreader cimport ChunkReader
from vmbackupd.engine.chunkstore cimport ChunkStore
from vmbackupd.engine.zstd cimport Codec

cdef enum:
    NODE_CACHE = 64          # nodes a reader keeps


# What a tree looks like: fixed by size, chunk size and fan-out.
cdef struct shape_t:
    uint64_t size            # bytes of the image
    uint64_t chunks
    uint32_t chunk_size
    uint32_t fanout          # names in a node
    int depth                # levels of nodes, at least 1; level 0 holds chunk names
    uint64_t counts[8]       # MAX_DEPTH: nodes on each level
    uint64_t spans[8]        # MAX_DEPTH: chunks below a full node of each level

cdef int shape_init(shape_t *shape, uint64_t size, uint32_t chunk_size, uint32_t fanout) except -1
# names below node `index` of `level`: fan-out, less for the last node
cdef uint32_t node_width(const shape_t *shape, int level, uint64_t index) noexcept nogil
# Serialises names without the trailing zero names; 0 if all are zero, else the length.
cdef size_t node_encode(uint8_t *into, int level, const uint8_t *names, uint32_t width) noexcept nogil
# Puts the names of a node at `names`, `width` of them, missing ones as zeros. False if it is no such node.
cdef bint node_decode(const uint8_t *data, size_t length, int level, uint8_t *names, uint32_t width) noexcept nogil
# The name in a tree's id; InvalidArgument.
cdef bytes tree_name(str tree)

# Takes apart a root record; `tree` is for messages.
cdef int root_decode(bytes data, shape_t *shape, uint8_t *top, str tree) except -1


cdef struct cached_t:
    int level
    uint64_t index           # node number + 1; 0: nothing here
    uint8_t *names


cdef class TreeReader:                     # one thread at a time
    cdef ChunkReader reader
    cdef Codec codec
    cdef shape_t shape
    cdef uint8_t top[32]                   # name of the top node
    cdef uint8_t *room                     # a node as it is stored
    cdef cached_t cache[64]                # NODE_CACHE
    # The names below a node, valid until the next call; NULL: all are holes.
    cdef int node(self, int level, uint64_t index, const uint8_t **names) except -1 nogil
    # The chunk's name; a zero name is a hole.
    cdef int name(self, uint64_t index, uint8_t *into) except -1 nogil
    # The next run of names that are no holes, within one node; *count 0: none.
    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil
    cdef int _wrong(self, const uint8_t *name) except -1 nogil


# A node of level 0 that is being filled.
cdef struct leaf_t:
    uint64_t index
    uint32_t width           # names it has
    uint32_t missing         # names not set yet
    uint8_t *names
    uint8_t *seen            # one bit for each name that was set


cdef class TreeBuilder:                    # one thread at a time
    cdef ChunkStore store
    cdef ChunkReader reader
    cdef Codec codec
    cdef shape_t shape
    cdef object make_spill                 # returns the descriptor of a temporary file
    cdef int spill
    cdef uint8_t *names[8]                 # MAX_DEPTH: names of the nodes of each level
    cdef uint8_t *opened[8]                # MAX_DEPTH: are the names below a node in names[level - 1]? unused on level 0
    cdef int *places                       # for each leaf: 0 by its name, n in leaves[n - 1], -1 in the spill file
    cdef leaf_t *leaves
    cdef int leaf_room
    cdef int leaf_used
    cdef int hand                          # next leaf to leave memory
    cdef size_t leaf_bytes
    cdef uint8_t *room                     # a node as it is stored
    cdef readonly uint64_t bytes_stored
    cdef readonly uint64_t nodes_new
    cdef int set(self, uint64_t index, const uint8_t *name) except -1 nogil
    cdef int set_zero(self, uint64_t first, uint64_t count) except -1 nogil
    cdef int _open_path(self, uint64_t leaf) except -1 nogil
    cdef int _read_node(self, const uint8_t *name, int level, uint8_t *names, uint32_t width) except -1 nogil
    cdef leaf_t *_leaf(self, uint64_t index) except NULL nogil
    cdef int _free_place(self) except -1 nogil
    cdef int _seal_leaf(self, leaf_t *leaf) except -1 nogil
    cdef int _store_node(self, int level, const uint8_t *names, uint32_t width, uint8_t *name) except -1 nogil
    cdef int _swap(self, uint64_t index, leaf_t *leaf, bint out) except -1 nogil
    cdef int _build(self, uint8_t *root) except -1 nogil
