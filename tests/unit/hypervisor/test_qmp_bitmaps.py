"""Dirty bitmaps without libvirt, on real QEMU processes: what they hold through snapshots and their end, and what is
said of one that cannot be relied on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.unit.hypervisor.machine import create, dirty, tool
from tests.unit.hypervisor.plain import PlainQemu
from vmbackupd.errors import InvalidArgument, NotRunning
from vmbackupd.hypervisor.base import bitmap_name
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon

FIRST, SECOND = "vmbackupd-j1", "vmbackupd-j2"
VDA, SDA = "/machine/peripheral/vda/virtio-backend", "sda"


def begin(machine: PlainQemu, name: str = FIRST, *targets: str) -> Mapping[str, str | None]:
    return machine.work(lambda hv, uuid: hv.begin_bitmaps(uuid, name, targets or ("vda", "sda")))


def reasons(machine: PlainQemu, name: str = FIRST, *targets: str) -> Mapping[str, str | None]:
    return machine.work(lambda hv, uuid: hv.bitmap_reasons(uuid, name, targets or ("vda", "sda")))


def drop(machine: PlainQemu, name: str = FIRST) -> None:
    machine.work(lambda hv, uuid: hv.drop_bitmaps(uuid, name))


def names(machine: PlainQemu) -> list[str]:
    return machine.work(lambda hv, uuid: hv.bitmaps(uuid))


def overlay(machine: PlainQemu, target: str = "vda") -> str:
    return f"{machine.dir}/{target}.j1"


def snapshot(machine: PlainQemu, *targets: str) -> None:
    machine.work(lambda hv, uuid: hv.snapshot(uuid, {each: overlay(machine, each) for each in targets}))


def drop_overlay(machine: PlainQemu, target: str = "vda") -> None:
    machine.work(lambda hv, uuid: hv.drop_overlay(uuid, overlay(machine, target)))


def changed(machine: PlainQemu, name: str = FIRST) -> set[int]:
    """What the bitmap in the still base of vda says, through qemu-storage-daemon."""

    async def work() -> set[int]:
        async with StorageDaemon(machine.dir / "run") as daemon:
            spec = ImageSpec("qcow2", f"{machine.dir}/a.qcow2")
            socket, export = await daemon.export("x", spec, bitmap=bitmap_name(name, "vda"))
            return await asyncio.to_thread(dirty, socket, export, bitmap_name(name, "vda"))

    return asyncio.run(work())


def served(machine: PlainQemu, target: str, name: str = FIRST) -> set[int]:
    """What the bitmap of a disk says, through QEMU's own server."""

    async def work(hv: QmpHypervisor, uuid: str) -> set[int]:
        socket, scratch = str(machine.qemu.directory / "nbd"), f"{machine.dir}/scratch"
        exports = await hv.begin_fleece(uuid, {target: scratch}, socket, {target: name})
        try:
            return await asyncio.to_thread(dirty, socket, exports[target].name, str(exports[target].bitmap))
        finally:
            await hv.end_fleece(uuid)
            Path(scratch).unlink()

    return machine.work(work)


def test_what_is_written_is_recorded_through_a_snapshot_and_its_end(few_disks: PlainQemu) -> None:
    few_disks.qemu.write(VDA, 1, "0", "1M")
    assert begin(few_disks) == {"vda": None, "sda": None}
    assert names(few_disks) == [FIRST]
    few_disks.qemu.write(VDA, 2, "1M", "64k")
    few_disks.qemu.write(SDA, 2, "3100k", "1k")
    assert reasons(few_disks) == {"vda": None, "sda": None}
    snapshot(few_disks, "vda", "sda")
    few_disks.qemu.write(VDA, 3, "8M", "64k")  # after T2: not in this backup, and changed for the next
    few_disks.qemu.write(SDA, 3, "8M", "64k")
    assert changed(few_disks) == {16}
    assert reasons(few_disks)["vda"] is not None  # not while an overlay of ours is the active image
    drop_overlay(few_disks)
    drop_overlay(few_disks, "sda")
    assert reasons(few_disks) == {"vda": None, "sda": None}
    assert served(few_disks, "vda") == {16, 128}
    assert served(few_disks, "sda") == {48, 128}  # a raw image's bitmap is in QEMU's memory, and as good there


def test_two_backups_in_a_row_hand_over_without_a_gap(few_disks: PlainQemu) -> None:
    begin(few_disks)
    few_disks.qemu.write(VDA, 1, "0", "64k")
    begin(few_disks, SECOND)
    few_disks.qemu.write(VDA, 1, "64k", "64k")
    assert served(few_disks, "vda") == {0, 1}
    assert names(few_disks) == [FIRST, SECOND]
    drop(few_disks)
    assert names(few_disks) == [SECOND]
    assert served(few_disks, "vda", SECOND) == {1}
    drop(few_disks)
    assert reasons(few_disks, FIRST, "vda") == {"vda": "its dirty bitmap is missing"}


def test_begun_twice_it_counts_from_the_first_time(few_disks: PlainQemu) -> None:
    begin(few_disks)
    few_disks.qemu.write(VDA, 1, "0", "64k")
    assert begin(few_disks) == {"vda": None, "sda": None}
    assert served(few_disks, "vda") == {0}


def test_a_clean_end_keeps_what_qcow2_keeps(few_disks: PlainQemu) -> None:
    begin(few_disks)
    few_disks.qemu.write(VDA, 1, "0", "64k")
    few_disks.qemu.execute("quit")
    few_disks.qemu.wait()
    drop(few_disks, SECOND)  # nothing can be asked of one that is off, and nothing is lost by that
    assert names(few_disks) == []
    few_disks.qemu.start()
    assert names(few_disks) == [FIRST]
    assert reasons(few_disks) == {"vda": None, "sda": "its dirty bitmap is missing"}
    assert served(few_disks, "vda") == {0}


def test_a_crash_makes_it_missing_or_inconsistent(few_disks: PlainQemu) -> None:
    begin(few_disks)
    few_disks.qemu.kill()
    few_disks.qemu.start()
    assert reasons(few_disks)["vda"] == "its dirty bitmap is missing"
    begin(few_disks)
    few_disks.qemu.execute("quit")
    few_disks.qemu.wait()
    few_disks.qemu.start()
    few_disks.qemu.kill()
    few_disks.qemu.start()
    assert "inconsistent" in str(reasons(few_disks)["vda"])
    drop(few_disks)
    assert names(few_disks) == [] and begin(few_disks, SECOND)["vda"] is None


def test_old_qcow2_images_keep_none_but_have_one(new_qemu: Callable[..., PlainQemu], tmp_path: Path) -> None:
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", str(tmp_path / "old"), "32M")
    machine = new_qemu("-drive if=none,id=a,file={dir}/old,format=qcow2 -device virtio-blk-pci,drive=a,id=vda")
    assert begin(machine, FIRST, "vda") == {"vda": None}
    machine.qemu.write(VDA, 1, "0", "64k")
    assert served(machine, "vda") == {0}


def test_an_image_under_another_target_is_not_taken_for_the_one_that_was_recorded(
    new_qemu: Callable[..., PlainQemu], tmp_path: Path
) -> None:
    create(tmp_path / "a.qcow2")
    words = "-drive if=none,id=a,file={dir}/a.qcow2,format=qcow2 -device virtio-blk-pci,drive=a,id="
    machine = new_qemu(words + "vda")
    begin(machine, FIRST, "vda")
    machine.qemu.execute("quit")
    machine.qemu.wait()
    other = new_qemu(words + "vdb", name="other")
    assert "another disk's" in str(reasons(other, FIRST, "vdb")["vdb"])


def test_what_is_asked_for_must_be_ours(few_disks: PlainQemu) -> None:
    few_disks.qemu.execute("block-dirty-bitmap-add", node="a", name="theirs.vda")
    for call in (lambda: begin(few_disks, "theirs"), lambda: drop(few_disks, "theirs")):
        with pytest.raises(InvalidArgument, match="'theirs' is no checkpoint of ours"):
            call()
    assert begin(few_disks, FIRST, "cd", "xyz") == dict.fromkeys(("cd", "xyz"), "the VM has no such disk")
    few_disks.qemu.kill()
    with pytest.raises(NotRunning):
        begin(few_disks)
