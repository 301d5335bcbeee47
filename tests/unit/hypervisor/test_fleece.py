"""Pull-mode backup jobs on a real libvirt and QEMU: one instant of disks of every kind, and the end from any state."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.hypervisor.machine import SCSI, Machine, create, dirty, disk, pattern, tool
from vmbackupd.errors import HypervisorError, InvalidArgument, NotRunning
from vmbackupd.hypervisor.base import FleeceExport
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor

NAME = "vmbackupd-j1"


@pytest.fixture
def machine(new_machine: Callable[..., Machine], tmp_path: Path, network: str) -> Machine:
    """A running domain with a qcow2 vda, a vdb on the network, raw, VMDK and VHD disks, and an empty CD drive."""
    devices = disk(create(tmp_path / "a.qcow2"), "vda") + network
    for target, format in (("vdc", "raw"), ("vdd", "vmdk"), ("vde", "vpc")):
        devices += disk(create(tmp_path / f"{target}.{format}", format), target, format)
    return new_machine(
        SCSI + devices + "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>", ports=8)


TARGETS = ("vda", "vdb", "vdc", "vdd", "vde")


def socket(machine: Machine) -> str:
    return f"{machine.dir}/f.sock"


def begin(machine: Machine, *targets: str, since: dict[str, str] | None = None) -> dict[str, FleeceExport]:
    disks = {target: f"{machine.dir}/{target}.scratch" for target in targets or TARGETS}
    return machine.with_hypervisor(lambda hv: hv.begin_fleece(machine.uuid, disks, socket(machine), since or {}))


def end(machine: Machine) -> None:
    machine.with_hypervisor(lambda hv: hv.end_fleece(machine.uuid))


def read(machine: Machine, export: str) -> Path:
    """An export as a raw file."""
    path = machine.dir / "read.raw"
    path.unlink(missing_ok=True)
    tool("nbdcopy", f"nbd+unix:///{export}?socket={socket(machine)}", str(path))
    return path


def test_disks_of_every_kind_are_served_as_of_one_instant(machine: Machine) -> None:
    for number in range(5):
        machine.write(f"virtio-disk{number}", number + 1, "0", "1M")
    exports = begin(machine)
    for number in range(5):
        machine.write(f"virtio-disk{number}", 99, "0", "2M")
    for number, target in enumerate(TARGETS):
        assert exports[target].bitmap is None
        image = read(machine, exports[target].name)
        assert pattern(image, "raw", number + 1, "0", "1M")
        assert pattern(image, "raw", 0, "1M", "1M")
    assert pattern(machine.dir / "vdd.vmdk", "vmdk", 99, "0", "2M")  # the guest's write went through
    end(machine)
    end(machine)  # again is no error
    assert not [name for name in os.listdir(machine.dir) if "scratch" in name or name == "f.sock"]


def test_the_bitmap_of_a_checkpoint_is_served_with_its_disk(machine: Machine) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        assert (await hv.begin_bitmaps(machine.uuid, NAME, ["vda"])) == {"vda": None}
        await asyncio.to_thread(machine.write, "virtio-disk0", 1, "1M", "64k")

    machine.with_hypervisor(work)
    exports = begin(machine, "vda", "vdc", since={"vda": NAME})
    machine.write("virtio-disk0", 2, "2M", "64k")  # after T2
    assert exports["vdc"].bitmap is None and exports["vda"].bitmap is not None
    assert dirty(socket(machine), exports["vda"].name, exports["vda"].bitmap) == {16}
    assert pattern(read(machine, exports["vda"].name), "raw", 0, "2M", "64k")
    end(machine)
    exports = begin(machine, "vda", since={"vda": NAME})
    assert dirty(socket(machine), exports["vda"].name, str(exports["vda"].bitmap)) == {16, 32}
    end(machine)


def test_somebody_elses_job_is_left_alone(machine: Machine) -> None:
    machine.dom.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket(machine)}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{machine.dir}/theirs'/></disk>"
        + "".join(f"<disk name='{each}' backup='no'/>" for each in TARGETS[1:]) + "</disks></domainbackup>", None, 0)
    end(machine)
    assert "theirs" in machine.dom.backupGetXMLDesc(0)
    machine.dom.abortJob()
    machine.wait(lambda: not (machine.dir / "theirs").exists(), "their job has ended")


def test_libvirtd_is_restarted_while_the_job_runs(machine: Machine) -> None:
    machine.write("virtio-disk0", 1, "0", "1M")
    exports = begin(machine, "vda")
    machine.host.stop_libvirtd()()
    machine.write("virtio-disk0", 2, "0", "1M")
    assert pattern(read(machine, exports["vda"].name), "raw", 1, "0", "1M")
    end(machine)
    begin(machine, "vda")
    end(machine)


def test_the_vm_dies_while_the_job_runs(machine: Machine) -> None:
    begin(machine, "vda")
    machine.kill()
    end(machine)
    with pytest.raises(NotRunning, match="VM bare: backup job: it is not running"):
        begin(machine, "vda")
    machine.dom.create()
    for leftover in ("f.sock", "vda.scratch"):  # the caller's journal has them
        (machine.dir / leftover).unlink(missing_ok=True)
    begin(machine, "vda")
    end(machine)


def test_what_must_not_be_read_through_qemu_is_refused(machine: Machine) -> None:
    with pytest.raises(InvalidArgument, match="sdb is a cdrom"):
        begin(machine, "vda", "sdb")
    with pytest.raises(InvalidArgument, match="no disk vdz"):
        begin(machine, "vdz")


def test_a_scratch_image_that_cannot_be_made_costs_nothing_else(machine: Machine) -> None:
    (machine.dir / "vda.scratch").mkdir()
    with pytest.raises(HypervisorError, match="VM bare: backup job: .*scratch"):
        begin(machine)
    (machine.dir / "vda.scratch").rmdir()
    begin(machine)
    end(machine)
