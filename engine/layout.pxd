# The repository's byte layout as far as the engine reads and writes it: docs/format.md is the authority.
# Every integer on disk is little-endian.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from "<endian.h>" nogil:
    uint16_t htole16(uint16_t)
    uint32_t htole32(uint32_t)
    uint64_t htole64(uint64_t)
    uint32_t le32toh(uint32_t)
    uint64_t be64toh(uint64_t)


cdef enum:
    NAME = 32                   # bytes of a chunk's name
    PACK_ID = 16                # bytes of a pack's id
    RECORD_HEADER = 48          # bytes before each payload in a pack
    PACK_HEADER = 64            # bytes before a pack's first record
    ENTRY = 48                  # bytes of an index entry
    BLOCK = 4096                # bytes of an index block
    BLOCK_ENTRIES = 85          # entries in a full block
    DIRECTORY_ENTRY = 40        # bytes for each block in an index's directory
    NODE_HEADER = 16            # bytes before a node's names
    ROOT_LENGTH = 64            # bytes of a tree's root record
    MAX_RAW = 1 << 23           # bytes of the longest record content: the largest chunk size
    MAX_DEPTH = 8               # levels of the deepest tree
    MIN_FANOUT = 16             # names a node holds, at least and at most
    MAX_FANOUT = 8192

cdef enum:
    KIND_CHUNK = 1              # bytes of an image
    KIND_NODE = 2               # a tree's node
    KIND_ROOT = 3               # a tree's root record

cdef enum:
    STORED_RAW = 0
    STORED_ZSTD = 1


# An index entry, decoded. `pack` counts in the table of packs beside the entries.
cdef struct Entry:
    uint32_t pack
    uint32_t offset             # of the record's header in the pack
    uint32_t stored             # bytes of the payload
    uint32_t raw                # bytes of the content
    uint8_t kind


cdef inline uint32_t load_u32(const uint8_t *at) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, at, 4)
    return le32toh(value)


cdef inline void store_u16(uint8_t *at, uint16_t value) noexcept nogil:
    value = htole16(value)
    memcpy(at, &value, 2)


cdef inline void store_u32(uint8_t *at, uint32_t value) noexcept nogil:
    value = htole32(value)
    memcpy(at, &value, 4)


cdef inline void store_u64(uint8_t *at, uint64_t value) noexcept nogil:
    value = htole64(value)
    memcpy(at, &value, 8)


# The first 8 bytes of a name as a number that sorts as the name does.
cdef inline uint64_t name_prefix(const uint8_t *name) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, name, 8)
    return be64toh(value)


cdef inline void decode_entry(const uint8_t *at, Entry *entry) noexcept nogil:
    cdef uint32_t last = load_u32(at + 44)
    entry.pack = load_u32(at + 32)
    entry.offset = load_u32(at + 36)
    entry.stored = load_u32(at + 40)
    entry.raw = last & 0xFFFFFF
    entry.kind = <uint8_t>(last >> 24)


cdef inline void encode_entry(uint8_t *at, const uint8_t *name, const Entry *entry) noexcept nogil:
    memcpy(at, name, NAME)
    store_u32(at + 32, entry.pack)
    store_u32(at + 36, entry.offset)
    store_u32(at + 40, entry.stored)
    store_u32(at + 44, entry.raw | (<uint32_t>entry.kind << 24))


cdef inline bint is_zero_name(const uint8_t *name) noexcept nogil:
    cdef uint64_t words[4]
    memcpy(words, name, NAME)
    return (words[0] | words[1] | words[2] | words[3]) == 0
