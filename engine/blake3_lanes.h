/* Several BLAKE3 inputs at once, one in each lane of a vector: a template.
 *
 * blake3_kernel.h includes this file once for each width, with
 *   LANES      4, 8 or 16
 *   NAME(x)    the name of this instance's symbols
 *   ROTATE8(v), ROTATE16(v)   a rotation right, in the way this width does best
 * No include guard: that is the point. */

#define VECTOR NAME(vector)

typedef uint32_t VECTOR __attribute__((vector_size(4 * LANES)));
typedef uint8_t NAME(bytes) __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE VECTOR NAME(splat)(uint32_t value)
{
    return (VECTOR){0} + value;
}

#if LANES == 4
#define SHUFFLE(a, b, w, x, y, z) __builtin_shufflevector(a, b, w, x, y, z)
#define UNPACK_LO32(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define UNPACK_HI32(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define UNPACK_LO64(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define UNPACK_HI64(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#elif LANES == 8
#define UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define UNPACK_LO32(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define UNPACK_HI32(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define UNPACK_LO64(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define UNPACK_HI64(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#endif

/* rows[i] = LANES words of input i  ->  rows[j] = word j of every input */
INLINE void NAME(transpose)(VECTOR rows[LANES])
{
    VECTOR quad[LANES]; /* quad[4g + k], 128-bit part q: column 4q + k of rows 4g..4g+3 */
#pragma GCC unroll 4
    for (int g = 0; g < LANES; g += 4) {
        VECTOR low_ab = UNPACK_LO32(rows[g], rows[g + 1]), high_ab = UNPACK_HI32(rows[g], rows[g + 1]);
        VECTOR low_cd = UNPACK_LO32(rows[g + 2], rows[g + 3]), high_cd = UNPACK_HI32(rows[g + 2], rows[g + 3]);
        quad[g] = UNPACK_LO64(low_ab, low_cd);
        quad[g + 1] = UNPACK_HI64(low_ab, low_cd);
        quad[g + 2] = UNPACK_LO64(high_ab, high_cd);
        quad[g + 3] = UNPACK_HI64(high_ab, high_cd);
    }
#if LANES == 4
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
        rows[k] = quad[k];
#elif LANES == 8
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        rows[k] = __builtin_shufflevector(quad[k], quad[4 + k], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[4 + k] = __builtin_shufflevector(quad[k], quad[4 + k], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        /* 128-bit parts, two inputs a step: even parts and odd parts, then again */
        VECTOR low01 = __builtin_shufflevector(quad[k], quad[4 + k], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25,
                                               26, 27);
        VECTOR high01 = __builtin_shufflevector(quad[k], quad[4 + k], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28,
                                                29, 30, 31);
        VECTOR low23 = __builtin_shufflevector(quad[8 + k], quad[12 + k], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19,
                                               24, 25, 26, 27);
        VECTOR high23 = __builtin_shufflevector(quad[8 + k], quad[12 + k], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23,
                                                28, 29, 30, 31);
        rows[k] = __builtin_shufflevector(low01, low23, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        rows[8 + k] = __builtin_shufflevector(low01, low23, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,
                                              31);
        rows[4 + k] = __builtin_shufflevector(high01, high23, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26,
                                              27);
        rows[12 + k] = __builtin_shufflevector(high01, high23, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30,
                                               31);
    }
#endif
}

INLINE VECTOR NAME(load)(const uint8_t *from)
{
    VECTOR value;
    memcpy(&value, from, sizeof value);
    return value;
}

#define ROTATE(v, n) (((v) >> (n)) | ((v) << (32 - (n))))

#define G(a, b, c, d, x, y)                                                                                           \
    do {                                                                                                               \
        v[a] += v[b] + m[x];                                                                                           \
        v[d] = ROTATE16(v[d] ^ v[a]);                                                                                  \
        v[c] += v[d];                                                                                                  \
        v[b] = ROTATE(v[b] ^ v[c], 12);                                                                                \
        v[a] += v[b] + m[y];                                                                                           \
        v[d] = ROTATE8(v[d] ^ v[a]);                                                                                   \
        v[c] += v[d];                                                                                                  \
        v[b] = ROTATE(v[b] ^ v[c], 7);                                                                                 \
    } while (0)

#define ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)                                   \
    do {                                                                                                               \
        G(0, 4, 8, 12, s0, s1);                                                                                        \
        G(1, 5, 9, 13, s2, s3);                                                                                        \
        G(2, 6, 10, 14, s4, s5);                                                                                       \
        G(3, 7, 11, 15, s6, s7);                                                                                       \
        G(0, 5, 10, 15, s8, s9);                                                                                       \
        G(1, 6, 11, 12, s10, s11);                                                                                     \
        G(2, 7, 8, 13, s12, s13);                                                                                      \
        G(3, 4, 9, 14, s14, s15);                                                                                      \
    } while (0)

/* LANES inputs of `blocks` whole 64-byte blocks each -> LANES chaining values, 32 bytes each, one after the other.
 * Input i has chunk counter `counter + i * step`. `first` and `last` are flags of the first and the last block. */
static void NAME(hash)(const uint8_t *const inputs[LANES], int blocks, const uint32_t key[8], uint64_t counter,
                       int step, uint32_t flags, uint32_t first, uint32_t last, uint8_t *out)
{
    VECTOR h[8], counter_low = NAME(splat)(0), counter_high = NAME(splat)(0);
    for (int i = 0; i < LANES; i++) {
        uint64_t value = counter + (uint64_t)(step * i);
        counter_low[i] = (uint32_t)value;
        counter_high[i] = (uint32_t)(value >> 32);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        h[i] = NAME(splat)(key[i]);

    for (int block = 0; block < blocks; block++) {
        VECTOR m[16], v[16];
#pragma GCC unroll 4
        for (int part = 0; part < 16; part += LANES) {
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                m[part + i] = NAME(load)(inputs[i] + 64 * block + 4 * part);
            NAME(transpose)(m + part);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            v[i] = h[i];
        v[8] = NAME(splat)(BLAKE3_IV0);
        v[9] = NAME(splat)(BLAKE3_IV1);
        v[10] = NAME(splat)(BLAKE3_IV2);
        v[11] = NAME(splat)(BLAKE3_IV3);
        v[12] = counter_low;
        v[13] = counter_high;
        v[14] = NAME(splat)(64);
        v[15] = NAME(splat)(flags | (block == 0 ? first : 0) | (block == blocks - 1 ? last : 0));
        BLAKE3_ROUNDS(ROUND)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            h[i] = v[i] ^ v[i + 8];
    }

    uint32_t words[8][LANES];
    memcpy(words, h, sizeof words);
    for (int i = 0; i < LANES; i++)
        for (int word = 0; word < 8; word++)
            memcpy(out + 32 * i + 4 * word, &words[word][i], 4);
}

#undef VECTOR
#undef INLINE
#undef SHUFFLE
#undef UNPACK_LO32
#undef UNPACK_HI32
#undef UNPACK_LO64
#undef UNPACK_HI64
#undef ROTATE
#undef G
#undef ROUND
