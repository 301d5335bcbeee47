"""``device='lun'``: what the guest writes there passes QEMU by, and is not lost on the tracker in the guest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import libvirt_qemu
import pytest

from tests.lab.guest import Guest
from vmbackupd.units import MiB

pytestmark = pytest.mark.lab

WRITTEN = 4 * MiB
BITMAP = "lab-evidence"


def monitor(guest: Guest, command: str, **arguments: object) -> Any:
    message = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
    return json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain, json.dumps(message), 0))["return"]


def node_of(guest: Guest, qdev: str) -> str:
    """The block node under the device whose path in QEMU ends so."""
    found = [item["inserted"]["node-name"] for item in monitor(guest, "query-block") if qdev in item.get("qdev", "")]
    assert len(found) == 1, qdev
    return str(found[0])


@contextmanager
def recording(guest: Guest, nodes: list[str]) -> Iterator[None]:
    for node in nodes:
        monitor(guest, "block-dirty-bitmap-add", node=node, name=BITMAP)
    try:
        yield
    finally:
        for node in nodes:
            monitor(guest, "block-dirty-bitmap-remove", node=node, name=BITMAP)


def dirty_bytes(guest: Guest, node: str) -> int:
    nodes = {item["node-name"]: item for item in monitor(guest, "query-named-block-nodes", flat=True)}
    return next(int(item["count"]) for item in nodes[node]["dirty-bitmaps"] if item["name"] == BITMAP)


def test_qemus_bitmap_sees_nothing_that_the_guest_writes_to_a_lun(plain_guest: Guest) -> None:
    """The reason why such a disk is never left to QEMU, whatever it says of bitmaps and backups of it."""
    lun, virtual = node_of(plain_guest, "scsi0-0-0-0"), node_of(plain_guest, "virtio-disk1")
    mark = b"vmbackupd was here "
    with recording(plain_guest, [lun, virtual]):
        for mount in ("/mnt/lun", "/mnt/data"):
            plain_guest.exec(f"yes '{mark.decode()}' | head -c {WRITTEN} > {mount}/evidence; sync -f {mount}")
        seen = {node: dirty_bytes(plain_guest, node) for node in (lun, virtual)}
    plain_guest.exec("rm /mnt/lun/evidence /mnt/data/evidence; sync")
    arrived = plain_guest.luns["lun"].path.read_bytes().count(mark) * (len(mark) + 1)
    assert arrived > WRITTEN * 0.9  # one that crosses from one extent to the next is not counted
    assert seen[virtual] >= WRITTEN
    assert seen[lun] == 0
