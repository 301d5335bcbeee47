"""QEMU's dirty bitmaps, through libvirt checkpoints: what of a disk was written since.

Each disk has a checkpoint and a bitmap of its own, called after the backup and the disk (:func:`bitmap_name`): a disk
that cannot have one, or whose image is swapped, says nothing about the others. libvirt lets every bitmap record until
it is removed, so that ours may come and go between those of others, in any order.

QEMU keeps a bitmap in the qcow2 image and marks it as in use there while it records; after a crash it is *inconsistent*
and of no use for anything but being removed. A bitmap knows nothing of the size its image had: what was cut off and
given back is not marked.
"""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmbackupd.errors import HypervisorError, InvalidArgument, NotRunning
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor.base import BITMAP_PREFIX, HypervisorLost, bitmap_name
from vmbackupd.hypervisor.dirtybitmaps import Bitmap, bitmaps_of, checkpoints_among, loss
from vmbackupd.hypervisor.images import remove_bitmap, same_file
from vmbackupd.hypervisor.snapshot import running

if TYPE_CHECKING:
    from vmbackupd.hypervisor.libvirt import LibvirtConnection

log = logging.getLogger("hypervisor.checkpoint")

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Node:
    """The active image of a disk: QEMU's name of it, its format, the version of a qcow2 image, its bitmaps."""

    name: str
    format: str
    compat: str
    bitmaps: Mapping[str, Bitmap]


async def begin(conn: LibvirtConnection, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
    """See :meth:`Hypervisor.begin_bitmaps`. Raises ``HypervisorError`` when libvirt or QEMU cannot be asked at all."""
    if not name.startswith(BITMAP_PREFIX):
        raise InvalidArgument(f"{name!r} is no checkpoint of ours: its name begins with {BITMAP_PREFIX}")
    root = await running(conn, uuid, "dirty bitmaps")
    nodes = await _nodes(conn, uuid, root)
    await _sweep(conn, uuid, nodes)
    return {target: _obstacle(root, nodes, target) or await _begin(conn, uuid, root, name, target)
            for target in targets}


async def _begin(conn: LibvirtConnection, uuid: str, root: ET.Element, name: str, target: str) -> str | None:
    xml = checkpoint_xml(root, bitmap_name(name, target), target)
    for _ in range(ROUNDS):
        try:
            await conn.create_checkpoint(uuid, xml)
        except HypervisorLost:
            if bitmap_name(name, target) not in await conn.checkpoints(uuid):
                continue
        except NotRunning:
            raise
        except HypervisorError as error:
            return f"libvirt makes no checkpoint of it ({error})"
        return None
    return "libvirt goes away whenever it is asked for a checkpoint of it"


def checkpoint_xml(root: ET.Element, name: str, target: str) -> str:
    """A ``<domaincheckpoint>`` of one disk. Every disk is listed, since libvirt takes one that is not along."""
    top = ET.Element("domaincheckpoint")
    ET.SubElement(top, "name").text = name
    disks = ET.SubElement(top, "disks")
    for each, _ in dx.disk_elements(root):
        ET.SubElement(disks, "disk", name=each, checkpoint="bitmap" if each == target else "no")
    return ET.tostring(top, encoding="unicode")


def _obstacle(root: ET.Element, nodes: Mapping[str, Node], target: str) -> str | None:
    """Why this disk can have no bitmap that is worth anything."""
    element, node = dx.disk_element(root, target), nodes.get(target)
    if element is None or node is None:
        return "the VM has no such disk"
    if element.get("device", "disk") != "disk":
        return "the guest's writes to it go around QEMU, whose bitmap would not see them"
    if node.format != "qcow2":
        return f"its image is {node.format}, which keeps no dirty bitmap"
    if node.compat == "0.10":
        return "its image is qcow2 of version 2, which keeps no dirty bitmap: see qemu-img amend -o compat=1.1"
    return None


async def reasons(conn: LibvirtConnection, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
    """See :meth:`Hypervisor.bitmap_reasons`."""
    root = await running(conn, uuid, "dirty bitmaps")
    nodes = await _nodes(conn, uuid, root)
    known = await conn.checkpoints(uuid)
    return {target: _obstacle(root, nodes, target)
            or _loss(root, nodes[target], name, target, known) for target in targets}


def _loss(root: ET.Element, node: Node, name: str, target: str, known: Mapping[str, str]) -> str | None:
    """Why the bitmap of one disk does not tell all that was written since it began."""
    lost = loss(node.bitmaps, name, target)
    if lost is not None:
        return lost
    known_as = bitmap_name(name, target)
    if known_as not in known:
        return "libvirt does not know the checkpoint any more (was the VM defined anew?)"
    if not node.bitmaps[known_as].persistent:
        return "somebody put another dirty bitmap in the place of ours"
    then, now = _image(dx.parse_checkpoint(known[known_as]), target), _image(root, target)
    if then is None or now is None or not same_file(then, now):
        return f"its active image is {now}, and was {then} when the recording began"
    return None


def _image(root: ET.Element | None, target: str) -> str | None:
    element = None if root is None else dx.disk_element(root, target)
    source = None if element is None else dx.source_of(element)
    return None if source is None else source.path or source.name


async def names(conn: LibvirtConnection, uuid: str) -> list[str]:
    """See :meth:`Hypervisor.bitmaps`."""
    return sorted(checkpoints_among(await conn.checkpoints(uuid)))


# --- the end of a checkpoint


async def drop(conn: LibvirtConnection, uuid: str, name: str) -> None:
    """See :meth:`Hypervisor.drop_bitmaps`."""
    if not name.startswith(BITMAP_PREFIX):
        raise InvalidArgument(f"{name!r} is no checkpoint of ours, and is left alone")
    for number in range(ROUNDS):
        try:
            await _drop(conn, uuid, name)
            return
        except (HypervisorLost, NotRunning) as error:
            if number == ROUNDS - 1:
                raise
            log.info("checkpoint %s: %s; looking again", name, error)


async def _drop(conn: LibvirtConnection, uuid: str, name: str) -> None:
    ours = [each for each in await conn.checkpoints(uuid) if each.startswith(f"{name}.")]
    root = await conn.live(uuid)
    if root is None:
        await _drop_stored(conn, uuid, ours)
        return
    for each in ours:
        try:
            await conn.delete_checkpoint(uuid, each)
        except (HypervisorLost, NotRunning):
            raise
        except HypervisorError as error:
            log.warning("%s; its bitmap is removed without libvirt", error)
    await _remove(conn, uuid, await _nodes(conn, uuid, root), {f"{name}.{target}" for target, _ in
                                                               dx.disk_elements(root)})
    for each in set(ours) & set(await conn.checkpoints(uuid)):
        await conn.delete_checkpoint(uuid, each, metadata_only=True)


async def _remove(conn: LibvirtConnection, uuid: str, nodes: Mapping[str, Node], unwanted: set[str]) -> None:
    """Remove bitmaps that libvirt knows nothing of (any more) from the active images."""
    for node in nodes.values():
        for bitmap in unwanted & node.bitmaps.keys():
            log.info("VM %s: removing the dirty bitmap %s", uuid, bitmap)
            await conn.monitor(uuid, "block-dirty-bitmap-remove", {"node": node.name, "name": bitmap})


async def _sweep(conn: LibvirtConnection, uuid: str, nodes: Mapping[str, Node]) -> None:
    """Remove bitmaps of ours without a checkpoint: of a disk that was not there when it was dropped, or of an image
    that came from another VM. Each costs every write of the guest a little."""
    known = await conn.checkpoints(uuid)
    found = {name for node in nodes.values() for name in node.bitmaps if name.startswith(BITMAP_PREFIX)}
    try:
        await _remove(conn, uuid, nodes, found - known.keys())
    except HypervisorError as error:
        log.warning("a bitmap that nobody needs stays: %s", error)


async def _drop_stored(conn: LibvirtConnection, uuid: str, ours: Sequence[str]) -> None:
    """Of a domain that is off: the bitmaps are taken out of the images it is defined with."""
    stored = await conn.inactive(uuid)
    for each in ours:
        target = each.rpartition(".")[2]
        element = None if stored is None else dx.disk_element(stored, target)
        source = None if element is None else dx.source_of(element)
        if source is not None and source.format == "qcow2" and source.path is not None:
            try:
                await remove_bitmap(source.path, each)
            except HypervisorError as error:  # the next backup of the running VM sweeps it away
                log.warning("the dirty bitmap %s stays in %s: %s", each, source.path, error)
        await conn.delete_checkpoint(uuid, each, metadata_only=True)


# --- what is there


async def _nodes(conn: LibvirtConnection, uuid: str, root: ET.Element) -> dict[str, Node]:
    """The active image of each disk that has one, by target."""
    aliases = {}
    for target, element in dx.disk_elements(root):
        alias = element.find("alias")
        if alias is not None:
            aliases[alias.get("name", "")] = target
    return nodes_of(await conn.monitor(uuid, "query-block", None), aliases)


def nodes_of(reply: object, aliases: Mapping[str, str]) -> dict[str, Node]:
    """QEMU's answer to ``query-block`` as the nodes of the disks with these device ids (``{alias: target}``)."""
    nodes: dict[str, Node] = {}
    try:
        assert isinstance(reply, list)
        for block in reply:
            words = str(block.get("qdev", "")).removeprefix("/machine/peripheral/").split("/")
            target, inserted = aliases.get(words[0]), block.get("inserted")
            if target is not None and inserted is not None:
                nodes[target] = _node(inserted)
    except (AssertionError, KeyError, TypeError, AttributeError) as error:
        raise HypervisorError(f"QEMU's answer to query-block is not understood: {error!r}") from error
    return nodes


def _node(inserted: Any) -> Node:
    specific = inserted["image"].get("format-specific", {}).get("data", {})
    return Node(str(inserted["node-name"]), str(inserted["drv"]), str(specific.get("compat", "")), bitmaps_of(inserted))
