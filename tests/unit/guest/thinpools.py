"""Makes the metadata of dm-thin pools, as the kernel would, for tests of what reads it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

BLOCK = 4096

T = TypeVar("T")


@dataclass
class Thin:
    """A device: block → (block of the data device, time), when it was snapshotted last, and when it was made."""

    snapped: int
    blocks: Mapping[int, tuple[int, int]]
    created: int = 0


@dataclass
class PoolImage:
    """Metadata under construction. ``width``: most entries of a node, few to make deep trees."""

    width: int = 252
    nodes: list[bytes] = field(default_factory=lambda: [bytes(BLOCK)])

    def tree(self, entries: list[tuple[int, bytes]], size: int) -> int:
        """The block number of the root of a tree with values of ``size`` bytes."""
        level = [
            (part[0][0] if part else 0, self._node(2, part, size))
            for part in self._parts(entries, min(self.width, (BLOCK - 32) // (8 + size)))
        ]
        while len(level) > 1:
            level = [
                (part[0][0], self._node(1, [(key, struct.pack("<Q", child)) for key, child in part], 8))
                for part in self._parts(level, self.width)
            ]
        return level[0][1]

    def finish(self, thins: Mapping[int, Thin], time: int, data_block: int, held: int = 0) -> bytes:
        """All of it, with a superblock that knows the devices ``thins`` by id."""
        roots = []
        for ident, thin in sorted(thins.items()):
            values = [
                (key, struct.pack("<Q", place << 24 | since)) for key, (place, since) in sorted(thin.blocks.items())
            ]
            roots.append((ident, struct.pack("<Q", self.tree(values, 8))))
        details = [
            (ident, struct.pack("<QQII", len(thin.blocks), 0, thin.created, thin.snapped))
            for ident, thin in sorted(thins.items())
        ]
        mapping, detail = self.tree(roots, 8), self.tree(details, 24)
        head = struct.pack("<IIQ16sQIIQQ", 0, 0, 0, b"", 27022010, 2, time, 7, held)
        tail = struct.pack("<QQIIQ", mapping, detail, data_block // 512, BLOCK // 512, 1000)
        self.nodes[0] = (head + bytes(256) + tail).ljust(BLOCK, b"\0")
        return b"".join(self.nodes)

    @staticmethod
    def _parts(entries: list[tuple[int, T]], width: int) -> list[list[tuple[int, T]]]:
        return [entries[at : at + width] for at in range(0, len(entries), width)] or [[]]

    def _node(self, kind: int, entries: list[tuple[int, bytes]], size: int) -> int:
        room = (BLOCK - 32) // (8 + size) // 3 * 3
        number = len(self.nodes)
        keys = b"".join(struct.pack("<Q", key) for key, _ in entries).ljust(8 * room, b"\0")
        head = struct.pack("<IIQIIII", 0, kind, number, len(entries), room, size, 0)
        self.nodes.append((head + keys + b"".join(value for _, value in entries)).ljust(BLOCK, b"\0"))
        return number
