"""Index files: opened, checked, searched, read in order."""

from __future__ import annotations

import struct

from tests.fuzz.sealed import INDEX_ID, KEY, PACK_ID, REPOSITORY, descriptor_of, keyed
from vmbackupd.engine.index import EntryTable, IndexFile, IndexSet
from vmbackupd.errors import RepositoryCorrupt, StorageError

BLOCK = 4096
HEADER = 64


def repaired(data: bytes) -> bytes:
    """The file with directory and seals made to fit its blocks, if its header tells a length it has."""
    if len(data) < HEADER:
        return data
    packs, blocks = struct.unpack_from("<II", data, 56)
    at = HEADER + blocks * BLOCK
    if at + 16 * packs > len(data):
        return data
    body = data[HEADER:at]
    directory = b""
    for start in range(0, len(body), BLOCK):
        block = body[start : start + BLOCK]
        directory += block[:8] + keyed(block)
    tail = data[at : at + 16 * packs] + directory
    return data[:HEADER] + body + tail + keyed(data[:HEADER] + tail)


def run_index(data: bytes) -> None:
    if data[:1] == b"R":
        data = repaired(data[1:])
    try:
        file = IndexFile(descriptor_of(data), KEY, REPOSITORY, "index", INDEX_ID)
    except (RepositoryCorrupt, StorageError):
        return
    listed = None
    try:
        file.check()
        listed = [name for name, _, _ in file.names()]
        assert len(listed) == file.count and listed == sorted(listed)
    except RepositoryCorrupt:
        pass
    found = IndexSet([file])
    passing = IndexSet([file], present={PACK_ID}, condemned={b"Q" * 16})
    for start in range(HEADER, min(len(data), HEADER + 3 * BLOCK), 48 * 7):
        name = data[start : start + 32].ljust(32, b"\0")
        hit = found.lookup(name)
        assert listed is None or hit is None or name in listed
        passing.lookup(name)
        found.copies(name, 10)
    file.pack_ids()
    assert b"".join(file.parts()) == data


def seeds_index() -> list[bytes]:
    files = []
    for count in (0, 1, 3, 100):
        table = EntryTable()
        entries = b"".join(
            struct.pack("<32sIIII", keyed(bytes([number])), 0, 64 + 100 * number, 50, 60 | 1 << 24)
            for number in range(count)
        )
        table.add_pack(entries, 0, 1 << 20, "pack")
        parts = table.encode(KEY, REPOSITORY, INDEX_ID, [PACK_ID, b"Q" * 16])
        files.append(b"".join(bytes(part) for part in parts))
    return [b"R" + data for data in files] + [b"-" + files[2]]
