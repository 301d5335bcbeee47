"""What enrolling a filesystem changes in a guest, and how it is undone: see ``linear`` for what it is good for.

The running mount is not touched. What is written lies in /etc and is recorded first, so that it can be undone from any
state. fstab then names the filesystem by its UUID, which finds the linear device where there is one, and else what lies
below: whatever fails at a boot, the filesystem can be mounted.
"""

import json
import os
import re
import struct
import subprocess
from typing import Any, Dict, List, NamedTuple, Tuple

from . import devices, files, fstab, linear, mounts, mountunit, udevrules
from .failures import HelperError

FSTAB = "etc/fstab"
COPY = "etc/fstab.vmbackupd"  # fstab as it was before the last change of ours
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT = ("/", "/usr", "/etc", "/boot", "/efi", "/bin", "/sbin", "/lib", "/run")  # mounted before units, or by loaders
_UUID = re.compile(r"[0-9A-Za-z-]{4,64}\Z")

Device = Dict[str, Any]


class Plan(NamedTuple):
    """What enrolling one filesystem means. ``old``: the first fields that change in fstab, by the lines' keys;
    ``units``: all mount units of the filesystem, ``moved`` those whose ``What`` changes; ``where``: mount points."""

    names: linear.Linear
    device: Device
    old: Dict[str, str]
    units: List[str]
    moved: List[str]
    where: List[str]

    def record(self) -> str:
        """For ``unenroll``."""
        fields = {"uuid": self.names.uuid, "old": self.old, "units": self.units, "where": self.where}
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"


def look(argument: str, root: str = "/") -> Plan:
    """The plan for one device. Raises ``HelperError`` with the reason when it cannot or must not be enrolled."""
    devno = mounts.devno_of_node(_node(argument))
    found = [device for device in devices.probe(None)["devices"] if device["devno"] == devno]
    if not found:
        raise HelperError("NoDevice", "%s is no block device" % argument)
    device, properties = found[0], devices.properties(found[0]["devno"])
    if properties.get("ID_FS_UUID") in linear.enrolled(root):
        raise HelperError("Enrolled", "/dev/%s is enrolled already" % device["name"])
    _require_fit(device, properties)
    filesystem = fstab.of_udev(properties, device["devno"])
    written = fstab.entries(files.read(os.path.join(root, FSTAB)))
    lines = [line for line in written if fstab.means(line.spec, filesystem)]
    native = [unit for unit in mountunit.native(root) if fstab.means(unit.what, filesystem)]
    where = [line.where for line in lines] + [unit.where for unit in native]
    _require_mountable(device["name"], where, [line.options for line in lines] + [unit.options for unit in native])
    old = {line.key: line.spec for line in lines if not fstab.by_uuid(line.spec)}
    units = [mountunit.name_of(line.where) for line in lines] + [unit.name for unit in native]
    moved = [unit.name for unit in native if not fstab.by_uuid(unit.what)]
    names = linear.Linear(filesystem.uuid)
    return Plan(names, device, old, sorted(set(units)), moved, where)


def changes(plan: Plan) -> List[str]:
    """What ``apply`` would do, in words."""
    lines = ["%s in /%s becomes %s" % (spec, FSTAB, plan.names.spec) for spec in sorted(plan.old.values())]
    paths = [plan.names.record_path, plan.names.rules_path, *plan.names.files(plan.units, plan.moved)]
    return lines + ["writes /" + path for path in sorted(paths)]


def apply(plan: Plan, root: str = "/") -> None:
    """Write everything, the record first, and let systemd and udev read it. Nothing that is mounted is touched."""
    names = plan.names
    files.write(os.path.join(root, names.record_path), plan.record())
    for path, text in names.files(plan.units, plan.moved).items():
        files.write(os.path.join(root, path), text)
    _edit(root, {line: (spec, names.spec) for line, spec in plan.old.items()})
    command("systemctl", "daemon-reload")
    files.write(os.path.join(root, names.rules_path), names.rules())
    command("udevadm", "control", "--reload")
    _look_again(names.uuid)


def withdraw(names: linear.Linear, old: Dict[str, str], units: List[str], root: str = "/") -> None:
    """Undo ``apply``, however far it came: fstab's lines as they were, the files and the device gone."""
    if mounts.devno_of_node(names.node) is not None:
        command("dmsetup", "remove", "--retry", names.name)
    _edit(root, {line: (names.spec, spec) for line, spec in old.items() if not _another(spec, names.uuid)})
    paths = [names.rules_path, *names.files(units, [])]
    if linear.enrolled(root) in ([], [names.uuid]):
        paths.append(COPY)
    else:
        paths.remove(linear.SCRIPT)  # the others' devices are made by it
    for path in paths:
        files.remove(os.path.join(root, path))
    for path in [linear.MARKS] + [os.path.dirname(names.drop_in_path(unit)) for unit in units]:
        _remove_empty(os.path.join(root, path))
    udevrules.run(["systemctl", "reset-failed", names.unit])
    command("systemctl", "daemon-reload")
    command("udevadm", "control", "--reload")
    _look_again(names.uuid)
    files.remove(os.path.join(root, names.record_path))
    _remove_empty(os.path.join(root, os.path.dirname(names.record_path)))


def _edit(root: str, specs: Dict[str, Tuple[str, str]]) -> None:
    """Let :func:`edited` do its work in the file, of which a copy is kept."""
    path = os.path.join(root, FSTAB)
    before = files.read(path)
    after = edited(before, specs)
    if after != before:
        files.write(os.path.join(root, COPY), before)
        files.write(path, after)


def edited(text: str, specs: Dict[str, Tuple[str, str]]) -> str:
    """fstab with first fields changed, by the lines' keys, from one to another. What somebody else changed stays."""
    wanted = {}
    for line in fstab.entries(text):
        before, after = specs.get(line.key, (None, ""))
        if line.spec == before:
            wanted[line.key] = after
    return fstab.change(text, wanted)


def _another(spec: str, uuid: str) -> bool:
    """Whether a path that led to the filesystem leads to another one now: disks have been numbered anew."""
    devno = mounts.devno_of_node(mounts.unescape(spec)) if spec.startswith("/") else None
    if devno is None or devices.properties(devno).get("ID_FS_UUID") == uuid:
        return False
    print("/%s keeps UUID=%s: %s is another device now" % (FSTAB, uuid, spec))
    return True


def _require_fit(device: Device, properties: Dict[str, str]) -> None:
    """Refuse what is no plain filesystem of one disk."""
    node, uuid = "/dev/" + device["name"], properties.get("ID_FS_UUID", "")
    why = None
    if device["type"] == "dm":
        why = "is a device-mapper volume: it can be snapshotted as it is"
    elif device["type"] not in ("disk", "part"):
        why = "is neither a disk nor a partition"
    elif device["holders"]:
        why = "is used by another device (LVM, RAID or multipath): nothing mounts it directly"
    elif device["swap"] or properties.get("ID_FS_USAGE") != "filesystem":
        why = "holds %s, no filesystem" % (properties.get("ID_FS_TYPE") or "nothing known")
    elif not _UUID.match(uuid):
        why = "has a filesystem without a UUID"
    elif properties["ID_FS_TYPE"] == "btrfs" and _btrfs_devices(node) != 1:
        why = "is one of several devices of a btrfs"
    if why is None:
        twins = [twin["name"] for twin in devices.probe(None)["devices"] if twin["fsuuid"] == uuid]
        if len(twins) > 1:
            why = "has the UUID %s like %s: give one of them another" % (uuid, ", ".join(sorted(set(twins))))
    if why is not None:
        raise HelperError("Unfit", "%s %s" % (node, why))


def _require_mountable(name: str, where: List[str], options: List[List[str]]) -> None:
    if not where:
        raise HelperError(
            "NotMounted", "neither /etc/fstab nor a mount unit mounts /dev/%s: add a line for it to /etc/fstab" % name
        )
    for path in where:
        if path in _KEPT or path.startswith(("/boot/", "/efi/")):
            raise HelperError("Unfit", "/dev/%s is mounted at %s, before or without systemd's units" % (name, path))
    if any("x-initrd.mount" in words for words in options):
        raise HelperError("Unfit", "/dev/%s is mounted by the initrd (x-initrd.mount)" % name)


def _btrfs_devices(node: str) -> int:
    """How many devices a btrfs has, from its superblock (magic at 64 KiB + 0x40, num_devices at + 0x88)."""
    with open(node, "rb") as file:
        file.seek(65536)
        block = file.read(4096)
    return int(struct.unpack_from("<Q", block, 0x88)[0]) if block[0x40:0x48] == b"_BHRfS_M" else 0


def _node(argument: str) -> str:
    tag, _, value = argument.partition("=")
    return "/dev/disk/by-uuid/" + value if tag == "UUID" else argument


def _look_again(uuid: str) -> None:
    """Have udev apply its rules anew to what holds the filesystem."""
    for name in os.listdir(devices.BLOCK):
        devno = devices.devno_of_name(name)
        if not name.startswith("dm-") and devices.properties(devno).get("ID_FS_UUID") == uuid:
            with open(os.path.join(devices.BLOCK, name, "uevent"), "w") as file:
                file.write("change")
    command("udevadm", "settle", "--timeout=30")


def _remove_empty(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError:
        pass  # something else is in it, or it is gone


def command(*words: str) -> None:
    """Run a program of the guest's. Raises ``HelperError`` with what it said when it fails."""
    environment = dict(os.environ, PATH=PATH)
    done = subprocess.run(
        words, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    if done.returncode != 0:
        said = done.stdout.decode("utf-8", "replace").strip()
        raise HelperError("CommandFailed", "%s: %s" % (" ".join(words), said or "exit status %d" % done.returncode))
