"""What only a freeze can take: the last changes of disks that no snapshot can be put under.

Everything is made before the freeze, because the root filesystem may be among those that stand still: the disks are
open, the memory is there and locked. In the freeze the chunks that were marked since the last copy are read, then those
that were marked meanwhile, until a pass finds no new mark: the disks are captured as of that instant. Chunks that lie
in snapshots need no memory, the snapshots keep them.
"""

import bisect
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from . import memory
from .bitmaps import CHUNK, Run, chunks_of, length, mark, runs
from .failures import HelperError
from .image import PIECE, Image, Source
from .tracker import Trackers

LANES = 4  # reads at once
STACK = 512 << 10  # bytes for each but the first: all of it is locked


class CapturedDisk(Source):
    """A disk with what was taken of it in the freeze: the chunks of ``rest`` as they were then, others as the image has
    them now."""

    def __init__(self, device: str, images: Sequence[Image], store: memoryview) -> None:
        """``images``: the disk once for each lane, as only one thread may read each."""
        self.device, self.size = device, images[0].size
        self.rest = bytearray(length(chunks_of(self.size)))
        """The chunks that were marked, with those that lie in snapshots."""
        self.slots: Dict[int, int] = {}
        """Chunk of the disk → chunk of the store."""
        self._images, self._store = images, store
        self._live = _chunks(images[0].live())
        self._ends = [end for _, end in self._live]

    @property
    def mixed(self) -> bool:
        """Whether snapshots show some of it."""
        return sum(end - start for start, end in self._images[0].live()) < self.size

    def uncovered(self, spans: List[Run]) -> List[Run]:
        """What of the spans does not lie in snapshots as a whole."""
        found = []
        for first, end in spans:
            at = bisect.bisect_right(self._ends, first)
            while at < len(self._live) and self._live[at][0] < end:
                found.append((max(self._live[at][0], first), min(self._live[at][1], end)))
                at += 1
        return found

    def place(self, spans: List[Run], free: int) -> List["Read"]:
        """Reads of the spans into the slots their chunks have, or into those from ``free`` on."""
        reads = []
        for first, end in spans:
            while first < end:
                slot, over = self.slots.get(first), first + 1
                if slot is None:
                    slot = free
                    while over < end and over - first < PIECE // CHUNK and over not in self.slots:
                        over += 1
                    self.slots.update(zip(range(first, over), range(slot, slot + over - first)))
                    free += over - first
                reads.append(Read(self, first, over, slot))
                first = over
        return reads

    def take(self, lane: int, read: "Read") -> None:
        """Raises ``OSError``."""
        start = read.first * CHUNK
        size = min(read.end * CHUNK, self.size) - start
        with self._store[read.slot * CHUNK : read.slot * CHUNK + size] as place:  # none may outlive the store
            self._images[lane].read_into(start, place)

    def read(self, offset: int, length: int) -> bytes:
        found, end = [], offset + length
        while offset < end:
            chunk, within = divmod(offset, CHUNK)
            slot, over = self.slots.get(chunk), chunk + 1
            while slot is None and over * CHUNK < end and over not in self.slots:
                over += 1
            stop = min(over * CHUNK, end)
            if slot is None:
                found.append(self._images[0].read(offset, stop - offset))
            else:
                at = slot * CHUNK + within
                found.append(bytes(self._store[at : at + stop - offset]))
            offset = stop
        return b"".join(found)


class Read(NamedTuple):
    """Chunks ``first`` to ``end - 1`` of a disk, at most PIECE bytes, go to ``slot`` and those behind it."""

    disk: CapturedDisk
    first: int
    end: int
    slot: int


class Capture:
    """The disks to be captured in the next freeze, and the memory for what is taken of them."""

    def __init__(
        self, disks: Mapping[str, Sequence[Image]], limit: int, close: Callable[[], None] = lambda: None
    ) -> None:
        """``disks``: each once for every lane that reads at the same time; ``limit``: bytes of memory; ``close`` lets
        go of the images. Raises ``HelperError`` when the guest cannot spare the memory."""
        self._slots, self._close = grant(limit) // CHUNK, close
        if not self._slots:
            raise HelperError("NoMemory", "the guest has no memory to spare for a capture of its disks")
        self._memory = memory.reserve(self._slots * CHUNK)
        self._store = memoryview(self._memory)
        self.taken = False
        self._lanes = min(len(images) for images in disks.values()) if disks else 0
        self.disks = {device: CapturedDisk(device, images, self._store) for device, images in disks.items()}

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
                self._read(wanted, deadline)
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

    def _used(self) -> int:
        """Slots that are taken: the first ones."""
        return sum(len(disk.slots) for disk in self.disks.values())

    def _require_room(self, wanted: Dict[str, List[Run]]) -> None:
        free = self._slots - self._used()
        for device, spans in wanted.items():
            slots = self.disks[device].slots
            for chunk in (chunk for first, end in spans for chunk in range(first, end)):
                free -= chunk not in slots
                if free < 0:
                    size = sum(end - first for spans in wanted.values() for first, end in spans) * CHUNK
                    message = "%d bytes are still to be taken, with memory for %d" % (size, self.limit)
                    raise HelperError("TooMuch", message)

    def _read(self, wanted: Dict[str, List[Run]], deadline: float) -> None:
        """Several at once: what a read of a LUN takes is mostly waiting."""
        reads: List[Read] = []
        for device, spans in wanted.items():
            reads += self.disks[device].place(spans, self._used())
        reads.reverse()
        failures: List[HelperError] = []
        others = [
            threading.Thread(target=_drive, args=(lane, reads, deadline, failures)) for lane in range(1, self._lanes)
        ]
        threading.stack_size(STACK)
        for thread in others:
            thread.start()
        threading.stack_size(0)
        _drive(0, reads, deadline, failures)
        for thread in others:
            thread.join()
        if failures:
            raise failures[0]


def _drive(lane: int, reads: List[Read], deadline: float, failures: List[HelperError]) -> None:
    """One lane: takes from the end of ``reads`` until there are none, or one has failed."""
    while reads and not failures:
        if time.monotonic() > deadline:
            failures.append(HelperError("NotStill", "the disks could not be captured in the time for it"))
            return
        try:
            read = reads.pop()
        except IndexError:
            return  # another lane was faster
        try:
            read.disk.take(lane, read)
        except OSError as error:
            failures.append(HelperError("ReadFailed", "%s: %s" % (read.disk.device, error.strerror)))


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
