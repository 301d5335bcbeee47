"""The guest helper in real guests: one instant over many volumes, the dead-man, and nothing left behind.

The oracle for a pass-through disk at T1 is its file on the host, copied while the guest is frozen: the snapshot that
the helper serves later must be that file byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from tests.integration.installed import helper_installed
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from tests.lab.services import until
from tests.lab.workload import Workload
from tests.unit.guest.support import Relay
from vmbackupd.errors import GuestAgentRefused, GuestHelperError, GuestHelperUnavailable
from vmbackupd.guest import client as client_module
from vmbackupd.guest import topology
from vmbackupd.guest.client import GuestHelper, open_data_channel, remove_leftovers
from vmbackupd.guest.report import GuestDevice, GuestReport
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.storage_daemon import create_qcow2
from vmbackupd.units import GiB, MiB

pytestmark = pytest.mark.lab

T = TypeVar("T")
STORE = 64 * MiB


class Rig:
    """One job's channels and scratch disk in a guest, through the hypervisor layer as a backup does it."""

    def __init__(self, hypervisor: LibvirtHypervisor, guest: Guest, directory: Path) -> None:
        self.hypervisor, self.guest, self.directory = hypervisor, guest, directory
        self.job = f"j{secrets.token_hex(4)}"
        self.control = f"org.vmbackupd.{self.job}.c"
        self.data = f"org.vmbackupd.{self.job}.d0"
        self.scratch = directory / f"{self.job}.scratch.qcow2"
        self.socket = ""
        self.helper: GuestHelper | None = None

    async def agent(self, command: str, arguments: Mapping[str, object] | None = None, timeout: float = 30.0) -> object:
        return await self.hypervisor.agent(self.guest.uuid, command, arguments, timeout=timeout)

    async def start(self, lease: float = 300.0) -> GuestHelper:
        self.socket = await self.hypervisor.attach_channel(self.guest.uuid, self.control)
        self.helper = await GuestHelper.start(
            self.agent, self.socket, vm="lab", job=self.job, channel=self.control, lease=lease
        )
        return self.helper

    async def plug_scratch(self) -> None:
        await create_qcow2(str(self.scratch), GiB)
        await self.hypervisor.attach_scratch(self.guest.uuid, str(self.scratch), f"vmbk-{self.job}")

    async def prepare(self, helper: GuestHelper, volumes: list[GuestDevice], store: int = STORE) -> None:
        prepared = await helper.prepare(
            scratch_serial=f"vmbk-{self.job}", volumes={volume.devno: store for volume in volumes}
        )
        assert [volume.device for volume in prepared] == [volume.devno for volume in volumes]
        assert all(
            made.table == volume.dm.table
            for made, volume in zip(prepared, volumes, strict=True)
            if volume.dm is not None
        )

    async def unplug(self) -> None:
        if self.helper is not None:
            await self.helper.close()
        if self.scratch.exists():
            await self.hypervisor.detach_scratch(self.guest.uuid, str(self.scratch))
        for name in (self.data, self.control):
            await self.hypervisor.detach_channel(self.guest.uuid, name)


def dm_state(guest: Guest) -> str:
    """Every device-mapper device with its table and whether it is suspended, but not how often it was opened."""
    return guest.exec(
        "dmsetup table; dmsetup info -c --noheadings -o name,uuid,suspended,tables_loaded,readonly"
    ).decode()


def processes(guest: Guest, job: str) -> list[int]:
    """The helper's processes for a job, the first one first."""
    pattern = f"[o]rg[.]vmbackupd[.]{job}[.]c"  # does not match itself in the command line of grep
    found = guest.exec(["/bin/sh", "-c", 'grep -slzxE "$0" /proc/[0-9]*/cmdline', pattern], check=False)
    return sorted(int(path.split("/")[2]) for path in found.decode().split())


def helper_traces(guest: Guest, job: str) -> str:
    """What a helper might leave in a guest."""
    left = guest.exec("ls -d /run/vmbackupd* /run/udev/rules.d/*vmbackupd* 2>/dev/null; dmsetup ls | grep vmbk; true")
    return left.decode() + " ".join(str(pid) for pid in processes(guest, job))


def io_errors(guest: Guest) -> str:
    return guest.exec("dmesg | grep -iE 'i/o error|ext4-fs error|critical|hung task' || true").decode()


def run_in_lab(lab: Lab, guest: Guest, tmp_path: Path, work: Callable[[Rig], Awaitable[T]], timeout: float = 300) -> T:
    """``work`` with a rig; afterwards nothing may be left in the guest."""
    before = dm_state(guest)

    async def main() -> T:
        hypervisor = LibvirtHypervisor(lab.libvirt_uri)
        await hypervisor.open()
        rig = Rig(hypervisor, guest, tmp_path)
        try:
            result = await asyncio.wait_for(work(rig), timeout)
            until(lambda: not helper_traces(guest, rig.job), 20, "the helper is gone", 0.2)
            assert helper_traces(guest, rig.job) == ""
            return result
        except BaseException:
            print(
                helper_traces(guest, rig.job),
                dm_state(guest),
                guest.exec("journalctl -n 40 --no-pager || true").decode(),
            )
            with contextlib.suppress(Exception):
                await rig.agent("guest-fsfreeze-thaw")
            with contextlib.suppress(Exception):
                await remove_leftovers(rig.agent, vm="lab", job=rig.job)
            raise
        finally:
            await rig.unplug()
            await hypervisor.close()

    result = asyncio.run(main())
    assert dm_state(guest) == before
    assert io_errors(guest) == ""
    return result


@contextlib.asynccontextmanager
async def frozen(rig: Rig) -> AsyncIterator[None]:
    assert await rig.agent("guest-fsfreeze-freeze")
    try:
        yield
    finally:
        await rig.agent("guest-fsfreeze-thaw")
    assert await rig.agent("guest-fsfreeze-status") == "thawed"


def disks_of(report: GuestReport, volumes: list[GuestDevice]) -> set[str]:
    return {place.disk for volume in volumes for place in topology.flatten(report, volume.devno)}


@pytest.mark.parametrize("kind", ["plain", "lvm"])
def test_one_instant(lab: Lab, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """Snapshot of every volume under the agent's freeze while a writer goes on; the LUNs are served as they were."""
    guest: Guest = request.getfixturevalue(f"{kind}_guest")
    workload = Workload(guest)
    workload.start()

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        report = await helper.probe()
        volumes = list(topology.top_volumes(report))
        names = {volume.dm.name for volume in volumes if volume.dm is not None}
        assert names == {"vgdata-data", "vgiscsi-iscsi", "vglun-lun", "vgspan-span"} | (
            {"vgroot-root"} if kind == "lvm" else set()
        )
        await rig.plug_scratch()
        await rig.prepare(helper, volumes)
        assert "vmbk" not in "".join(
            user.what for device in (await helper.probe()).devices for user in topology.live_users(report, device.devno)
        )
        luns = luns_of(guest, report)
        assert set(luns.values()) <= disks_of(report, volumes) and luns
        await helper.arm(60)
        async with frozen(rig):
            snap = await helper.snap()
            for number, path in enumerate(luns):
                shutil.copyfile(path, tmp_path / f"t1-{number}")
            done = workload.round()
        assert await helper.disarm() is False
        print(f"{kind}: suspend {snap.suspend_ms:.1f} ms, resume {snap.resume_ms:.1f} ms")
        assert abs(snap.t1 - time.time()) < 120 and snap.suspend_ms + snap.resume_ms < 5000
        await asyncio.to_thread(workload.wait, done + 20)
        await _compare(rig, helper, luns, tmp_path)
        status = await helper.status()
        assert len(status.volumes) == len(volumes) and status.boot_id == report.boot_id == helper.boot_id
        for volume in status.volumes:
            assert (
                volume.valid and volume.table_ok and volume.metadata < volume.allocated < volume.total == STORE // 512
            )
        removed = await helper.release()
        assert sorted(removed) == sorted(
            f"vmbk-{rig.job}-{number}-{part}" for number in range(len(volumes)) for part in ("real", "cow", "snap")
        )
        assert await helper.release() == []
        await asyncio.to_thread(workload.wait, workload.round() + 5)
        await helper.quit()

    try:
        run_in_lab(lab, guest, tmp_path, work)
    finally:
        workload.stop()
    workload.check()


def luns_of(guest: Guest, report: GuestReport) -> dict[Path, str]:
    """The guest's LUNs: their files on the host, and their device numbers in the guest."""
    return {
        lun.path: device.devno
        for device in report.devices
        for lun in guest.luns.values()
        if device.type == "disk" and device.serial == lun.serial
    }


async def fetch(path: str, export: str, target: Path) -> None:
    """Copy an export of the data port ``path`` into a file."""
    loop = asyncio.get_running_loop()

    def connect() -> socket.socket:
        return asyncio.run_coroutine_threadsafe(open_data_channel(path, timeout=30), loop).result()

    with Relay(target.with_suffix(".nbd"), connect) as relay:
        began = time.monotonic()
        command = ["nbdcopy", relay.uri % export.replace("#", "%23"), str(target)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    print(f"{export}: {target.stat().st_size} bytes in {time.monotonic() - began:.1f} s")
    target.with_suffix(".nbd").unlink()


async def _compare(rig: Rig, helper: GuestHelper, luns: Mapping[Path, str], directory: Path) -> None:
    """Each LUN over NBD is the file as it was; the file itself has gone on."""
    path = await rig.hypervisor.attach_channel(rig.guest.uuid, rig.data)
    await helper.serve(rig.data, {f"lun{number}": devno for number, devno in enumerate(luns.values())})
    changed = []
    for number, source in enumerate(luns):
        copy = directory / f"copy-{number}"
        await fetch(path, f"lun{number}", copy)
        assert filecmp.cmp(copy, directory / f"t1-{number}", shallow=False), f"{source} is not as it was at T1"
        changed.append(not filecmp.cmp(copy, source, shallow=False))
    assert any(changed), "nothing was written meanwhile: this proves nothing"


def test_dead_man(lab: Lab, lvm_guest: Guest, tmp_path: Path) -> None:
    """The helper is stopped in the freeze with the root volume suspended: the guest resumes and thaws by itself, and
    thaws again what is frozen after that."""

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        report = await helper.probe()
        volumes = [
            item for item in topology.top_volumes(report) if item.dm is not None and item.dm.name == "vgroot-root"
        ]
        await rig.plug_scratch()
        await rig.prepare(helper, volumes)
        pid = processes(lvm_guest, rig.job)[0]
        lvm_guest.exec("cat $(which dmsetup) $(which touch) > /dev/null; touch /before")
        await helper.arm(4)
        await rig.agent("guest-fsfreeze-freeze")
        lvm_guest.exec(f"kill -STOP {pid}; setsid dmsetup suspend --nolockfs --noflush vgroot-root > /dev/null 2>&1 &")
        began = time.monotonic()
        await asyncio.to_thread(lvm_guest.exec, "touch /after && sync /after")
        assert time.monotonic() - began > 0.5, "the guest was not frozen"
        lvm_guest.exec(f"kill -CONT {pid}")
        assert await rig.agent("guest-fsfreeze-status") == "frozen"  # the agent has not noticed
        await rig.agent("guest-fsfreeze-thaw")
        await rig.agent("guest-fsfreeze-freeze")  # late, like one that waited for a hook
        await asyncio.to_thread(lvm_guest.exec, "touch /after && sync /after")
        await rig.agent("guest-fsfreeze-thaw")
        with pytest.raises(GuestHelperError):
            await helper.snap()
        assert await helper.disarm() is True
        lvm_guest.exec("rm /before /after")
        await helper.release()
        await helper.quit()

    run_in_lab(lab, lvm_guest, tmp_path, work)


@pytest.mark.parametrize("state", ["suspended", "snapped"])
def test_lost_helper(lab: Lab, lvm_guest: Guest, tmp_path: Path, state: str) -> None:
    """A helper that hangs while a volume is suspended is ended and cleaned up after by another; after one that was
    killed the guest's own service manager cleans up, and there is nothing left for the host."""

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        volumes = list(topology.top_volumes(await helper.probe()))
        await rig.plug_scratch()
        await rig.prepare(helper, volumes)
        pid = processes(lvm_guest, rig.job)[0]
        if state == "suspended":
            lvm_guest.exec(f"kill -STOP {pid}; dmsetup suspend --nolockfs vgdata-data")
            with pytest.raises(GuestHelperUnavailable):
                await GuestHelper.reconnect(rig.socket, vm="lab", job=rig.job)
        else:
            await helper.arm(60)
            async with frozen(rig):
                await helper.snap()
            await helper.disarm()
            lvm_guest.exec(f"kill -KILL {pid}")
            until(lambda: not helper_traces(lvm_guest, rig.job), 30, "the guest has cleaned up", 0.2)
        await helper.close()
        await remove_leftovers(rig.agent, vm="lab", job=rig.job)

    run_in_lab(lab, lvm_guest, tmp_path, work)


def test_silent_host(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    """The lease ends: the helper takes everything down and goes."""

    async def work(rig: Rig) -> None:
        helper = await rig.start(lease=4)
        await rig.plug_scratch()
        await rig.prepare(helper, list(topology.top_volumes(await helper.probe())))
        await helper.close()
        until(lambda: not helper_traces(plain_guest, rig.job), 30, "the guest has cleaned up", 0.2)

    run_in_lab(lab, plain_guest, tmp_path, work)


def test_full_store_and_changed_table(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    """A store that overflows, and a table that LVM reloads, void the snapshot and nothing else."""

    async def work(rig: Rig) -> None:
        helper = await rig.start()
        report = await helper.probe()
        by_name = {item.dm.name: item for item in topology.top_volumes(report) if item.dm is not None}
        volumes = [by_name["vgdata-data"], by_name["vgspan-span"]]
        await rig.plug_scratch()
        with pytest.raises(GuestHelperError, match="scratch disk"):
            await rig.prepare(helper, volumes, 2 * GiB)
        assert "vmbk" not in dm_state(plain_guest)
        await rig.prepare(helper, volumes, MiB)
        await helper.arm(60)
        async with frozen(rig):
            await helper.snap()
        await helper.disarm()
        plain_guest.exec("dd if=/dev/urandom of=/mnt/data/big bs=1M count=16 conv=fsync && rm /mnt/data/big")
        plain_guest.exec(
            "dmsetup suspend --nolockfs vgspan-span && dmsetup load vgspan-span --table "
            f'"$(dmsetup table vmbk-{rig.job}-1-real)" && dmsetup resume vgspan-span'
        )
        data, span = (await helper.status()).volumes
        assert {data.device: (data.valid, data.table_ok), span.device: (span.valid, span.table_ok)} == {
            volumes[0].devno: (False, True),
            volumes[1].devno: (True, False),
        }
        assert len(await helper.release()) == 6
        await helper.quit()

    run_in_lab(lab, plain_guest, tmp_path, work)


def test_installed_helper(lab: Lab, plain_guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest whose agent runs nothing: refused with the package's name, and served once that is installed."""
    monkeypatch.setattr(client_module, "INSTALLED_TIMEOUT", 3.0)

    async def refused(rig: Rig) -> None:
        with pytest.raises(GuestAgentRefused, match="vmbackupd-guest"):
            await rig.start()
        with pytest.raises(GuestAgentRefused):
            await remove_leftovers(rig.agent, vm="lab", job=rig.job)

    async def served(rig: Rig) -> None:
        helper = await rig.start()
        await rig.plug_scratch()
        await rig.prepare(helper, list(topology.top_volumes(await helper.probe())))
        await helper.release()
        await helper.quit()

    with plain_guest.agent_restricted():
        run_in_lab(lab, plain_guest, tmp_path, refused)
        with helper_installed(plain_guest):
            monkeypatch.setattr(client_module, "INSTALLED_TIMEOUT", 60.0)
            run_in_lab(lab, plain_guest, tmp_path, served)


def test_guest_without_python(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    async def work(rig: Rig) -> None:
        with pytest.raises(GuestHelperUnavailable, match="python3"):
            await rig.start()

    with plain_guest.without_python():
        run_in_lab(lab, plain_guest, tmp_path, work)
