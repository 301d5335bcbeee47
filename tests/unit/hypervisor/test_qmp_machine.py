"""Machines that run without libvirt: the connection to them, and what is found out there. Real QEMU processes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.qemu import Monitor
from tests.unit.hypervisor.machine import create
from tests.unit.hypervisor.plain import PORTS, PlainQemu, with_qmp
from vmbackupd.config import MachineConfig, parse
from vmbackupd.daemon.wiring import job_runner
from vmbackupd.errors import GuestAgentUnavailable, HypervisorError, NotFound, NotRunning
from vmbackupd.hypervisor.base import DiskSource, DomainInfo
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor
from vmbackupd.hypervisor.qmpclient import QmpBusy
from vmbackupd.job.job import Result

UUID = "0b49a1a8-6d39-4a0c-9ab0-1f7c8f0c1f5e"
New = Callable[..., PlainQemu]


def describe(machine: PlainQemu) -> DomainInfo:
    return machine.work(lambda hv, uuid: hv.domain(uuid))


def test_disks_are_found_however_they_were_given(new_qemu: New, tmp_path: Path) -> None:
    for name in "abcdef":
        create(tmp_path / name, "qcow2" if name in "abe" else "raw")
    machine = new_qemu(
        "-device virtio-scsi-pci,id=scsi0" + PORTS
        + " -drive file={dir}/a,format=qcow2,if=virtio,readonly=on"
        + " -blockdev driver=file,filename={dir}/b,node-name=bf -blockdev driver=qcow2,file=bf,node-name=b"
        + " -device virtio-blk-pci,drive=b,bus=port0,serial=SB,id=db,share-rw=on"
        + " -drive if=none,id=hc,file={dir}/c,format=raw"
        + " -device scsi-hd,drive=hc,bus=scsi0.0,scsi-id=2,lun=1,wwn=0x5000c50015ea71ac"
        + " -drive if=none,id=cd0,media=cdrom -device ide-cd,drive=cd0,bus=ide.1"
        + " -drive if=none,id=hd,file={dir}/d,format=raw -device ide-hd,drive=hd,bus=ide.2"
        + " -blockdev driver=qcow2,file.driver=file,file.filename={dir}/e,node-name=e -device virtio-blk-pci,drive=e"
        + " -blockdev driver=file,filename={dir}/f,node-name=f -device nvme,drive=f,serial=NV,id=nv")
    machine.wait_numbered()
    disks = {disk.target: disk for disk in describe(machine).disks}
    kinds = {name: (disk.device, disk.bus) for name, disk in disks.items()}
    anonymous = next(name for name in disks if name.startswith("device"))
    assert kinds == {"virtio0": ("disk", "virtio"), "db": ("disk", "virtio"), "hc": ("disk", "scsi"),
                     "cd0": ("cdrom", "sata"), "hd": ("disk", "sata"), anonymous: ("disk", "virtio"),
                     "nv": ("disk", "nvme")}
    assert disks["db"].source == DiskSource("file", "qcow2", path=f"{tmp_path}/b")
    assert disks["nv"].source == DiskSource("file", "raw", path=f"{tmp_path}/f")
    assert disks["db"].serial == "SB" and disks["hc"].wwn == "5000c50015ea71ac"
    assert disks["db"].shareable and not disks["hd"].shareable
    assert disks["virtio0"].read_only and not disks["db"].read_only
    assert {disk.size for disk in disks.values()} == {32 << 20, None} and disks["cd0"].source is None
    places = {name: disk.address for name, disk in disks.items() if disk.address is not None}
    assert len(places) == len(disks)
    assert places["db"].pci == "0000:01:00.0"  # behind the first port
    assert (places["hc"].target, places["hc"].unit) == (2, 1)
    assert (places["hd"].target, places["hd"].unit) == (0, 2)
    assert places[anonymous].unit is None and places[anonymous].pci.startswith("0000:00:")


def test_a_relative_path_begins_where_qemu_was_started(new_qemu: New, tmp_path: Path) -> None:
    image = create(tmp_path / "here.img", "raw")
    (disk,) = describe(new_qemu(f"-drive if=virtio,file={os.path.relpath(image)},format=raw")).disks
    assert disk.source == DiskSource("file", "raw", path=str(image))


def test_the_configuration_tells_how_to_start_it_again(few_disks: PlainQemu) -> None:
    info = describe(few_disks)
    assert info.running and not info.has_agent and info.nvram is None
    words = info.config["qemu-command-line"].split()
    assert words[0] == "qemu-system-x86_64" and f"if=none,id=b,format=raw,file={few_disks.dir}/b.raw" in words
    state = json.loads(info.config["qemu-state.json"])
    assert [item["name"] for item in state["query-machines"]] == ["pc-q35-7.2"]
    assert {"query-block", "query-named-block-nodes", "query-chardev", "query-pci", "query-cpus-fast",
            "query-memory-size-summary", "query-version"} <= state.keys()


def test_the_command_line_may_be_given(few_disks: PlainQemu) -> None:
    script = few_disks.dir / "start.sh"
    script.write_text("#!/bin/sh\nexec qemu-system-x86_64 ...\n")
    config = MachineConfig(few_disks.qemu.qmp, command_line=script, nvram=Path("/var/nvram"))
    info = with_qmp({"bare": config}, few_disks.dir, lambda hv: hv.domain("bare"))
    assert (info.config["qemu-command-line"], info.nvram) == (script.read_text(), "/var/nvram")


def test_one_that_is_off_is_known_by_the_uuid_it_had(new_qemu: New, tmp_path: Path) -> None:
    machine = new_qemu(uuid=UUID)
    assert machine.work(lambda hv, _: hv.domains()) == [("bare", UUID, True)]
    machine.qemu.kill()

    async def work(hv: QmpHypervisor) -> None:
        assert await hv.domains() == [("bare", UUID, False)]
        info = await hv.domain(UUID)
        assert (info.name, info.running, info.disks) == ("bare", False, ())
        with pytest.raises(NotRunning, match="VM bare: nobody listens at the QMP socket"):
            await hv.agent(UUID, "guest-ping")
        with pytest.raises(HypervisorError, match="started by whoever runs it"):
            await hv.start(UUID)
        await hv.destroy(UUID)
        with pytest.raises(NotFound, match="there are bare"):
            await hv.domain("another")

    with_qmp({"bare": machine.config}, tmp_path, work)


def test_the_socket_of_another_machine_is_noticed(new_qemu: New, tmp_path: Path) -> None:
    machine = new_qemu(uuid=UUID)
    other = MachineConfig(machine.qemu.qmp, uuid=UUID.replace("0", "1"))
    with pytest.raises(HypervisorError, match=f"its UUID is {UUID}, expected 1b49.*another machine's socket"):
        with_qmp({"bare": other}, tmp_path, lambda hv: hv.domain("bare"))


def test_a_monitor_that_serves_somebody_else(new_qemu: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbackupd.hypervisor.qmp.machine.GREETING", 0.5)
    machine = new_qemu(uuid=UUID)
    somebody = Monitor(machine.qemu.qmp)
    try:
        async def work(hv: QmpHypervisor) -> None:
            assert [running for _, _, running in await hv.domains()] == [True]
            with pytest.raises(QmpBusy, match="VM bare: .*one client at a time.*a monitor of its own"):
                await hv.domain("bare")

        with_qmp({"bare": machine.config}, machine.dir, work)
    finally:
        somebody.close()
    assert describe(machine).running  # and now it has time for us


def test_the_life_of_a_machine_is_told(new_qemu: New) -> None:
    machine = new_qemu(uuid=UUID)

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        end = hv.watch(uuid, told.put_nowait)
        await asyncio.to_thread(machine.qemu.kill)
        assert await asyncio.wait_for(told.get(), 10) == "stopped"
        await asyncio.to_thread(machine.qemu.start)
        assert await asyncio.wait_for(told.get(), 30) == "started"
        await hv.destroy(uuid)
        assert await asyncio.wait_for(told.get(), 10) == "stopped"
        await asyncio.to_thread(machine.qemu.wait)
        end()
        end()
        await asyncio.to_thread(machine.qemu.start)
        assert (await hv.domain(uuid)).running and told.empty()

    machine.work(work)


def test_who_uses_a_path(few_disks: PlainQemu) -> None:
    path = f"{few_disks.dir}/b.raw"
    assert few_disks.work(lambda hv, _: hv.path_users(path)) == ["bare"]
    assert few_disks.work(lambda hv, _: hv.path_users("/nothing")) == []
    script = few_disks.dir / "start.sh"
    script.write_text(f"qemu-system-x86_64 -drive file={path}")
    few_disks.qemu.kill()
    off = MachineConfig(few_disks.qemu.qmp, command_line=script)
    assert with_qmp({"bare": off}, few_disks.dir, lambda hv: hv.path_users(path)) == ["bare"]


def test_the_daemon_is_made_of_what_the_configuration_says(new_qemu: New, tmp_path: Path) -> None:
    machine = new_qemu(uuid=UUID)
    config = parse(f"""
        state_directory = "{tmp_path}"
        hypervisor.uri = "qmp:"
        machines.bare.qmp = "{machine.qemu.qmp}"
        machines.off.qmp = "{tmp_path}/nothing"
        machines.off.uuid = "{UUID.replace('0', '1')}"
    """)

    async def main() -> list[Result]:
        async with job_runner(config) as runner:
            return await runner.list_machines()

    assert asyncio.run(main()) == [{"name": "bare", "uuid": UUID, "running": True},
                                   {"name": "off", "uuid": UUID.replace("0", "1"), "running": False}]


# --- the guest agent


@pytest.fixture
def guest_end(new_qemu: New) -> PlainQemu:
    """A QEMU whose agent's port is there, and nobody in the guest behind it."""
    machine = new_qemu("-device virtio-serial-pci", start=False)
    machine.qemu.argv += machine.qemu.agent_words
    machine.qemu.start()
    return machine


def test_the_agents_port_is_found_in_qemu(guest_end: PlainQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbackupd.hypervisor.guestagent.SYNC", 0.5)
    assert describe(guest_end).has_agent

    async def work(hv: QmpHypervisor, uuid: str) -> None:
        with pytest.raises(GuestAgentUnavailable, match=r"no answer within .*bare\.agent"):
            await hv.agent(uuid, "guest-ping", timeout=0.1)

    guest_end.work(work)


def test_a_machine_without_an_agents_port(new_qemu: New) -> None:
    async def work(hv: QmpHypervisor, uuid: str) -> None:
        with pytest.raises(GuestAgentUnavailable, match=r"no port org\.qemu\.guest_agent\.0.*machines\.bare\.agent"):
            await hv.agent(uuid, "guest-ping")

    new_qemu().work(work)
