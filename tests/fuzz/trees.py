"""Trees: root records and nodes whose names fit, whatever they say."""

from __future__ import annotations

import struct

from tests.fuzz.packs import Held
from tests.fuzz.sealed import KEY, Cut, index_of, keyed
from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.index import EntryTable
from vmbackupd.errors import BackupError, InvalidArgument, RepositoryCorrupt

MOST = 200  # things looked at in one tree


def run_tree(data: bytes) -> None:
    """The fuzzer's bytes are a list of contents: a length, a kind, and bytes in which NAME and a number stand for the
    name of an earlier content. The last one is taken as the root record."""
    cut = Cut(data)
    contents: list[bytes] = []
    kinds: list[int] = []
    while not cut.empty and len(contents) < 12:
        length, kind = cut.number(2) % 2048, cut.number(1) & 3
        contents.append(named(cut.piece(length), contents))
        kinds.append(kind or 3)
    if not contents or not contents[-1]:
        return
    body, entries = bytearray(64), b""
    for content, kind in zip(contents, kinds, strict=True):
        if content:
            fields = (len(content), len(content) | kind << 24)
            entries += struct.pack("<32sIIII", keyed(content), 0, len(body), *fields)
            body += struct.pack("<32sIIBB6x", keyed(content), *fields, 0, 0) + content
    table = EntryTable()
    table.add_pack(entries, 0, len(body), "pack")
    reader = ChunkReader(index_of(table), chunk_key=KEY, node_key=KEY, storage=Held(bytes(body)))
    try:
        look(ImageSource(reader, keyed(contents[-1]).hex()))
    except (RepositoryCorrupt, InvalidArgument):
        pass


def named(content: bytes, before: list[bytes]) -> bytes:
    """``N`` and a number below 32 become the name of that content."""
    parts = content.split(b"NAME")
    out = parts[0]
    for part in parts[1:]:
        number = part[0] if part else 0
        out += (keyed(before[number]) if number < len(before) else bytes(32)) + part[1:]
    return out


def look(image: ImageSource) -> None:
    """Every way to read an image, not all of it where it is large."""
    assert 0 <= image.size <= 2**50
    for number, (offset, length) in enumerate(image.extents()):
        assert 0 <= offset < offset + length <= image.size
        if number > MOST:
            break
        try:
            image.read(offset, min(length, 10000))
        except BackupError:
            pass
    for at in (0, image.size // 2, max(image.size - 5000, 0)):
        try:
            image.read(at, min(5000, image.size - at))
        except BackupError:
            pass
    for number, _ in enumerate(image.walk()):
        if number > MOST:
            break


def contents_list(*contents: tuple[int, bytes]) -> bytes:
    return b"".join(len(content).to_bytes(2, "little") + bytes([kind]) + content for kind, content in contents)


def node(level: int, *names: bytes) -> bytes:
    return struct.pack("<4sBBHQ", b"NODE", level, 0, len(names), 0) + b"".join(names)


def root(depth: int, chunk: int, fanout: int, size: int, top: bytes) -> bytes:
    return struct.pack("<8sHBBIIIQ", b"VMBKTREE", 1, depth, 0, chunk, fanout, 0, size) + top


def seeds_tree() -> list[bytes]:
    chunk = (1, b"x" * 700)
    leaf = (2, node(0, b"NAME\0", b"NAME\0", b"NAME\xff", b"NAME\0"))
    return [
        contents_list(chunk, leaf, (3, root(1, 4096, 16, 4 * 4096 - 3396, b"NAME\1"))),
        contents_list(
            chunk, leaf, (2, node(1, b"NAME\1", b"NAME\xff", b"NAME\1")), (3, root(2, 4096, 16, 36 * 4096, b"NAME\2"))
        ),
        contents_list((3, root(1, 65536, 256, 0, bytes(32)))),
    ]
