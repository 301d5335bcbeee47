"""What the targets share: fixed keys and ids, and a way to take the fuzzer's bytes apart."""

from __future__ import annotations

import os

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.engine.index import EntryTable, IndexFile, IndexSet
from vmbackupd.repository.header import Header

KEY = b"fuzz" * 8
REPOSITORY = b"R" * 16
PACK_ID = b"P" * 16
INDEX_ID = b"I" * 16
HEADER = Header(REPOSITORY, 0.0, 1, KEY, 65536, 256)


def keyed(data: bytes) -> bytes:
    """The keyed hash under the one key."""
    return keyed_hash(KEY, data)


def descriptor_of(data: bytes) -> int:
    """A descriptor of a file in memory that holds ``data``."""
    descriptor = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return descriptor


def index_of(table: EntryTable) -> IndexSet:
    """A set of one index file with these entries, all of pack PACK_ID."""
    data = b"".join(bytes(part) for part in table.encode(KEY, REPOSITORY, INDEX_ID, [PACK_ID]))
    return IndexSet([IndexFile(descriptor_of(data), KEY, REPOSITORY, "index", INDEX_ID)])


class Cut:
    """Numbers and pieces from the front of the fuzzer's bytes; zeros when they are at an end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.piece(size), "little")

    def piece(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        self._at += size
        return found

    def rest(self) -> bytes:
        return self._data[self._at :]

    @property
    def empty(self) -> bool:
        return self._at >= len(self._data)
