"""Tracks which chunks of the guest's disks change, from one backup to the next, without a kernel module.

Small programs in the kernel mark chunks in memory that both see. They mark one of two sides; which, one word says for
all disks, so T1 is one store. Everything is pinned in bpffs: it goes on when this process ends, and is gone with the
boot. What cannot be trusted is begun anew, and its next backup reads everything.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import resource
import time
from typing import Any, Dict, Iterable, List, Optional

from . import bpf, tracked
from .bitmaps import Run, runs
from .btf import VMLINUX
from .failures import HelperError, clip
from .marks import layout
from .params import Params, devno, integer, objects, text
from .program import SWITCH, SWITCH_SIZE
from .tracked import Tracked

BPFFS = "/sys/fs/bpf"
MAX_DISKS = 256
MARKS_LIMIT = 64 << 20  # bytes of kernel memory for marks, in all
_DIRECTORY = "vmbackupd"
_SWITCH = "switch"


def why_not() -> Optional[str]:
    """What this kernel lacks for tracking, as far as is seen without tracking; None if nothing."""
    try:
        os.close(bpf.create_array("vmbk_look", 8, 1))
        if not os.path.exists(VMLINUX):
            raise HelperError("NoTracking", "the guest's kernel does not describe its types: there is no " + VMLINUX)
        bpf.wait_for_programs()
    except OSError as error:
        return clip("the guest's kernel gives us no BPF maps in memory (Linux 5.5): %s" % error.strerror, 1000)
    except HelperError as error:
        return clip(str(error), 1000)
    return None


class Trackers:
    """The trackers of all disks, for one backup at a time.

    The side that programs do not mark is always empty, but between T1 and the collecting after it: so every flip
    before T1 collects all disks.
    """

    def __init__(self, bpffs: str = BPFFS) -> None:
        self._bpffs = bpffs
        self._root = os.path.join(bpffs, _DIRECTORY)
        self._lock = -1
        self._switch = -1
        self._side = ctypes.c_uint32(0)
        self._disks: Dict[str, Tracked] = {}
        self._taken = False
        self._sealed = False
        self._late = False
        self._collected: Dict[str, float] = {}

    def track(self, params: Params) -> Dict[str, Any]:
        """Go on tracking, or begin: params ``consumer``, ``disks`` ([{"device", "identity"}]), and perhaps ``limit``
        (bytes). Answers ``disks``: [{"device", "tracking", "generation", "reason"}]; a disk that is not tracked, or has
        no generation, has a reason."""
        consumer, asked = text(params, "consumer", 255), objects(params, "disks", MAX_DISKS)
        wanted = {devno(item.get("device")): text(item, "identity", 1024) for item in asked}
        room = integer(params, "limit", 0, 1 << 40) if "limit" in params else MARKS_LIMIT
        if self._disks or len(wanted) != len(asked):
            raise HelperError("WrongState", "tracking already, or a disk is named twice")
        try:
            self._open()
            self._remove_gone()
        except (HelperError, OSError) as error:
            self.close()
            return {"disks": [_answer(device, False, None, str(error)) for device in wanted]}
        answers = []
        for device, identity in wanted.items():
            answers.append(self._begin(device, {"consumer": consumer, "identity": _digest(identity)}, room))
            if device in self._disks:
                room -= self._disks[device].marks.where.length
        for _ in range(2):  # what is marked on either side is older than the backup that begins
            self._turn()
        return {"disks": answers}

    def flip(self) -> None:
        """T1: from now on the other side is marked. One store into memory that is never paged out; only once."""
        if not self._taken:
            self._side.value ^= 1
            self._taken = True

    def collect(self, device: str) -> int:
        """Move what was marked into ``changed(device)``: up to now, or up to T1 once that was. Returns how many chunks
        that are since the last time; they are in ``fresh(device)``."""
        disk = self._disk(device)
        if self._taken:
            self._seal()
        else:
            self._turn()
        return self._give(device, disk)

    def marked(self, devices: Iterable[str]) -> Dict[str, List[Run]]:
        """For disks whose T1 comes later than that of the others: what was marked on each, first up to T1, from the
        second time on since the time before, up to one moment for all. Nothing of other disks is moved."""
        late = {device: self._disk(device) for device in devices}
        if not self._taken:
            raise HelperError("WrongState", "T1 was not taken")
        if not self._late:
            self._seal()
            self._late = True
        else:
            self._side.value ^= 1
            bpf.wait_for_programs()
            for disk in late.values():
                disk.move(self._side.value ^ 1)
        for device, disk in late.items():
            self._give(device, disk)
        return {device: list(runs(disk.marks.fresh, disk.marks.where.chunks)) for device, disk in late.items()}

    def again(self, device: str, spans: Iterable[Run]) -> None:
        """These chunks count as changed after T1 too, though they were collected."""
        for first, end in spans:
            self._disk(device).marks.mark(self._side.value, first, end)

    def changed(self, device: str) -> Optional[memoryview]:
        """The bitmap of what was collected since the generation; None for a disk that is not tracked."""
        return self._disks[device].marks.changed if device in self._disks else None

    def fresh(self, device: str) -> Optional[memoryview]:
        """The bitmap of what the latest ``collect`` found; None for a disk that is not tracked."""
        return self._disks[device].marks.fresh if device in self._disks else None

    def devices(self) -> List[str]:
        """Those that are tracked."""
        return list(self._disks)

    def reason(self, device: str) -> str:
        """Why everything counts as changed; empty when it does not."""
        return self._disk(device).marks.why

    def since(self, device: str) -> float:
        """Seconds since the disk was collected."""
        self._disk(device)
        return time.monotonic() - self._collected[device]

    def settle(self, generation: str) -> None:
        """The backup of this T1 is published: changes count from there. Ends this backup's tracking session."""
        if not self._taken:
            raise HelperError("WrongState", "T1 was not taken")
        self._seal()
        for disk in self._disks.values():
            disk.settle(generation)
        self.close()

    def untrack(self) -> List[str]:
        """End all tracking and remove every pin; returns the disks' device numbers. Nothing there is no error."""
        self.close()
        if not os.path.isdir(self._root):
            return []
        self._take_lock()
        try:
            names = [name for name in os.listdir(self._root) if name != _SWITCH]
            for name in names:
                tracked.remove(os.path.join(self._root, name))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._root, _SWITCH))
            os.rmdir(self._root)
        finally:
            self.close()
        return [name.replace("-", ":") for name in names]

    def close(self) -> None:
        """Leave everything as it is: the programs go on, and what was collected since the generation stays."""
        for disk in self._disks.values():
            disk.close()
        self._disks, self._collected = {}, {}
        self._taken = self._sealed = self._late = False
        self._side = ctypes.c_uint32(0)
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # data servers have it open too
        for descriptor in (self._switch, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._switch = self._lock = -1

    def _begin(self, device: str, record: Dict[str, Any], room: int) -> Dict[str, Any]:
        path = os.path.join(self._root, device.replace(":", "-"))
        reason = "it was not tracked since the guest started"
        try:
            if os.path.isdir(path):
                try:
                    self._disks[device] = tracked.adopt(path, _fitting(device, room), self._switch, record)
                    generation = self._disks[device].generation
                    return _answer(device, True, generation, "" if generation else "no backup of it was completed yet")
                except HelperError as error:
                    reason = str(error)
                    tracked.remove(path)
            self._disks[device] = tracked.start(path, _fitting(device, room), self._switch, record)
            return _answer(device, True, None, reason)
        except (HelperError, OSError) as error:
            return _answer(device, False, None, str(error))

    def _give(self, device: str, disk: Tracked) -> int:
        self._collected[device] = time.monotonic()
        return disk.marks.take()

    def _turn(self) -> None:
        """Before T1: flip, and collect every disk."""
        self._side.value ^= 1
        bpf.wait_for_programs()
        now = time.monotonic()
        for device, disk in self._disks.items():
            disk.move(self._side.value ^ 1)
            self._collected.setdefault(device, now)

    def _seal(self) -> None:
        """After T1: collect every disk up to T1, once."""
        if not self._sealed:
            bpf.wait_for_programs()
            for disk in self._disks.values():
                disk.move(self._side.value ^ 1)
            self._sealed = True

    def _disk(self, device: str) -> Tracked:
        if device not in self._disks:
            raise HelperError("NotTracked", "the device %s is not tracked" % device)
        return self._disks[device]

    def _open(self) -> None:
        bpf.mount(self._bpffs)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._root, 0o700)
        self._take_lock()
        with contextlib.suppress(OSError, ValueError):  # maps count as locked memory before Linux 5.11
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self._switch = self._open_switch(os.path.join(self._root, _SWITCH))
        memory = bpf.map_memory(self._switch, 4096)
        self._side = ctypes.c_uint32.from_buffer(memory, SWITCH)
        bpf.wait_for_programs()

    def _open_switch(self, path: str) -> int:
        """The word that all programs look at."""
        try:
            descriptor = bpf.get(path)
            if bpf.map_info(descriptor).is_array(SWITCH_SIZE, 1):
                return descriptor
            os.close(descriptor)
            os.unlink(path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        descriptor = bpf.create_array("vmbk_switch", SWITCH_SIZE, 1)
        bpf.pin(descriptor, path)
        return descriptor

    def _take_lock(self) -> None:
        self._lock = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HelperError("NoTracking", "another backup of this guest uses the tracker")

    def _remove_gone(self) -> None:
        """Disks that were detached."""
        for name in os.listdir(self._root):
            if name != _SWITCH and not os.path.exists("/sys/dev/block/" + name.replace("-", ":")):
                tracked.remove(os.path.join(self._root, name))


def _fitting(device: str, room: int) -> tracked.Facts:
    """A disk whose marks fit into ``room`` bytes. Raises ``HelperError``."""
    facts = tracked.look(device)
    need = layout(facts.size).length
    if need > room:
        raise HelperError(
            "NoTracking", "its marks take %.1f MiB of kernel memory, %.1f MiB are left" % (need / 2**20, room / 2**20)
        )
    return facts


def _digest(identity: str) -> str:
    """An identity as it is kept: a record has little room."""
    return hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _answer(device: str, tracking: bool, generation: Optional[str], reason: str) -> Dict[str, Any]:
    return {"device": device, "tracking": tracking, "generation": generation, "reason": clip(reason, 1000)}
