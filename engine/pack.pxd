# Packs: records appended in memory, and the parts of a finished pack.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from vmbackupd.engine.aead cimport Aead
from vmbackupd.engine.layout cimport Entry


# A pack being filled. Plain C, because many threads append to it without the GIL.
cdef struct pack_t:
    int state                # PACK_FREE, PACK_OPEN, PACK_FULL, PACK_WRITING
    int pending              # appends whose place is taken but whose bytes are not all there yet
    uint32_t number          # which pack of its writer this is
    uint32_t count           # records
    uint32_t room            # entries that fit
    size_t used              # bytes: header and records
    size_t capacity
    uint8_t *data
    uint8_t *entries         # wire form, in order of the records
    int cipher               # of every record; 0: none
    uint8_t key[32]          # the pack's own

cdef enum:
    PACK_FREE = 0
    PACK_OPEN = 1
    PACK_FULL = 2
    PACK_WRITING = 3

cdef int pack_init(pack_t *pack, size_t capacity) noexcept nogil             # -1: out of memory
cdef void pack_free(pack_t *pack) noexcept nogil
# `content_key` is not used where cipher is 0
cdef void pack_start(
    pack_t *pack, uint32_t number, const uint8_t *repository, const uint8_t *pack_id, int cipher,
    const uint8_t *content_key
) noexcept nogil
cdef bint pack_fits(const pack_t *pack, size_t stored) noexcept nogil
# Takes the place for a record and notes its entry: 0, or -1 out of memory. entry.stored counts the tag where the pack
# has a cipher. entry.offset is set; the caller then puts header and payload there with pack_write(), which may run
# beside other appends: 0, or -1 when `aead` fails. The payload is entry.stored bytes, less the tag.
cdef int pack_reserve(pack_t *pack, const uint8_t *name, Entry *entry) noexcept nogil
cdef int pack_write(
    pack_t *pack, Aead aead, const uint8_t *name, const Entry *entry, int compression, const uint8_t *payload
) noexcept nogil
# Own index and trailer of a pack that is complete.
cdef bytes pack_tail(pack_t *pack, const uint8_t *key, const uint8_t *pack_id)
# Checks the header of a record as it was read against its entry: its compression, or -1. `encrypted` says whether a
# record of this repository has a cipher.
cdef int record_open(const uint8_t *record, const uint8_t *name, const Entry *entry, bint encrypted) noexcept nogil
# The payload of an encrypted record (header and entry.stored bytes) that record_open() found fine, decrypted to `into`
# (entry.stored bytes less the tag; may be where the payload is). False: it is not what was stored there.
cdef bint record_decrypt(
    Aead aead, const uint8_t *record, const Entry *entry, const uint8_t *content_key, const uint8_t *pack_id,
    uint8_t *into
) noexcept nogil
