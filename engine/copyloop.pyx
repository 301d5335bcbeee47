"""The copy loops: an NBD export into a sink, a source onto an NBD export.

One thread, no GIL: it keeps requests in flight over the connection and, while they are under way, hands finished chunks
to the sink (or takes the next ones from the source). Memory is the ring of buffers, whatever the size of the image.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from vmbackupd.engine.blockstatus cimport BlockStatus
from vmbackupd.engine.buffers cimport AlignedBuffer
from vmbackupd.engine.nbd cimport POLL_MS, STATUS_LIMIT, ZERO_LIMIT, NbdConnection
from vmbackupd.engine.pipeline cimport Pipeline, Slot
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
    """The state of one copy_in: what is known of the export, which chunks are decided, what is in flight."""

    cdef NbdConnection source
    cdef ChunkSink sink
    cdef Progress progress
    cdef Pipeline ring
    cdef uint64_t size
    cdef uint64_t chunk
    cdef uint64_t chunks
    cdef BlockStatus map
    cdef uint32_t extent            # next one of the map to use
    cdef bint ask                   # block status is of use
    cdef bint asked                 # and under way
    cdef uint64_t known             # bytes from 0 whose extents were used
    cdef uint64_t decided           # chunks from 0 that are zero (and in the sink) or to be read
    cdef uint64_t read_first        # chunks to be read and not yet asked for
    cdef uint64_t read_end

    def __cinit__(self, NbdConnection source, ChunkSink sink, Progress progress, Pipeline ring):
        self.source = source
        self.sink = sink
        self.progress = progress
        self.ring = ring
        self.size = sink.size
        self.chunk = sink.chunk_size
        self.chunks = chunk_count(sink.size, sink.chunk_size)
        self.ask = source.can_block_status
        self.map = BlockStatus(source, MAP_ROOM)

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
            elif self.decided == self.chunks and self.read_first == self.read_end:
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
        if not self.asked and self.extent == self.map.answer.count and self.known < self.size:
            self.ask_more()
            did = 1
        return did

    cdef int use(self, uint64_t length, bint data) except -1 nogil:
        """One extent from ``known`` on. A chunk is zero only if all of it is; one that is data in part is read."""
        cdef uint64_t first, end
        if length > self.size - self.known:
            length = self.size - self.known
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
            end = self.chunks if self.known == self.size else self.known // self.chunk
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
        self.progress.bytes_done += stop - start
        self.progress.zero_bytes += stop - start
        return 0

    cdef int ask_more(self) except -1 nogil:
        cdef uint64_t length = self.size - self.known
        self.extent = 0
        if self.ask:
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
        self.progress.bytes_read += slot.length
        index = slot.offset // self.chunk
        while at < slot.length:
            length = chunk_length(self.size, <uint32_t>self.chunk, index)
            if is_zero(slot.data + at, length):
                self.sink.put_zero(index, 1)
                self.progress.zero_bytes += length
            else:
                self.sink.put(index, slot.data + at, length)
            self.progress.bytes_done += length
            at += length
            index += 1
            self.source.step(0)
        self.ring.end()
        return 1


def copy_in(NbdConnection source not None, ChunkSink sink not None, Progress progress not None, *, in_flight=32,
            request=256 << 10):
    cdef _CopyIn copy
    if source.size < sink.size:
        raise SourceError(
            f"NBD export {source.export!r}: it has {source.size} bytes, the image to be taken from it {sink.size}")
    size = _buffer_size(source, sink.chunk_size, request)
    copy = _CopyIn(source, sink, progress, Pipeline(source, size, _buffers(size, in_flight)))
    _begin(progress, sink.size)
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


def _begin(Progress progress, size):
    if progress.cancel_flag:
        raise Cancelled("cancelled before the copy began")
    if progress.bytes_total == 0:
        progress.bytes_total = size


# ---- out

cdef class _CopyOut:
    """The state of one copy_out."""

    cdef NbdConnection target
    cdef ChunkSource source
    cdef Progress progress
    cdef Pipeline ring
    cdef AlignedBuffer zeros        # to write where the server knows no write-zeroes
    cdef bint target_is_zero
    cdef uint64_t size
    cdef uint64_t chunk
    cdef uint64_t chunks

    def __cinit__(self, NbdConnection target, ChunkSource source, Progress progress, Pipeline ring, bint is_zero):
        self.target = target
        self.source = source
        self.progress = progress
        self.ring = ring
        self.target_is_zero = is_zero
        self.size = source.size
        self.chunk = source.chunk_size
        self.chunks = chunk_count(source.size, source.chunk_size)
        if not is_zero and not target.can_zero:
            self.zeros = AlignedBuffer(ring.buffer_size)

    cdef int run(self) except -1 nogil:
        cdef uint64_t at = 0, first, count
        while at < self.chunks:
            first = 0
            count = 0
            self.source.next_data(at, &first, &count)
            if count == 0:
                first = self.chunks
            elif first < at or first >= self.chunks or count > self.chunks - first:
                with gil:
                    raise RuntimeError(f"source gave {count} chunks at {first} for {at} of {self.chunks}")
            if first > at:
                self.hole(at, first)
            if count > 0:
                self.data(first, first + count)
            at = first + count
        while self.ring.busy > 0:
            self.collect(True)
        return self.target.flush()

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
        cdef Slot *slot = self.ring.oldest()
        self.target.step(0)
        while slot != NULL and (wait or slot.request.pending == 0):
            while slot.request.pending > 0:
                self.target.step(POLL_MS)
            if slot.request.error != 0:
                return self.target.fail("writing", slot.offset, slot.length, slot.request.error)
            self.progress.bytes_done += slot.length
            self.progress.zero_bytes += slot.zero_bytes
            self.ring.end()
            wait = False
            slot = self.ring.oldest()
        return 0

    cdef int hole(self, uint64_t first, uint64_t end) except -1 nogil:
        """Chunks that read as zeros."""
        cdef uint64_t at = first * self.chunk, stop = end * self.chunk, part
        cdef Slot *slot
        if stop > self.size:
            stop = self.size
        while at < stop:
            part = stop - at
            if self.target_is_zero:
                self.progress.bytes_done += part
                self.progress.zero_bytes += part
                self.target.step(0)
                return 0
            if part > self.ring.buffer_size and self.zeros is not None:
                part = self.ring.buffer_size
            if part > ZERO_LIMIT:
                part = ZERO_LIMIT
            slot = self.slot(at, part)
            self.clear(slot, at, part)
            slot.zero_bytes = part
            at += part
        return 0

    cdef int clear(self, Slot *slot, uint64_t offset, uint64_t length) except -1 nogil:
        if self.zeros is not None:
            return self.target.start_write(&slot.request, self.zeros.data, length, offset)
        return self.target.start_zero(&slot.request, length, offset)

    cdef int data(self, uint64_t first, uint64_t end) except -1 nogil:
        """Chunks from the source, a buffer at a time."""
        cdef uint64_t group = self.ring.buffer_size // self.chunk, count, index, offset, length
        cdef Slot *slot
        cdef size_t at, size
        while first < end:
            count = group - first % group
            if count > end - first:
                count = end - first
            offset = first * self.chunk
            length = count * self.chunk
            if length > self.size - offset:
                length = self.size - offset
            slot = self.slot(offset, length)
            at = 0
            for index in range(first, first + count):
                size = chunk_length(self.size, <uint32_t>self.chunk, index)
                self.source.get(index, slot.data + at, size)
                at += size
                self.target.step(0)
            self.progress.bytes_read += length
            self.write_runs(slot, first, first + count)
            first += count
        return 0

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
                    self.target.start_write(&slot.request, slot.data + start, at - start, slot.offset + start)
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
             bint target_is_zero, in_flight=32, request=256 << 10):
    cdef _CopyOut copy
    if target.read_only:
        raise TargetRefused(f"NBD export {target.export!r}: it is read-only")
    if target.size < source.size:
        raise TargetRefused(
            f"NBD export {target.export!r}: it has {target.size} bytes, the image to be written {source.size}")
    size = _buffer_size(target, source.chunk_size, request)
    copy = _CopyOut(target, source, progress, Pipeline(target, size, _buffers(size, in_flight)), target_is_zero)
    _begin(progress, source.size)
    target.writing = True
    target.enter(&progress.cancel_flag)
    try:
        with nogil:
            copy.run()
    except BaseException:
        target.abandon()
        raise
    finally:
        target.leave()
