"""What the guest's helper serves beside a disk, and what it captures of one in a freeze.

The oracle is the LUN's file on the host.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from pathlib import Path

import pytest

from tests.integration.test_guest_helper import Rig, fetch, frozen, luns_of, run_in_lab
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.guest import topology
from vmbackupd.guest.client import CAPTURED, EXCEPTIONS, FRESH, HASHES, REST
from vmbackupd.units import KiB, MiB

pytestmark = pytest.mark.lab

CHUNK = 64 * KiB
KEY = bytes(range(16))


def chunks(content: bytes) -> list[bytes]:
    return [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]


def test_hashes_and_exceptions(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    """A LUN read on the host, with the chunks of T1 put where the bitmap says so afterwards, is the LUN at T1: with the
    guest writing before, while and after it is read."""

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        report = await helper.probe()
        volumes = list(topology.top_volumes(report))
        luns = list(luns_of(plain_guest, report).items())
        assert len(luns) == 3
        await rig.plug_scratch()
        await rig.prepare(helper, volumes, 128 * MiB)
        path = await rig.hypervisor.attach_channel(rig.guest.uuid, rig.data)
        await helper.arm(60)
        async with frozen(rig):
            await helper.snap()
            for number, (source, _) in enumerate(luns):
                shutil.copyfile(source, tmp_path / f"t1-{number}")
        await helper.disarm()
        await helper.serve(rig.data, {f"lun{number}": devno for number, (_, devno) in enumerate(luns)}, hash_key=KEY)
        seen = [Bitmap(source.stat().st_size // CHUNK) for source, _ in luns]
        for turn in range(3):
            writing = asyncio.create_task(asyncio.to_thread(write, plain_guest, turn))
            for number, (source, _) in enumerate(luns):
                await check(path, number, source, tmp_path, seen[number])
            await writing
        counts = [bitmap.count() for bitmap in seen]
        assert sum(counts) > 64 and all(count < bitmap.length // 2 for count, bitmap in zip(counts, seen, strict=True))
        await check_hashes(path, len(luns), tmp_path)
        await helper.release()
        await helper.quit()

    run_in_lab(lab, plain_guest, tmp_path, work)


def write(guest: Guest, turn: int) -> None:
    """Two MiB on each LUN, where there was nothing or older content."""
    guest.exec(
        "for place in iscsi lun span; do "
        f"dd if=/dev/urandom of=/mnt/$place/exceptions bs=64k count=32 seek={16 * turn} conv=notrunc,fsync 2>&1; done"
    )


async def check(path: str, number: int, source: Path, directory: Path, seen: Bitmap) -> None:
    now = chunks(source.read_bytes())
    await fetch(path, f"lun{number}{EXCEPTIONS}", directory / "bitmap")
    bitmap = Bitmap.from_bytes((directory / "bitmap").read_bytes(), len(now))
    before = seen.copy()
    before.subtract(bitmap)
    assert before.count() == 0, "an exception went away"
    seen.merge(bitmap)
    t1 = chunks((directory / f"t1-{number}").read_bytes())
    assert [at for at, chunk in enumerate(now) if chunk != t1[at] and not bitmap[at]] == []


async def check_hashes(path: str, count: int, directory: Path) -> None:
    for number in range(count):
        await fetch(path, f"lun{number}{HASHES}", directory / "hashes")
        t1 = chunks((directory / f"t1-{number}").read_bytes())
        assert (directory / "hashes").read_bytes() == b"".join(
            hashlib.blake2b(chunk, digest_size=16, key=KEY).digest() if chunk.strip(b"\0") else bytes(16)
            for chunk in t1
        )


@pytest.mark.parametrize("volumes", [True, False])
def test_capture(lab: Lab, plain_guest: Guest, tmp_path: Path, volumes: bool) -> None:
    """A filesystem straight on a LUN, with a writer that never rests: copied round after round, the rest captured in
    the freeze, with or without snapshots of other volumes in it."""
    lun = lab.iscsi.create_lun(f"capture-{volumes}", size=96 * MiB)
    device = plain_guest.login(lun)
    plain_guest.exec(f"mkfs.ext4 -q -E nodiscard {device} && mkdir -p /mnt/plain && mount {device} /mnt/plain")
    plain_guest.write_file("/run/scribble", SCRIBBLE)
    plain_guest.exec("systemd-run --collect --quiet --unit=scribble python3 /run/scribble /mnt/plain/log")

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        report = await helper.probe()
        devno = next(item.devno for item in report.devices if item.serial == lun.serial)
        path = await rig.hypervisor.attach_channel(rig.guest.uuid, rig.data)
        (tracked,) = await helper.track("test", {devno: lun.serial})
        assert tracked.tracking, tracked.reason
        copy = tmp_path / "copy"
        await helper.collect(devno)
        await helper.serve(rig.data, {"plain": devno}, live=True)
        await fetch(path, "plain", copy)
        for _ in range(2):
            found = await helper.collect(devno)
            await merge(path, f"plain{FRESH}", "plain", copy, tmp_path)
            assert found.chunks
        if volumes:
            await rig.plug_scratch()
            await rig.prepare(helper, list(topology.top_volumes(report)))
        assert await helper.prepare_capture([devno], limit=32 * MiB) == 32 * MiB
        await helper.arm(60)
        async with frozen(rig):
            if volumes:
                await helper.snap()
            began = time.monotonic()
            captured = await helper.capture([devno], deadline=20)
            print(f"{captured} in {(time.monotonic() - began) * 1000:.0f} ms")
            shutil.copyfile(lun.path, tmp_path / "t1")
        assert not await helper.disarm()
        assert captured.disks[0].chunks > 0 and captured.disks[0].bytes == captured.disks[0].chunks * CHUNK
        await helper.serve(rig.data, {"plain": devno})
        await merge(path, f"plain{REST}", f"plain{CAPTURED}", copy, tmp_path)
        t1 = chunks((tmp_path / "t1").read_bytes())
        assert [at for at, chunk in enumerate(chunks(copy.read_bytes())) if chunk != t1[at]] == []
        assert lun.path.read_bytes() != copy.read_bytes(), "nothing was written meanwhile: this proves nothing"
        await helper.release()
        await helper.untrack()
        await helper.quit()

    try:
        run_in_lab(lab, plain_guest, tmp_path, work)
    finally:
        plain_guest.exec("systemctl stop scribble; umount /mnt/plain")
        plain_guest.logout(lun)
        lab.iscsi.delete_target(lun.iqn)


SCRIBBLE = b"""
import os, random, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
while True:
    os.pwrite(fd, os.urandom(8192), 4096 * random.randrange(2000))
    os.fsync(fd)
"""


async def merge(path: str, bitmap: str, export: str, copy: Path, directory: Path) -> None:
    """Replace the chunks of ``copy`` that are set in the export ``bitmap`` by those of ``export``."""
    await fetch(path, bitmap, directory / "bitmap")
    await fetch(path, export, directory / "now")
    now = (directory / "now").read_bytes()
    with open(copy, "r+b") as file:
        for first, count in Bitmap.from_bytes((directory / "bitmap").read_bytes(), len(now) // CHUNK).runs():
            file.seek(first * CHUNK)
            file.write(now[first * CHUNK : (first + count) * CHUNK])
