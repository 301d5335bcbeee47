"""External snapshots of a running QEMU's disks, all in one transaction."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.images import add_bitmap
from vmbackupd.hypervisor.overlayfiles import Below, check_disks, make_overlays
from vmbackupd.hypervisor.qmp.devices import Objects
from vmbackupd.hypervisor.qmp.disks import Disks, read_disks
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmp.nodes import LIVE, add_overlay_node, node_name, remove_node
from vmbackupd.hypervisor.qmpclient import QmpLost


async def prepare_overlays(machine: Machine, overlays: Mapping[str, str]) -> None:
    """See :meth:`Hypervisor.prepare_overlays`. QEMU has the overlays open afterwards."""
    async with machine.held():
        disks = await read_disks(machine, Objects(machine))
        check(machine, disks, overlays)
        await _prepare(machine, disks, overlays)


def check(machine: Machine, disks: Disks, overlays: Mapping[str, str]) -> None:
    """See :func:`check_disks`."""
    check_disks(machine.name, (item.disk for item in disks.disks.values()), overlays)


async def _prepare(machine: Machine, disks: Disks, overlays: Mapping[str, str]) -> None:
    below: dict[str, Below] = {}
    for target, path in overlays.items():
        disk = disks.disks[target].disk
        assert disk.source is not None  # check_disks() saw it
        if disk.source.kind not in ("file", "block") or disk.source.path is None or disk.size is None:
            where = disk.source.protocol or disk.source.kind
            raise HypervisorError(f"VM {machine.name}: disk {target} lies on {where}, which this version cannot put an"
                                  " overlay on")
        below[path] = Below(disk.source.path, disk.source.format, disk.size)
    await make_overlays(below)
    opened: list[str] = []
    try:
        for path in below:
            await add_bitmap(path, LIVE)
            await add_overlay_node(machine, path)
            opened.append(path)
    except BaseException:
        for path in opened:
            await remove_node(machine, node_name(path))
        for path in below:
            os.unlink(path)
        raise


async def take(machine: Machine, overlays: Mapping[str, str]) -> None:
    """Snapshot the disks into their overlays, made now where :func:`prepare_overlays` was not called."""
    async with machine.held():
        disks = await read_disks(machine, Objects(machine))
        check(machine, disks, overlays)
        missing = {target: path for target, path in overlays.items() if not os.path.exists(path)}
        if missing:
            await _prepare(machine, disks, missing)
        actions = [{"type": "blockdev-snapshot",
                    "data": {"node": disks.disks[target].node.name, "overlay": node_name(path)}}
                   for target, path in overlays.items()]
        try:
            await machine.execute("transaction", {"actions": actions}, about=f"snapshot of {', '.join(overlays)}")
        except QmpLost:
            # the monitor may have gone away after QEMU had done the work; it is one transaction: all disks or none
            if not _taken(await read_disks(machine, Objects(machine)), overlays):
                raise


def _taken(disks: Disks, overlays: Mapping[str, str]) -> bool:
    return all((disk := disks.disks.get(target)) is not None and disk.top is not None
               and disks.depth_of(disk.top, path) == 0 for target, path in overlays.items())
