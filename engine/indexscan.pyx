# cython: cdivision=True
"""The entries of several index files in one order, by name and pack, each (name, pack) once.

Memory: 64 KiB a file, and 20 bytes for each pack in the tables; the files are read from front to end.
"""

import os

from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport pread

from vmbackupd.engine.blake3 cimport keyed_hash
from vmbackupd.engine.index cimport (
    INDEX_HEADER,
    INDEX_TAG,
    IndexFile,
    compare_entries,
    encode_header,
    place_of,
    plausible,
    seal_block,
    seal_of,
)
from vmbackupd.engine.layout cimport (
    BLOCK,
    BLOCK_ENTRIES,
    DIRECTORY_ENTRY,
    ENTRY,
    NAME,
    PACK_ID,
    Entry,
    decode_entry,
    load_u32,
    store_u32,
)

from vmbackupd.errors import RepositoryCorrupt, StorageError

cdef enum:
    READ_BLOCKS = 16        # blocks read at once
    KEY = 36                # bytes of an entry that sort it: name and pack
    WRITE_BLOCKS = 256      # blocks written at once: 1 MiB


cdef class EntryScan:
    """Entries of index files, merged. One thread at a time, once from front to end."""

    def __cinit__(self, files, keep=None):
        """``keep(pack_id)``: are the entries of this pack wanted? None: of all."""
        cdef IndexFile file
        cdef stream_t *stream
        cdef uint32_t number
        cdef size_t i
        self.files = tuple(files)
        self.packs = []
        self.streams = <stream_t *>calloc(len(self.files) + 1, sizeof(stream_t))
        self.heap = <size_t *>calloc(len(self.files) + 1, sizeof(size_t))
        if self.streams == NULL or self.heap == NULL:
            raise MemoryError
        table = {}
        for i, file in enumerate(self.files):
            self.length = i + 1
            stream = &self.streams[i]
            stream.index = &file.index
            stream.numbers = <uint32_t *>malloc((file.index.pack_count + <size_t>1) * sizeof(uint32_t))
            stream.room = <uint8_t *>malloc(READ_BLOCKS * BLOCK)
            if stream.numbers == NULL or stream.room == NULL:
                raise MemoryError
            for number in range(file.index.pack_count):
                pack_id = file.index.packs[number * PACK_ID:(number + 1) * PACK_ID]
                if keep is None or keep(pack_id):
                    stream.numbers[number] = table.setdefault(pack_id, len(table))
                else:
                    stream.numbers[number] = DROPPED
        self.packs = list(table)
        for i in range(self.length):
            self._advance(i)
            if self.streams[i].current != NULL:
                self.heap[self.alive] = i
                self.alive += 1
        for i in range(self.alive // 2, 0, -1):
            self._sink(i - 1)

    def __dealloc__(self):
        cdef size_t i
        if self.streams != NULL:
            for i in range(self.length):
                free(self.streams[i].numbers)
                free(self.streams[i].room)
        free(self.streams)
        free(self.heap)
        free(self.group)

    cdef const item_t *next(self) except? NULL nogil:
        if self.at == self.grouped:
            self._fill()
            if self.grouped == 0:
                return NULL
        self.at += 1
        return &self.group[self.at - 1]

    # The entries of the least name, in order of their packs.
    cdef int _fill(self) except -1 nogil:
        cdef uint8_t name[32]
        cdef size_t which, number, kept
        self.at = 0
        self.grouped = 0
        if self.alive == 0:
            return 0
        memcpy(name, self.streams[self.heap[0]].current, NAME)
        while self.alive and memcmp(self.streams[self.heap[0]].current, name, NAME) == 0:
            which = self.heap[0]
            self._keep(which)
            self._advance(which)
            if self.streams[which].current == NULL:
                self.alive -= 1
                self.heap[0] = self.heap[self.alive]
            self._sink(0)
        if self.grouped > 1:
            qsort(self.group, self.grouped, sizeof(item_t), compare_entries)
            kept = 1
            for number in range(1, self.grouped):
                if memcmp(self.group[number].wire, self.group[kept - 1].wire, KEY) != 0:
                    self.group[kept] = self.group[number]
                    kept += 1
            self.grouped = kept
        return 0

    # The current entry of a stream into the group.
    cdef int _keep(self, size_t which) except -1 nogil:
        cdef stream_t *stream = &self.streams[which]
        cdef item_t *grown
        cdef item_t *item
        if self.grouped == self.room:
            grown = <item_t *>realloc(self.group, (2 * self.room + 8) * sizeof(item_t))
            if grown == NULL:
                with gil:
                    raise MemoryError
            self.group = grown
            self.room = 2 * self.room + 8
        item = &self.group[self.grouped]
        memcpy(item.wire, stream.current, ENTRY)
        store_u32(item.wire + NAME, stream.numbers[load_u32(stream.current + NAME)])
        item.place = place_of(which, stream.next - 1)
        self.grouped += 1
        return 0

    # Moves a stream to its next entry that is wanted.
    cdef int _advance(self, size_t which) except -1 nogil:
        cdef stream_t *stream = &self.streams[which]
        cdef Entry entry
        while True:
            stream.current = NULL
            if stream.next == stream.index.entries:
                return 0
            if stream.next // BLOCK_ENTRIES >= stream.loaded:
                self._load(which)
            stream.current = (
                stream.room + (stream.next // BLOCK_ENTRIES - (stream.loaded - stream.held)) * BLOCK
                + (stream.next % BLOCK_ENTRIES) * ENTRY
            )
            decode_entry(stream.current, &entry)
            if (
                (stream.next and compare_entries(stream.current, stream.last) <= 0)
                or not plausible(&entry) or entry.pack >= stream.index.pack_count
            ):
                self._complain(which, stream.next // BLOCK_ENTRIES, False)
            memcpy(stream.last, stream.current, KEY)
            stream.next += 1
            if stream.numbers[entry.pack] != DROPPED:
                return 0

    cdef int _load(self, size_t which) except -1 nogil:
        cdef stream_t *stream = &self.streams[which]
        cdef uint64_t wanted = min(<uint64_t>READ_BLOCKS, stream.index.blocks - stream.loaded)
        cdef uint8_t tag[32]
        cdef uint64_t block
        cdef size_t done = 0
        cdef ssize_t got
        while done < wanted * BLOCK:
            got = pread(
                stream.index.fd, stream.room + done, wanted * BLOCK - done,
                INDEX_HEADER + stream.loaded * BLOCK + done
            )
            if got <= 0:
                self._complain(which, stream.loaded + done // BLOCK, True)
            done += got
        for block in range(wanted):
            keyed_hash(stream.index.key, stream.room + block * BLOCK, BLOCK, tag)
            if memcmp(tag, stream.index.tags + (stream.loaded + block) * INDEX_TAG, INDEX_TAG) != 0:
                self._complain(which, stream.loaded + block, False)
        stream.loaded += wanted
        stream.held = wanted
        return 0

    # Restores the heap's order below a place.
    cdef void _sink(self, size_t at) noexcept nogil:
        cdef size_t below
        cdef size_t moved = self.heap[at]
        while 2 * at + 1 < self.alive:
            below = 2 * at + 1
            if below + 1 < self.alive and memcmp(
                self.streams[self.heap[below + 1]].current, self.streams[self.heap[below]].current, NAME
            ) < 0:
                below += 1
            if memcmp(self.streams[moved].current, self.streams[self.heap[below]].current, NAME) <= 0:
                break
            self.heap[at] = self.heap[below]
            at = below
        self.heap[at] = moved

    cdef int _complain(self, size_t which, uint64_t block, bint unreadable) except -1 nogil:
        cdef int code = errno
        self.streams[which].index.damaged += 1
        with gil:
            label = self.files[which].label
            if unreadable and code:
                raise StorageError(f"index {label}: block {block}: {os.strerror(code)}")
            raise RepositoryCorrupt(f"index {label}: block {block} is damaged")


def merge_files(files, fd, *, bytes key not None, bytes repository not None, bytes index not None, keep=None,
                stop=None):
    """Write one index file with the entries of ``files`` to ``fd``, an empty file; (entries, ids of its packs).

    ``keep(pack_id)``: are the entries of this pack wanted? ``stop()`` is asked now and then; when it is true, None is
    returned. ``key`` is the seal key, ``repository`` and ``index`` are 16 byte ids. RepositoryCorrupt if a file is
    damaged (nothing is left out silently), StorageError.
    """
    cdef EntryScan scan = EntryScan(files, keep)
    cdef bytearray room = bytearray(WRITE_BLOCKS * BLOCK)
    cdef bytearray lines = bytearray(WRITE_BLOCKS * DIRECTORY_ENTRY)
    cdef uint8_t *out = <uint8_t *><char *>room
    cdef uint8_t *line = <uint8_t *><char *>lines
    cdef const uint8_t *secret = <const uint8_t *><char *>key
    cdef uint64_t count = 0
    cdef uint64_t blocks = 0
    cdef size_t made
    directory = bytearray()
    encode_header(0, key, repository, index, scan.packs)        # ids of the wrong length are found out first
    while True:
        with nogil:
            made = _fill_blocks(scan, secret, out, line, &count)
        if made == 0:
            break
        _write(fd, memoryview(room)[:made * BLOCK], INDEX_HEADER + blocks * BLOCK)
        directory += memoryview(lines)[:made * DIRECTORY_ENTRY]
        blocks += made
        if stop is not None and stop():
            return None
    header = encode_header(count, key, repository, index, scan.packs)
    tail = b"".join(scan.packs) + directory
    _write(fd, header, 0)
    _write(fd, tail + seal_of(key, header + tail), INDEX_HEADER + blocks * BLOCK)
    return count, scan.packs


# Up to WRITE_BLOCKS blocks and their lines of the directory; how many.
cdef size_t _fill_blocks(
    EntryScan scan, const uint8_t *key, uint8_t *out, uint8_t *lines, uint64_t *count
) except? 0 nogil:
    cdef const item_t *item
    cdef size_t made = 0
    cdef size_t entries
    while made < WRITE_BLOCKS:
        entries = 0
        memset(out + made * BLOCK, 0, BLOCK)
        while entries < BLOCK_ENTRIES:
            item = scan.next()
            if item == NULL:
                break
            memcpy(out + made * BLOCK + entries * ENTRY, item.wire, ENTRY)
            entries += 1
        if entries == 0:
            break
        seal_block(key, out + made * BLOCK, lines + made * DIRECTORY_ENTRY)
        count[0] += entries
        made += 1
    return made


def _write(fd, data, offset):
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(fd, view, offset)
            view = view[done:]
            offset += done
    except OSError as reason:
        raise StorageError(f"temporary file of an index that is being merged: {reason}") from reason
