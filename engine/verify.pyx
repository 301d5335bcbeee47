# cython: cdivision=True
"""Checking what is stored.

A PackVerifier reads packs from front to end, in pieces that stay in a processor's cache, and checks each record as a
reader would. A TreeChecker walks trees without reading chunks: a name is fine if a record of it lies in a pack that is
there and long enough, and, where packs are known to be damaged, if it can be read.
"""

import os
import threading

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport pread

from vmbackupd.engine.chunkreader cimport BAD_RECORD, FINE, NOT_INDEXED, PACK_MISSING, TRUNCATED, ChunkReader
from vmbackupd.engine.index cimport PLACE_BITS, IndexSet
from vmbackupd.engine.layout cimport (
    ENTRY,
    KIND_CHUNK,
    KIND_NODE,
    KIND_ROOT,
    MAX_DEPTH,
    NAME,
    PACK_HEADER,
    PACK_ID,
    RECORD_HEADER,
    Entry,
    decode_entry,
    is_zero_name,
)
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.sink cimport chunk_length
from vmbackupd.engine.threads cimport (
    cond_init_monotonic,
    cond_wait_ms,
    pthread_cond_destroy,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from vmbackupd.engine.tree cimport TreeReader, node_decode, node_width, tree_name

from vmbackupd.engine import pack as packs
from vmbackupd.engine.chunkreader import REASONS
from vmbackupd.errors import Cancelled, RepositoryCorrupt, StorageError

cdef extern from *:
    uint64_t __atomic_fetch_add(uint64_t *, uint64_t, int) nogil

cdef enum:
    WINDOW = 1 << 20         # bytes of a pack that are read at once
    PAUSE_MS = 100           # longest wait before the cancel flag is looked at again
    REMOTE_THREADS = 8       # packs in flight where reading costs a round trip

# how it stands with a pack
cdef enum:
    PACK_ABSENT = 1
    PACK_SUSPECT = 2
    PACK_USED = 4


# ---- packs

# what came of reading a part of a pack
cdef enum:
    WHOLE = 1
    ENDED = 0                # the pack is shorter
    BAD_SECTOR = 2           # its storage works, but not there


cdef class PackWorker:
    def __cinit__(self, ChunkReader reader not None):
        self.fd = -1
        self.codec = reader.codec()
        self.capacity = WINDOW + 2 * reader.largest + RECORD_HEADER
        self.window = <uint8_t *>malloc(self.capacity)
        self.content = <uint8_t *>malloc(reader.largest)
        if self.window == NULL or self.content == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.window)
        free(self.content)


cdef class PackVerifier:
    def __cinit__(self, ChunkReader reader not None, object storage not None, *, bytes seal_key not None,
                  bytes repository not None, Progress progress not None, double rate=0, int workers=0):
        pthread_mutex_init(&self.lock, NULL)
        cond_init_monotonic(&self.never)
        self.reader = reader
        self.storage = storage
        self.seal_key = seal_key
        self.repository = repository
        self.progress = progress
        self.rate = rate
        self.workers = workers
        self.guard = threading.Lock()

    def __dealloc__(self):
        pthread_cond_destroy(&self.never)
        pthread_mutex_destroy(&self.lock)

    def run(self, packs, sink):
        self.packs = iter(packs)
        self.sink = sink
        self.error = None
        self.free_at = _now()
        count = self.workers or min(len(os.sched_getaffinity(0)), 8)
        if self.reader.remote:
            count = max(count, REMOTE_THREADS)
        threads = [
            threading.Thread(target=self._run, args=(PackWorker(self.reader),), name=f"vmbackup-verify-{n}", daemon=True)
            for n in range(count)
        ]
        started = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
        except BaseException as reason:
            self._stop(reason)
        for thread in started:
            thread.join()
        if self.error is not None:
            raise self.error

    def _run(self, PackWorker worker not None):
        try:
            while True:
                pack = self._next()
                if pack is None:
                    return
                found = self._pack(worker, *pack)
                with self.guard:
                    if self.error is None:
                        self.sink(pack[0], pack[1], *found)
        except BaseException as reason:
            self._stop(reason)

    def _next(self):
        with self.guard:
            return None if self.error is not None else next(self.packs, None)

    def _stop(self, reason):
        with self.guard:
            if self.error is None:
                self.error = reason

    def _pack(self, PackWorker worker, bytes pack_id not None, uint64_t size):
        """(reason or None, number of records, (name, offset) of the bad ones)."""
        label = f"pack {pack_id.hex()}"
        memcpy(worker.pack_id, <char *>pack_id, PACK_ID)
        worker.length = 0
        worker.counted = 0
        try:
            fd = self.storage.open_pack(pack_id)
            worker.fd = -1 if fd is None else fd
            if fd is None:
                self.reader.remote = True
            return self._records(worker, pack_id, size, label)
        except FileNotFoundError:
            return "missing", 0, []
        except RepositoryCorrupt as reason:
            return str(reason), 0, []
        finally:
            # header, own index, trailer, and whatever could not be looked at
            __atomic_fetch_add(&self.progress.bytes_done, size - worker.counted, 0)
            if worker.fd >= 0:
                os.close(worker.fd)
                worker.fd = -1

    def _records(self, PackWorker worker, bytes pack_id, uint64_t size, str label):
        cdef uint64_t end
        cdef uint32_t count, number
        cdef bytes entries
        cdef bytearray bad
        cdef uint8_t *marks
        cdef const uint8_t *first
        cdef Entry entry
        if size < packs.HEADER + packs.TRAILER:
            raise RepositoryCorrupt(f"{label} is truncated: it has {size} bytes")
        header = self._bytes(worker, 0, packs.HEADER)
        packs.check_header(header, self.repository, pack_id, label, encrypted=self.reader.encrypted)
        trailer = self._bytes(worker, size - packs.TRAILER, packs.TRAILER)
        end, count = packs.parse_trailer(trailer, size, pack_id, label)
        entries = packs.check_tail(self._bytes(worker, end, size - end), self.seal_key, label)
        bad = bytearray(count + 1)
        marks = <uint8_t *><char *>bad
        first = <const uint8_t *><char *>entries
        with nogil:
            self._check(worker, first, count, end, marks)
        found = []
        for number in range(count):
            if bad[number]:
                decode_entry(first + number * <size_t>ENTRY, &entry)
                found.append((entries[number * ENTRY : number * ENTRY + NAME], entry.offset))
        reason = f"{label}: {len(found)} of its {count} records are damaged" if found else None
        return reason, count, found

    def _bytes(self, PackWorker worker, uint64_t start, size_t length):
        cdef bytearray out = bytearray(length)
        cdef uint8_t *into = <uint8_t *><char *>out
        cdef int came
        with nogil:
            came = self._read(worker, start, into, length)
        if came != WHOLE:
            what = "is truncated" if came == ENDED else f"cannot be read at {start}: {os.strerror(EIO)}"
            raise RepositoryCorrupt(f"pack {worker.pack_id[:PACK_ID].hex()} {what}")
        return bytes(out)

    # Marks the damaged ones of a pack's records, which end at `end`.
    cdef int _check(self, PackWorker worker, const uint8_t *entries, uint32_t count, uint64_t end, uint8_t *bad) except -1 nogil:
        cdef uint32_t number
        cdef uint64_t reached = PACK_HEADER
        cdef size_t length
        cdef const uint8_t *name
        cdef Entry entry
        cdef int here
        for number in range(count):
            name = entries + number * <size_t>ENTRY
            decode_entry(name, &entry)
            length = RECORD_HEADER + <size_t>entry.stored
            if (
                entry.offset < reached or entry.offset + <uint64_t>length > end or length > worker.capacity
                or not KIND_CHUNK <= entry.kind <= KIND_ROOT or entry.raw > self.reader.largest
            ):
                bad[number] = 1
                continue
            reached = entry.offset + <uint64_t>length
            worker.counted += length
            __atomic_fetch_add(&self.progress.bytes_done, length, 0)
            here = 1
            if entry.offset < worker.start or reached > worker.start + worker.length:
                here = self._window(worker, entry.offset, <size_t>min(<uint64_t>worker.capacity, end - entry.offset))
                if not here:
                    here = self._window(worker, entry.offset, length)       # as much as can be read at all
            if not here or self.reader.open_record(
                worker.codec, worker.pack_id, worker.window + (entry.offset - worker.start), name, entry.kind, &entry,
                worker.content, self.reader.largest
            ) != FINE:
                bad[number] = 1
        return 0

    # Reads a part of the pack; 0 if it cannot be read.
    cdef int _window(self, PackWorker worker, uint64_t start, size_t length) except -1 nogil:
        worker.start = start
        worker.length = 0
        if self._read(worker, start, worker.window, length) != WHOLE:
            return 0
        worker.length = length
        return 1

    # WHOLE, ENDED or BAD_SECTOR. StorageError, FileNotFoundError, Cancelled.
    cdef int _read(self, PackWorker worker, uint64_t start, uint8_t *into, size_t length) except -1 nogil:
        cdef size_t done = 0
        cdef ssize_t got
        self._pause(length)
        if worker.fd < 0:
            with gil:
                data = self.storage.read_pack(worker.pack_id[:PACK_ID], start, length)
                if len(data) != length:
                    return ENDED
                memcpy(into, <const char *>(<bytes>data), length)
        while worker.fd >= 0 and done < length:
            got = pread(worker.fd, into + done, length - done, start + done)
            if got < 0 and errno == EINTR:
                continue
            if got < 0 and errno == EIO:
                return BAD_SECTOR
            if got < 0:
                with gil:
                    raise StorageError(f"pack {worker.pack_id[:PACK_ID].hex()}: {os.strerror(errno)}")
            if got == 0:
                return ENDED
            done += got
        __atomic_fetch_add(&self.progress.bytes_read, length, 0)
        return WHOLE

    # Waits until so many bytes may be read, and raises Cancelled.
    cdef int _pause(self, size_t length) except -1 nogil:
        cdef double left = 0
        if self.rate > 0:
            pthread_mutex_lock(&self.lock)
            left = _now()
            if self.free_at < left:
                self.free_at = left
            left = self.free_at
            self.free_at = self.free_at + length / self.rate
            pthread_mutex_unlock(&self.lock)
        while True:
            if self.progress.cancel_flag or self.error is not None:
                with gil:
                    raise Cancelled("verify was cancelled")
            if self.rate <= 0 or left - _now() <= 0:
                return 0
            pthread_mutex_lock(&self.lock)
            cond_wait_ms(&self.never, &self.lock, <uint32_t>max(1.0, min(<double>PAUSE_MS, (left - _now()) * 1000)))
            pthread_mutex_unlock(&self.lock)


cdef double _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return now.tv_sec + now.tv_nsec / 1e9


# ---- trees

cdef class TreeChecker:
    def __cinit__(self, ChunkReader reader not None, IndexSet index not None, packs not None, *, suspect=(),
                  Progress progress=None, bint counts=True):
        cdef size_t which, number
        self.reader = reader
        self.codec = reader.codec()
        self.index = index
        self.progress = progress if progress is not None else Progress()
        self.counts = counts
        self.sound = set()
        self.files = len(index.files)
        self.states = <uint8_t **>calloc(self.files + 1, sizeof(uint8_t *))
        self.sizes = <uint64_t **>calloc(self.files + 1, sizeof(uint64_t *))
        self.room = <uint8_t *>malloc(reader.largest)
        if self.states == NULL or self.sizes == NULL or self.room == NULL:
            raise MemoryError
        suspect = frozenset(suspect)
        for which in range(self.files):
            ids = index.files[which].pack_ids()
            self.states[which] = <uint8_t *>calloc(len(ids) + 1, 1)
            self.sizes[which] = <uint64_t *>calloc(len(ids) + 1, sizeof(uint64_t))
            if self.states[which] == NULL or self.sizes[which] == NULL:
                raise MemoryError
            for number, pack_id in enumerate(ids):
                self.sizes[which][number] = packs.get(pack_id, 0)
                self.states[which][number] = (
                    PACK_ABSENT if pack_id not in packs else PACK_SUSPECT if pack_id in suspect else 0
                )

    def __dealloc__(self):
        cdef size_t which
        cdef int level
        if self.states != NULL and self.sizes != NULL:
            for which in range(self.files):
                free(self.states[which])
                free(self.sizes[which])
        free(self.states)
        free(self.sizes)
        free(self.room)
        for level in range(MAX_DEPTH):
            free(self.levels[level].names)

    def used(self):
        cdef size_t which
        found = set()
        for which in range(self.files):
            for number, pack_id in enumerate(self.index.files[which].pack_ids()):
                if self.states[which][<size_t>number] & PACK_USED:
                    found.add(pack_id)
        return found

    def check(self, str tree not None):
        cdef TreeReader reader
        cdef uint8_t pack_id[16]
        cdef bytes name = tree_name(tree)
        cdef const uint8_t *root = <const uint8_t *><char *>name
        cdef uint32_t length = 0
        cdef int level, problem
        with nogil:
            problem = self._find(root, KIND_ROOT, 0, pack_id)
            if problem == FINE:
                problem = self.reader._attempt(
                    self.codec, root, KIND_ROOT, self.room, self.reader.largest, &length, pack_id
                )
        if problem != FINE:
            return 0, [(0, 0, REASONS[problem], name, b"" if problem == NOT_INDEXED else pack_id[:PACK_ID])]
        reader = TreeReader(self.reader, tree)
        self.shape = reader.shape
        self.damage = []
        for level in range(self.shape.depth):
            free(self.levels[level].names)
            self.levels[level].names = <uint8_t *>malloc(self.shape.fanout * <size_t>NAME)
            if self.levels[level].names == NULL:
                raise MemoryError
        with nogil:
            self._node(self.shape.depth - 1, 0, reader.top)
        damage, self.damage = self.damage, None
        return self.shape.size, damage

    # A node and what is below it.
    cdef int _node(self, int level, uint64_t index, const uint8_t *name) except -1 nogil:
        cdef uint8_t own[32]
        cdef uint8_t pack_id[16]
        cdef uint32_t length = 0
        cdef int problem
        cdef size_t before
        cdef bint known
        if self.progress.cancel_flag:
            with gil:
                raise Cancelled("verify was cancelled")
        if is_zero_name(name):
            return self._skip(level, index)
        memcpy(own, name, NAME)
        with gil:
            known = own[:NAME] in self.sound
            before = len(self.damage)
        if known:
            return self._skip(level, index)
        problem = self._find(own, KIND_NODE, 0, pack_id)
        if problem == FINE:
            problem = self.reader._attempt(self.codec, own, KIND_NODE, self.room, self.reader.largest, &length, pack_id)
        if problem != FINE:
            return self._tell(level, index, problem, own, pack_id)
        if not node_decode(
            self.room, length, level, self.levels[level].names, node_width(&self.shape, level, index)
        ):
            with gil:
                raise RepositoryCorrupt(f"chunk {own[:NAME].hex()} is no node of the tree that names it")
        self.nodes += 1
        self._below(level, index, self.levels[level].names)
        with gil:
            if len(self.damage) == before:
                self.sound.add(own[:NAME])
        return 0

    cdef int _below(self, int level, uint64_t index, const uint8_t *names) except -1 nogil:
        cdef uint32_t width = node_width(&self.shape, level, index), number
        cdef uint64_t first = index * self.shape.fanout
        cdef uint8_t pack_id[16]
        cdef const uint8_t *name
        cdef int problem
        for number in range(width):
            name = names + number * <size_t>NAME
            if level:
                self._node(level - 1, first + number, name)
                continue
            if not is_zero_name(name):
                self.chunks += 1
                problem = self._find(
                    name, KIND_CHUNK, <uint32_t>chunk_length(self.shape.size, self.shape.chunk_size, first + number),
                    pack_id
                )
                if problem != FINE:
                    self._tell(-1, first + number, problem, name, pack_id)
        if level == 0:
            self._skip(0, index)
        return 0

    # Is there a record of this name that can be trusted? FINE, or why not. `raw`: bytes it must have, 0 if unknown.
    cdef int _find(self, const uint8_t *name, int kind, uint32_t raw, uint8_t *pack_id) except -1 nogil:
        cdef Entry entry
        cdef Py_ssize_t place = -1
        cdef size_t which
        cdef uint8_t *suspect = NULL
        cdef uint32_t length = 0
        cdef uint8_t state
        cdef int problem = NOT_INDEXED
        memset(pack_id, 0, PACK_ID)
        while True:
            place = self.index.locate(name, <size_t>(place + 1), &entry, pack_id)
            if place < 0:
                break
            which = <size_t>place >> PLACE_BITS
            state = self.states[which][entry.pack]
            if state & PACK_ABSENT:
                problem = PACK_MISSING
            elif entry.offset + <uint64_t>entry.stored + RECORD_HEADER > self.sizes[which][entry.pack]:
                problem = TRUNCATED
            elif entry.kind != kind or (raw and entry.raw != raw):
                problem = BAD_RECORD
            elif state & PACK_SUSPECT:
                suspect = &self.states[which][entry.pack]
            else:
                self.states[which][entry.pack] |= PACK_USED
                return FINE
        if suspect != NULL:
            suspect[0] |= PACK_USED
            return self.reader._attempt(self.codec, name, kind, self.room, self.reader.largest, &length, pack_id)
        return problem

    # Notes what is below a node (a chunk: level -1) as damaged.
    cdef int _tell(self, int level, uint64_t index, int problem, const uint8_t *name, const uint8_t *pack_id) except -1 nogil:
        cdef uint64_t span = self.shape.spans[level] if level >= 0 else 1
        cdef uint64_t start = index * span * self.shape.chunk_size
        cdef uint64_t end = min((index + 1) * span * self.shape.chunk_size, self.shape.size)
        with gil:
            self.damage.append(
                (start, end - start, REASONS[problem], name[:NAME], b"" if problem == NOT_INDEXED else pack_id[:PACK_ID])
            )
        if level >= 0:
            self._skip(level, index)
        return 0

    # Counts what is below a node as looked at.
    cdef int _skip(self, int level, uint64_t index) except -1 nogil:
        cdef uint64_t span = self.shape.spans[level] * self.shape.chunk_size
        cdef uint64_t start = index * span
        if self.counts and start < self.shape.size:
            self.progress.bytes_done = self.progress.bytes_done + min(span, self.shape.size - start)
        return 0
