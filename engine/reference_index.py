"""Slow, plain twins of index files and of liveness, written from docs/format.md.

They share no code with the engine's own; nothing in the product imports this.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping

Seal = Callable[[bytes], bytes]
Where = tuple[bytes, int, int, int, int]  # pack id, offset, stored, raw, kind

BLOCK = 4096
PER_BLOCK = 85


def read_index(data: bytes, seal: Seal) -> tuple[list[tuple[bytes, Where]], list[bytes]]:
    """(entries in their order, ids of the packs) of an index file, whose seals are checked."""
    magic, version, cipher, _, _, count, packs, blocks = struct.unpack_from("<8sHB5x16s16sQII", data)
    assert (magic, version, cipher) == (b"VMBKINDX", 1, 0)
    assert blocks == -(-count // PER_BLOCK)
    tail = 64 + blocks * BLOCK
    assert seal(data[:64] + data[tail:-32]) == data[-32:]
    table = [data[tail + 16 * number : tail + 16 * number + 16] for number in range(packs)]
    directory = data[tail + 16 * packs : -32]
    assert len(directory) == 40 * blocks
    entries = []
    for number in range(blocks):
        block = data[64 + number * BLOCK : 64 + (number + 1) * BLOCK]
        assert directory[40 * number : 40 * number + 40] == block[:8] + seal(block)
        for at in range(min(PER_BLOCK, count - number * PER_BLOCK)):
            name, pack, offset, stored, last = struct.unpack_from("<32sIIII", block, 48 * at)
            entries.append((name, (table[pack], offset, stored, last & 0xFFFFFF, last >> 24)))
        assert not any(block[48 * min(PER_BLOCK, count - number * PER_BLOCK) :])
    order = [(name, table.index(where[0])) for name, where in entries]
    assert order == sorted(set(order))
    return entries, table


def merge(
    indexes: Iterable[list[tuple[bytes, Where]]], keep: Callable[[bytes], bool]
) -> dict[tuple[bytes, bytes], Where]:
    """Entries of several indexes by name and pack, those of packs that are kept."""
    return {(name, where[0]): where for entries in indexes for name, where in entries if keep(where[0])}


def live(trees: Iterable[str], known: Mapping[bytes, bytes]) -> set[bytes]:
    """The names of everything that trees refer to; ``known``: contents of nodes and root records by name."""
    found: set[bytes] = set()

    def walk(name: bytes, level: int) -> None:
        if any(name):
            found.add(name)
            if level >= 0:
                node = known[name]
                for at in range(16, len(node), 32):
                    walk(node[at : at + 32], level - 1)

    for tree in trees:
        root = bytes.fromhex(tree)
        found.add(root)
        walk(known[root][32:], known[root][10] - 1)
    return found
