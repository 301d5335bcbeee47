"""Dirty bitmaps on a real libvirt and QEMU: what they hold, through everything that happens to a disk between two
backups, and what is said of one that cannot be relied on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import libvirt
import pytest

from tests.unit.hypervisor.machine import SCSI, Machine, create, dirty, disk, pattern, tool
from vmbackupd.errors import InvalidArgument, NotRunning
from vmbackupd.hypervisor import checkpoint
from vmbackupd.hypervisor.base import bitmap_name
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon

FIRST, SECOND = "vmbackupd-j1", "vmbackupd-j2"
ACTIVE = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
META = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY


@pytest.fixture
def machine(new_machine: Callable[..., Machine], tmp_path: Path) -> Machine:
    """A running domain with the qcow2 disks vda and vdb."""
    return new_machine(disk(create(tmp_path / "a.qcow2"), "vda") + disk(create(tmp_path / "b.qcow2"), "vdb"))


def begin(machine: Machine, name: str = FIRST, *targets: str) -> Mapping[str, str | None]:
    return machine.with_hypervisor(lambda hv: hv.begin_bitmaps(machine.uuid, name, targets or ("vda", "vdb")))


def reasons(machine: Machine, name: str = FIRST, *targets: str) -> Mapping[str, str | None]:
    return machine.with_hypervisor(lambda hv: hv.bitmap_reasons(machine.uuid, name, targets or ("vda", "vdb")))


def drop(machine: Machine, name: str = FIRST) -> None:
    machine.with_hypervisor(lambda hv: hv.drop_bitmaps(machine.uuid, name))


def names(machine: Machine) -> list[str]:
    return machine.with_hypervisor(lambda hv: hv.bitmaps(machine.uuid))


def overlay(machine: Machine, target: str = "vda") -> str:
    return f"{machine.dir}/{target}.j1"


def snapshot(machine: Machine, *targets: str) -> None:
    machine.with_hypervisor(lambda hv: hv.snapshot(machine.uuid, {each: overlay(machine, each) for each in targets}))


def drop_overlay(machine: Machine, target: str = "vda") -> None:
    machine.with_hypervisor(lambda hv: hv.drop_overlay(machine.uuid, overlay(machine, target)))


def changed(machine: Machine, image: str = "a.qcow2", target: str = "vda", name: str = FIRST) -> set[int]:
    """What the bitmap of an image that nobody writes says, through qemu-storage-daemon."""
    async def work(_: LibvirtHypervisor) -> set[int]:
        async with StorageDaemon(machine.dir / "run") as daemon:
            spec = ImageSpec("qcow2", f"{machine.dir}/{image}")
            socket, export = await daemon.export("x", spec, bitmap=bitmap_name(name, target))
            return await asyncio.to_thread(dirty, socket, export, bitmap_name(name, target))

    return machine.with_hypervisor(work)


def still(machine: Machine) -> set[int]:
    """What the first bitmap of vda says now; the snapshot that shows it is undone again."""
    snapshot(machine, "vda")
    found = changed(machine)
    drop_overlay(machine)
    return found


def test_what_is_written_after_the_beginning_is_in_the_bitmap_of_the_still_base(machine: Machine) -> None:
    machine.write("virtio-disk0", 1, "0", "1M")
    assert begin(machine) == {"vda": None, "vdb": None}
    assert names(machine) == [FIRST]
    machine.write("virtio-disk0", 2, "1M", "64k")
    machine.write("virtio-disk0", 2, "3100k", "1k")
    machine.write("virtio-disk1", 2, "0", "64k")
    assert reasons(machine) == {"vda": None, "vdb": None}
    snapshot(machine, "vda", "vdb")
    machine.write("virtio-disk0", 3, "8M", "64k")  # after T2: not in this backup, and changed for the next
    assert changed(machine) == {16, 48}
    assert changed(machine, "b.qcow2", "vdb") == {0}
    assert reasons(machine)["vda"] is not None  # not while an overlay of ours is the active image
    drop_overlay(machine)
    drop_overlay(machine, "vdb")
    assert reasons(machine) == {"vda": None, "vdb": None}
    assert still(machine) == {16, 48, 128}


def test_two_backups_in_a_row_hand_over_without_a_gap(machine: Machine) -> None:
    """The second begins before the first is forgotten: what is written between is in both."""
    begin(machine)
    machine.write("virtio-disk0", 1, "0", "64k")
    begin(machine, SECOND)
    machine.write("virtio-disk0", 1, "64k", "64k")
    snapshot(machine, "vda")
    assert changed(machine) == {0, 1}
    assert changed(machine, name=SECOND) == {1}
    drop_overlay(machine)
    drop(machine)
    assert names(machine) == [SECOND]
    assert reasons(machine, SECOND, "vda") == {"vda": None}
    snapshot(machine, "vda")
    assert changed(machine, name=SECOND) == {1}


def test_each_disk_that_cannot_have_one_is_told_why(new_machine: Callable[..., Machine], tmp_path: Path) -> None:
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", str(tmp_path / "old.qcow2"), "32M")
    devices = disk(create(tmp_path / "a.qcow2"), "vda") + disk(tmp_path / "old.qcow2", "vdb")
    for number, format in enumerate(("raw", "vmdk", "vpc")):
        devices += disk(create(tmp_path / f"x.{format}", format), f"vd{'cde'[number]}", format)
    machine = new_machine(devices, ports=8)
    told = begin(machine, FIRST, "vda", "vdb", "vdc", "vdd", "vde", "vdz")
    assert told.pop("vda") is None
    assert [told[target] for target in sorted(told)] == [
        "its image is qcow2 of version 2, which keeps no dirty bitmap: see qemu-img amend -o compat=1.1",
        "its image is raw, which keeps no dirty bitmap", "its image is vmdk, which keeps no dirty bitmap",
        "its image is vpc, which keeps no dirty bitmap", "the VM has no such disk"]
    assert reasons(machine, FIRST, *told) == told


def test_bitmaps_outlive_a_clean_end_of_qemu(machine: Machine) -> None:
    begin(machine)
    machine.write("virtio-disk0", 1, "0", "64k")
    machine.dom.destroy()
    machine.dom.create()
    machine.write("virtio-disk0", 1, "2M", "64k")
    assert reasons(machine) == {"vda": None, "vdb": None}
    assert still(machine) == {0, 32}


def test_after_a_crash_a_bitmap_is_inconsistent_and_can_be_begun_anew(machine: Machine) -> None:
    begin(machine, FIRST, "vda")
    machine.dom.destroy()  # stores the bitmap
    machine.dom.create()
    begin(machine, FIRST, "vdb")  # in no image yet
    machine.write("virtio-disk0", 1, "0", "64k")
    machine.kill()
    machine.dom.create()
    assert reasons(machine)["vdb"] == "its dirty bitmap is missing"
    assert "inconsistent: QEMU did not end cleanly" in str(reasons(machine)["vda"])
    assert begin(machine, SECOND) == {"vda": None, "vdb": None}
    drop(machine)
    assert names(machine) == [SECOND]
    assert reasons(machine, SECOND) == {"vda": None, "vdb": None}
    assert reasons(machine) == dict.fromkeys(("vda", "vdb"), "its dirty bitmap is missing")


def test_checkpoints_of_others_stay_before_between_and_after_ours(machine: Machine) -> None:
    def foreign(name: str) -> None:
        machine.dom.checkpointCreateXML(
            f"<domaincheckpoint><name>{name}</name><disks><disk name='vda' checkpoint='bitmap'/>"
            "<disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>", 0)

    foreign("older")
    begin(machine)
    foreign("newer")
    begin(machine, SECOND)
    machine.write("virtio-disk0", 1, "0", "64k")
    assert reasons(machine) == {"vda": None, "vdb": None}
    drop(machine)
    drop(machine)  # again is no error
    assert sorted(each.getName() for each in machine.dom.listAllCheckpoints()) == [
        "newer", "older", f"{SECOND}.vda", f"{SECOND}.vdb"]
    assert machine.dom.checkpointLookupByName("newer").getParent().getName() == "older"
    assert names(machine) == [SECOND]
    with pytest.raises(InvalidArgument, match="no checkpoint of ours"):
        drop(machine, "older")
    snapshot(machine, "vda")  # the others' bitmaps still tell the truth

    async def work(_: LibvirtHypervisor) -> None:
        for name in ("older", "newer", f"{SECOND}.vda"):
            async with StorageDaemon(machine.dir / "run") as daemon:
                socket, export = await daemon.export("x", ImageSpec("qcow2", f"{machine.dir}/a.qcow2"), bitmap=name)
                assert await asyncio.to_thread(dirty, socket, export, name) == {0}

    machine.with_hypervisor(work)


def test_somebody_deletes_our_checkpoint_or_its_bitmap(machine: Machine) -> None:
    begin(machine)
    machine.dom.checkpointLookupByName(f"{FIRST}.vda").delete(0)
    machine.dom.checkpointLookupByName(f"{FIRST}.vdb").delete(META)
    told = reasons(machine)
    assert told["vda"] == "its dirty bitmap is missing"
    assert "libvirt does not know the checkpoint any more" in str(told["vdb"])
    drop(machine)  # what is left of it goes
    assert reasons(machine) == dict.fromkeys(("vda", "vdb"), "its dirty bitmap is missing")


def test_swapped_images_are_not_taken_for_each_other(machine: Machine) -> None:
    """Both images hold a bitmap of the same backup; only the name in it says whose they are."""
    begin(machine)
    machine.dom.destroy()
    os.rename(machine.dir / "a.qcow2", machine.dir / "c.qcow2")
    os.rename(machine.dir / "b.qcow2", machine.dir / "a.qcow2")
    os.rename(machine.dir / "c.qcow2", machine.dir / "b.qcow2")
    machine.dom.create()
    assert reasons(machine) == {
        "vda": f"its image was another disk's when the recording began (it has the bitmap {FIRST}.vdb)",
        "vdb": f"its image was another disk's when the recording began (it has the bitmap {FIRST}.vda)"}


def test_another_image_under_the_target_has_no_bitmap(machine: Machine) -> None:
    begin(machine)
    machine.dom.destroy()
    os.unlink(machine.dir / "a.qcow2")
    create(machine.dir / "a.qcow2")
    machine.dom.create()
    assert reasons(machine) == {"vda": "its dirty bitmap is missing", "vdb": None}


def test_a_snapshot_that_somebody_made_since_is_told(machine: Machine) -> None:
    begin(machine)
    machine.dom.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{machine.dir}/theirs'/></disk>"
        "<disk name='vdb' snapshot='no'/></disks></domainsnapshot>", libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    told = reasons(machine)
    assert told["vda"] == (f"its active image is {machine.dir}/theirs, and was {machine.dir}/a.qcow2 when the "
                           "recording began")
    assert told["vdb"] is None


def test_disks_that_came_and_went_say_nothing_about_the_others(new_machine: Callable[..., Machine],
                                                               tmp_path: Path) -> None:
    guest = disk(create(tmp_path / "b.qcow2"), "sda", bus="scsi")  # SCSI: unplugged without the guest's help
    machine = new_machine(SCSI + disk(create(tmp_path / "a.qcow2"), "vda") + guest)
    begin(machine, FIRST, "vda", "sda")
    machine.dom.detachDevice(guest)
    machine.wait(lambda: "sda" not in machine.dom.XMLDesc(0), "sda is unplugged")
    machine.dom.attachDevice(disk(create(tmp_path / "c.qcow2"), "sdb", bus="scsi"))
    assert reasons(machine, FIRST, "vda", "sda", "sdb") == {
        "vda": None, "sda": "the VM has no such disk", "sdb": "its dirty bitmap is missing"}
    drop(machine)  # the image that is away keeps its bitmap
    assert names(machine) == []
    machine.dom.attachDevice(guest)
    assert "libvirt does not know the checkpoint" in str(reasons(machine, FIRST, "sda")["sda"])
    begin(machine, SECOND, "vda", "sda")  # sweeps
    assert reasons(machine, FIRST, "sda") == {"sda": "its dirty bitmap is missing"}
    assert reasons(machine, SECOND, "vda", "sda") == {"vda": None, "sda": None}


def test_of_a_vm_that_is_off_they_are_dropped_from_the_images(machine: Machine) -> None:
    begin(machine)
    begin(machine, SECOND)
    machine.dom.destroy()
    drop(machine)
    assert names(machine) == [SECOND]
    for name, target in (("a.qcow2", "vda"), ("b.qcow2", "vdb")):
        told = tool("qemu-img", "info", str(machine.dir / name))
        assert f"{FIRST}.{target}" not in told and f"{SECOND}.{target}" in told
    for work in (begin, reasons):
        with pytest.raises(NotRunning, match="VM bare: dirty bitmaps: it is not running"):
            work(machine)
    machine.dom.create()
    assert reasons(machine, SECOND) == {"vda": None, "vdb": None}


def test_a_resize_keeps_the_bitmap_and_growth_is_not_marked(machine: Machine) -> None:
    """Why a disk of another size than its base is read whole, whatever its bitmap says."""
    begin(machine)
    machine.dom.blockResize("vda", 48 << 20, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    assert reasons(machine, FIRST, "vda") == {"vda": None}
    assert still(machine) == set()


# --- the life of an overlay above the bitmap


def test_the_guest_crashes_during_the_backup_and_the_bitmap_of_the_still_base_survives(machine: Machine) -> None:
    """Committed offline: what the overlay held counts as changed."""
    begin(machine)
    machine.write("virtio-disk0", 1, "0", "64k")
    snapshot(machine, "vda")
    machine.write("virtio-disk0", 2, "1M", "64k")
    machine.write("virtio-disk0", 0, "2M", "64k")
    machine.kill()
    drop_overlay(machine)
    assert pattern(machine.dir / "a.qcow2", "qcow2", 2, "1M", "64k")
    machine.dom.create()
    assert reasons(machine, FIRST, "vda") == {"vda": None}
    assert still(machine) == {0, 16, 32}
    assert reasons(machine, FIRST, "vdb")["vdb"] is not None  # that one had no overlay


@pytest.mark.parametrize("ready", [True, False])
def test_libvirtd_is_restarted_during_the_commit(machine: Machine, ready: bool) -> None:
    begin(machine)
    snapshot(machine, "vda")
    machine.write("virtio-disk0", 1, "0", "16M")
    machine.dom.blockCommit("vda", f"{machine.dir}/a.qcow2", None, 0 if ready else 1, ACTIVE)
    if ready:
        machine.wait(lambda: "ready='yes'" in machine.dom.XMLDesc(0), "the commit is ready")
    machine.host.stop_libvirtd()()
    machine.write("virtio-disk0", 2, "20M", "64k")
    if not ready:
        machine.dom.blockJobSetSpeed("vda", 0, 0)
    drop_overlay(machine)
    assert reasons(machine, FIRST, "vda") == {"vda": None}
    assert still(machine) == {*range(256), 320}


def test_libvirtd_is_restarted_between_two_backups(machine: Machine) -> None:
    begin(machine)
    machine.write("virtio-disk0", 1, "0", "64k")
    machine.host.stop_libvirtd()()
    assert reasons(machine) == {"vda": None, "vdb": None}
    assert still(machine) == {0}


def test_the_guest_is_killed_in_the_middle_of_a_commit(machine: Machine) -> None:
    """The base was being written: its bitmap is worth nothing, and says so."""
    begin(machine)
    snapshot(machine, "vda")
    machine.write("virtio-disk0", 1, "0", "16M")
    machine.dom.blockCommit("vda", f"{machine.dir}/a.qcow2", None, 1, ACTIVE)
    machine.kill()
    drop_overlay(machine)
    machine.dom.create()
    assert "inconsistent" in str(reasons(machine, FIRST, "vda")["vda"])
    assert pattern(machine.dir / "a.qcow2", "qcow2", 1, "0", "16M")


def test_query_block_is_read_as_far_as_it_is_understood() -> None:
    node = {"node-name": "n", "drv": "raw", "image": {}}
    reply = [{"qdev": "/machine/peripheral/virtio-disk0/virtio-backend", "inserted": node}, {"device": "cd"},
             {"qdev": "scsi0-0-0-0", "inserted": {**node, "dirty-bitmaps": [{"count": 0}]}}]
    found = checkpoint.nodes_of(reply, {"virtio-disk0": "vda", "scsi0-0-0-0": "sda"})
    assert found == dict.fromkeys(("vda", "sda"), checkpoint.Node("n", "raw", "", {}))
