"""What only a freeze can take: the last changes of disks that no snapshot can be put under.

Everything is made before the freeze, because the root filesystem may be among those that stand still: the disks are
open, the memory is there and locked. In the freeze the chunks that were marked since the last copy are read, then those
that were marked meanwhile, until a pass finds no new mark: the disks are captured as of that instant. Chunks that lie
in snapshots need no memory, the snapshots keep them.
"""

import bisect
import time
from typing import Any, Callable, Dict, List, Tuple

from . import memory
from .bitmaps import CHUNK, Run, chunks_of, length, mark, runs
from .failures import HelperError
from .image import PIECE, Image, Source
from .tracker import Trackers


class CapturedDisk(Source):
    """A disk with what was taken of it in the freeze: the chunks of ``rest`` as they were then, others as the image has
    them now."""

    def __init__(self, device: str, image: Image, store: memoryview) -> None:
        self.device, self.size = device, image.size
        self.rest = bytearray(length(chunks_of(image.size)))
        """The chunks that were marked, with those that lie in snapshots."""
        self.slots: Dict[int, int] = {}
        """Chunk of the disk → chunk of the store."""
        self._image, self._store = image, store
        self._live = _chunks(image.live())
        self._ends = [end for _, end in self._live]

    @property
    def mixed(self) -> bool:
        """Whether snapshots show some of it."""
        return sum(end - start for start, end in self._image.live()) < self.size

    def uncovered(self, spans: List[Run]) -> List[Run]:
        """What of the spans does not lie in snapshots as a whole."""
        found = []
        for first, end in spans:
            at = bisect.bisect_right(self._ends, first)
            while at < len(self._live) and self._live[at][0] < end:
                found.append((max(self._live[at][0], first), min(self._live[at][1], end)))
                at += 1
        return found

    def take(self, first: int, end: int, free: int) -> int:
        """Read the chunks ``first`` to ``end - 1`` into the slots they have, or into those from ``free`` on; returns
        how many of these. At most PIECE bytes. Raises ``OSError``."""
        used = 0
        while first < end:
            slot, count = self.slots.get(first), 1
            if slot is None:
                slot = free + used
                while first + count < end and first + count not in self.slots:
                    count += 1
                for number in range(count):
                    self.slots[first + number] = slot + number
                used += count
            start = first * CHUNK
            size = min(start + count * CHUNK, self.size) - start
            with self._store[slot * CHUNK : slot * CHUNK + size] as place:  # none may outlive the store
                self._image.read_into(start, place)
            first += count
        return used

    def read(self, offset: int, length: int) -> bytes:
        found, end = [], offset + length
        while offset < end:
            chunk, within = divmod(offset, CHUNK)
            slot, over = self.slots.get(chunk), chunk + 1
            while slot is None and over * CHUNK < end and over not in self.slots:
                over += 1
            stop = min(over * CHUNK, end)
            if slot is None:
                found.append(self._image.read(offset, stop - offset))
            else:
                at = slot * CHUNK + within
                found.append(bytes(self._store[at : at + stop - offset]))
            offset = stop
        return b"".join(found)


class Capture:
    """The disks to be captured in the next freeze, and the memory for what is taken of them."""

    def __init__(self, images: Dict[str, Image], limit: int, close: Callable[[], None] = lambda: None) -> None:
        """``limit``: bytes of memory; ``close`` lets go of the images. Raises ``HelperError`` when the guest cannot
        spare the memory."""
        self._slots, self._close = grant(limit) // CHUNK, close
        if not self._slots:
            raise HelperError("NoMemory", "the guest has no memory to spare for a capture of its disks")
        self._memory = memory.reserve(self._slots * CHUNK)
        self._store = memoryview(self._memory)
        self._used = 0
        self.taken = False
        self.disks = {device: CapturedDisk(device, image, self._store) for device, image in images.items()}

    def close(self) -> None:
        """Give the memory back, and let go of the disks."""
        self._store.release()
        self._memory.close()
        self._close()

    @property
    def limit(self) -> int:
        """Bytes that can be taken."""
        return self._slots * CHUNK

    def take(self, trackers: Trackers, deadline: float) -> Dict[str, Any]:
        """Capture the disks; the filesystems are to be frozen, T1 of the trackers taken. ``deadline`` is monotonic
        time.

        Raises ``HelperError``: ``TooMuch`` for the memory, ``NotStill`` when the deadline came first.
        """
        passes, self.taken = 1, False
        later: Dict[str, List[Run]] = {device: [] for device in self.disks}
        with memory.Still():
            wanted = self._wanted(trackers.marked(self.disks))
            while any(wanted.values()):
                self._require_room(wanted)
                for device, spans in wanted.items():
                    self._read(self.disks[device], spans, deadline)
                found = trackers.marked(self.disks)
                wanted = self._wanted(found)
                for device, spans in found.items():
                    later[device] += spans
                passes += 1
            for device, disk in self.disks.items():
                if disk.mixed:  # the T1 of what lies in snapshots came before these marks
                    trackers.again(device, later[device])
            t1 = time.time()
        self.taken = True
        return {"t1": t1, "passes": passes, "disks": [_shown(disk) for disk in self.disks.values()]}

    def _wanted(self, found: Dict[str, List[Run]]) -> Dict[str, List[Run]]:
        """What is to be read of each disk, of what was marked."""
        for device, spans in found.items():
            for first, end in spans:
                mark(self.disks[device].rest, first, end)
        return {device: self.disks[device].uncovered(spans) for device, spans in found.items()}

    def _require_room(self, wanted: Dict[str, List[Run]]) -> None:
        free = self._slots - self._used
        for device, spans in wanted.items():
            slots = self.disks[device].slots
            for chunk in (chunk for first, end in spans for chunk in range(first, end)):
                free -= chunk not in slots
                if free < 0:
                    size = sum(end - first for spans in wanted.values() for first, end in spans) * CHUNK
                    message = "%d bytes are still to be taken, with memory for %d" % (size, self.limit)
                    raise HelperError("TooMuch", message)

    def _read(self, disk: CapturedDisk, spans: List[Run], deadline: float) -> None:
        for first, end in spans:
            for start in range(first, end, PIECE // CHUNK):
                if time.monotonic() > deadline:
                    raise HelperError("NotStill", "%s could not be captured in the time for it" % disk.device)
                try:
                    self._used += disk.take(start, min(start + PIECE // CHUNK, end), self._used)
                except OSError as error:
                    raise HelperError("ReadFailed", "%s: %s" % (disk.device, error.strerror))


def grant(limit: int) -> int:
    """How many of ``limit`` bytes the guest gets along without: never more than half of what it has to spare."""
    return min(limit, memory.available() // 2)


def _chunks(spans: List[Tuple[int, int]]) -> List[Run]:
    """The chunks that have bytes in the spans, which are sorted."""
    found: List[Run] = []
    for start, end in spans:
        first, over = start // CHUNK, chunks_of(end)
        if found and first <= found[-1][1]:
            first, over = found[-1][0], max(over, found[-1][1])
            found.pop()
        found.append((first, over))
    return found


def _shown(disk: CapturedDisk) -> Dict[str, Any]:
    marked = sum(end - first for first, end in runs(disk.rest, chunks_of(disk.size)))
    return {"device": disk.device, "chunks": marked, "bytes": len(disk.slots) * CHUNK}
