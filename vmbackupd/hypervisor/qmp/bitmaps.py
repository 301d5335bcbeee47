"""Dirty bitmaps without libvirt: one for each disk and checkpoint, called by :func:`bitmap_name`.

In a qcow2 image of version 3 a bitmap is kept when QEMU ends; of other images it is in QEMU's memory, and lost with it.
The commit of an overlay writes through the node below, whose bitmap so records what was written to the overlay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vmbackupd.errors import InvalidArgument, NotRunning
from vmbackupd.hypervisor.base import BITMAP_PREFIX, bitmap_name
from vmbackupd.hypervisor.dirtybitmaps import checkpoints_among, loss
from vmbackupd.hypervisor.qmp import blocks
from vmbackupd.hypervisor.qmp.blocks import Node
from vmbackupd.hypervisor.qmp.devices import Objects
from vmbackupd.hypervisor.qmp.disks import Disks, read_disks
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmpclient import QmpRefused
from vmbackupd.units import KiB

log = logging.getLogger("hypervisor.qmp")

GRANULARITY = 64 * KiB  # the repository's chunk


async def begin(machine: Machine, name: str, targets: Sequence[str]) -> dict[str, str | None]:
    """See :meth:`Hypervisor.begin_bitmaps`."""
    if not name.startswith(BITMAP_PREFIX):
        raise InvalidArgument(f"{name!r} is no checkpoint of ours: its name begins with {BITMAP_PREFIX}")
    async with machine.held():
        disks = await read_disks(machine, Objects(machine))
        return {target: _obstacle(disks, target) or await _begin(machine, disks.disks[target].node, name, target)
                for target in targets}


def _obstacle(disks: Disks, target: str) -> str | None:
    found = disks.disks.get(target)
    if found is None or found.top is None:
        return "the VM has no such disk"
    if found.disk.device != "disk":
        return "the guest's writes to it go around QEMU, whose bitmap would not see them"
    return None


async def _begin(machine: Machine, node: Node, name: str, target: str) -> str | None:
    bitmap = bitmap_name(name, target)
    if bitmap in node.bitmaps:
        return None  # begun by a call whose answer was lost, and before the freeze as well
    refusals = []
    for persistent in (True, False):
        try:
            await machine.execute("block-dirty-bitmap-add", {
                "node": node.name, "name": bitmap, "granularity": GRANULARITY, "persistent": persistent}, about=target)
            return None
        except QmpRefused as error:  # raw images keep none, nor does qcow2 of version 2
            refusals.append(error)
    return f"QEMU makes no dirty bitmap of it ({refusals[-1]})"


async def reasons(machine: Machine, name: str, targets: Sequence[str]) -> dict[str, str | None]:
    """See :meth:`Hypervisor.bitmap_reasons`."""
    disks = await read_disks(machine, Objects(machine))
    return {target: _obstacle(disks, target) or loss(disks.disks[target].node.bitmaps, name, target)
            for target in targets}


async def names(machine: Machine) -> list[str]:
    """See :meth:`Hypervisor.bitmaps`. Those in the images of a machine that is off are told when it runs again."""
    try:
        nodes = await _nodes(machine)
    except NotRunning:
        return []
    return sorted({name for node in nodes for name in checkpoints_among(node.bitmaps)})


async def drop(machine: Machine, name: str) -> None:
    """See :meth:`Hypervisor.drop_bitmaps`."""
    if not name.startswith(BITMAP_PREFIX):
        raise InvalidArgument(f"{name!r} is no checkpoint of ours, and is left alone")
    try:
        async with machine.held():
            for node in await _nodes(machine):
                for bitmap in node.bitmaps:
                    if checkpoints_among([bitmap]) == {name}:
                        await machine.execute("block-dirty-bitmap-remove", {"node": node.name, "name": bitmap})
    except NotRunning:
        log.info("VM %s is off: what its images keep of %s goes when a later backup drops it", machine.name, name)


async def _nodes(machine: Machine) -> list[Node]:
    return list(blocks.nodes(await machine.execute("query-named-block-nodes", {"flat": True})).values())
