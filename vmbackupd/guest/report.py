"""What the guest helper reports of the guest's block devices, read from JSON that a hostile guest may have written.

Sizes and offsets are bytes, but for device-mapper tables, which are in sectors of 512 bytes as the kernel has them.
Devices name each other by ``major:minor``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vmbackupd.errors import GuestProtocolError
from vmbackupd.typed import get_bool, get_int, get_list, get_object, get_objects, get_str, get_strs, key_path

MAX_DEVICES = 4096
MAX_ROWS = 65536
MAX_PARAMS = 65536  # characters of one row of a table
MAX_MOUNTS = 65536
TYPES = frozenset({"disk", "part", "dm", "md", "loop", "rom", "ram", "zram", "other"})
TRANSPORTS = frozenset({"virtio", "iscsi", "scsi", "ata", "nvme", "usb", "other"})

_DEVNO = re.compile(r"[0-9]{1,4}:[0-9]{1,7}")
_PCI = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_ERROR = GuestProtocolError


@dataclass(frozen=True, slots=True)
class DmTarget:
    """One row of a device-mapper table, in sectors."""

    start: int
    length: int
    kind: str
    params: str


@dataclass(frozen=True, slots=True)
class DmInfo:
    """Names and live table of a device-mapper device."""

    name: str
    uuid: str
    table: tuple[DmTarget, ...]


@dataclass(frozen=True, slots=True)
class IscsiAddress:
    """What an initiator logs in to: target name, ``host:port``, logical unit number."""

    iqn: str
    portal: str
    lun: int


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted filesystem, in whatever mount namespace of the guest."""

    path: str
    fstype: str
    options: str


@dataclass(frozen=True, slots=True)
class GuestDevice:
    """One block device. ``parent`` and ``start`` are a partition's; ``slaves`` lie below, ``holders`` on top of it.

    ``pci`` is the PCI function nearest to the disk as the guest numbers it, ``target`` and ``unit`` its place behind
    a SCSI or SATA controller. ``wwn`` has no prefix (``naa.``, ``0x``). ``backing`` is the file of a loop device.
    """

    name: str
    devno: str
    type: str
    size: int
    logical_block: int
    read_only: bool
    removable: bool
    serial: str | None
    wwn: str | None
    vendor: str | None
    model: str | None
    transport: str
    pci: str | None
    target: int | None
    unit: int | None
    iscsi: IscsiAddress | None
    parent: str | None
    start: int | None
    slaves: tuple[str, ...]
    holders: tuple[str, ...]
    dm: DmInfo | None
    fstype: str | None
    fsuuid: str | None
    mounts: tuple[Mount, ...]
    swap: bool
    backing: str | None = None


@dataclass(frozen=True)
class GuestReport:
    """All block devices of a guest at one moment. ``fsfreeze_hook``: its agent runs a hook when it freezes;
    ``initiator``: its iSCSI name; ``untracked``: why its kernel cannot track writes to a disk, None if it can."""

    boot_id: str
    kernel: str
    hostname: str
    devices: tuple[GuestDevice, ...] = field(repr=False)
    fsfreeze_hook: bool = False
    initiator: str | None = None
    untracked: str | None = None

    @cached_property
    def _index(self) -> Mapping[str, GuestDevice]:
        return {device.devno: device for device in self.devices}

    @cached_property
    def _partitions(self) -> Mapping[str, tuple[GuestDevice, ...]]:
        found: dict[str, tuple[GuestDevice, ...]] = {}
        for device in self.devices:
            if device.parent is not None:
                found[device.parent] = (*found.get(device.parent, ()), device)
        return found

    @cached_property
    def memo(self) -> dict[str, object]:
        """Where functions of this report keep what they have worked out, by their own keys."""
        return {}

    def by_devno(self, devno: str) -> GuestDevice | None:
        """The device of this number."""
        return self._index.get(devno)

    def partitions(self, devno: str) -> tuple[GuestDevice, ...]:
        """The partitions of a disk."""
        return self._partitions.get(devno, ())


def parse_report(obj: Mapping[str, object]) -> GuestReport:
    """Check and read a report. Raises ``GuestProtocolError`` naming the key that is wrong."""
    devices = tuple(_device(item, at) for at, item in get_objects(obj, "devices", max_length=MAX_DEVICES, error=_ERROR))
    if sum(len(device.mounts) for device in devices) > MAX_MOUNTS:
        raise _ERROR(f"devices: over {MAX_MOUNTS} mounts")
    if sum(len(device.dm.table) for device in devices if device.dm is not None) > MAX_ROWS:
        raise _ERROR(f"devices: over {MAX_ROWS} rows of device-mapper tables")
    _check_references(devices)
    return GuestReport(
        boot_id=get_str(obj, "boot_id", min_length=1, max_length=64, error=_ERROR),
        kernel=get_str(obj, "kernel", max_length=128, error=_ERROR),
        hostname=get_str(obj, "hostname", max_length=255, error=_ERROR),
        devices=devices,
        fsfreeze_hook=get_bool(obj, "fsfreeze_hook", False, error=_ERROR),
        initiator=get_str(obj, "initiator", None, max_length=255, error=_ERROR),
        untracked=get_str(obj, "untracked", None, max_length=1000, error=_ERROR),
    )


def parse_devno(obj: Mapping[str, object], key: str, at: str) -> str:
    """The ``major:minor`` at ``key``."""
    devno = get_str(obj, key, max_length=16, at=at, error=_ERROR)
    if not _DEVNO.fullmatch(devno):
        raise _ERROR(f"{key_path(at, key)}: expected major:minor, got {devno!r}")
    return devno


def parse_table(obj: Mapping[str, object], key: str, at: str) -> tuple[DmTarget, ...]:
    """A device-mapper table ``[[start, length, kind, params]]``: rows adjacent from sector 0."""
    rows, expected = [], 0
    for number, row in enumerate(get_list(obj, key, max_length=MAX_ROWS, at=at, error=_ERROR)):
        path = key_path(at, f"{key}[{number}]")
        if not isinstance(row, list) or len(row) != 4:
            raise _ERROR(f"{path}: expected [start, length, kind, params]")
        item = {"start": row[0], "length": row[1], "kind": row[2], "params": row[3]}
        target = DmTarget(
            start=get_int(item, "start", maximum=2**54, at=path, error=_ERROR),
            length=get_int(item, "length", minimum=1, maximum=2**54, at=path, error=_ERROR),
            kind=get_str(item, "kind", min_length=1, max_length=16, at=path, error=_ERROR),
            params=get_str(item, "params", max_length=MAX_PARAMS, at=path, error=_ERROR),
        )
        if target.start != expected:
            raise _ERROR(f"{path}: begins at sector {target.start}, expected {expected}")
        expected += target.length
        rows.append(target)
    if expected * 512 >= 2**63:
        raise _ERROR(f"{key_path(at, key)}: longer than any device")
    return tuple(rows)


def _device(obj: dict[str, Any], at: str) -> GuestDevice:
    def text(key: str, limit: int) -> str | None:
        return get_str(obj, key, None, max_length=limit, at=at, error=_ERROR)

    def numbers(key: str) -> tuple[str, ...]:
        items = get_strs(obj, key, max_length=MAX_DEVICES, max_item_length=16, at=at, error=_ERROR)
        return tuple(parse_devno({key: item}, key, at) for item in items)

    dm = get_object(obj, "dm", None, at=at, error=_ERROR)
    iscsi = get_object(obj, "iscsi", None, at=at, error=_ERROR)
    device = GuestDevice(
        name=get_str(obj, "name", min_length=1, max_length=255, at=at, error=_ERROR),
        devno=parse_devno(obj, "devno", at),
        type=_choice(obj, "type", TYPES, at),
        size=get_int(obj, "size", at=at, error=_ERROR),
        logical_block=get_int(obj, "logical_block", minimum=1, maximum=2**26, at=at, error=_ERROR),
        read_only=get_bool(obj, "read_only", at=at, error=_ERROR),
        removable=get_bool(obj, "removable", at=at, error=_ERROR),
        serial=text("serial", 255),
        wwn=text("wwn", 255),
        vendor=text("vendor", 64),
        model=text("model", 64),
        transport=_choice(obj, "transport", TRANSPORTS, at),
        pci=_pci(text("pci", 32), at),
        target=get_int(obj, "target", None, maximum=2**32, at=at, error=_ERROR),
        unit=get_int(obj, "unit", None, at=at, error=_ERROR),
        iscsi=None if iscsi is None else _iscsi(iscsi, key_path(at, "iscsi")),
        parent=None if obj.get("parent") is None else parse_devno(obj, "parent", at),
        start=get_int(obj, "start", None, at=at, error=_ERROR),
        slaves=numbers("slaves"),
        holders=numbers("holders"),
        dm=None if dm is None else _dm(dm, key_path(at, "dm")),
        fstype=text("fstype", 64),
        fsuuid=text("fsuuid", 128),
        mounts=tuple(_mount(item, path) for path, item in get_objects(obj, "mounts", at=at, error=_ERROR)),
        swap=get_bool(obj, "swap", at=at, error=_ERROR),
        backing=text("backing", 4096),
    )
    _check_part(device, at)
    return device


def _check_part(device: GuestDevice, at: str) -> None:
    """A partition says where it lies; its parent may have gone meanwhile. Nothing else is part of a disk."""
    if device.type == "part":
        if device.start is None:
            raise _ERROR(f"{at}: partition {device.name} without a start")
        if device.start + device.size >= 2**63:
            raise _ERROR(f"{at}: partition {device.name} ends past any device")
    elif device.parent is not None or device.start is not None:
        raise _ERROR(f"{at}: {device.name} is a {device.type} device and lies on a disk like a partition")
    if device.dm is not None and device.type != "dm":
        raise _ERROR(f"{at}: {device.name} is a {device.type} device with a device-mapper table")


def _check_references(devices: tuple[GuestDevice, ...]) -> None:
    known = {device.devno: device for device in devices}
    if len(known) != len(devices):
        raise _ERROR("devices: two of the same number")
    for device in devices:
        for other in (*device.slaves, *device.holders, *([device.parent] if device.parent else [])):
            if other not in known:
                raise _ERROR(f"devices: {device.name} refers to {other}, which is not in the report")
            if other == device.devno:
                raise _ERROR(f"devices: {device.name} refers to itself")
        parent = known[device.parent] if device.parent is not None else None
        if parent is not None:
            if parent.type == "part":
                raise _ERROR(f"devices: {device.name} is a partition of a partition")
            assert device.start is not None
            if device.start + device.size > parent.size:
                raise _ERROR(f"devices: partition {device.name} ends past its disk {parent.name}")


def _dm(obj: dict[str, Any], at: str) -> DmInfo:
    return DmInfo(
        name=get_str(obj, "name", min_length=1, max_length=128, at=at, error=_ERROR),
        uuid=get_str(obj, "uuid", max_length=129, at=at, error=_ERROR),
        table=parse_table(obj, "table", at),
    )


def _iscsi(obj: dict[str, Any], at: str) -> IscsiAddress:
    return IscsiAddress(
        iqn=get_str(obj, "iqn", min_length=1, max_length=255, at=at, error=_ERROR),
        portal=get_str(obj, "portal", min_length=1, max_length=255, at=at, error=_ERROR),
        lun=get_int(obj, "lun", at=at, error=_ERROR),
    )


def _mount(obj: dict[str, Any], at: str) -> Mount:
    return Mount(
        path=get_str(obj, "path", min_length=1, max_length=4096, at=at, error=_ERROR),
        fstype=get_str(obj, "fstype", min_length=1, max_length=64, at=at, error=_ERROR),
        options=get_str(obj, "options", max_length=1024, at=at, error=_ERROR),
    )


def _pci(text: str | None, at: str) -> str | None:
    if text is not None and not _PCI.fullmatch(text):
        raise _ERROR(f"{key_path(at, 'pci')}: expected a PCI address, got {text!r}")
    return text


def _choice(obj: dict[str, Any], key: str, choices: frozenset[str], at: str) -> str:
    value = get_str(obj, key, max_length=32, at=at, error=_ERROR)
    if value not in choices:
        raise _ERROR(f"{key_path(at, key)}: expected one of {', '.join(sorted(choices))}, got {value!r}")
    return value
