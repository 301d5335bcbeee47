"""Our BLAKE3 kernels against the official implementation and its published vectors."""

from __future__ import annotations

import random

import pytest

from vmbackupd.engine import blake3

official = pytest.importorskip("blake3")

KEY = b"whats the Elvish word for friend"
# https://github.com/BLAKE3-team/BLAKE3/blob/master/test_vectors/test_vectors.json: input is 0, 1, ... 250, 0, 1, ...
VECTORS = {
    0: (
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26",
    ),
    1: (
        "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
        "6d7878dfff2f485635d39013278ae14f1454b8c0a3a2d34bc1ab38228a80c95b",
    ),
}
LENGTHS = [0, 1, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 4095, 4096, 4097, 8192, 8193, 16383]
LENGTHS += [16384, 16385, 31744, 65535, 65536, 65537, 66560, 98304, 100 * 1024, 131072, 131073, 300_000, 1 << 20]


def pattern(length: int) -> bytes:
    return bytes(i % 251 for i in range(length))


@pytest.mark.parametrize("length", VECTORS)
def test_published_vectors(length: int) -> None:
    plain, keyed = VECTORS[length]
    for lanes in blake3.kernels():
        assert blake3.digest(pattern(length), lanes=lanes).hex() == plain
        assert blake3.keyed_hash(KEY, pattern(length), lanes=lanes).hex() == keyed


@pytest.mark.parametrize("lanes", [0, *blake3.kernels()])
def test_every_kernel_at_the_borders(lanes: int) -> None:
    for length in LENGTHS:
        data = pattern(length)
        assert blake3.digest(data, lanes=lanes) == official.blake3(data).digest(), length
        assert blake3.keyed_hash(KEY, data, lanes=lanes) == official.blake3(data, key=KEY).digest(), length


@pytest.mark.parametrize("lanes", [0, *blake3.kernels()])
def test_every_kernel_on_random_input(lanes: int, rng: random.Random) -> None:
    for _ in range(300):
        # an odd start as well: nothing may rely on alignment
        data = memoryview(rng.randbytes(rng.randrange(100 * 1024)))[rng.randrange(3) :]
        key = rng.randbytes(32)
        assert blake3.keyed_hash(key, data, lanes=lanes) == official.blake3(data, key=key).digest(), len(data)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        blake3.keyed_hash(bytes(31), b"")
    with pytest.raises(ValueError, match="no kernel of 5 lanes"):
        blake3.digest(b"", lanes=5)
