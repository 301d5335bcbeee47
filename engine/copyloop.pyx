"""The copy loops: an NBD export into a sink, a source onto an NBD export.

One thread, no GIL: it keeps requests in flight over the connection and, while they are under way, hands finished chunks
to the sink (or takes the next ones from the source). Memory is the ring of buffers, whatever the size of the image.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from vmbackupd.engine.blockstatus cimport BlockStatus
from vmbackupd.engine.bitmap cimport Bitmap
from vmbackupd.engine.buffers cimport AlignedBuffer
from vmbackupd.engine.image cimport ImageSource
from vmbackupd.engine.nbd cimport POLL_MS, STATUS_LIMIT, ZERO_LIMIT, NbdConnection
from vmbackupd.engine.nbdimage cimport NbdSource
from vmbackupd.engine.pipeline cimport Pipeline, Slot
from vmbackupd.engine.prefetch cimport CHUNK_READ, CHUNK_SAME, CHUNK_ZERO, ReadPool, batch_t, want_t
from vmbackupd.engine.progress cimport Progress
from vmbackupd.engine.sink cimport ChunkSink, ChunkSource, chunk_count, chunk_length
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import Cancelled, SourceError, TargetRefused

# a cimported name is no attribute of the module; callers of this one want it
globals()["Progress"] = Progress

cdef enum:
    MAP_ROOM = 32768                # extents kept of one block status answer: 512 KiB
    REQUEST_MAX = 4 << 20           # bytes of one buffer
    MEMORY_MAX = 64 << 20           # bytes of all buffers
    WORTH_ASKING = 4 << 20          # bytes; whether less than that is zero is found out sooner by reading it


# ---- what is asked for by both

cdef size_t _buffer_size(NbdConnection connection, uint32_t chunk_size, request) except 0:
    """Bytes of one buffer: whole chunks, as near to ``request`` as the limits allow."""
    if chunk_size == 0 or chunk_size > REQUEST_MAX or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk size {chunk_size} is not a power of two up to {REQUEST_MAX}")
    if chunk_size % connection.min_block:
        raise SourceError(
            f"NBD export {connection.export!r}: its blocks of {connection.min_block} bytes are larger than our chunks "
            f"of {chunk_size}")
    limit = min(REQUEST_MAX, max(request, chunk_size), max(connection.max_request, chunk_size))
    return limit // chunk_size * chunk_size


cdef uint32_t _buffers(size_t buffer_size, in_flight) except 0:
    if in_flight < 1:
        raise ValueError(f"in_flight {in_flight} is not at least 1")
    return max(1, min(in_flight, <size_t>MEMORY_MAX // buffer_size))


# ---- in

cdef class _CopyIn:
    """The state of one copy_in: what is known of the export, which chunks are decided, what is in flight.

    It goes on in windows: the runs of ``only``, or one that is the whole image.
    """

    cdef NbdConnection source
    cdef ChunkSink sink
    cdef Progress progress
    cdef Pipeline ring
    cdef Bitmap only                # or None
    cdef uint64_t size
    cdef uint64_t chunk
    cdef uint64_t chunks
    cdef uint64_t end               # the chunk behind the window
    cdef uint64_t stop              # and the byte
    cdef BlockStatus map
    cdef uint32_t extent            # next one of the map to use
    cdef bint ask                   # block status is of use
    cdef bint asked                 # and under way
    cdef uint64_t known             # up to this byte of the window extents were used
    cdef uint64_t decided           # up to this chunk they are zero (and in the sink) or to be read
    cdef uint64_t read_first        # chunks to be read and not yet asked for
    cdef uint64_t read_end

    def __cinit__(self, NbdConnection source, ChunkSink sink, Progress progress, Pipeline ring, Bitmap only):
        self.source = source
        self.sink = sink
        self.progress = progress
        self.ring = ring
        self.only = only
        self.size = sink.size
        self.chunk = sink.chunk_size
        self.chunks = chunk_count(sink.size, sink.chunk_size)
        self.ask = source.can_block_status
        self.map = BlockStatus(source, MAP_ROOM)
        self.window()

    cdef void window(self) noexcept nogil:
        """Goes on to the next one; there is none if it is empty."""
        cdef uint64_t first = self.end
        self.end = self.chunks
        if self.only is not None:
            first = self.only.next_set(first)
            self.end = self.only.next_clear(first)
        self.decided = self.read_first = self.read_end = first
        self.known = min(first * self.chunk, self.size)
        self.stop = min(self.end * self.chunk, self.size)
        self.extent = self.map.answer.count = 0

    cdef int run(self) except -1 nogil:
        cdef bint busy
        while True:
            busy = self.plan()
            if self.start_reads():
                busy = True
            if self.deliver():
                busy = True
            if busy:
                continue
            if self.asked or self.ring.busy > 0:
                self.source.step(POLL_MS)
            else:
                return 0

    cdef int plan(self) except -1 nogil:
        """Goes on in the map, as long as there is nothing to read; asks for more map. 1 if it did anything."""
        cdef int did = 0
        if self.asked and self.map.answer.request.pending == 0:
            # a server that cannot say is read whole from here on; if the medium is bad, the reads will tell
            self.ask = self.map.take(self.known)
            self.asked = False
            did = 1
        while not self.asked and self.read_first == self.read_end and self.extent < self.map.answer.count:
            self.use(self.map.answer.extents[self.extent].length, self.map.answer.extents[self.extent].data)
            self.extent += 1
            did = 1
        if self.known == self.stop and self.read_first == self.read_end and self.end < self.chunks:
            self.window()
            did = 1
        if not self.asked and self.extent == self.map.answer.count and self.known < self.stop:
            self.ask_more()
            did = 1
        return did

    cdef int use(self, uint64_t length, bint data) except -1 nogil:
        """One extent from ``known`` on. A chunk is zero only if all of it is; one that is data in part is read."""
        cdef uint64_t first, end
        if length > self.stop - self.known:
            length = self.stop - self.known
        if data and length > 0:
            first = self.known // self.chunk
            end = chunk_count(self.known + length, <uint32_t>self.chunk)
            if first > self.decided:
                self.zeros(first)
            self.read_first = self.decided
            self.read_end = end if end > self.decided else self.decided
            self.decided = self.read_end
        self.known += length
        if not data:
            end = self.end if self.known == self.stop else self.known // self.chunk
            if end > self.decided:
                self.zeros(end)
        return 0

    cdef int zeros(self, uint64_t end) except -1 nogil:
        """The chunks from ``decided`` to ``end`` are zeros."""
        cdef uint64_t start = self.decided * self.chunk, stop = end * self.chunk
        if stop > self.size:
            stop = self.size
        self.sink.put_zero(self.decided, end - self.decided)
        self.decided = end
        self.progress.bytes_done = self.progress.bytes_done + stop - start
        self.progress.zero_bytes = self.progress.zero_bytes + stop - start
        return 0

    cdef int ask_more(self) except -1 nogil:
        cdef uint64_t length = self.stop - self.known
        self.extent = 0
        if self.ask and (length >= WORTH_ASKING or self.only is None):
            self.map.ask(self.known, length)
            self.asked = True
            return 0
        self.map.answer.extents[0].length = STATUS_LIMIT if length > STATUS_LIMIT else length
        self.map.answer.extents[0].data = True
        self.map.answer.count = 1
        return 0

    cdef int start_reads(self) except -1 nogil:
        cdef int did = 0
        cdef Slot *slot
        cdef uint64_t count, start, length
        while self.read_first < self.read_end:
            count = self.ring.buffer_size // self.chunk
            # groups end at multiples of the buffer: the same requests whatever the holes before
            count -= self.read_first % count
            if count > self.read_end - self.read_first:
                count = self.read_end - self.read_first
            start = self.read_first * self.chunk
            length = count * self.chunk
            if length > self.size - start:
                length = self.size - start
            slot = self.ring.begin(start, length)
            if slot == NULL:
                break
            self.read_first += count
            self.source.start_read(&slot.request, slot.data, length, start)
            did = 1
        return did

    cdef int deliver(self) except -1 nogil:
        """Hands the chunks of the oldest slot to the sink, if they are here. The socket is looked after in between."""
        cdef Slot *slot = self.ring.oldest()
        cdef size_t at = 0, length
        cdef uint64_t index
        if slot == NULL or slot.request.pending > 0:
            return 0
        if slot.request.error != 0:
            return self.source.fail("reading", slot.offset, slot.length, slot.request.error)
        self.progress.bytes_read = self.progress.bytes_read + slot.length
        index = slot.offset // self.chunk
        while at < slot.length:
            length = chunk_length(self.size, <uint32_t>self.chunk, index)
            if is_zero(slot.data + at, length):
                self.sink.put_zero(index, 1)
                self.progress.zero_bytes = self.progress.zero_bytes + length
            else:
                self.sink.put(index, slot.data + at, length)
            self.progress.bytes_done = self.progress.bytes_done + length
            at += length
            index += 1
            self.source.step(0)
        self.ring.end()
        return 1


def copy_in(NbdConnection source not None, ChunkSink sink not None, Progress progress not None, *, Bitmap only=None,
            in_flight=16, request=256 << 10):
    cdef _CopyIn copy
    if source.size < sink.size:
        raise SourceError(
            f"NBD export {source.export!r}: it has {source.size} bytes, the image to be taken from it {sink.size}")
    if only is not None and only.length != chunk_count(sink.size, sink.chunk_size):
        raise ValueError(f"a bitmap of {only.length} bits for an image of {chunk_count(sink.size, sink.chunk_size)} chunks")
    size = _buffer_size(source, sink.chunk_size, request)
    copy = _CopyIn(source, sink, progress, Pipeline(source, size, _buffers(size, in_flight)), only)
    _begin(progress, sink.size if only is None else _bytes_of(only, sink))
    source.enter(&progress.cancel_flag)
    try:
        with nogil:
            copy.run()
    except BaseException:
        # what is in flight still points into our buffers
        source.abandon()
        raise
    finally:
        source.leave()


def _bytes_of(Bitmap only, ChunkSink image):
    """Bytes of the image in the chunks of ``only``."""
    total = only.count() * image.chunk_size
    if only.length > 0 and only.test(only.length - 1):
        total -= image.chunk_size - chunk_length(image.size, image.chunk_size, only.length - 1)
    return total


def _begin(Progress progress, size):
    if progress.cancel_flag:
        raise Cancelled("cancelled before the copy began")
    if progress.bytes_total == 0:
        progress.bytes_total = size


# ---- out

cdef enum:
    FILL_MS = 2                     # longest wait for a chunk before the socket is looked after again

# what goes on with a slot of a copy out of the repository
cdef enum:
    STAGE_WRITE = 0                 # it is being written, or waits for nothing any more
    STAGE_LOOK = 1                  # what the target holds is on its way
    STAGE_FILL = 2                  # with the pool's threads


cdef class _CopyOut:
    """The state of one copy_out. An image of the repository is read by the threads of ``pool``, which put chunks straight
    into the buffers that are written from; any other source is read here."""

    cdef NbdConnection target
    cdef ChunkSource source
    cdef Progress progress
    cdef Pipeline ring
    cdef ReadPool pool              # or None
    cdef NbdSource present          # where the target holds data; or None: it is not compared
    cdef batch_t *batches           # one for each slot
    cdef want_t *wants
    cdef int *stages
    cdef uint32_t filling           # slots with the pool
    cdef AlignedBuffer zeros        # to write where the server knows no write-zeroes
    cdef bint target_is_zero
    cdef uint64_t size
    cdef uint64_t chunk
    cdef uint64_t chunks
    cdef uint64_t group             # chunks of one buffer

    def __cinit__(self, NbdConnection target, ChunkSource source, Progress progress, Pipeline ring, bint is_zero,
                  ReadPool pool, bint in_place):
        cdef uint32_t i
        self.target = target
        self.source = source
        self.progress = progress
        self.ring = ring
        self.pool = pool
        self.target_is_zero = is_zero or in_place
        self.size = source.size
        self.chunk = source.chunk_size
        self.chunks = chunk_count(source.size, source.chunk_size)
        self.group = ring.buffer_size // source.chunk_size
        if (in_place or not is_zero) and not target.can_zero:
            self.zeros = AlignedBuffer(ring.buffer_size)
        if pool is None:
            return
        self.group = min(self.group, pool.batch_chunks)
        self.stages = <int *>calloc(ring.count, sizeof(int))
        self.batches = <batch_t *>calloc(ring.count, sizeof(batch_t))
        self.wants = <want_t *>calloc(ring.count * self.group, sizeof(want_t))
        if self.stages == NULL or self.batches == NULL or self.wants == NULL:
            raise MemoryError()
        for i in range(ring.count):
            self.batches[i].wants = self.wants + i * self.group
            self.batches[i].data = ring.slots[i].data
        if in_place:
            self.present = NbdSource(target, size=source.size, chunk_size=source.chunk_size)

    def __dealloc__(self):
        free(self.stages)
        free(self.batches)
        free(self.wants)

    cdef int run(self) except -1 nogil:
        cdef uint64_t at = 0, data = 0, data_end = 0, held = 0, held_end = 0, end
        while at < self.chunks:
            if data_end <= at:
                self.next_run(self.source, at, &data, &data_end)
            if held_end <= at:
                self.next_run(self.present, at, &held, &held_end)
            if at < data and at < held:
                end = min(data, held)
                self.hole(at, end)
            elif at >= held:
                end = held_end
                self.data(at, end, True)
            else:
                end = min(data_end, held)
                self.data(at, end, False)
            at = end
        while self.ring.busy > 0:
            self.collect(True)
        return self.target.flush()

    cdef int next_run(self, ChunkSource source, uint64_t at, uint64_t *first, uint64_t *end) except -1 nogil:
        """The next chunks of ``source`` that are no holes; beyond the last chunk if there are none."""
        cdef uint64_t count = 0
        first[0] = self.chunks
        end[0] = self.chunks + 1
        if source is None:
            return 0
        if source is self.present:
            self.present._next_data(at, first, &count)       # the connection is ours already
        else:
            source.next_data(at, first, &count)
        if count == 0:
            first[0] = self.chunks
            return 0
        if first[0] < at or first[0] >= self.chunks or count > self.chunks - first[0]:
            with gil:
                raise RuntimeError(f"source gave {count} chunks at {first[0]} for {at} of {self.chunks}")
        end[0] = first[0] + count
        return 0

    cdef Slot *slot(self, uint64_t offset, size_t length) except NULL nogil:
        """A free slot; waits for one."""
        cdef Slot *found
        # before, not after: a slot that was only just begun has nothing pending, like one that is done
        self.collect(False)
        found = self.ring.begin(offset, length)
        while found == NULL:
            self.collect(True)
            found = self.ring.begin(offset, length)
        return found

    cdef int collect(self, bint wait) except -1 nogil:
        """Ends the slots that are written; waits for the oldest one if told to."""
        cdef Slot *slot
        self.advance()
        self.target.step(0)
        slot = self.ring.oldest()
        while slot != NULL and (wait or self.written(slot)):
            while not self.written(slot):
                if self.pool is not None and self.stages[slot - self.ring.slots] == STAGE_FILL:
                    self.pool.wait(&self.batches[slot - self.ring.slots], FILL_MS)
                    self.target.step(0)
                else:
                    self.target.step(FILL_MS if self.filling else POLL_MS)
                self.advance()
            if slot.request.error != 0:
                return self.target.fail("writing", slot.offset, slot.length, slot.request.error)
            self.progress.bytes_done = self.progress.bytes_done + slot.length
            self.progress.zero_bytes = self.progress.zero_bytes + slot.zero_bytes
            self.ring.end()
            wait = False
            slot = self.ring.oldest()
        return 0

    cdef bint written(self, const Slot *slot) noexcept nogil:
        return slot.request.pending == 0 and (self.pool is None or self.stages[slot - self.ring.slots] == STAGE_WRITE)

    cdef int advance(self) except -1 nogil:
        """Goes on with every slot whose content is here: what the target holds to the pool, what the pool read out."""
        cdef uint32_t i, number
        cdef Slot *slot
        cdef batch_t *batch
        if self.pool is None:
            return 0
        for i in range(self.ring.busy):
            number = (self.ring.first + i) % self.ring.count
            slot = &self.ring.slots[number]
            batch = &self.batches[number]
            if self.stages[number] == STAGE_LOOK and slot.request.pending == 0:
                if slot.request.error != 0:
                    return self.target.fail("reading", slot.offset, slot.length, slot.request.error)
                self.to_pool(number)
            elif self.stages[number] == STAGE_FILL and self.pool.wait(batch, 0):
                self.filling -= 1
                self.stages[number] = STAGE_WRITE
                self.pool.check(batch)
                self.progress.bytes_read = self.progress.bytes_read + batch.read
                self.write_batch(slot, batch)
        return 0

    cdef void to_pool(self, uint32_t number) noexcept nogil:
        self.stages[number] = STAGE_FILL
        self.filling += 1
        self.pool.submit(&self.batches[number])

    cdef int hole(self, uint64_t first, uint64_t end) except -1 nogil:
        """Chunks that read as zeros."""
        cdef uint64_t at = first * self.chunk, stop = end * self.chunk, part
        cdef Slot *slot
        if stop > self.size:
            stop = self.size
        while at < stop:
            part = stop - at
            if self.target_is_zero:
                self.progress.bytes_done = self.progress.bytes_done + part
                self.progress.zero_bytes = self.progress.zero_bytes + part
                self.target.step(0)
                return 0
            if part > self.ring.buffer_size and self.zeros is not None:
                part = self.ring.buffer_size
            if part > ZERO_LIMIT:
                part = ZERO_LIMIT
            slot = self.slot(at, part)
            if self.pool is not None:
                self.stages[slot - self.ring.slots] = STAGE_WRITE
            self.clear(slot, at, part)
            slot.zero_bytes = part
            at += part
        return 0

    cdef int clear(self, Slot *slot, uint64_t offset, uint64_t length) except -1 nogil:
        self.progress.bytes_written = self.progress.bytes_written + length
        if self.zeros is not None:
            return self.target.start_write(&slot.request, self.zeros.data, length, offset)
        return self.target.start_zero(&slot.request, length, offset)

    cdef int write(self, Slot *slot, size_t start, size_t length) except -1 nogil:
        self.progress.bytes_written = self.progress.bytes_written + length
        return self.target.start_write(&slot.request, slot.data + start, length, slot.offset + start)

    cdef int data(self, uint64_t first, uint64_t end, bint compare) except -1 nogil:
        """Chunks from the source, a buffer at a time; ``compare``: only those that differ from the target's."""
        cdef uint64_t count, offset, length
        cdef Slot *slot
        while first < end:
            count = self.group - first % self.group
            if count > end - first:
                count = end - first
            offset = first * self.chunk
            length = count * self.chunk
            if length > self.size - offset:
                length = self.size - offset
            slot = self.slot(offset, length)
            if self.pool is not None:
                self.begin(slot, first, <uint32_t>count, compare)
            else:
                self.read_here(slot, first, count)
            first += count
        return 0

    cdef int begin(self, Slot *slot, uint64_t first, uint32_t count, bint compare) except -1 nogil:
        """Sets a slot on its way through the stages."""
        cdef uint32_t number = <uint32_t>(slot - self.ring.slots)
        cdef batch_t *batch = &self.batches[number]
        self.stages[number] = STAGE_WRITE
        batch.compare = compare
        self.pool.describe(batch, first, count)
        if compare:
            self.stages[number] = STAGE_LOOK
            self.target.start_read(&slot.request, slot.data, slot.length, slot.offset)
        else:
            self.to_pool(number)
        return 0

    cdef int write_batch(self, Slot *slot, const batch_t *batch) except -1 nogil:
        """Writes what the pool read, in runs; what is at the target already is left."""
        cdef uint32_t start = 0, end
        cdef size_t at, length
        cdef int state
        while start < batch.count:
            state = batch.wants[start].state
            at = <size_t>(batch.wants[start].into - batch.data)
            length = 0
            end = start
            while end < batch.count and batch.wants[end].state == state:
                length += batch.wants[end].length
                end += 1
            if state == CHUNK_READ:
                self.write(slot, at, length)
            elif state == CHUNK_ZERO:
                slot.zero_bytes += length
                self.clear(slot, slot.offset + at, length)
            start = end
        return 0

    cdef int read_here(self, Slot *slot, uint64_t first, uint64_t count) except -1 nogil:
        cdef uint64_t index
        cdef size_t at = 0, size
        for index in range(first, first + count):
            size = chunk_length(self.size, <uint32_t>self.chunk, index)
            self.source.get(index, slot.data + at, size)
            at += size
            self.target.step(0)
        self.progress.bytes_read = self.progress.bytes_read + slot.length
        return self.write_runs(slot, first, first + count)

    cdef int write_runs(self, Slot *slot, uint64_t first, uint64_t end) except -1 nogil:
        """Writes a slot: its runs of data as they are, its runs of zeros as zeroes or not at all."""
        cdef uint64_t index = first
        cdef size_t at = 0, start = 0, size = 0
        cdef bint zero = False, run_zero = False
        while index <= end:
            if index < end:
                size = chunk_length(self.size, <uint32_t>self.chunk, index)
                zero = is_zero(slot.data + at, size)
            if index == first:
                run_zero = zero
            if index == end or zero != run_zero:
                if not run_zero:
                    self.write(slot, start, at - start)
                else:
                    slot.zero_bytes += at - start
                    if not self.target_is_zero:
                        self.clear(slot, slot.offset + start, at - start)
                start = at
                run_zero = zero
            if index < end:
                at += size
            index += 1
        return 0


def copy_out(ChunkSource source not None, NbdConnection target not None, Progress progress not None, *,
             bint target_is_zero, bint in_place=False, in_flight=32, request=256 << 10, workers=0):
    cdef _CopyOut copy
    cdef ReadPool pool = None
    if target.read_only:
        raise TargetRefused(f"NBD export {target.export!r}: it is read-only")
    if target.size < source.size:
        raise TargetRefused(
            f"NBD export {target.export!r}: it has {target.size} bytes, the image to be written {source.size}")
    if in_place and not isinstance(source, ImageSource):
        raise ValueError("only images of the repository have names a target can be compared with")
    size = _buffer_size(target, source.chunk_size, request)
    ring = Pipeline(target, size, _buffers(size, in_flight))
    _begin(progress, source.size)
    try:
        if isinstance(source, ImageSource):
            pool = ReadPool(source, workers=workers, batch=size)
        copy = _CopyOut(target, source, progress, ring, target_is_zero, pool, in_place)
        target.writing = True
        _run_out(copy)
    finally:
        # before the buffers go: its threads fill them
        if pool is not None:
            pool.close()


cdef int _run_out(_CopyOut copy) except -1:
    copy.target.enter(&copy.progress.cancel_flag)
    try:
        with nogil:
            copy.run()
    except BaseException:
        copy.target.abandon()
        raise
    finally:
        copy.target.leave()
    return 0
