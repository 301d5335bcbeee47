"""One connection to an NBD export, over libnbd's C API.

Only libnbd's asynchronous calls are used, each waited for with a bounded poll: a peer that hangs (a guest is one) can
always be cancelled, and one that is silent for too long is given up.
"""

import errno as errors
import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from vmbackupd.engine.libnbd cimport (
    LIBNBD_AIO_DIRECTION_WRITE, LIBNBD_CONTEXT_BASE_ALLOCATION, LIBNBD_SIZE_MAXIMUM, LIBNBD_SIZE_MINIMUM,
    nbd_add_meta_context, nbd_aio_connect_socket, nbd_aio_connect_unix, nbd_aio_disconnect, nbd_aio_flush,
    nbd_aio_get_direction, nbd_aio_is_closed, nbd_aio_is_connecting, nbd_aio_is_dead, nbd_aio_is_processing,
    nbd_aio_is_ready, nbd_aio_pread, nbd_aio_pwrite, nbd_aio_zero, nbd_can_flush, nbd_can_meta_context, nbd_can_zero,
    nbd_close, nbd_create, nbd_get_block_size, nbd_get_errno, nbd_get_error, nbd_get_size, nbd_is_read_only, nbd_poll,
    nbd_set_export_name)

from vmbackupd.errors import Cancelled, SourceError, TargetError


cdef int _completed(void *user_data, int *error) noexcept nogil:
    cdef Request *request = <Request *>user_data
    if error[0] != 0 and request.error == 0:
        request.error = error[0]
    request.pending -= 1
    return 1        # libnbd forgets the command


cdef nbd_completion_callback completion(Request *request) noexcept nogil:
    cdef nbd_completion_callback made
    made.callback = _completed
    made.user_data = request
    made.free = NULL
    return made


cdef str _errno_text(int error):
    return f"{os.strerror(error)} ({errors.errorcode.get(error, error)})"


cdef class NbdConnection:
    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self):
        self.abandon()
        pthread_mutex_destroy(&self.mutex)

    def __init__(self, *, fd=None, unix=None, str export="", str bitmap=None, double timeout=30.0,
                 double stall_timeout=300.0):
        if (fd is None) == (unix is None):
            raise ValueError("give either fd or unix")
        if self.handle != NULL:
            raise ValueError("connected already")
        if not 0 < timeout < 1e6 or not 0 < stall_timeout < 1e6:
            raise ValueError("timeouts are seconds above 0")
        if bitmap is not None and (not bitmap or "\0" in bitmap):
            raise ValueError(f"{bitmap!r} is no name of a bitmap")
        self.export = export
        self.bitmap_context = None if bitmap is None else f"qemu:dirty-bitmap:{bitmap}".encode()
        self.stall_ms = <uint32_t>(timeout * 1000)
        self.handle = nbd_create()
        if self.handle == NULL:
            raise MemoryError(nbd_get_error().decode(errors="replace"))
        self.enter(NULL)
        try:
            self._connect(fd, unix)
            self._inspect()
        except BaseException:
            self.abandon()
            raise
        finally:
            self.leave()
        self.stall_ms = <uint32_t>(stall_timeout * 1000)

    def _connect(self, fd, unix):
        cdef int own, result
        cdef bytes path, name = self.export.encode()
        if nbd_set_export_name(self.handle, name) == -1:
            self.fail_connection("export name")
        if nbd_add_meta_context(self.handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == -1:
            self.fail_connection("meta context")
        if self.bitmap_context is not None and nbd_add_meta_context(self.handle, self.bitmap_context) == -1:
            self.fail_connection("meta context")
        if fd is not None:
            own = os.dup(fd)
            # libnbd's from here on, also if this fails
            result = nbd_aio_connect_socket(self.handle, own)
        else:
            path = os.fsencode(unix)
            result = nbd_aio_connect_unix(self.handle, path)
        if result == -1:
            self.fail_connection("connect")
        with nogil:
            while nbd_aio_is_connecting(self.handle) == 1:
                self.step(POLL_MS)
            if nbd_aio_is_ready(self.handle) != 1:
                self.fail_connection("connect")

    def _inspect(self):
        cdef int64_t size = nbd_get_size(self.handle), least, most
        if size < 0:
            self.fail_connection("size")
        self.size = size
        least = nbd_get_block_size(self.handle, LIBNBD_SIZE_MINIMUM)
        most = nbd_get_block_size(self.handle, LIBNBD_SIZE_MAXIMUM)
        # 0 (not said) and nonsense both become the protocol's defaults
        self.min_block = least if 0 < least <= 65536 and least & (least - 1) == 0 else 1
        if not 0 < most <= REQUEST_LIMIT:
            most = REQUEST_LIMIT
        self.max_request = max(<uint32_t>most // self.min_block, 1) * self.min_block
        self.read_only = nbd_is_read_only(self.handle) == 1
        self.can_block_status = nbd_can_meta_context(self.handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 1
        self.has_bitmap = (
            self.bitmap_context is not None and nbd_can_meta_context(self.handle, self.bitmap_context) == 1)
        self.can_zero = nbd_can_zero(self.handle) == 1
        self.can_flush = nbd_can_flush(self.handle) == 1

    # -- one caller at a time, cancelling, closing

    cdef int enter(self, const int *cancel_flag) except -1 nogil:
        if pthread_mutex_trylock(&self.mutex) != 0:
            with gil:
                raise RuntimeError(f"NBD export {self.export!r}: another call is using this connection")
        if self.handle == NULL:
            pthread_mutex_unlock(&self.mutex)
            with gil:
                raise (TargetError if self.writing else SourceError)(
                    f"NBD export {self.export!r}: the connection is closed")
        self.other_flag = cancel_flag
        self.idle_ms = 0
        self.in_use = 1
        return 0

    cdef void leave(self) noexcept nogil:
        self.other_flag = NULL
        self.in_use = 0
        pthread_mutex_unlock(&self.mutex)

    cdef void abandon(self) noexcept nogil:
        if self.handle != NULL:
            nbd_close(self.handle)
            self.handle = NULL

    def cancel(self):
        self.cancel_flag = 1

    @property
    def closed(self):
        return self.handle == NULL

    @property
    def busy(self):
        return self.in_use != 0

    def close(self):
        cdef int turns = 0
        # a call in another thread ends first, within one poll
        self.cancel_flag = 1
        with nogil:
            pthread_mutex_lock(&self.mutex)
            if self.handle != NULL:
                # a farewell, not a wait for the peer's end: a virtio-serial port never shows one
                if nbd_aio_is_ready(self.handle) == 1 and nbd_aio_disconnect(self.handle, 0) == 0:
                    while turns < 20 and nbd_aio_get_direction(self.handle) & LIBNBD_AIO_DIRECTION_WRITE:
                        if nbd_poll(self.handle, POLL_MS) == -1:
                            break
                        turns += 1
                self.abandon()
            pthread_mutex_unlock(&self.mutex)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # -- errors

    cdef int fail(self, const char *what, uint64_t offset, uint64_t length, int error) except -1 nogil:
        with gil:
            raise (TargetError if self.writing else SourceError)(
                f"NBD export {self.export!r}: {what.decode()} {length} bytes at offset {offset}: {_errno_text(error)}")

    cdef int fail_connection(self, const char *what) except -1 nogil:
        with gil:
            text = nbd_get_error()
            detail = (<bytes>text).decode(errors="replace") if text != NULL else "connection lost"
            self.abandon()
            raise (TargetError if self.writing else SourceError)(
                f"NBD export {self.export!r}: {what.decode()}: {detail}")

    # -- requests

    cdef int step(self, uint32_t wait_ms) except -1 nogil:
        cdef int result
        if self.cancel_flag != 0 or (self.other_flag != NULL and self.other_flag[0] != 0):
            self.abandon()
            with gil:
                raise Cancelled(f"NBD export {self.export!r}: cancelled")
        result = nbd_poll(self.handle, <int>wait_ms)
        if result == -1 and nbd_get_errno() == EINTR:
            return 0
        if result == -1 or nbd_aio_is_dead(self.handle) == 1:
            return self.fail_connection("connection")
        if nbd_aio_is_closed(self.handle) == 1:
            self.abandon()
            with gil:
                raise (TargetError if self.writing else SourceError)(
                    f"NBD export {self.export!r}: the server closed the connection")
        if result == 1:
            self.idle_ms = 0
            return 0
        self.idle_ms += wait_ms
        if self.idle_ms >= self.stall_ms:
            self.abandon()
            with gil:
                raise (TargetError if self.writing else SourceError)(
                    f"NBD export {self.export!r}: no answer from the server for {self.idle_ms / 1000:.0f} s")
        return 0

    cdef int start_read(self, Request *request, uint8_t *into, size_t length, uint64_t offset) except -1 nogil:
        cdef size_t part
        while length > 0:
            part = self.max_request if length > self.max_request else length
            request.pending += 1
            if nbd_aio_pread(self.handle, into, part, offset, completion(request), 0) == -1:
                request.pending -= 1
                return self.fail_connection("read")
            into += part
            offset += part
            length -= part
        return 0

    cdef int start_write(self, Request *request, const uint8_t *data, size_t length, uint64_t offset) except -1 nogil:
        cdef size_t part
        while length > 0:
            part = self.max_request if length > self.max_request else length
            request.pending += 1
            if nbd_aio_pwrite(self.handle, data, part, offset, completion(request), 0) == -1:
                request.pending -= 1
                return self.fail_connection("write")
            data += part
            offset += part
            length -= part
        return 0

    cdef int start_zero(self, Request *request, uint64_t length, uint64_t offset) except -1 nogil:
        cdef uint64_t part
        while length > 0:
            part = ZERO_LIMIT if length > ZERO_LIMIT else length
            request.pending += 1
            if nbd_aio_zero(self.handle, part, offset, completion(request), 0) == -1:
                request.pending -= 1
                return self.fail_connection("write zeroes")
            offset += part
            length -= part
        return 0

    cdef int wait(self, Request *request, const char *what, uint64_t offset, uint64_t length) except -1 nogil:
        self.idle_ms = 0
        while request.pending > 0:
            self.step(POLL_MS)
        if request.error != 0:
            return self.fail(what, offset, length, request.error)
        return 0

    cdef int read_into(self, uint8_t *into, size_t length, uint64_t offset) except -1 nogil:
        cdef Request request
        cdef uint64_t start = offset - offset % self.min_block
        cdef uint64_t end = offset + length
        cdef uint8_t *wide
        cdef int result = -1
        request.pending = 0
        request.error = 0
        end += (self.min_block - end % self.min_block) % self.min_block
        if end > self.size:
            end = self.size
        if start == offset and end == offset + length:
            self.start_read(&request, into, length, offset)
            return self.wait(&request, "reading", offset, length)
        wide = <uint8_t *>malloc(end - start)
        if wide == NULL:
            with gil:
                raise MemoryError()
        try:
            self.start_read(&request, wide, end - start, start)
            self.wait(&request, "reading", start, end - start)
            memcpy(into, wide + (offset - start), length)
            result = 0
        finally:
            free(wide)
        return result

    cdef int flush(self) except -1 nogil:
        cdef Request request
        if not self.can_flush:
            return 0
        request.pending = 1
        request.error = 0
        if nbd_aio_flush(self.handle, completion(&request), 0) == -1:
            return self.fail_connection("flush")
        return self.wait(&request, "flushing", 0, self.size)

    def _check_range(self, offset, length):
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"NBD export {self.export!r}: {length} bytes at {offset} are not inside {self.size} bytes")

    def pread(self, offset, length):
        cdef uint64_t start
        cdef size_t count
        cdef bytes data
        cdef uint8_t *into
        self._check_range(offset, length)
        if length == 0:
            return b""
        start, count = offset, length
        data = PyBytes_FromStringAndSize(NULL, count)
        into = <uint8_t *>PyBytes_AS_STRING(data)
        with nogil:
            self.enter(NULL)
            try:
                self.read_into(into, count, start)
            finally:
                self.leave()
        return data

    def pwrite(self, offset, const uint8_t[::1] data not None):
        cdef Request request
        cdef uint64_t start
        cdef size_t count = data.shape[0]
        self._check_range(offset, count)
        if offset % self.min_block or count % self.min_block:
            raise ValueError(f"NBD export {self.export!r}: writes are multiples of {self.min_block} bytes")
        if count == 0:
            return
        start = offset
        request.pending = 0
        request.error = 0
        self.writing = True
        with nogil:
            self.enter(NULL)
            try:
                self.start_write(&request, &data[0], count, start)
                self.wait(&request, "writing", start, count)
            finally:
                self.leave()

    def sync(self):
        self.writing = True
        with nogil:
            self.enter(NULL)
            try:
                self.flush()
            finally:
                self.leave()
