"""The COW store parser: against the reference, on good stores, and on stores that somebody damaged."""

from __future__ import annotations

import random
import struct

import pytest

from tests.engine.stores import make_store, room_for
from vmbackupd.engine import reference
from vmbackupd.engine.cowstore import CowStore
from vmbackupd.errors import StoreCorrupt

CHUNK = 512  # the smallest: 32 exceptions an area, so that areas fill up quickly


def open_store(data: bytes, origin_size: int) -> CowStore:
    return CowStore(lambda offset, length: data[offset : offset + length], len(data), origin_size)


def random_store(rng: random.Random) -> tuple[bytes, int, list[int]]:
    chunk = rng.choice([512, 512, 1024, 4096])
    count = rng.choice([0, 1, 31, 32, 33, 64, rng.randrange(200)])
    origin_chunks = rng.randrange(count, count + 300) or 1
    origin_size = origin_chunks * chunk - rng.choice([0, 0, rng.randrange(chunk)])
    olds = rng.sample(range(origin_chunks), count)
    length = room_for(count, chunk) + chunk * rng.randrange(5) + rng.choice([0, rng.randrange(chunk)])
    return make_store(olds, chunk, length, rng)[0], origin_size, olds


def verdict(data: bytes, origin_size: int) -> list[tuple[int, int]] | None:
    """The parse, or None for StoreCorrupt; anything else that is raised fails the test."""
    try:
        return list(open_store(data, origin_size).exceptions())
    except StoreCorrupt as error:
        assert str(error).startswith("COW store: ")
        return None


def reference_verdict(data: bytes, origin_size: int) -> list[tuple[int, int]] | None:
    try:
        return reference.parse_store(data, origin_size)
    except StoreCorrupt:
        return None


def test_good_stores(rng: random.Random) -> None:
    for _ in range(150):
        data, origin_size, olds = random_store(rng)
        store = open_store(data, origin_size)
        assert [old for old, _ in store.exceptions()] == olds
        assert list(store.exceptions()) == reference.parse_store(data, origin_size)
        assert store.count == len(store) == len(olds)
        assert [(store.old(i), store.new(i)) for i in range(len(olds))] == list(store.exceptions())
        for index in (-1, len(olds)):
            with pytest.raises(IndexError):
                store.old(index)


def test_areas_are_read_when_needed(rng: random.Random) -> None:
    data, _ = make_store([5, 3], 4096, 1 << 20, rng)
    reads: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    store = CowStore(read, len(data), 1 << 20)
    assert (store.chunk_size, reads) == (4096, [(0, 16)])
    assert store.count == 2
    assert store.new(1) == 3
    assert reads == [(0, 16), (4096, 4096)]


def test_truncated_anywhere(rng: random.Random) -> None:
    data, origin_size, _ = random_store(rng)
    for _ in range(300):
        cut = data[: rng.randrange(len(data))]
        assert verdict(cut, origin_size) == reference_verdict(cut, origin_size)
        # the length is as it should be, the bytes are not there
        store_length = len(data)
        try:
            CowStore(lambda at, n, cut=cut: cut[at : at + n], store_length, origin_size).count  # noqa: B018
        except StoreCorrupt:
            pass


def test_flipped_bits(rng: random.Random) -> None:
    """Any damage to the metadata: StoreCorrupt or a valid parse, and the same as the reference's."""
    corrupt = 0
    for _ in range(60):
        data, origin_size, _ = random_store(rng)
        chunk = struct.unpack_from("<I", data, 12)[0] * 512
        area_bytes = (chunk // 16 + 1) * chunk
        places = [at for at in range(len(data)) if at < 16 or (at - chunk) % area_bytes < chunk <= at]
        for _ in range(40):
            damaged = bytearray(data)
            for _ in range(rng.choice([1, 1, 1, 2, 8])):
                damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
            got = verdict(bytes(damaged), origin_size)
            assert got == reference_verdict(bytes(damaged), origin_size)
            corrupt += got is None
    assert corrupt > 1000


def test_noise(rng: random.Random) -> None:
    """A right header and random bytes after it."""
    for _ in range(200):
        data = bytearray(rng.randbytes(rng.randrange(16, 40_000)))
        struct.pack_into("<4s3I", data, 0, b"SnAp", 1, 1, rng.choice([1, 2, 8]))
        assert verdict(bytes(data), 1 << 40) == reference_verdict(bytes(data), 1 << 40)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ((b"SnAq", 1, 1, 1), "no snapshot store"),
        ((bytes(4), 1, 1, 1), "no snapshot store"),
        ((b"SnAp", 0, 1, 1), "marked invalid"),
        ((b"SnAp", 2, 1, 1), "marked invalid"),
        ((b"SnAp", 1, 2, 1), "version 2"),
        ((b"SnAp", 1, 1, 0), "power of two"),
        ((b"SnAp", 1, 1, 3), "power of two"),
        ((b"SnAp", 1, 1, 65536), "power of two"),
        ((b"SnAp", 1, 1, 0x80000000), "power of two"),
        ((b"SnAp", 1, 1, 16384), "no room"),
    ],
)
def test_headers(fields: tuple[bytes, int, int, int], sentence: str) -> None:
    data = struct.pack("<4s3I", *fields).ljust(1 << 16, b"\0")
    with pytest.raises(StoreCorrupt, match=sentence):
        open_store(data, 1 << 20)


def damaged_entry(rng: random.Random, entry: int, old: int, new: int) -> bytes:
    data = bytearray(make_store(range(40), CHUNK, room_for(40, CHUNK), rng)[0])
    struct.pack_into("<QQ", data, CHUNK + 16 * entry, old, new)
    return bytes(data)


@pytest.mark.parametrize(
    ("entry", "old", "new", "sentence"),
    [
        (3, 3, 6, "its place is 5"),
        (3, 3, 1 << 63, "its place is 5"),
        (3, 4, 5, "more than one exception"),
        (3, 100, 5, "beyond the volume's end"),
        (3, 2**64 - 1, 5, "beyond the volume's end"),
        (3, 3, 0, "bytes after the end"),
        (3, 0, 0, "bytes after the end"),
    ],
)
def test_entries(rng: random.Random, entry: int, old: int, new: int, sentence: str) -> None:
    with pytest.raises(StoreCorrupt, match=sentence):
        open_store(damaged_entry(rng, entry, old, new), 100 * CHUNK).count  # noqa: B018


def test_a_full_area_at_the_end_of_the_store(rng: random.Random) -> None:
    """The kernel zeroes the next area before it commits a full one; a store without that area was not made by it."""
    data, _ = make_store(range(32), CHUNK, room_for(32, CHUNK), rng)
    assert open_store(data, 100 * CHUNK).count == 32
    with pytest.raises(StoreCorrupt, match="it ends at byte"):
        open_store(data[:-CHUNK], 100 * CHUNK).count  # noqa: B018


def test_more_exceptions_than_the_origin_has_chunks(rng: random.Random) -> None:
    data, _ = make_store(range(40), CHUNK, room_for(40, CHUNK), rng)
    damaged = bytearray(data)
    for entry in range(32):
        struct.pack_into("<Q", damaged, CHUNK + 16 * entry, 0)
    with pytest.raises(StoreCorrupt, match="more exceptions than"):
        open_store(bytes(damaged), 10 * CHUNK).count  # noqa: B018


def test_what_read_raises_passes_through() -> None:
    def read(offset: int, length: int) -> bytes:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        CowStore(read, 1 << 20, 1 << 20)


def test_impossible_sizes() -> None:
    for length, origin in [(-1, 1), (1, -1), (1 << 63, 1), (1, 1 << 64)]:
        with pytest.raises(ValueError, match="bytes"):
            CowStore(lambda at, n: bytes(n), length, origin)
