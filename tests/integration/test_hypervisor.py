"""The hypervisor interface with a guest that takes part: the same for libvirt and for QEMU without it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.qemu import PlainGuest
from tests.lab.services import until
from tests.unit.hypervisor.machine import dirty, tool
from vmbackupd.config import MachineConfig
from vmbackupd.errors import GuestAgentRefused, GuestAgentUnavailable, HypervisorError, InvalidArgument, NotFound
from vmbackupd.hypervisor.base import FleeceExport, Hypervisor
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor
from vmbackupd.hypervisor.storage_daemon import create_qcow2

pytestmark = pytest.mark.lab

T = TypeVar("T")
SERIAL = "vmbk-jfeedbeef"
DISKS = ("vda", "vdb", "vdc")


def shell(guest: Guest, script: str) -> str:
    return guest.exec(["sh", "-c", script]).decode().strip()


def io_errors(guest: Guest) -> str:
    return shell(guest, "dmesg | grep -iE 'i/o error|critical|journal has aborted|remounting' || true")


@dataclass
class Side:
    """One implementation of the interface, and a guest of its own."""

    guest: Guest
    make: Callable[[], Hypervisor]

    @property
    def uuid(self) -> str:
        return self.guest.uuid

    def run(self, work: Callable[[Hypervisor], Awaitable[T]]) -> T:
        """The result of ``work`` on a hypervisor that is open meanwhile."""

        async def main() -> T:
            hypervisor = self.make()
            await hypervisor.open()
            try:
                return await asyncio.wait_for(work(hypervisor), 300)
            finally:
                await hypervisor.close()

        return asyncio.run(main())


@pytest.fixture(scope="module", params=["libvirt", "qmp"])
def side(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Side:
    if request.param == "libvirt":
        return Side(request.getfixturevalue("plain_guest"), lambda: LibvirtHypervisor(lab.libvirt_uri))
    guest: PlainGuest = request.getfixturevalue("unmanaged_guest")
    machines = {guest.name: MachineConfig(guest.qemu.qmp)}
    state = tmp_path_factory.mktemp("state")
    return Side(guest, lambda: QmpHypervisor(machines, state))


def by_serial(guest: Guest, serial: str) -> str:
    """The name of the guest's disk with that serial, empty if there is none."""
    return shell(guest, f"grep -lx {serial} /sys/block/*/serial 2>/dev/null | cut -d/ -f4")


def test_machines_are_listed_and_found_by_name_and_uuid(side: Side) -> None:
    async def work(hv: Hypervisor) -> None:
        assert (side.guest.name, side.uuid, True) in await hv.domains()
        info = await hv.domain(side.uuid)
        assert info.name == (await hv.domain(side.guest.name)).name == side.guest.name
        assert info.running and info.has_agent and info.nvram is None and info.hostdevs == ()
        assert all(text for text in info.config.values())
        for path in (side.guest.disks["vdb"], side.guest.luns["lun"].path):
            assert await hv.path_users(str(path)) == [side.guest.name] * (path == side.guest.disks["vdb"])
        for nobody in ("nobody", "00000000-0000-0000-0000-000000000000"):
            with pytest.raises(NotFound):
                await hv.domain(nobody)
        await hv.start(side.uuid)  # it runs already

    side.run(work)


def test_the_guest_finds_each_disk_where_the_hypervisor_says(side: Side) -> None:
    info = side.run(lambda hv: hv.domain(side.guest.uuid))
    disks = {disk.target: disk for disk in info.disks}
    for target in DISKS:
        address, serial = disks[target].address, disks[target].serial
        assert address is not None and serial is not None and address.unit is None
        name = by_serial(side.guest, serial)
        assert address.pci in shell(side.guest, f"readlink -f /sys/block/{name}")
        assert int(shell(side.guest, f"cat /sys/block/{name}/size")) * 512 == disks[target].size
    lun = disks["sda"]
    assert lun.device == "lun" and lun.address is not None and lun.size == side.guest.luns["lun"].path.stat().st_size
    place = f":0:{lun.address.target}:{lun.address.unit}/block/"
    assert shell(side.guest, f"readlink -f /sys/block/* | grep -F {lun.address.pci} | grep -F {place}")


def test_a_channel_carries_bytes_and_goes_without_a_trace(side: Side) -> None:
    name = "org.vmbackupd.jfeedbeef.c"

    async def work(hv: Hypervisor) -> None:
        for _ in range(2):
            path = await hv.attach_channel(side.guest.uuid, name)
            await asyncio.to_thread(_talk, side.guest, path, name)
            await hv.detach_channel(side.guest.uuid, name)
            assert not os.path.exists(path)
            await asyncio.to_thread(until, lambda: name not in shell(
                side.guest, "cat /sys/class/virtio-ports/*/name"), 20, "the port is gone from the guest")

    side.run(work)


def _talk(guest: Guest, path: str, name: str) -> None:
    find = f"grep -lx {name} /sys/class/virtio-ports/*/name | cut -d/ -f5"
    port = until(lambda: shell(guest, f"{find} || true"), 20, "the port is in the guest")
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(30)
        host.connect(path)
        shell(guest, f"until [ -c /dev/{port} ]; do sleep 0.1; done; echo hello > /dev/{port}")
        assert host.recv(100) == b"hello\n"


def test_the_scratch_disk_comes_and_goes(side: Side, tmp_path: Path) -> None:
    path = str(tmp_path / "scratch.qcow2")

    async def work(hv: Hypervisor) -> None:
        await create_qcow2(path, 64 << 20)
        for _ in range(2):  # a port can be used again
            target = await hv.attach_scratch(side.guest.uuid, path, SERIAL)
            disk = next(d for d in (await hv.domain(side.guest.uuid)).disks if d.target == target)
            name = await asyncio.to_thread(until, lambda: by_serial(side.guest, SERIAL), 20, "the disk is there")
            assert disk.address is not None and disk.serial == SERIAL
            assert disk.address.pci in shell(side.guest, f"readlink -f /sys/block/{name}")
            shell(side.guest, f"dd if=/dev/zero of=/dev/{name} bs=64k count=4 oflag=direct conv=fsync")
            await hv.detach_scratch(side.guest.uuid, path)
            assert not await asyncio.to_thread(by_serial, side.guest, SERIAL)
        await hv.detach_scratch(side.guest.uuid, path)

    side.run(work)


def test_an_unplug_right_after_the_plug_is_not_lost(side: Side, tmp_path: Path) -> None:
    path = str(tmp_path / "scratch.qcow2")

    async def work(hv: Hypervisor) -> None:
        await create_qcow2(path, 64 << 20)
        await hv.attach_scratch(side.guest.uuid, path, SERIAL)
        await hv.detach_scratch(side.guest.uuid, path)

    side.run(work)
    assert not by_serial(side.guest, SERIAL)


def test_snapshots_beside_a_lun_under_load(side: Side, tmp_path: Path) -> None:
    """All virtual disks and the scratch disk in one snapshot while the guest writes everywhere: it sees no error."""
    overlays = {target: f"{side.guest.disks[target]}.jfeedbeef" for target in DISKS}
    scratch = str(tmp_path / "scratch.qcow2")

    async def work(hv: Hypervisor) -> None:
        uuid = side.guest.uuid
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
            (str(side.guest.disks[target]),) for target in DISKS}

    before = io_errors(side.guest)
    for mount in ("/mnt/data", "/mnt/span", "/mnt/lun", "/"):
        write = f"dd if=/dev/urandom of={mount}/load bs=64k count=8 conv=fsync; sleep 0.1"
        loop = f"while [ -e /run/load ]; do {write}; done; rm {mount}/load"
        shell(side.guest, f"touch /run/load; setsid -f sh -c '{loop}' </dev/null >/dev/null 2>&1")
    try:
        side.run(work)
    finally:
        shell(side.guest, "rm -f /run/load")
        until(lambda: not shell(side.guest, "ls /mnt/*/load /load 2>/dev/null || true"), 30, "the load ends")
    assert io_errors(side.guest) == before
    assert not [path for path in overlays.values() if os.path.exists(path)]
    assert os.listdir(tmp_path) == ["scratch.qcow2"]


def test_what_the_agent_refuses_and_when_it_is_silent(side: Side) -> None:
    uuid, run = side.guest.uuid, {"path": "/bin/true"}

    async def work(hv: Hypervisor) -> None:
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

    side.run(work)
    with side.guest.agent_restricted():
        async def refused(hv: Hypervisor) -> None:
            with pytest.raises(GuestAgentRefused, match="guest-exec"):
                await hv.agent(uuid, "guest-exec", run)

        side.run(refused)


def test_an_agent_that_goes_and_comes_is_told(side: Side) -> None:
    async def work(hv: Hypervisor) -> None:
        told: asyncio.Queue[str] = asyncio.Queue()

        async def do(verb: str) -> None:
            command = f"systemctl reset-failed qemu-guest-agent; systemctl {verb} qemu-guest-agent"
            await asyncio.to_thread(shell, side.guest, command)

        async def hear(event: str) -> None:
            while await asyncio.wait_for(told.get(), 30) != event:
                pass

        await hv.domain(side.uuid)
        end = hv.watch(side.uuid, told.put_nowait)
        for _ in range(20):  # the watch has begun when anything is told
            await do("stop")
            await do("start")
            if not told.empty():
                break
        await do("stop")
        await hear("agent-disconnected")
        await do("start")
        await hear("agent-connected")
        end()

    side.run(work)


def test_a_bitmap_has_all_that_the_guest_wrote_and_a_served_disk_nothing_of_what_came_later(
    side: Side, tmp_path: Path
) -> None:
    """Written behind the beginning of the bitmap and before T2: changed, and there. Written after T2: not there yet,
    and changed for the next time."""
    name, socket_path = "vmbackupd-jfeedbeef", str(side.guest.lab.dir / "fleece")
    place = "/mnt/data/marks"

    def mark(word: str) -> None:
        shell(side.guest, f"yes {word} | head -c 1M > {place}.{word}; sync -f {place}.{word}")

    def changed_chunks(exports: Mapping[str, FleeceExport]) -> set[int]:
        return dirty(socket_path, exports["vdb"].name, str(exports["vdb"].bitmap))

    async def serve(hv: Hypervisor) -> Mapping[str, FleeceExport]:
        scratch = {target: str(tmp_path / f"{target}.scratch") for target in ("vdb", "vdc")}
        for path in scratch.values():
            Path(path).unlink(missing_ok=True)
        return await hv.begin_fleece(side.uuid, scratch, socket_path, {"vdb": name})

    async def work(hv: Hypervisor) -> tuple[set[int], set[int], bytes, bytes]:
        await asyncio.to_thread(mark, "before")
        assert await hv.begin_bitmaps(side.uuid, name, ["vdb"]) == {"vdb": None}
        assert name in await hv.bitmaps(side.uuid)
        await asyncio.to_thread(mark, "between")
        first = await serve(hv)
        try:
            await asyncio.to_thread(mark, "after")
            chunks = await asyncio.to_thread(changed_chunks, first)
            image = await asyncio.to_thread(_read, socket_path, first["vdb"].name, tmp_path)
        finally:
            await hv.end_fleece(side.uuid)
        second = await serve(hv)
        try:
            later = await asyncio.to_thread(changed_chunks, second)
            final = await asyncio.to_thread(_read, socket_path, second["vdb"].name, tmp_path)
        finally:
            await hv.end_fleece(side.uuid)
        await hv.drop_bitmaps(side.uuid, name)
        await hv.drop_bitmaps(side.uuid, name)
        assert name not in await hv.bitmaps(side.uuid)
        return chunks, later, image, final

    try:
        chunks, later, image, final = side.run(work)
    finally:
        shell(side.guest, f"rm -f {place}.*")
    marks = {word: f"{word}\n".encode() * 200 for word in ("before", "between", "after")}
    where = {word: {offset >> 16 for offset in _found(final, text)} for word, text in marks.items()}
    assert where["between"] and where["between"] <= chunks < later
    assert where["after"] and where["after"] <= later
    assert marks["between"] in image and marks["after"] not in image


def _read(socket_path: str, export: str, directory: Path) -> bytes:
    path = directory / "read.raw"
    path.unlink(missing_ok=True)
    tool("nbdcopy", f"nbd+unix:///{export}?socket={socket_path}", str(path))
    return path.read_bytes()


def _found(image: bytes, text: bytes) -> Iterator[int]:
    """Where ``text`` stands in the image, a few places at least."""
    at = image.find(text)
    while at >= 0:
        yield at
        at = image.find(text, at + (64 << 10))
