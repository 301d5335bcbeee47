"""T2 of the second kind: libvirt's pull-mode backup job. QEMU serves the disks as of one instant over NBD, and copies
what the guest overwrites meanwhile into scratch images first.

Works on any disk of QEMU's block layer, whatever it lies on. The price: a scratch image that finds no room makes the
guest's write fail (QEMU 7.2 cannot be told to break the backup instead), so the caller watches the room; and as long as
the job runs libvirt makes no snapshot. The names of the exports tell a job of ours from somebody else's.
"""

from __future__ import annotations

import asyncio
import logging
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor import events
from vmbackupd.hypervisor.base import FleeceExport, bitmap_name
from vmbackupd.hypervisor.snapshot import check, running

if TYPE_CHECKING:
    from vmbackupd.hypervisor.libvirt import LibvirtConnection

log = logging.getLogger("hypervisor.fleece")

PREFIX = "vmbackupd-"  # of export names
END = 60.0  # seconds libvirt has to take a job down
POLL = 0.2


def export_name(target: str) -> str:
    """What a disk of ours is exported as."""
    return f"{PREFIX}{target}"


async def begin(conn: LibvirtConnection, uuid: str, disks: Mapping[str, str], socket: str,
                since: Mapping[str, str]) -> dict[str, FleeceExport]:
    """See :meth:`Hypervisor.begin_fleece`."""
    root = await running(conn, uuid, "backup job")
    check(root, disks)
    try:
        await conn.begin_backup(uuid, backup_xml(root, disks, socket, since))
    except NotRunning:
        raise
    except HypervisorError:
        # libvirtd may have gone away after it had done the work
        job = await conn.backup_job(uuid)
        if job is None or socket not in job or not _ours(job):
            raise
    return {target: FleeceExport(export_name(target), export_name(target) if target in since else None)
            for target in disks}


def backup_xml(root: ET.Element, disks: Mapping[str, str], socket: str, since: Mapping[str, str]) -> str:
    """The ``<domainbackup>``: every disk of the domain is listed, since libvirt takes one that is not along, a ``lun``
    too, whose guest would then get I/O errors."""
    top = ET.Element("domainbackup", mode="pull")
    ET.SubElement(top, "server", transport="unix", socket=socket)
    listed = ET.SubElement(top, "disks")
    for target, _ in dx.disk_elements(root):
        if target not in disks:
            ET.SubElement(listed, "disk", name=target, backup="no")
            continue
        disk = ET.SubElement(listed, "disk", name=target, backup="yes", type="file", exportname=export_name(target))
        if target in since:
            disk.attrib.update(backupmode="incremental", incremental=bitmap_name(since[target], target),
                               exportbitmap=export_name(target))
        elif since:
            disk.set("backupmode", "full")
        ET.SubElement(disk, "driver", type="qcow2")
        ET.SubElement(disk, "scratch", file=disks[target])
    return ET.tostring(top, encoding="unicode")


async def end(conn: LibvirtConnection, uuid: str) -> None:
    """See :meth:`Hypervisor.end_fleece`."""
    deadline = asyncio.get_running_loop().time() + END
    with conn.hub.listen(uuid) as heard:
        while (job := await conn.backup_job(uuid)) is not None:
            if not _ours(job):
                log.info("VM %s: the backup job that runs is not ours, and is left alone", uuid)
                return
            if asyncio.get_running_loop().time() >= deadline:
                raise HypervisorError(f"VM {await conn.name(uuid)}: the backup job does not end within {END:g} s")
            try:
                await conn.abort_job(uuid)
            except HypervisorError as error:
                log.info("%s; looking again", error)  # it ended by itself, or is about to
            await events.next_event(heard, POLL)


def _ours(job: str) -> bool:
    try:
        disks = ET.fromstring(job).findall("./disks/disk[@backup='yes']")
    except ET.ParseError as error:
        raise HypervisorError(f"XML of a backup job does not parse: {error}") from error
    return bool(disks) and all(disk.get("exportname", "").startswith(PREFIX) for disk in disks)
