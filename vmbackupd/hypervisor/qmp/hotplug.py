"""Hot-plug of what a backup needs in a running guest: virtio-serial ports and the scratch disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor.hotplug import DETACH, DETACH_ASK_AGAIN
from vmbackupd.hypervisor.qmp.devices import Objects, channel_sockets, find_port, free_root_port, scsi_bus
from vmbackupd.hypervisor.qmp.disks import Disks, let_in, read_disks
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmp.nodes import forget_live, is_ours, node_name, remove_node
from vmbackupd.hypervisor.qmpclient import QmpRefused
from vmbackupd.hypervisor.storage_daemon import SOCKET_PATH_LIMIT


async def attach_channel(machine: Machine, name: str) -> str:
    """See :meth:`Hypervisor.attach_channel`. The socket lies beside the QMP socket, where QEMU made one before."""
    path = _channel_path(machine, name)
    async with machine.held():
        port = await find_port(machine, Objects(machine), name)
        if port is not None:
            if port.socket is None:
                raise HypervisorError(f"VM {machine.name}: channel {name} is there but not on a socket of QEMU's")
            return port.socket
        await _remove_chardev(machine, name, path)  # half an attempt before us
        await machine.execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": {
            "addr": {"type": "unix", "data": {"path": path}}, "server": True, "wait": False}}}, about=path)
        try:
            await machine.execute("device_add", {"driver": "virtserialport", "id": name, "chardev": name,
                                                 "name": name}, about=name)
        except QmpRefused as error:
            await _remove_chardev(machine, name, path)
            raise HypervisorError(f"{error}: the VM needs a virtio-serial controller (-device virtio-serial-pci) with a"
                                  " free port") from error
    return path


def _channel_path(machine: Machine, name: str) -> str:
    path = str(machine.config.qmp.parent / name)
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise HypervisorError(f"VM {machine.name}: {path}: too long for a unix socket; give the QMP socket a directory "
                              "with a shorter path")
    return path


async def detach_channel(machine: Machine, name: str) -> None:
    """See :meth:`Hypervisor.detach_channel`."""
    path = _channel_path(machine, name)
    try:
        async with machine.held():
            await _unplug(machine, name, f"channel {name}")
            await _remove_chardev(machine, name, path)
    except NotRunning:
        Path(path).unlink(missing_ok=True)  # one that is off has nothing plugged in, but may have left its socket


async def _remove_chardev(machine: Machine, name: str, path: str) -> None:
    if name in channel_sockets(await machine.execute("query-chardev")):
        await machine.execute("chardev-remove", {"id": name})
    Path(path).unlink(missing_ok=True)


async def attach_scratch(machine: Machine, path: str, serial: str) -> str:
    """See :meth:`Hypervisor.attach_scratch`.

    ``no-flush``: a COW store flushes for every chunk that the guest overwrites first, and each would wait for the
    host's disk. What is on this disk is worth nothing after a crash of the host, since the backup has failed then.
    """
    async with machine.held():
        objects = Objects(machine)
        disks = await read_disks(machine, objects)
        found = disks.by_path(path)
        if found is not None:
            return found[0].disk.target
        if disks.node_of(path) is None:
            let_in(machine, path)
            await machine.execute("blockdev-add", {
                "driver": "qcow2", "node-name": node_name(path), "discard": "unmap",
                "cache": {"direct": False, "no-flush": True},
                "file": {"driver": "file", "filename": path, "discard": "unmap"}}, about=path)
        try:
            await _add_disk(machine, objects, node_name(path), serial)
        except BaseException:
            await remove_node(machine, node_name(path))
            raise
    return serial


async def _add_disk(machine: Machine, objects: Objects, node: str, serial: str) -> None:
    # A host that is out of space must cost the backup, not stop the guest, which is what QEMU does by default.
    disk = {"id": serial, "drive": node, "serial": serial, "werror": "report", "rerror": "report"}
    port, scsi = await free_root_port(objects), await scsi_bus(objects)
    ways: list[dict[str, object]] = [{"driver": "virtio-blk-pci", **disk}]  # a machine whose own bus takes new devices
    if port is not None:
        ways = [{"driver": "virtio-blk-pci", "bus": port, **disk}]
    if scsi is not None:
        ways.append({"driver": "scsi-hd", "bus": scsi, **disk})
    refusals = []
    for way in ways:
        try:
            await machine.execute("device_add", way, about="scratch disk")
            return
        except QmpRefused as error:
            refusals.append(error)
    raise HypervisorError(
        f"VM {machine.name}: no place for the scratch disk: start it with a pcie-root-port that is free (-device"
        f" pcie-root-port,id=spare,chassis=NUMBER) or with a virtio-scsi controller ({refusals[0]})") from refusals[0]


async def detach_scratch(machine: Machine, path: str) -> None:
    """See :meth:`Hypervisor.detach_scratch`."""
    try:
        async with machine.held():
            disks = await read_disks(machine, Objects(machine))
            found = disks.by_path(path)
            if found is not None:
                await _unplug(machine, found[0].disk.alias or "", f"disk {path}")
            await _close_chain(machine, disks, path)
    except NotRunning:
        return  # one that is off has nothing plugged in


async def _close_chain(machine: Machine, disks: Disks, path: str) -> None:
    """Let QEMU close the image and the overlays on it. Nothing that was written to those is needed any more."""
    nodes = [node for node in disks.nodes.values() if is_ours(node.name) and disks.depth_of(node, path) is not None]
    for node in sorted(nodes, key=lambda node: -node.depth):
        await forget_live(machine, node.name)
        await remove_node(machine, node.name)


async def _unplug(machine: Machine, device: str, what: str) -> None:
    """Ask until the device is gone. The guest takes part in the unplug of a PCI device, and a request is lost on one
    that is not ready for it."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DETACH
    refusal: QmpRefused | None = None
    with machine.listen("DEVICE_DELETED") as deleted:
        while loop.time() < end:
            try:
                await machine.execute("device_del", {"id": device})
            except QmpRefused as error:
                if error.kind == "DeviceNotFound":
                    return
                refusal = error  # "already in the process of unplug"
            again = loop.time() + DETACH_ASK_AGAIN
            while (event := await deleted.next(max(0.0, again - loop.time()))) is not None:
                if event["data"].get("device") == device:
                    return
    raise HypervisorError(f"VM {machine.name}: the guest does not let go of {what} within {DETACH:g} s"
                          + (f"; last refusal: {refusal}" if refusal else ""))
