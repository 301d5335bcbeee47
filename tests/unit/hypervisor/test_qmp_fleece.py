"""Disks served as of one instant without libvirt: on real QEMU processes, and the end from any state."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.qemu import monitor
from tests.unit.hypervisor.machine import create, pattern, tool
from tests.unit.hypervisor.plain import PORTS, PlainQemu
from vmbackupd.errors import HypervisorError, InvalidArgument, NotRunning
from vmbackupd.hypervisor.base import FleeceExport

FORMATS = {"vda": "qcow2", "vdb": "raw", "vdc": "vmdk", "vdd": "vpc"}


@pytest.fixture
def machine(new_qemu: Callable[..., PlainQemu], tmp_path: Path) -> PlainQemu:
    """A running QEMU with a disk of each format, and an empty CD drive."""
    words = PORTS + " -drive if=none,id=cd0,media=cdrom -device ide-cd,drive=cd0,bus=ide.1,id=cd"
    for target, format in FORMATS.items():
        create(tmp_path / target, format)
        words += (f" -drive if=none,id=d{target},file={{dir}}/{target},format={format}"
                  f" -device virtio-blk-pci,drive=d{target},id={target}")
    return new_qemu(words)


def write(machine: PlainQemu, target: str, number: int, at: str, length: str) -> None:
    machine.qemu.write(f"/machine/peripheral/{target}/virtio-backend", number, at, length)


def socket(machine: PlainQemu) -> str:
    return str(machine.qemu.directory / "nbd")


def begin(machine: PlainQemu, *targets: str, since: dict[str, str] | None = None) -> dict[str, FleeceExport]:
    disks = {target: f"{machine.dir}/{target}.scratch" for target in targets or FORMATS}
    return machine.work(lambda hv, uuid: hv.begin_fleece(uuid, disks, socket(machine), since or {}))


def end(machine: PlainQemu) -> None:
    machine.work(lambda hv, uuid: hv.end_fleece(uuid))
    for path in machine.dir.glob("*.scratch"):
        path.unlink()  # the caller's journal has them


def read(machine: PlainQemu, export: str) -> Path:
    """An export as a raw file."""
    path = machine.dir / "read.raw"
    path.unlink(missing_ok=True)
    tool("nbdcopy", f"nbd+unix:///{export}?socket={socket(machine)}", str(path))
    return path


def left_over(machine: PlainQemu) -> list[object]:
    """Jobs, exports, nodes and bitmaps that are still there, and whether QEMU's NBD server runs."""
    with monitor(machine.qemu.own) as own:
        nodes = own.execute("query-named-block-nodes")
        found = [*own.execute("query-jobs"), *own.execute("query-block-exports")]
        found += [node["node-name"] for node in nodes if node["node-name"].startswith("vmbk")]
        found += [bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", ())]
        found += [item for item in own.execute("qom-list", path="/objects") if item["name"].startswith("vmbk")]
    return found + [name for name in os.listdir(machine.qemu.directory) if name == "nbd"]


def test_disks_of_every_format_are_served_as_of_one_instant(machine: PlainQemu) -> None:
    for number, target in enumerate(FORMATS):
        write(machine, target, number + 1, "0", "1M")
    exports = begin(machine)
    for target in FORMATS:
        write(machine, target, 99, "0", "2M")
    for number, target in enumerate(FORMATS):
        assert exports[target].bitmap is None
        image = read(machine, exports[target].name)
        assert pattern(image, "raw", number + 1, "0", "1M")
        assert pattern(image, "raw", 0, "1M", "1M")
    end(machine)
    end(machine)  # again is no error
    assert left_over(machine) == []
    assert pattern(machine.dir / "vdc", "vmdk", 99, "0", "2M")  # the guest's write went through
    begin(machine, "vda")
    end(machine)


def test_somebody_elses_server_job_and_bitmap_are_left_alone(machine: PlainQemu) -> None:
    theirs = str(machine.qemu.directory / "theirs")
    machine.qemu.execute("nbd-server-start", addr={"type": "unix", "data": {"path": theirs}})
    with pytest.raises(HypervisorError, match="nbd-server-start .*already running"):
        begin(machine, "vda")
    end(machine)
    assert os.path.exists(theirs) and left_over(machine) == []


def test_qemu_dies_while_it_serves(machine: PlainQemu) -> None:
    begin(machine, "vda")
    machine.qemu.kill()
    end(machine)
    with pytest.raises(NotRunning, match="VM bare"):
        begin(machine, "vda")
    Path(socket(machine)).unlink()  # the caller's journal has it
    machine.qemu.start()
    begin(machine, "vda")
    end(machine)


def test_a_scratch_image_that_cannot_be_made_leaves_nothing(machine: PlainQemu) -> None:
    (machine.dir / "vdb.scratch").mkdir()
    with pytest.raises(HypervisorError, match=r"vdb\.scratch"):
        begin(machine)
    (machine.dir / "vdb.scratch").rmdir()
    assert left_over(machine) == []


def test_what_must_not_be_read_through_qemu_is_refused(machine: PlainQemu) -> None:
    with pytest.raises(InvalidArgument, match="cd is a cdrom"):
        begin(machine, "vda", "cd")
    with pytest.raises(InvalidArgument, match="no disk vdz"):
        begin(machine, "vdz")
