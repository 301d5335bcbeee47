"""The disks of the restored domain: each points to its target; what was not restored is not there.

Format of the elements: https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from vmbackupd.model import VolumeKind, VolumeRecord
from vmbackupd.restore.address import Target, TargetKind

SCRATCH_SERIAL = "vmbk-"

# What belongs to the old image, host or run, not to the disk.
_OF_OLD_SOURCE = ("source", "backingStore", "mirror", "encryption", "auth")


@dataclass(frozen=True, slots=True)
class PlacedVolume:
    """A volume of the backup and where it is restored to; None where it is left out."""

    record: VolumeRecord
    target: Target | None


def rewrite_disks(devices: Element, volumes: Sequence[PlacedVolume], notes: list[str]) -> frozenset[str]:
    """Point every disk to its restored volume and drop the others. Returns the ids of the volumes that have a disk."""
    attached: set[str] = set()
    for disk in devices.findall("disk"):
        name = _name(disk)
        if disk.findtext("serial", "").startswith(SCRATCH_SERIAL):
            devices.remove(disk)  # the scratch disk of the backup that saved this definition
        elif disk.get("device") in ("cdrom", "floppy"):
            _eject(disk, name, notes)
        elif (placed := _volume_of(disk, volumes)) is None:
            devices.remove(disk)
            notes.append(f"disk {name} is not in the backup: the restored domain has no such disk")
        elif placed.target is None:
            devices.remove(disk)
            notes.append(f"disk {name} (volume {placed.record.id}) was left out: the restored domain has no such disk")
        else:
            _point(disk, name, placed.target, notes)
            attached.add(placed.record.id)
    return frozenset(attached)


def _name(disk: Element) -> str:
    target = disk.find("target")
    return "without target" if target is None else target.get("dev", "without target")


def _volume_of(disk: Element, volumes: Sequence[PlacedVolume]) -> PlacedVolume | None:
    """The volume that was captured from ``disk``: named by its target, or by what identifies the LUN behind it."""
    dev = _name(disk)
    identities = _identities(disk)
    for placed in volumes:
        record = placed.record
        if record.kind is VolumeKind.VIRTUAL:
            if record.id == dev:
                return placed
        elif record.details.get("target") == dev or record.id in identities:
            return placed
    return None


def _identities(disk: Element) -> set[str]:
    """The ids a pass-through volume on ``disk`` may have in a backup."""
    found = set()
    source = disk.find("source")
    if source is not None and source.get("protocol") == "iscsi":
        found.add(f"iscsi:{source.get('name', '')}")
    if wwn := disk.findtext("wwn"):
        found |= {f"wwn:{wwn}", f"wwn:0x{wwn}"}
    return found


def _eject(disk: Element, name: str, notes: list[str]) -> None:
    """Removable media belong to the host the backup was made on, and libvirt starts no domain whose medium is
    missing."""
    source = disk.find("source")
    if source is not None:
        medium = source.get("file") or source.get("dev") or source.get("name") or "unknown"
        notes.append(f"drive {name} is empty: its medium {medium} is not part of the backup")
    for tag in _OF_OLD_SOURCE:
        _remove(disk, tag)
    disk.set("type", "file")


def _point(disk: Element, name: str, target: Target, notes: list[str]) -> None:
    old = disk.find("source")
    initiator = old.find("initiator") if old is not None and target.kind is TargetKind.ISCSI else None
    if disk.find("encryption") is not None or (old is not None and old.find("encryption") is not None):
        notes.append(f"disk {name} was encrypted by QEMU: its restored volume is not")
    for tag in _OF_OLD_SOURCE:
        _remove(disk, tag)
    source = _source(disk, target)
    if initiator is not None:
        source.append(initiator)
    driver = disk.find("driver")
    if driver is None:
        driver = Element("driver")
        disk.insert(0, driver)
    driver.set("name", "qemu")
    driver.set("type", "qcow2" if target.kind is TargetKind.QCOW2 else "raw")
    if target.kind is TargetKind.QCOW2:
        if disk.find("shareable") is not None:
            _remove(disk, "shareable")
            notes.append(f"disk {name} is no longer shareable: qcow2 files cannot be shared between running domains")
    else:
        _remove(driver, "metadata_cache")  # of qcow2 only
    if disk.get("device") == "lun" and target.is_file:
        _no_longer_lun(disk, name, notes)


def _source(disk: Element, target: Target) -> Element:
    """A new ``<source>`` in the place libvirt writes it, after the driver."""
    source = Element("source")
    driver = disk.find("driver")
    disk.insert(0 if driver is None else list(disk).index(driver) + 1, source)
    if target.kind is TargetKind.BLOCK:
        disk.set("type", "block")
        source.set("dev", target.file)
    elif target.is_file:
        disk.set("type", "file")
        source.set("file", target.file)
    else:
        assert target.iscsi is not None
        disk.set("type", "network")
        source.set("protocol", "iscsi")
        source.set("name", f"{target.iscsi.iqn}/{target.iscsi.lun}")
        ElementTree.SubElement(source, "host", {"name": target.iscsi.host, "port": str(target.iscsi.port)})
    return source


def _no_longer_lun(disk: Element, name: str, notes: list[str]) -> None:
    """SCSI commands cannot be passed through to a file: the guest gets an emulated disk in the same place."""
    disk.set("device", "disk")
    disk.attrib.pop("sgio", None)
    disk.attrib.pop("rawio", None)
    notes.append(f"disk {name} passed a LUN through; on a file it is an ordinary disk, and SCSI commands beyond"
                 " reading and"
                 " writing (reservations, for example) are emulated")


def _remove(parent: Element, tag: str) -> None:
    for child in parent.findall(tag):
        parent.remove(child)
