"""External snapshots of a running domain's disks, all in one transaction."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.hypervisor.images import same_file
from vmbackupd.hypervisor.overlayfiles import Below, check_disks, make_overlays

if TYPE_CHECKING:
    from vmbackupd.hypervisor.libvirt import LibvirtConnection


def check(root: ET.Element, targets: Iterable[str]) -> None:
    """See :func:`check_disks`."""
    check_disks(root.findtext("name"), dx.parse_disks(root), targets)


def snapshot_xml(root: ET.Element, overlays: Mapping[str, str]) -> str:
    """The ``<domainsnapshot>``: every disk of the domain is listed, those not asked for with ``snapshot='no'``, since
    libvirt takes a disk that is not listed along."""
    check(root, overlays)
    top = ET.Element("domainsnapshot")
    disks = ET.SubElement(top, "disks")
    for target, _ in dx.disk_elements(root):
        path = overlays.get(target)
        if path is None:
            ET.SubElement(disks, "disk", name=target, snapshot="no")
        else:
            disk = ET.SubElement(disks, "disk", name=target, snapshot="external", type="file")
            ET.SubElement(disk, "driver", type="qcow2")
            ET.SubElement(disk, "source", file=path)
    return ET.tostring(top, encoding="unicode")


async def prepare_overlays(conn: LibvirtConnection, uuid: str, overlays: Mapping[str, str]) -> None:
    """Make an empty overlay for each disk. Those made are removed again when one fails."""
    root = await running(conn, uuid, "snapshot")
    check(root, overlays)
    below: dict[str, Below] = {}
    for target, path in overlays.items():
        element = dx.disk_element(root, target)
        source = None if element is None else dx.source_of(element)
        assert source is not None  # check() saw it
        base = await conn.volume_path(source.name) if source.kind == "volume" and source.name else source.path
        if source.kind not in ("file", "block", "volume") or not base:
            raise HypervisorError(f"VM {root.findtext('name')}: disk {target} lies on {_words(source)}, which this "
                                  "version cannot put an overlay on")
        below[path] = Below(base, source.format, await conn.capacity(uuid, target))
    await make_overlays(below)


def _words(source: DiskSource) -> str:
    return " ".join(word for word in (source.kind, source.protocol, source.name) if word)


async def take(conn: LibvirtConnection, uuid: str, overlays: Mapping[str, str]) -> None:
    """Snapshot the disks into their overlays, made now where :func:`prepare_overlays` was not called."""
    root = await running(conn, uuid, "snapshot")
    xml = snapshot_xml(root, overlays)
    missing = {target: path for target, path in overlays.items() if not os.path.exists(path)}
    if missing:
        await prepare_overlays(conn, uuid, missing)
    try:
        await conn.snapshot(uuid, xml)
    except NotRunning:
        raise
    except HypervisorError:
        # libvirtd may have gone away after it had done the work; it is one transaction: all disks or none
        if not _taken(await running(conn, uuid, "snapshot"), overlays):
            raise


def _taken(root: ET.Element, overlays: Mapping[str, str]) -> bool:
    for target, path in overlays.items():
        element = dx.disk_element(root, target)
        source = None if element is None else dx.source_of(element)
        if source is None or source.path is None or not same_file(source.path, path):
            return False
    return True


async def running(conn: LibvirtConnection, uuid: str, what: str) -> ET.Element:
    """The definition of a domain that has to run for ``what``."""
    root = await conn.live(uuid)
    if root is None:
        raise NotRunning(f"VM {await conn.name(uuid)}: {what}: it is not running")
    return root
