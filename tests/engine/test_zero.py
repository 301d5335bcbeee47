"""Zero detection against the reference."""

from __future__ import annotations

import random

import pytest

from vmbackupd.engine import reference
from vmbackupd.engine.zero import all_zero, zero_chunks


def test_one_bit_anywhere_is_seen() -> None:
    for length in [0, 1, 7, 63, 64, 65, 127, 128, 129, 1000]:
        data = bytearray(length)
        assert all_zero(data)
        for at in range(length):
            data[at] = 1 << (at % 8)
            assert not all_zero(data), (length, at)
            data[at] = 0


def test_bytes_around_the_range_do_not_matter() -> None:
    data = bytearray(b"\xff" * 300)
    data[100:200] = bytes(100)
    for start in range(100, 140):
        assert all_zero(memoryview(data)[start:200])
        assert not all_zero(memoryview(data)[start:201])


def test_chunks_against_the_reference(rng: random.Random) -> None:
    for _ in range(300):
        data = bytearray(rng.randrange(4000))
        for _ in range(rng.randrange(6)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        chunk = rng.choice([1, 16, 64, 100, 512, 4096])
        assert zero_chunks(data, chunk) == reference.zero_chunks(bytes(data), chunk)
    with pytest.raises(ValueError, match="chunk size 0"):
        zero_chunks(b"", 0)
