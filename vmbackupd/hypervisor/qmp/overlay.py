"""Taking an overlay out of a disk's chain, from whatever state a backup left it in. See ``nodes.py`` for how its file
tells whether it is needed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.images import commit_offline, holds_nothing, image_info
from vmbackupd.hypervisor.overlay import OFFLINE_COMMIT, STALL
from vmbackupd.hypervisor.overlayfiles import POLL, Progress, Refused, delete_overlay, drop_in_rounds
from vmbackupd.hypervisor.qmp.blocks import Node
from vmbackupd.hypervisor.qmp.devices import Objects
from vmbackupd.hypervisor.qmp.disks import Disks, read_disks
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmp.nodes import LIVE, forget_live, node_name, remove_node
from vmbackupd.hypervisor.qmpclient import QmpEvents, QmpRefused

log = logging.getLogger("hypervisor.overlay")

PIVOT = 300.0  # seconds


async def drop(machine: Machine, path: str, progress: Progress | None = None) -> None:
    """See :meth:`Hypervisor.drop_overlay`."""
    await drop_in_rounds(path, lambda: _round(machine, path, progress))


async def _round(machine: Machine, path: str, progress: Progress | None) -> bool:
    """One step; True when the overlay is gone."""
    if not await machine.running():
        return await _drop_offline(machine, path)
    async with machine.held():
        disks = await read_disks(machine, Objects(machine))
        node = disks.node_of(path)
        if node is None:
            await _refuse_needed(machine, path)
            await delete_overlay(path, machine.name)
            return True
        if await _job(machine, path) is None and (LIVE not in node.bitmaps or node.depth == 0):
            await forget_live(machine, node.name)  # it was never put on top of its base, or is off it again
            await remove_node(machine, node.name)
            return False
        _refuse_middle(machine, disks, path)
        await _commit(machine, disks, node, path, progress)
        return False


def _refuse_middle(machine: Machine, disks: Disks, path: str) -> None:
    found = disks.by_path(path)
    if found is not None and found[1] > 0:
        top = next(iter(found[0].disk.chain))
        raise Refused(f"VM {machine.name}: disk {found[0].disk.target}: {top} was put on top of our overlay {path} by"
                      " somebody else; commit that one first (block-commit), then run vmbackupctl recover")


# --- QEMU runs


async def _commit(machine: Machine, disks: Disks, node: Node, path: str, progress: Progress | None) -> None:
    """Bring the commit of an overlay to its end; one that runs already is continued."""
    with machine.listen("JOB_STATUS_CHANGE") as heard:
        if await _job(machine, path) is None:
            await _begin_commit(machine, disks, node, path)
        await _follow(machine, node.name, path, heard, progress)


async def _begin_commit(machine: Machine, disks: Disks, node: Node, path: str) -> None:
    base = disks.chain(node)[1]
    try:
        await machine.execute("block-commit", {
            "job-id": node_name(path), "device": node.name, "base-node": base.name, "auto-finalize": False,
            "auto-dismiss": False}, about=path)
    except QmpRefused as error:
        if "block job" in error.reason or "root block node" in error.reason:
            raise Refused(f"VM {machine.name}: the disk of {path} is busy with a block job or a filter that is not ours"
                          f" ({error}); try again when that is gone") from error
        raise


async def _job(machine: Machine, path: str) -> Mapping[str, Any] | None:
    """Our job on the overlay."""
    jobs: list[Mapping[str, Any]] = await machine.execute("query-jobs")
    return next((job for job in jobs if job["id"] == node_name(path)), None)


async def _follow(machine: Machine, node: str, path: str, heard: QmpEvents, progress: Progress | None) -> None:
    """Go with the commit until it is gone; the next look tells what it left.

    A job that is to be finalized has the guest's requests to the disk wait, with overlay and base the same: the moment
    to note that the overlay is not needed any more.
    """
    loop = asyncio.get_running_loop()
    furthest, moved = -1, loop.time()
    while (job := await _job(machine, path)) is not None:
        name = {"id": job["id"]}
        done, total = int(job["current-progress"]), int(job["total-progress"])
        if progress is not None:
            progress(done, total)
        if job["status"] == "ready":
            await machine.execute("job-complete", name, timeout=PIVOT)
        elif job["status"] == "pending":
            await forget_live(machine, node)
            await machine.execute("job-finalize", name, timeout=PIVOT)
        elif job["status"] == "concluded":
            await machine.execute("job-dismiss", name)
            if job.get("error"):
                raise HypervisorError(f"VM {machine.name}: the commit of {path} failed: {job['error']}")
        if done > furthest:
            furthest, moved = done, loop.time()
        elif loop.time() - moved > STALL:
            raise HypervisorError(f"VM {machine.name}: the commit of {path} stands still at {done} of {total} bytes")
        await heard.next(POLL)  # the event makes it quick; the question each second makes it sure


# --- QEMU does not run, or without the overlay


async def _drop_offline(machine: Machine, path: str) -> bool:
    if await _is_live(path):
        log.info("VM %s: committing %s into its base offline", machine.name, path)
        await commit_offline(path, OFFLINE_COMMIT)
    await delete_overlay(path, machine.name)
    return True


async def _refuse_needed(machine: Machine, path: str) -> None:
    """A machine that was started again without an overlay that has what the guest wrote last: nobody but its owner can
    say which of the two is to be kept."""
    if await _is_live(path) and not await holds_nothing(path):
        raise Refused(f"VM {machine.name} runs without the overlay {path}, which holds what it wrote from a backup's"
                      " snapshot until QEMU ended; it was started again before vmbackupd could put that into its disk."
                      " To go back to it, power the VM off and run qemu-img commit; to keep the disk as it is now,"
                      " delete the overlay")


async def _is_live(path: str) -> bool:
    """Whether the file has the mark. One that is no image has not: its making was cut short."""
    try:
        return os.path.exists(path) and LIVE in (await image_info(path, "qcow2")).bitmaps
    except HypervisorError as error:
        if "not in qcow2 format" in str(error):
            return False
        raise
