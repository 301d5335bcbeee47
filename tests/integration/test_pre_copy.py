"""Pass-through disks that no snapshot can hold: copied while the guest writes, the rest captured in the freeze, at one
instant with the snapshots of the other volumes and the hypervisor's of the virtual disks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration import oracle
from tests.integration.service import Service
from tests.lab import Lab, volumes
from tests.lab.guest import Guest
from tests.lab.workload import Workload

pytestmark = pytest.mark.lab

MiB = 1 << 20
SIZE = 96 * MiB


@dataclass
class Setup:
    """A guest with an ext4 straight on the whole of a LUN, its id, and a daemon."""

    service: Service
    guest: Guest
    ident: str
    device: str
    directory: Path

    def backup(self, workload: Workload, *words: str) -> tuple[dict[str, Any], int, int]:
        """The manifest of a backup, and the writer's rounds before and after it."""
        before = workload.round()
        result = self.service.ctl("backup", self.guest.name, *words)
        after = workload.round() + 1
        return self.service.ctl("show", result["backup"]), before, after

    def volume(self, shown: dict[str, Any]) -> dict[str, Any]:
        return next(volume for volume in shown["volumes"] if volume["id"] == self.ident)

    def judge(self, shown: dict[str, Any], before: int, after: int) -> None:
        """Restore everything and hold it against the oracle."""
        name = f"pre-{shown['id'][-8:]}"
        files = self.service.restore_files(shown["id"], name, self.directory / name)
        logs = oracle.judge(files, self.directory / f"{name}-raw", {"plainfs": self.ident})
        numbers = [log.last for log in logs.values()]
        assert before <= min(numbers) <= max(numbers) <= after


@pytest.fixture(scope="module")
def setup(lab: Lab, plain_guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    lun = lab.iscsi.create_lun("plainfs", size=SIZE)
    device = plain_guest.login(lun)
    plain_guest.exec(f"mkfs.ext4 -q -J size=8 {device} && mkdir -p /mnt/plainfs && mount {device} /mnt/plainfs")
    directory = tmp_path_factory.mktemp("precopy")
    with Service(lab, directory) as service:
        service.ctl("repository", "init")
        yield Setup(service, plain_guest, f"iscsi:{lun.iqn}/{lun.lun}", device, directory)
    plain_guest.exec("umount /mnt/plainfs")
    plain_guest.logout(lun)
    lab.iscsi.delete_target(lun.iqn)


@pytest.fixture
def workload(setup: Setup) -> Iterator[Workload]:
    workload = Workload(setup.guest, more={"plainfs": "/mnt/plainfs/log"})
    workload.start(interval=0.02)
    yield workload
    workload.stop()


def test_a_filesystem_on_a_bare_disk_is_at_one_instant_with_all_others_and_then_only_its_changes_travel(
    setup: Setup, workload: Workload
) -> None:
    first, *between = setup.backup(workload)
    record = setup.volume(first)
    assert (record["method"], record["change"]["method"]) == ("pre-copy", "full")
    assert record["change"]["token"]
    setup.judge(first, *between)

    second, *between = setup.backup(workload)
    record = setup.volume(second)
    change = record["change"]
    assert (change["method"], change["base"], change["reason"]) == ("tracked", first["id"], "")
    assert change["audited"] >= 1 and change["missed"] == 0
    assert record["bytes_read"] < SIZE // 2
    setup.judge(second, *between)


@pytest.mark.parametrize("point", ["pre-copy:one", "t1-snapshot:snapped", "passthrough-copy:one"])
def test_what_changed_before_a_killed_backup_is_in_the_next_one(setup: Setup, point: str, tmp_path: Path) -> None:
    """The marks that the killed one collected are not lost: the next backup counts from the last that was published."""
    base = setup.service.ctl("list")[-1]["id"]
    content = setup.guest.exec("head -c 524288 /dev/urandom | tee /mnt/plainfs/mark; sync")
    setup.service.restart(f"{point}=kill")
    setup.service.killed_in("backup", setup.guest.name)
    setup.service.start()
    assert setup.guest.agent("guest-fsfreeze-status") == "thawed"
    assert "org.vmbackupd.j" not in setup.guest.domain_xml
    shown = setup.service.ctl("show", setup.service.ctl("backup", setup.guest.name)["backup"])
    change = setup.volume(shown)["change"]
    assert (change["method"], change["base"], change["missed"]) == ("tracked", base, 0)
    files = setup.service.restore_files(shown["id"], f"marked-{shown['id'][-8:]}", tmp_path)
    assert volumes.read_file(files[setup.ident], "/mark") == content


def test_inspect_says_how_it_will_be_captured(setup: Setup) -> None:
    found = setup.service.ctl("inspect", setup.guest.name)
    item = next(item for item in found["coverage"] if item["id"] == setup.ident)
    assert (item["decision"], item["method"]) == ("captured", "pre-copy")
    assert "/mnt/plainfs" in item["reason"] and not found["would_fail"]


def test_a_guest_that_writes_faster_than_it_can_be_copied_is_told_how_fast_and_what_helps(setup: Setup) -> None:
    setup.service.configure(guest='capture_limit = "256 KiB"')
    setup.service.restart()
    script = "while :; do dd if=/dev/urandom of=/mnt/plainfs/load bs=1M count=24 conv=notrunc,fsync; done"
    setup.guest.exec(["systemd-run", "--collect", "--quiet", "--unit=load", "sh", "-c", script])
    try:
        code, message = setup.service.fails("backup", setup.guest.name)
    finally:
        setup.guest.exec("systemctl stop load; rm -f /mnt/plainfs/load")
        setup.service.configure()
        setup.service.restart()
    assert code == "NotConverging", message
    for words in (setup.ident, "a second", "capture_limit", "enroll"):
        assert words in message
    assert setup.guest.agent("guest-fsfreeze-status") == "thawed"
    assert "org.vmbackupd.j" not in setup.guest.domain_xml
