"""Hot-plug of what a backup needs in a running guest: virtio-serial ports and the scratch disk.

Live only: nothing of it is in the domain's next start.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import string
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor import events
from vmbackupd.hypervisor.images import same_file
from vmbackupd.hypervisor.snapshot import running

if TYPE_CHECKING:
    from vmbackupd.hypervisor.libvirt import LibvirtConnection

log = logging.getLogger("hypervisor.hotplug")

DETACH = 120.0  # seconds a guest has to let go of a device
DETACH_ASK_AGAIN = 10.0  # a request made while the guest was booting or busy with another is lost
POLL = 1.0


async def attach_channel(conn: LibvirtConnection, uuid: str, name: str) -> str:
    """See :meth:`Hypervisor.attach_channel`. No ``<source>``: libvirt picks a socket path that QEMU may use."""
    root = await running(conn, uuid, f"channel {name}")
    if dx.channel(root, name) is None:
        element = ET.Element("channel", type="unix")
        ET.SubElement(element, "target", type="virtio", name=name)
        try:
            await conn.attach_device(uuid, ET.tostring(element, encoding="unicode"))
        except HypervisorError:
            # libvirtd may have gone away after it had done the work
            if dx.channel(await running(conn, uuid, f"channel {name}"), name) is None:
                raise
        root = await running(conn, uuid, f"channel {name}")
    found = dx.channel(root, name)
    source = None if found is None else found.find("source")
    path = None if source is None else source.get("path")
    if not path:
        raise HypervisorError(f"VM {await conn.name(uuid)}: channel {name} is attached but libvirt tells no socket")
    return path


async def detach_channel(conn: LibvirtConnection, uuid: str, name: str) -> None:
    """See :meth:`Hypervisor.detach_channel`."""
    await _detach(conn, uuid, f"channel {name}", lambda root: dx.channel(root, name))


def find_disk(root: ET.Element, path: str) -> ET.Element | None:
    """The disk that has ``path`` anywhere in its chain."""
    for _, element in dx.disk_elements(root):
        if any(link.source.path and same_file(link.source.path, path) for link in dx.chain_of(element)):
            return element
    return None


async def attach_scratch(conn: LibvirtConnection, uuid: str, path: str, serial: str) -> str:
    """See :meth:`Hypervisor.attach_scratch`."""
    root = await running(conn, uuid, "scratch disk")
    found = find_disk(root, path)
    if found is None:
        await _attach_disk(conn, uuid, root, path, serial)
        root = await running(conn, uuid, "scratch disk")
        found = find_disk(root, path)
    place = None if found is None else found.find("target")
    if place is None:
        raise HypervisorError(f"VM {await conn.name(uuid)}: the scratch disk {path} was attached and is not there")
    return place.get("dev", "")


async def _attach_disk(conn: LibvirtConnection, uuid: str, root: ET.Element, path: str, serial: str) -> None:
    stored = await conn.inactive(uuid)
    used = {target for tree in (root, stored) if tree is not None for target, _ in dx.disk_elements(tree)}
    try:
        await _attach(conn, uuid, path, disk_xml(path, serial, free_target(used, "vd"), "virtio"))
        return
    except HypervisorError as error:
        if "PCI" not in str(error):
            raise
        no_port = error
    if dx.virtio_scsi_controller(root) is None:
        raise HypervisorError(
            f"VM {await conn.name(uuid)}: no free PCI port for the scratch disk: add a <controller type='pci' "
            "model='pcie-root-port'/> or a virtio-scsi controller to the VM (virsh edit) and power it off and on"
        ) from no_port
    log.info("VM %s has no free PCI port; the scratch disk goes to its virtio-scsi controller", uuid)
    await _attach(conn, uuid, path, disk_xml(path, serial, free_target(used, "sd"), "scsi"))


async def _attach(conn: LibvirtConnection, uuid: str, path: str, xml: str) -> None:
    try:
        await conn.attach_device(uuid, xml)
    except HypervisorError:
        # libvirtd may have gone away after it had done the work
        if find_disk(await running(conn, uuid, "scratch disk"), path) is None:
            raise


def disk_xml(path: str, serial: str, target: str, bus: str) -> str:
    """The scratch disk's ``<disk>``.

    ``cache='unsafe'``: a COW store flushes for every chunk that the guest overwrites first, and each would wait for the
    host's disk. What is on this disk is worth nothing after a crash of the host, since the backup has failed then.
    """
    element = ET.Element("disk", type="file", device="disk")
    # A host that is out of space must cost the backup, not stop the guest, which is what QEMU does by default.
    ET.SubElement(element, "driver", name="qemu", type="qcow2", cache="unsafe", discard="unmap", error_policy="report")
    ET.SubElement(element, "source", file=path)
    ET.SubElement(element, "target", dev=target, bus=bus)
    ET.SubElement(element, "serial").text = serial
    return ET.tostring(element, encoding="unicode")


def free_target(used: set[str], prefix: str) -> str:
    """The first of vda, vdb, ..., vdz, vdaa, ... not in ``used``."""
    return next(name for name in _targets(prefix) if name not in used)


def _targets(prefix: str) -> Iterator[str]:
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield prefix + "".join(letters)


async def detach_scratch(conn: LibvirtConnection, uuid: str, path: str) -> None:
    """See :meth:`Hypervisor.detach_scratch`."""
    await _detach(conn, uuid, f"disk {path}", lambda root: find_disk(root, path))


async def _detach(conn: LibvirtConnection, uuid: str, what: str,
                  find: Callable[[ET.Element], ET.Element | None]) -> None:
    """Ask until the device is gone. The guest takes part in the unplug of a PCI device, and a request is lost on one
    that is not ready for it; libvirt's definition, not the event, says whether it is gone."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DETACH
    refusal: HypervisorError | None = None
    with conn.hub.listen(uuid) as heard:
        while True:
            root = await conn.live(uuid)
            element = None if root is None else find(root)
            if element is None:
                return  # a domain that is off has nothing plugged in
            if loop.time() >= end:
                raise HypervisorError(f"VM {await conn.name(uuid)}: the guest does not let go of {what} within "
                                      f"{DETACH:g} s" + (f"; last refusal: {refusal}" if refusal else "")) from refusal
            alias = element.find("alias")
            name = "" if alias is None else alias.get("name", "")
            try:
                await conn.detach_device(uuid, name)
            except NotRunning:
                return
            except HypervisorError as error:
                refusal = error  # "already in the process of unplug", libvirtd away, another job on the domain
            await _removal(heard, conn, uuid, name, find)


async def _removal(heard: asyncio.Queue[events.Event], conn: LibvirtConnection, uuid: str, alias: str,
                   find: Callable[[ET.Element], ET.Element | None]) -> None:
    """Until the device is gone, or it is time to ask again."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DETACH_ASK_AGAIN
    while (left := end - loop.time()) > 0:
        event = await events.next_event(heard, min(left, POLL))
        if event is None:
            root = await conn.live(uuid)  # in case the event went to a connection that is gone
            if root is None or find(root) is None:
                return
        elif event.kind == events.STOPPED or (event.kind == events.DEVICE_REMOVED and event.subject == alias):
            return
