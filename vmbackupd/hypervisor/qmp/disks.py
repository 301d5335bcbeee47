"""The disks of a running QEMU: what ``query-block`` and the object tree say, put together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import DomainDisk
from vmbackupd.hypervisor.images import same_file
from vmbackupd.hypervisor.qmp import blocks
from vmbackupd.hypervisor.qmp.blocks import Drive, Node
from vmbackupd.hypervisor.qmp.devices import FLASH, Objects, by_id, device_kind, guest_address
from vmbackupd.hypervisor.qmp.machine import Machine


@dataclass(frozen=True, slots=True)
class QemuDisk:
    """A disk as everybody sees it, and as QEMU knows it. ``files`` are the paths of its chain's images, None for those
    that are no local files."""

    disk: DomainDisk
    drive: Drive
    files: tuple[str | None, ...]

    @property
    def node(self) -> str:
        """The node the device uses; there is one where there is an image."""
        if self.drive.node is None:
            raise HypervisorError(f"disk {self.disk.target} is empty")
        return self.drive.node

    def depth_of(self, path: str) -> int | None:
        """How far below the active image ``path`` lies in the chain; None when it is not there."""
        for depth, file in enumerate(self.files):
            if file is not None and same_file(file, path):
                return depth
        return None


@dataclass(frozen=True, slots=True)
class Disks:
    """All disks by target, all nodes by name, and the file of QEMU's writable flash: the UEFI variables."""

    disks: Mapping[str, QemuDisk]
    nodes: Mapping[str, Node]
    flash: str | None
    directory: str

    def node_of(self, path: str) -> Node | None:
        """The node of the format (not the protocol below it) whose file is ``path``."""
        for node in self.nodes.values():
            if node.image.format not in blocks.PROTOCOLS:
                file = blocks.local_path(node.image.file, self.directory)
                if file is not None and same_file(file, path):
                    return node
        return None

    def by_path(self, path: str) -> tuple[QemuDisk, int] | None:
        """The disk that has ``path`` in its chain, and how far down."""
        for disk in self.disks.values():
            depth = disk.depth_of(path)
            if depth is not None:
                return disk, depth
        return None

    def chain_nodes(self, disk: QemuDisk) -> list[Node]:
        """The nodes of a disk's images, top first."""
        found = [self.nodes[disk.node]]
        for image in disk.drive.images[1:]:
            found += [node for node in self.nodes.values() if node.image == image]
        return found


async def read_disks(machine: Machine, objects: Objects) -> Disks:
    """Look at a running QEMU. Raises ``NotRunning``."""
    async with machine.held():
        directory = _working_directory(machine)
        nodes = blocks.nodes(await machine.execute("query-named-block-nodes", {"flat": True}))
        disks: dict[str, QemuDisk] = {}
        flash = None
        for drive in blocks.drives(await machine.execute("query-block")):
            path = objects.path_of(drive.qdev)
            kind = str(await objects.get(path, "type"))
            if kind in FLASH:
                if drive.images and not drive.read_only:
                    flash = blocks.local_path(drive.images[0].file, directory)
                continue
            disk = await _read_disk(objects, drive, path, kind, directory)
            disks[disk.disk.target] = disk
    return Disks(disks, nodes, flash, directory)


def _working_directory(machine: Machine) -> str:
    process = machine.process
    try:
        return os.readlink(process / "cwd") if process is not None else "/"
    except OSError:
        return "/"


async def _read_disk(objects: Objects, drive: Drive, path: str, kind: str, directory: str) -> QemuDisk:
    device, bus = device_kind(kind)
    files = tuple(blocks.local_path(image.file, directory) for image in drive.images)
    serial, wwn = await objects.get(path, "serial"), await objects.get(path, "wwn")
    name = by_id(path)
    disk = DomainDisk(
        target=_target(path, drive), device=device, bus=bus,
        source=blocks.source(drive.images[0], directory) if drive.images else None, read_only=drive.read_only,
        shareable=bool(await objects.get(path, "share-rw")), serial=serial or None,
        wwn=f"{wwn:016x}" if isinstance(wwn, int) and wwn else None, alias=name, size=drive.size,
        address=await guest_address(objects, path), chain=tuple(file for file in files if file is not None),
        transient=bool(files) and files[0] is not None and not os.path.lexists(files[0]))
    return QemuDisk(disk, drive, files)


def _target(path: str, drive: Drive) -> str:
    """The name of a disk: its device's id, else its backend's (``-drive id=``), else its place among the devices."""
    name = by_id(path) or drive.backend
    if name:
        return name
    place = path.removesuffix("/virtio-backend").rpartition("/")[2]
    return place.replace("[", "").rstrip("]")
