"""Makes dm-snapshot persistent stores, as the kernel would, for tests of what reads them."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence


def make_store(
    olds: Sequence[int], chunk: int, length: int, rng: random.Random, *, valid: int = 1
) -> tuple[bytes, dict[int, bytes]]:
    """A store of ``length`` bytes with an exception for each of ``olds``, and the old content of each."""
    per_area = chunk // 16
    store = bytearray(length)
    struct.pack_into("<4s3I", store, 0, b"SnAp", valid, 1, chunk // 512)
    contents = {}
    for i, old in enumerate(olds):
        area = 1 + (per_area + 1) * (i // per_area)
        new = area + 1 + i % per_area
        struct.pack_into("<QQ", store, area * chunk + 16 * (i % per_area), old, new)
        contents[old] = rng.randbytes(chunk)
        store[new * chunk : (new + 1) * chunk] = contents[old]
    return bytes(store), contents


def room_for(exceptions: int, chunk: int) -> int:
    """Bytes of a store with room for so many: header, areas (one more than full), data."""
    areas = exceptions // (chunk // 16) + 1
    return chunk * (1 + areas + exceptions)
