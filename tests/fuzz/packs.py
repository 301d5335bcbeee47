"""Packs, their own indexes and records, and what reads a record by its name."""

from __future__ import annotations

import struct

from tests.fuzz.sealed import KEY, PACK_ID, REPOSITORY, Cut, index_of, keyed
from vmbackupd.engine import pack
from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.index import EntryTable
from vmbackupd.engine.zstd import Codec
from vmbackupd.errors import RepositoryCorrupt, StorageError

ENTRY = 48
CODEC = Codec(1, 65536)


class Held:
    """A storage that holds one pack."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def open_pack(self, pack_id: bytes) -> int | None:
        return None

    def read_pack(self, pack_id: bytes, offset: int, length: int) -> bytes:
        if pack_id != PACK_ID:
            raise FileNotFoundError
        return self.data[offset : offset + length]


def a_pack(*contents: bytes) -> bytes:
    """A sound pack with these chunks, every second one compressed."""
    body = struct.pack("<8sHBB4x16s16s16x", b"VMBKPACK", 1, 0, 0, REPOSITORY, PACK_ID)
    entries = b""
    for number, content in enumerate(contents):
        packed = CODEC.compress(content) if number % 2 else None
        payload = packed or content
        name = keyed(content)
        entries += struct.pack("<32sIIII", name, 0, len(body), len(payload), len(content) | 1 << 24)
        body += struct.pack("<32sIIBB6x", name, len(payload), len(content) | 1 << 24, 1 if packed else 0, 0) + payload
    trailer = struct.pack("<8sQII16s8x", b"VMBKPEND", len(body), len(contents), 0, PACK_ID)
    tail = entries + trailer
    return body + tail + keyed(tail)


def run_pack(data: bytes) -> None:
    """A whole pack: header, trailer, own index (its seal repaired), and the records without it."""
    repair, data = data[:1] == b"R", data[1:]
    try:
        pack.check_header(data[: pack.HEADER], REPOSITORY, PACK_ID, "pack")
    except RepositoryCorrupt:
        pass
    try:
        offset, count = pack.parse_trailer(data[-pack.TRAILER :], len(data), PACK_ID, "pack")
        tail = data[offset:]
        if repair:
            tail = tail[:-32] + keyed(tail[:-32])
        entries = pack.check_tail(tail, KEY, "pack")
        assert len(entries) == count * ENTRY
        EntryTable().add_pack(entries, 0, offset, "pack")
        read_all(data, entries)
    except RepositoryCorrupt:
        pass
    found = pack.scan_records(renamed(data) if repair else data, KEY, KEY, CODEC)
    assert len(found) % ENTRY == 0


def renamed(data: bytes) -> bytes:
    """The same pack with the names of its records made to fit their contents, as far as they can be told apart."""
    out = bytearray(data)
    at = pack.HEADER
    while at + 48 <= len(out):
        stored, raw = struct.unpack_from("<II", out, at + 32)
        raw &= 0xFFFFFF
        payload = bytes(out[at + 48 : at + 48 + stored])
        content = payload
        if out[at + 40] == 1 and 0 < raw <= 1 << 20 and payload:
            try:
                content = CODEC.decompress(payload, raw)
            except ValueError:
                return bytes(out)
        out[at : at + 32] = keyed(content)
        at += 48 + stored
    return bytes(out)


def read_all(data: bytes, entries: bytes) -> None:
    """Every record that the pack's own index tells of, by its name."""
    table = EntryTable()
    table.add_pack(entries, 0, len(data), "pack")
    reader = ChunkReader(index_of(table), chunk_key=KEY, node_key=KEY, storage=Held(data))
    for at in range(0, min(len(entries), 20 * ENTRY), ENTRY):
        try:
            content = reader.content(entries[at : at + 32], entries[at + 47] & 3)
            assert keyed(content) == entries[at : at + 32]
        except (RepositoryCorrupt, StorageError):
            pass


def seeds_pack() -> list[bytes]:
    noise = bytes(range(1, 200))
    sound = a_pack(b"first" * 20, b"second" * 50, noise)
    return [b"R" + sound, b"-" + sound, b"R" + a_pack(), b"R" + sound[:100]]


def run_record(data: bytes) -> None:
    """One record under a name that fits what it decompresses to: header fields and frame are the fuzzer's."""
    cut = Cut(data)
    stored, raw, compression, kind = cut.number(2), cut.number(3), cut.number(1) & 3, cut.number(1) & 3
    lie = cut.number(1)
    payload = cut.rest()
    content = payload
    if compression == 1 and 0 < raw <= 65536 and payload:
        try:
            content = CODEC.decompress(payload, raw)
        except ValueError:
            pass
    name = keyed(content)
    if lie & 1:
        stored = len(payload)
    if lie & 2:
        raw = len(content)
    fields = struct.pack("<32sIIBB6x", name, stored, raw & 0xFFFFFF | kind << 24, compression, lie >> 4)
    entry = struct.pack("<32sIIII", name, 0, 64, stored, raw & 0xFFFFFF | kind << 24)
    try:
        read_all(bytes(64) + fields + payload, entry)
    except RepositoryCorrupt:
        pass


def seeds_record() -> list[bytes]:
    frame = CODEC.compress(b"compressible" * 40) or b""
    return [
        b"\0\0" + (480).to_bytes(3, "little") + b"\1\1\3" + frame,
        b"\0\0\0\0\0" + b"\0\1\3" + b"plain content",
        b"\0\0\0\0\0" + b"\0\2\3" + b"plain content",
    ]
