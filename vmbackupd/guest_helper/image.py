"""A disk as of T1: the snapshots where volumes of ours lie on it, the disk itself where there is nothing but a
partition table or LVM's metadata."""

import bisect
import errno
import mmap
import os
from typing import Iterable, Iterator, List, NamedTuple, Tuple

from .stack import Piece

PIECE = 1 << 20  # bytes read at once, at most
_ALIGN = 4096


class Device:
    """A block device or file, read past the page cache: the cache of a whole disk does not see what is written
    through its partitions and volumes."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            self._direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd, self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False  # tmpfs knows no O_DIRECT
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        self._memory = memoryview(mmap.mmap(-1, PIECE + 2 * _ALIGN))

    def close(self) -> None:
        """Let go of it: a device of ours that is open cannot be removed."""
        os.close(self._fd)

    def read(self, offset: int, length: int) -> memoryview:
        """``length <= PIECE`` bytes, valid until the next read. Raises ``OSError``, also where the device ends
        early."""
        first = offset - offset % _ALIGN
        end = min(-(-(offset + length) // _ALIGN) * _ALIGN, max(self.size, offset + length))
        if not self._direct:
            os.posix_fadvise(self._fd, first, end - first, os.POSIX_FADV_DONTNEED)
        done = 0
        while first + done < offset + length:
            os.lseek(self._fd, first + done, os.SEEK_SET)
            count = os.readv(self._fd, [self._memory[done : end - first]])
            if count == 0:
                raise OSError(errno.EIO, "the device ends at byte %d" % (first + done))
            done += count
        if not self._direct:
            os.posix_fadvise(self._fd, first, end - first, os.POSIX_FADV_DONTNEED)
        return self._memory[offset - first : offset - first + length]


class _Part(NamedTuple):
    start: int
    end: int
    device: Device
    offset: int


class Source:
    """``size`` bytes that can be read."""

    size = 0

    def read(self, offset: int, length: int) -> bytes:
        """``length <= PIECE`` bytes within the size. Raises ``OSError``."""
        raise NotImplementedError


class Image(Source):
    """A disk put together from several devices."""

    def __init__(self, live: Device, overlays: Iterable[Tuple[Device, List[Piece]]] = (), disk: str = "") -> None:
        """``live`` is the disk ``disk``; the ``overlays`` are snapshots with the places of their bytes."""
        self.size, self._live = live.size, live
        hooked = sorted(
            (
                (piece.disk_offset, piece.length, piece.offset, device)
                for device, pieces in overlays
                for piece in pieces
                if piece.disk == disk
            ),
            key=lambda item: item[:2],
        )
        self._parts: List[_Part] = []
        at = 0
        for start, length, offset, device in hooked:
            end = min(start + length, self.size)
            if start < at:  # below a volume that is snapshotted itself: the same bytes once more
                start, offset = at, offset + at - start
            if start >= end:
                continue
            self._add(at, start, live, at)
            self._add(start, end, device, offset)
            at = end
        self._add(at, self.size, live, at)
        self._ends = [part.end for part in self._parts]

    def read(self, offset: int, length: int) -> bytes:
        found = [bytes(data) for data in self._pieces(offset, length)]
        return found[0] if len(found) == 1 else b"".join(found)

    def read_into(self, offset: int, memory: memoryview) -> None:
        """Fill ``memory`` (at most PIECE bytes) from ``offset``, allocating nothing of its size. Raises ``OSError``."""
        at = 0
        for data in self._pieces(offset, len(memory)):
            memory[at : at + len(data)] = data
            at += len(data)

    def live(self) -> List[Tuple[int, int]]:
        """(start, end) of the bytes that come from the disk itself and not from a snapshot."""
        return [(part.start, part.end) for part in self._parts if part.device is self._live]

    def _pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        """The bytes, piece by piece, each valid until the next."""
        while length:
            part = self._parts[bisect.bisect_right(self._ends, offset)]
            count = min(length, part.end - offset)
            yield part.device.read(part.offset + offset - part.start, count)
            offset, length = offset + count, length - count

    def _add(self, start: int, end: int, device: Device, offset: int) -> None:
        if start >= end:
            return
        last = self._parts[-1] if self._parts else None
        adjacent = last is not None and last.device is device and last.offset + start - last.start == offset
        if last is not None and adjacent:  # parts leave no gaps
            self._parts[-1] = last._replace(end=end)
        else:
            self._parts.append(_Part(start, end, device, offset))
