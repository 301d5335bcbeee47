"""The bounds-checked reader."""

from __future__ import annotations

import random
import struct

import pytest

from vmbackupd.engine.cursor import Reader

FORMATS = {"u8": "<B", "u16le": "<H", "u32le": "<I", "u64le": "<Q", "u16be": ">H", "u32be": ">I", "u64be": ">Q"}


def test_reads_what_struct_reads(rng: random.Random) -> None:
    for _ in range(200):
        names = rng.choices(list(FORMATS), k=10)
        values = [rng.randrange(256 ** struct.calcsize(FORMATS[name])) for name in names]
        data = b"".join(struct.pack(FORMATS[name], value) for name, value in zip(names, values, strict=True))
        reader = Reader(data)
        assert [getattr(reader, name)() for name in names] == values
        assert reader.remaining == 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_read_beyond_the_end_moves_nothing(name: str) -> None:
    size = struct.calcsize(FORMATS[name])
    reader = Reader(bytes(size + size - 1))
    getattr(reader, name)()
    with pytest.raises(ValueError, match="beyond the end"):
        getattr(reader, name)()
    assert reader.remaining == size - 1


def test_take_and_seek() -> None:
    reader = Reader(b"abcdef")
    assert reader.take(2) == b"ab"
    reader.seek(6)
    assert reader.take(0) == b""
    with pytest.raises(ValueError, match="beyond"):
        reader.seek(7)
    with pytest.raises(ValueError, match="beyond"):
        reader.take(2**64 - 1)
    reader.seek(1)
    assert reader.take(5) == b"bcdef"
