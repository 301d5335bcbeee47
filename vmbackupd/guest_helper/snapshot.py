"""One instant over many volumes: prepare before the freeze, suspend and resume in it.

For each volume X: ``real`` takes over X's table, ``cow`` is a slice of the scratch disk, ``snap`` is the snapshot of
``real``, and ``snapshot-origin real`` waits in X's inactive slot. While the guest agent holds every filesystem
frozen, suspending all X and then resuming all X makes the waiting tables live: no volume runs again before all have
stood still.

Suspends are without lockfs, always: the filesystems are frozen already, and freezing them twice fails (Linux 6.1) or
leaves the device marked as frozen until the next boot (6.12).
"""

import errno
import os
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from . import devices, memory, release, scratch, udevrules, watchdog
from .dm import READONLY, SUSPEND, Dm, Info, Target, number_of, resume_request, suspend_request
from .failures import HelperError
from .params import Params, devno, integer, objects
from .watchdog import Watchdog

MAX_VOLUMES = 512
SECTOR = 512
_REFUSED = ("snapshot", "snapshot-origin", "snapshot-merge")


class Wanted(NamedTuple):
    """A volume the host wants snapshotted: its table, and its slice of the scratch disk in bytes."""

    info: Info
    rows: List[Target]
    store_offset: int
    store_length: int

    @property
    def sectors(self) -> int:
        return self.rows[-1].start + self.rows[-1].length


class Volume(NamedTuple):
    """A volume with its devices made. ``origin`` is the table that goes live at T1."""

    wanted: Wanted
    real: int
    cow: int
    snap: int
    origin: List[Target]

    @property
    def number(self) -> int:
        return self.wanted.info.number

    @property
    def name(self) -> str:
        return self.wanted.info.name

    @property
    def devno(self) -> str:
        return self.wanted.info.devno


class Snapshot:
    """The snapshots of one job, from ``prepare`` to ``release``."""

    def __init__(self, dm: Dm, job: str) -> None:
        self.job = job
        self.volumes: List[Volume] = []
        self.taken = False
        self._dm = dm

    def prepare(self, params: Params) -> List[Dict[str, Any]]:
        """Make everything but the last step. On any failure everything is undone before the error is raised."""
        chunk = integer(params, "chunk_sectors", 8, 2048)
        if chunk & (chunk - 1):
            raise HelperError("InvalidArgument", "chunk_sectors: %d is no power of two" % chunk)
        wanted = self._wanted(params, chunk * SECTOR)
        serial = params.get("scratch_serial")
        disk = scratch.find(str(serial))
        end = wanted[-1].store_offset + wanted[-1].store_length
        if end > disk.size:
            raise HelperError("ScratchTooSmall", "the scratch disk has %d bytes, the stores need %d" % (disk.size, end))
        _require_targets(self._dm)
        udevrules.install()
        try:
            for index, volume in enumerate(wanted):
                _clear(disk, volume, chunk * SECTOR)
                self.volumes.append(self._make(index, volume, disk.devno, chunk))
            _order(self._dm, self.volumes)
            memory.lock()
        except BaseException:
            self.volumes = []
            self._undo()
            raise
        return [
            {
                "device": volume.info.devno,
                "name": volume.info.name,
                "size": volume.sectors * SECTOR,
                "store_offset": volume.store_offset,
                "store_length": volume.store_length,
                "table": devices.shown_rows(volume.rows),
            }
            for volume in wanted
        ]

    def _undo(self) -> None:
        """After a failure; what cannot be undone now is found by the host's own release."""
        try:
            release.release(self._dm, self.job)
        except (HelperError, OSError):
            pass

    def require_prepared(self) -> None:
        """Nobody has touched the volumes since ``prepare``. Looks closely, so it is for right before the freeze."""
        for volume in self.volumes:
            if not self._table_ok(volume):
                raise HelperError("TableChanged", "another program changed the table of %s" % volume.name)

    def snap(self, guard: Optional[Watchdog], flip: Callable[[], None]) -> Dict[str, float]:
        """T1. Between the first suspend and the last resume nothing happens but ioctls and, while all stand still,
        ``flip``, which must not touch a file. The guest is frozen: ``status`` tells afterwards whether it took hold.
        """
        if not self.volumes or self.taken:
            raise HelperError("WrongState", "the snapshot was not prepared, or is taken already")
        watchdog.require(guard)
        self._require_waiting()
        call, command = self._dm.call, SUSPEND
        suspends = [suspend_request(volume.number) for volume in self.volumes]
        resumes = [resume_request(volume.number) for volume in reversed(self.volumes)]
        again = [resume_request(volume.number) for volume in reversed(self.volumes)]
        clock, failure, still = time.monotonic, None, 0
        with memory.Still():
            begin = clock()
            for buffer in suspends:
                try:
                    call(command, buffer)
                except OSError as error:
                    failure = error
                    break
                still += 1
            if failure is None:
                flip()
            t1, middle = time.time(), clock()
            first = len(resumes) - still  # only what is suspended: a resume of the others would swap their tables
            for buffers in (resumes, again):
                for buffer in buffers[first:]:
                    try:
                        call(command, buffer)
                    except OSError as error:
                        failure = error
                if failure is None:
                    break  # else once more: a table that cannot go live leaves the old one, still suspended
            end = clock()
        if failure is not None:
            raise HelperError("SuspendFailed", "a volume could not be suspended or resumed: %s" % failure.strerror)
        self.taken = True
        return {"t1": t1, "suspend_ms": (middle - begin) * 1000, "resume_ms": (end - middle) * 1000}

    def status(self) -> List[Dict[str, Any]]:
        """Whether each snapshot still holds, and how full its store is (sectors)."""
        return [self._volume_status(volume) for volume in self.volumes]

    def numbers(self) -> List[int]:
        """The volumes' device numbers, as the watchdog resumes them: lowest in a stack first."""
        return [volume.number for volume in reversed(self.volumes)]

    def _wanted(self, params: Params, chunk: int) -> List[Wanted]:
        asked = objects(params, "volumes", MAX_VOLUMES)
        if not asked:
            raise HelperError("InvalidArgument", "volumes: none")
        wanted: List[Wanted] = []
        seen: Set[str] = set()
        offset = 0
        for item in asked:
            number = devno(item.get("device"))
            length = integer(item, "store_bytes", 4 * chunk, 1 << 62)
            if length % chunk or number in seen:
                raise HelperError("InvalidArgument", "volume %s: named twice, or its store is not in chunks" % number)
            seen.add(number)
            wanted.append(self._look_up(number, offset, length))
            offset += length
        return wanted

    def _look_up(self, number: str, offset: int, length: int) -> Wanted:
        try:
            info = self._dm.info(number_of(number))
        except OSError as error:
            raise HelperError("NoVolume", "%s is no device-mapper volume: %s" % (number, error.strerror))
        rows = self._dm.table(info.number)
        if info.uuid.startswith("VMBK-") or any(row.kind in _REFUSED for row in rows):
            raise HelperError("AlreadySnapshot", "%s is, or has, a snapshot already" % info.name)
        if not rows or info.suspended or info.inactive:
            raise HelperError("VolumeBusy", "%s is suspended, or another program is changing its table" % info.name)
        return Wanted(info, rows, offset, length)

    def _make(self, index: int, volume: Wanted, disk: str, chunk: int) -> Volume:
        name, uuid = "vmbk-%s-%d" % (self.job, index), "%s%d" % (release.prefix(self.job), index)
        size, dm, mode = volume.sectors, self._dm, volume.info.flags & READONLY
        part = "real"
        try:
            real = dm.info(dm.create(name + "-real", uuid + "-real", volume.rows, mode))
            slice_rows = [
                Target(0, volume.store_length // SECTOR, "linear", "%s %d" % (disk, volume.store_offset // SECTOR))
            ]
            part = "cow"
            cow = dm.info(dm.create(name + "-cow", uuid + "-cow", slice_rows))
            part = "snapshot-origin"
            origin = [Target(0, size, "snapshot-origin", real.devno)]
            dm.load(volume.info.number, origin, mode)
            part = "snap"
            # Read-only: a write to the snapshot would look like a write to the volume after T1.
            snap = dm.create(
                name + "-snap",
                uuid + "-snap",
                [Target(0, size, "snapshot", "%s %s P %d" % (real.devno, cow.devno, chunk))],
                READONLY,
            )
        except OSError as error:
            raise HelperError(
                "SnapshotFailed",
                "the kernel makes no snapshot of %s (%s: %s)%s"
                % (volume.info.name, part, error.strerror, _lost(sorted(_references(volume.rows) | {disk}))),
            )
        return Volume(volume, real.number, cow.number, snap, origin)

    def _require_waiting(self) -> None:
        """No other program is in the middle of changing a table: a resume of ours would complete it."""
        for volume in self.volumes:
            info = self._dm.info(volume.number)
            if info.suspended or not info.inactive:
                raise HelperError("TableChanged", "another program changed the table of %s" % volume.name)

    def _volume_status(self, volume: Volume) -> Dict[str, Any]:
        valid, fill = _fill(self._dm, volume.snap)
        return {
            "device": volume.devno,
            "valid": valid,
            "allocated": fill[0],
            "total": fill[1],
            "metadata": fill[2],
            "table_ok": self._table_ok(volume),
        }

    def _table_ok(self, volume: Volume) -> bool:
        """Whether nobody has changed what ``prepare`` and ``snap`` set up."""
        live, waiting = (volume.origin, []) if self.taken else (volume.wanted.rows, volume.origin)
        try:
            return (
                self._dm.table(volume.number) == live
                and self._dm.table(volume.number, inactive=True) == waiting
                and not self._dm.info(volume.number).suspended
                and self._dm.table(volume.real) == volume.wanted.rows
            )
        except OSError:
            return False  # removed


def _fill(dm: Dm, snap: int) -> Tuple[bool, Tuple[int, int, int]]:
    """(valid, (allocated, total, metadata) sectors) from ``16/4096 16``; ``Invalid`` or ``Overflow`` is the end of
    it."""
    try:
        words = dm.status(snap)[0].params.replace("/", " ").split()
        allocated, total, metadata = (int(word) for word in words)
        return True, (allocated, total, metadata)
    except (OSError, ValueError, IndexError):
        return False, (0, 0, 0)


def _require_targets(dm: Dm) -> None:
    if "snapshot-origin" not in dm.targets():
        udevrules.run(["modprobe", "dm-snapshot"])
    if "snapshot-origin" not in dm.targets():
        raise HelperError("NoSnapshotTarget", "the guest's kernel has no dm-snapshot module")


def _clear(disk: scratch.Scratch, volume: Wanted, length: int) -> None:
    try:
        scratch.zero(disk, volume.store_offset, length)
    except OSError as error:
        raise HelperError(
            "ScratchFailed", "cannot write to the scratch disk for %s: %s" % (volume.info.name, error.strerror)
        )


def _order(dm: Dm, volumes: List[Volume]) -> None:
    """Sort so that a volume is suspended before those it lies on: a suspend waits for the I/O below it."""
    below = {volume.devno: _references(volume.wanted.rows) for volume in volumes}
    tables = {}
    for info in dm.devices():
        try:
            tables[info.devno] = _references(dm.table(info.number))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise  # ENXIO: removed meanwhile
    depths = {devno: _depth(devno, below, tables, 0) for devno in below}
    volumes.sort(key=lambda volume: -depths[volume.devno])


def _depth(devno: str, below: Dict[str, Set[str]], tables: Dict[str, Set[str]], level: int) -> int:
    if level > 64:
        raise HelperError("StackTooDeep", "device-mapper volumes are stacked too deep")
    under = below.get(devno, tables.get(devno, set()))
    return 1 + max([_depth(other, below, tables, level + 1) for other in under if other in tables] or [0])


def _lost(devnos: Sequence[str]) -> str:
    """What a message says of those devices that cannot be opened; nothing if all can."""
    lost = []
    for number in devnos:
        try:
            path = devices.node(number)
        except HelperError as error:
            lost.append(str(error))
            continue
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            state = devices.read("/sys/dev/block/%s/device/state" % number)
            lost.append("%s (%s) %s" % (path[5:], ", ".join(filter(None, (number, state))), error.strerror))
    return "; it lies on what cannot be opened: " + "; ".join(lost) if lost else "; its kernel log says more"


def _references(rows: Sequence[Target]) -> Set[str]:
    """Device numbers that stand in a table's parameters."""
    return {word for row in rows for word in row.params.split() if word.replace(":", "", 1).isdigit() and ":" in word}
