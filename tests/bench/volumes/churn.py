"""Fills and changes a file in the guest. Runs there with nothing but its Python's standard library.

churn.py fill PATH PERCENT SEED    a new file in so much of the free space; each chunk half noise, half text
churn.py change PATH ONE_IN SEED   one chunk in ONE_IN gets other content, in place; prints how many
"""

import os
import random
import sys

CHUNK = 65536
TEXT = (b"a line of text like many others\n" * (CHUNK // 64))[: CHUNK // 2]


def content(rng: random.Random) -> bytes:
    """A chunk nobody has seen before."""
    return rng.getrandbits(CHUNK * 4).to_bytes(CHUNK // 2, "little") + TEXT


def fill(path: str, percent: int, seed: int) -> None:
    """Write ``percent`` of what is free where ``path`` lies."""
    room = os.statvfs(os.path.dirname(path))
    write(path, room.f_bavail * room.f_frsize * percent // 100 // CHUNK, seed)


def write(path: str, chunks: int, seed: int) -> None:
    """Write a new file of so many chunks, durably."""
    rng = random.Random(seed)
    size = chunks * CHUNK
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.posix_fallocate(descriptor, 0, size)  # one extent, so that its chunks are chunks of the disk
    for _ in range(chunks):
        os.write(descriptor, content(rng))
    os.fsync(descriptor)


def change(path: str, one_in: int, seed: int) -> int:
    """Give one chunk in ``one_in`` new content, durably; how many."""
    rng = random.Random(seed)
    descriptor = os.open(path, os.O_WRONLY)
    count = os.fstat(descriptor).st_size // CHUNK
    chosen = rng.sample(range(count), max(1, count // one_in))
    for number in chosen:
        os.pwrite(descriptor, content(rng), number * CHUNK)
    os.fsync(descriptor)
    return len(chosen)


if __name__ == "__main__":
    work, where, amount, start = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if work == "fill":
        fill(where, amount, start)
    else:
        print(change(where, amount, start))
