"""The block nodes that a backup adds to a running QEMU: their names, and their end.

An overlay that QEMU may write to carries a bitmap of the name ``LIVE`` in its file: put there before QEMU gets it,
taken out in the moment in which all it holds is in its base. So the file alone tells, when QEMU is gone without a word,
whether what it holds is needed. (libvirt remembers that in the definition of the domain; nobody does here.)
"""

from __future__ import annotations

import hashlib
import logging
import os

from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmpclient import QmpRefused

log = logging.getLogger("hypervisor.qmp")

LIVE = "vmbk-live"  # no checkpoint of ours, see BITMAP_PREFIX
_PREFIX = "vmbk-"


def node_name(path: str) -> str:
    """The node of ours for the image ``path`` (at most 31 characters to QEMU), and the id of the job on it."""
    return _PREFIX + hashlib.blake2b(os.path.realpath(path).encode(), digest_size=10).hexdigest()


def is_ours(name: str) -> bool:
    """Whether a node or a job has a name of :func:`node_name`."""
    return name.startswith(_PREFIX)


async def add_overlay_node(machine: Machine, path: str) -> None:
    """Let QEMU open the overlay ``path``, on top of nothing yet."""
    await machine.execute("blockdev-add", {
        "driver": "qcow2", "node-name": node_name(path), "backing": None, "discard": "unmap",
        "file": {"driver": "file", "filename": path, "discard": "unmap"}}, about=path)


async def forget_live(machine: Machine, node: str) -> None:
    """Take the mark out of an overlay whose content is needed no more; it is on the disk when this returns."""
    try:
        await machine.execute("block-dirty-bitmap-remove", {"node": node, "name": LIVE})
    except QmpRefused as error:
        if "not found" not in error.reason and "Cannot find" not in error.reason:
            raise


async def remove_node(machine: Machine, node: str) -> None:
    """Let QEMU close a node of ours. One that is not there is no error."""
    try:
        await machine.execute("blockdev-del", {"node-name": node})
    except QmpRefused as error:
        if "Failed to find node" not in error.reason:
            raise
