"""T2 of the second kind, without libvirt: QEMU serves the disks as of one instant over NBD, and copies what the guest
overwrites meanwhile into scratch images first.

A backup job of a disk into a scratch image that has the disk below it: what is exported is the scratch image. QEMU has
one NBD server; one that somebody else started is left alone, and there is no fleecing then. An object of ours in QEMU
tells that the server is ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor.base import FleeceExport, bitmap_name
from vmbackupd.hypervisor.images import create_qcow2
from vmbackupd.hypervisor.overlayfiles import POLL
from vmbackupd.hypervisor.qmp import blocks
from vmbackupd.hypervisor.qmp.devices import Objects
from vmbackupd.hypervisor.qmp.disks import Disks, let_in, read_disks
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmp.nodes import remove_node
from vmbackupd.hypervisor.qmp.snapshot import check
from vmbackupd.hypervisor.qmpclient import QmpEvents, QmpRefused

log = logging.getLogger("hypervisor.qmp")

END = 60.0  # seconds until clients are cut off, and jobs gone
_PREFIX = "vmbkf-"  # of nodes, jobs, exports and bitmaps
_SERVER = f"{_PREFIX}server"


async def begin(machine: Machine, disks: Mapping[str, str], socket: str,
                since: Mapping[str, str]) -> dict[str, FleeceExport]:
    """See :meth:`Hypervisor.begin_fleece`."""
    async with machine.held():
        found = await read_disks(machine, Objects(machine))
        check(machine, found, disks)
        try:
            await _start_server(machine, socket)
            names = {target: f"{_PREFIX}{number}" for number, target in enumerate(disks)}
            await asyncio.gather(*(_make_scratch(machine, found, target, path) for target, path in disks.items()))
            for target, path in disks.items():
                await _add_node(machine, found, target, path, names[target])
            await _cut(machine, found, names, since)
            return {target: await _serve(machine, target, name, target in since) for target, name in names.items()}
        except BaseException:
            await end(machine)
            raise


async def _start_server(machine: Machine, socket: str) -> None:
    await machine.execute("nbd-server-start", {
        "addr": {"type": "unix", "data": {"path": socket}}, "max-connections": 0}, about=socket)
    await machine.execute("object-add", {"qom-type": "secret", "id": _SERVER, "data": "the NBD server is vmbackupd's"})


async def _stop_server(machine: Machine) -> None:
    if _SERVER not in await Objects(machine).children("/objects"):
        return
    if not await machine.execute("query-block-exports"):
        await _unless_gone(machine, "nbd-server-stop", {})
    await machine.execute("object-del", {"id": _SERVER})


async def _make_scratch(machine: Machine, disks: Disks, target: str, path: str) -> None:
    await create_qcow2(path, disks.disks[target].node.size)
    let_in(machine, path)


async def _add_node(machine: Machine, disks: Disks, target: str, path: str, name: str) -> None:
    await machine.execute("blockdev-add", {
        "driver": "qcow2", "node-name": name, "backing": disks.disks[target].node.name, "discard": "unmap",
        "cache": {"direct": False, "no-flush": True},  # worth nothing after a crash
        "file": {"driver": "file", "filename": path, "discard": "unmap"}}, about=path)


async def _cut(machine: Machine, disks: Disks, names: Mapping[str, str], since: Mapping[str, str]) -> None:
    """The instant: all jobs begin in one transaction. What was written until then is noted in bitmaps of our own."""
    actions: list[dict[str, object]] = []
    for target, name in names.items():
        node = disks.disks[target].node.name
        if target in since:
            noted: dict[str, object] = {"node": node, "name": name, "persistent": False, "disabled": True}
            actions.append({"type": "block-dirty-bitmap-add", "data": noted})
            actions.append({"type": "block-dirty-bitmap-merge", "data": {
                "node": node, "target": name, "bitmaps": [bitmap_name(since[target], target)]}})
        actions.append({"type": "blockdev-backup", "data": {
            "job-id": name, "device": node, "target": name, "sync": "none"}})
    await machine.execute("transaction", {"actions": actions}, about=f"backup job of {', '.join(names)}")


async def _serve(machine: Machine, target: str, name: str, with_bitmap: bool) -> FleeceExport:
    await machine.execute("block-export-add", {
        "type": "nbd", "id": name, "node-name": name, "name": target, "writable": False,
        "bitmaps": [name] if with_bitmap else []}, about=target)
    return FleeceExport(target, name if with_bitmap else None)


async def end(machine: Machine) -> None:
    """See :meth:`Hypervisor.end_fleece`."""
    try:
        async with machine.held():
            await _end(machine)
    except NotRunning:
        return


async def _end(machine: Machine) -> None:
    with machine.listen("BLOCK_EXPORT_DELETED", "JOB_STATUS_CHANGE") as heard:
        exports = await _ours(machine, "query-block-exports")
        jobs = await _ours(machine, "query-jobs")
        for name in exports:
            await _unless_gone(machine, "block-export-del", {"id": name, "mode": "hard"})
        await _wait_gone(machine, "query-block-exports", heard)
        for name in jobs:
            await _unless_gone(machine, "block-job-cancel", {"device": name, "force": True})
        await _wait_gone(machine, "query-jobs", heard)
    for node in blocks.nodes(await machine.execute("query-named-block-nodes", {"flat": True})).values():
        if node.name.startswith(_PREFIX):
            await remove_node(machine, node.name)
        for bitmap in node.bitmaps:
            if bitmap.startswith(_PREFIX):
                await machine.execute("block-dirty-bitmap-remove", {"node": node.name, "name": bitmap})
    await _stop_server(machine)


async def _ours(machine: Machine, query: str) -> list[str]:
    items: list[dict[str, Any]] = await machine.execute(query)
    return [item["id"] for item in items if str(item["id"]).startswith(_PREFIX)]


async def _unless_gone(machine: Machine, command: str, arguments: Mapping[str, object]) -> None:
    try:
        await machine.execute(command, arguments)
    except QmpRefused as error:
        log.debug("%s", error)  # it went by itself; what is left is looked at


async def _wait_gone(machine: Machine, query: str, heard: QmpEvents) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + END
    while await _ours(machine, query):
        if loop.time() > deadline:
            raise HypervisorError(f"VM {machine.name}: the backup job does not end within {END:g} s")
        await heard.next(POLL)
