"""Changed-block tracking in real guests. The oracle is the LUN's file on the host: what differs in it was marked."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_guest_helper import Rig, fetch, frozen, processes, run_in_lab
from tests.lab.guest import Guest
from tests.lab.iscsi import Lun
from tests.lab.lab import Lab
from tests.lab.workload import Workload
from tests.unit.guest.tracking import CHUNK, bits, chunks
from vmbackupd.guest import topology
from vmbackupd.guest.client import CHANGED, FRESH, GuestHelper, TrackedDisk
from vmbackupd.guest.deploy import build_zipapp
from vmbackupd.units import MiB

pytestmark = pytest.mark.lab

ZIPAPP = "/run/tracker-test.pyz"
TOOL = "/run/tracker-test.py"
PROGRAM = b"""
import ctypes, fcntl, mmap, os, struct, sys

def ioctl(path, code, offset, length):
    fcntl.ioctl(os.open(path, os.O_RDWR), int(code, 16), struct.pack("QQ", int(offset), int(length)))

def partition(path, command, start, length):
    # BLKPG (linux/blkpg.h) adds (1) and deletes (2) without a table; not every Debian has addpart
    known = struct.pack("qqi128x4x", int(start), int(length), 1)
    data = ctypes.create_string_buffer(known, len(known))
    argument = struct.pack("iiiP", int(command), 0, len(known), ctypes.addressof(data))
    fcntl.ioctl(os.open(path, os.O_RDONLY), 0x1269, argument)

def memory(path, offset):
    file = open(path, "r+b")
    mapped = mmap.mmap(file.fileno(), 1 << 20)
    mapped[int(offset) : int(offset) + 10] = b"0123456789"
    mapped.flush()
    os.fsync(file.fileno())

globals()[sys.argv[1]](*sys.argv[2:])
"""
BLKDISCARD, BLKZEROOUT = "1277", "127f"


class Disk:
    """A LUN of a guest: its file on the host, its device in the guest."""

    def __init__(self, lun: Lun, devno: str) -> None:
        self.lun, self.devno = lun, devno

    def names(self) -> list[bytes]:
        """Of its chunks, as they are now."""
        return names(self.lun.path)


def names(path: Path) -> list[bytes]:
    """A digest for each chunk of a file."""
    found = []
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            found.append(hashlib.blake2b(data, digest_size=16).digest())
    return found


def different(before: list[bytes], after: list[bytes]) -> set[int]:
    return {number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}


async def disks_of(helper: GuestHelper, guest: Guest) -> dict[str, Disk]:
    """The guest's LUNs by name."""
    found = {}
    for device in (await helper.probe()).devices:
        for name, lun in guest.luns.items():
            if device.type == "disk" and device.serial == lun.serial:
                found[name] = Disk(lun, device.devno)
    return found


async def track(helper: GuestHelper, disks: dict[str, Disk], consumer: str = "host") -> dict[str, TrackedDisk]:
    answers = await helper.track(consumer, {disk.devno: disk.lun.serial for disk in disks.values()})
    return dict(zip(disks, answers, strict=True))


class Bitmaps:
    """Reads the bitmaps that a helper serves."""

    def __init__(self, rig: Rig, disks: dict[str, Disk]) -> None:
        self.rig, self.disks = rig, disks
        self._path = ""

    async def serve(self, *, live: bool = False) -> None:
        assert self.rig.helper is not None
        if not self._path:
            self._path = await self.rig.hypervisor.attach_channel(self.rig.guest.uuid, self.rig.data)
        await self.rig.helper.serve(self.rig.data, {name: disk.devno for name, disk in self.disks.items()}, live=live)

    async def read(self, name: str, suffix: str) -> set[int]:
        target = self.rig.directory / "bitmap"
        await fetch(self._path, name + suffix, target)
        return bits(memoryview(target.read_bytes()))


@pytest.fixture
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """No tracker before and after, whoever left one."""
    yield
    for name in ("plain_guest", "lvm_guest"):
        if name in request.fixturenames:
            untrack(request.getfixturevalue(name))


def untrack(guest: Guest) -> str:
    """What an administrator would run to be rid of it; the devices that were tracked."""
    guest.write_file(ZIPAPP, build_zipapp())
    return guest.exec(f"python3 {ZIPAPP} --untrack; rm {ZIPAPP}").decode()


def pins(guest: Guest) -> list[str]:
    return guest.exec("find /sys/fs/bpf/vmbackupd 2>/dev/null || true").decode().split()


def files(mount: str) -> dict[str, str]:
    """What changes files: by name, the command."""
    dd = "dd if=/dev/urandom status=none conv=notrunc,fsync"
    return {
        "direct": f"{dd} of={mount}/t1 bs=4k count=40 oflag=direct",
        "buffered": f"head -c 300001 /dev/urandom > {mount}/t2",
        "a byte": f"{dd} of={mount}/t2 bs=1 count=1 seek=70000",
        "made": f"head -c 1M /dev/zero > {mount}/t3",
        "memory": f"python3 {TOOL} memory {mount}/t3 300000",
        "zeroes": f"fallocate -z -o 65536 -l 200000 {mount}/t2",
        "removed": f"rm {mount}/t1 {mount}/t2 {mount}/t3",
        "trimmed": f"fstrim {mount}",
    }


def raw(path: str) -> dict[str, tuple[str, set[int]]]:
    """What changes a device of 64 MiB: by name, the command and the chunks."""
    dd = f"dd if=/dev/urandom of={path} status=none conv=notrunc,fsync"
    return {
        "sector": (f"{dd} bs=512 count=1 seek=1000 oflag=direct", {7}),
        "page": (f"{dd} bs=4k count=1 seek=33", {2}),
        "chunk": (f"{dd} bs=64k count=1 seek=9 oflag=direct", {9}),
        "across": (f"{dd} bs=4k count=2 seek=319 oflag=direct", {19, 20}),
        "large": (f"{dd} bs=4M count=4 seek=8 oflag=direct", chunks(32 * MiB, 16 * MiB)),
        "discard": (f"python3 {TOOL} ioctl {path} {BLKDISCARD} {34 * MiB} {9 * MiB}", chunks(34 * MiB, 9 * MiB)),
        "zeroes": (f"python3 {TOOL} ioctl {path} {BLKZEROOUT} {44 * MiB} {MiB}", chunks(44 * MiB, MiB)),
        "flush": (f"sync {path}", set()),
        "read": (f"dd if={path} of=/dev/null bs=1M iflag=direct status=none", set()),
        "partition": (
            f"python3 {TOOL} partition {path} 1 {MiB} {4 * MiB} && udevadm settle && "
            f"dd if=/dev/urandom of={path}1 bs=64k count=1 seek=3 conv=fsync status=none && "
            f"python3 {TOOL} partition {path} 2 0 0",
            {19},
        ),
    }


async def require_marked(helper: GuestHelper, bitmaps: Bitmaps, guest: Guest, name: str, command: str) -> set[int]:
    """The chunks that ``command`` changes in the LUN's file are among those found, which are returned."""
    disk = bitmaps.disks[name]
    await asyncio.to_thread(guest.exec, "sync")
    await helper.collect(disk.devno)
    before = disk.names()
    await asyncio.to_thread(guest.exec, f"{command} && sync")
    collected = await helper.collect(disk.devno)
    found = await bitmaps.read(name, FRESH)
    assert len(found) == collected.chunks and collected.reason == ""
    lost = different(before, disk.names()) - found
    assert not lost, f"{name}: {command}: {sorted(lost)[:20]}"
    return found


FURTHER = [pytest.param(kind, marks=pytest.mark.extended) for kind in ("trixie", "bullseye")]


@pytest.mark.parametrize("kind", ["plain", *FURTHER])
def test_every_way_to_write(lab: Lab, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """Whatever way the guest changes a LUN: the chunks that differ in its file were marked, and few others. ``bios``
    is a multipath device of the kind that takes bios."""
    guest: Guest = request.getfixturevalue("plain_guest") if kind == "plain" else lab.start_guest(kind)
    spare = lab.iscsi.create_lun(f"{kind}-spare", size=64 * MiB)
    path = guest.login(spare)
    guest.luns["spare"] = spare
    guest.write_file(TOOL, PROGRAM)
    table = f"0 {64 * MiB // 512} multipath 2 queue_mode bio 0 1 1 service-time 0 1 1 {path} 1"
    guest.exec(f"modprobe -a dm_multipath dm_service_time && dmsetup create bios --table '{table}'")

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        disks = await disks_of(helper, guest)
        disks["bios"] = Disk(spare, guest.exec("dmsetup info -c --noheadings -o major,minor bios").decode().strip())
        answers = await track(helper, disks)
        assert all(answer.tracking and answer.generation is None for answer in answers.values()), answers
        bitmaps = Bitmaps(rig, disks)
        await bitmaps.serve(live=True)
        for name, device in (("spare", path), ("bios", "/dev/mapper/bios")):
            for what, (command, expected) in raw(device).items():
                if name == "spare" or what != "partition":
                    found = await require_marked(helper, bitmaps, guest, name, command)
                    assert found == expected, f"{name}: {what}: {sorted(found ^ expected)[:20]}"
        for name, mount in (("lun", "/mnt/lun"), ("iscsi", "/mnt/iscsi"))[: 2 if kind == "plain" else 1]:
            for what, command in files(mount).items():
                found = await require_marked(helper, bitmaps, guest, name, command)
                assert 0 < len(found) < 100 or what == "trimmed", f"{name}: {what}: {len(found)} chunks"
        assert set(await helper.untrack()) == {disk.devno for disk in disks.values()}
        await helper.quit()

    try:
        run_in_lab(lab, guest, tmp_path, work)
        assert pins(guest) == []
    finally:
        del guest.luns["spare"]
        guest.exec("dmsetup remove bios")
        if kind == "plain":
            guest.logout(spare)
            lab.iscsi.delete_target(spare.iqn)
        else:
            guest.destroy()


@pytest.mark.extended
@pytest.mark.usefixtures("clean")
def test_backups_under_a_writer(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    """Each T1 is cut in a freeze, with snapshots, while a writer goes on. What differs between two T1s was marked, also
    where a backup between them was not published, and a helper was killed."""
    guest, workload = plain_guest, Workload(plain_guest)
    workload.start()
    known: list[dict[str, list[bytes]]] = []

    async def backup(rig: Rig, since: str | None, publish: str | None) -> dict[str, set[int]]:
        """One backup, that ends with its publication or without; what changed since ``since``."""
        helper = await rig.start()
        report = await helper.probe()
        disks = await disks_of(helper, guest)
        answers = await track(helper, disks)
        assert {answer.generation for answer in answers.values()} == {since}
        await rig.plug_scratch()
        await rig.prepare(helper, list(topology.top_volumes(report)))
        await helper.arm(60)
        async with frozen(rig):
            await helper.snap()
            copies = {name: tmp_path / f"t1-{name}" for name in disks}
            for name, copy in copies.items():
                shutil.copyfile(disks[name].lun.path, copy)
        assert await helper.disarm() is False
        await asyncio.to_thread(workload.wait, workload.round() + 5)
        for name, disk in disks.items():
            collected = await helper.collect(disk.devno)
            assert not collected.reason, f"{name}: {collected}"
        bitmaps = Bitmaps(rig, disks)
        await bitmaps.serve()
        changed = {name: await bitmaps.read(name, CHANGED) for name in disks}
        known.append({name: names(copy) for name, copy in copies.items()})
        await helper.release()
        if publish is not None:
            await helper.settle(publish)
            await helper.quit()
        else:
            guest.exec(f"kill -KILL {processes(guest, rig.job)[0]}")
        return changed

    def run(since: str | None, publish: str | None) -> dict[str, set[int]]:
        return run_in_lab(lab, guest, tmp_path, lambda rig: backup(rig, since, publish))

    try:
        run(None, "first")
        run("first", None)
        after_two = run("first", "third")
        after_one = run("third", "fourth")
    finally:
        workload.stop()
    workload.check()
    for old, new, changed in ((known[0], known[2], after_two), (known[2], known[3], after_one)):
        for name in old:
            differs = different(old[name], new[name])
            assert differs <= changed[name], f"{name}: {sorted(differs - changed[name])[:20]}"
            print(f"{name}: {len(differs)} chunks differ, {len(changed[name])} marked, {len(old[name])} in all")
            assert len(changed[name]) < len(old[name]) // 2


@pytest.mark.extended
def test_what_ends_a_generation(lab: Lab, tmp_path: Path) -> None:
    """It outlives the helper that was killed and one that ran into its lease; not another consumer, not a disk that was
    attached again, not a boot."""
    guest = lab.start_guest("plain", "tracked")
    try:

        def expect(generation: str | None, *reasons: str, settle: str | None, consumer: str = "host") -> None:
            async def work(rig: Rig) -> None:
                helper = await rig.start(lease=8)
                disks = {"iscsi": (await disks_of(helper, guest))["iscsi"]}
                answer = (await track(helper, disks, consumer))["iscsi"]
                assert (answer.tracking, answer.generation) == (True, generation)
                assert any(reason in answer.reason for reason in reasons), answer
                if settle is None:
                    await helper.close()  # silence, until the lease ends
                    return
                devices = [disk.devno for disk in disks.values()]
                await helper.prepare_capture(devices, limit=64 * MiB)
                await helper.arm(60)
                async with frozen(rig):
                    await helper.capture(devices, deadline=20)
                await helper.disarm()
                await helper.settle(settle)
                guest.exec(f"kill -KILL {processes(guest, rig.job)[0]}")

            run_in_lab(lab, guest, tmp_path, work)

        expect(None, "was not tracked since the guest started", settle="first")
        expect("first", "", settle=None)
        expect("first", "", settle="second")
        expect(None, "another host or repository", settle="third", consumer="other")
        guest.exec("umount /mnt/iscsi /mnt/span; vgchange -an vgiscsi vgspan")
        node = f"iscsiadm -m node -T {guest.luns['iscsi'].iqn} -p {guest.luns['iscsi'].portal_guest}"
        guest.exec(f"{node} --logout && {node} --login && udevadm settle")
        # it may have got another device number
        expect(None, "attached again", "was not tracked", settle="fourth", consumer="other")
        guest.domain.reset()
        guest.close()
        guest.wait_agent()
        expect(None, "was not tracked since the guest started", settle=None, consumer="other")
        assert untrack(guest).split() and pins(guest) == []
    finally:
        guest.destroy()
