"""Sizes of COW stores: a store of full size never overflows, and shares add up to less than the limit."""

from __future__ import annotations

import random

from vmbackupd.job import stores

CHUNK = 65536


def chunks_needed(exceptions: int, chunk: int) -> int:
    """Chunks the kernel uses for that many exceptions, with the area it zeroes before the current one is full.

    Linux drivers/md/dm-snap-persistent.c: header, then areas of one metadata chunk and its data chunks.
    """
    per_area = chunk // 16
    full, rest = divmod(exceptions, per_area)
    areas = full + 1
    return 1 + areas + exceptions + (1 if rest == per_area - 1 else 0)


def test_a_full_store_holds_every_chunk() -> None:
    chance = random.Random(11)
    for _ in range(2000):
        chunk = chance.choice([4096, 16384, CHUNK])
        size = chance.randrange(1, 1 << 34)
        count = -(-size // chunk)
        assert stores.full_size(size, chunk) >= chunks_needed(count, chunk) * chunk


def test_shares_are_aligned_within_the_limit_and_never_useless() -> None:
    volumes = {"253:0": 100 << 30, "253:1": 1 << 30, "253:2": 1 << 20}
    given = stores.sizes(volumes, CHUNK, share=0.2)
    assert all(size % CHUNK == 0 and size >= stores.MINIMUM * CHUNK for size in given.values())
    assert given["253:0"] > 50 * given["253:1"]
    limited = stores.sizes(volumes, CHUNK, limit=1 << 30)
    assert sum(limited.values()) <= (1 << 30) + stores.MINIMUM * CHUNK * len(volumes)
    assert stores.sizes(volumes, CHUNK) == {name: stores.full_size(size, CHUNK) for name, size in volumes.items()}
