"""What block devices the guest has, from sysfs, udev's database, mountinfo and device-mapper."""

import os
import platform
import re
import stat
from typing import Any, Dict, List, Optional

from . import facts, mounts
from .dm import Dm, Target, number_of
from .failures import HelperError, clip

BLOCK = "/sys/class/block"
UDEV = "/run/udev/data"
SECTOR = 512
MAX_DEVICES = 4096  # what the host accepts in a report
MAX_ROWS = 65536

_PCI = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\Z")
_SCSI = re.compile(r"[0-9]+:[0-9]+:([0-9]+):([0-9]+)\Z")
_SESSION = re.compile(r"session[0-9]+\Z")
_ATA = re.compile(r"ata[0-9]+\Z")
_CLASSES = (("dm-", "dm"), ("md", "md"), ("loop", "loop"), ("sr", "rom"), ("zram", "zram"), ("ram", "ram"))

Device = Dict[str, Any]


def boot_id() -> str:
    """The kernel's id of this boot."""
    return read("/proc/sys/kernel/random/boot_id")


def probe(dm: Optional[Dm]) -> Dict[str, Any]:
    """The report on all block devices. ``dm`` is None where the kernel has no device-mapper."""
    names = sorted(os.listdir(BLOCK), key=lambda name: (len(name), name))
    devices = [device for device in (_device(name) for name in names) if device is not None]
    if len(devices) > MAX_DEVICES:
        raise HelperError(
            "TooManyDevices", "the guest has %d block devices, at most %d are handled" % (len(devices), MAX_DEVICES)
        )
    known = {device["devno"]: device for device in devices}
    for device in devices:  # a device that came or went meanwhile leaves no dangling reference
        device["slaves"] = [devno for devno in device["slaves"] if devno in known]
        device["holders"] = [devno for devno in device["holders"] if devno in known]
        if device["parent"] not in known:
            device["parent"] = None
        if device["type"] == "dm" and dm is not None:
            device["dm"] = _dm(dm, device["devno"])
    for mount in mounts.mounts():
        if mount.devno in known:
            known[mount.devno]["mounts"].append(
                {"path": clip(mount.path, 4096), "fstype": clip(mount.fstype, 64), "options": clip(mount.options, 1024)}
            )
    for devno in mounts.swaps():
        if devno in known:
            known[devno]["swap"] = True
    return {
        "boot_id": boot_id(),
        "fsfreeze_hook": facts.fsfreeze_hook(),
        "initiator": facts.initiator(),
        "kernel": clip(platform.release(), 128),
        "hostname": clip(platform.node(), 255),
        "devices": devices,
    }


def read(path: str, limit: int = 4096) -> str:
    """A short text file of the kernel's; empty where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace").replace("\0", "").strip()
    except OSError:
        return ""


def size_of(devno: str) -> int:
    """Bytes of a device as it is now; 0 when it is gone."""
    return _number("/sys/dev/block/%s/size" % devno) * SECTOR


def devno_of_name(name: str) -> str:
    """``major:minor`` of a kernel name; empty when the device is gone."""
    return read(os.path.join(BLOCK, name, "dev"))


def node(number: str) -> str:
    """The kernel's own node of a device. Raises ``HelperError`` when it is another device's."""
    path = "/dev/" + os.path.basename(os.path.realpath("/sys/dev/block/" + number)).replace("!", "/")
    try:
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode) and "%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev)) == number:
            return path
    except OSError:
        pass
    raise HelperError("NoDevice", "there is no device %s" % number)


def shown_rows(rows: List[Target]) -> List[List[Any]]:
    """A table as the host gets it: a dm-crypt key in it is nobody's business."""
    return [[row.start, row.length, row.kind, clip(_without_key(row), 65536)] for row in rows]


def _without_key(row: Target) -> str:
    if row.kind != "crypt":
        return row.params
    words = row.params.split(" ")
    if len(words) > 1:
        words[1] = "-"
    return " ".join(words)


def _device(name: str) -> Optional[Device]:
    """One device; None for what has no number (an NVMe path behind a multipath head) or has just gone."""
    base = os.path.join(BLOCK, name)
    devno = read(os.path.join(base, "dev"))
    if not devno:
        return None
    part = os.path.exists(os.path.join(base, "partition"))
    whole = os.path.dirname(os.path.realpath(base)) if part else base
    udev = properties(devno)
    hardware = os.path.realpath(os.path.join(whole, "device")) if os.path.exists(os.path.join(whole, "device")) else ""
    device: Device = {
        "name": clip(name.replace("!", "/"), 255),
        "devno": devno,
        "type": _type(name, part, hardware),
        "size": _number(os.path.join(base, "size")) * SECTOR,
        "logical_block": _number(os.path.join(whole, "queue/logical_block_size")) or SECTOR,
        "read_only": read(os.path.join(base, "ro")) == "1",
        "removable": read(os.path.join(whole, "removable")) == "1",
        "parent": read(os.path.join(whole, "dev")) if part else None,
        "start": _number(os.path.join(base, "start")) * SECTOR if part else None,
        "slaves": _links(os.path.join(base, "slaves")),
        "holders": _links(os.path.join(base, "holders")),
        "backing": clip(read(os.path.join(base, "loop/backing_file")), 4096) or None,
        "dm": None,
        "fstype": clip(udev.get("ID_FS_TYPE", ""), 64) or None,
        "fsuuid": clip(udev.get("ID_FS_UUID", ""), 128) or None,
        "mounts": [],
        "swap": False,
    }
    device.update(_identity(whole, hardware, udev))
    device.update(_address(hardware))
    return device


def _type(name: str, part: bool, hardware: str) -> str:
    if part:
        return "part"
    for prefix, kind in _CLASSES:
        if name.startswith(prefix):
            return kind
    return "disk" if hardware else "other"


def _identity(whole: str, hardware: str, udev: Dict[str, str]) -> Dict[str, Optional[str]]:
    serial = read(os.path.join(whole, "serial")) or read(os.path.join(hardware, "serial")) if hardware else ""
    serial = serial or udev.get("ID_SCSI_SERIAL", "") or udev.get("ID_SERIAL_SHORT", "") or _vpd_serial(hardware)
    return {
        "serial": clip(serial, 255) or None,
        "wwn": clip(_wwn(whole, hardware, udev), 255) or None,
        "vendor": clip(read(os.path.join(hardware, "vendor")), 64) or None if hardware else None,
        "model": clip(read(os.path.join(hardware, "model")), 64) or None if hardware else None,
    }


def _wwn(whole: str, hardware: str, udev: Dict[str, str]) -> str:
    """The world-wide name, lower case and without ``naa.``, ``eui.`` or ``0x``. Others (``t10.``) only name a model."""
    wwid = (read(os.path.join(hardware, "wwid")) if hardware else "") or read(os.path.join(whole, "wwid"))
    for prefix in ("naa.", "eui.", "uuid."):
        if wwid.startswith(prefix):
            return wwid[len(prefix) :].lower()
    name = (udev.get("ID_WWN_WITH_EXTENSION", "") or udev.get("ID_WWN", "")).lower()
    return name[2:] if name.startswith("0x") else name


def _vpd_serial(hardware: str) -> str:
    """Unit serial number, VPD page 0x80: four bytes of header, then text."""
    try:
        with open(os.path.join(hardware, "vpd_pg80"), "rb") as file:
            return file.read(256)[4:].decode("ascii", "replace").replace("\0", "").strip()
    except OSError:
        return ""


def _address(hardware: str) -> Dict[str, Any]:
    """Where the disk is attached: transport, the PCI function nearest to it, SCSI target and unit, iSCSI session."""
    address: Dict[str, Any] = {"transport": "other", "pci": None, "target": None, "unit": None, "iscsi": None}
    if not hardware:
        return address
    parts = hardware.split("/")
    subsystem = os.path.basename(os.path.realpath(os.path.join(hardware, "subsystem")))
    scsi = _SCSI.match(parts[-1])
    session = next((part for part in parts if _SESSION.match(part)), None)
    ata = next((part for part in parts if _ATA.match(part)), None)
    address["pci"] = next((part for part in reversed(parts) if _PCI.match(part)), None)
    if scsi:
        address["transport"] = "scsi"
        address["target"], address["unit"] = int(scsi.group(1)), int(scsi.group(2))
    if session is not None:
        address.update({"transport": "iscsi", "pci": None, "iscsi": _iscsi(session, address["unit"] or 0)})
    elif ata is not None:
        port = _number(os.path.join(hardware[: hardware.index("/" + ata) + len(ata) + 1], "ata_port", ata, "port_no"))
        address.update({"transport": "ata", "target": 0, "unit": port - 1 if port else None})
    elif "/usb" in hardware:
        address["transport"] = "usb"
    elif subsystem in ("virtio", "nvme"):
        address["transport"] = subsystem
    return address


def _iscsi(session: str, lun: int) -> Optional[Dict[str, Any]]:
    """The address a session was made with: what the initiator would log in to again."""
    iqn = read("/sys/class/iscsi_session/%s/targetname" % session)
    connection = "/sys/class/iscsi_connection/connection%s:0/" % session[len("session") :]
    host = read(connection + "persistent_address") or read(connection + "address")
    port = read(connection + "persistent_port") or read(connection + "port")
    if not iqn or not host:
        return None
    portal = "[%s]:%s" % (host, port) if ":" in host else "%s:%s" % (host, port)
    return {"iqn": clip(iqn, 255), "portal": clip(portal, 255), "lun": lun}


def _dm(dm: Dm, devno: str) -> Optional[Dict[str, Any]]:
    number = number_of(devno)
    try:
        info, rows = dm.info(number), dm.table(number)
    except OSError:
        return None  # removed meanwhile
    if len(rows) > MAX_ROWS:
        raise HelperError("TableTooLong", "%s has a table of %d rows" % (info.name, len(rows)))
    return {"name": info.name, "uuid": info.uuid, "table": shown_rows(rows)}


def properties(devno: str) -> Dict[str, str]:
    """What udev knows of a device."""
    found = {}
    for line in read(os.path.join(UDEV, "b" + devno), 65536).splitlines():
        if line.startswith("E:"):
            key, _, value = line[2:].partition("=")
            found[key] = value
    return found


def _links(directory: str) -> List[str]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [devno for devno in (devno_of_name(name) for name in names) if devno]


def _number(path: str) -> int:
    text = read(path)
    return int(text) if text.isdigit() else 0
