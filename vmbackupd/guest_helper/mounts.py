"""Who uses block devices: mounted filesystems and swap, by device number."""

import os
import re
import stat
from typing import Dict, Iterable, List, NamedTuple, Optional, Set, Tuple

_ESCAPE = re.compile(r"\\([0-7]{3})")
_BTRFS = "/sys/fs/btrfs"


class Mount(NamedTuple):
    """A mounted filesystem of a block device."""

    devno: str
    path: str
    fstype: str
    options: str


def mounts(processes: Optional[Iterable[str]] = None) -> List[Mount]:
    """Every mount of a block device, in every mount namespace: what a container has mounted is written to as well."""
    found: List[Mount] = []
    seen: Set[Tuple[str, str]] = set()
    for text in _tables(processes):
        for line in text.splitlines():
            for mount in _parse(line):
                if (mount.devno, mount.path) not in seen:
                    seen.add((mount.devno, mount.path))
                    found.append(mount)
    return found


def own_mounts() -> List[Mount]:
    """The mounts of this process's namespace."""
    return mounts(["self"])


def swaps() -> Set[str]:
    """Device numbers of swap devices. A swap file is a matter of the filesystem it lies on."""
    found: Set[str] = set()
    try:
        with open("/proc/swaps", errors="replace") as file:
            lines = file.read().splitlines()[1:]
    except OSError:
        return found
    for line in lines:
        devno = devno_of_node(unescape(line.split()[0]))
        if devno is not None:
            found.add(devno)
    return found


def _tables(processes: Optional[Iterable[str]]) -> Iterable[str]:
    """mountinfo of each mount namespace, our own first."""
    if processes is None:
        processes = ["self"] + [name for name in os.listdir("/proc") if name.isdigit()]
    seen = set()
    for process in processes:
        try:
            namespace = os.readlink("/proc/%s/ns/mnt" % process)
            if namespace in seen:
                continue
            seen.add(namespace)
            with open("/proc/%s/mountinfo" % process, errors="replace") as file:
                yield file.read()
        except OSError:
            continue  # the process has ended


def _parse(line: str) -> List[Mount]:
    """The mounts of one line of mountinfo: none without a block device, several for a filesystem over several."""
    left, _, right = line.partition(" - ")
    before, after = left.split(" "), right.split(" ")
    if len(before) < 6 or len(after) < 3:
        return []
    devno, path, options, fstype, source = before[2], unescape(before[4]), before[5], after[0], unescape(after[1])
    if devno.startswith("0:"):  # an anonymous number: btrfs and the like name their device as the source
        node = devno_of_node(source) if source.startswith("/dev/") else None
        if node is None:
            return []
        numbers = _btrfs_members(node) if fstype == "btrfs" else [node]
    else:
        numbers = [devno]
    return [Mount(number, path, fstype, options) for number in numbers]


def devno_of_node(path: str) -> Optional[str]:
    """``major:minor`` of the block device at ``path``; None when there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    return "%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev))


def _btrfs_members(devno: str) -> List[str]:
    """Device numbers of all devices of the btrfs that ``devno`` belongs to."""
    try:
        for filesystem in os.listdir(_BTRFS):
            members = _read_members(os.path.join(_BTRFS, filesystem, "devices"))
            if devno in members.values():
                return sorted(members.values())
    except OSError:
        pass
    return [devno]


def _read_members(directory: str) -> Dict[str, str]:
    members = {}
    if os.path.isdir(directory):
        for name in os.listdir(directory):
            with open(os.path.join(directory, name, "dev")) as file:
                members[name] = file.read().strip()
    return members


def unescape(text: str) -> str:
    """A field of mountinfo or fstab, where blanks are written in octal."""
    return _ESCAPE.sub(lambda found: chr(int(found.group(1), 8)), text)
