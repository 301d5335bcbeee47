# cython: cdivision=True
"""The way out of the repository.

Content is believed only if its keyed hash is its name. Where several packs hold a chunk, the next is tried when one
fails; where no index leads to it, ``recover`` may look for it in the packs themselves.
"""

import os
import threading

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy
from posix.unistd cimport close, pread

from vmbackupd.engine.aead cimport AEAD_KEY, AEAD_TAG
from vmbackupd.engine.blake3 cimport keyed_hash
from vmbackupd.engine.chunkstore cimport ChunkStore
from vmbackupd.engine.index cimport IndexSet
from vmbackupd.engine.layout cimport KIND_CHUNK, MAX_RAW, NAME, PACK_ID, RECORD_HEADER, STORED_RAW, Entry, load_u32
from vmbackupd.engine.pack cimport record_decrypt, record_open
from vmbackupd.engine.threads cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from vmbackupd.engine.zstd cimport Codec

from vmbackupd.errors import RepositoryCorrupt, StorageError

REASONS = {
    NOT_INDEXED: "no pack is known to hold it",
    PACK_MISSING: "the pack is missing",
    UNREADABLE: "the pack cannot be read",
    TRUNCATED: "the pack is truncated",
    BAD_RECORD: "the pack holds something else where it should be",
    BAD_CONTENT: "its content does not match its name",
    BAD_SEAL: "it was changed, or encrypted for another place",
}


cdef class ChunkReader:
    """Chunks by name. Any number of threads at once."""

    def __cinit__(
        self,
        IndexSet index not None,
        *,
        bytes chunk_key not None,
        bytes node_key not None,
        object storage,
        object recover=None,
        ChunkStore session=None,
        size_t largest=65536,
        bytes content_key=None,
    ):
        """``storage`` has ``open_pack(pack_id)``, a descriptor of our own or None where there are no files, and
        ``read_pack(pack_id, offset, length)``. ``largest``: bytes of the longest content. ``content_key``: that of an
        encrypted repository.
        """
        cdef int i
        if not len(chunk_key) == len(node_key) == 32 or not 0 < largest <= MAX_RAW:
            raise ValueError("keys have 32 bytes, contents at most 8 MiB")
        if content_key is not None and len(content_key) != AEAD_KEY:
            raise ValueError("keys have 32 bytes")
        pthread_mutex_init(&self.lock, NULL)
        for i in range(OPEN_PACKS):
            self.files[i].fd = -1
        self.keys = <uint8_t *>calloc(3, 32)
        if self.keys == NULL:
            raise MemoryError
        memcpy(self.keys, <char *>chunk_key, 32)
        memcpy(self.keys + 32, <char *>node_key, 32)
        if content_key is not None:
            memcpy(self.keys + 64, <char *>content_key, 32)
            self.encrypted = True
        self.index = index
        self.session = session
        self.storage = storage
        self.recover = recover
        self.kept = []
        self.local = threading.local()
        self.largest = largest

    def __dealloc__(self):
        cdef int i
        for i in range(OPEN_PACKS):
            if self.files[i].fd >= 0:
                close(self.files[i].fd)
        free(self.keys)
        pthread_mutex_destroy(&self.lock)

    def close(self):
        """Close the packs that are open and not in use."""
        cdef int i
        with nogil:
            pthread_mutex_lock(&self.lock)
            for i in range(OPEN_PACKS):
                if self.files[i].fd >= 0 and self.files[i].users == 0:
                    close(self.files[i].fd)
                    self.files[i].fd = -1
            pthread_mutex_unlock(&self.lock)

    def codec(self):
        """What a thread needs to read chunks."""
        # room for a record as it is stored: header, payload and tag
        return Codec(1, self.largest + RECORD_HEADER + AEAD_TAG)

    def searches(self, index):
        """Is this the set of files that is searched?"""
        return self.index is index

    def replace_index(self, IndexSet index not None):
        """Search these files from now on."""
        self.kept.append(self.index)
        self.index = index

    cdef int read(
        self, Codec codec, const uint8_t *name, int kind, uint8_t *into, size_t capacity, uint32_t *length
    ) except -1 nogil:
        cdef uint8_t pack_id[16]
        cdef int problem = self._attempt(codec, name, kind, into, capacity, length, pack_id)
        if problem and self._recovered(name):
            problem = self._attempt(codec, name, kind, into, capacity, length, pack_id)
        if problem:
            self._complain(name, problem, pack_id)
        return 0

    # All places where the chunk might lie, one after another: FINE, or why the last one was not.
    cdef int _attempt(
        self, Codec codec, const uint8_t *name, int kind, uint8_t *into, size_t capacity, uint32_t *length,
        uint8_t *pack_id
    ) except -1 nogil:
        cdef Entry entry
        cdef Py_ssize_t which = -1
        cdef int problem = NOT_INDEXED
        cdef int found
        if self.session is not None:
            found = self.session.locate(name, &entry, pack_id, codec.room, codec.capacity)
            if found:
                problem = FINE if found == 2 else self._fetch(codec, pack_id, &entry)
                if problem == FINE:
                    problem = self.open_record(codec, pack_id, codec.room, name, kind, &entry, into, capacity)
                if problem == FINE:
                    length[0] = entry.raw
                    return FINE
        while True:
            which = self.index.locate(name, <size_t>(which + 1), &entry, pack_id)
            if which < 0:
                return problem
            problem = self._fetch(codec, pack_id, &entry)
            if problem == FINE:
                problem = self.open_record(codec, pack_id, codec.room, name, kind, &entry, into, capacity)
            if problem == FINE:
                length[0] = entry.raw
                return FINE

    cdef int open_record(
        self, Codec codec, const uint8_t *pack_id, const uint8_t *record, const uint8_t *name, int kind,
        const Entry *entry, uint8_t *into, size_t capacity
    ) noexcept nogil:
        cdef uint8_t tag[32]
        cdef const uint8_t *key = self.keys if kind == KIND_CHUNK else self.keys + 32
        cdef const uint8_t *payload = record + RECORD_HEADER
        cdef uint8_t *opened = codec.room + RECORD_HEADER
        cdef uint32_t stored = entry.stored
        cdef int compression = record_open(record, name, entry, self.encrypted)
        if compression < 0 or entry.raw > capacity or RECORD_HEADER + <size_t>stored > codec.capacity:
            return BAD_RECORD
        if self.encrypted:
            if compression == STORED_RAW:
                opened = into
            if not record_decrypt(codec.aead, record, entry, self.keys + 64, pack_id, opened):
                return BAD_SEAL
            payload = opened
            stored -= AEAD_TAG
        if compression != STORED_RAW:
            if not codec.unpack(payload, stored, into, entry.raw):
                return BAD_CONTENT
        elif payload != into:
            memcpy(into, payload, entry.raw)
        keyed_hash(key, into, entry.raw, tag)
        return FINE if memcmp(tag, name, NAME) == 0 else BAD_CONTENT

    cdef bint is_named(self, int kind, const uint8_t *data, size_t length, const uint8_t *name) noexcept nogil:
        cdef uint8_t tag[32]
        keyed_hash(self.keys if kind == KIND_CHUNK else self.keys + 32, data, length, tag)
        return memcmp(tag, name, NAME) == 0

    # Header and payload into codec.room.
    cdef int _fetch(self, Codec codec, const uint8_t *pack_id, const Entry *entry) except -1 nogil:
        cdef size_t wanted = RECORD_HEADER + <size_t>entry.stored
        if wanted > codec.capacity:
            return BAD_RECORD
        return self.fetch_range(pack_id, entry.offset, codec.room, wanted)

    cdef int fetch_range(
        self, const uint8_t *pack_id, uint64_t offset, uint8_t *into, size_t wanted
    ) except -1 nogil:
        cdef size_t done = 0
        cdef ssize_t got
        cdef int fd = -1
        cdef pack_file_t *slot = NULL
        cdef int problem = self._borrow(pack_id, &slot, &fd)
        if problem:
            return problem
        if fd < 0:
            self.remote = True
            with gil:
                try:
                    data = self.storage.read_pack(pack_id[:PACK_ID], offset, wanted)
                except FileNotFoundError:
                    return PACK_MISSING
                except StorageError as reason:
                    self.last_error = reason
                    return UNREADABLE
                if len(data) != wanted:
                    return TRUNCATED
                memcpy(into, <const char *>(<bytes>data), wanted)
            return FINE
        while done < wanted:
            got = pread(fd, into + done, wanted - done, offset + <uint64_t>done)
            if got < 0 and errno == EINTR:
                continue
            if got < 0:
                problem = UNREADABLE
                with gil:
                    self.last_error = StorageError(f"pack {pack_id[:PACK_ID].hex()}: {os.strerror(errno)}")
                break
            if got == 0:
                problem = TRUNCATED
                break
            done += got
        self._give_back(slot, fd)
        return problem

    # A descriptor of the pack; fd -1 where the storage has none. The slot is NULL when the descriptor is not kept.
    cdef int _borrow(self, const uint8_t *pack_id, pack_file_t **slot, int *fd) except -2 nogil:
        cdef int i
        cdef pack_file_t *oldest = NULL
        slot[0] = NULL
        pthread_mutex_lock(&self.lock)
        self.clock = self.clock + 1
        for i in range(OPEN_PACKS):
            if self.files[i].fd >= 0 and memcmp(self.files[i].pack_id, pack_id, PACK_ID) == 0:
                self.files[i].users = self.files[i].users + 1
                self.files[i].stamp = self.clock
                slot[0] = &self.files[i]
                fd[0] = self.files[i].fd
                break
        pthread_mutex_unlock(&self.lock)
        if slot[0] != NULL:
            return FINE
        with gil:
            try:
                opened = self.storage.open_pack(pack_id[:PACK_ID])
            except FileNotFoundError:
                return PACK_MISSING
            except StorageError as reason:
                self.last_error = reason
                return UNREADABLE
            fd[0] = -1 if opened is None else opened
        if fd[0] < 0:
            return FINE
        pthread_mutex_lock(&self.lock)
        for i in range(OPEN_PACKS):
            if self.files[i].users == 0 and (
                oldest == NULL or (oldest.fd >= 0 and (self.files[i].fd < 0 or self.files[i].stamp < oldest.stamp))
            ):
                oldest = &self.files[i]
        if oldest != NULL:
            if oldest.fd >= 0:
                close(oldest.fd)
            oldest.fd = fd[0]
            oldest.users = 1
            oldest.stamp = self.clock
            memcpy(oldest.pack_id, pack_id, PACK_ID)
            slot[0] = oldest
        pthread_mutex_unlock(&self.lock)
        return FINE

    cdef void _give_back(self, pack_file_t *slot, int fd) noexcept nogil:
        if slot == NULL:
            close(fd)
            return
        pthread_mutex_lock(&self.lock)
        slot.users -= 1
        pthread_mutex_unlock(&self.lock)

    cdef int _recovered(self, const uint8_t *name) except -1 nogil:
        with gil:
            if self.recover is None:
                return 0
            index = self.recover(name[:NAME], self.index)
            if index is None:
                return 0
            self.replace_index(index)
            return 1

    cdef int _complain(self, const uint8_t *name, int problem, const uint8_t *pack_id) except -1 nogil:
        with gil:
            what = f"chunk {name[:NAME].hex()}"
            if problem != NOT_INDEXED:
                what = f"{what} in pack {pack_id[:PACK_ID].hex()}"
            if problem == UNREADABLE:
                raise StorageError(f"{what}: {self.last_error}") from self.last_error
            raise RepositoryCorrupt(f"{what}: {REASONS[problem]}")

    def record(self, bytes name not None, int kind):
        """(compression, bytes of the content, payload) of a chunk, checked as ``content`` does.

        The payload is decrypted, and compressed if ``compression`` is 1: what ``ChunkStore.copy_record`` takes.
        """
        cdef bytearray out = bytearray(self.largest)
        cdef uint8_t *into = <uint8_t *><char *>out
        cdef const uint8_t *start = <const uint8_t *><char *>name
        cdef uint32_t length = 0
        cdef uint32_t stored
        cdef Codec codec = getattr(self.local, "codec", None)
        if codec is None:
            codec = self.codec()
            self.local.codec = codec
        if len(name) != NAME:
            raise ValueError(f"a name has {NAME} bytes, not {len(name)}")
        with nogil:
            self.read(codec, start, kind, into, self.largest, &length)
        # the record that was read is in codec.room still
        if codec.room[40] == STORED_RAW:
            return STORED_RAW, length, bytes(out[:length])
        stored = load_u32(codec.room + 32) - (AEAD_TAG if self.encrypted else 0)
        return codec.room[40], length, PyBytes_FromStringAndSize(<char *>codec.room + RECORD_HEADER, stored)

    def content(self, bytes name not None, int kind):
        """The content of a chunk of this kind (1 chunk, 2 node, 3 root), for what is read once."""
        cdef bytearray out = bytearray(self.largest)
        cdef uint8_t *into = <uint8_t *><char *>out
        cdef const uint8_t *start = <const uint8_t *><char *>name
        cdef uint32_t length = 0
        cdef Codec codec = self.codec()
        if len(name) != NAME:
            raise ValueError(f"a name has {NAME} bytes, not {len(name)}")
        with nogil:
            self.read(codec, start, kind, into, self.largest, &length)
        return bytes(out[:length])
