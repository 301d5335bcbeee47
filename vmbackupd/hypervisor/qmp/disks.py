"""The disks of a running QEMU: what ``query-block`` and the object tree say, put together."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import DomainDisk
from vmbackupd.hypervisor.images import same_file
from vmbackupd.hypervisor.qmp import blocks
from vmbackupd.hypervisor.qmp.blocks import Drive, Node
from vmbackupd.hypervisor.qmp.devices import FLASH, Objects, by_id, device_kind, guest_address, object_path
from vmbackupd.hypervisor.qmp.machine import Machine

log = logging.getLogger("hypervisor.qmp")

_UIDS = re.compile(r"^(Uid|Gid):\t\d+\t(\d+)", re.MULTILINE)  # the effective ids, second of four


@dataclass(frozen=True, slots=True)
class QemuDisk:
    """A disk as everybody sees it, and the node QEMU's device uses (None for an empty drive)."""

    disk: DomainDisk
    top: Node | None

    @property
    def node(self) -> Node:
        """The node of a disk that is known to have one."""
        if self.top is None:
            raise HypervisorError(f"disk {self.disk.target} is empty")
        return self.top


@dataclass(frozen=True, slots=True)
class Disks:
    """All disks by target, all nodes by name, the file of QEMU's writable flash (the UEFI variables), and the directory
    that relative paths begin at."""

    disks: Mapping[str, QemuDisk]
    nodes: Mapping[str, Node]
    flash: str | None
    directory: str

    def depth_of(self, node: Node, path: str) -> int | None:
        """How far below ``node`` its chain has the image ``path``; None when it has not."""
        for depth, image in enumerate(node.images):
            file = blocks.local_path(image.file, self.directory)
            if file is not None and same_file(file, path):
                return depth
        return None

    def node_of(self, path: str) -> Node | None:
        """The node of the image ``path`` (of its format, not of the file below that)."""
        return next((node for node in self.nodes.values() if node.is_format and self.depth_of(node, path) == 0),
                    None)

    def by_path(self, path: str) -> tuple[QemuDisk, int] | None:
        """The disk that has ``path`` in its chain, and how far down."""
        for disk in self.disks.values():
            depth = None if disk.top is None else self.depth_of(disk.top, path)
            if depth is not None:
                return disk, depth
        return None

    def chain(self, top: Node) -> list[Node]:
        """``top`` and the nodes below it. Raises ``HypervisorError`` when one cannot be told."""
        found = [top]
        for depth, image in enumerate(top.images[1:], 1):
            named = [node for node in self.nodes.values() if node.images[0] == image]
            named = [node for node in named if node.is_format] or named
            if len(named) != 1:
                raise HypervisorError(f"QEMU has {len(named)} nodes for {image.file}, image {depth} below "
                                      f"{top.images[0].file}: expected one")
            found += named
        return found


async def read_disks(machine: Machine, objects: Objects) -> Disks:
    """Look at a running QEMU. Raises ``NotRunning``."""
    async with machine.held():
        directory = _working_directory(machine)
        nodes = blocks.nodes(await machine.execute("query-named-block-nodes"))
        disks: dict[str, QemuDisk] = {}
        flash = None
        for drive in blocks.drives(await machine.execute("query-block")):
            path = object_path(drive.qdev)
            kind = str(await objects.get(path, "type"))
            top = None if drive.node is None else nodes[drive.node]
            if kind in FLASH:
                if top is not None and not top.read_only:
                    flash = blocks.local_path(top.images[0].file, directory)
                continue
            disk = await _read_disk(objects, path, kind, target_of(drive), top, directory)
            disks[disk.target] = QemuDisk(disk, top)
    return Disks(disks, nodes, flash, directory)


def _working_directory(machine: Machine) -> str:
    process = machine.process
    try:
        return os.readlink(process / "cwd") if process is not None else "/"
    except OSError:
        return "/"


async def _read_disk(objects: Objects, path: str, kind: str, target: str, top: Node | None,
                     directory: str) -> DomainDisk:
    device, bus = device_kind(kind)
    images = top.images if top is not None else ()
    files = [blocks.local_path(image.file, directory) for image in images]
    serial, wwn = await objects.get(path, "serial"), await objects.get(path, "wwn")
    return DomainDisk(
        target=target, device=device, bus=bus, source=blocks.source(images[0], directory) if images else None,
        read_only=top is None or top.read_only, shareable=bool(await objects.get(path, "share-rw")),
        serial=serial or None, wwn=f"{wwn:016x}" if isinstance(wwn, int) and wwn else None, alias=by_id(path),
        size=None if top is None else top.size, address=await guest_address(objects, path),
        chain=tuple(file for file in files if file is not None),
        transient=bool(files) and files[0] is not None and not os.path.lexists(files[0]))


def target_of(drive: Drive) -> str:
    """The name of a disk: its device's id, else its backend's (``-drive id=``), else its place among the devices."""
    path = object_path(drive.qdev)
    name = by_id(path) or drive.backend
    if name:
        return name
    place = path.removesuffix("/virtio-backend").rpartition("/")[2]
    return place.replace("[", "").rstrip("]")


def is_flash_path(qdev: str) -> bool:
    """Whether it is the machine's flash, as far as its place in the object tree tells."""
    return qdev.startswith("/machine/") and "flash" in qdev.rpartition("/")[2]


def let_in(machine: Machine, path: str) -> None:
    """Give the image to the user that QEMU runs as."""
    if machine.process is None:
        return
    try:
        ids = dict(_UIDS.findall((machine.process / "status").read_text()))
        os.chown(path, int(ids["Uid"]), int(ids["Gid"]))
    except (OSError, KeyError) as error:
        log.info("VM %s: %s is not given to QEMU's user: %s", machine.name, path, error)
