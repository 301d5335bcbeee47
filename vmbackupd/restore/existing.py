"""What lies at a target now: how much it can hold, and whether it holds anything.

A look is a sample, not a proof: the first 4 MiB (partition tables, LVM labels, superblocks), the last 1 MiB (backup
GPT, old md superblocks), and pieces spread evenly over the rest, or over a file's allocated extents.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from vmbackupd.units import KiB, MiB, human

HEAD = 4 * MiB
TAIL = 1 * MiB
PIECE = 64 * KiB
PIECES = 64
MAX_EXTENTS = 256

Read = Callable[[int, int], bytes]

# offset, bytes there, name. Enough for a message that lets a person recognise their data.
_SIGNATURES = (
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"LUKS\xba\xbe", "LUKS encryption"),
    (0, b"XFSB", "an XFS filesystem"),
    (0x438, b"\x53\xef", "an ext filesystem"),
    (0x10040, b"_BHRfS_M", "a btrfs filesystem"),
    (512, b"LABELONE", "an LVM physical volume"),
    (512, b"EFI PART", "a GPT partition table"),
    (3, b"NTFS", "an NTFS filesystem"),
    (4096 - 10, b"SWAPSPACE2", "a swap area"),
    (510, b"\x55\xaa", "a boot sector"),
)


def probe_ranges(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is read of a target of ``size`` bytes: sorted and disjoint."""
    if size <= HEAD + TAIL:
        if size:
            yield 0, size
        return
    yield 0, HEAD
    middle = size - HEAD - TAIL
    pieces = min(PIECES, middle // PIECE)
    for number in range(pieces):
        yield HEAD + middle * number // pieces, PIECE
    yield size - TAIL, TAIL


def describe_data(head: bytes) -> str:
    """What the first bytes of a target look like, for a person."""
    for offset, magic, name in _SIGNATURES:
        if head[offset:offset + len(magic)] == magic:
            return name
    return "data"


def first_data(read: Read, size: int) -> str | None:
    """None when the sample of a target holds zeros only, else what was found: ``data at 12.0 MiB``."""
    head = b""
    for offset, length in probe_ranges(size):
        if not head:
            head = read(offset, length)
            if _nonzero(head):
                return describe_data(head)
        elif _nonzero(read(offset, length)):
            return f"data near {human(offset)}"
    return None


def first_file_data(fd: int, size: int) -> str | None:
    """As :func:`first_data` for a regular file, where allocation tells where to look."""
    def read(offset: int, length: int) -> bytes:
        return os.pread(fd, length, offset)

    found = first_data(read, size)
    if found is not None:
        return found
    for offset, length in data_extents(fd, size):
        if _nonzero(read(offset, min(length, PIECE))):
            return f"data near {human(offset)}"
    return None


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The first ``MAX_EXTENTS`` allocated extents of a file."""
    at = 0
    for _ in range(MAX_EXTENTS):
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if at <= start:
            return
        yield start, at - start


def device_size(fd: int) -> int:
    """Bytes a file or block device holds."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(fd, 0, os.SEEK_END)
    return status.st_size


def _nonzero(data: bytes) -> bool:
    return data.count(0) != len(data)
