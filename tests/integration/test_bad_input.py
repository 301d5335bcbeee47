"""Bad input gets a clear error of its own name before anything is touched."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.service import Pause, Service
from tests.lab import Lab
from tests.lab.guest import Guest

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(lab, tmp_path_factory.mktemp("input")) as service:
        service.ctl("repository", "init")
        yield service


def test_unknown_vm(service: Service) -> None:
    code, message = service.fails("backup", "nosuchvm")
    assert code == "NotFound" and "nosuchvm" in message


def test_vm_that_is_off(lab: Lab, service: Service) -> None:
    domain = lab.connection.defineXML(
        "<domain type='qemu'><name>off</name><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    try:
        code, message = service.fails("backup", "off")
        assert code == "NotRunning" and "off" in message
    finally:
        domain.undefine()


def test_repository_that_is_missing(service: Service, plain_guest: Guest) -> None:
    away = service.repository.with_name("away")
    service.repository.rename(away)
    try:
        code, message = service.fails("backup", plain_guest.name)
        assert code == "RepositoryMissing" and "repository init" in message
    finally:
        away.rename(service.repository)


def test_unknown_backup(service: Service) -> None:
    assert service.fails("show", "nosuchbackup")[0] == "NotFound"
    assert service.fails("restore", "nosuchbackup", "--to", "/nonexistent")[0] == "NotFound"


def test_usage_errors_end_with_2(service: Service) -> None:
    assert service.run("backup").returncode == 2
    assert service.run("backup", "x", "--revert=never").returncode == 2


def test_agent_that_forbids_guest_exec(service: Service, plain_guest: Guest) -> None:
    with plain_guest.agent_restricted():
        code, message = service.fails("backup", plain_guest.name)
    assert code == "GuestAgentRefused" and "vmbackupd-guest" in message


def test_guest_without_an_agent(service: Service, plain_guest: Guest) -> None:
    plain_guest.exec("systemctl stop qemu-guest-agent")
    try:
        code, message = service.fails("backup", plain_guest.name)
    finally:
        plain_guest.exec("systemctl start qemu-guest-agent")
        plain_guest.wait_agent()
    assert code == "GuestAgentUnavailable" and plain_guest.name in message


def test_guest_without_python(service: Service, plain_guest: Guest) -> None:
    with plain_guest.without_python():
        code, message = service.fails("backup", plain_guest.name)
    assert code == "GuestHelperUnavailable" and "python3" in message


def test_cow_store_that_overflows(service: Service, plain_guest: Guest, tmp_path: Path) -> None:
    pause = Pause(tmp_path, "passthrough-copy:begin")
    service.configure(scratch='size = "4 MiB"')
    service.restart(pause.fault)
    try:
        command = service.begin("backup", plain_guest.name)
        pause.wait()
        plain_guest.exec("dd if=/dev/urandom of=/mnt/data/x bs=1M count=12 conv=fsync; rm /mnt/data/x; sync")
        pause.go()
        error = service.end(command, status=1)["error"]
        assert error["code"] == "SnapshotLost" and "vgdata-data" in error["message"] and "full" in error["message"]
    finally:
        service.configure()
        service.restart()
    plain_guest.exec("touch /mnt/data/.probe && rm /mnt/data/.probe")  # the guest did not suffer


def test_uncovered_volume_fails_the_backup_unless_allowed_by_name(
    lab: Lab, service: Service, plain_guest: Guest
) -> None:
    """A LUN that nothing uses can only be copied beforehand, and is too large for the guest's kernel to track."""
    lun = lab.iscsi.create_lun("huge", size=8 << 40)
    device = plain_guest.login(lun)
    try:
        code, message = service.fails("backup", plain_guest.name)
        ident = f"iscsi:{lun.iqn}/{lun.lun}"
        assert code == "UncoveredVolume" and ident in message and device in message and "kernel memory" in message
        result = service.ctl("backup", plain_guest.name, "--allow-uncovered", ident, status=3)
        assert result["uncovered"] == [ident]
        shown = service.ctl("show", result["backup"])
        assert ident not in [volume["id"] for volume in shown["volumes"]]
        assert [item["decision"] for item in shown["coverage"] if item["id"] == ident] == ["allowed"]
    finally:
        plain_guest.logout(lun)


def test_a_disk_that_appears_between_inspect_and_t1_is_noticed(
    lab: Lab, service: Service, plain_guest: Guest, tmp_path: Path
) -> None:
    lun = lab.iscsi.create_lun("late", size=64 << 20)
    pause = Pause(tmp_path, "prepare:end")
    service.restart(pause.fault)
    try:
        command = service.begin("backup", plain_guest.name)
        pause.wait()
        plain_guest.login(lun)
        pause.go()
        error = service.end(command, status=1)["error"]
        assert error["code"] == "TopologyChanged" and lun.iqn in error["message"]
    finally:
        plain_guest.logout(lun)
        service.restart()


def test_a_table_that_is_reloaded_voids_the_snapshot(service: Service, plain_guest: Guest, tmp_path: Path) -> None:
    pause = Pause(tmp_path, "passthrough-copy:begin")
    service.restart(pause.fault)
    try:
        command = service.begin("backup", plain_guest.name)
        pause.wait()
        plain_guest.exec("lvchange --refresh vgdata/data")  # what lvextend, pvmove and others do on their way
        pause.go()
        error = service.end(command, status=1)["error"]
        assert error["code"] == "SnapshotLost" and "vgdata-data" in error["message"]
    finally:
        service.restart()


def test_a_disk_that_the_guest_has_lost_is_named(service: Service, plain_guest: Guest) -> None:
    told = plain_guest.exec("umount /mnt/iscsi; dmsetup deps -o devname vgiscsi-iscsi").decode()  # (sdb)
    device = told.rpartition("(")[2].partition(")")[0]
    state = f"/sys/block/{device}/device/state"
    try:
        plain_guest.exec(f"echo offline > {state}")
        code, message = service.fails("backup", plain_guest.name)
    finally:
        plain_guest.exec(f"echo running > {state}; mount /dev/vgiscsi/iscsi /mnt/iscsi")
    assert code == "GuestHelper"
    for words in (plain_guest.name, "vgiscsi-iscsi", device, "offline"):
        assert words in message
    assert "vmbk" not in plain_guest.exec("dmsetup ls").decode()


def test_repository_that_is_full(lab: Lab, service: Service, plain_guest: Guest, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    try:
        service.configure(repository=f'path = "{tmp_path}/repository"')
        service.restart()
        service.ctl("repository", "init")
        code, message = service.fails("backup", plain_guest.name)
        assert code == "RepositoryFull" and str(tmp_path) in message
        assert service.ctl("list") == []
    finally:
        service.configure()
        service.restart()
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_inspect_shows_every_device(service: Service, plain_guest: Guest) -> None:
    shown = service.ctl("inspect", plain_guest.name)
    decisions = {item["id"]: (item["kind"], item["method"], item["decision"]) for item in shown["coverage"]}
    assert decisions["vda"] == ("virtual", "freeze-window", "captured")
    assert decisions["vdb"] == ("virtual", "guest-snapshot", "captured")
    assert decisions["sda"] == ("pass-through", "guest-snapshot", "captured")
    assert sum(item[0] == "pass-through" and item[2] == "captured" for item in decisions.values()) == 3
