"""Backups of virtual disks through libvirt, step by step as the pipeline runs them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.restore_kit import build_store
from tests.unit.hypervisor.backups import Backups, Idle, answer
from tests.unit.hypervisor.machine import SCSI, Machine, create, disk, tool, with_hypervisor
from vmbackupd.errors import BackupError, HypervisorError, NotRunning
from vmbackupd.guest.replies import HelperStatus, SnapResult, VolumeStatus
from vmbackupd.hypervisor.base import bitmap_name
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.job import fleecing
from vmbackupd.job.context import BackupContext
from vmbackupd.model import T2, Change, Method, Segment, VolumeMap
from vmbackupd.repository import LocalStorage, Repository

CHUNK = 1 << 16


class Answering(LibvirtHypervisor):
    """The real one, with a guest agent that answers."""

    agent = staticmethod(answer)  # type: ignore[assignment]


@pytest.fixture
def machine(new_machine: Callable[..., Machine], tmp_path: Path) -> Machine:
    raw = disk(create(tmp_path / "b.raw", "raw"), "vdb", "raw")
    return new_machine(disk(create(tmp_path / "a.qcow2"), "vda") + raw)


@pytest.fixture
def backups(machine: Machine, tmp_path: Path) -> Iterator[Backups]:
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    yield Backups(machine, Repository.create(storage), lambda work: with_hypervisor(machine.host.uri, work, Answering))


def write(backups: Backups, number: int, at: str, length: str) -> None:
    """The same to both disks."""
    for device in ("virtio-disk0", "virtio-disk1"):
        backups.machine.write(device, number, at, length)


@pytest.mark.parametrize("t2", [T2.EXTERNAL, T2.FLEECE])
def test_a_row_of_backups_reads_what_changed_and_holds_what_was_there(backups: Backups, t2: T2) -> None:
    write(backups, 1, "0", "4M")
    first = backups.take(t2=t2)
    assert first["vda"].change.method is Change.FULL and first["vda"].change.token == "vmbackupd-j1"
    assert first["vdb"].change.token is None
    write(backups, 2, "1M", "64k")
    backups.during = lambda: write(backups, 3, "2M", "64k")  # after T1
    second = backups.take("[changes]\naudit = 0", t2=t2)
    change = second["vda"].change
    assert (change.method, change.base, change.chunks, change.audited) == (Change.BITMAP, "web1-1", 1, 0)
    assert second["vda"].bytes_read == CHUNK
    assert second["vdb"].change.reason == "its image is raw, which keeps no dirty bitmap"
    assert second["vda"].details["t2"] == t2.value
    third = backups.take("[changes]\naudit = 0", t2=t2)
    assert third["vda"].change.chunks == 1  # what was written while the second one was read
    for taken, numbers in ((first, (1, 1)), (second, (2, 1)), (third, (2, 3))):
        for volume in taken.values():
            image = backups.image(volume)
            assert (image[1 << 20], image[2 << 20], image[0], image[4 << 20]) == (*numbers, 1, 0)
    assert [each.getName() for each in backups.machine.dom.listAllCheckpoints()] == [bitmap_name("vmbackupd-j3", "vda")]


def test_a_bitmap_that_is_gone_at_the_last_moment_costs_a_full_read(
    backups: Backups, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(backups, 1, "0", "1M")
    backups.take()
    begin = fleecing.begin

    async def late(ctx: BackupContext, disks: dict[str, str]) -> None:
        backups.machine.dom.checkpointLookupByName(bitmap_name("vmbackupd-j1", "vda")).delete(0)
        await begin(ctx, disks)

    monkeypatch.setattr(fleecing, "begin", late)
    write(backups, 2, "0", "64k")
    taken = backups.take(t2=T2.FLEECE)["vda"]
    assert taken.change.method is Change.FULL and "its dirty bitmap cannot be served" in taken.change.reason
    assert backups.image(taken)[0] == 2


def test_one_kind_follows_the_other(backups: Backups) -> None:
    write(backups, 1, "0", "1M")
    for number, t2 in enumerate((T2.EXTERNAL, T2.FLEECE, T2.EXTERNAL, T2.FLEECE)):
        write(backups, number, f"{number}M", "64k")
        taken = backups.take(t2=t2)["vda"]
        assert taken.change.method is (Change.BITMAP if number else Change.FULL)
        assert backups.image(taken)[number << 20] == number


def test_a_disk_on_the_network_is_served_and_takes_the_others_along(
    new_machine: Callable[..., Machine], tmp_path: Path, network: str
) -> None:
    machine = new_machine(disk(create(tmp_path / "a.qcow2"), "vda") + network)
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    backups = Backups(machine, Repository.create(storage),
                      lambda work: with_hypervisor(machine.host.uri, work, Answering))
    write(backups, 1, "0", "1M")
    backups.take()
    write(backups, 2, "0", "64k")
    backups.during = lambda: write(backups, 3, "0", "128k")  # after T1
    taken = backups.take()
    assert {volume.details["t2"] for volume in taken.values()} == {"fleece"}
    assert taken["vda"].change.method is Change.BITMAP and taken["vdb"].change.method is Change.FULL
    for volume in taken.values():
        assert (backups.image(volume)[0], backups.image(volume)[CHUNK]) == (2, 1)


def test_a_full_backup_and_switched_off_bitmaps(backups: Backups) -> None:
    backups.take()
    assert backups.take(full=True)["vda"].change.reason == "a full backup was asked for"
    assert backups.take()["vda"].change.base == "web1-2"
    off = backups.take("[changes]\nbitmaps = false")["vda"].change
    assert off.token is None and "switched off" in off.reason
    assert not backups.machine.dom.listAllCheckpoints()


def test_an_audit_catches_a_change_that_no_bitmap_saw(backups: Backups) -> None:
    """Somebody writes into the image while the VM is off, below QEMU."""
    machine = backups.machine
    machine.write("virtio-disk0", 1, "0", "1M")
    backups.take()
    machine.dom.destroy()
    place = json.loads(tool("qemu-img", "map", "--output=json", str(machine.dir / "a.qcow2")))[0]["offset"]
    with open(machine.dir / "a.qcow2", "r+b") as image:
        image.seek(place + 5 * CHUNK)
        image.write(b"\7" * 100)
    machine.dom.create()
    taken = backups.take("[changes]\naudit = 1.0")["vda"]
    assert taken.change.method is Change.FULL and taken.change.missed == 1 and taken.change.audited > 400
    assert "the record of changes is not to be trusted" in taken.change.reason
    assert any("vda: 1 of" in warning for warning in backups.warnings)
    assert backups.image(taken)[5 * CHUNK] == 7


def test_after_a_crash_of_qemu_only_a_full_read_is_right(backups: Backups) -> None:
    machine = backups.machine
    backups.take()
    machine.write("virtio-disk0", 5, "0", "64k")
    machine.kill()
    machine.dom.create()
    taken = backups.take()["vda"]
    assert taken.change.method is Change.FULL and "dirty bitmap" in taken.change.reason
    assert backups.image(taken)[0] == 5
    assert backups.take()["vda"].change.method is Change.BITMAP


def test_a_disk_that_grew_is_read_whole(backups: Backups) -> None:
    backups.take()
    backups.machine.dom.blockResize("vda", 48 << 20, 1)
    taken = backups.take()["vda"]
    assert taken.size == 48 << 20 and "of a disk of another size" in taken.change.reason
    assert backups.take()["vda"].change.method is Change.BITMAP


@pytest.mark.parametrize("t2", [T2.EXTERNAL, T2.FLEECE])
def test_a_backup_that_fails_keeps_the_earlier_record(backups: Backups, t2: T2) -> None:
    machine = backups.machine
    backups.take()

    def fail() -> None:
        raise HypervisorError("the test wants it")

    machine.write("virtio-disk0", 4, "0", "64k")
    backups.during = fail
    with pytest.raises(HypervisorError, match="the test wants it"):
        backups.take(t2=t2)
    assert [each.getName() for each in machine.dom.listAllCheckpoints()] == [bitmap_name("vmbackupd-j1", "vda")]
    taken = backups.take()["vda"]
    assert taken.change.base == "web1-1" and backups.image(taken)[0] == 4


def test_qemu_dies_while_it_serves(backups: Backups) -> None:
    backups.during = backups.machine.kill
    with pytest.raises(NotRunning, match="VM bare stopped while its QEMU served vda"):
        backups.take(t2=T2.FLEECE)
    backups.machine.dom.create()
    assert backups.take(t2=T2.FLEECE)["vda"].change.method is Change.FULL


def test_qemu_dies_above_an_image_that_is_still(backups: Backups) -> None:
    """What was captured is captured; the overlay is committed offline."""
    machine = backups.machine
    machine.write("virtio-disk0", 6, "0", "64k")
    backups.during = machine.kill
    taken = backups.take(t2=T2.EXTERNAL)["vda"]
    assert backups.image(taken)[0] == 6
    machine.dom.create()


def test_a_scratch_file_system_that_fills_up_costs_the_backup_and_not_the_guest(
    backups: Backups, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = backups.machine.dir / "scratch"
    scratch.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(scratch)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    monkeypatch.setattr(fleecing, "ROOM", 16 << 20)
    try:
        write(backups, 1, "0", "16M")
        backups.during = lambda: write(backups, 2, "0", "6M")
        with pytest.raises(BackupError, match=r"the backup is given up before the guest's writes fail"):
            backups.take(t2=T2.FLEECE)
        write(backups, 3, "0", "8M")  # the guest does not notice
    finally:
        subprocess.run(["umount", str(scratch)], check=True)


# --- disks that are snapshotted in the guest at T1, cut at T2 and set back


SCRATCH = "sda"
VOLUME = VolumeMap("vg-data", 16 << 20, 0, 8 << 20, (Segment(0, "vda", 1 << 20, 16 << 20),))


class Snapshotting(Idle):
    """The helper in a guest with a logical volume on vda; ``between`` is what the guest does between T1 and T2."""

    devices = (
        {"name": "vda", "devno": "254:0", "type": "disk", "size": 32 << 20, "logical_block": 512, "read_only": False,
         "removable": False, "transport": "virtio", "slaves": [], "holders": ["253:0"], "mounts": [], "swap": False,
         "serial": "data"},
        {"name": "dm-0", "devno": "253:0", "type": "dm", "size": VOLUME.size, "logical_block": 512, "read_only": False,
         "removable": False, "transport": "other", "slaves": ["254:0"], "holders": [], "swap": False,
         "mounts": [{"path": "/srv", "fstype": "ext4", "options": "rw"}],
         "dm": {"name": "vg-data", "uuid": "LVM-x", "table": [[0, VOLUME.size // 512, "linear", "254:0 2048"]]}},
    )

    def __init__(self) -> None:
        self.between: Callable[[], None] = lambda: None

    async def snap(self) -> SnapResult:
        return SnapResult(1.0, 2.0, 3.0)

    async def status(self) -> HelperStatus:
        between, self.between = self.between, lambda: None
        between()
        return HelperStatus("b", (VolumeStatus("253:0", True, 0, 1, 0, True),))

    async def release(self) -> list[str]:
        return []


class Reverting(Backups):
    """``store``: what the COW store of the next backup holds, chunk of the volume (16 KiB) -> content at T1."""

    def __init__(self, machine: Machine, repository: Repository) -> None:
        super().__init__(machine, repository, lambda work: with_hypervisor(machine.host.uri, work, Answering))
        self.helper = self.snapshots = Snapshotting()
        self.store: dict[int, bytes] = {}

    async def _context(self, *words: Any) -> BackupContext:
        ctx = await super()._context(*words)
        path = self.machine.dir / f"scratch.j{self.number}.qcow2"
        raw = self.machine.dir / "store.raw"
        raw.write_bytes(build_store(self.store, VOLUME.store_length))
        tool("qemu-img", "convert", "-O", "qcow2", str(raw), str(path))
        ctx.entries["scratch-file"] = ctx.journal.record("unlink", path=str(path))
        ctx.entries["scratch"] = ctx.journal.record("detach_scratch", path=str(path))
        ctx.entries["snapshots"] = ctx.journal.record("release_snapshots", socket="")
        serial = f"<serial>vmbk-{ctx.job}</serial></disk>"
        self.machine.dom.attachDevice(disk(path, SCRATCH, bus="scsi").replace("</disk>", serial))
        ctx.scratch, ctx.scratch_target, ctx.volume_maps = str(path), SCRATCH, (VOLUME,)
        return ctx


@pytest.mark.parametrize("t2", [T2.EXTERNAL, T2.FLEECE])
def test_what_was_set_back_is_read_again(new_machine: Callable[..., Machine], tmp_path: Path, t2: T2) -> None:
    """The guest overwrites a chunk between T1 and T2: this backup holds the old content, the next one the new, though
    nobody touched it since."""
    data = disk(create(tmp_path / "a.qcow2"), "vda").replace("</disk>", "<serial>data</serial></disk>")
    machine = new_machine(SCSI + data + disk(create(tmp_path / "b.qcow2"), "vdb"))
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    backups = Reverting(machine, Repository.create(storage))
    write(backups, 1, "0", "4M")
    first = backups.take("[changes]\naudit = 0", t2=t2)
    assert (first["vda"].method, first["vdb"].method) == (Method.GUEST_SNAPSHOT, Method.FREEZE_WINDOW)
    assert (first["vda"].details["t2"], first["vdb"].details["t2"]) == (t2.value, "external")
    at = 3 << 20  # on the disk; the volume begins at 1 MiB
    backups.store = {(2 << 20 >> 14) + part: b"\1" * 16384 for part in range(4)}
    backups.snapshots.between = lambda: machine.write("virtio-disk0", 2, str(at), "64k")
    second = backups.take("[changes]\naudit = 0", t2=t2)["vda"]
    assert second.reverted_chunks > 0 and second.change.method is Change.BITMAP
    assert backups.image(second)[at] == 1
    backups.store = {}
    third = backups.take("[changes]\naudit = 0", t2=t2)["vda"]
    assert third.change.base == "web1-2" and third.change.chunks == 1
    assert set(backups.image(third)[at:at + CHUNK]) == {2}
    assert "vmbk-j" not in machine.dom.XMLDesc(0)
