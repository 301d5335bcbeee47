"""Merged index files hold every entry of every pack that is kept, once; damage is never merged away."""

from __future__ import annotations

import os
import random

import blake3
import pytest

from tests.engine.test_index import INDEX, KEY, REPOSITORY, entry
from vmbackupd.engine import reference_index as reference
from vmbackupd.engine.index import IndexFile, IndexSet, encode_entries, pack_entries
from vmbackupd.engine.indexscan import merge_files
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository.catalog import spill_file

MERGED = b"m" * 16
Entries = list[tuple[bytes, reference.Where]]


def seal(data: bytes) -> bytes:
    return blake3.blake3(data, key=KEY).digest()


def random_index(rng: random.Random, packs: list[bytes], names: list[bytes], most: int) -> bytes:
    entries = bytearray()
    for number, pack in enumerate(packs):
        chosen = rng.sample(names, rng.randrange(most))
        # the same record wherever the pack is told of
        records = b"".join(entry(name, 64 + pack[0] * 1000 + name[0], 9, 10 + name[0], 1) for name in chosen)
        entries += pack_entries(records, number, 2**31, "pack")
    return b"".join(encode_entries(entries, KEY, REPOSITORY, INDEX, list(packs)))


def opened(data: bytes, index: bytes = INDEX) -> IndexFile:
    return IndexFile(spill_file([data]), KEY, REPOSITORY, "test", index)


def merged(files: list[IndexFile], kept: set[bytes] | None = None) -> bytes:
    fd = spill_file()
    keep = None if kept is None else kept.__contains__
    result = merge_files(files, fd, key=KEY, repository=REPOSITORY, index=MERGED, keep=keep)
    assert result is not None
    data = os.pread(fd, 2**30, 0)
    os.close(fd)
    assert result == (len(reference.read_index(data, seal)[0]), reference.read_index(data, seal)[1])
    return data


@pytest.mark.parametrize("most", [2, 30, 400])
def test_merge_is_that_of_the_plain_twin(rng: random.Random, most: int) -> None:
    names = [rng.choice([b"", b"a" * 9]).ljust(rng.choice([0, 9]), b"b") + rng.randbytes(40) for _ in range(600)]
    names = [name[:32] for name in names]
    packs = [bytes([number]) * 16 for number in range(20)]
    data = [random_index(rng, rng.sample(packs, rng.randrange(1, 9)), names, most) for _ in range(rng.randrange(1, 7))]
    plain: list[Entries] = [reference.read_index(part, seal)[0] for part in data]
    for kept in (None, set(rng.sample(packs, 9)), set[bytes]()):
        result = merged([opened(part) for part in data], kept)
        entries, table = reference.read_index(result, seal)
        wanted = reference.merge(plain, lambda pack, kept=kept: kept is None or pack in kept)
        assert {(name, where[0]): where for name, where in entries} == wanted
        assert len(entries) == len(wanted)
        assert len(set(table)) == len(table)
        file = opened(result, MERGED)
        file.check()
        index = IndexSet([file])
        for name in names:
            assert set(index.copies(name)) == {where for (own, _), where in wanted.items() if own == name}


def test_many_blocks(rng: random.Random) -> None:
    """Longer than what is read and written at once."""
    packs = [bytes([number]) * 16 for number in range(3)]
    data = [random_index(rng, [pack], [rng.randbytes(32) for _ in range(30000)], 30000) for pack in packs]
    plain = [reference.read_index(part, seal)[0] for part in data]
    entries, _ = reference.read_index(merged([opened(part) for part in data]), seal)
    assert [name for name, _ in entries] == sorted(name for part in plain for name, _ in part)


def test_damage_ends_a_merge(rng: random.Random) -> None:
    names = [rng.randbytes(32) for _ in range(3000)]
    data = [random_index(rng, [bytes([number]) * 16], names, 3000) for number in range(3)]
    for _ in range(20):
        files = list(data)
        which = rng.randrange(3)
        blocks = int.from_bytes(files[which][60:64], "little")
        if not blocks:
            continue
        damaged = bytearray(files[which])
        damaged[64 + rng.randrange(blocks * 4096)] ^= 1 << rng.randrange(8)
        files[which] = bytes(damaged)
        fd = spill_file()
        with pytest.raises(RepositoryCorrupt):
            merge_files([opened(part) for part in files], fd, key=KEY, repository=REPOSITORY, index=MERGED)
        os.close(fd)


def test_a_merge_can_be_stopped(rng: random.Random) -> None:
    file = opened(random_index(rng, [b"p" * 16], [rng.randbytes(32) for _ in range(100)], 100))
    fd = spill_file()
    done = merge_files([file], fd, key=KEY, repository=REPOSITORY, index=MERGED, stop=lambda: True)
    os.close(fd)
    assert done is None or file.count == 0
