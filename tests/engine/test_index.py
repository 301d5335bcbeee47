"""Index files: every name is found where it was put and no other is; damage is noticed, never believed."""

from __future__ import annotations

import random
import struct
import threading

import pytest

from vmbackupd.engine.index import EntryTable, IndexFile, IndexSet
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
