"""The host's block devices, as udev and sysfs know them: who a disk is, and when one comes, goes or changes.

Properties come from udev's database where udevd runs; everything needed is also read from sysfs, so that this works on
a machine without udevd.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyudev

from vmbackupd.units import SECTOR

_udev: Any = pyudev  # the library has no annotations

UDEV_CONTROL = Path("/run/udev/control")  # udevd's socket: events of the source "udev" come only where it listens
_NO_LUN = re.compile(r"(loop|ram|zram|sr|fd)\d+$")
_BUSES = (("usb", "usb"), ("virtio", "virtio"), ("nvme", "nvme"), ("session", "iscsi"), ("rport", "fc"), ("ata", "ata"),
          ("host", "scsi"))


@dataclass(frozen=True, slots=True)
class HostDevice:
    """One block device of the host. ``wwn`` is normalised (:func:`normalise_wwn`); ``size`` in bytes; ``kind`` is
    disk, partition or dm; ``bus`` virtio, iscsi, fc, ata, nvme, usb, scsi or None."""

    name: str
    devnode: str
    devno: str
    kind: str
    size: int
    read_only: bool
    wwn: str | None
    serial: str | None
    vendor: str | None
    model: str | None
    bus: str | None
    links: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostEvent:
    """``action`` is add, remove or change (or another word of the kernel's)."""

    action: str
    name: str
    devnode: str | None


def normalise_wwn(text: str) -> str:
    """A WWN in one spelling, whatever printed it: lower case, without ``0x``, ``naa.``, ``eui.`` or ``uuid.``.

    ``normalise_wwn("naa.600A") == normalise_wwn("0x600a") == "600a"``; other designators (``t10.``) keep their text.
    """
    word = text.strip().lower()
    for prefix in ("0x", "naa.", "eui.", "uuid."):
        word = word.removeprefix(prefix)
    return word


def host_luns() -> list[HostDevice]:
    """Whole disks and multipath maps of the host: what can be given to a guest as a LUN."""
    found = []
    for device in _udev.Context().list_devices(subsystem="block", DEVTYPE="disk"):
        if _NO_LUN.match(device.sys_name):
            continue
        described = _describe(device)
        if described is not None and (described.kind == "disk" or _is_multipath(device)):
            found.append(described)
    return sorted(found, key=lambda lun: lun.name)


def identify(path: str) -> HostDevice | None:
    """The block device behind ``path`` (links are followed); None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    try:
        return _describe(_udev.Devices.from_device_number(_udev.Context(), "block", status.st_rdev))
    except pyudev.DeviceNotFoundError:
        return None  # a node whose device is gone


def _describe(device: Any) -> HostDevice | None:
    base = Path(device.sys_path)
    disk = base.parent if device.device_type == "partition" else base
    try:
        size = int((base / "size").read_text()) * SECTOR
        devno = (base / "dev").read_text().strip()
        read_only = (base / "ro").read_text().strip() == "1"
    except (OSError, ValueError):
        return None  # unplugged while we look
    get = device.properties.get
    wwn = get("ID_WWN_WITH_EXTENSION") or get("ID_WWN") or _attribute(disk, "wwid", "device/wwid")
    kind = "partition" if device.device_type == "partition" else "dm" if (base / "dm").is_dir() else "disk"
    return HostDevice(
        name=device.sys_name, devnode=device.device_node or f"/dev/{device.sys_name}", devno=devno, kind=kind,
        size=size, read_only=read_only, wwn=normalise_wwn(wwn) if wwn else None,
        serial=get("ID_SERIAL_SHORT") or get("SCSI_IDENT_SERIAL") or _attribute(disk, "serial", "device/serial")
        or _unit_serial(disk),
        vendor=_vendor(disk), model=_attribute(disk, "device/model"),
        bus=_bus(base), links=tuple(sorted(device.device_links)))


def _attribute(base: Path, *names: str) -> str | None:
    for name in names:
        try:
            text = (base / name).read_bytes().decode(errors="replace").strip("\0 \n\t")
        except OSError:
            continue
        if text:
            return text
    return None


def _vendor(base: Path) -> str | None:
    vendor = _attribute(base, "device/vendor")
    return None if vendor is None or vendor.startswith("0x") else vendor  # virtio's is a PCI number


def _unit_serial(base: Path) -> str | None:
    """SCSI's vital product data page 0x80: four bytes of header, then the serial number in ASCII (SPC-4, 7.8.14)."""
    try:
        page = (base / "device/vpd_pg80").read_bytes()
    except OSError:
        return None
    return page[4:].decode("ascii", errors="replace").strip("\0 ") or None


def _is_multipath(device: Any) -> bool:
    uuid = _attribute(Path(device.sys_path), "dm/uuid")
    return uuid is not None and uuid.startswith("mpath-")


def _bus(base: Path) -> str | None:
    """The transport, from the names of the devices above in sysfs: nearest match of the most telling kind."""
    parts = [re.sub(r"[\d:.-]+$", "", part) for part in base.resolve().parts]
    for word, bus in _BUSES:
        if word in parts:
            return bus
    return None


class UdevWatch:
    """Block device events while it is open: ``async with UdevWatch() as watch: ... watch.seen``.

    ``callback``, when given, is called in the event loop with each event. Events come from udevd where it runs (its
    database is then up to date), else straight from the kernel.
    """

    def __init__(self, callback: Callable[[HostEvent], None] | None = None) -> None:
        self.seen: list[HostEvent] = []
        self._callback = callback
        self._monitor: Any = None
        self._changed = asyncio.Event()

    async def __aenter__(self) -> UdevWatch:
        source = "udev" if UDEV_CONTROL.exists() else "kernel"
        self._monitor = _udev.Monitor.from_netlink(_udev.Context(), source=source)
        self._monitor.filter_by(subsystem="block")
        self._monitor.start()
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._read)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        asyncio.get_running_loop().remove_reader(self._monitor.fileno())
        self._monitor = None

    async def next(self, timeout: float) -> list[HostEvent]:
        """The events since the last call, waiting for one if there is none. Raises ``TimeoutError``."""
        if not self.seen:
            await asyncio.wait_for(self._changed.wait(), timeout)
        events, self.seen = self.seen, []
        self._changed.clear()
        return events

    def _read(self) -> None:
        while (device := self._monitor.poll(timeout=0)) is not None:
            event = HostEvent(device.action or "unknown", device.sys_name, device.device_node)
            self.seen.append(event)
            self._changed.set()
            if self._callback is not None:
                self._callback(event)
