"""Revert: the T1 image of a disk out of its T2 image and the COW stores that were captured with it.

For each exception (old, new) of a volume's store, chunk ``old`` of the volume read at T1 what chunk ``new`` of the store
holds now. The volume map says where on which disk a volume's bytes lie, so the host needs no LVM and mounts nothing.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy
from vmbackupd.engine.cowstore cimport CowStore
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.readable cimport ReadableSource
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource, chunk_count, chunk_length
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.engine.nbdimage import NbdSink, NbdSource
from vmbackupd.errors import Cancelled, StoreCorrupt

# a cimported name is no attribute of the module; callers of this one want it
globals()["ReadableSource"] = ReadableSource


# ---- the plan

cdef struct _Segment:
    uint64_t volume_offset
    uint64_t length
    uint64_t disk_offset
    bint ours                   # on the disk of the plan


cdef int _by_disk(const void *left, const void *right) noexcept nogil:
    cdef uint64_t a = (<const Piece *>left).disk_offset, b = (<const Piece *>right).disk_offset
    return (a > b) - (a < b)


cdef class RevertPlan:
    def __init__(self, disk_size):
        if not 0 <= disk_size < 1 << 63:
            raise ValueError(f"disk of {disk_size} bytes")
        self.disk_size = disk_size
        self.volumes = []

    def __dealloc__(self):
        free(self.pieces)

    cdef int _add(self, const Piece *piece) except -1:
        cdef Piece *more
        cdef size_t room
        if self.piece_count == self.room:
            room = self.room * 2 if self.room else 256
            more = <Piece *>realloc(self.pieces, room * sizeof(Piece))
            if more == NULL:
                raise MemoryError()
            self.pieces = more
            self.room = room
        self.pieces[self.piece_count] = piece[0]
        self.piece_count += 1
        return 0

    def add_volume(self, volume, str disk not None, CowStore store not None):
        """See revert.pyi."""
        cdef _Segment *segments = NULL
        cdef size_t count = len(volume.segments), low, high, middle
        cdef uint64_t i, start, end, part
        cdef Piece piece
        cdef bint touched
        if self.finished:
            raise ValueError("the plan is finished")
        _check_map(volume, disk, self.disk_size, store)
        piece.volume = len(self.volumes)
        self.volumes.append(volume.name)
        store.parse()
        segments = <_Segment *>malloc((count if count else 1) * sizeof(_Segment))
        if segments == NULL:
            raise MemoryError()
        try:
            for i, segment in enumerate(volume.segments):
                segments[i].volume_offset = segment.volume_offset
                segments[i].length = segment.length
                segments[i].ours = segment.disk == disk
                segments[i].disk_offset = segment.disk_offset if segments[i].ours else 0
            for i in range(store.found):
                start = store.olds[i] * store.chunk_size
                # the tail of the last chunk's copy is undefined: clip
                end = min(start + store.chunk_size, store.origin_size)
                piece.store_offset = <uint64_t>volume.store_offset + store.new_of(i) * store.chunk_size
                low, high = 0, count
                while high - low > 1:           # the last segment that begins at or before start
                    middle = (low + high) // 2
                    if segments[middle].volume_offset <= start:
                        low = middle
                    else:
                        high = middle
                touched = False
                while start < end:
                    part = min(end, segments[low].volume_offset + segments[low].length) - start
                    if segments[low].ours:
                        piece.disk_offset = segments[low].disk_offset + (start - segments[low].volume_offset)
                        piece.length = part
                        self._add(&piece)
                        touched = True
                    start += part
                    piece.store_offset += part
                    low += 1
                self.exceptions += touched
        finally:
            free(segments)
        self.store_end = max(self.store_end, <uint64_t>(volume.store_offset + volume.store_length))

    def finish(self):
        cdef size_t i
        cdef Piece *before
        cdef Piece *piece
        if self.finished:
            return
        if self.piece_count > 1:
            with nogil:
                qsort(self.pieces, self.piece_count, sizeof(Piece), _by_disk)
        for i in range(1, self.piece_count):
            before = &self.pieces[i - 1]
            piece = &self.pieces[i]
            if before.disk_offset + before.length > piece.disk_offset:
                raise StoreCorrupt(
                    f"revert: volumes {self.volumes[before.volume]!r} and {self.volumes[piece.volume]!r} both claim byte "
                    f"{piece.disk_offset} of the disk")
        self.finished = True

    cdef int _ready(self) except -1:
        if not self.finished:
            raise ValueError("the plan is not finished")
        return 0

    cdef size_t find(self, uint64_t offset) noexcept nogil:
        cdef size_t low = 0, high = self.piece_count, middle
        while low < high:
            middle = (low + high) // 2
            if self.pieces[middle].disk_offset + self.pieces[middle].length <= offset:
                low = middle + 1
            else:
                high = middle
        return low

    @property
    def count(self):
        return self.exceptions

    @property
    def piece_bytes(self):
        cdef size_t i
        cdef uint64_t total = 0
        for i in range(self.piece_count):
            total += self.pieces[i].length
        return total

    def __len__(self):
        return self.piece_count

    def pieces_list(self):
        cdef size_t i
        self._ready()
        return [(self.pieces[i].disk_offset, self.pieces[i].store_offset, self.pieces[i].length)
                for i in range(self.piece_count)]

    def chunks(self, uint64_t chunk_size):
        cdef size_t i = 0
        cdef uint64_t first, end, next_chunk = 0
        if chunk_size == 0:
            raise ValueError("chunk size 0")
        self._ready()
        while i < self.piece_count:
            first = max(next_chunk, self.pieces[i].disk_offset // chunk_size)
            end = (self.pieces[i].disk_offset + self.pieces[i].length - 1) // chunk_size + 1
            i += 1
            while first < end:
                yield first
                first += 1
                next_chunk = first


def _check_map(volume, disk, disk_size, CowStore store):
    """The map came from the guest: its segments are adjacent, cover the volume, and lie inside the disk."""
    name = volume.name
    if volume.size != store.origin_size or volume.store_length != store.length:
        raise StoreCorrupt(
            f"revert: volume {name!r} has {volume.size} bytes and a store of {volume.store_length}, "
            f"the store was read for {store.origin_size} and {store.length}")
    if not 0 <= volume.store_offset < 1 << 62:
        raise StoreCorrupt(f"revert: the store of volume {name!r} is said to begin at byte {volume.store_offset}")
    at = 0
    for segment in volume.segments:
        if segment.volume_offset != at or segment.length <= 0 or segment.disk_offset < 0:
            raise StoreCorrupt(f"revert: the map of volume {name!r} has a gap, overlap or nonsense at byte {at}")
        at += segment.length
        if segment.disk == disk and segment.disk_offset + segment.length > disk_size:
            raise StoreCorrupt(
                f"revert: the map of volume {name!r} reaches to byte {segment.disk_offset + segment.length} "
                f"of a disk of {disk_size}")
    if at != volume.size:
        raise StoreCorrupt(f"revert: the map of volume {name!r} covers {at} of {volume.size} bytes")


# ---- one buffer

def patch(RevertPlan plan not None, offset, uint8_t[::1] buffer not None, read_store):
    cdef uint64_t start = offset, end = start + <uint64_t>buffer.shape[0], first, last
    cdef size_t i
    cdef bytes data
    cdef int count = 0
    plan._ready()
    if start == end:
        return 0
    i = plan.find(start)
    while i < plan.piece_count and plan.pieces[i].disk_offset < end:
        first = max(start, plan.pieces[i].disk_offset)
        last = min(end, plan.pieces[i].disk_offset + plan.pieces[i].length)
        data = bytes(read_store(plan.pieces[i].store_offset + (first - plan.pieces[i].disk_offset), last - first))
        if <uint64_t>len(data) != last - first:
            raise StoreCorrupt(f"revert: the store gave {len(data)} bytes instead of {last - first}")
        memcpy(&buffer[first - start], <const uint8_t *>data, last - first)
        count += 1
        i += 1
    return count


# ---- a whole image

cdef class _Revert:
    """What revert_image and RevertedSource work with."""

    cdef RevertPlan plan
    cdef ChunkSource image
    cdef ReadableSource store
    cdef ChunkSink sink
    cdef uint8_t *buffer
    cdef uint64_t patched

    def __cinit__(self, RevertPlan plan, ChunkSource image, ChunkSource store, ChunkSink sink):
        self.plan = plan
        self.image = image
        self.store = ReadableSource(store)
        self.sink = sink
        self.buffer = <uint8_t *>malloc(image.chunk_size)
        if self.buffer == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.buffer)

    cdef int run(self, const int *cancel_flag) except -1 nogil:
        cdef size_t i = 0
        cdef uint64_t chunk_size = self.image.chunk_size, index, next_chunk = 0, last
        while i < self.plan.piece_count:
            index = self.plan.pieces[i].disk_offset // chunk_size
            if index < next_chunk:
                index = next_chunk
            last = (self.plan.pieces[i].disk_offset + self.plan.pieces[i].length - 1) // chunk_size
            if index > last:
                i += 1
                continue
            if cancel_flag != NULL and cancel_flag[0] != 0:
                with gil:
                    raise Cancelled("revert: cancelled")
            self.chunk(index, i)
            next_chunk = index + 1
        return 0

    cdef int chunk(self, uint64_t index, size_t i) except -1 nogil:
        """Chunk ``index``, whose first piece is ``i``."""
        cdef size_t length = chunk_length(self.image.size, self.image.chunk_size, index)
        cdef uint64_t start = index * self.image.chunk_size, end = start + length
        if not self.covered(start, end, i):
            self.image.get(index, self.buffer, length)
        while i < self.plan.piece_count and self.plan.pieces[i].disk_offset < end:
            self.piece(&self.plan.pieces[i], self.buffer, start, end)
            i += 1
        if is_zero(self.buffer, length):
            self.sink.put_zero(index, 1)
        else:
            self.sink.put(index, self.buffer, length)
        self.patched += 1
        return 0

    cdef bint covered(self, uint64_t start, uint64_t end, size_t i) noexcept nogil:
        """Whether pieces from ``i`` on replace all of [start, end): then there is nothing to read."""
        while start < end and i < self.plan.piece_count and self.plan.pieces[i].disk_offset <= start:
            start = self.plan.pieces[i].disk_offset + self.plan.pieces[i].length
            i += 1
        return start >= end

    cdef int piece(self, const Piece *piece, uint8_t *into, uint64_t start, uint64_t end) except -1 nogil:
        """The part of a piece that lies in [start, end), which is what ``into`` holds."""
        cdef uint64_t first = piece.disk_offset, last = piece.disk_offset + piece.length
        if first < start:
            first = start
        if last > end:
            last = end
        return self.store.read_into(into + (first - start), last - first,
                                    piece.store_offset + (first - piece.disk_offset))


def revert_image(RevertPlan plan not None, ChunkSource image not None, ChunkSource store not None,
                 ChunkSink sink not None, Progress progress=None):
    cdef _Revert work
    cdef const int *cancel_flag = NULL
    plan._ready()
    if image.chunk_size == 0 or image.chunk_size != sink.chunk_size or image.size != sink.size:
        raise ValueError(
            f"image of {image.size} bytes in chunks of {image.chunk_size}, sink of {sink.size} in {sink.chunk_size}")
    if image.size < plan.disk_size:
        raise ValueError(f"image of {image.size} bytes for a plan of {plan.disk_size}")
    if plan.store_end > store.size:
        raise StoreCorrupt(f"revert: the stores reach to byte {plan.store_end} of a scratch disk of {store.size}")
    if progress is not None:
        cancel_flag = &progress.cancel_flag
    work = _Revert(plan, image, store, sink)
    with nogil:
        work.run(cancel_flag)
    return work.patched


# ---- while it is read

cdef class RevertedSource(ChunkSource):
    cdef ChunkSource image
    cdef RevertPlan plan
    cdef _Revert work

    def __init__(self, RevertPlan plan not None, ChunkSource image not None, ChunkSource store not None):
        plan._ready()
        if image.size < plan.disk_size:
            raise ValueError(f"image of {image.size} bytes for a plan of {plan.disk_size}")
        if plan.store_end > store.size:
            raise StoreCorrupt(
                f"revert: the stores reach to byte {plan.store_end} of a scratch disk of {store.size}")
        self.size = image.size
        self.chunk_size = image.chunk_size
        self.plan = plan
        self.image = image
        self.work = _Revert(plan, image, store, None)

    cdef int get(self, uint64_t index, uint8_t *into, size_t length) except -1 nogil:
        cdef uint64_t start = index * self.chunk_size, end = start + length
        cdef size_t i = self.plan.find(start)
        if length == 0 or length != chunk_length(self.size, self.chunk_size, index):
            with gil:
                raise IndexError(f"chunk {index} of {length} bytes")
        if not self.work.covered(start, end, i):
            self.image.get(index, into, length)
        while i < self.plan.piece_count and self.plan.pieces[i].disk_offset < end:
            self.work.piece(&self.plan.pieces[i], into, start, end)
            i += 1
        return 0

    cdef int next_data(self, uint64_t index, uint64_t *first, uint64_t *count) except -1 nogil:
        """What comes first: a run of the image or of chunks that a piece touches."""
        cdef size_t i = self.plan.find(index * self.chunk_size)
        cdef uint64_t start, end
        self.image.next_data(index, first, count)
        if i == self.plan.piece_count:
            return 0
        start = max(index, self.plan.pieces[i].disk_offset // self.chunk_size)
        end = (self.plan.pieces[i].disk_offset + self.plan.pieces[i].length - 1) // self.chunk_size + 1
        if count[0] == 0 or start < first[0]:
            if count[0] > 0 and end > first[0]:
                end = first[0]
            first[0] = start
            count[0] = end - start
        return 0
