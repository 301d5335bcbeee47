"""Backups of virtual disks without libvirt, step by step as the pipeline runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.hypervisor.backups import Backups, answer
from tests.unit.hypervisor.machine import create
from tests.unit.hypervisor.plain import PORTS, PlainQemu, with_qmp
from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor
from vmbackupd.model import T2, Change
from vmbackupd.repository import LocalStorage, Repository

UUID = "0b49a1a8-6d39-4a0c-9ab0-1f7c8f0c1f5e"
CHUNK = 1 << 16


class Answering(QmpHypervisor):
    """The real one, with a guest agent that answers."""

    agent = staticmethod(answer)  # type: ignore[assignment]


@pytest.fixture
def backups(new_qemu: Callable[..., PlainQemu], tmp_path: Path) -> Iterator[Backups]:
    """A machine with a qcow2 ``vda`` and a raw ``vdb``."""
    create(tmp_path / "a.qcow2")
    create(tmp_path / "b.raw", "raw")
    machine = new_qemu(
        PORTS + " -blockdev driver=qcow2,node-name=a,file.driver=file,file.filename={dir}/a.qcow2,discard=unmap"
        " -device virtio-blk-pci,drive=a,id=vda"
        " -drive if=none,id=b,format=raw,file={dir}/b.raw -device virtio-blk-pci,drive=b,id=vdb", uuid=UUID)
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    yield Backups(machine, Repository.create(storage),
                  lambda work: with_qmp({"bare": machine.config}, tmp_path, work, Answering))


def write(backups: Backups, number: int, at: str, length: str) -> None:
    """The same to both disks."""
    for target in ("vda", "vdb"):
        backups.machine.qemu.write(f"/machine/peripheral/{target}/virtio-backend", number, at, length)


@pytest.mark.parametrize("t2", [T2.EXTERNAL, T2.FLEECE])
def test_a_row_of_backups_reads_what_changed_and_holds_what_was_there(backups: Backups, t2: T2) -> None:
    write(backups, 1, "0", "4M")
    first = backups.take(t2=t2)
    assert {volume.change.method for volume in first.values()} == {Change.FULL}
    assert {volume.change.token for volume in first.values()} == {"vmbackupd-j1"}
    write(backups, 2, "1M", "64k")
    backups.during = lambda: write(backups, 3, "2M", "64k")  # after T1
    second = backups.take("[changes]\naudit = 0", t2=t2)
    change = second["vda"].change
    assert (change.method, change.base, change.chunks, change.audited) == (Change.BITMAP, "web1-1", 1, 0)
    assert second["vda"].bytes_read == CHUNK and second["vda"].details["t2"] == t2.value
    if t2 is T2.FLEECE:  # QEMU has the bitmap of the raw image, whose file has none
        assert second["vdb"].change.method is Change.BITMAP
    else:
        assert "dirty bitmap cannot be read" in second["vdb"].change.reason
    third = backups.take("[changes]\naudit = 0", t2=t2)
    assert third["vda"].change.chunks == 1  # what was written while the second one was read
    for taken, numbers in ((first, (1, 1)), (second, (2, 1)), (third, (2, 3))):
        for volume in taken.values():
            image = backups.image(volume)
            assert (image[1 << 20], image[2 << 20], image[0], image[4 << 20]) == (*numbers, 1, 0)
    assert backups.machine.work(lambda hv, uuid: hv.bitmaps(uuid)) == ["vmbackupd-j3"]


def test_after_a_crash_of_qemu_only_a_full_read_is_right(backups: Backups) -> None:
    backups.take()
    write(backups, 5, "0", "64k")
    backups.machine.qemu.kill()
    backups.machine.qemu.start()
    taken = backups.take()["vda"]
    assert taken.change.method is Change.FULL and "dirty bitmap" in taken.change.reason
    assert backups.image(taken)[0] == 5
    assert backups.take()["vda"].change.method is Change.BITMAP


@pytest.mark.parametrize("t2", [T2.EXTERNAL, T2.FLEECE])
def test_a_backup_that_fails_keeps_the_earlier_record(backups: Backups, t2: T2) -> None:
    backups.take()

    def fail() -> None:
        raise HypervisorError("the test wants it")

    write(backups, 4, "0", "64k")
    backups.during = fail
    with pytest.raises(HypervisorError, match="the test wants it"):
        backups.take(t2=t2)
    assert backups.machine.work(lambda hv, uuid: hv.bitmaps(uuid)) == ["vmbackupd-j1"]
    taken = backups.take()["vda"]
    assert taken.change.base == "web1-1" and backups.image(taken)[0] == 4


def test_qemu_dies_while_it_serves(backups: Backups) -> None:
    backups.during = backups.machine.qemu.kill
    with pytest.raises(NotRunning, match="VM bare stopped while its QEMU served vd[ab]"):
        backups.take(t2=T2.FLEECE)
    backups.machine.qemu.start()
    assert backups.take(t2=T2.FLEECE)["vda"].change.method is Change.FULL


def test_qemu_dies_above_an_image_that_is_still(backups: Backups) -> None:
    """What was captured is captured; the overlay is committed offline, and the bitmap in the image marks that."""
    write(backups, 6, "0", "64k")

    def later() -> None:
        write(backups, 7, "64k", "64k")
        backups.machine.qemu.kill()

    backups.during = later
    taken = backups.take(t2=T2.EXTERNAL)["vda"]
    assert backups.image(taken)[0] == 6 and backups.image(taken)[CHUNK] == 0
    backups.machine.qemu.start()
    again = backups.take()["vda"]
    assert (again.change.method, again.change.chunks) == (Change.BITMAP, 1) and backups.image(again)[CHUNK] == 7
