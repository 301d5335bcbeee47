/* BLAKE3, hash and keyed hash with 32 bytes of output, after the specification at
 * https://github.com/BLAKE3-team/BLAKE3-specs (sections 2.1 to 2.6).
 *
 * The input's 1 KiB chunks are hashed LANES at a time, each in one lane of GCC vectors, and so are the parents of each
 * level of the tree. The width is chosen at run time: 16 lanes with AVX-512, 8 with AVX2, 4 with SSE2 (any x86-64) or
 * NEON; one, without vectors, on any other machine.
 * Nothing is allocated; the stack holds less than 8 KiB a level of recursion, one level for each doubling above 64 KiB. */

#ifndef VMBACKUPD_BLAKE3_KERNEL_H
#define VMBACKUPD_BLAKE3_KERNEL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the BLAKE3 kernel reads message words in place: little-endian machines only"
#endif

enum {
    BLAKE3_CHUNK = 1024,
    BLAKE3_CHUNK_START = 1,
    BLAKE3_CHUNK_END = 2,
    BLAKE3_PARENT = 4,
    BLAKE3_ROOT = 8,
    BLAKE3_KEYED = 16,
    BLAKE3_GROUP = 64, /* chunks whose chaining values are held at once */
};

/* kernels by width, and which to take */
enum { BLAKE3_AUTO = 0, BLAKE3_PLAIN = 1, BLAKE3_LANES4 = 4, BLAKE3_LANES8 = 8, BLAKE3_LANES16 = 16 };

#define BLAKE3_IV0 0x6A09E667u
#define BLAKE3_IV1 0xBB67AE85u
#define BLAKE3_IV2 0x3C6EF372u
#define BLAKE3_IV3 0xA54FF53Au
static const uint32_t blake3_iv[8] = {BLAKE3_IV0, BLAKE3_IV1, BLAKE3_IV2, BLAKE3_IV3,
                                      0x510E527Fu, 0x9B05688Cu, 0x1F83D9ABu, 0x5BE0CD19u};

/* the message word order of each of the seven rounds */
#define BLAKE3_ROUNDS(R)                                                                                              \
    R(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);                                                           \
    R(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);                                                           \
    R(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);                                                           \
    R(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);                                                           \
    R(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);                                                           \
    R(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);                                                           \
    R(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);

/* ---- one block, one input ---- */

#define BLAKE3_ROTATE(v, n) (((v) >> (n)) | ((v) << (32 - (n))))
#define BLAKE3_G(a, b, c, d, x, y)                                                                                    \
    do {                                                                                                               \
        v[a] += v[b] + m[x];                                                                                           \
        v[d] = BLAKE3_ROTATE(v[d] ^ v[a], 16);                                                                         \
        v[c] += v[d];                                                                                                  \
        v[b] = BLAKE3_ROTATE(v[b] ^ v[c], 12);                                                                         \
        v[a] += v[b] + m[y];                                                                                           \
        v[d] = BLAKE3_ROTATE(v[d] ^ v[a], 8);                                                                          \
        v[c] += v[d];                                                                                                  \
        v[b] = BLAKE3_ROTATE(v[b] ^ v[c], 7);                                                                          \
    } while (0)
#define BLAKE3_ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)                            \
    do {                                                                                                               \
        BLAKE3_G(0, 4, 8, 12, s0, s1);                                                                                 \
        BLAKE3_G(1, 5, 9, 13, s2, s3);                                                                                 \
        BLAKE3_G(2, 6, 10, 14, s4, s5);                                                                                \
        BLAKE3_G(3, 7, 11, 15, s6, s7);                                                                                \
        BLAKE3_G(0, 5, 10, 15, s8, s9);                                                                                \
        BLAKE3_G(1, 6, 11, 12, s10, s11);                                                                              \
        BLAKE3_G(2, 7, 8, 13, s12, s13);                                                                               \
        BLAKE3_G(3, 4, 9, 14, s14, s15);                                                                               \
    } while (0)

/* `cv` becomes the chaining value after `block` (64 bytes, zero padded; `length` of them count) */
static void blake3_compress(uint32_t cv[8], const uint8_t block[64], uint32_t length, uint64_t counter, uint32_t flags)
{
    uint32_t m[16], v[16];
    memcpy(m, block, 64);
    memcpy(v, cv, 32);
    memcpy(v + 8, blake3_iv, 16);
    v[12] = (uint32_t)counter;
    v[13] = (uint32_t)(counter >> 32);
    v[14] = length;
    v[15] = flags;
    BLAKE3_ROUNDS(BLAKE3_ROUND)
    for (int i = 0; i < 8; i++)
        cv[i] = v[i] ^ v[i + 8];
}

/* a chunk of 0 to 1024 bytes */
static void blake3_chunk(const uint32_t key[8], const uint8_t *data, size_t length, uint64_t counter, uint32_t flags,
                         uint32_t last, uint8_t out[32])
{
    uint32_t cv[8], start = BLAKE3_CHUNK_START;
    memcpy(cv, key, 32);
    while (length > 64) {
        blake3_compress(cv, data, 64, counter, flags | start);
        start = 0;
        data += 64;
        length -= 64;
    }
    uint8_t block[64] = {0};
    if (length)
        memcpy(block, data, length);
    blake3_compress(cv, block, (uint32_t)length, counter, flags | start | BLAKE3_CHUNK_END | last);
    memcpy(out, cv, 32);
}

/* ---- many inputs, one in each lane ---- */

#define NAME(x) blake3_4_##x
#define LANES 4
#define ROTATE16(v) ROTATE(v, 16)
#define ROTATE8(v) ROTATE(v, 8)
#include "blake3_lanes.h"
#undef NAME
#undef LANES
#undef ROTATE16
#undef ROTATE8

/* only GCC can be told by a pragma which instructions a part of a file may use */
#if defined(__x86_64__) && !defined(__clang__)
#define BLAKE3_WIDE
#pragma GCC push_options
#pragma GCC target("avx2")
#define NAME(x) blake3_8_##x
#define LANES 8
/* whole bytes: one vpshufb instead of two shifts and an or */
#define BLAKE3_BYTES(v, o)                                                                                            \
    ((blake3_8_vector)__builtin_shuffle(                                                                               \
        (blake3_8_bytes)(v),                                                                                           \
        (blake3_8_bytes){(o) & 3,        (1 + (o)) & 3,        (2 + (o)) & 3,        (3 + (o)) & 3,                    \
                         4 + ((o) & 3),  4 + ((1 + (o)) & 3),  4 + ((2 + (o)) & 3),  4 + ((3 + (o)) & 3),              \
                         8 + ((o) & 3),  8 + ((1 + (o)) & 3),  8 + ((2 + (o)) & 3),  8 + ((3 + (o)) & 3),              \
                         12 + ((o) & 3), 12 + ((1 + (o)) & 3), 12 + ((2 + (o)) & 3), 12 + ((3 + (o)) & 3),             \
                         16 + ((o) & 3), 16 + ((1 + (o)) & 3), 16 + ((2 + (o)) & 3), 16 + ((3 + (o)) & 3),             \
                         20 + ((o) & 3), 20 + ((1 + (o)) & 3), 20 + ((2 + (o)) & 3), 20 + ((3 + (o)) & 3),             \
                         24 + ((o) & 3), 24 + ((1 + (o)) & 3), 24 + ((2 + (o)) & 3), 24 + ((3 + (o)) & 3),             \
                         28 + ((o) & 3), 28 + ((1 + (o)) & 3), 28 + ((2 + (o)) & 3), 28 + ((3 + (o)) & 3)}))
#define ROTATE16(v) BLAKE3_BYTES(v, 2)
#define ROTATE8(v) BLAKE3_BYTES(v, 1)
#include "blake3_lanes.h"
#undef NAME
#undef LANES
#undef ROTATE16
#undef ROTATE8
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,prefer-vector-width=512")
#define NAME(x) blake3_16_##x
#define LANES 16
#define ROTATE16(v) ROTATE(v, 16)
#define ROTATE8(v) ROTATE(v, 8)
#include "blake3_lanes.h"
#undef NAME
#undef LANES
#undef ROTATE16
#undef ROTATE8
#pragma GCC pop_options
#endif

/* the widest kernel of this machine */
static int blake3_widest(void)
{
#if defined(BLAKE3_WIDE)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
        return BLAKE3_LANES16;
    if (__builtin_cpu_supports("avx2"))
        return BLAKE3_LANES8;
    return BLAKE3_LANES4;
#elif defined(__ARM_NEON) || defined(__ALTIVEC__)
    return BLAKE3_LANES4;
#else
    return BLAKE3_PLAIN;
#endif
}

typedef struct {
    uint32_t key[8];
    uint32_t flags; /* of every block: BLAKE3_KEYED or 0 */
    int lanes;
} blake3_state;

/* `count` inputs of `blocks` blocks, `stride` bytes apart -> `count` chaining values; `out` may be `data` (parents) */
static void blake3_many(const blake3_state *state, const uint8_t *data, size_t count, size_t stride, int blocks,
                        uint64_t counter, int step, uint32_t flags, uint32_t first, uint32_t last, uint8_t *out)
{
    uint8_t made[32 * 16];
    const uint8_t *inputs[16];
    flags |= state->flags;
    if (state->lanes == BLAKE3_PLAIN) {
        for (; count > 0; count--, data += stride, counter += (uint64_t)step, out += 32) {
            uint32_t cv[8];
            memcpy(cv, state->key, 32);
            for (int block = 0; block < blocks; block++)
                blake3_compress(cv, data + 64 * block, 64, counter,
                                flags | (block == 0 ? first : 0) | (block == blocks - 1 ? last : 0));
            memcpy(out, cv, 32);
        }
        return;
    }
    while (count > 0) {
        int lanes = state->lanes;
        /* half-empty vectors cost as much as full ones */
        while (lanes > 4 && count * 2 <= (size_t)lanes)
            lanes /= 2;
        size_t used = count < (size_t)lanes ? count : (size_t)lanes;
        for (int i = 0; i < lanes; i++)
            inputs[i] = data + stride * ((size_t)i < used ? (size_t)i : used - 1);
#if defined(BLAKE3_WIDE)
        if (lanes == 16)
            blake3_16_hash(inputs, blocks, state->key, counter, step, flags, first, last, made);
        else if (lanes == 8)
            blake3_8_hash(inputs, blocks, state->key, counter, step, flags, first, last, made);
        else
#endif
            blake3_4_hash(inputs, blocks, state->key, counter, step, flags, first, last, made);
        memcpy(out, made, 32 * used);
        out += 32 * used;
        data += stride * used;
        counter += (uint64_t)step * used;
        count -= used;
    }
}

/* ---- the tree ---- */

static void blake3_subtree(const blake3_state *state, const uint8_t *data, size_t length, uint64_t counter,
                           uint8_t out[32]);

/* more than one chunk -> the two chaining values below the top of their tree */
static void blake3_pair(const blake3_state *state, const uint8_t *data, size_t length, uint64_t counter, uint8_t out[64])
{
    size_t chunks = length / BLAKE3_CHUNK + (length % BLAKE3_CHUNK != 0);
    if (chunks > BLAKE3_GROUP) {
        /* left: the largest power of two chunks that leaves at least one byte on the right */
        size_t left = BLAKE3_GROUP;
        while (left * 2 < chunks)
            left *= 2;
        blake3_subtree(state, data, left * BLAKE3_CHUNK, counter, out);
        blake3_subtree(state, data + left * BLAKE3_CHUNK, length - left * BLAKE3_CHUNK, counter + left, out + 32);
        return;
    }
    uint8_t values[32 * BLAKE3_GROUP];
    size_t whole = length / BLAKE3_CHUNK, count = chunks;
    blake3_many(state, data, whole, BLAKE3_CHUNK, 16, counter, 1, 0, BLAKE3_CHUNK_START, BLAKE3_CHUNK_END, values);
    if (whole < chunks)
        blake3_chunk(state->key, data + whole * BLAKE3_CHUNK, length % BLAKE3_CHUNK, counter + whole, state->flags, 0,
                     values + 32 * whole);
    while (count > 2) {
        /* neighbours are paired, an odd last one moves up: the same tree as "left is the largest power of two" */
        blake3_many(state, values, count / 2, 64, 1, 0, 0, BLAKE3_PARENT, 0, 0, values);
        if (count % 2)
            memmove(values + 32 * (count / 2), values + 32 * (count - 1), 32);
        count = count / 2 + count % 2;
    }
    memcpy(out, values, 64);
}

static void blake3_subtree(const blake3_state *state, const uint8_t *data, size_t length, uint64_t counter,
                           uint8_t out[32])
{
    uint8_t pair[64];
    uint32_t cv[8];
    if (length <= BLAKE3_CHUNK) {
        blake3_chunk(state->key, data, length, counter, state->flags, 0, out);
        return;
    }
    blake3_pair(state, data, length, counter, pair);
    memcpy(cv, state->key, 32);
    blake3_compress(cv, pair, 64, 0, state->flags | BLAKE3_PARENT);
    memcpy(out, cv, 32);
}

/* `key` may be NULL for the plain hash; `lanes` is a kernel this machine has, or BLAKE3_AUTO */
static void blake3_digest(const uint8_t key[32], const uint8_t *data, size_t length, int lanes, uint8_t out[32])
{
    blake3_state state;
    uint8_t pair[64];
    memcpy(state.key, key ? (const void *)key : (const void *)blake3_iv, 32);
    state.flags = key ? BLAKE3_KEYED : 0;
    state.lanes = lanes == BLAKE3_AUTO ? blake3_widest() : lanes;
    if (length <= BLAKE3_CHUNK) {
        blake3_chunk(state.key, data, length, 0, state.flags, BLAKE3_ROOT, out);
        return;
    }
    blake3_pair(&state, data, length, 0, pair);
    blake3_compress(state.key, pair, 64, 0, state.flags | BLAKE3_PARENT | BLAKE3_ROOT);
    memcpy(out, state.key, 32);
}

#endif
