"""The main job: a running guest with virtual disks and pass-through volumes is backed up and restored to one
instant."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration import oracle
from tests.integration.booted import boot_on_new_luns
from tests.integration.service import Service
from tests.lab import Lab, volumes, writer
from tests.lab.guest import MOUNTS, Guest
from tests.lab.workload import Workload
from vmbackupd.repository import LocalStorage, Repository

pytestmark = pytest.mark.lab

STANDARD = ("plain", "lvm")
FURTHER = ("trixie", pytest.param("bullseye", marks=pytest.mark.extended))
"""Debian 13 and 11: their kernels freeze and suspend differently."""


def on(*guests: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backed", guests, indirect=True, scope="module")


every_guest = on(*STANDARD, *FURTHER)
standard_guests = on(*STANDARD)
"""For what the guest's kernel has no part in."""


@dataclass
class Backed:
    """A guest that was backed up with ``--revert=both`` while its writer wrote, and what the writer had written
    around it."""

    lab: Lab
    service: Service
    guest: Guest
    backup: str
    shown: dict[str, Any]
    before: int
    after: int
    tables: tuple[str, str]
    directory: Path
    restored: dict[str, dict[str, Path]] = field(default_factory=dict)

    def restore(self, mode: str) -> dict[str, Path]:
        """Restore everything with ``--revert=mode`` to new files; returns volume id -> file. Once for each mode."""
        if mode not in self.restored:
            to = self.directory / f"restored-{mode}"
            pass_through = [volume["id"] for volume in self.shown["volumes"] if volume["kind"] == "pass-through"]
            files = {volume: to / f"{number}.raw" for number, volume in enumerate(pass_through)}
            words = [word for volume, path in files.items() for word in ("--volume", f"{volume}={path}")]
            self.service.ctl(
                "restore",
                self.backup,
                "--name",
                f"{self.guest.name}-{mode}",
                "--to",
                str(to),
                f"--revert={mode}",
                *words,
            )
            virtual = [volume["id"] for volume in self.shown["volumes"] if volume["kind"] == "virtual"]
            files |= {volume: to / f"{volume}.qcow2" for volume in virtual}
            self.restored[mode] = files
        return self.restored[mode]


@pytest.fixture(scope="module")
def backed(request: pytest.FixtureRequest, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backed]:
    guest: Guest = request.getfixturevalue(f"{request.param}_guest")
    directory = tmp_path_factory.mktemp(f"main-{request.param}")
    with Service(lab, directory) as service:
        service.ctl("repository", "init")
        tables = guest.exec("dmsetup table").decode()
        workload = Workload(guest)
        workload.start(interval=0.02)
        try:
            before = workload.round()
            result = service.ctl("backup", guest.name, "--revert=both")
            after = workload.round() + 1
        finally:
            workload.stop()
        shown = service.ctl("show", result["backup"])
        yield Backed(
            lab,
            service,
            guest,
            result["backup"],
            shown,
            before,
            after,
            (tables, guest.exec("dmsetup table").decode()),
            directory,
        )


def volume_of(shown: dict[str, Any], ident: str) -> dict[str, Any]:
    return next(volume for volume in shown["volumes"] if volume["id"] == ident)


@every_guest
def test_the_restored_disks_are_at_one_instant_within_the_backup(backed: Backed, tmp_path: Path) -> None:
    logs = oracle.judge(backed.restore("backup"), tmp_path)
    numbers = [log.last for log in logs.values()]
    assert backed.before <= min(numbers) <= max(numbers) <= backed.after


@standard_guests
def test_revert_at_backup_time_and_at_restore_time_give_the_same_bytes(backed: Backed) -> None:
    first, second = backed.restore("backup"), backed.restore("restore")
    assert first.keys() == second.keys()
    for volume in first:
        words = ["qemu-img", "compare", str(first[volume]), str(second[volume])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{volume}: {done.stdout}{done.stderr}"


@standard_guests
def test_the_t2_image_holds_later_records_and_the_reverted_one_does_not(backed: Backed, tmp_path: Path) -> None:
    later = tmp_path / "vdb.t2"
    repository = Repository.open(LocalStorage(backed.service.repository))
    record = next(volume for volume in repository.manifest(backed.backup).volumes if volume.id == "vdb")
    assert record.t2_tree is not None and record.t2_tree != record.tree
    image = repository.image(record.t2_tree)
    with later.open("wb") as out:
        for offset in range(0, image.size, 1 << 20):
            out.write(image.read(offset, min(1 << 20, image.size - offset)))
    reverted = oracle.as_raw({"vdb": backed.restore("backup")["vdb"]}, tmp_path / "t1")["vdb"]
    last = {}
    for when, disk in (("t1", reverted), ("t2", later)):
        filesystem = volumes.logical_volumes([disk])["vgdata/data"].extract(tmp_path / f"{when}.ext4")
        replay = ["e2fsck", "-E", "journal_only", "-y", str(filesystem)]  # T2 is as after a power cut
        subprocess.run(replay, capture_output=True, check=False)
        last[when] = writer.check(volumes.read_file(filesystem, "/log")).last
    assert last["t2"] > last["t1"] + 1


@every_guest
def test_the_backup_carries_its_proof(backed: Backed) -> None:
    shown = backed.shown
    assert shown["t1"] < shown["t2"]
    assert 0 < shown["freeze_ms"] <= 20000
    kinds = {volume["id"]: volume["kind"] for volume in shown["volumes"]}
    assert [kinds[ident] for ident in ("vda", "vdb", "vdc", "sda")] == ["virtual"] * 3 + ["pass-through"]
    assert sum(kind == "pass-through" for kind in kinds.values()) == 3
    methods = {volume["id"]: volume["method"] for volume in shown["volumes"]}
    assert methods["vdb"] == methods["vdc"] == methods["sda"] == "guest-snapshot"
    assert methods["vda"] == ("guest-snapshot" if backed.guest.name == "lvm" else "freeze-window")
    for volume in shown["volumes"]:
        assert volume["consistency"] == "application"  # the lab's guests have a freeze hook
        assert volume["size"] > 0 and volume["bytes_read"] > 0
        assert volume["bytes_stored"] >= 0 and volume["reverted_chunks"] >= 0


@standard_guests
def test_reverted_chunks_are_what_the_store_holds(backed: Backed) -> None:
    assert volume_of(backed.shown, "vdb")["reverted_chunks"] > 0
    stores = {item["name"]: item["exceptions"] for item in backed.shown["volume_maps"]}
    assert volume_of(backed.shown, "vdb")["reverted_chunks"] == stores["vgdata-data"]


@standard_guests
def test_the_restored_guest_boots_and_its_logs_agree(backed: Backed) -> None:
    guest = backed.guest
    booted = boot_on_new_luns(backed.lab, backed.service, guest, backed.shown, backed.directory / "boot")
    try:
        logs = Workload(guest).check(booted)
        assert len(logs) == 5
        assert backed.before <= min(log.last for log in logs.values()) <= backed.after
    finally:
        booted.destroy()


@every_guest
def test_nothing_stays_behind(backed: Backed) -> None:
    before, after = backed.tables
    assert before == after
    guest = backed.guest
    assert guest.agent("guest-fsfreeze-status") == "thawed"
    assert "org.vmbackupd.j" not in guest.domain_xml
    assert "vmbk-j" not in guest.domain_xml
    assert ".j" not in "".join(path.name for path in backed.lab.dir.glob("*.qcow2*"))
    assert not list(backed.service.scratch.iterdir())
    assert guest.exec("ls /run | grep vmbackupd || true").decode().strip() == ""
    assert guest.exec("pgrep -f vmbackupd-j || true").decode().strip() == ""
    assert not list((backed.service.state / "journal").iterdir())


@on(*FURTHER)
def test_every_filesystem_can_still_be_unmounted_mounted_frozen_and_snapshotted(backed: Backed) -> None:
    """A freeze that was counted once too often shows only now: the device cannot be mounted, or is snapshotted
    without being frozen (Linux 6.12)."""
    guest = backed.guest
    logical = [name for name in oracle.LOGICAL if guest.exec(f"ls /dev/vg{name} 2>/dev/null || true")]
    for name in logical:
        if name != "root":
            guest.exec(f"umount {MOUNTS[name]} && mount /dev/vg{name}/{name} {MOUNTS[name]}")
    assert guest.agent("guest-fsfreeze-freeze") == guest.agent("guest-fsfreeze-thaw") == len(MOUNTS)
    for name in logical:
        create = f"lvcreate -q -s -n again -l 100%FREE --config activation/monitoring=0 vg{name}/{name}"
        guest.exec(f"{create} && e2fsck -fn /dev/vg{name}/again && lvremove -q -y vg{name}/again", timeout=120)


@every_guest
def test_the_guests_hooks_ran_and_its_kernel_saw_no_error(backed: Backed) -> None:
    hooks = backed.guest.hook_log()
    assert "freeze" in hooks and hooks[-1] == "thaw"
    log = backed.guest.exec("dmesg").decode()
    assert "I/O error" not in log and "EXT4-fs error" not in log and "hung" not in log
