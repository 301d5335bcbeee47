"""zstd through libzstd's C API. A frame carries neither checksum nor dictionary id: the chunk's name is the checksum."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from vmbackupd.engine.aead cimport Aead

cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_CCtx:
        pass
    ctypedef struct ZSTD_DCtx:
        pass
    ctypedef enum ZSTD_cParameter:
        ZSTD_c_compressionLevel
        ZSTD_c_hashLog
        ZSTD_c_contentSizeFlag
        ZSTD_c_checksumFlag
    ZSTD_CCtx *ZSTD_createCCtx()
    size_t ZSTD_freeCCtx(ZSTD_CCtx *)
    ZSTD_DCtx *ZSTD_createDCtx()
    size_t ZSTD_freeDCtx(ZSTD_DCtx *)
    size_t ZSTD_CCtx_setParameter(ZSTD_CCtx *, ZSTD_cParameter, int)
    size_t ZSTD_compress2(ZSTD_CCtx *, void *, size_t, const void *, size_t)
    size_t ZSTD_decompressDCtx(ZSTD_DCtx *, void *, size_t, const void *, size_t)
    size_t ZSTD_compressBound(size_t)
    unsigned ZSTD_isError(size_t)
    int ZSTD_minCLevel()
    int ZSTD_maxCLevel()

cdef enum:
    SAMPLES = 8              # places looked at, spread over the chunk
    SAMPLE = 128             # bytes at each of them
    TRIAL = 8192             # bytes compressed to see whether more would be worth it
    WORTH_A_TEST = 32768     # shorter content is compressed without asking
    SMALL = 128 << 10        # contents up to here are compressed with a smaller table at level 1:
    SMALL_TABLE = 12         # 2^12 entries, half of what zstd takes: 8 % faster, 0.5 % more bytes (docs/performance.md)


cdef class Codec:
    """A compressor and a decompressor with their memory."""

    def __cinit__(self, int level=1, size_t largest=65536):
        if not ZSTD_minCLevel() <= level <= ZSTD_maxCLevel():
            raise ValueError(f"zstd level {level} is not between {ZSTD_minCLevel()} and {ZSTD_maxCLevel()}")
        self.level = level
        self.aead = Aead()
        self.capacity = ZSTD_compressBound(largest)
        self.room = <uint8_t *>malloc(self.capacity)
        if self.room == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.room)
        ZSTD_freeCCtx(<ZSTD_CCtx *>self.compressor)
        ZSTD_freeDCtx(<ZSTD_DCtx *>self.decompressor)

    cdef Py_ssize_t pack(self, const uint8_t *data, size_t length) noexcept nogil:
        cdef size_t made
        if self.compressor == NULL:
            self.compressor = ZSTD_createCCtx()
            if self.compressor == NULL:
                return -1
            ZSTD_CCtx_setParameter(<ZSTD_CCtx *>self.compressor, ZSTD_c_compressionLevel, self.level)
            ZSTD_CCtx_setParameter(<ZSTD_CCtx *>self.compressor, ZSTD_c_checksumFlag, 0)
            if self.level == 1 and self.capacity <= ZSTD_compressBound(SMALL):
                ZSTD_CCtx_setParameter(<ZSTD_CCtx *>self.compressor, ZSTD_c_hashLog, SMALL_TABLE)
        if length >= WORTH_A_TEST and _looks_random(data, length):
            # Bytes of even frequency may still repeat (a file stored twice, ciphertext with a period): try a part.
            made = ZSTD_compress2(
                <ZSTD_CCtx *>self.compressor, self.room, self.capacity, data + (length - TRIAL) // 2, TRIAL
            )
            if ZSTD_isError(made) or made > TRIAL - TRIAL // 16:
                return 0
        made = ZSTD_compress2(<ZSTD_CCtx *>self.compressor, self.room, self.capacity, data, length)
        if ZSTD_isError(made) or made >= length - length // 32:
            return 0
        return <Py_ssize_t>made

    cdef bint unpack(self, const uint8_t *data, size_t stored, uint8_t *into, size_t length) noexcept nogil:
        cdef size_t made
        if self.decompressor == NULL:
            self.decompressor = ZSTD_createDCtx()
            if self.decompressor == NULL:
                return False
        made = ZSTD_decompressDCtx(<ZSTD_DCtx *>self.decompressor, into, length, data, stored)
        return not ZSTD_isError(made) and made == length

    def compress(self, const uint8_t[::1] data not None):
        """The frame, or None where ``data`` does not shrink enough to be worth it. ``len(data)`` <= ``largest``."""
        cdef Py_ssize_t made
        cdef size_t length = data.shape[0]
        if length == 0:
            return None
        if ZSTD_compressBound(length) > self.capacity:
            raise ValueError(f"{length} bytes are more than this codec was made for")
        with nogil:
            made = self.pack(&data[0], length)
        if made < 0:
            raise MemoryError
        return self.room[:made] if made else None

    def decompress(self, const uint8_t[::1] data not None, size_t length):
        """``length`` bytes of content out of one frame; ValueError if the frame is damaged or holds anything else."""
        cdef bytearray out = bytearray(length)
        cdef uint8_t *into = <uint8_t *><char *>out
        cdef size_t stored = data.shape[0]
        cdef bint good
        if stored == 0:
            raise ValueError("an empty zstd frame")
        with nogil:
            good = self.unpack(&data[0], stored, into, length)
        if not good:
            raise ValueError(f"damaged zstd frame, or not {length} bytes of content")
        return bytes(out)


# Are the bytes' frequencies those of noise? Looks at 1 KiB in 8 places: about 1 us, against 18 us at level 1 and much more
# at higher ones for compressing 64 KiB of noise in vain.
cdef bint _looks_random(const uint8_t *data, size_t length) noexcept nogil:
    cdef uint32_t counts[256]
    cdef size_t step = (length - SAMPLE) // (SAMPLES - 1)
    cdef size_t place, i
    cdef const uint8_t *at
    cdef double squares = 0
    memset(counts, 0, sizeof(counts))
    for place in range(SAMPLES):
        at = data + place * step
        for i in range(SAMPLE):
            counts[at[i]] += 1
    # The collision probability instead of the entropy: no logarithms. Noise gives 1/256 + 1/1024.
    for i in range(256):
        squares += <double>counts[i] * counts[i]
    return squares < 1.5 * (SAMPLES * SAMPLE) * (<double>(SAMPLES * SAMPLE) / 256.0 + 1)
