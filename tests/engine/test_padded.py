"""Padded images: the image, then zeros."""

from __future__ import annotations

import random

import pytest

from vmbackupd.engine.memory import MemorySource
from vmbackupd.engine.padded import PaddedSource
from vmbackupd.engine.readable import ReadableSource


def test_the_image_and_then_zeros(rng: random.Random) -> None:
    for _ in range(100):
        size = rng.randrange(1000)
        image = bytearray(rng.randbytes(size))
        if rng.random() < 0.5:
            image[size // 2 :] = bytes(size - size // 2)
        padded = PaddedSource(MemorySource.over(bytes(image), 64), size + rng.randrange(64))
        source = ReadableSource(padded)
        expected = bytes(image) + bytes(source.size - size)
        assert source.read(0, source.size) == expected
        at = 0
        for offset, length, data in source.extents(0, source.size):
            assert offset == at and (data or not any(expected[at : at + length]))
            at += length
        assert at == source.size


@pytest.mark.parametrize("size", [99, 164, 1 << 40])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="100 bytes in chunks of 64 are not padded"):
        PaddedSource(MemorySource(100, 64), size)
