"""Snapshots and their end, on a real libvirt and QEMU: from each state in which a backup, a crash or somebody else can
leave a disk's chain."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest

from tests.unit.hypervisor.machine import Host, Machine, create, disk, pattern, tool
from vmbackupd.errors import HypervisorError, InvalidArgument, NotRunning
from vmbackupd.hypervisor import overlay as overlays
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon

ACTIVE = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE


def paths(machine: Machine) -> dict[str, str]:
    return {"vda": f"{machine.dir}/a.qcow2.j1", "sda": f"{machine.dir}/b.raw.j1"}


def snapshot(machine: Machine) -> dict[str, str]:
    """Snapshot both disks and write behind the snapshot."""
    machine.write("virtio-disk0", 1, "0", "1M")
    machine.write("scsi0-0-0-0", 1, "0", "1M")

    async def work(hv: LibvirtHypervisor) -> None:
        await hv.prepare_overlays(machine.uuid, paths(machine))
        await hv.snapshot(machine.uuid, paths(machine))

    machine.with_hypervisor(work)
    machine.write("virtio-disk0", 2, "64k", "64k")
    machine.write("scsi0-0-0-0", 2, "64k", "64k")
    return paths(machine)


def drop(machine: Machine, *names: str) -> list[tuple[int, int]]:
    """Drop the overlays of those disks (both by default); the progress that was told."""
    told: list[tuple[int, int]] = []

    async def work(hv: LibvirtHypervisor) -> None:
        for name in names or ("vda", "sda"):
            await hv.drop_overlay(machine.uuid, paths(machine)[name], lambda done, total: told.append((done, total)))

    machine.with_hypervisor(work)
    return told


def sources(machine: Machine) -> dict[str, tuple[str, ...]]:
    async def work(hv: LibvirtHypervisor) -> dict[str, tuple[str, ...]]:
        return {d.target: d.chain for d in (await hv.domain(machine.uuid)).disks}

    return machine.with_hypervisor(work)


def assert_whole(machine: Machine) -> None:
    """No overlay is left, both disks are as before the snapshot, and hold what was written before and after it."""
    assert not [name for name in os.listdir(machine.dir) if name.endswith(".j1")]
    chains = sources(machine)
    assert (chains["vda"], chains["sda"]) == ((f"{machine.dir}/a.qcow2",), (f"{machine.dir}/b.raw",))
    for name, format in (("a.qcow2", "qcow2"), ("b.raw", "raw")):
        assert pattern(machine.dir / name, format, 1, "0", "64k")
        assert pattern(machine.dir / name, format, 2, "64k", "64k")
        assert pattern(machine.dir / name, format, 1, "128k", "896k")
    xml = machine.dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert f"{machine.dir}/b.raw'" in xml and ".j1" not in xml
    assert "type='raw'" in xml


def test_a_snapshot_leaves_the_bases_still_and_names_every_disk(two_disks: Machine) -> None:
    overlay = snapshot(two_disks)
    chains = sources(two_disks)
    assert chains["vda"] == (overlay["vda"], f"{two_disks.dir}/a.qcow2")
    assert chains["sda"] == (overlay["sda"], f"{two_disks.dir}/b.raw")
    assert pattern(two_disks.dir / "a.qcow2", "qcow2", 1, "0", "1M")
    assert pattern(two_disks.dir / "b.raw", "raw", 1, "0", "1M")
    for path in overlay.values():
        assert os.stat(path).st_mode & 0o777 == os.stat(two_disks.dir / "a.qcow2").st_mode & 0o777
    assert two_disks.dom.snapshotNum() == 0  # no metadata for somebody to clean up


def test_overlays_are_made_when_they_were_not_prepared(two_disks: Machine) -> None:
    two_disks.with_hypervisor(lambda hv: hv.snapshot(two_disks.uuid, paths(two_disks)))
    assert sources(two_disks)["vda"][0] == paths(two_disks)["vda"]


def test_the_active_overlay_is_committed_and_pivoted(two_disks: Machine) -> None:
    snapshot(two_disks)
    told = drop(two_disks)
    assert told and all(done <= total for done, total in told)
    assert_whole(two_disks)
    drop(two_disks)  # again is no error


def test_an_overlay_that_was_never_used_is_only_deleted(two_disks: Machine) -> None:
    two_disks.with_hypervisor(lambda hv: hv.prepare_overlays(two_disks.uuid, paths(two_disks)))
    drop(two_disks)
    assert not [name for name in os.listdir(two_disks.dir) if name.endswith(".j1")]


def test_half_made_overlay_files_are_deleted(two_disks: Machine) -> None:
    for path in paths(two_disks).values():
        Path(path).write_bytes(b"QFI")
    drop(two_disks)
    assert not [name for name in os.listdir(two_disks.dir) if name.endswith(".j1")]


def test_prepared_overlays_are_all_removed_when_one_cannot_be_made(two_disks: Machine) -> None:
    Path(paths(two_disks)["sda"]).write_text("somebody's file")
    with pytest.raises(HypervisorError, match=r"b\.raw\.j1: File exists"):
        two_disks.with_hypervisor(lambda hv: hv.prepare_overlays(two_disks.uuid, paths(two_disks)))
    assert Path(paths(two_disks)["sda"]).read_text() == "somebody's file"
    assert not os.path.exists(paths(two_disks)["vda"])


@pytest.mark.parametrize("off", [False, True], ids=["pivoted", "committed offline"])
@pytest.mark.parametrize("format", ["vmdk", "vpc", "vdi"])
def test_an_overlay_lies_over_an_image_of_any_format(new_machine: Callable[..., Machine], tmp_path: Path, format: str,
                                                     off: bool) -> None:
    """VMDK, VHD, VDI: still below the overlay, read by the storage daemon at the size libvirt tells."""
    image = create(tmp_path / f"a.{format}", format, "40M")
    machine = new_machine(disk(image, "vda", format))
    machine.write("virtio-disk0", 1, "0", "1M")
    over = f"{image}.j1"

    async def work(hv: LibvirtHypervisor) -> None:
        await hv.prepare_overlays(machine.uuid, {"vda": over})
        await hv.snapshot(machine.uuid, {"vda": over})
        machine.write("virtio-disk0", 2, "64k", "64k")
        async with StorageDaemon(machine.dir / "run") as daemon:
            socket, export = await daemon.export("x", ImageSpec(format, str(image)))
            raw = str(tmp_path / "still.raw")
            await asyncio.to_thread(tool, "nbdcopy", f"nbd+unix:///{export}?socket={socket}", raw)
        (seen,) = (await hv.domain(machine.uuid)).disks
        assert os.path.getsize(raw) == seen.size and pattern(Path(raw), "raw", 1, "0", "1M")
        if off:
            await hv.destroy(machine.uuid)
        await hv.drop_overlay(machine.uuid, over)

    machine.with_hypervisor(work)
    assert not os.path.exists(over)
    assert pattern(image, format, 1, "0", "64k") and pattern(image, format, 2, "64k", "64k")
    assert f"type='{format}'" in machine.dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    if off:
        machine.dom.create()


def test_a_commit_that_is_ready_is_continued(two_disks: Machine) -> None:
    """A daemon died between READY and pivot."""
    snapshot(two_disks)
    two_disks.dom.blockCommit("vda", f"{two_disks.dir}/a.qcow2", None, 0, ACTIVE)
    two_disks.write("virtio-disk0", 2, "64k", "64k")
    drop(two_disks)
    assert_whole(two_disks)


def test_a_commit_that_still_runs_is_continued(two_disks: Machine) -> None:
    snapshot(two_disks)
    two_disks.write("scsi0-0-0-0", 5, "8M", "16M")
    two_disks.dom.blockCommit("sda", f"{two_disks.dir}/b.raw", None, 1, ACTIVE)  # 1 MiB/s: runs for a while
    told: list[int] = []

    async def work(hv: LibvirtHypervisor) -> None:
        def progress(done: int, total: int) -> None:
            told.append(done)
            if len(told) == 1:
                two_disks.dom.blockJobSetSpeed("sda", 0, 0)

        await hv.drop_overlay(two_disks.uuid, paths(two_disks)["sda"], progress)

    two_disks.with_hypervisor(work)
    drop(two_disks, "vda")
    assert_whole(two_disks)
    assert pattern(two_disks.dir / "b.raw", "raw", 5, "8M", "16M")


def test_somebody_elses_block_job_is_left_alone(two_disks: Machine) -> None:
    snapshot(two_disks)
    two_disks.write("virtio-disk0", 5, "8M", "16M")
    two_disks.dom.blockPull("vda", 1, 0)
    with pytest.raises(HypervisorError, match=r"vda is busy with a block job \(pull\)"):
        drop(two_disks, "vda")
    assert os.path.exists(paths(two_disks)["vda"])
    two_disks.dom.blockJobAbort("vda", 0)
    drop(two_disks)
    assert_whole(two_disks)


def test_an_overlay_under_somebody_elses_snapshot_is_kept(two_disks: Machine) -> None:
    overlay = snapshot(two_disks)
    top = f"{two_disks.dir}/foreign.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", overlay["vda"], "-F", "qcow2", top, "32M")
    two_disks.with_hypervisor(lambda hv: hv.snapshot(two_disks.uuid, {"vda": top}))
    for _ in range(2):  # running, then off
        with pytest.raises(HypervisorError, match=r"foreign\.qcow2 was put on top of our overlay"):
            drop(two_disks, "vda")
        if two_disks.dom.isActive():
            two_disks.dom.destroy()
    assert os.path.exists(overlay["vda"])


def test_off_the_overlay_is_committed_offline_and_the_definition_mended(two_disks: Machine) -> None:
    snapshot(two_disks)
    two_disks.dom.destroy()
    drop(two_disks)
    assert_whole(two_disks)
    two_disks.dom.create()  # it starts from what is left
    assert two_disks.dom.isActive()


def test_off_after_a_pivot_the_stale_file_is_only_deleted(two_disks: Machine) -> None:
    snapshot(two_disks)
    stale = Path(paths(two_disks)["vda"]).read_bytes()
    drop(two_disks)
    Path(paths(two_disks)["vda"]).write_bytes(stale)
    two_disks.write("virtio-disk0", 9, "64k", "64k")
    two_disks.dom.destroy()
    drop(two_disks)
    assert not os.path.exists(paths(two_disks)["vda"])
    assert pattern(two_disks.dir / "a.qcow2", "qcow2", 9, "64k", "64k")  # a commit would have brought the old back


def test_powered_off_in_the_middle_of_a_commit(two_disks: Machine) -> None:
    snapshot(two_disks)
    two_disks.write("scsi0-0-0-0", 5, "8M", "16M")
    two_disks.dom.blockCommit("sda", f"{two_disks.dir}/b.raw", None, 1, ACTIVE)

    async def work(hv: LibvirtHypervisor) -> None:
        def progress(_done: int, _total: int) -> None:
            if two_disks.dom.isActive():
                two_disks.dom.destroy()

        await hv.drop_overlay(two_disks.uuid, paths(two_disks)["sda"], progress)

    two_disks.with_hypervisor(work)
    drop(two_disks, "vda")
    assert_whole(two_disks)
    assert pattern(two_disks.dir / "b.raw", "raw", 5, "8M", "16M")


def test_libvirtd_crashes_in_the_middle_of_a_commit(two_disks: Machine) -> None:
    snapshot(two_disks)
    two_disks.write("scsi0-0-0-0", 5, "8M", "16M")
    two_disks.dom.blockCommit("sda", f"{two_disks.dir}/b.raw", None, 1, ACTIVE)
    calls = 0

    async def work(hv: LibvirtHypervisor) -> list[str]:
        seen: list[str] = []
        hv.watch(two_disks.uuid, seen.append)

        def progress(_done: int, _total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                start = two_disks.host.stop_libvirtd()
                start()
                two_disks.dom.blockJobSetSpeed("sda", 0, 0)

        await hv.drop_overlay(two_disks.uuid, paths(two_disks)["sda"], progress)
        await hv.drop_overlay(two_disks.uuid, paths(two_disks)["vda"])
        return seen

    assert "hypervisor-lost" in two_disks.with_hypervisor(work)
    assert_whole(two_disks)
    assert pattern(two_disks.dir / "b.raw", "raw", 5, "8M", "16M")


def test_a_saved_state_that_uses_the_overlay_keeps_it(two_disks: Machine) -> None:
    overlay = snapshot(two_disks)
    two_disks.dom.managedSave(0)
    with pytest.raises(HypervisorError, match="its saved state uses the overlay"):
        drop(two_disks, "vda")
    assert os.path.exists(overlay["vda"])
    two_disks.dom.create()  # restores
    drop(two_disks)
    assert_whole(two_disks)


def test_an_overlay_that_a_process_has_open_is_never_deleted(two_disks: Machine) -> None:
    """libvirt's books may be wrong; QEMU's locks are not."""
    snapshot(two_disks)
    path = create(two_disks.dir / "c.qcow2.j1")
    tool("qemu-img", "create", "-q", "-f", "qcow2", str(two_disks.dir / "lone.j1"), "1M")

    async def work(hv: LibvirtHypervisor) -> None:
        async with StorageDaemon(two_disks.dir / "run") as daemon:
            await daemon.export("x", ImageSpec("qcow2", str(path)), writable=True)
            with pytest.raises(HypervisorError, match="a process has it open; it is kept"):
                await hv.drop_overlay(two_disks.uuid, str(path))
        await hv.drop_overlay(two_disks.uuid, str(path))
        await hv.drop_overlay(two_disks.uuid, str(two_disks.dir / "lone.j1"))

    two_disks.with_hypervisor(work)
    drop(two_disks)
    assert_whole(two_disks)


def test_of_an_undefined_vm_nothing_is_deleted_that_may_be_its_data(two_disks: Machine) -> None:
    overlay = snapshot(two_disks)
    two_disks.dom.destroy()
    two_disks.dom.undefine()
    with pytest.raises(HypervisorError, match="its VM .* is gone; .* commit the overlay with qemu-img commit"):
        drop(two_disks, "vda")
    assert os.path.exists(overlay["vda"])
    os.unlink(overlay["sda"])
    drop(two_disks, "sda")  # nothing there is nothing to do


@pytest.mark.parametrize(("target", "words"), [
    ("sdb", "sdb is a cdrom and is never snapshotted"), ("vdz", "has no disk vdz")])
def test_what_cannot_be_snapshotted_is_refused_before_anything_is_touched(two_disks: Machine, target: str,
                                                                          words: str) -> None:
    wanted = {**paths(two_disks), target: f"{two_disks.dir}/x.j1"}

    async def work(hv: LibvirtHypervisor) -> None:
        with pytest.raises(InvalidArgument, match=words):
            await hv.prepare_overlays(two_disks.uuid, wanted)
        with pytest.raises(InvalidArgument, match=words):
            await hv.snapshot(two_disks.uuid, wanted)

    two_disks.with_hypervisor(work)
    assert not [name for name in os.listdir(two_disks.dir) if name.endswith(".j1")]


def test_a_vm_that_is_off_is_not_snapshotted(two_disks: Machine) -> None:
    two_disks.dom.destroy()
    with pytest.raises(NotRunning, match="VM bare: snapshot: it is not running"):
        two_disks.with_hypervisor(lambda hv: hv.snapshot(two_disks.uuid, paths(two_disks)))


def test_a_chain_of_two_of_our_overlays_comes_off_from_the_top(two_disks: Machine) -> None:
    """Two jobs that died one after the other."""
    snapshot(two_disks)
    second = f"{two_disks.dir}/a.qcow2.j2"

    async def work(hv: LibvirtHypervisor) -> None:
        await hv.snapshot(two_disks.uuid, {"vda": second})
        await hv.drop_overlay(two_disks.uuid, second)

    two_disks.with_hypervisor(work)
    assert not os.path.exists(second)
    drop(two_disks)
    assert_whole(two_disks)


def test_users_of_an_image_are_found_through_links_and_chains(two_disks: Machine) -> None:
    snapshot(two_disks)
    link = two_disks.dir / "link"
    link.symlink_to(two_disks.dir / "b.raw")

    async def work(hv: LibvirtHypervisor) -> list[list[str]]:
        asked = (link, paths(two_disks)["vda"], two_disks.dir / "nothing")
        return [list(await hv.path_users(str(path))) for path in asked]

    assert two_disks.with_hypervisor(work) == [["bare"], ["bare"], []]


def test_a_disk_in_a_storage_pool(libvirt_host: Host, new_machine: Callable[..., Machine], tmp_path: Path) -> None:
    image = create(tmp_path / "in-pool.qcow2")
    pool = libvirt_host.connection.storagePoolCreateXML(
        f"<pool type='dir'><name>here</name><target><path>{tmp_path}</path></target></pool>")
    try:
        pool.refresh()
        machine = new_machine("<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
                              "<source pool='here' volume='in-pool.qcow2'/><target dev='vda' bus='virtio'/></disk>")
        path = f"{image}.j1"

        async def work(hv: LibvirtHypervisor) -> None:
            (before,) = (await hv.domain(machine.uuid)).disks
            assert before.source is not None and before.source.path == str(image) and before.size == 32 << 20
            for _ in range(2):  # while it runs, and off
                await hv.snapshot(machine.uuid, {"vda": path})
                machine.write("virtio-disk0", 4, "0", "64k")
                if _:
                    await hv.destroy(machine.uuid)
                await hv.drop_overlay(machine.uuid, path)
                assert not os.path.exists(path)
                assert pattern(image, "qcow2", 4, "0", "64k")

        machine.with_hypervisor(work)
    finally:
        pool.destroy()


def test_a_block_device_base_is_put_back_as_one() -> None:
    from vmbackupd.hypervisor.domain import parse

    root = parse("<domain><name>x</name><devices>" + disk(Path("/x/overlay"), "vda").replace(
        "</disk>", "<backingStore type='file'/></disk>") + "</devices></domain>")
    device = next((path for path in ("/dev/vda", "/dev/sda", "/dev/loop0") if os.path.exists(path)), None)
    if device is None:
        pytest.skip("no block device here")
    mended = parse(overlays.with_source(root, "vda", device, "raw")).find("./devices/disk")
    assert mended is not None and mended.get("type") == "block" and mended.find("backingStore") is None
    source, driver = mended.find("source"), mended.find("driver")
    assert source is not None and source.attrib == {"dev": device}
    assert driver is not None and driver.get("type") == "raw"
