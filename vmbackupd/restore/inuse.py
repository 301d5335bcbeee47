"""Who uses a target: a mount, swap, another device on top of it, a lock, a domain. A used target is never written."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmbackupd.errors import HypervisorError, NotFound
from vmbackupd.hypervisor.base import DiskSource, Hypervisor
from vmbackupd.restore.address import Target


@dataclass(frozen=True, slots=True)
class DomainDiskUse:
    """A disk of a domain, as something a target may collide with. ``paths`` are the files of its chain."""

    domain: str
    uuid: str
    running: bool
    target: str
    source: DiskSource | None
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return f"disk {self.target} of the {'running' if self.running else 'defined'} VM {self.domain}"


async def domain_disks(hypervisor: Hypervisor, notes: list[str]) -> list[DomainDiskUse]:
    """Every disk of every domain, with the files of its whole chain."""
    uses: list[DomainDiskUse] = []
    for name, uuid, running in await hypervisor.domains():
        try:
            info = await hypervisor.domain(uuid)
        except NotFound:
            continue  # undefined since it was listed
        except HypervisorError as error:
            notes.append(f"the disks of VM {name} are not known ({error}): targets were not compared with them")
            continue
        for disk in info.disks:
            own = (disk.source.path,) if disk.source is not None and disk.source.path else ()
            paths = tuple(dict.fromkeys(own + disk.chain))
            uses.append(DomainDiskUse(name, uuid, running, disk.target, disk.source, paths))
    return uses


def users_of_path(path: str, uses: list[DomainDiskUse]) -> list[DomainDiskUse]:
    """The disks that lie on ``path``, under whatever name."""
    wanted = file_key(path)
    return [use for use in uses if any(file_key(other) == wanted for other in use.paths)]


def users_of_lun(iqn: str, lun: int, uses: list[DomainDiskUse]) -> list[DomainDiskUse]:
    """The disks on a logical unit. Portals are not compared: one LUN is often reachable through several."""
    return [use for use in uses if use.source is not None and use.source.protocol == "iscsi"
            and use.source.name is not None and lun_of_name(use.source.name) == (iqn, lun)]


def lun_of_name(name: str) -> tuple[str, int] | None:
    """``IQN/LUN`` as libvirt writes it, taken apart; an IQN alone means LUN 0."""
    iqn, _, lun = name.partition("/")
    return (iqn, int(lun or 0)) if (lun or "0").isdecimal() else None


def file_key(path: str) -> tuple[object, ...]:
    """What makes two paths the same place: the device's number, the inode, or the name of what does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return ("path", os.path.realpath(path))
    if stat.S_ISBLK(status.st_mode):
        return ("block", status.st_rdev)
    return ("inode", status.st_dev, status.st_ino)


def place(target: Target) -> tuple[object, ...]:
    """What makes two targets the same: the file or device, or the logical unit, whichever portal leads to it."""
    if target.iscsi is not None:
        return ("lun", target.iscsi.iqn, target.iscsi.lun)
    return file_key(target.file)


def block_users(path: str, *, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> list[str]:
    """Mounts, swap areas and devices on top of the block device ``path`` or one of its partitions."""
    number = os.stat(path).st_rdev
    devices = list(_with_partitions(sys / "dev/block" / f"{os.major(number)}:{os.minor(number)}"))
    numbers = {device: (device / "dev").read_text().strip() for device in devices}
    users: list[str] = []
    mounts = [line.split(" ") for line in (proc / "self/mountinfo").read_text().splitlines()]
    swaps = {_device_number(line.split()[0]) for line in (proc / "swaps").read_text().splitlines()[1:]}
    for device, text in numbers.items():
        name = device.resolve().name
        users += [f"{name} is mounted at {fields[4]}" for fields in mounts if fields[2] == text]
        if text in swaps:
            users.append(f"{name} is a swap area")
        users += [f"{name} is part of {holder.name}" for holder in sorted((device / "holders").glob("*"))]
    return users or _claimed(path)


def _with_partitions(device: Path) -> Iterator[Path]:
    yield device
    for partition in sorted(device.resolve().glob("*/partition")):
        yield partition.parent


def _device_number(path: str) -> str:
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}"


def _claimed(path: str) -> list[str]:
    """The kernel's own answer, for users that neither sysfs nor procfs names (a mount in another namespace)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return ["the kernel says it is in use"]
        raise
    os.close(fd)
    return []
