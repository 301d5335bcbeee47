# Authenticated encryption through OpenSSL's EVP.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

cdef enum:
    NO_CIPHER = 0
    AES_256_GCM = 1
    CHACHA20_POLY1305 = 2
    AEAD_TAG = 16              # bytes that sealing adds
    AEAD_NONCE = 12
    AEAD_KEY = 32

# AES-256-GCM where the processor has instructions for it, else ChaCha20-Poly1305
cdef int preferred_cipher() noexcept nogil


cdef class Aead:                       # one thread at a time; one key is kept set up for each direction
    cdef void *sealing                 # EVP_CIPHER_CTX, made on the first use
    cdef void *opening                 # likewise
    cdef int sealing_cipher            # what `sealing` is set up for; NO_CIPHER: nothing
    cdef int opening_cipher
    cdef uint8_t sealing_key[32]
    cdef uint8_t opening_key[32]
    # `length` bytes of ciphertext and the tag to `out`, which may be `data`: 0, or -1 if OpenSSL fails (no memory).
    cdef int seal(
        self, int cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *bound, size_t bound_length,
        const uint8_t *data, size_t length, uint8_t *out
    ) noexcept nogil
    # `length` bytes of ciphertext, the tag behind them: True, and the content at `out` (which may be `data`), if key,
    # nonce, `bound` and every byte are those that were sealed. What is at `out` otherwise means nothing.
    cdef bint open(
        self, int cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *bound, size_t bound_length,
        const uint8_t *data, size_t length, uint8_t *out
    ) noexcept nogil
