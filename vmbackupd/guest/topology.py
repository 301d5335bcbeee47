"""How a guest's volumes lie on its disks: where each byte of a volume is, and who uses a disk.

Pure functions of a report. The guest may have written anything into it: every walk is bounded.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vmbackupd.errors import UncoveredVolume
from vmbackupd.guest.report import DmTarget, GuestDevice, GuestReport
from vmbackupd.units import SECTOR

MAX_SEGMENTS = 2**20
_DEEPEST = 32
_NAMED = 6  # volumes named in a reason
OURS = "VMBK-"  # how the uuids of the helper's own device-mapper devices begin


class Place(NamedTuple):
    """``length`` bytes on the disk ``disk`` (``major:minor``) from byte ``offset``."""

    disk: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LiveUser:
    """Something that uses a disk. ``what`` says it in words (``the filesystem at /boot (vda1)``), ``kind`` is
    filesystem, swap or volume, ``devno`` the device it uses directly; ``volume`` is the device-mapper volume to
    snapshot for it, the topmost on the way to the disk whose bytes can be placed, or None when there is none."""

    what: str
    kind: str
    devno: str
    volume: str | None


def flatten(report: GuestReport, devno: str) -> tuple[Place, ...]:
    """Where the bytes of a volume lie, in their order, adjacent places joined.

    Raises ``UncoveredVolume`` with the reason when they cannot be placed: a target that moves, encrypts or repeats
    them, a table that does not fit the devices below, or a device that is not in the report.
    """
    device = _require(report, devno, devno)
    size = device.size
    if device.dm is not None:
        size = sum(row.length for row in device.dm.table) * SECTOR
    places: list[Place] = []
    for number, place in enumerate(_places(report, device, 0, size, 0, device.name)):
        if number >= MAX_SEGMENTS:
            raise UncoveredVolume(f"{device.name} lies in more than {MAX_SEGMENTS} pieces on its disks")
        last = places[-1] if places else None
        if last is not None and last.disk == place.disk and last.offset + last.length == place.offset:
            places[-1] = Place(last.disk, last.offset, last.length + place.length)
        else:
            places.append(place)
    if not places:
        raise UncoveredVolume(f"{device.name} has no table")
    return tuple(places)


def why_not_flat(report: GuestReport, devno: str) -> str | None:
    """The reason why the volume's bytes cannot be placed on disks, None when they can."""
    known = report.memo.setdefault("why_not_flat", {})
    assert isinstance(known, dict)
    return _reason(report, devno, known, 0)


def leaf_disks(report: GuestReport, devno: str) -> frozenset[str]:
    """The disks below a device, whatever lies between."""
    found, queue, seen = set(), [devno], set()
    while queue:
        number = queue.pop()
        device = report.by_devno(number)
        if number in seen or device is None:
            continue
        seen.add(number)
        below = [] if is_multipath(device) else _below(device)
        queue += below
        if not below:
            found.add(number)
    return frozenset(found)


def live_users(report: GuestReport, devno: str) -> tuple[LiveUser, ...]:
    """Everything that uses the disk ``devno``: filesystems, swap, and volumes that nothing in the report uses (a
    database or a VM may have them open). Without the helper's own devices; each user once for each volume it is
    reached through."""
    found: dict[tuple[str, str, str | None], LiveUser] = {}
    start = report.by_devno(devno)
    if start is None:
        return ()
    seen: set[tuple[str, str | None]] = set()
    queue: list[tuple[GuestDevice, str | None, bool]] = [(start, None, False)]
    while queue:
        device, volume, stacked = queue.pop()
        if device.dm is not None and not is_multipath(device) and why_not_flat(report, device.devno) is None:
            volume = device.devno
        if (device.devno, volume) in seen:
            continue
        seen.add((device.devno, volume))
        upward = [(other, volume, True) for other in _holders(report, device)]
        upward += [(part, volume, False) for part in report.partitions(device.devno)]
        for user in _uses(device, volume, stacked and not upward):
            found.setdefault((user.devno, user.what, user.volume), user)
        queue += upward
    return tuple(sorted(found.values(), key=lambda user: (user.devno, user.what, user.volume or "")))


def held_by(report: GuestReport, users: Iterable[LiveUser]) -> str:
    """The volumes that are snapshotted for users of a disk, in words."""
    volumes = (report.by_devno(user.volume) for user in users if user.volume is not None)
    names = sorted({volume.dm.name for volume in volumes if volume is not None and volume.dm is not None})
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def why_not_held(report: GuestReport, user: LiveUser) -> str:
    """Why no snapshot in the guest holds a user of a disk that has no volume, in words."""
    reason = why_not_flat(report, user.devno)
    return f"{user.what} lies on no volume that can be snapshotted in the guest" + (f" ({reason})" if reason else "")


def top_volumes(report: GuestReport) -> tuple[GuestDevice, ...]:
    """The volumes to snapshot when everything is to be held: each that a user of some disk is reached through."""
    found = {}
    for disk in report.devices:
        if disk.type == "disk":
            for user in live_users(report, disk.devno):
                device = report.by_devno(user.volume) if user.volume is not None else None
                if device is not None:
                    found[device.devno] = device
    return tuple(found[devno] for devno in sorted(found))


def is_multipath(device: GuestDevice) -> bool:
    """Whether the device is several paths to one disk: it stands for that disk, and nothing lies below it."""
    return device.dm is not None and [row.kind for row in device.dm.table] == ["multipath"]


def multipath_of(report: GuestReport, devno: str) -> GuestDevice | None:
    """The multipath device that a disk is a path of."""
    disk = report.by_devno(devno)
    holders = (report.by_devno(holder) for holder in disk.holders) if disk is not None else ()
    return next((holder for holder in holders if holder is not None and is_multipath(holder)), None)


def is_ours(device: GuestDevice) -> bool:
    """Whether the helper made this device."""
    return device.dm is not None and device.dm.uuid.startswith(OURS)


def _uses(device: GuestDevice, volume: str | None, unused_top: bool) -> Iterator[LiveUser]:
    name = device.dm.name if device.dm is not None else device.name
    for mount in device.mounts:
        yield LiveUser(f"the filesystem at {mount.path} ({name})", "filesystem", device.devno, volume)
    if device.swap:
        yield LiveUser(f"swap ({name})", "swap", device.devno, volume)
    if device.mounts or device.swap:
        return
    if (device.fstype or "").startswith("zfs"):  # a pool shows neither mounts nor holders
        yield LiveUser(f"the ZFS member {name}", "volume", device.devno, volume)
    elif unused_top:
        yield LiveUser(f"the volume {name}", "volume", device.devno, volume)


def _holders(report: GuestReport, device: GuestDevice) -> list[GuestDevice]:
    others = (report.by_devno(holder) for holder in device.holders)
    return [other for other in others if other is not None and not is_ours(other)]


def _below(device: GuestDevice) -> list[str]:
    return [*device.slaves, *([device.parent] if device.parent is not None else [])]


def _require(report: GuestReport, devno: str, name: str) -> GuestDevice:
    device = report.by_devno(devno)
    if device is None:
        raise UncoveredVolume(f"{name} lies on {devno}, which the guest does not report")
    return device


def _places(
    report: GuestReport, device: GuestDevice, start: int, length: int, level: int, name: str
) -> Iterator[Place]:
    """Where ``length`` bytes from byte ``start`` of ``device`` lie; ``name`` is the volume this is about."""
    if level > _DEEPEST:
        raise UncoveredVolume(f"{name} is stacked more than {_DEEPEST} levels deep")
    if device.dm is not None and not is_multipath(device):
        table, end = device.dm.table, start + length
        index = bisect.bisect_right(table, start // SECTOR, key=lambda row: row.start) - 1
        for row in itertools.islice(table, max(index, 0), None):
            stop = min(end, (row.start + row.length) * SECTOR)
            if start >= stop:
                break
            yield from _row_places(report, row, start - row.start * SECTOR, stop - start, level, name)
            start = stop
        if start != end:
            raise UncoveredVolume(f"{name} lies on {device.dm.name}, which has no table for all of it")
        return
    if start + length > device.size:
        raise UncoveredVolume(f"{name} reaches past the end of {device.name}")
    if device.type == "disk" or is_multipath(device):
        yield Place(device.devno, start, length)
    elif device.type == "part" and device.parent is not None and device.start is not None:
        yield from _places(report, _require(report, device.parent, name), device.start + start, length, level + 1, name)
    else:
        raise UncoveredVolume(f"{name} lies on {device.name}, a {device.type} device: its bytes cannot be placed")


def _row_places(report: GuestReport, row: DmTarget, start: int, length: int, level: int, name: str) -> Iterator[Place]:
    stripes, chunk, members = _members(row, name)
    if not chunk:
        devno, offset = members[0]
        yield from _places(report, _require(report, devno, name), offset + start, length, level + 1, name)
        return
    devices = [(_require(report, devno, name), offset) for devno, offset in members]
    while length:
        index, within = divmod(start, chunk)
        size = min(length, chunk - within)
        device, offset = devices[index % stripes]
        yield from _places(report, device, offset + index // stripes * chunk + within, size, level + 1, name)
        start, length = start + size, length - size


def _members(row: DmTarget, name: str) -> tuple[int, int, list[tuple[str, int]]]:
    """(stripes, chunk in bytes or 0, [(device, offset in bytes)]) of a linear or striped row."""
    words = row.params.split()
    if row.kind not in ("linear", "striped"):
        raise UncoveredVolume(f"{name} has a device-mapper target {row.kind}: its bytes cannot be placed on a disk")
    try:
        if row.kind == "linear":
            stripes, chunk, pairs = 1, 0, words
        else:
            stripes, chunk, pairs = _number(words[0]), _number(words[1]) * SECTOR, words[2:]
            if not chunk or not stripes or row.length * SECTOR % (stripes * chunk):
                raise ValueError
        if len(pairs) != 2 * stripes:
            raise ValueError
        return stripes, chunk, [(pairs[i], _number(pairs[i + 1]) * SECTOR) for i in range(0, len(pairs), 2)]
    except (ValueError, IndexError) as error:
        raise UncoveredVolume(f"{name} has a {row.kind} target that does not parse: {row.params[:80]!r}") from error


def _number(word: str) -> int:
    """A number of sectors: decimal, and not so long that arithmetic on it becomes work."""
    if not word.isascii() or not word.isdigit() or len(word) > 18:
        raise ValueError(word)
    return int(word)


def _reason(report: GuestReport, devno: str, known: dict[str, str | None], level: int) -> str | None:
    """``why_not_flat``, each device looked at once."""
    if devno not in known:
        known[devno] = f"{devno} lies on itself"  # what a walk in a circle finds
        try:
            known[devno] = _own_reason(report, _require(report, devno, devno), known, level)
        except UncoveredVolume as error:
            known[devno] = str(error)
    return known[devno]


def _own_reason(report: GuestReport, device: GuestDevice, known: dict[str, str | None], level: int) -> str | None:
    if level > _DEEPEST:
        return f"{device.name} is stacked too deep"
    if is_multipath(device):
        below = set()
    elif device.dm is not None:
        below = {devno for row in device.dm.table for devno, _ in _members(row, device.dm.name)[2]}
        if not below:
            return f"{device.dm.name} has no table"
    elif device.type == "part" and device.parent is not None:
        below = {device.parent}
    elif device.type == "disk":
        below = set()
    else:
        return f"{device.name} is a {device.type} device: its bytes cannot be placed on a disk"
    reasons = (_reason(report, devno, known, level + 1) for devno in sorted(below))
    return next((reason for reason in reasons if reason), None)
