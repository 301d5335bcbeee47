# cython: cdivision=True
"""Many chunks at once: threads that read, decrypt, decompress and check what an image's next chunks are.

A batch is a piece of an image, about 1 MiB. A worker looks its chunks up, reads those that lie near each other in a pack
with one request, and checks each against its name. What cannot be had that way (a damaged record, a pack that is gone)
goes through ``ChunkReader.read``, which tries every other copy and says what is wrong.

Memory: the batches, which are their owner's, and about a batch for each thread. Whoever makes a pool closes it before
the memory of its batches goes: no thread outlives ``close()``.
"""

import os
import threading

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from vmbackupd.engine.chunkreader cimport FINE
from vmbackupd.engine.image cimport ImageSource
from vmbackupd.engine.layout cimport KIND_CHUNK, NAME, PACK_ID, RECORD_HEADER, is_zero_name
from vmbackupd.engine.sink cimport chunk_length
from vmbackupd.engine.threads cimport (
    cond_init_monotonic,
    cond_wait_ms,
    pthread_cond_broadcast,
    pthread_cond_destroy,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from vmbackupd.engine.zero cimport is_zero

from vmbackupd.errors import Cancelled, RepositoryCorrupt

cdef enum:
    BATCH_BYTES = 1 << 20    # of an image, unless one chunk is longer
    BATCH_CHUNKS = 256
    GAP = 32 << 10           # bytes between two records that are read along rather than skipped
    REMOTE_GAP = 256 << 10   # where a request costs a round trip
    REMOTE_THREADS = 8       # requests in flight there
    MOST_THREADS = 16


cdef class Worker:
    def __cinit__(self, Codec codec not None, size_t capacity, uint32_t chunks):
        self.codec = codec
        self.capacity = capacity
        self.scratch = <uint8_t *>malloc(capacity)
        self.order = <uint16_t *>malloc(chunks * sizeof(uint16_t))
        if self.scratch == NULL or self.order == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.scratch)
        free(self.order)


cdef class ReadPool:
    def __cinit__(self, ImageSource image not None, *args, int workers=0, size_t batch=BATCH_BYTES, **more):
        pthread_mutex_init(&self.lock, NULL)
        cond_init_monotonic(&self.work)
        cond_init_monotonic(&self.done)
        self.image = image
        self.reader = image.names.reader
        self.batch_chunks = max(1, min(<size_t>BATCH_CHUNKS, batch // image.chunk_size))
        self.batch_bytes = self.batch_chunks * <size_t>image.chunk_size
        self.threads = []
        threads = self._threads(workers)
        self.window = 2 * threads + 2
        try:
            for number in range(threads):
                self._spawn(number)
        except BaseException:
            self.close()
            raise

    def __dealloc__(self):
        pthread_cond_destroy(&self.work)
        pthread_cond_destroy(&self.done)
        pthread_mutex_destroy(&self.lock)

    def _threads(self, workers):
        if workers:
            return min(workers, MOST_THREADS)
        cores = min(len(os.sched_getaffinity(0)), 8)
        # the first read, of the tree's root, has shown whether packs are files
        return max(cores, REMOTE_THREADS) if self.reader.remote else cores

    def _spawn(self, number):
        # compressed records are hardly longer than what they hold
        capacity = self.batch_bytes + self.batch_bytes // 8 + self.batch_chunks * <size_t>RECORD_HEADER + REMOTE_GAP
        worker = Worker(self.reader.codec(), capacity, self.batch_chunks)
        thread = threading.Thread(target=self._run, args=(worker,), name=f"vmbackup-read-{number}", daemon=True)
        thread.start()
        self.threads.append(thread)

    def close(self):
        """End the threads; returns when the last one has ended. Batches that are still queued fail. Safe to call twice."""
        cdef batch_t *batch
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.closing = True
            while self.head != NULL:
                batch = self.head
                self.head = batch.next
                batch.state = BATCH_FAILED
            self.tail = NULL
            pthread_cond_broadcast(&self.work)
            pthread_cond_broadcast(&self.done)
            pthread_mutex_unlock(&self.lock)
        for thread in self.threads:
            thread.join()
        self.threads = []

    # ---- for the owner of batches

    cdef int describe(self, batch_t *batch, uint64_t first, uint32_t count) except -1 nogil:
        cdef const uint8_t *names = NULL
        cdef uint32_t fanout = self.image.names.shape.fanout
        cdef uint32_t i
        cdef uint64_t index
        cdef uint8_t *into = batch.data
        cdef want_t *want
        batch.first = first
        batch.count = count
        batch.offset = first * self.image.chunk_size
        for i in range(count):
            index = first + i
            if i == 0 or index % fanout == 0:
                self.image.names.node(0, index // fanout, &names)
            want = &batch.wants[i]
            want.length = <uint32_t>chunk_length(self.image.size, self.image.chunk_size, index)
            want.into = into
            into += want.length
            if names == NULL:
                memset(want.name, 0, NAME)
            else:
                memcpy(want.name, names + (index % fanout) * NAME, NAME)
        batch.length = <size_t>(into - batch.data)
        return 0

    cdef void submit(self, batch_t *batch) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        batch.next = NULL
        batch.read = 0
        batch.written = 0
        batch.state = BATCH_FAILED if self.closing else BATCH_QUEUED
        if not self.closing:
            if self.tail == NULL:
                self.head = batch
            else:
                self.tail.next = batch
            self.tail = batch
            pthread_cond_signal(&self.work)
        pthread_mutex_unlock(&self.lock)

    cdef bint wait(self, batch_t *batch, uint32_t ms) noexcept nogil:
        cdef bint done
        pthread_mutex_lock(&self.lock)
        if ms and (batch.state == BATCH_QUEUED or batch.state == BATCH_RUNNING):
            cond_wait_ms(&self.done, &self.lock, ms)
        done = batch.state == BATCH_DONE or batch.state == BATCH_FAILED
        pthread_mutex_unlock(&self.lock)
        return done

    cdef int check(self, batch_t *batch) except -1 nogil:
        if batch.state != BATCH_FAILED:
            return 0
        with gil:
            raise self.error if self.error is not None else Cancelled("reading was ended")

    # ---- threads

    def _run(self, Worker worker not None):
        while True:
            try:
                with nogil:
                    self._loop(worker)
                return
            except BaseException as reason:
                if self.error is None:
                    self.error = reason
                with nogil:
                    self._end(worker.batch, BATCH_FAILED)

    cdef int _loop(self, Worker worker) except -1 nogil:
        while True:
            worker.batch = self._take()
            if worker.batch == NULL:
                return 0
            self.before(worker, worker.batch)
            self._fill(worker, worker.batch)
            self.after(worker, worker.batch)
            self._end(worker.batch, BATCH_DONE)

    # The next batch; NULL when the pool is closing.
    cdef batch_t *_take(self) noexcept nogil:
        cdef batch_t *batch
        pthread_mutex_lock(&self.lock)
        while self.head == NULL and not self.closing:
            pthread_cond_wait(&self.work, &self.lock)
        batch = self.head
        if batch != NULL:
            self.head = batch.next
            if self.head == NULL:
                self.tail = NULL
            batch.state = BATCH_RUNNING
        pthread_mutex_unlock(&self.lock)
        return batch

    cdef void _end(self, batch_t *batch, int state) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        batch.state = state
        pthread_cond_broadcast(&self.done)
        pthread_mutex_unlock(&self.lock)

    cdef int before(self, Worker worker, batch_t *batch) except -1 nogil:
        return 0

    cdef int after(self, Worker worker, batch_t *batch) except -1 nogil:
        return 0

    cdef int _fill(self, Worker worker, batch_t *batch) except -1 nogil:
        cdef uint32_t wanted = self._decide(worker, batch)
        cdef uint32_t at = 0, end
        cdef uint64_t start, stop, reach
        cdef uint64_t gap = REMOTE_GAP if self.reader.remote else GAP
        cdef want_t *want
        cdef want_t *next_want
        while at < wanted:
            # as many records as lie near each other in one pack
            want = &batch.wants[worker.order[at]]
            start = want.entry.offset
            stop = start + RECORD_HEADER + want.entry.stored
            end = at + 1
            while end < wanted:
                next_want = &batch.wants[worker.order[end]]
                reach = <uint64_t>next_want.entry.offset + RECORD_HEADER + next_want.entry.stored
                if (
                    memcmp(next_want.pack_id, want.pack_id, PACK_ID) != 0
                    or next_want.entry.offset > stop + gap
                    or max(reach, stop) - start > worker.capacity
                ):
                    break
                stop = max(stop, reach)
                end += 1
            self._fetch(worker, batch, worker.order + at, end - at)
            at = end
        return 0

    # Looks the chunks up and decides which are to be fetched: their numbers in worker.order, by their place.
    cdef uint32_t _decide(self, Worker worker, batch_t *batch) noexcept nogil:
        cdef uint32_t wanted = 0, i
        cdef want_t *want
        for i in range(batch.count):
            want = &batch.wants[i]
            if is_zero_name(want.name):
                if batch.compare and is_zero(want.into, want.length):
                    want.state = CHUNK_SAME
                else:
                    memset(want.into, 0, want.length)
                    want.state = CHUNK_ZERO
                continue
            if batch.compare and self.reader.is_named(KIND_CHUNK, want.into, want.length, want.name):
                want.state = CHUNK_SAME
                continue
            want.state = CHUNK_READ
            batch.read += want.length
            # a writer's own chunks may not be in a pack yet; what is not indexed sorts first, alone
            if self.reader.session is not None or self.reader.index.locate(
                want.name, 0, &want.entry, want.pack_id
            ) < 0:
                memset(want.pack_id, 0, PACK_ID)
                memset(&want.entry, 0, sizeof(want.entry))
            worker.order[wanted] = <uint16_t>i
            wanted += 1
        _sort(worker.order, wanted, batch.wants)
        return wanted

    cdef int _fetch(self, Worker worker, batch_t *batch, const uint16_t *order, uint32_t count) except -1 nogil:
        cdef want_t *want = &batch.wants[order[0]]
        cdef uint64_t start = want.entry.offset, stop = start, reach
        cdef uint32_t i
        cdef bint here = False
        for i in range(count):
            want = &batch.wants[order[i]]
            reach = <uint64_t>want.entry.offset + RECORD_HEADER + want.entry.stored
            stop = max(stop, reach)
        if want.entry.raw and stop - start <= worker.capacity:
            here = self.reader.fetch_range(want.pack_id, start, worker.scratch, <size_t>(stop - start)) == FINE
        for i in range(count):
            want = &batch.wants[order[i]]
            if not here or want.entry.raw != want.length or self.reader.open_record(
                worker.codec, want.pack_id, worker.scratch + (want.entry.offset - start), want.name, KIND_CHUNK,
                &want.entry, want.into, want.length
            ) != FINE:
                self._fetch_alone(worker, want)
        return 0

    # The long way: every copy there is, and an error that says what is wrong.
    cdef int _fetch_alone(self, Worker worker, want_t *want) except -1 nogil:
        cdef uint32_t found = 0
        self.reader.read(worker.codec, want.name, KIND_CHUNK, want.into, want.length, &found)
        if found != want.length:
            with gil:
                raise RepositoryCorrupt(
                    f"chunk {want.name[:NAME].hex()} has {found} bytes, the tree {self.image.tree} needs {want.length}"
                )
        return 0


# By pack and place. Insertion: chunks of an image mostly lie in their packs as they do in the image.
cdef void _sort(uint16_t *order, uint32_t count, const want_t *wants) noexcept nogil:
    cdef uint32_t i, at
    cdef uint16_t moved
    for i in range(1, count):
        moved = order[i]
        at = i
        while at > 0 and _after(&wants[order[at - 1]], &wants[moved]):
            order[at] = order[at - 1]
            at -= 1
        order[at] = moved


cdef bint _after(const want_t *left, const want_t *right) noexcept nogil:
    cdef int difference = memcmp(left.pack_id, right.pack_id, PACK_ID)
    return difference > 0 or (difference == 0 and left.entry.offset > right.entry.offset)


cdef class BatchRing:
    def __cinit__(self, ReadPool pool not None, uint32_t count):
        cdef uint32_t i
        self.count = count
        self.batches = <batch_t *>calloc(count, sizeof(batch_t))
        self.wants = <want_t *>calloc(count * <size_t>pool.batch_chunks, sizeof(want_t))
        self.memory = <uint8_t *>malloc(count * pool.batch_bytes)
        if self.batches == NULL or self.wants == NULL or self.memory == NULL:
            raise MemoryError
        for i in range(count):
            self.batches[i].wants = self.wants + i * <size_t>pool.batch_chunks
            self.batches[i].data = self.memory + i * pool.batch_bytes

    def __dealloc__(self):
        free(self.batches)
        free(self.wants)
        free(self.memory)

    cdef batch_t *begin(self) noexcept nogil:
        cdef batch_t *batch
        if self.busy == self.count:
            return NULL
        batch = &self.batches[(self.first + self.busy) % self.count]
        batch.state = BATCH_IDLE
        batch.compare = False
        self.busy += 1
        return batch

    cdef batch_t *oldest(self) noexcept nogil:
        return &self.batches[self.first] if self.busy else NULL

    cdef void end(self) noexcept nogil:
        self.first = (self.first + 1) % self.count
        self.busy -= 1
