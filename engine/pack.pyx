# cython: cdivision=True
"""Packs: header, records, the pack's own index, trailer."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from vmbackupd.engine.aead cimport AEAD_KEY, AEAD_TAG, AES_256_GCM, CHACHA20_POLY1305, Aead
from vmbackupd.engine.blake3 cimport keyed_hash
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
    ENTRY,
    KIND_CHUNK,
    KIND_ROOT,
    MAX_RAW,
    NAME,
    PACK_HEADER,
    PACK_ID,
    RECORD_HEADER,
    STORED_RAW,
    STORED_ZSTD,
    Entry,
    encode_entry,
    store_u16,
    store_u32,
    store_u64,
)
from vmbackupd.engine.zstd cimport Codec

from vmbackupd.errors import RepositoryCorrupt

cdef enum:
    TRAILER_LENGTH = 80
    TAG = 32
    VERSION = 1

cdef bytes MAGIC = b"VMBKPACK"
cdef bytes END_MAGIC = b"VMBKPEND"

HEADER = PACK_HEADER
"""Bytes before the first record."""
TRAILER = TRAILER_LENGTH
"""Bytes at the end of a pack, after its own index."""


# ---- filling

cdef int pack_init(pack_t *pack, size_t capacity) noexcept nogil:
    memset(pack, 0, sizeof(pack_t))
    pack.room = 512
    pack.capacity = capacity
    pack.data = <uint8_t *>malloc(capacity)
    pack.entries = <uint8_t *>malloc(pack.room * <size_t>ENTRY)
    return 0 if pack.data != NULL and pack.entries != NULL else -1


cdef void pack_free(pack_t *pack) noexcept nogil:
    free(pack.data)
    free(pack.entries)
    pack.data = NULL
    pack.entries = NULL


cdef void pack_start(
    pack_t *pack, uint32_t number, const uint8_t *repository, const uint8_t *pack_id, int cipher,
    const uint8_t *content_key
) noexcept nogil:
    pack.state = PACK_OPEN
    pack.pending = 0
    pack.number = number
    pack.count = 0
    pack.used = PACK_HEADER
    memset(pack.data, 0, PACK_HEADER)
    memcpy(pack.data, b"VMBKPACK", 8)
    store_u16(pack.data + 8, VERSION)
    pack.data[10] = 1 if cipher else 0
    pack.cipher = cipher
    if cipher:
        keyed_hash(content_key, pack_id, PACK_ID, pack.key)
    memcpy(pack.data + 16, repository, 16)
    memcpy(pack.data + 32, pack_id, PACK_ID)


cdef bint pack_fits(const pack_t *pack, size_t stored) noexcept nogil:
    return RECORD_HEADER + stored <= pack.capacity - pack.used


cdef int pack_reserve(pack_t *pack, const uint8_t *name, Entry *entry) noexcept nogil:
    cdef uint8_t *grown
    cdef Entry own
    if pack.count == pack.room:
        grown = <uint8_t *>realloc(pack.entries, pack.room * <size_t>(2 * ENTRY))
        if grown == NULL:
            return -1
        pack.entries = grown
        pack.room *= 2
    entry.pack = pack.number
    entry.offset = <uint32_t>pack.used
    own = entry[0]
    own.pack = 0             # in its own index a pack has no number
    encode_entry(pack.entries + pack.count * <size_t>ENTRY, name, &own)
    pack.count += 1
    pack.used += RECORD_HEADER + entry.stored
    pack.pending += 1
    return 0


# A record's nonce. The offset alone makes it unique: a pack's key encrypts each place once. The name is there for the
# case that must not happen, a writer that runs twice from one state (a host set back to a snapshot while it writes):
# then two contents at one place still have different nonces.
cdef inline void _nonce(uint8_t *into, uint32_t offset, const uint8_t *name) noexcept nogil:
    store_u32(into, offset)
    memcpy(into + 4, name, 8)


cdef int pack_write(
    pack_t *pack, Aead aead, const uint8_t *name, const Entry *entry, int compression, const uint8_t *payload
) noexcept nogil:
    cdef uint8_t *at = pack.data + entry.offset
    cdef uint8_t nonce[12]
    memset(at, 0, RECORD_HEADER)
    memcpy(at, name, NAME)
    store_u32(at + 32, entry.stored)
    store_u32(at + 36, entry.raw | (<uint32_t>entry.kind << 24))
    at[40] = <uint8_t>compression
    if not pack.cipher:
        memcpy(at + RECORD_HEADER, payload, entry.stored)
        return 0
    at[41] = <uint8_t>pack.cipher
    _nonce(nonce, entry.offset, name)
    return aead.seal(
        pack.cipher, pack.key, nonce, at, RECORD_HEADER, payload, entry.stored - AEAD_TAG, at + RECORD_HEADER
    )


cdef bytes pack_tail(pack_t *pack, const uint8_t *key, const uint8_t *pack_id):
    cdef size_t listed = pack.count * <size_t>ENTRY
    cdef bytearray tail = bytearray(listed + TRAILER_LENGTH)
    cdef uint8_t *out = <uint8_t *><char *>tail
    cdef uint8_t *trailer = out + listed
    memcpy(out, pack.entries, listed)
    memcpy(trailer, <char *>END_MAGIC, 8)
    store_u64(trailer + 8, pack.used)
    store_u32(trailer + 16, pack.count)
    memcpy(trailer + 24, pack_id, PACK_ID)
    with nogil:
        keyed_hash(key, out, listed + TRAILER_LENGTH - TAG, trailer + TRAILER_LENGTH - TAG)
    return bytes(tail)


# ---- reading

cdef int record_open(const uint8_t *record, const uint8_t *name, const Entry *entry, bint encrypted) noexcept nogil:
    cdef Cursor cursor = cursor_over(record, RECORD_HEADER)
    cdef const uint8_t *own = take(&cursor, NAME)
    cdef uint32_t stored = read_u32le(&cursor)
    cdef uint32_t raw = read_u32le(&cursor)
    cdef uint8_t compression = read_u8(&cursor)
    cdef uint8_t cipher = read_u8(&cursor)
    cdef uint32_t reserved = read_u32le(&cursor) | read_u16le(&cursor)
    cdef uint32_t added = AEAD_TAG if encrypted else 0
    if (
        cursor.failed
        or memcmp(own, name, NAME) != 0
        or stored != entry.stored
        or raw != (entry.raw | (<uint32_t>entry.kind << 24))
        or (cipher != AES_256_GCM and cipher != CHACHA20_POLY1305 if encrypted else cipher != 0)
        or compression > STORED_ZSTD
        or reserved != 0
        or entry.stored < added
        or (compression == STORED_RAW and entry.stored - added != entry.raw)
    ):
        return -1
    return compression


cdef bint record_decrypt(
    Aead aead, const uint8_t *record, const Entry *entry, const uint8_t *content_key, const uint8_t *pack_id,
    uint8_t *into
) noexcept nogil:
    cdef uint8_t key[32]
    cdef uint8_t nonce[12]
    keyed_hash(content_key, pack_id, PACK_ID, key)
    _nonce(nonce, entry.offset, record)
    return aead.open(
        record[41], key, nonce, record, RECORD_HEADER, record + RECORD_HEADER, entry.stored - AEAD_TAG, into
    )


def check_header(
    const uint8_t[::1] data not None, bytes repository not None, bytes pack_id not None, str label,
    *, bint encrypted=False
):
    """Is ``data`` (the first 64 bytes of an object) the header of this pack? RepositoryCorrupt if not."""
    cdef size_t length = data.shape[0]
    cdef Cursor cursor
    cdef const uint8_t *magic
    cdef const uint8_t *owner
    cdef const uint8_t *own
    cdef uint16_t version
    cdef uint8_t cipher
    cdef uint64_t reserved
    if length < PACK_HEADER:
        raise RepositoryCorrupt(f"{label} is truncated: it has {length} bytes")
    cursor = cursor_over(&data[0], length)
    magic = take(&cursor, 8)
    version = read_u16le(&cursor)
    cipher = read_u8(&cursor)
    reserved = read_u32le(&cursor) | read_u8(&cursor)
    owner = take(&cursor, 16)
    own = take(&cursor, PACK_ID)
    reserved |= read_u64le(&cursor) | read_u64le(&cursor)
    if cursor.failed or memcmp(magic, <char *>MAGIC, 8) != 0:
        raise RepositoryCorrupt(f"{label} is no pack")
    if version != VERSION or cipher > 1 or reserved != 0:
        raise RepositoryCorrupt(f"{label} has format {version}.{cipher}.{reserved}, this program reads {VERSION}.0 and .1")
    if encrypted != (cipher != 0):
        raise RepositoryCorrupt(f"{label} {'is not' if encrypted else 'is'} encrypted, unlike the repository")
    if owner[:16] != repository or own[:PACK_ID] != pack_id:
        raise RepositoryCorrupt(f"{label} belongs to another repository or is stored under the wrong name")


def parse_trailer(const uint8_t[::1] data not None, uint64_t size, bytes pack_id not None, str label):
    """(offset of the pack's own index, number of entries) out of the last 80 bytes of a pack of ``size`` bytes."""
    cdef size_t length = data.shape[0]
    cdef Cursor cursor
    cdef const uint8_t *magic
    cdef const uint8_t *own
    cdef uint64_t offset
    cdef uint32_t count
    if length != TRAILER_LENGTH:
        raise RepositoryCorrupt(f"{label} is truncated")
    cursor = cursor_over(&data[0], length)
    magic = take(&cursor, 8)
    offset = read_u64le(&cursor)
    count = read_u32le(&cursor)
    read_u32le(&cursor)
    own = take(&cursor, PACK_ID)
    if cursor.failed or memcmp(magic, <char *>END_MAGIC, 8) != 0 or own[:PACK_ID] != pack_id:
        raise RepositoryCorrupt(f"{label} has no trailer of its own")
    if offset < PACK_HEADER or offset > size or offset + count * <uint64_t>ENTRY + TRAILER_LENGTH != size:
        raise RepositoryCorrupt(f"{label}: its trailer does not fit its length of {size} bytes")
    return offset, count


def check_tail(const uint8_t[::1] tail not None, bytes key not None, str label):
    """The entries out of ``tail`` (own index and trailer); RepositoryCorrupt if they do not match the keyed hash."""
    cdef size_t length = tail.shape[0]
    cdef uint8_t tag[32]
    if len(key) != 32:
        raise ValueError("a key has 32 bytes")
    if length < TRAILER_LENGTH:
        raise RepositoryCorrupt(f"{label} is truncated")
    keyed_hash(<const uint8_t *><char *>key, &tail[0], length - TAG, tag)
    if memcmp(tag, &tail[length - TAG], TAG) != 0:
        raise RepositoryCorrupt(f"{label}: its own index does not match its checksum")
    return PyBytes_FromStringAndSize(<char *>&tail[0], length - TRAILER_LENGTH)


def scan_records(
    const uint8_t[::1] data not None, bytes chunk_key not None, bytes node_key not None, Codec codec not None,
    *, bytes content_key=None
):
    """The entries of a pack whose own index is lost, made by reading its records from the front.

    ``data`` is the whole object. Each record's content is checked against its name; the scan ends at the first one that
    does not match, since nothing after it is known to begin where it seems to. ``codec`` belongs to the caller's thread.
    """
    cdef size_t length = data.shape[0]
    cdef Cursor cursor
    cdef const uint8_t *record
    cdef const uint8_t *payload
    cdef uint8_t *content
    cdef uint8_t *opened
    cdef const uint8_t *key
    cdef const uint8_t *sealed_with = NULL
    cdef uint8_t pack_id[16]
    cdef uint8_t tag[32]
    cdef uint8_t wire[48]
    cdef uint32_t last
    cdef Entry entry
    cdef int compression
    cdef bint good
    if len(chunk_key) != 32 or len(node_key) != 32 or (content_key is not None and len(content_key) != AEAD_KEY):
        raise ValueError("a key has 32 bytes")
    if length < PACK_HEADER:
        return b""
    if content_key is not None:
        sealed_with = <const uint8_t *><char *>content_key
    memcpy(pack_id, &data[32], PACK_ID)
    found = []
    content = <uint8_t *>malloc(2 * <size_t>MAX_RAW)   # what is decrypted, behind it what is decompressed
    if content == NULL:
        raise MemoryError
    opened = content + MAX_RAW
    try:
        cursor = cursor_over(&data[0], length)
        take(&cursor, PACK_HEADER)
        while remaining(&cursor) >= RECORD_HEADER:
            entry.pack = 0
            entry.offset = <uint32_t>cursor.at
            record = take(&cursor, NAME)
            entry.stored = read_u32le(&cursor)
            last = read_u32le(&cursor)
            entry.raw = last & 0xFFFFFF
            entry.kind = <uint8_t>(last >> 24)
            take(&cursor, RECORD_HEADER - NAME - 8)
            payload = take(&cursor, entry.stored)
            if cursor.failed or not KIND_CHUNK <= entry.kind <= KIND_ROOT or not 0 < entry.raw <= MAX_RAW:
                break
            compression = record_open(record, record, &entry, sealed_with != NULL)
            if compression < 0 or entry.stored > MAX_RAW + <uint32_t>AEAD_TAG:
                break
            key = <const uint8_t *><char *>(chunk_key if entry.kind == KIND_CHUNK else node_key)
            with nogil:
                good = True
                if sealed_with != NULL:
                    good = record_decrypt(codec.aead, record, &entry, sealed_with, pack_id, opened)
                    payload = opened
                    entry.stored -= AEAD_TAG
                if good and compression == STORED_ZSTD:
                    good = codec.unpack(payload, entry.stored, content, entry.raw)
                    payload = content
                if sealed_with != NULL:
                    entry.stored += AEAD_TAG
                if good:
                    keyed_hash(key, payload, entry.raw, tag)
                    good = memcmp(tag, record, NAME) == 0
            if not good:
                break
            encode_entry(wire, record, &entry)
            found.append(wire[:ENTRY])
    finally:
        free(content)
    return b"".join(found)
