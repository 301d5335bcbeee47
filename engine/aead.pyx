# cython: cdivision=True
"""Authenticated encryption through OpenSSL's EVP interface (man 3 EVP_EncryptInit, EVP_aes-256-gcm, EVP_chacha20).

Both ciphers take a key of 32 bytes and a nonce of 12, and add a tag of 16. Ciphers are fetched once: fetching again for
every record would cost more than encrypting a small one.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.string cimport memcmp, memcpy

cdef extern from *:
    """
    #if defined(__aarch64__) && defined(__linux__)
    #include <sys/auxv.h>
    #include <asm/hwcap.h>
    #endif

    /* Has the processor instructions for AES and for the multiplication in GCM? */
    static int vmbackupd_has_aes(void)
    {
    #if defined(__x86_64__)
        __builtin_cpu_init();
        return __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
    #elif defined(__aarch64__) && defined(__linux__)
        return (getauxval(AT_HWCAP) & (HWCAP_AES | HWCAP_PMULL)) == (HWCAP_AES | HWCAP_PMULL);
    #elif defined(__powerpc64__) || defined(__s390x__)
        return 1;
    #else
        return 0;
    #endif
    }
    """
    int vmbackupd_has_aes() noexcept nogil

cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass
    enum:
        EVP_CTRL_AEAD_GET_TAG
        EVP_CTRL_AEAD_SET_TAG
    EVP_CIPHER *EVP_CIPHER_fetch(void *, const char *, const char *)
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *)
    int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *, int, int, void *)
    int EVP_EncryptInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, void *, const uint8_t *, const uint8_t *)
    int EVP_EncryptUpdate(EVP_CIPHER_CTX *, uint8_t *, int *, const uint8_t *, int)
    int EVP_EncryptFinal_ex(EVP_CIPHER_CTX *, uint8_t *, int *)
    int EVP_DecryptInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, void *, const uint8_t *, const uint8_t *)
    int EVP_DecryptUpdate(EVP_CIPHER_CTX *, uint8_t *, int *, const uint8_t *, int)
    int EVP_DecryptFinal_ex(EVP_CIPHER_CTX *, uint8_t *, int *)

cdef extern from "<openssl/err.h>" nogil:
    void ERR_clear_error()

cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void *, size_t)

cdef enum:
    MOST = 1 << 30            # bytes in one call: OpenSSL counts in int

# never freed: they live as long as the process
cdef EVP_CIPHER *ciphers[3]
ciphers[NO_CIPHER] = NULL
ciphers[AES_256_GCM] = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL)
ciphers[CHACHA20_POLY1305] = EVP_CIPHER_fetch(NULL, "ChaCha20-Poly1305", NULL)  # NULL where FIPS rules forbid it
ERR_clear_error()

AES_GCM = AES_256_GCM
CHACHA_POLY = CHACHA20_POLY1305
TAG = AEAD_TAG


cdef int preferred_cipher() noexcept nogil:
    if vmbackupd_has_aes() or ciphers[CHACHA20_POLY1305] == NULL:
        return AES_256_GCM
    return CHACHA20_POLY1305


cdef class Aead:
    """Contexts of OpenSSL, made once; one thread at a time."""

    def __dealloc__(self):
        EVP_CIPHER_CTX_free(<EVP_CIPHER_CTX *>self.sealing)
        EVP_CIPHER_CTX_free(<EVP_CIPHER_CTX *>self.opening)
        OPENSSL_cleanse(self.sealing_key, 32)
        OPENSSL_cleanse(self.opening_key, 32)

    cdef int seal(
        self, int cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *bound, size_t bound_length,
        const uint8_t *data, size_t length, uint8_t *out
    ) noexcept nogil:
        cdef int made = 0
        cdef EVP_CIPHER_CTX *context
        if not AES_256_GCM <= cipher <= CHACHA20_POLY1305 or ciphers[cipher] == NULL or length > MOST:
            return -1
        if self.sealing == NULL:
            self.sealing = EVP_CIPHER_CTX_new()
        context = <EVP_CIPHER_CTX *>self.sealing
        if context == NULL:
            return -1
        if self.sealing_cipher != cipher or memcmp(self.sealing_key, key, 32) != 0:
            # setting up a key costs as much as encrypting a KiB, so it is kept until the next
            self.sealing_cipher = NO_CIPHER
            if EVP_EncryptInit_ex(context, ciphers[cipher], NULL, key, NULL) != 1:
                return -1
            memcpy(self.sealing_key, key, 32)
            self.sealing_cipher = cipher
        if (
            EVP_EncryptInit_ex(context, NULL, NULL, NULL, nonce) != 1
            or (bound_length and EVP_EncryptUpdate(context, NULL, &made, bound, <int>bound_length) != 1)
            or (length and EVP_EncryptUpdate(context, out, &made, data, <int>length) != 1)
            or EVP_EncryptFinal_ex(context, out + length, &made) != 1
            or EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, AEAD_TAG, out + length) != 1
        ):
            self.sealing_cipher = NO_CIPHER
            ERR_clear_error()
            return -1
        return 0

    cdef bint open(
        self, int cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *bound, size_t bound_length,
        const uint8_t *data, size_t length, uint8_t *out
    ) noexcept nogil:
        cdef int made = 0
        cdef uint8_t tag[16]
        cdef EVP_CIPHER_CTX *context
        if not AES_256_GCM <= cipher <= CHACHA20_POLY1305 or ciphers[cipher] == NULL or length > MOST:
            return False
        if self.opening == NULL:
            self.opening = EVP_CIPHER_CTX_new()
        context = <EVP_CIPHER_CTX *>self.opening
        if context == NULL:
            return False
        if self.opening_cipher != cipher or memcmp(self.opening_key, key, 32) != 0:
            self.opening_cipher = NO_CIPHER
            if EVP_DecryptInit_ex(context, ciphers[cipher], NULL, key, NULL) != 1:
                return False
            memcpy(self.opening_key, key, 32)
            self.opening_cipher = cipher
        memcpy(tag, data + length, AEAD_TAG)
        if (
            EVP_DecryptInit_ex(context, NULL, NULL, NULL, nonce) != 1
            or EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, AEAD_TAG, tag) != 1
            or (bound_length and EVP_DecryptUpdate(context, NULL, &made, bound, <int>bound_length) != 1)
            or (length and EVP_DecryptUpdate(context, out, &made, data, <int>length) != 1)
            or EVP_DecryptFinal_ex(context, tag, &made) != 1
        ):
            self.opening_cipher = NO_CIPHER
            ERR_clear_error()
            return False
        return True


# ---- from Python

cdef int _check(int cipher, bytes key, bytes nonce) except -1:
    if not AES_256_GCM <= cipher <= CHACHA20_POLY1305 or ciphers[cipher] == NULL:
        raise ValueError(f"there is no cipher {cipher} here")
    if len(key) != AEAD_KEY or len(nonce) != AEAD_NONCE:
        raise ValueError(f"a key has {AEAD_KEY} bytes and a nonce {AEAD_NONCE}, not {len(key)} and {len(nonce)}")
    return 0


def preferred():
    """The id of the cipher that is faster on this processor."""
    return preferred_cipher()


def encrypt(int cipher, bytes key not None, bytes nonce not None, const uint8_t[::1] bound not None,
            const uint8_t[::1] data not None):
    """Ciphertext and tag. ``bound`` is authenticated with the content but not part of the result."""
    cdef size_t length = data.shape[0]
    cdef size_t bound_length = bound.shape[0]
    cdef bytearray out = bytearray(length + AEAD_TAG)
    cdef uint8_t *into = <uint8_t *><char *>out
    cdef Aead context = Aead()
    cdef int failed
    cdef const uint8_t *with_key = <const uint8_t *><char *>key
    cdef const uint8_t *with_nonce = <const uint8_t *><char *>nonce
    cdef const uint8_t *with_bound = &bound[0] if bound_length else into
    cdef const uint8_t *content = &data[0] if length else into
    _check(cipher, key, nonce)
    with nogil:
        failed = context.seal(cipher, with_key, with_nonce, with_bound, bound_length, content, length, into)
    if failed:
        raise MemoryError("OpenSSL failed to encrypt")
    return bytes(out)


def decrypt(int cipher, bytes key not None, bytes nonce not None, const uint8_t[::1] bound not None,
            const uint8_t[::1] data not None):
    """The content of what ``encrypt`` made with just these arguments, None for anything else."""
    cdef size_t sealed = data.shape[0]
    cdef size_t bound_length = bound.shape[0]
    cdef bytearray out
    cdef uint8_t *into
    cdef Aead context = Aead()
    cdef bint good
    cdef const uint8_t *with_key = <const uint8_t *><char *>key
    cdef const uint8_t *with_nonce = <const uint8_t *><char *>nonce
    cdef const uint8_t *with_bound
    _check(cipher, key, nonce)
    if sealed < AEAD_TAG:
        return None
    out = bytearray(sealed)
    into = <uint8_t *><char *>out
    with_bound = &bound[0] if bound_length else into
    with nogil:
        good = context.open(
            cipher, with_key, with_nonce, with_bound, bound_length, &data[0], sealed - AEAD_TAG, into
        )
    return bytes(out[: sealed - AEAD_TAG]) if good else None
