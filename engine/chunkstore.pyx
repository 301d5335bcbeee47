# cython: cdivision=True
"""The way into the repository.

Threads that own images queue chunks; workers hash, look up, compress and append them to the open pack; writers hand
full packs to the storage. One mutex guards all shared state and is never held while bytes are hashed, compressed,
copied or written, nor together with the GIL.

Memory: three packs, one compression context a worker, the entries of the chunks that are new since the last segment.
When these are many (``segment_entries``), everybody waits for a moment while they are sorted and written to a
temporary file in the form of an index file, which is searched from then on and published at the end.
"""

import threading

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport pread

from vmbackupd.engine.aead cimport AEAD_KEY, AEAD_TAG, CHACHA20_POLY1305, NO_CIPHER, preferred_cipher
from vmbackupd.engine.blake3 cimport keyed_hash
from vmbackupd.engine.buffers cimport AlignedBuffer
from vmbackupd.engine.index cimport EntryTable, IndexFile, IndexSet
from vmbackupd.engine.layout cimport (
    KIND_CHUNK,
    KIND_ROOT,
    MAX_RAW,
    NAME,
    PACK_ID,
    RECORD_HEADER,
    STORED_RAW,
    STORED_ZSTD,
    Entry,
    store_u32,
)
from vmbackupd.engine.pack cimport (
    PACK_FREE,
    PACK_FULL,
    PACK_OPEN,
    PACK_WRITING,
    pack_fits,
    pack_free,
    pack_init,
    pack_reserve,
    pack_start,
    pack_t,
    pack_tail,
    pack_write,
)
from vmbackupd.engine.threads cimport (
    pthread_cond_broadcast,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from vmbackupd.engine.zero cimport is_zero
from vmbackupd.engine.zstd cimport Codec

cdef enum:
    WRITERS = 2             # threads that hand packs to the storage


cdef class ChunkStore:
    """A writer's chunks on their way into packs. Any number of threads at once; close() ends its threads."""

    def __cinit__(
        self,
        IndexSet index not None,
        *,
        bytes chunk_key not None,
        bytes node_key not None,
        bytes seal_key not None,
        bytes repository not None,
        bytes writer not None,
        object put_pack,
        object spill_file,
        int workers,
        int level=1,
        size_t largest=65536,
        size_t pack_size=16 << 20,
        uint32_t segment_entries=1 << 19,
        bytes content_key=None,
        int cipher=NO_CIPHER,
    ):
        """
        ``index``: what is known already. Keys have 32 bytes, ``repository`` 16, ``writer`` (the first part of every
        pack id) 12. ``put_pack(pack_id, parts)`` makes a pack durable and is called from this object's threads;
        ``spill_file(parts)`` writes to a temporary file and returns its descriptor. ``largest``: bytes of the longest
        content; ``pack_size``: bytes at which a pack is closed. ``content_key``: that of an encrypted repository, and
        ``cipher`` the id of the cipher to write with, 0 for the one that is faster here.
        """
        cdef int i
        if not len(chunk_key) == len(node_key) == len(seal_key) == 32 or len(repository) != 16 or len(writer) != 12:
            raise ValueError("keys have 32 bytes, the repository's id 16, a writer's 12")
        if not 0 < largest <= MAX_RAW or not largest + 4096 <= pack_size <= 1 << 30 or workers < 1 or segment_entries < 1:
            raise ValueError("sizes out of range")
        if not NO_CIPHER <= cipher <= CHACHA20_POLY1305:
            raise ValueError(f"there is no cipher {cipher}")
        if content_key is not None and len(content_key) != AEAD_KEY:
            raise ValueError("keys have 32 bytes")
        self.keys = <uint8_t *>calloc(5, 32)
        if self.keys == NULL:
            raise MemoryError
        memcpy(self.keys, <char *>chunk_key, 32)
        memcpy(self.keys + 32, <char *>node_key, 32)
        memcpy(self.keys + 64, <char *>seal_key, 32)
        if content_key is not None:
            memcpy(self.keys + 96, <char *>content_key, 32)
            self.cipher = cipher or preferred_cipher()
        memcpy(self.keys + 128, <char *>repository, 16)
        memcpy(self.keys + 144, <char *>writer, 12)
        self.chunk_key, self.node_key, self.seal_key = chunk_key, node_key, seal_key
        self.repository, self.writer = repository, writer
        self.index = index
        self.segments = IndexSet()
        self.table = EntryTable()
        self.kept = []
        self.segment_files = []
        self.put_pack = put_pack
        self.spill_file = spill_file
        self.level = level
        self.largest = largest
        self.pack_size = pack_size
        self.segment_entries = segment_entries
        self.workers = workers
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work, NULL)
        pthread_cond_init(&self.done, NULL)
        pthread_cond_init(&self.changed, NULL)
        for i in range(BUFFERS):
            if pack_init(&self.buffers[i], pack_size) < 0:
                raise MemoryError
        self.threads = []
        self.local = threading.local()

    def __dealloc__(self):
        cdef int i
        for i in range(BUFFERS):
            pack_free(&self.buffers[i])
        free(self.keys)
        pthread_cond_destroy(&self.work)
        pthread_cond_destroy(&self.done)
        pthread_cond_destroy(&self.changed)
        pthread_mutex_destroy(&self.lock)

    def start(self):
        """Start the threads; close() must follow."""
        for number in range(self.workers):
            codec = Codec(self.level, self.largest)
            self._spawn(f"vmbackup-chunk-{number}", self._run_worker, codec)
        for number in range(WRITERS):
            self._spawn(f"vmbackup-pack-{number}", self._run_writer)

    def _spawn(self, name, target, *args):
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        thread.start()
        self.threads.append(thread)

    # ---- content in

    cdef int keep(
        self, Codec codec, const uint8_t *data, size_t length, int kind, uint8_t *name, uint32_t *added
    ) noexcept nogil:
        cdef Entry entry
        cdef Py_ssize_t made
        cdef const uint8_t *payload = data
        cdef int wanted
        added[0] = 0
        keyed_hash(self.keys if kind == KIND_CHUNK else self.keys + 32, data, length, name)
        if self.index.find(name, 0, &entry) >= 0:
            return 0
        memset(&entry, 0, sizeof(entry))
        entry.raw = <uint32_t>length
        entry.kind = <uint8_t>kind
        # in the table before it is compressed, so that nobody compresses the same content meanwhile
        wanted = self._announce(name, &entry)
        if wanted <= 0:
            return wanted
        made = codec.pack(data, length)
        if made < 0:
            self._set_failed(NO_MEMORY)
            return -1
        if made:
            payload = codec.room
        entry.stored = <uint32_t>(made if made else length)
        added[0] = RECORD_HEADER + entry.stored
        if self.cipher:
            added[0] += AEAD_TAG
        return self._place(codec, name, &entry, STORED_ZSTD if made else STORED_RAW, payload)

    cdef int _announce(self, const uint8_t *name, Entry *entry) noexcept nogil:
        cdef Entry there
        cdef int made
        pthread_mutex_lock(&self.lock)
        while not self.failed and (self.spilling or self.table.count >= self.segment_entries):
            if not self.spilling:
                self.spilling = 1
                pthread_cond_broadcast(&self.changed)
            pthread_cond_wait(&self.changed, &self.lock)
        if self.failed:
            pthread_mutex_unlock(&self.lock)
            return -1
        if self.segments.length and self.segments.find(name, 0, &there) >= 0:
            made = 0
        else:
            made = self.table.add(name, entry)
            if made < 0:
                pthread_mutex_unlock(&self.lock)
                self._set_failed(NO_MEMORY)
                return -1
            if made:
                self.unplaced = self.unplaced + 1
        pthread_mutex_unlock(&self.lock)
        return made

    # Finds the place in a pack and puts the record there; entry.stored is the payload's length.
    cdef int _place(
        self, Codec codec, const uint8_t *name, Entry *entry, int compression, const uint8_t *payload
    ) noexcept nogil:
        cdef pack_t *pack
        cdef int failed
        if self.cipher:
            entry.stored += AEAD_TAG
        pthread_mutex_lock(&self.lock)
        pack = self._room(entry.stored)
        if pack == NULL or pack_reserve(pack, name, entry) < 0:
            pthread_mutex_unlock(&self.lock)
            if pack != NULL:
                self._set_failed(NO_MEMORY)
            return -1
        self.table.replace(name, entry)
        self.bytes_stored = self.bytes_stored + RECORD_HEADER + entry.stored
        self.unplaced = self.unplaced - 1
        # wakes somebody only where somebody can be waiting for this: it happens for every chunk
        if self.watchers or (self.spilling and self.unplaced == 0):
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.lock)

        failed = pack_write(pack, codec.aead, name, entry, compression, payload)
        if failed:
            self._set_failed(NO_MEMORY)

        pthread_mutex_lock(&self.lock)
        pack.pending -= 1
        if pack.pending == 0 and (self.watchers or pack.state == PACK_FULL):
            pthread_cond_broadcast(&self.changed)
        pthread_mutex_unlock(&self.lock)
        return failed

    def copy_record(self, bytes name not None, int kind, uint32_t raw, int compression, const uint8_t[::1] payload not None):
        """Store a record that another pack holds, as ``ChunkReader.record`` gave it. Was it new to this writer?"""
        cdef Entry entry
        cdef int result
        cdef Codec codec = self.copier()
        cdef const uint8_t *start = <const uint8_t *><char *>name
        cdef const uint8_t *content
        if (
            len(name) != NAME or not KIND_CHUNK <= kind <= KIND_ROOT or not 0 < raw <= self.largest
            or not 0 < payload.shape[0] <= raw or compression not in (STORED_RAW, STORED_ZSTD)
            or (compression == STORED_RAW and payload.shape[0] != raw)
        ):
            raise ValueError(f"no record: {len(name)}, {kind}, {raw}, {compression}, {payload.shape[0]}")
        content = &payload[0]
        memset(&entry, 0, sizeof(entry))
        entry.raw = raw
        entry.kind = <uint8_t>kind
        with nogil:
            result = self._announce(start, &entry)
            if result > 0:
                entry.stored = <uint32_t>payload.shape[0]
                if self._place(codec, start, &entry, compression, content) < 0:
                    result = -1
        if result < 0:
            raise_copy(self.error)
        return bool(result)

    # What the calling thread encrypts with when it copies records.
    cdef Codec copier(self):
        cdef Codec codec = getattr(self.local, "codec", None)
        if codec is None:
            codec = Codec(self.level, 1)
            self.local.codec = codec
        return codec

    # The open pack, with room for `stored` bytes; NULL when the store has failed. Called with the lock held.
    cdef pack_t *_room(self, size_t stored) noexcept nogil:
        cdef uint8_t pack_id[16]
        cdef int i
        while not self.failed:
            if self.open != NULL:
                if pack_fits(self.open, stored):
                    return self.open
                self.open.state = PACK_FULL
                self.open = NULL
                pthread_cond_broadcast(&self.changed)
            for i in range(BUFFERS):
                if self.buffers[i].state == PACK_FREE:
                    self.open = &self.buffers[i]
                    self.pack_id(self.packs, pack_id)
                    pack_start(
                        self.open, self.packs, <const uint8_t *>self.keys + 128, pack_id, self.cipher, self.keys + 96
                    )
                    self.packs = self.packs + 1
                    break
            else:
                pthread_cond_wait(&self.changed, &self.lock)
        return NULL

    cdef void pack_id(self, uint32_t number, uint8_t *into) noexcept nogil:
        memcpy(into, self.keys + 144, 12)
        store_u32(into + 12, number)

    # ---- workers

    cdef void submit(self, job_t *job) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        job.next = NULL
        job.state = JOB_QUEUED
        if self.tail == NULL:
            self.head = job
        else:
            self.tail.next = job
        self.tail = job
        pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)

    cdef void await_job(self, job_t *job) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        while job.state == JOB_QUEUED or job.state == JOB_RUNNING:
            job.awaited = True
            pthread_cond_wait(&self.done, &self.lock)
        job.awaited = False
        pthread_mutex_unlock(&self.lock)

    def _run_worker(self, Codec codec not None):
        room = AlignedBuffer(max(<size_t>JOB_BYTES, self.largest))
        with nogil:
            self._work(codec, room.data)

    # `room` holds what a job reads from a file.
    cdef void _work(self, Codec codec, uint8_t *room) noexcept nogil:
        cdef job_t *job
        pthread_mutex_lock(&self.lock)
        while True:
            while self.head == NULL and not self.closing:
                pthread_cond_wait(&self.work, &self.lock)
            if self.head == NULL:
                break
            job = self.head
            self.head = job.next
            if self.head == NULL:
                self.tail = NULL
            job.state = JOB_RUNNING
            pthread_mutex_unlock(&self.lock)
            self._do(job, codec, room)
            pthread_mutex_lock(&self.lock)
            job.state = JOB_DONE
            if job.awaited:
                pthread_cond_broadcast(&self.done)
        pthread_mutex_unlock(&self.lock)

    # A worker reads what it will hash: the bytes are in its core's cache then, and nobody copies them.
    cdef void _do(self, job_t *job, Codec codec, uint8_t *room) noexcept nogil:
        cdef const uint8_t *data = job.data
        cdef uint8_t *name = job.names
        cdef size_t at = 0
        cdef size_t length
        cdef uint32_t added = 0
        if job.fd >= 0:
            data = room
            job.problem = _read_fully(job.fd, room, job.length, job.offset)
            if job.problem:
                return
        while at < job.length:
            length = min(job.chunk, job.length - at)
            if is_zero(data + at, length):
                memset(name, 0, NAME)
            else:
                if self.keep(codec, data + at, length, KIND_CHUNK, name, &added) < 0:
                    return
                if added:
                    job.fresh += 1
                    job.added += added
            at += length
            name += NAME

    # ---- packs out

    # A pack to be written, PACK_WRITING from now on; NULL: a segment is to be written, or closing. Lock not held.
    cdef pack_t *_next_full(self) noexcept nogil:
        cdef int i
        cdef pack_t *found = NULL
        pthread_mutex_lock(&self.lock)
        while found == NULL:
            for i in range(BUFFERS):
                if self.buffers[i].state == PACK_FULL and self.buffers[i].pending == 0:
                    found = &self.buffers[i]
                    found.state = PACK_WRITING
                    break
            else:
                if self.closing:
                    break
                if self.spilling == 1 and self.unplaced == 0 and not self.failed:
                    self.spilling = 2
                    break
                pthread_cond_wait(&self.changed, &self.lock)
        pthread_mutex_unlock(&self.lock)
        return found

    def _run_writer(self):
        cdef pack_t *pack
        cdef bint failed
        while True:
            with nogil:
                pack = self._next_full()
            if pack != NULL:
                try:
                    if not self.failed:
                        self._write_pack(pack.number)
                except BaseException as reason:
                    self.fail(reason)
                with nogil:
                    pthread_mutex_lock(&self.lock)
                    pack.state = PACK_FREE
                    pthread_cond_broadcast(&self.changed)
                    pthread_mutex_unlock(&self.lock)
            elif self.closing:
                return
            else:
                try:
                    self._spill()
                except BaseException as reason:
                    self.fail(reason)
                with nogil:
                    pthread_mutex_lock(&self.lock)
                    self.spilling = 0
                    pthread_cond_broadcast(&self.changed)
                    pthread_mutex_unlock(&self.lock)

    def _write_pack(self, uint32_t number):
        cdef uint8_t pack_id[16]
        cdef pack_t *pack = NULL
        cdef int i
        for i in range(BUFFERS):
            if self.buffers[i].state == PACK_WRITING and self.buffers[i].number == number:
                pack = &self.buffers[i]
        self.pack_id(number, pack_id)
        tail = pack_tail(pack, self.keys + 64, pack_id)
        body = PyMemoryView_FromMemory(<char *>pack.data, pack.used, PyBUF_READ)
        try:
            self.put_pack(pack_id[:PACK_ID], [body, tail])
        finally:
            body.release()

    # ---- segments of the index

    # Nobody adds to the table meanwhile, and no entry waits for its place.
    def _spill(self):
        with nogil:
            pthread_mutex_lock(&self.lock)
            if self.open != NULL:
                self.open.state = PACK_FULL
                self.open = NULL
                pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.lock)
        parts, index_id = self._encode()
        file = IndexFile(self.spill_file(parts), self.seal_key, self.repository, index_id.hex(), index_id)
        self.segment_files.append(file)
        self.kept.append(self.segments)
        self.segments = IndexSet(self.segment_files, cache=self.index.cache)

    def _encode(self):
        packs = [self._pack_id(number) for number in range(self.first_pack, self.packs)]
        index_id = self.writer + len(self.segment_files).to_bytes(4, "little")
        parts = self.table.encode(self.seal_key, self.repository, index_id, packs, self.first_pack)
        self.first_pack = self.packs
        return parts, index_id

    def _pack_id(self, uint32_t number):
        cdef uint8_t pack_id[16]
        self.pack_id(number, pack_id)
        return pack_id[:PACK_ID]

    # ---- failure

    cdef void _set_failed(self, int failure) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        if not self.failed:
            self.failed = failure
        pthread_cond_broadcast(&self.changed)
        pthread_cond_broadcast(&self.done)
        pthread_mutex_unlock(&self.lock)

    def fail(self, reason):
        """Nothing can be stored any more; every thread that tries gets ``reason``."""
        if self.error is None:
            self.error = reason
        with nogil:
            self._set_failed(FAILURE)

    cdef int check(self) except -1 nogil:
        if self.failed:
            with gil:
                raise_copy(self.error)
        return 0

    # ---- reading back what is not published yet

    cdef int locate(
        self, const uint8_t *name, Entry *entry, uint8_t *pack_id, uint8_t *into, size_t capacity
    ) noexcept nogil:
        cdef Py_ssize_t which
        cdef int i
        cdef int result = 0
        cdef pack_t *pack
        if self.segments.length:
            which = self.segments.find(name, 0, entry)
            if which >= 0:
                memcpy(pack_id, self.segments.pack_id(which, entry.pack), PACK_ID)
                # the pack's number is the end of its id
                entry.pack = (pack_id[12] | <uint32_t>pack_id[13] << 8 | <uint32_t>pack_id[14] << 16
                              | <uint32_t>pack_id[15] << 24)
                result = 1
        pthread_mutex_lock(&self.lock)
        while not self.failed:
            if result == 0:
                if self.spilling == 2:
                    pthread_cond_wait(&self.changed, &self.lock)
                    continue
                if not self.table.find(name, entry):
                    break
                if entry.stored == 0:
                    self._watch()
                    continue
                result = 1
                self.pack_id(entry.pack, pack_id)
            pack = NULL
            for i in range(BUFFERS):
                if self.buffers[i].state != PACK_FREE and self.buffers[i].number == entry.pack:
                    pack = &self.buffers[i]
            if pack == NULL:
                break
            if pack.pending:
                self._watch()
                continue
            if entry.offset + <size_t>RECORD_HEADER + entry.stored <= pack.used \
                    and RECORD_HEADER + <size_t>entry.stored <= capacity:
                memcpy(into, pack.data + entry.offset, RECORD_HEADER + entry.stored)
                result = 2
            break
        pthread_mutex_unlock(&self.lock)
        return result

    # Waits until some record is complete. Called with the lock held.
    cdef void _watch(self) noexcept nogil:
        self.watchers = self.watchers + 1
        pthread_cond_wait(&self.changed, &self.lock)
        self.watchers = self.watchers - 1

    # ---- the end

    def finish(self):
        """Write what is left and end the threads. Every image must be finished.

        Returns the index files to publish: a list of (16 byte id, iterable of buffers).
        """
        cdef int i
        cdef bint busy
        with nogil:
            pthread_mutex_lock(&self.lock)
            if self.open != NULL:
                self.open.state = PACK_FULL
                self.open = NULL
                pthread_cond_broadcast(&self.changed)
            while not self.failed:
                busy = self.head != NULL or self.unplaced != 0 or self.spilling != 0
                for i in range(BUFFERS):
                    busy = busy or self.buffers[i].state != PACK_FREE
                if not busy:
                    break
                pthread_cond_wait(&self.changed, &self.lock)
            pthread_mutex_unlock(&self.lock)
        self.close()
        self.check()
        result = [(bytes.fromhex(file.label), file.parts()) for file in self.segment_files]
        if self.table.count:
            parts, index_id = self._encode()
            result.append((index_id, parts))
        return result

    def close(self):
        """End the threads, whatever is left to do. Safe to call twice."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.closing = True
            pthread_cond_broadcast(&self.work)
            pthread_cond_broadcast(&self.changed)
            pthread_cond_broadcast(&self.done)
            pthread_mutex_unlock(&self.lock)
        threads, self.threads = self.threads, []
        for thread in threads:
            thread.join()

    def pack_ids(self):
        """The ids of all packs begun so far, 16 bytes each."""
        return [self._pack_id(number) for number in range(self.packs)]

    def knows(self, bytes name not None):
        """Is this 32 byte name stored, published or not?"""
        cdef Entry entry
        cdef bint found
        cdef const uint8_t *start = <const uint8_t *><char *>name
        if len(name) != 32:
            raise ValueError(f"a name has 32 bytes, not {len(name)}")
        with nogil:
            found = self.index.find(start, 0, &entry) >= 0
            if not found:
                pthread_mutex_lock(&self.lock)
                found = self.segments.find(start, 0, &entry) >= 0 or self.table.find(start, &entry)
                pthread_mutex_unlock(&self.lock)
        return found


# 0, an errno, or -1 where the file ends before
cdef int _read_fully(int fd, uint8_t *into, size_t length, uint64_t offset) noexcept nogil:
    cdef ssize_t got
    while length:
        got = pread(fd, into, length, offset)
        if got == 0:
            return -1
        if got < 0:
            if errno == EINTR:
                continue
            return errno
        into += got
        offset += got
        length -= got
    return 0


def raise_copy(error):
    """Raise an error that another thread met: a copy, since an exception belongs to one traceback at a time."""
    if error is None:
        raise MemoryError("the repository's writer ran out of memory")
    if isinstance(error, Exception):
        raise type(error)(*error.args) from error
    raise RuntimeError(f"a thread of the repository's writer was ended by {error!r}") from error

