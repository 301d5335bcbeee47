# The part of libnbd's C API that the engine uses (libnbd >= 1.14). Callbacks run with the handle's lock held:
# they touch our structures only, and never call nbd_*.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "<libnbd.h>" nogil:
    struct nbd_handle:
        pass
    ctypedef struct nbd_completion_callback:
        int (*callback)(void *user_data, int *error) noexcept nogil
        void *user_data
        void (*free)(void *user_data) noexcept nogil
    ctypedef struct nbd_extent_callback:
        int (*callback)(void *user_data, const char *metacontext, uint64_t offset, uint32_t *entries,
                        size_t nr_entries, int *error) noexcept nogil
        void *user_data
        void (*free)(void *user_data) noexcept nogil

    const char *LIBNBD_CONTEXT_BASE_ALLOCATION
    enum:
        LIBNBD_SIZE_MINIMUM
        LIBNBD_SIZE_PREFERRED
        LIBNBD_SIZE_MAXIMUM
        LIBNBD_STATE_ZERO
        LIBNBD_AIO_DIRECTION_WRITE

    nbd_handle *nbd_create()
    void nbd_close(nbd_handle *h)
    const char *nbd_get_error()
    int nbd_get_errno()
    int nbd_set_export_name(nbd_handle *h, const char *name)
    int nbd_add_meta_context(nbd_handle *h, const char *name)

    int nbd_aio_connect_unix(nbd_handle *h, const char *path)
    int nbd_aio_connect_socket(nbd_handle *h, int fd)
    int nbd_aio_disconnect(nbd_handle *h, uint32_t flags)
    int nbd_poll(nbd_handle *h, int timeout_ms)
    unsigned int nbd_aio_get_direction(nbd_handle *h)
    int nbd_aio_is_connecting(nbd_handle *h)
    int nbd_aio_is_ready(nbd_handle *h)
    int nbd_aio_is_processing(nbd_handle *h)
    int nbd_aio_is_dead(nbd_handle *h)
    int nbd_aio_is_closed(nbd_handle *h)

    int64_t nbd_get_size(nbd_handle *h)
    int64_t nbd_get_block_size(nbd_handle *h, int size_type)
    int nbd_is_read_only(nbd_handle *h)
    int nbd_can_meta_context(nbd_handle *h, const char *name)
    int nbd_can_zero(nbd_handle *h)
    int nbd_can_flush(nbd_handle *h)

    int64_t nbd_aio_pread(nbd_handle *h, void *buf, size_t count, uint64_t offset,
                          nbd_completion_callback completion, uint32_t flags)
    int64_t nbd_aio_pwrite(nbd_handle *h, const void *buf, size_t count, uint64_t offset,
                           nbd_completion_callback completion, uint32_t flags)
    int64_t nbd_aio_zero(nbd_handle *h, uint64_t count, uint64_t offset,
                         nbd_completion_callback completion, uint32_t flags)
    int64_t nbd_aio_flush(nbd_handle *h, nbd_completion_callback completion, uint32_t flags)
    int64_t nbd_aio_block_status(nbd_handle *h, uint64_t count, uint64_t offset, nbd_extent_callback extent,
                                 nbd_completion_callback completion, uint32_t flags)
