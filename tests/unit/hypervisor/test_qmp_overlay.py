"""Snapshots without libvirt and their end, on real QEMU processes: from each state in which a backup, a crash of the
daemon or of QEMU, or somebody else can leave a disk's chain."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require
from tests.lab.iscsi import IscsiTarget
from tests.lab.qemu import monitor
from tests.lab.services import Processes
from tests.unit.hypervisor.machine import create, pattern, tool
from tests.unit.hypervisor.plain import PlainQemu
from vmbackupd.errors import HypervisorError, InvalidArgument, NotRunning
from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor
from vmbackupd.hypervisor.qmp.nodes import node_name

VDA, SDA = "/machine/peripheral/vda/virtio-backend", "sda"


def paths(machine: PlainQemu) -> dict[str, str]:
    return {"vda": f"{machine.dir}/a.qcow2.j1", "sda": f"{machine.dir}/b.raw.j1"}


def prepare(machine: PlainQemu) -> None:
    machine.work(lambda hv, uuid: hv.prepare_overlays(uuid, paths(machine)))


def snapshot(machine: PlainQemu) -> dict[str, str]:
    """Snapshot both disks and write behind the snapshot."""
    machine.qemu.write(VDA, 1, "0", "1M")
    machine.qemu.write(SDA, 1, "0", "1M")

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        await hv.prepare_overlays(uuid, paths(machine))
        await hv.snapshot(uuid, paths(machine))

    machine.work(work)
    machine.qemu.write(VDA, 2, "64k", "64k")
    machine.qemu.write(SDA, 2, "64k", "64k")
    return paths(machine)


def drop(machine: PlainQemu, *names: str) -> list[tuple[int, int]]:
    """Drop the overlays of those disks (both by default); the progress that was told."""
    told: list[tuple[int, int]] = []

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        for name in names or ("vda", "sda"):
            await hv.drop_overlay(uuid, paths(machine)[name], lambda done, total: told.append((done, total)))

    machine.work(work)
    return told


def chains(machine: PlainQemu) -> dict[str, tuple[str, ...]]:
    async def work(hv: QmpHypervisor, uuid: str) -> dict[str, tuple[str, ...]]:
        return {disk.target: disk.chain for disk in (await hv.domain(uuid)).disks}

    return machine.work(work)


def commit(machine: PlainQemu, name: str, *, speed: int = 0, status: str | None = None) -> None:
    """Begin the commit of an overlay as the daemon does, and bring it so far."""
    path = paths(machine)[name]
    base = {"vda": "a"}.get(name)
    with monitor(machine.qemu.own) as own:
        if base is None:
            nodes = own.execute("query-named-block-nodes")
            base = next(node["node-name"] for node in nodes if node["drv"] == "raw")
        job = node_name(path)
        own.execute("block-commit", job_id=job, device=job, base_node=base, auto_finalize=False, auto_dismiss=False,
                    speed=speed)
        while status is not None and (now := own.execute("query-jobs")[0]["status"]) != status:
            if now == "ready":
                own.execute("job-complete", id=job)


def assert_whole(machine: PlainQemu) -> None:
    """No overlay is left, in the directory or in QEMU, and the disks hold what was written before and after it."""
    assert not [name for name in os.listdir(machine.dir) if name.endswith(".j1")]
    if machine.qemu.running:
        found = chains(machine)
        assert (found["vda"], found["sda"]) == ((f"{machine.dir}/a.qcow2",), (f"{machine.dir}/b.raw",))
        nodes = [node["node-name"] for node in machine.qemu.execute("query-named-block-nodes")]
        assert not [node for node in nodes if node.startswith("vmbk")]
        assert machine.qemu.execute("query-jobs") == []
    for name, format in (("a.qcow2", "qcow2"), ("b.raw", "raw")):
        assert pattern(machine.dir / name, format, 1, "0", "64k")
        assert pattern(machine.dir / name, format, 2, "64k", "64k")
        assert pattern(machine.dir / name, format, 1, "128k", "896k")


def test_a_snapshot_leaves_the_bases_still(few_disks: PlainQemu) -> None:
    overlay = snapshot(few_disks)
    found = chains(few_disks)
    assert found["vda"] == (overlay["vda"], f"{few_disks.dir}/a.qcow2")
    assert found["sda"] == (overlay["sda"], f"{few_disks.dir}/b.raw")
    assert pattern(few_disks.dir / "a.qcow2", "qcow2", 1, "0", "1M")
    assert pattern(few_disks.dir / "b.raw", "raw", 1, "0", "1M")
    for path in overlay.values():
        assert os.stat(path).st_mode & 0o777 == os.stat(few_disks.dir / "a.qcow2").st_mode & 0o777


def test_the_active_overlay_is_committed_and_closed(few_disks: PlainQemu) -> None:
    snapshot(few_disks)
    told = drop(few_disks)
    assert told and all(done <= total for done, total in told)
    assert_whole(few_disks)
    drop(few_disks)  # again is no error


def test_overlays_are_made_when_they_were_not_prepared(few_disks: PlainQemu) -> None:
    few_disks.work(lambda hv, uuid: hv.snapshot(uuid, paths(few_disks)))
    assert chains(few_disks)["vda"][0] == paths(few_disks)["vda"]
    drop(few_disks)


@pytest.mark.parametrize("running", [True, False])
def test_an_overlay_that_was_never_used_is_only_deleted(few_disks: PlainQemu, running: bool) -> None:
    prepare(few_disks)
    few_disks.qemu.write(VDA, 1, "0", "1M")
    if not running:
        few_disks.qemu.kill()
    drop(few_disks)
    assert not [name for name in os.listdir(few_disks.dir) if name.endswith(".j1")]
    assert pattern(few_disks.dir / "a.qcow2", "qcow2", 1, "0", "1M")


def test_half_made_overlay_files_are_deleted(few_disks: PlainQemu) -> None:
    for path in paths(few_disks).values():
        Path(path).write_bytes(b"QFI")
    drop(few_disks)
    assert not [name for name in os.listdir(few_disks.dir) if name.endswith(".j1")]


def test_prepared_overlays_are_all_removed_when_one_cannot_be_made(few_disks: PlainQemu) -> None:
    Path(paths(few_disks)["sda"]).write_text("somebody's file")
    with pytest.raises(HypervisorError, match=r"b\.raw\.j1: File exists"):
        prepare(few_disks)
    assert Path(paths(few_disks)["sda"]).read_text() == "somebody's file"
    assert not os.path.exists(paths(few_disks)["vda"])


@pytest.mark.parametrize("status", ["ready", "pending", None])
def test_a_commit_of_a_dead_daemon_is_continued(few_disks: PlainQemu, status: str | None) -> None:
    snapshot(few_disks)
    few_disks.qemu.write(VDA, 5, "8M", "16M")
    commit(few_disks, "vda", speed=0 if status else 1 << 20, status=status)
    if status is None:
        few_disks.qemu.execute("block-job-set-speed", device=node_name(paths(few_disks)["vda"]), speed=0)
    drop(few_disks)
    assert_whole(few_disks)
    assert pattern(few_disks.dir / "a.qcow2", "qcow2", 5, "8M", "16M")


def test_somebody_elses_block_job_is_left_alone(few_disks: PlainQemu) -> None:
    overlay = snapshot(few_disks)
    few_disks.qemu.write(VDA, 5, "8M", "16M")
    few_disks.qemu.execute("block-stream", job_id="theirs", device=node_name(overlay["vda"]), speed=1)
    with pytest.raises(HypervisorError, match="busy with a block job or a filter that is not ours"):
        drop(few_disks, "vda")
    assert os.path.exists(overlay["vda"])
    with monitor(few_disks.qemu.own) as own:
        own.execute("block-job-cancel", device="theirs", force=True)
        while own.execute("query-jobs"):
            pass
    drop(few_disks)
    assert_whole(few_disks)


def test_an_overlay_under_somebody_elses_snapshot_is_kept(few_disks: PlainQemu) -> None:
    overlay = snapshot(few_disks)
    top = create(few_disks.dir / "foreign.qcow2")
    with monitor(few_disks.qemu.own) as own:
        own.execute("blockdev-add", driver="qcow2", node_name="foreign", backing=None,
                    file={"driver": "file", "filename": str(top)})
        own.execute("blockdev-snapshot", node=node_name(overlay["vda"]), overlay="foreign")
    with pytest.raises(HypervisorError, match=r"foreign\.qcow2 was put on top of our overlay"):
        drop(few_disks, "vda")
    assert os.path.exists(overlay["vda"])


# --- QEMU ends


@pytest.mark.parametrize("how", ["killed", "quit"])
def test_off_the_overlay_is_committed_offline(few_disks: PlainQemu, how: str) -> None:
    snapshot(few_disks)
    end(few_disks, how)
    drop(few_disks)
    assert_whole(few_disks)
    few_disks.qemu.start()
    assert_whole(few_disks)


@pytest.mark.parametrize("how", ["killed", "quit"])
@pytest.mark.parametrize("status", ["running", "ready", "pending"])
def test_qemu_ends_in_the_middle_of_a_commit(few_disks: PlainQemu, status: str, how: str) -> None:
    snapshot(few_disks)
    few_disks.qemu.write(VDA, 5, "8M", "16M")
    commit(few_disks, "vda", speed=1 if status == "running" else 0, status=status)
    if status == "pending" and how == "quit":
        pytest.skip("QEMU does not quit with a job that waits to be finalized")
    end(few_disks, how)
    drop(few_disks)
    assert_whole(few_disks)
    assert pattern(few_disks.dir / "a.qcow2", "qcow2", 5, "8M", "16M")


def end(machine: PlainQemu, how: str) -> None:
    if how == "killed":
        machine.qemu.kill()
    else:
        machine.qemu.execute("quit")
        machine.qemu.wait()


@pytest.mark.parametrize("how", ["killed", "quit"])
def test_an_overlay_that_is_off_its_base_is_never_committed_again(few_disks: PlainQemu, how: str) -> None:
    """The daemon and QEMU died after the pivot: what the guest wrote since must not be set back."""
    overlay = snapshot(few_disks)["vda"]
    commit(few_disks, "vda", status="pending")
    with monitor(few_disks.qemu.own) as own:  # what drop_overlay does then, up to the moment of the crash
        own.execute("block-dirty-bitmap-remove", node=node_name(overlay), name="vmbk-live")
        own.execute("job-finalize", id=node_name(overlay))
    few_disks.qemu.write(VDA, 9, "64k", "64k")
    end(few_disks, how)
    drop(few_disks)
    assert not os.path.exists(overlay)
    assert pattern(few_disks.dir / "a.qcow2", "qcow2", 9, "64k", "64k")


def test_started_again_without_the_overlay_nobody_guesses(few_disks: PlainQemu) -> None:
    overlay = snapshot(few_disks)["vda"]
    few_disks.qemu.kill()
    few_disks.qemu.start()
    with pytest.raises(HypervisorError, match="runs without the overlay .*holds what it wrote.*qemu-img commit"):
        drop(few_disks, "vda")
    assert os.path.exists(overlay)
    few_disks.qemu.kill()
    drop(few_disks)
    assert_whole(few_disks)


def test_a_snapshot_of_one_that_is_off(few_disks: PlainQemu) -> None:
    few_disks.qemu.kill()
    with pytest.raises(NotRunning):
        prepare(few_disks)


# --- what is never snapshotted


def test_what_is_never_snapshotted(new_qemu: Callable[..., PlainQemu], tmp_path: Path) -> None:
    create(tmp_path / "ro", "raw")
    machine = new_qemu("-drive if=none,id=cd,media=cdrom -device ide-cd,drive=cd,bus=ide.1,id=cd -drive if=none,"
                       "id=ro,format=raw,file={dir}/ro,readonly=on -device virtio-blk-pci,drive=ro,id=ro")
    for target, words in (("cd", "is a cdrom and is never snapshotted"), ("ro", "read-only"), ("xy", "no disk xy")):
        with pytest.raises(InvalidArgument, match=words):
            machine.work(lambda hv, uuid: hv.prepare_overlays(uuid, {target: f"{tmp_path}/o"}))  # noqa: B023
    with pytest.raises(InvalidArgument, match="a snapshot of no disk"):
        machine.work(lambda hv, uuid: hv.snapshot(uuid, {}))
    assert not os.path.exists(tmp_path / "o")


def test_a_lun_is_told_from_a_disk_and_left_alone(
    new_qemu: Callable[..., PlainQemu], tmp_path: Path
) -> None:
    """A ``scsi-block`` looks like a disk in ``query-block``, but the guest's commands go around the block layer."""
    require("tgtd", shutil.which("tgtd", path=os.environ["PATH"] + ":/usr/sbin") is not None)
    directory = Path(tempfile.mkdtemp(prefix="vmbk-tgt-", dir="/tmp"))
    processes = Processes(directory)
    try:
        target = IscsiTarget(processes, directory)
        lun = target.create_lun("lun", size=32 << 20)
        machine = new_qemu(
            f"-device virtio-scsi-pci -blockdev driver=raw,node-name=n,file.driver=iscsi,file.transport=tcp,"
            f"file.portal={lun.portal},file.target={lun.iqn},file.lun={lun.lun} -device scsi-block,drive=n,id=sda")
        (disk,) = machine.work(lambda hv, uuid: hv.domain(uuid)).disks
        assert (disk.device, disk.size) == ("lun", 32 << 20)
        assert disk.source == DiskSource("network", "raw", protocol="iscsi", name=f"{lun.iqn}/{lun.lun}",
                                         host="127.0.0.1", port=target.port)
        overlay = {"sda": f"{tmp_path}/o"}
        with pytest.raises(InvalidArgument, match="sda is a lun and is never snapshotted"):
            machine.work(lambda hv, uuid: hv.snapshot(uuid, overlay))
        with pytest.raises(InvalidArgument, match="sda is a lun"):
            machine.work(lambda hv, uuid: hv.begin_fleece(uuid, overlay, f"{tmp_path}/s", {}))
        reasons = machine.work(lambda hv, uuid: hv.begin_bitmaps(uuid, "vmbackupd-j1", ["sda"]))
        assert "go around QEMU" in str(reasons["sda"])
        machine.qemu.kill()
        target.close()
    finally:
        processes.close()


def test_a_base_with_a_chain_of_its_own(new_qemu: Callable[..., PlainQemu], tmp_path: Path) -> None:
    """The overlay goes into the image it was put on, not into the bottom of the chain."""
    bottom = create(tmp_path / "bottom", "raw")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(bottom), "-F", "raw", str(tmp_path / "a.qcow2"), "32M")
    create(tmp_path / "b.raw", "raw")
    machine = new_qemu("-drive if=none,id=a,file={dir}/a.qcow2,format=qcow2 -device virtio-blk-pci,drive=a,id=vda"
                       " -device virtio-scsi-pci -drive if=none,id=b,format=raw,file={dir}/b.raw"
                       " -device scsi-hd,drive=b,id=sda")
    overlay = snapshot(machine)
    assert chains(machine)["vda"] == (overlay["vda"], f"{tmp_path}/a.qcow2", str(bottom))
    drop(machine)
    assert chains(machine)["vda"] == (f"{tmp_path}/a.qcow2", str(bottom))
    assert pattern(bottom, "raw", 0, "0", "32M")
    assert pattern(tmp_path / "a.qcow2", "qcow2", 2, "64k", "64k")
