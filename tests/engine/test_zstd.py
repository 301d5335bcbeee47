"""Compression: what comes back is what went in; noise is left alone; damaged frames are refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbackupd.engine.zstd import Codec

CODEC = Codec(1, 65536)


@given(st.binary(min_size=1, max_size=5000), st.integers(1, 13))
def test_round_trip(seed: bytes, times: int) -> None:
    data = (seed * times)[:65536]
    frame = CODEC.compress(data)
    if frame is not None:
        assert len(frame) < len(data)
        assert CODEC.decompress(frame, len(data)) == data


def test_noise_is_not_compressed_but_repeated_noise_is() -> None:
    rng = random.Random(1)
    assert CODEC.compress(rng.randbytes(65536)) is None
    assert len(CODEC.compress(rng.randbytes(2048) * 32) or b"") < 4096
    assert len(CODEC.compress(b"word " * 13000) or b"") < 100


@pytest.mark.parametrize("level", [-5, 1, 3, 19])
def test_levels(level: int) -> None:
    codec = Codec(level, 65536)
    data = b"".join(b"%d: some text\n" % i for i in range(3000))[:65536]
    frame = codec.compress(data)
    assert frame is not None
    assert CODEC.decompress(frame, len(data)) == data


def test_damaged_frames() -> None:
    rng = random.Random(2)
    data = b"".join(b"%d: some text\n" % rng.randrange(1000) for _ in range(3000))
    frame = CODEC.compress(data)
    assert frame is not None
    for wrong in (len(data) - 1, len(data) + 1, 0):
        with pytest.raises(ValueError):
            CODEC.decompress(frame, wrong)
    for _ in range(300):
        damaged = bytearray(frame)
        if rng.random() < 0.3:
            damaged = damaged[: rng.randrange(len(frame))]
        else:
            damaged[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        try:
            assert len(CODEC.decompress(damaged, len(data))) == len(data)  # its content is checked by name
        except ValueError:
            pass


def test_limits() -> None:
    with pytest.raises(ValueError):
        Codec(99)
    with pytest.raises(ValueError):
        CODEC.compress(bytes(70000))
    assert CODEC.compress(b"") is None
