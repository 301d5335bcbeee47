/* What this machine can do at best: the work of a backup without a backup around it, on all cores, C and threads only.
 *
 *   limits compress  IMAGE CHUNK LEVEL   the image's distinct chunks, in memory, compressed with zstd
 *   limits read-hash IMAGE CHUNK         the image's data read and every chunk hashed with BLAKE3
 *   limits verify    IMAGE CHUNK LEVEL   the image's distinct chunks, compressed in memory, decompressed and hashed
 *
 * Prints: seconds, bytes that went in, bytes that came out. Loading and preparing are not timed. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

#include "blake3_kernel.h"

#define MAX_THREADS 64
#define PIECE (256u << 10) /* read at once: stays in a core's second level cache, faster than larger ones */

static const uint8_t key[32] = "limits of the machine, bench key";

typedef struct {
    uint64_t prefix; /* of its hash */
    uint8_t *data;
    uint32_t length;
    uint8_t *packed; /* compressed; NULL: stored as it is */
    uint32_t stored;
} chunk_t;

typedef struct {
    uint64_t offset;
    uint64_t length;
} extent_t;

static struct {
    int fd;
    uint64_t size;
    size_t chunk;
    int level;
    chunk_t *chunks;
    size_t count;
    extent_t *pieces;
    size_t piece_count;
    atomic_size_t next;
    atomic_ullong bytes_in, bytes_out;
} work;

static void die(const char *what)
{
    fprintf(stderr, "limits: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(1);
}

static void *need(void *memory)
{
    if (!memory)
        die("memory");
    return memory;
}

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

/* `job` on all cores this process may use; the seconds it took */
static double on_all_cores(void *(*job)(void *))
{
    pthread_t threads[MAX_THREADS];
    cpu_set_t allowed;
    int cores = sched_getaffinity(0, sizeof allowed, &allowed) ? 1 : CPU_COUNT(&allowed);
    if (cores > MAX_THREADS)
        cores = MAX_THREADS;
    atomic_store(&work.next, 0);
    double began = now();
    for (int i = 0; i < cores; i++)
        if ((errno = pthread_create(&threads[i], NULL, job, NULL)))
            die("thread");
    for (int i = 0; i < cores; i++)
        pthread_join(threads[i], NULL);
    return now() - began;
}

static void read_fully(uint8_t *into, size_t length, uint64_t offset)
{
    while (length) {
        ssize_t got = pread(work.fd, into, length, (off_t)offset);
        if (got <= 0)
            die("read");
        into += got;
        offset += (uint64_t)got;
        length -= (size_t)got;
    }
}

/* the parts of the file that are no holes, cut into pieces at multiples of PIECE */
static void find_pieces(void)
{
    size_t room = 1024;
    work.pieces = need(malloc(room * sizeof *work.pieces));
    uint64_t done = 0;
    for (off_t at = 0; (at = lseek(work.fd, at, SEEK_DATA)) >= 0;) {
        off_t end = lseek(work.fd, at, SEEK_HOLE);
        if (end < 0)
            die("SEEK_HOLE");
        uint64_t first = (uint64_t)at / work.chunk * work.chunk;
        uint64_t stop = ((uint64_t)end + work.chunk - 1) / work.chunk * work.chunk;
        if (first < done)
            first = done;
        if (stop > work.size)
            stop = work.size;
        while (first < stop) {
            uint64_t part = PIECE - first % PIECE;
            if (part > stop - first)
                part = stop - first;
            if (work.piece_count == room)
                work.pieces = need(realloc(work.pieces, (room *= 2) * sizeof *work.pieces));
            work.pieces[work.piece_count++] = (extent_t){first, part};
            first += part;
        }
        done = stop;
        at = end;
    }
}

static void *read_and_hash(void *unused)
{
    uint8_t *buffer = need(aligned_alloc(4096, PIECE)), tag[32];
    uint64_t total = 0;
    size_t number;
    (void)unused;
    while ((number = atomic_fetch_add(&work.next, 1)) < work.piece_count) {
        extent_t piece = work.pieces[number];
        read_fully(buffer, piece.length, piece.offset);
        for (uint64_t at = 0; at < piece.length; at += work.chunk) {
            size_t length = piece.length - at < work.chunk ? piece.length - at : work.chunk;
            blake3_digest(key, buffer + at, length, BLAKE3_AUTO, tag);
        }
        total += piece.length;
    }
    atomic_fetch_add(&work.bytes_in, total);
    free(buffer);
    return NULL;
}

static int by_prefix(const void *left, const void *right)
{
    uint64_t a = ((const chunk_t *)left)->prefix, b = ((const chunk_t *)right)->prefix;
    return a < b ? -1 : a > b;
}

/* the distinct chunks that are not all zeros: what a backup has to compress */
static void load_chunks(void)
{
    size_t room = 1;
    for (size_t i = 0; i < work.piece_count; i++)
        room += work.pieces[i].length / work.chunk + 1;
    work.chunks = need(calloc(room, sizeof *work.chunks));
    uint8_t *zeros = need(calloc(1, work.chunk)), tag[32];
    for (size_t i = 0; i < work.piece_count; i++)
        for (uint64_t at = 0; at < work.pieces[i].length; at += work.chunk) {
            uint64_t left = work.pieces[i].length - at;
            chunk_t *chunk = &work.chunks[work.count];
            chunk->length = (uint32_t)(left < work.chunk ? left : work.chunk);
            chunk->data = need(malloc(chunk->length));
            read_fully(chunk->data, chunk->length, work.pieces[i].offset + at);
            if (memcmp(chunk->data, zeros, chunk->length) == 0) {
                free(chunk->data);
                continue;
            }
            blake3_digest(key, chunk->data, chunk->length, BLAKE3_AUTO, tag);
            memcpy(&chunk->prefix, tag, 8);
            work.count++;
        }
    free(zeros);
    qsort(work.chunks, work.count, sizeof *work.chunks, by_prefix);
    size_t kept = 0;
    for (size_t i = 0; i < work.count; i++) {
        if (kept && work.chunks[kept - 1].prefix == work.chunks[i].prefix)
            free(work.chunks[i].data);
        else
            work.chunks[kept++] = work.chunks[i];
    }
    work.count = kept;
}

static ZSTD_CCtx *compressor(void)
{
    ZSTD_CCtx *context = need(ZSTD_createCCtx());
    ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, work.level);
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 0);
    return context;
}

static void *compress(void *keep)
{
    ZSTD_CCtx *context = compressor();
    size_t room = ZSTD_compressBound(work.chunk), number;
    uint8_t *buffer = need(malloc(room));
    uint64_t in = 0, out = 0;
    while ((number = atomic_fetch_add(&work.next, 1)) < work.count) {
        chunk_t *chunk = &work.chunks[number];
        size_t made = ZSTD_compress2(context, buffer, room, chunk->data, chunk->length);
        if (ZSTD_isError(made))
            die("zstd");
        if (made > chunk->length)
            made = chunk->length;
        in += chunk->length;
        out += made;
        chunk->stored = (uint32_t)made;
    }
    atomic_fetch_add(&work.bytes_in, in);
    atomic_fetch_add(&work.bytes_out, out);
    free(buffer);
    ZSTD_freeCCtx(context);
    return keep;
}

static void *pack(void *unused)
{
    ZSTD_CCtx *context = compressor();
    size_t room = ZSTD_compressBound(work.chunk), number;
    uint8_t *buffer = need(malloc(room));
    while ((number = atomic_fetch_add(&work.next, 1)) < work.count) {
        chunk_t *chunk = &work.chunks[number];
        size_t made = ZSTD_compress2(context, buffer, room, chunk->data, chunk->length);
        if (ZSTD_isError(made))
            die("zstd");
        chunk->stored = chunk->length;
        if (made < chunk->length - chunk->length / 32) {
            chunk->stored = (uint32_t)made;
            chunk->packed = need(malloc(made));
            memcpy(chunk->packed, buffer, made);
        }
    }
    free(buffer);
    ZSTD_freeCCtx(context);
    return unused;
}

static void *unpack_and_hash(void *unused)
{
    ZSTD_DCtx *context = need(ZSTD_createDCtx());
    uint8_t *buffer = need(malloc(work.chunk)), tag[32];
    uint64_t in = 0, out = 0;
    size_t number;
    while ((number = atomic_fetch_add(&work.next, 1)) < work.count) {
        chunk_t *chunk = &work.chunks[number];
        const uint8_t *content = chunk->data;
        if (chunk->packed) {
            if (ZSTD_decompressDCtx(context, buffer, chunk->length, chunk->packed, chunk->stored) != chunk->length)
                die("zstd");
            content = buffer;
        }
        blake3_digest(key, content, chunk->length, BLAKE3_AUTO, tag);
        if (memcmp(tag, &chunk->prefix, 8) != 0)
            die("hash");
        in += chunk->stored;
        out += chunk->length;
    }
    atomic_fetch_add(&work.bytes_in, in);
    atomic_fetch_add(&work.bytes_out, out);
    free(buffer);
    ZSTD_freeDCtx(context);
    return unused;
}

int main(int argc, char **argv)
{
    struct stat status;
    if (argc < 4) {
        fprintf(stderr, "usage: limits compress|read-hash|verify IMAGE CHUNK [LEVEL]\n");
        return 2;
    }
    work.fd = open(argv[2], O_RDONLY | O_CLOEXEC);
    if (work.fd < 0 || fstat(work.fd, &status) < 0)
        die(argv[2]);
    work.size = (uint64_t)status.st_size;
    work.chunk = strtoul(argv[3], NULL, 10);
    work.level = argc > 4 ? atoi(argv[4]) : 1;
    if (work.chunk < 1024 || work.chunk > PIECE)
        die("chunk size");
    find_pieces();
    double seconds;
    if (strcmp(argv[1], "read-hash") == 0)
        seconds = on_all_cores(read_and_hash);
    else if (strcmp(argv[1], "compress") == 0) {
        load_chunks();
        seconds = on_all_cores(compress);
    } else if (strcmp(argv[1], "verify") == 0) {
        load_chunks();
        on_all_cores(pack);
        seconds = on_all_cores(unpack_and_hash);
    } else
        die(argv[1]);
    printf("%.6f %llu %llu\n", seconds, (unsigned long long)work.bytes_in, (unsigned long long)work.bytes_out);
    return 0;
}
