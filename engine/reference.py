"""Slow, plain twins of the engine's parsers and kernels: what the tests compare the engine with.

Written for being obviously right, on whole byte strings and sets. Nothing in the product imports this.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

from vmbackupd.errors import StoreCorrupt
from vmbackupd.model import VolumeMap

Runs = list[tuple[int, int]]


def runs_of(items: Iterable[int]) -> Runs:
    """Runs ``(start, length)`` of a set of numbers, ascending."""
    runs: Runs = []
    for item in sorted(set(items)):
        if runs and sum(runs[-1]) == item:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((item, 1))
    return runs


def items_of(runs: Iterable[tuple[int, int]]) -> set[int]:
    """The numbers in runs ``(start, length)``, in any order and with overlaps."""
    return {item for start, length in runs for item in range(start, start + length)}


class Bitmap:
    """A set of numbers below ``length``."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.items: set[int] = set()

    def set(self, first: int, count: int = 1) -> None:
        self.items |= set(range(first, first + count))

    def clear(self, first: int, count: int = 1) -> None:
        self.items -= set(range(first, first + count))

    def runs(self) -> Runs:
        return runs_of(self.items)

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Bitmap:
        """Bit i is bit i % 8 of byte i // 8, counted from the least significant."""
        made = cls(length)
        made.items = {i for i in range(length) if data[i // 8] >> (i % 8) & 1}
        return made

    def to_bytes(self) -> bytes:
        return sum(1 << item for item in self.items).to_bytes(-(-self.length // 8), "little")


def chunks_of(runs: Iterable[tuple[int, int]], chunk_size: int) -> Runs:
    """The chunks that runs of bytes touch, as runs."""
    return runs_of(item // chunk_size for item in items_of(runs))


def zero_chunks(data: bytes, chunk_size: int) -> list[bool]:
    """For each chunk of ``data``: whether it is all zeros."""
    return [not any(data[at : at + chunk_size]) for at in range(0, len(data), chunk_size)]


def zero_or_data(extents: Iterable[tuple[int, bool]], size: int, chunk_size: int) -> tuple[set[int], set[int]]:
    """Chunks that are zero for sure, and chunks to be read, of extents ``(length, reads as zeros)`` from byte 0 on."""
    data: set[int] = set()
    at = 0
    for length, zero in extents:
        if not zero:
            data |= {byte // chunk_size for byte in range(at, min(at + length, size))}
        at += length
    chunks = set(range(-(-size // chunk_size)))
    return chunks - data, data


def missed(base: bytes, now: bytes, sample: Iterable[int], chunk_size: int) -> set[int]:
    """The chunks of ``sample`` that are not in ``now`` as they are in ``base``."""
    return {
        chunk
        for chunk in sample
        if base[chunk * chunk_size : (chunk + 1) * chunk_size] != now[chunk * chunk_size : (chunk + 1) * chunk_size]
    }


def parse_store(store: bytes, origin_size: int) -> list[tuple[int, int]]:
    """The exceptions ``(old, new)`` of a dm-snapshot persistent store, under the rules of ``cowstore.pyx``."""
    if len(store) < 16:
        raise StoreCorrupt("no header")
    magic, valid, version, sectors = struct.unpack_from("<4s3I", store)
    if magic != b"SnAp" or valid != 1 or version != 1:
        raise StoreCorrupt("header")
    if sectors.bit_count() != 1 or sectors > 32768:
        raise StoreCorrupt("chunk size")
    chunk = sectors * 512
    if len(store) < 2 * chunk:
        raise StoreCorrupt("no area")
    exceptions = list(_entries(store, chunk))
    origin_chunks = -(-origin_size // chunk)
    olds = [old for old, _ in exceptions]
    if any(old >= origin_chunks for old in olds) or len(set(olds)) != len(olds):
        raise StoreCorrupt("origin chunk beyond the end, or twice")
    if any((new + 1) * chunk > len(store) for _, new in exceptions):
        raise StoreCorrupt("store chunk beyond the end")
    return exceptions


def _entries(store: bytes, chunk: int) -> Iterator[tuple[int, int]]:
    """Area after area, up to the end mark."""
    at = 1
    while True:
        area = store[at * chunk : (at + 1) * chunk]
        if len(area) < chunk:
            raise StoreCorrupt("area beyond the end")
        for entry, (old, new) in enumerate(struct.iter_unpack("<QQ", area)):
            if new == 0:
                if any(area[16 * entry :]):
                    raise StoreCorrupt("bytes after the end")
                return
            if new != at + 1 + entry:
                raise StoreCorrupt("allocation order")
            yield old, new
        at += chunk // 16 + 1


def revert(image: bytes, disk: str, scratch: bytes, volumes: Sequence[VolumeMap]) -> bytes:
    """The T1 image of ``disk``, byte by byte, out of its T2 ``image`` and that of the scratch disk."""
    result = bytearray(image)
    for volume in volumes:
        store = scratch[volume.store_offset : volume.store_offset + volume.store_length]
        chunk = struct.unpack_from("<I", store, 12)[0] * 512
        where = {
            segment.volume_offset + i: segment.disk_offset + i
            for segment in volume.segments
            if segment.disk == disk
            for i in range(segment.length)
        }
        for old, new in parse_store(store, volume.size):
            for i in range(chunk):
                if old * chunk + i in where:
                    result[where[old * chunk + i]] = store[new * chunk + i]
    return bytes(result)
