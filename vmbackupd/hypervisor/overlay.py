"""Taking an overlay out of a disk's chain, from whatever state a backup left it in.

Each round commits and pivots in the running domain, or commits offline and mends the definition of one that is off, or
deletes the file when nothing refers to it.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import stat
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from vmbackupd.errors import HypervisorError, NotFound
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor import events
from vmbackupd.hypervisor.images import commit_offline, image_chain, image_info, same_file
from vmbackupd.hypervisor.overlayfiles import Progress, Refused, delete_overlay, drop_in_rounds

if TYPE_CHECKING:
    from vmbackupd.hypervisor.libvirt import LibvirtConnection

log = logging.getLogger("hypervisor.overlay")

POLL = 1.0
STALL = 300.0  # seconds without a byte committed
OFFLINE_COMMIT = 24 * 3600.0  # bounded by the size of the overlay, not by anything to wait for

def uses(root: ET.Element, path: str) -> bool:
    """Whether a disk of the domain has ``path`` in its chain, as far as its XML tells."""
    return _place(root, path) is not None


def _place(root: ET.Element, path: str) -> tuple[str, ET.Element, int] | None:
    """(target, element, depth) of the disk that has ``path`` in its chain; depth 0 is the active image."""
    for target, element in dx.disk_elements(root):
        for depth, link in enumerate(dx.chain_of(element)):
            if link.source.path and same_file(link.source.path, path):
                return target, element, depth
    return None


async def drop(conn: LibvirtConnection, uuid: str, path: str, progress: Progress | None = None) -> None:
    """See :meth:`Hypervisor.drop_overlay`."""
    await drop_in_rounds(path, lambda: _round(conn, uuid, path, progress))


async def _round(conn: LibvirtConnection, uuid: str, path: str, progress: Progress | None) -> bool:
    """One step; True when the overlay is gone."""
    try:
        live = await conn.live(uuid)
        stored = await conn.inactive(uuid)
    except NotFound as error:
        if not os.path.lexists(path):
            return True
        # Without the definition nobody can say whether it holds a disk's newest data or is a leftover of a pivot.
        raise Refused(f"overlay {path}: its VM {uuid} is gone; if its disk is still needed, commit the overlay with "
                       "qemu-img commit, then delete it") from error
    found = None if live is None else _place(live, path)
    if found is not None:
        target, element, depth = found
        if depth:
            await _refuse_middle(conn, uuid, target, path, dx.chain_of(element)[0].source.path)
        await _commit_active(conn, uuid, target, element, progress)
        return False
    if stored is not None:
        found = _place(stored, path)
        if found is not None:
            if found[2]:
                await _refuse_middle(conn, uuid, found[0], path, dx.chain_of(found[1])[0].source.path)
            await _mend_stored(conn, uuid, live, stored, found[0], path)
            return False
        if live is None:
            await _refuse_inside_chain(conn, uuid, stored, path)
    await delete_overlay(path, await conn.name(uuid))
    return True


async def _refuse_middle(conn: LibvirtConnection, uuid: str, target: str, path: str, top: str | None) -> None:
    raise Refused(f"VM {await conn.name(uuid)}: disk {target}: {top} was put on top of our overlay {path} by somebody "
                   "else; commit that one first (virsh blockcommit), then run vmbackupctl recover")


async def _refuse_inside_chain(conn: LibvirtConnection, uuid: str, stored: ET.Element, path: str) -> None:
    """The definition of a domain that is off names only the active images: follow their headers."""
    for target, element in dx.disk_elements(stored):
        source = dx.source_of(element)
        if source is None or source.format == "raw" or not source.path or not os.path.exists(source.path):
            continue
        try:
            chain = await image_chain(source.path, source.format)
        except HypervisorError as error:
            log.info("disk %s: its chain cannot be followed: %s", target, error)
            continue
        if any(same_file(image.path, path) for image in chain):
            await _refuse_middle(conn, uuid, target, path, source.path)


# --- the domain runs


async def _commit_active(conn: LibvirtConnection, uuid: str, target: str, element: ET.Element,
                         progress: Progress | None) -> None:
    """Bring the commit of the active overlay to its pivot; one that already runs into the right base is continued."""
    chain = dx.chain_of(element)
    if len(chain) < 2:
        raise HypervisorError(f"VM {await conn.name(uuid)}: disk {target}: libvirt knows no backing file below "
                              f"{chain[0].source.path}")
    base = chain[1]
    job, mirror = await conn.block_job(uuid, target), dx.mirror_of(element)
    kind = job.kind if job else mirror.job if mirror else None
    if kind is not None and kind != "active-commit":
        raise Refused(f"VM {await conn.name(uuid)}: disk {target} is busy with a block job ({kind}) that is not ours; "
                       "try again when it has ended")
    with conn.hub.listen(uuid) as heard:
        if kind is not None and (mirror is None or not _is(base, mirror.path)):
            log.warning("disk %s: aborting a commit into %s", target, mirror.path if mirror else "an unknown image")
            await conn.end_block_job(uuid, target, pivot=False)
            kind = None
        if kind is None:
            where = f"{target}[{base.index}]" if base.index is not None else base.source.path or ""
            await conn.block_commit(uuid, target, where)
        await _follow(conn, uuid, target, heard, progress)


def _is(link: dx.ChainLink, path: str | None) -> bool:
    return path is not None and link.source.path is not None and same_file(link.source.path, path)


async def _follow(conn: LibvirtConnection, uuid: str, target: str, heard: asyncio.Queue[events.Event],
                  progress: Progress | None) -> None:
    """Wait until the commit has caught up, then pivot. Returns as well when the job is gone: the next look tells."""
    loop = asyncio.get_running_loop()
    furthest, moved = -1, loop.time()
    while True:
        job, live = await conn.block_job(uuid, target), await conn.live(uuid)
        element = None if live is None else dx.disk_element(live, target)
        mirror = None if element is None else dx.mirror_of(element)
        if job is None or mirror is None:
            _raise_failure(heard, target)
            return
        if progress is not None:
            progress(job.done, job.total)
        if mirror.ready:
            await conn.end_block_job(uuid, target, pivot=True)
            return
        if job.done > furthest:
            furthest, moved = job.done, loop.time()
        elif loop.time() - moved > STALL:
            raise HypervisorError(f"VM {await conn.name(uuid)}: the commit of {target} stands still at {job.done} of "
                                  f"{job.total} bytes")
        await events.next_event(heard, POLL)  # the event makes it quick; the question each second makes it sure


def _raise_failure(heard: asyncio.Queue[events.Event], target: str) -> None:
    while not heard.empty():
        event = heard.get_nowait()
        if event.kind == events.BLOCK_JOB and event.subject == target and event.detail == "failed":
            raise HypervisorError(f"disk {target}: the commit of its overlay failed")


# --- the domain is off


async def _mend_stored(conn: LibvirtConnection, uuid: str, live: ET.Element | None, stored: ET.Element, target: str,
                       path: str) -> None:
    """The definition refers to the overlay, the running domain does not: write the overlay's data into its base, unless
    the pivot did so already, and define the domain with the base."""
    name = stored.findtext("name")
    if not os.path.exists(path):
        raise Refused(f"VM {name}: disk {target} is defined with the overlay {path}, which is gone")
    if live is None and await conn.has_saved_state(uuid):
        raise Refused(f"VM {name}: its saved state uses the overlay {path}: start the VM, or discard the state "
                       "(virsh managedsave-remove), then run vmbackupctl recover")
    info = await image_info(path, "qcow2")
    if info.backing is None or info.backing_format is None or not info.backing.startswith("/"):
        raise Refused(f"VM {name}: overlay {path} does not name a local backing file and its format")
    element = None if live is None else dx.disk_element(live, target)
    source = None if element is None else dx.source_of(element)
    if source is None or source.path is None or not same_file(source.path, info.backing):
        log.info("VM %s: committing %s into %s offline", name, path, info.backing)
        await commit_offline(path, OFFLINE_COMMIT)
    await conn.define(with_source(stored, target, info.backing, info.backing_format), name or uuid)


def with_source(root: ET.Element, target: str, path: str, format: str) -> str:
    """The domain XML with another image for one disk."""
    root = copy.deepcopy(root)
    element = dx.disk_element(root, target)
    source = None if element is None else element.find("source")
    if element is None or source is None:
        raise HypervisorError(f"VM {root.findtext('name')} has no disk {target} with a source")
    block = os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)
    element.set("type", "block" if block else "file")
    for key in ("file", "dev", "index"):
        source.attrib.pop(key, None)
    source.set("dev" if block else "file", path)
    driver = element.find("driver")
    if driver is None:
        driver = ET.SubElement(element, "driver", name="qemu")
    driver.set("type", format)
    for chain in element.findall("backingStore"):
        element.remove(chain)  # libvirt finds the chain of the new image itself
    return ET.tostring(root, encoding="unicode")
