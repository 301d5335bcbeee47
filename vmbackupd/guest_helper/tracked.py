"""One disk whose changes are tracked: its programs and its marks, pinned in a directory of bpffs, and when to trust
them."""

import contextlib
import functools
import os
import re
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from . import bpf, devices
from .btf import Types
from .dm import Dm, number_of
from .failures import HelperError
from .marks import Layout, Marks, layout
from .program import BIOS, PAGE, REQUESTS, Disk, Fields, entry, program

VERSION = 2
COPIES = 3
"""Of the entry to each program. The kernel leaves a program out on a CPU where it is running already: a request that is
made or completed by an interrupt in its midst would not be seen. A task is interrupted by a softirq, that by an
interrupt, and each of these is in one at most: of three entries that do the same, one is free."""

_MARKS = "marks"
_DISTRUST = (
    ("version", "the tracker is another version's"),
    ("boot_id", "the guest was started anew"),
    ("switch", "the tracker's switch was replaced"),
    ("consumer", "another host or repository used the tracker"),
    ("identity", "another disk has this device number now"),
    ("device", "another disk has this device number now"),
    ("size", "the disk was resized"),
    ("incarnation", "the disk was detached and attached again"),
)
_NVME_HEAD = re.compile(r"nvme[0-9]+n[0-9]+\Z")


class Facts(NamedTuple):
    """What makes a disk the one that it was: ``incarnation`` changes whenever the kernel makes or refills the device.
    ``events`` are those that show its writes; ``scattered``: its discards may have many ranges."""

    device: str
    size: int
    incarnation: str
    events: Tuple[str, str]
    scattered: bool


class Tracked:
    """A disk whose programs run."""

    def __init__(self, path: str, facts: Facts, marks: Marks, links: List[int], record: Dict[str, Any]) -> None:
        self.facts, self.marks, self.path = facts, marks, path
        self._links, self._record = links, record

    @property
    def generation(self) -> Optional[str]:
        """The backup since which all changes are known; None when they are known only since tracking began."""
        value = self._record["generation"]
        return value if isinstance(value, str) else None

    def move(self, side: int) -> None:
        """Collect a side that no program marks now."""
        size = devices.size_of(self.facts.device)
        if size != self.facts.size:
            self.marks.everything("the disk now has %d bytes, not %d" % (size, self.facts.size))
        self.marks.move(side)

    def settle(self, generation: str) -> None:
        """What was collected belongs to ``generation``: it is forgotten. A death in between is made good later."""
        self._keep(generation=generation, forget=True)
        self.finish_settling()

    def finish_settling(self) -> None:
        """Forget what was to be forgotten."""
        if self._record["forget"]:
            self.marks.forget()
            self._keep(forget=False)

    def _keep(self, **changes: Any) -> None:
        self._record.update(changes)
        self.marks.keep(self._record)

    def close(self) -> None:
        """Let go; the programs go on. The memory goes with the last reference to it."""
        _close(self._links)
        self._links = []


def look(device: str) -> Facts:
    """Facts of a disk. Raises ``HelperError`` for one that cannot be tracked."""
    base = os.path.realpath("/sys/dev/block/" + device)
    name = os.path.basename(base)
    if not os.path.exists(os.path.join(base, "dev")):
        raise HelperError("NoTracking", "there is no device %s" % device)
    if os.path.exists(os.path.join(base, "partition")):
        raise HelperError("NoTracking", "%s is a partition: whole disks are tracked" % name)
    if devices.read(os.path.join(base, "queue/zoned")) not in ("", "none"):
        raise HelperError("NoTracking", "%s is a zoned disk: resetting a zone is not seen" % name)
    events = REQUESTS
    if not os.path.isdir(os.path.join(base, "mq")):
        events = BIOS
        _require_whole_bios(name, device)
    sequence = devices.read(os.path.join(base, "diskseq"))  # since Linux 5.15
    incarnation = "%s/%d" % (sequence, os.stat(base).st_ino)
    scattered = devices.read(os.path.join(base, "queue/max_discard_segments")) not in ("", "0", "1")
    size = devices.size_of(device)
    if not size:
        raise HelperError("NoTracking", "%s has no size" % name)
    return Facts(device, size, incarnation, events, scattered)


def start(path: str, facts: Facts, switch: int, record: Dict[str, Any]) -> Tracked:
    """Begin to track into the new directory ``path``. Raises ``HelperError``; nothing is left then."""
    where = layout(facts.size)
    os.mkdir(path, 0o700)
    opened: List[int] = []
    try:
        with _feature("maps in shared memory (Linux 5.5)"):
            opened.append(bpf.create_array("vmbk_marks", 1 << PAGE, where.length >> PAGE))
            bpf.pin(opened[0], os.path.join(path, _MARKS))
        marks = Marks(opened[0], where)
        _attach(path, facts, where, opened, switch)
        links = opened[1:]
        record = dict(record, **_identity(facts, switch), generation=None, forget=False)
        tracked = Tracked(path, facts, marks, links, record)
        tracked._keep()
    except BaseException:
        remove(path)
        _close(opened[1:])
        raise
    finally:
        _close(opened[:1])
    return tracked


def adopt(path: str, facts: Facts, switch: int, record: Dict[str, Any]) -> Tracked:
    """Go on with what is pinned in ``path``. Raises ``HelperError`` with the reason why it is not to be trusted."""
    where, opened = layout(facts.size), []
    try:
        opened.append(bpf.get(os.path.join(path, _MARKS)))
        if not bpf.map_info(opened[0]).is_array(1 << PAGE, where.length >> PAGE):
            raise HelperError("NoTracking", "the disk was resized, or the tracker is another version's")
        marks = Marks(opened[0], where)
        kept = _trusted(marks.record(), dict(record, **_identity(facts, switch)))
        for event in facts.events:
            os.close(bpf.get(os.path.join(path, event)))  # without it the links lead nowhere
            opened += [bpf.get(os.path.join(path, _link(event, copy))) for copy in range(COPIES)]
        tracked = Tracked(path, facts, marks, opened[1:], kept)
        tracked.finish_settling()
    except BaseException as error:
        _close(opened[1:])
        if isinstance(error, OSError):
            raise HelperError("NoTracking", "the tracker is damaged: %s" % error.strerror)
        raise
    finally:
        _close(opened[:1])
    return tracked


def remove(path: str) -> None:
    """End the tracking of one disk."""
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _identity(facts: Facts, switch: int) -> Dict[str, Any]:
    return {
        "version": VERSION,
        "boot_id": devices.boot_id(),
        "device": facts.device,
        "size": facts.size,
        "incarnation": facts.incarnation,
        "switch": bpf.map_info(switch).ident,
    }


def _trusted(kept: Optional[Dict[str, Any]], wanted: Dict[str, Any]) -> Dict[str, Any]:
    """The record that was kept, if it is of the same disk and for the same consumer."""
    if kept is None or not {"generation", "forget"} <= set(kept):
        raise HelperError("NoTracking", "the tracker's record is damaged")
    for key, what in _DISTRUST:
        if kept.get(key) != wanted[key]:
            raise HelperError("NoTracking", what)
    return kept


def _attach(path: str, facts: Facts, where: Layout, opened: List[int], switch: int) -> None:
    """Run the programs; the links are added to what is ``opened``, the map of marks being the first."""
    major, minor = (int(part) for part in facts.device.split(":"))
    disk = Disk(major, minor, where.chunks, opened[0], switch, where.fine, where.coarse, where.stride, facts.scattered)
    for event in facts.events:
        with _feature("programs on raw tracepoints (Linux 5.5)"):
            code = bpf.load("vmbk_" + event[6:], program(event, disk, _fields()))
        try:
            jump = bpf.create_jump("vmbk_jump", code)
        finally:
            os.close(code)
        try:
            bpf.pin(jump, os.path.join(path, event))
            for copy in range(COPIES):
                opened.append(_enter(jump, event, os.path.join(path, _link(event, copy))))
        finally:
            os.close(jump)


def _enter(jump: int, event: str, path: str) -> int:
    """A link, pinned at ``path``, of a program of its own that goes on through ``jump``."""
    code = bpf.load("vmbk_entry", entry(jump))
    try:
        with _feature("pinned links (Linux 5.8)"):
            link = bpf.attach(code, event)
            try:
                bpf.pin(link, path)
            except BaseException:
                os.close(link)
                raise
            return link
    finally:
        os.close(code)


def _link(event: str, copy: int) -> str:
    """A link's name."""
    return "%s-%d" % (event, copy)


@functools.lru_cache(maxsize=1)
def _fields() -> Fields:
    """Once for all disks: the kernel describes a hundred thousand types."""
    return Fields(Types())


@contextlib.contextmanager
def _feature(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HelperError("NoTracking", "the guest's kernel does not give us %s: %s" % (name, error.strerror))


def _require_whole_bios(name: str, device: str) -> None:
    """A disk without requests shows bios, and at their completion not all of them, or not whole."""
    if _NVME_HEAD.match(name):
        raise HelperError("NoTracking", "%s is an NVMe multipath head: it does not show when its writes end" % name)
    if name.startswith("dm-"):
        dm = Dm()
        try:
            kinds = [row.kind for row in dm.table(number_of(device))]
        finally:
            dm.close()
        if kinds != ["multipath"]:  # others may get another table, and other contents, without a write
            raise HelperError("NoTracking", "%s is a device-mapper volume: the disks below it are tracked" % name)
