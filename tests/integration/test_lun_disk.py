"""``device='lun'``: what the guest writes there passes QEMU by, and is not lost on the tracker in the guest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt_qemu
import pytest

from tests.integration.test_guest_helper import Rig, run_in_lab
from tests.lab import Lab
from tests.lab.guest import Guest
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.reference import items_of
from vmbackupd.guest.client import CHANGED, open_data_channel
from vmbackupd.units import KiB, MiB

pytestmark = pytest.mark.lab

WRITTEN = 4 * MiB
CHUNK = 64 * KiB
BITMAP = "lab-evidence"
MARK = b"vmbackupd was here "


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


def write(guest: Guest, mounts: tuple[str, ...]) -> None:
    for mount in mounts:
        guest.exec(f"yes '{MARK.decode()}' | head -c {WRITTEN} > {mount}/evidence; sync -f {mount}")


def differing(before: bytes, after: bytes) -> set[int]:
    """Numbers of the chunks that are not the same."""
    assert len(before) == len(after)
    chunks = range(0, len(before), CHUNK)
    return {at // CHUNK for at in chunks if before[at : at + CHUNK] != after[at : at + CHUNK]}


def test_qemu_sees_nothing_that_the_guest_writes_to_a_lun_and_the_tracker_all(
    lab: Lab, plain_guest: Guest, tmp_path: Path
) -> None:
    """The reason why such a disk is never left to QEMU, whatever it says of bitmaps and backups of it."""
    lun, virtual = node_of(plain_guest, "scsi0-0-0-0"), node_of(plain_guest, "virtio-disk1")
    disk = plain_guest.luns["lun"]

    async def work(rig: Rig) -> tuple[dict[str, int], set[int], set[int]]:
        helper = await rig.start()
        devno = next(device.devno for device in (await helper.probe()).devices if device.serial == disk.serial)
        (tracked,) = await helper.track("tests", {devno: "lun"})
        assert tracked.tracking, tracked.reason
        before = disk.path.read_bytes()
        with recording(plain_guest, [lun, virtual]):
            await asyncio.to_thread(write, plain_guest, ("/mnt/lun", "/mnt/data"))
            seen = {node: dirty_bytes(plain_guest, node) for node in (lun, virtual)}
        after = disk.path.read_bytes()
        await helper.collect(devno)  # later than the look at the disk: what is written in between may be marked
        socket = await rig.hypervisor.attach_channel(plain_guest.uuid, rig.data)
        await helper.serve(rig.data, {"sda": devno}, live=True)
        changed = await marks(socket, "sda", len(before))
        await helper.release()
        assert devno in await helper.untrack()
        await helper.quit()
        return seen, differing(before, after), changed

    try:
        seen, written, changed = run_in_lab(lab, plain_guest, tmp_path, work)
    finally:
        plain_guest.exec("rm -f /mnt/lun/evidence /mnt/data/evidence; sync")
    assert seen[virtual] >= WRITTEN
    assert seen[lun] == 0
    assert len(written) * CHUNK >= WRITTEN
    assert written <= changed
    assert len(changed) < disk.path.stat().st_size // CHUNK // 2  # and not by calling everything changed


async def marks(socket: str, name: str, size: int) -> set[int]:
    """The chunks that the guest's tracker has marked."""
    channel = await open_data_channel(socket, timeout=30)
    with channel:
        source = await asyncio.to_thread(NbdConnection, fd=channel.fileno(), export=name + CHANGED)
    with source:
        data = await asyncio.to_thread(source.pread, 0, source.size)
    return items_of(Bitmap.from_bytes(data, -(-size // CHUNK)).runs())
