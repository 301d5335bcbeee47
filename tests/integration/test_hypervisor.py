"""The hypervisor layer with a guest that takes part: hot-plug, snapshots beside a ``lun``, what the agent refuses."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.services import until
from vmbackupd.errors import GuestAgentRefused, GuestAgentUnavailable, HypervisorError, InvalidArgument
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.storage_daemon import create_qcow2

pytestmark = pytest.mark.lab

T = TypeVar("T")
SERIAL = "vmbk-jfeedbeef"
DISKS = ("vda", "vdb", "vdc")


def shell(guest: Guest, script: str) -> str:
    return guest.exec(["sh", "-c", script]).decode().strip()


def io_errors(guest: Guest) -> str:
    return shell(guest, "dmesg | grep -iE 'i/o error|critical|journal has aborted|remounting' || true")


def with_lab(lab: Lab, work: Callable[[LibvirtHypervisor], Awaitable[T]]) -> T:
    async def main() -> T:
        hypervisor = LibvirtHypervisor(lab.libvirt_uri)
        await hypervisor.open()
        try:
            return await asyncio.wait_for(work(hypervisor), 300)
        finally:
            await hypervisor.close()

    return asyncio.run(main())


def by_serial(guest: Guest, serial: str) -> str:
    """The name of the guest's disk with that serial, empty if there is none."""
    return shell(guest, f"grep -lx {serial} /sys/block/*/serial 2>/dev/null | cut -d/ -f4")


def test_the_guest_finds_each_disk_where_the_hypervisor_says(lab: Lab, plain_guest: Guest) -> None:
    info = with_lab(lab, lambda hv: hv.domain(plain_guest.uuid))
    disks = {disk.target: disk for disk in info.disks}
    for target in DISKS:
        address, serial = disks[target].address, disks[target].serial
        assert address is not None and serial is not None and address.unit is None
        name = by_serial(plain_guest, serial)
        assert address.pci in shell(plain_guest, f"readlink -f /sys/block/{name}")
        assert int(shell(plain_guest, f"cat /sys/block/{name}/size")) * 512 == disks[target].size
    lun = disks["sda"]
    assert lun.device == "lun" and lun.address is not None and lun.size == plain_guest.luns["lun"].path.stat().st_size
    place = f":0:{lun.address.target}:{lun.address.unit}/block/"
    assert shell(plain_guest, f"readlink -f /sys/block/* | grep -F {lun.address.pci} | grep -F {place}")


def test_a_channel_carries_bytes_and_goes_without_a_trace(lab: Lab, plain_guest: Guest) -> None:
    name = "org.vmbackupd.jfeedbeef.c"

    async def work(hv: LibvirtHypervisor) -> None:
        for _ in range(2):
            path = await hv.attach_channel(plain_guest.uuid, name)
            await asyncio.to_thread(_talk, plain_guest, path, name)
            await hv.detach_channel(plain_guest.uuid, name)
            assert not os.path.exists(path)
            await asyncio.to_thread(until, lambda: name not in shell(
                plain_guest, "cat /sys/class/virtio-ports/*/name"), 20, "the port is gone from the guest")

    with_lab(lab, work)


def _talk(guest: Guest, path: str, name: str) -> None:
    find = f"grep -lx {name} /sys/class/virtio-ports/*/name | cut -d/ -f5"
    port = until(lambda: shell(guest, f"{find} || true"), 20, "the port is in the guest")
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(30)
        host.connect(path)
        shell(guest, f"until [ -c /dev/{port} ]; do sleep 0.1; done; echo hello > /dev/{port}")
        assert host.recv(100) == b"hello\n"


def test_the_scratch_disk_comes_and_goes(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    path = str(tmp_path / "scratch.qcow2")

    async def work(hv: LibvirtHypervisor) -> None:
        await create_qcow2(path, 64 << 20)
        for _ in range(2):  # a port can be used again
            target = await hv.attach_scratch(plain_guest.uuid, path, SERIAL)
            disk = next(d for d in (await hv.domain(plain_guest.uuid)).disks if d.target == target)
            name = await asyncio.to_thread(until, lambda: by_serial(plain_guest, SERIAL), 20, "the disk is there")
            assert disk.address is not None and disk.serial == SERIAL
            assert disk.address.pci in shell(plain_guest, f"readlink -f /sys/block/{name}")
            shell(plain_guest, f"dd if=/dev/zero of=/dev/{name} bs=64k count=4 oflag=direct conv=fsync")
            await hv.detach_scratch(plain_guest.uuid, path)
            assert not await asyncio.to_thread(by_serial, plain_guest, SERIAL)
        await hv.detach_scratch(plain_guest.uuid, path)

    with_lab(lab, work)


def test_an_unplug_right_after_the_plug_is_not_lost(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    path = str(tmp_path / "scratch.qcow2")

    async def work(hv: LibvirtHypervisor) -> None:
        await create_qcow2(path, 64 << 20)
        await hv.attach_scratch(plain_guest.uuid, path, SERIAL)
        await hv.detach_scratch(plain_guest.uuid, path)

    with_lab(lab, work)
    assert not by_serial(plain_guest, SERIAL)


def test_snapshots_beside_a_lun_under_load(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    """All virtual disks and the scratch disk in one snapshot while the guest writes everywhere: it sees no error."""
    overlays = {target: f"{plain_guest.disks[target]}.jfeedbeef" for target in DISKS}
    scratch = str(tmp_path / "scratch.qcow2")

    async def work(hv: LibvirtHypervisor) -> None:
        uuid = plain_guest.uuid
        await create_qcow2(scratch, 64 << 20)
        target = await hv.attach_scratch(uuid, scratch, SERIAL)
        everything = {**overlays, target: f"{scratch}.t2"}
        with pytest.raises(InvalidArgument, match="disk sda is a lun and is never snapshotted"):
            await hv.snapshot(uuid, {**everything, "sda": str(tmp_path / "lun.overlay")})
        await hv.prepare_overlays(uuid, everything)
        began = asyncio.get_running_loop().time()
        await hv.snapshot(uuid, everything)
        print(f"snapshot of {len(everything)} disks: {asyncio.get_running_loop().time() - began:.3f} s")
        assert {d.target: d.chain[0] for d in (await hv.domain(uuid)).disks if d.target in everything} == everything
        await hv.detach_scratch(uuid, scratch)  # known by the base of its chain
        await hv.drop_overlay(uuid, f"{scratch}.t2")
        for path in overlays.values():
            await hv.drop_overlay(uuid, path)
        assert {d.chain for d in (await hv.domain(uuid)).disks if d.target in DISKS} == {
            (str(plain_guest.disks[target]),) for target in DISKS}

    before = io_errors(plain_guest)
    for mount in ("/mnt/data", "/mnt/span", "/mnt/lun", "/"):
        write = f"dd if=/dev/urandom of={mount}/load bs=64k count=8 conv=fsync; sleep 0.1"
        loop = f"while [ -e /run/load ]; do {write}; done; rm {mount}/load"
        shell(plain_guest, f"touch /run/load; setsid -f sh -c '{loop}' </dev/null >/dev/null 2>&1")
    try:
        with_lab(lab, work)
    finally:
        shell(plain_guest, "rm -f /run/load")
        until(lambda: not shell(plain_guest, "ls /mnt/*/load /load 2>/dev/null || true"), 30, "the load ends")
    assert io_errors(plain_guest) == before
    assert not [path for path in overlays.values() if os.path.exists(path)]
    assert os.listdir(tmp_path) == ["scratch.qcow2"]


def test_what_the_agent_refuses_and_when_it_is_silent(lab: Lab, plain_guest: Guest) -> None:
    uuid, run = plain_guest.uuid, {"path": "/bin/true"}

    async def work(hv: LibvirtHypervisor) -> None:
        assert await hv.agent(uuid, "guest-ping") == {}
        assert isinstance(await hv.agent(uuid, "guest-exec", run), dict)
        with pytest.raises(HypervisorError, match="guest agent: guest-file-open: .*No such file"):
            await hv.agent(uuid, "guest-file-open", {"path": "/nonexistent/file"})
        with pytest.raises(GuestAgentRefused, match="guest-nonsense"):
            await hv.agent(uuid, "guest-nonsense")
        try:
            assert await hv.agent(uuid, "guest-fsfreeze-freeze", timeout=60) != 0
            with pytest.raises(GuestAgentUnavailable, match="the guest is frozen"):
                await hv.agent(uuid, "guest-exec", run)
        finally:
            await hv.agent(uuid, "guest-fsfreeze-thaw", timeout=60)
        assert await hv.agent(uuid, "guest-fsfreeze-status") == "thawed"

    with_lab(lab, work)
    with plain_guest.agent_restricted():
        async def refused(hv: LibvirtHypervisor) -> None:
            with pytest.raises(GuestAgentRefused, match="guest-exec"):
                await hv.agent(uuid, "guest-exec", run)

        with_lab(lab, refused)
