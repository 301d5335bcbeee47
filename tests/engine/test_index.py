"""Index files: every name is found where it was put and no other is; damage is noticed, never believed."""

from __future__ import annotations

import random
import struct
import threading

import pytest

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.engine.index import BlockCache, EntryTable, IndexFile, IndexSet, encode_entries, pack_entries
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository.catalog import spill_file

KEY = bytes(range(32))
REPOSITORY = b"r" * 16
INDEX = b"i" * 16


def entry(name: bytes, offset: int, stored: int, raw: int, kind: int, pack: int = 0) -> bytes:
    return struct.pack("<32sIIII", name, pack, offset, stored, raw | kind << 24)


def filled(rng: random.Random, count: int, *, clashes: bool = False) -> dict[bytes, tuple[bytes, int, int, int, int]]:
    """Names and where they lie; with ``clashes`` many share their first 8 bytes."""
    result = {}
    for _ in range(count):
        name = rng.choice([b"a" * 8, b"\0" * 8, b"\xff" * 8]) + rng.randbytes(24) if clashes else rng.randbytes(32)
        pack = bytes([rng.randrange(5)]) * 16
        result[name] = (pack, 64 + rng.randrange(2**20), rng.randrange(1, 65536), rng.randrange(1, 65537), 1)
    return result


def file_of(content: dict[bytes, tuple[bytes, int, int, int, int]]) -> bytes:
    packs = sorted({where[0] for where in content.values()})
    table = EntryTable()
    for number, pack in enumerate(packs):
        own = [entry(name, *where[1:]) for name, where in content.items() if where[0] == pack]
        table.add_pack(b"".join(own), number, 2**31, "pack")
    assert len(table) == len(content)
    return b"".join(table.encode(KEY, REPOSITORY, INDEX, packs))


def opened(data: bytes) -> IndexFile:
    return IndexFile(spill_file([data]), KEY, REPOSITORY, "test", INDEX)


@pytest.mark.parametrize(
    ("count", "clashes"), [(0, False), (1, False), (85, False), (86, False), (5000, False), (700, True)]
)
def test_finds_what_was_put(count: int, clashes: bool) -> None:
    rng = random.Random(count)
    content = filled(rng, count, clashes=clashes)
    file = opened(file_of(content))
    index = IndexSet([file])
    file.check()
    assert len(index) == file.count == len(content)
    for name, where in content.items():
        assert index.lookup(name) == where
    for name in filled(rng, 300, clashes=clashes):
        assert index.lookup(name) == content.get(name)
    assert [name for name, _, _ in file.names()] == sorted(content)
    assert sorted(file.pack_ids()) == sorted({where[0] for where in content.values()})


def test_several_files_and_threads() -> None:
    rng = random.Random(3)
    parts = [filled(rng, 2000) for _ in range(4)]
    index = IndexSet([opened(file_of(part)) for part in parts])
    wrong: list[bytes] = []

    def look() -> None:
        for part in parts:
            wrong.extend(name for name, where in part.items() if index.lookup(name) != where)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_truncated() -> None:
    data = file_of(filled(random.Random(4), 300))
    for length in [*range(130), *range(130, len(data), 97), len(data) - 1]:
        with pytest.raises(RepositoryCorrupt):
            opened(data[:length])
    with pytest.raises(RepositoryCorrupt):
        opened(data + b"\0")


@pytest.mark.parametrize("count", [2**64 - 1, 2**64 - 84, 86, 170])
def test_a_count_that_does_not_fit_the_blocks(count: int) -> None:
    """Also one whose number of blocks is too large to be told: it came out as none."""
    data = bytearray(file_of({}) if count > 170 else file_of(filled(random.Random(1), 85)))
    data[48:56] = count.to_bytes(8, "little")
    blocks = int.from_bytes(data[60:64], "little")
    tail = bytes(data[64 + 4096 * blocks : -32])
    data[-32:] = keyed_hash(KEY, bytes(data[:64]) + tail)
    with pytest.raises(RepositoryCorrupt, match="has not the length"):
        opened(bytes(data))


def test_bit_flips() -> None:
    rng = random.Random(5)
    content = filled(rng, 300)
    data = file_of(content)
    blocks = (64, 64 + 4096 * 4)
    for _ in range(400):
        at = rng.randrange(len(data))
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        if not blocks[0] <= at < blocks[1]:
            with pytest.raises(RepositoryCorrupt):
                opened(bytes(damaged))
            continue
        file = opened(bytes(damaged))
        index = IndexSet([file])
        found = {name: index.lookup(name) for name in content}
        # the damaged block is gone, nothing in it is believed, everything else is there
        assert all(where is None or where == content[name] for name, where in found.items())
        assert 0 < sum(where is None for where in found.values()) <= 85
        assert file.damaged > 0
        with pytest.raises(RepositoryCorrupt):
            file.check()


def test_foreign_files() -> None:
    data = file_of(filled(random.Random(6), 10))
    for key, repository, index in [
        (bytes(32), REPOSITORY, INDEX),
        (KEY, b"x" * 16, INDEX),
        (KEY, REPOSITORY, b"x" * 16),
    ]:
        with pytest.raises(RepositoryCorrupt):
            IndexFile(spill_file([data]), key, repository, "test", index)


def test_copies_in_several_packs_and_files() -> None:
    """Every copy is found, wherever it lies; entries of packs that are absent or condemned are passed over."""
    rng = random.Random(7)
    packs = [bytes([number]) * 16 for number in range(9)]
    names = [rng.randbytes(8) + rng.choice([b"a", b"b", b"c"]) * 24 for _ in range(200)]
    copies: dict[bytes, set[tuple[bytes, int, int, int, int]]] = {}
    files = []
    for own in (packs[:4], packs[3:7], packs[5:]):
        entries = bytearray()
        for number, pack in enumerate(own):
            chosen = rng.sample(names, rng.choice([1, 60, 200]))
            offset = 64 + packs.index(pack)
            entries += pack_entries(
                b"".join(entry(name, offset, 9, 9, 1) for name in chosen * 2), number, 2**20, "pack"
            )
            for name in chosen:
                copies.setdefault(name, set()).add((pack, offset, 9, 9, 1))
        files.append(opened(b"".join(encode_entries(entries, KEY, REPOSITORY, INDEX, list(own)))))
        files[-1].check()
    cache = BlockCache(16)
    for _ in range(40):
        present = rng.choice([None, set(rng.sample(packs, rng.randrange(10)))])
        condemned = set(rng.sample(packs, rng.randrange(5)))
        index = IndexSet(files, present=present, condemned=condemned, cache=cache)
        good = (set(packs) if present is None else present) - condemned
        for name in names:
            wanted = {where for where in copies.get(name, set()) if where[0] in good}
            assert set(index.copies(name)) == wanted
            assert index.lookup(name) in (wanted or {None})
            assert len(index.copies(name, 1)) == min(1, len(wanted))


def test_a_name_with_more_copies_than_a_block_holds() -> None:
    packs = [bytes([number]) * 16 for number in range(200)]
    entries = bytearray()
    for number in range(len(packs)):
        own = entry(b"n" * 32, 64, 9, 9, 1) + entry(bytes([number]) * 31 + b"x", 99, 9, 9, 1)
        entries += pack_entries(own, number, 999, "pack")
    file = opened(b"".join(encode_entries(entries, KEY, REPOSITORY, INDEX, packs)))
    file.check()
    assert [where[0] for where in IndexSet([file]).copies(b"n" * 32)] == packs
    assert IndexSet([file], present={packs[190]}).lookup(b"n" * 32) == (packs[190], 64, 9, 9, 1)
    for number, pack in enumerate(packs):
        assert IndexSet([file]).copies(bytes([number]) * 31 + b"x") == [(pack, 99, 9, 9, 1)]


def test_table_refuses_impossible_entries() -> None:
    name = b"n" * 32
    good = entry(name, 64, 100, 100, 1)
    EntryTable().add_pack(good, 0, 64 + 48 + 100, "pack")
    for bad in (
        good[:-1],
        entry(name, 63, 100, 100, 1),
        entry(name, 65, 100, 100, 1),
        entry(name, 2**32 - 1, 100, 100, 1),
        entry(name, 64, 2**32 - 1, 100, 1),
        entry(name, 64, 0, 100, 1),
        entry(name, 64, 100, 0, 1),
        entry(name, 64, 100, 2**24 - 1, 1),
        entry(name, 64, 100, 100, 0),
        entry(name, 64, 100, 100, 4),
    ):
        with pytest.raises(RepositoryCorrupt):
            EntryTable().add_pack(bad, 0, 64 + 48 + 100, "pack")
