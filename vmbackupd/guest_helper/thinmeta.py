"""Reads the metadata of a dm-thin pool: which block of its data device is mapped since when.

Blocks of 4 KiB, integers little-endian (drivers/md/dm-thin-metadata.c, persistent-data/dm-btree-internal.h). Block 0 is
the superblock. A tree node: checksum u32, flags u32 (1 internal, 2 leaf), its own number u64, entries, room for
entries, bytes of a value, padding (u32 each), then the keys (u64) and behind the room for them the values. The first
tree maps a device's id to the root of its own tree, that maps its blocks to (data block << 24 | time). Time is a
counter of the pool's that every snapshot advances.
"""

import struct
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

from .bitmaps import length, mark
from .failures import HelperError
from .image import Device

BLOCK = 4096
MAGIC = 27022010
MAX_DEVICES = 1 << 16
_SUPER = struct.Struct("<IIQ16sQIIQQ128s128sQQIIQ")
_NODE = struct.Struct("<IIQIIII")
_DETAILS = struct.Struct("<QQII")  # mapped blocks, transaction, creation time, time of the latest snapshot
_INTERNAL, _LEAF = 1, 2
_DEEPEST = 12
_TIME = (1 << 24) - 1


class Superblock(NamedTuple):
    """``block`` is the size of a data block in bytes, ``held`` the number of a superblock that is kept for reading."""

    time: int
    held: int
    mappings: int
    details: int
    block: int


class Details(NamedTuple):
    """The times at which a device was made, and at which its latest snapshot was."""

    created: int
    snapped: int


class Metadata:
    """One state of a pool. Everything raises ``OSError``, or ``HelperError`` for what cannot be."""

    def __init__(self, device: Device, held: bool = False) -> None:
        """``held``: the state that ``reserve_metadata_snap`` keeps, not that of now."""
        self._device = device
        self.superblock = self._superblock(0)
        if held:
            self.superblock = self._superblock(self.superblock.held)

    def devices(self) -> Dict[int, Details]:
        """All devices, by their ids."""
        found: Dict[int, Details] = {}
        for keys, data in self._leaves(self.superblock.details, _DETAILS.size, set()):
            for key, (_, _, created, snapped) in zip(keys, _DETAILS.iter_unpack(data)):
                found[key] = Details(created, snapped)
            if len(found) > MAX_DEVICES:
                raise _damaged("it has over %d devices" % MAX_DEVICES)
        return found

    def older(self, floor: int, count: int) -> bytearray:
        """A bitmap of the ``count`` blocks of the data device: those that are mapped since before ``floor``."""
        found = bytearray(length(count))
        seen: Set[int] = set()
        for _, roots in self._leaves(self.superblock.mappings, 8, set()):
            for root in struct.unpack("<%dQ" % (len(roots) // 8), roots):
                for _, data in self._leaves(root, 8, seen):
                    values = struct.unpack("<%dQ" % (len(data) // 8), data)
                    for first, end in _joined(sorted(value >> 24 for value in values if value & _TIME < floor)):
                        if end > count:
                            raise _damaged("a device has block %d of %d" % (end - 1, count))
                        mark(found, first, end)
        return found

    def _superblock(self, number: int) -> Superblock:
        fields = _SUPER.unpack_from(self._device.read(number * BLOCK, BLOCK))
        if fields[2] != number or fields[4] != MAGIC or not 1 <= fields[5] <= 2:
            raise _damaged("block %d is no superblock" % number)
        if not 128 <= fields[13] <= 1 << 21 or fields[13] % 128 or fields[14] * 512 != BLOCK:
            raise _damaged("its data blocks have %d sectors" % fields[13])
        return Superblock(fields[6], fields[8], fields[11], fields[12], fields[13] * 512)

    def _leaves(self, root: int, size: int, seen: Set[int]) -> Iterator[Tuple[Tuple[int, ...], bytes]]:
        """(keys, values of ``size`` bytes) of the leaves below a node, those left out that were ``seen``."""
        queue = [(root, 0)]
        while queue:
            number, level = queue.pop()
            if number in seen:
                continue
            seen.add(number)
            data = bytes(self._device.read(number * BLOCK, BLOCK))
            _, kind, place, count, room, value_size, _ = _NODE.unpack_from(data)
            width = size if kind == _LEAF else 8
            first = _NODE.size + 8 * room
            fits = count <= room and first + width * room <= BLOCK and value_size == width
            if place != number or kind not in (_INTERNAL, _LEAF) or level > _DEEPEST or not fits:
                raise _damaged("block %d is no node of a tree" % number)
            values = data[first : first + count * width]
            if kind == _LEAF:
                yield struct.unpack_from("<%dQ" % count, data, _NODE.size), values
            else:
                queue += [(child, level + 1) for child in struct.unpack("<%dQ" % count, values)]


def _joined(blocks: List[int]) -> List[Tuple[int, int]]:
    """Runs of sorted numbers, of which some may be twice there."""
    found: List[Tuple[int, int]] = []
    for block in blocks:
        if found and block <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], block + 1))
        else:
            found.append((block, block + 1))
    return found


def _damaged(what: str) -> HelperError:
    return HelperError("PoolDamaged", "the metadata of a thin pool cannot be read: %s" % what)
