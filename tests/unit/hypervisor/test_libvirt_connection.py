"""The connection to libvirt: errors, threads, events, restarts of libvirtd. libvirt's own test driver stands for a
hypervisor where no QEMU is needed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import libvirt
import pytest

from tests.unit.hypervisor.machine import SCSI, Host, Machine, create, with_hypervisor
from vmbackupd.errors import (
    BackupError,
    GuestAgentRefused,
    GuestAgentUnavailable,
    HypervisorError,
    NotFound,
    NotRunning,
)
from vmbackupd.hypervisor import hotplug
from vmbackupd.hypervisor.base import HypervisorLost
from vmbackupd.hypervisor.libvirt import LibvirtConnection, LibvirtHypervisor, translate, translate_agent

TEST = "test:///default"
SMALL = "<domain type='{type}'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"


def libvirt_error(code: int, text: str) -> libvirt.libvirtError:
    error = libvirt.libvirtError("")
    error.err = (code, 10, text, 2, None, None, None, 0, 0)
    return error


@pytest.mark.parametrize(("code", "text", "kind"), [
    (libvirt.VIR_ERR_NO_DOMAIN, "Domain not found", NotFound),
    (libvirt.VIR_ERR_OPERATION_INVALID, "Requested operation is not valid: domain is not running", NotRunning),
    (libvirt.VIR_ERR_OPERATION_INVALID, "Requested operation is not valid: domain is already running",
     HypervisorError),
    (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, "Guest agent is not responding: QEMU guest agent is not connected",
     GuestAgentUnavailable),
    (libvirt.VIR_ERR_AGENT_UNSYNCED, "guest agent replied with wrong id to guest-sync", GuestAgentUnavailable),
    (libvirt.VIR_ERR_OPERATION_TIMEOUT, "Timed out during operation: cannot acquire state change lock",
     HypervisorError),
    (libvirt.VIR_ERR_INTERNAL_ERROR, "internal error: No more available PCI slots", HypervisorError),
])
def test_errors_become_ours_and_name_the_vm(code: int, text: str, kind: type[BackupError]) -> None:
    for translator in (translate, translate_agent):
        made = translator(libvirt_error(code, text), "VM web1: agent")
        assert type(made) is kind and str(made) == f"VM web1: agent: {text}"


RUN = "internal error: unable to execute QEMU agent command 'guest-exec': "


@pytest.mark.parametrize(("text", "kind"), [
    (RUN + "Command guest-exec has been disabled: the command is not allowed", GuestAgentRefused),
    (RUN + "Command guest-exec has been disabled for this instance", GuestAgentRefused),
    (RUN + "The command guest-exec has been disabled for this instance", GuestAgentRefused),
    (RUN + "The command guest-exec has not been found", GuestAgentRefused),
    (RUN + "Command guest-exec has been disabled: the agent is in frozen state", GuestAgentUnavailable),
    (RUN + "Failed to execute child process (No such file or directory)", HypervisorError),
])
def test_what_the_guest_agent_says(text: str, kind: type[BackupError]) -> None:
    made = translate_agent(libvirt_error(libvirt.VIR_ERR_INTERNAL_ERROR, text), "VM web1: guest agent: guest-exec")
    assert type(made) is kind and "VM web1" in str(made)


def test_no_agent_channel() -> None:
    for code in (libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, libvirt.VIR_ERR_OPERATION_UNSUPPORTED):
        error = libvirt_error(code, "argument unsupported: QEMU guest agent is not configured")
        assert type(translate_agent(error, "VM x")) is GuestAgentUnavailable


def test_nobody_to_connect_to() -> None:
    async def main() -> None:
        hypervisor = LibvirtHypervisor("qemu+unix:///system?socket=/nonexistent/sock")
        with pytest.raises(HypervisorError, match="cannot connect to libvirt at .*nonexistent"):
            await hypervisor.open()
        with pytest.raises(HypervisorError, match="is not open"):
            await hypervisor.domains()
        await hypervisor.close()

    asyncio.run(main())


def test_nothing_is_printed_by_libvirt(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        with pytest.raises(NotFound, match="VM nobody: Domain not found"):
            await hv.domain("nobody")

    with_hypervisor(TEST, work)
    assert capfd.readouterr().err == ""


def test_a_domain_is_found_by_name_and_uuid() -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        ((name, uuid, running),) = await hv.domains()
        assert (name, running) == ("test", True)
        info = await hv.domain(uuid)
        assert info == await hv.domain("test") and (info.name, info.uuid, info.running) == ("test", uuid, True)
        with pytest.raises(NotFound):
            await hv.domain("00000000-0000-0000-0000-000000000000")
        with pytest.raises(NotFound, match="VM 00000000.*: power off"):
            await hv.destroy("00000000-0000-0000-0000-000000000000")

    with_hypervisor(TEST, work)


def test_the_life_of_a_domain_is_told() -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        uuid = await hv.define(SMALL.format(type="test", name="new"))
        end = hv.watch(uuid, told.put_nowait)
        hv.watch("another", pytest.fail)
        await hv.start(uuid)
        await hv.start(uuid)
        assert await asyncio.wait_for(told.get(), 10) == "started"
        await hv.destroy(uuid)
        await hv.destroy(uuid)
        assert await asyncio.wait_for(told.get(), 10) == "stopped"
        end()
        end()
        await hv.start(uuid)
        await hv.destroy(uuid)
        assert told.empty()

    with_hypervisor(TEST, work)


def test_xml_that_libvirt_refuses() -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        with pytest.raises(HypervisorError, match="define VM x: "):
            await hv.define("<domain type='test'><name>x</name><memory>none</memory></domain>")
        with pytest.raises(HypervisorError, match="does not parse"):
            await hv.define("<domain")

    with_hypervisor(TEST, work)


def test_a_slow_call_does_not_stop_the_event_loop_and_has_a_deadline() -> None:
    release = threading.Event()

    async def main() -> None:
        connection = LibvirtConnection(TEST)
        await connection.open()
        try:
            call = asyncio.create_task(connection.call(lambda _: release.wait(20), "slow", timeout=0.3))
            ticks = 0
            while not call.done():
                ticks += 1
                await asyncio.sleep(0.01)
            assert ticks > 5
            with pytest.raises(HypervisorError, match="slow: libvirt did not answer within 0.3 s"):
                await call
            release.set()
        finally:
            release.set()
            await connection.close()

    asyncio.run(main())


def test_a_cancelled_call_is_over_before_its_caller_goes_on() -> None:
    """Or else the undo of a hot-plug would come before the hot-plug itself."""
    done: list[str] = []

    async def main() -> None:
        connection = LibvirtConnection(TEST)
        await connection.open()
        try:
            begun = threading.Event()

            def work(_conn: object) -> None:
                begun.set()
                time.sleep(0.2)
                done.append("attached")

            call = asyncio.create_task(connection.call(work, "attach"))
            await asyncio.to_thread(begun.wait, 10)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert done == ["attached"]
        finally:
            await connection.close()

    asyncio.run(main())


def test_closing_twice_and_never_opening() -> None:
    async def main() -> None:
        hypervisor = LibvirtHypervisor(TEST)
        await hypervisor.close()
        await hypervisor.open()
        await hypervisor.close()
        await hypervisor.close()

    asyncio.run(main())


def test_libvirtd_is_restarted(libvirt_host: Host) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        assert await hv.domains() == []
        start = libvirt_host.stop_libvirtd()
        waiting = asyncio.create_task(hv.domains())  # a question waits for the answer
        await asyncio.sleep(0)
        await asyncio.to_thread(start)
        assert await waiting == []

    with_hypervisor(libvirt_host.uri, work)


def test_a_change_that_libvirtd_did_not_survive_is_told_as_such(libvirt_host: Host) -> None:
    async def main() -> None:
        connection = LibvirtConnection(libvirt_host.uri)
        await connection.open()
        start: Callable[[], None] | None = None
        try:
            def work(conn: libvirt.virConnect) -> None:
                nonlocal start
                start = libvirt_host.stop_libvirtd()
                conn.defineXML(SMALL.format(type="qemu", name="x"))

            with pytest.raises(HypervisorLost, match="define: the connection to libvirt was lost"):
                await connection.call(work, "define")
        finally:
            assert start is not None
            start()
            await connection.close()

    asyncio.run(main())


def test_a_vm_that_stops_while_libvirtd_is_away_is_told(two_disks: Machine) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        hv.watch(two_disks.uuid, told.put_nowait)
        await asyncio.to_thread(_restart_without, two_disks)
        seen = [await asyncio.wait_for(told.get(), 60), await asyncio.wait_for(told.get(), 60)]
        assert seen == ["hypervisor-lost", "stopped"]

    two_disks.with_hypervisor(work)


def _restart_without(machine: Machine) -> None:
    import os
    import signal
    from pathlib import Path

    start = machine.host.stop_libvirtd()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(b"/usr/bin/qemu-system") and machine.uuid.encode() in words:
                os.kill(int(process.name), signal.SIGKILL)
    start()


def test_a_guest_without_an_agent(two_disks: Machine) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        assert (await hv.domain("bare")).has_agent
        with pytest.raises(GuestAgentUnavailable, match="VM bare: guest agent: guest-ping: .*not connected"):
            await hv.agent(two_disks.uuid, "guest-ping", timeout=1)
        await hv.destroy(two_disks.uuid)
        with pytest.raises(NotRunning, match="VM bare"):
            await hv.agent(two_disks.uuid, "guest-ping", timeout=1)

    two_disks.with_hypervisor(work)


def test_a_domain_is_described_from_xml_and_qemu(two_disks: Machine) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        info = await hv.domain(two_disks.uuid)
        disks = {d.target: d for d in info.disks}
        assert {name: d.size for name, d in disks.items()} == {"vda": 32 << 20, "sda": 32 << 20, "sdb": None}
        assert info.running and info.persistent and "domain-inactive.xml" in info.config and info.nvram is None
        address = disks["sda"].address
        # there is no address while the firmware has not numbered the buses
        assert disks["vda"].address is None or disks["vda"].address.pci.startswith("0000:")
        assert address is None or (address.target, address.unit) == (0, 0)
        await hv.destroy(two_disks.uuid)
        off = await hv.domain(two_disks.uuid)
        assert not off.running and [d.address for d in off.disks] == [None, None, None]
        assert {d.target: d.size for d in off.disks} == {name: d.size for name, d in disks.items()}
        await hv.undefine(two_disks.uuid)
        with pytest.raises(NotFound):
            await hv.undefine(two_disks.uuid)
        assert await hv.define(off.config["domain-inactive.xml"]) == two_disks.uuid

    two_disks.with_hypervisor(work)


def test_channels_are_plugged_and_unplugged(two_disks: Machine) -> None:
    async def work(hv: LibvirtHypervisor) -> None:
        uuid, name = two_disks.uuid, "org.vmbackupd.j1a2b3c4d.c"
        path = await hv.attach_channel(uuid, name)
        assert await hv.attach_channel(uuid, name) == path
        other = await hv.attach_channel(uuid, "org.vmbackupd.j1a2b3c4d.d0")
        reader, writer = await asyncio.open_unix_connection(path)
        writer.close()
        await writer.wait_closed()
        assert other != path and name not in two_disks.dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        await hv.detach_channel(uuid, name)
        await hv.detach_channel(uuid, name)
        assert name not in two_disks.dom.XMLDesc(0) and "j1a2b3c4d.d0" in two_disks.dom.XMLDesc(0)
        await hv.destroy(uuid)
        with pytest.raises(NotRunning, match="VM bare: channel"):
            await hv.attach_channel(uuid, name)
        await hv.detach_channel(uuid, name)

    two_disks.with_hypervisor(work)


def test_the_scratch_disk_goes_where_there_is_room(new_machine: Callable[..., Machine]) -> None:
    """To a PCI port, then to the virtio-scsi controller; without either, the error says what to add."""
    for devices, targets in ((SCSI, ["vda", "sda"]), ("", ["vda"])):
        machine = new_machine(devices, ports=0, name=f"bare{len(targets)}")

        async def work(hv: LibvirtHypervisor, machine: Machine = machine, targets: list[str] = targets) -> None:
            for number, expected in enumerate(targets):
                path = str(create(machine.dir / f"{machine.uuid}{number}"))
                assert await hv.attach_scratch(machine.uuid, path, f"vmbk-j{number}") == expected
                assert await hv.attach_scratch(machine.uuid, path, f"vmbk-j{number}") == expected
            if len(targets) == 1:
                path = str(create(machine.dir / "last"))
                with pytest.raises(HypervisorError, match="VM bare1: no free PCI port .*pcie-root-port"):
                    await hv.attach_scratch(machine.uuid, path, "vmbk-last")
            assert "vmbk-" not in machine.dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)

        machine.with_hypervisor(work)


def test_a_guest_that_does_not_let_go(new_machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    """No operating system, nobody to answer an unplug: asked again and again, then told."""
    monkeypatch.setattr(hotplug, "DETACH", 2.0)
    monkeypatch.setattr(hotplug, "DETACH_ASK_AGAIN", 0.5)
    machine = new_machine("")
    path = str(create(machine.dir / "scratch"))

    async def work(hv: LibvirtHypervisor) -> None:
        await hv.attach_scratch(machine.uuid, path, "vmbk-j1")
        with pytest.raises(HypervisorError, match="VM bare: the guest does not let go of disk .*scratch within 2 s"):
            await hv.detach_scratch(machine.uuid, path)
        await hv.destroy(machine.uuid)
        await hv.detach_scratch(machine.uuid, path)

    machine.with_hypervisor(work)


def test_a_vm_that_stops_during_an_unplug_has_let_go(new_machine: Callable[..., Machine]) -> None:
    machine = new_machine("")
    path = str(create(machine.dir / "scratch"))

    async def work(hv: LibvirtHypervisor) -> None:
        await hv.attach_scratch(machine.uuid, path, "vmbk-j1")
        detach = asyncio.create_task(hv.detach_scratch(machine.uuid, path))
        await asyncio.sleep(0.2)  # into the wait; it is right as well when that has not begun
        await hv.destroy(machine.uuid)
        await asyncio.wait_for(detach, 20)

    machine.with_hypervisor(work)
