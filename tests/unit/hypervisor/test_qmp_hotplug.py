"""Hot-plug without libvirt, on real QEMU processes whose guest has no system: the requests, and what is cleaned up."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.qemu import Monitor, monitor
from tests.unit.hypervisor.machine import create, pattern
from tests.unit.hypervisor.plain import PORTS, PlainQemu
from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.images import create_qcow2
from vmbackupd.hypervisor.qmp import hotplug
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor

New = Callable[..., PlainQemu]
NAME, SERIAL = "org.vmbackupd.jfeedbeef.c", "vmbk-jfeedbeef"
SERIAL_PORTS = "-device virtio-serial-pci"
SCSI = "-device virtio-scsi-pci,id=scsi0"


def left_over(machine: PlainQemu) -> list[str]:
    """Character devices, nodes and sockets of ours that are still there."""
    with monitor(machine.qemu.own) as own:
        found = [item["label"] for item in own.execute("query-chardev")]
        found += [node["node-name"] for node in own.execute("query-named-block-nodes")]
    found += os.listdir(machine.qemu.directory)
    return [name for name in found if name.startswith(("vmbk", "org.vmbackupd"))]


def test_channels_are_plugged_and_unplugged(new_qemu: New) -> None:
    machine = new_qemu(SERIAL_PORTS)

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        for _ in range(2):
            path = await hv.attach_channel(uuid, NAME)
            assert path == await hv.attach_channel(uuid, NAME) == str(machine.qemu.directory / NAME)
            with socket.socket(socket.AF_UNIX) as host:
                host.connect(path)
            await hv.detach_channel(uuid, NAME)
            assert not os.path.exists(path)
        await hv.detach_channel(uuid, NAME)

    machine.work(work)
    assert left_over(machine) == []


def test_half_a_channel_is_made_whole_or_removed(new_qemu: New) -> None:
    """The daemon died between the character device and the port, and between the port's end and the device's."""
    machine = new_qemu(SERIAL_PORTS)
    for attempt in ("attach", "detach"):
        machine.qemu.execute("chardev-add", id=NAME, backend={"type": "socket", "data": {
            "addr": {"type": "unix", "data": {"path": str(machine.qemu.directory / NAME)}},
            "server": True, "wait": False}})
        if attempt == "attach":
            machine.work(lambda hv, uuid: hv.attach_channel(uuid, NAME))
        machine.work(lambda hv, uuid: hv.detach_channel(uuid, NAME))
        assert left_over(machine) == []


def test_a_channel_of_one_that_is_off_leaves_no_socket(new_qemu: New) -> None:
    machine = new_qemu(SERIAL_PORTS)
    path = machine.work(lambda hv, uuid: hv.attach_channel(uuid, NAME))
    machine.qemu.kill()
    assert os.path.exists(path)
    machine.work(lambda hv, uuid: hv.detach_channel(uuid, NAME))
    assert not os.path.exists(path)


def test_without_a_controller_there_is_no_channel(new_qemu: New) -> None:
    machine = new_qemu()
    with pytest.raises(HypervisorError, match="needs a virtio-serial controller"):
        machine.work(lambda hv, uuid: hv.attach_channel(uuid, NAME))
    assert left_over(machine) == []


@pytest.mark.parametrize(("machine_type", "words", "bus"), [
    ("q35", PORTS, "virtio"), ("q35", SCSI, "scsi"), ("pc", "", "virtio")])
def test_the_scratch_disk_finds_a_place(new_qemu: New, tmp_path: Path, machine_type: str, words: str, bus: str) -> None:
    machine = new_qemu(f"-M {machine_type} {words}")
    path = str(tmp_path / "scratch.qcow2")

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        await create_qcow2(path, 64 << 20)
        target = await hv.attach_scratch(uuid, path, SERIAL)
        assert await hv.attach_scratch(uuid, path, SERIAL) == target
        (disk,) = [disk for disk in (await hv.domain(uuid)).disks if disk.target == target]
        assert (disk.serial, disk.size, disk.bus, disk.chain) == (SERIAL, 64 << 20, bus, (path,))

    machine.work(work)


def test_a_q35_without_a_free_port_is_told_what_it_needs(new_qemu: New, tmp_path: Path) -> None:
    create(tmp_path / "a", "raw")
    machine = new_qemu("-device pcie-root-port,id=port0,chassis=1 -drive if=none,id=a,format=raw,file={dir}/a"
                       " -device virtio-blk-pci,drive=a,bus=port0")
    path = str(tmp_path / "scratch.qcow2")

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        await create_qcow2(path, 64 << 20)
        with pytest.raises(HypervisorError, match="start it with a pcie-root-port that is free"):
            await hv.attach_scratch(uuid, path, SERIAL)

    machine.work(work)
    assert left_over(machine) == []


def test_the_scratch_disk_goes_with_the_overlays_on_it(few_disks: PlainQemu) -> None:
    """As after T2: it is known by the base of its chain, and what was written to the overlay is needed no more."""
    path = str(few_disks.dir / "scratch.qcow2")

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        await create_qcow2(path, 64 << 20)
        target = await hv.attach_scratch(uuid, path, SERIAL)
        await asyncio.to_thread(few_disks.qemu.write, f"/machine/peripheral/{SERIAL}/virtio-backend", 3, "0", "1M")
        await hv.snapshot(uuid, {target: f"{path}.t2"})
        await asyncio.to_thread(few_disks.qemu.write, f"/machine/peripheral/{SERIAL}/virtio-backend", 4, "0", "1M")
        await detach_with_guest(few_disks, hv, uuid, path)
        await hv.drop_overlay(uuid, f"{path}.t2")
        assert not [disk for disk in (await hv.domain(uuid)).disks if disk.target == target]
        await hv.detach_scratch(uuid, path)

    few_disks.work(work)
    assert left_over(few_disks) == []
    assert pattern(Path(path), "qcow2", 3, "0", "1M")
    assert not os.path.exists(f"{path}.t2")


async def detach_with_guest(machine: PlainQemu, hv: QmpHypervisor, uuid: str, path: str) -> None:
    """Unplug a disk whose guest has no system that could let go of it: turning the machine off and on does."""
    detaching = asyncio.ensure_future(hv.detach_scratch(uuid, path))
    with_own: Monitor = await asyncio.to_thread(Monitor, machine.qemu.own)
    try:
        while not detaching.done():
            await asyncio.to_thread(with_own.execute, "system_reset")
            await asyncio.wait({detaching}, timeout=0.5)
    finally:
        with_own.close()
    await detaching


def test_a_guest_that_does_not_let_go(few_disks: PlainQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "DETACH", 1.0)
    monkeypatch.setattr(hotplug, "DETACH_ASK_AGAIN", 0.3)
    path = str(few_disks.dir / "scratch.qcow2")

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        await create_qcow2(path, 64 << 20)
        await hv.attach_scratch(uuid, path, SERIAL)
        with pytest.raises(HypervisorError, match="the guest does not let go of disk .*scratch.* within 1 s"):
            await hv.detach_scratch(uuid, path)

    few_disks.work(work)
