"""Slow, plain twins of trees and packs, written from docs/format.md and sharing no code with the engine's own.

Nothing in the product imports this. Images are dictionaries of chunk number to content; holes are absent.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping

HOLE = bytes(32)
CHUNK, NODE, ROOT = 1, 2, 3

KeyedHash = Callable[[bytes, bytes], bytes]
Unpack = Callable[[bytes, int], bytes]
Payload = Callable[[bytes, int], bytes]


class Namer:
    """Names of contents: a keyed hash with one key for chunks and one for nodes and root records."""

    def __init__(self, hash_key: bytes, keyed_hash: KeyedHash) -> None:
        self._hash = keyed_hash
        self._chunk = keyed_hash(hash_key, b"vmbackupd chunk names")
        self._node = keyed_hash(hash_key, b"vmbackupd node names")
        self._seal = keyed_hash(hash_key, b"vmbackupd checksums")

    def name(self, kind: int, content: bytes) -> bytes:
        """The name of a content."""
        return self._hash(self._chunk if kind == CHUNK else self._node, content)

    def seal(self, content: bytes) -> bytes:
        """The checksum of a structure."""
        return self._hash(self._seal, content)


def cut(image: bytes, chunk_size: int) -> dict[int, bytes]:
    """The chunks of an image that are not all zeros."""
    parts = (image[at : at + chunk_size] for at in range(0, len(image), chunk_size))
    return {number: part for number, part in enumerate(parts) if any(part)}


def tree_of(
    chunks: Mapping[int, bytes], size: int, chunk_size: int, fanout: int, namer: Namer
) -> tuple[str, dict[bytes, bytes]]:
    """The tree of an image: its id, and all its nodes and its root record by name."""
    count = -(-size // chunk_size)
    names = [namer.name(CHUNK, chunks[number]) if number in chunks else HOLE for number in range(count)]
    made: dict[bytes, bytes] = {}
    depth = 0
    while depth == 0 or len(names) > 1:
        above = []
        for at in range(0, max(len(names), 1), fanout):
            below = names[at : at + fanout]
            while below and below[-1] == HOLE:
                below.pop()
            if not below:
                above.append(HOLE)
                continue
            node = struct.pack("<4sBBHQ", b"NODE", depth, 0, len(below), 0) + b"".join(below)
            above.append(namer.name(NODE, node))
            made[above[-1]] = node
        names = above
        depth += 1
    root = struct.pack("<8sHBBIIIQ32s", b"VMBKTREE", 1, depth, 0, chunk_size, fanout, 0, size, names[0])
    name = namer.name(ROOT, root)
    made[name] = root
    return name.hex(), made


def plain_payload(pack: bytes, offset: int) -> bytes:
    """The payload of the record at ``offset`` of a pack that is not encrypted."""
    assert (pack[10], pack[offset + 41]) == (0, 0)
    (stored,) = struct.unpack_from("<I", pack, offset + 32)
    return pack[offset + 48 : offset + 48 + stored]


def records(pack: bytes, payload: Payload = plain_payload) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    """(name, kind, compression, length of the content, payload) of every record of a pack.

    ``payload(pack, offset)`` takes a record's payload out of it, and decrypts it where that is to be done.
    """
    magic, offset, count = struct.unpack_from("<8sQI", pack, len(pack) - 80)
    assert (pack[:8], magic) == (b"VMBKPACK", b"VMBKPEND")
    for number in range(count):
        name, zero, at, stored, last = struct.unpack_from("<32sIIII", pack, offset + 48 * number)
        assert (zero, pack[at : at + 32]) == (0, name)
        assert struct.unpack_from("<II", pack, at + 32) == (stored, last)
        assert not any(pack[at + 42 : at + 48])
        yield name, last >> 24, pack[at + 40], last & 0xFFFFFF, payload(pack, at)


def contents(
    packs: list[bytes], namer: Namer, unpack: Unpack, payload_of: Payload = plain_payload
) -> dict[bytes, bytes]:
    """The contents of all records by name, each checked."""
    found = {}
    for pack in packs:
        assert namer.seal(pack[struct.unpack_from("<Q", pack, len(pack) - 72)[0] : -32]) == pack[-32:]
        for name, kind, compression, length, payload in records(pack, payload_of):
            content = unpack(payload, length) if compression else payload
            assert (len(content), namer.name(kind, content)) == (length, name)
            found[name] = content
    return found


def image_of(tree: str, known: Mapping[bytes, bytes]) -> bytes:
    """All bytes of a stored image."""
    root = known[bytes.fromhex(tree)]
    magic, version, depth, _, chunk_size, fanout, _, size, top = struct.unpack("<8sHBBIIIQ32s", root)
    assert (magic, version) == (b"VMBKTREE", 1)
    names = [top]
    for level in reversed(range(depth)):
        below = []
        for name in names:
            held = []
            if name != HOLE:
                node = known[name]
                magic, own, _, count, _ = struct.unpack_from("<4sBBHQ", node)
                assert (magic, own, len(node)) == (b"NODE", level, 16 + 32 * count)
                held = [node[at : at + 32] for at in range(16, len(node), 32)]
            below += held + [HOLE] * (fanout - len(held))
        names = below
    image = bytearray(size)
    for number, name in enumerate(names):
        if name != HOLE:
            image[number * chunk_size : (number + 1) * chunk_size] = known[name]
    assert len(image) == size
    return bytes(image)
