"""Of pass-through disks only what changed is read and travels; what is said to be unchanged is audited."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration import oracle
from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.guest import Guest
from tests.lab.workload import Workload
from vmbackupd.guest.deploy import build_zipapp

pytestmark = pytest.mark.lab

CHUNK = 65536


@dataclass
class Counted:
    """A backup: what the manifest says of the LUN, and the bytes that the guest read of it meanwhile."""

    shown: dict[str, Any]
    record: dict[str, Any]
    read_in_guest: int


@dataclass
class Setup:
    service: Service
    guest: Guest
    ident: str
    device: str
    directory: Path
    done: list[Counted] = field(default_factory=list)

    def sectors_read(self) -> int:
        return int(self.guest.exec(f"cut -d' ' -f1- /sys/class/block/{self.device}/stat").split()[2])

    def backup(self, *words: str) -> Counted:
        before = self.sectors_read()
        result = self.service.ctl("backup", self.guest.name, *words)
        read = (self.sectors_read() - before) * 512
        shown = self.service.ctl("show", result["backup"])
        record = next(volume for volume in shown["volumes"] if volume["id"] == self.ident)
        self.done.append(Counted(shown, record, read))
        return self.done[-1]

    def dirty(self, chunks: int) -> None:
        """Change so many chunks of the LUN: overwrite a file in place, without a journal entry for each."""
        count = chunks * CHUNK // 4096
        self.guest.exec(f"dd if=/dev/urandom of=/mnt/iscsi/changed bs=4k count={count} conv=notrunc,fsync; sync")


@pytest.fixture(scope="module")
def setup(lab: Lab, plain_guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("increments")
    plain_guest.exec("dd if=/dev/urandom of=/mnt/iscsi/changed bs=1M count=4 conv=fsync; sync")
    lun = plain_guest.luns["iscsi"]
    device = plain_guest.exec(
        ["readlink", "-f", f"/dev/disk/by-path/ip-{lun.portal_guest}-iscsi-{lun.iqn}-lun-{lun.lun}"]
    )
    with Service(lab, directory) as service:
        service.ctl("repository", "init")
        name = device.decode().strip().removeprefix("/dev/")
        yield Setup(service, plain_guest, f"iscsi:{lun.iqn}/{lun.lun}", name, directory)
    plain_guest.exec("rm -f /mnt/iscsi/changed")


def test_cost_follows_change(setup: Setup) -> None:
    """Bytes read in the guest, over the channel and stored: all, then next to nothing, then what changed."""
    full = setup.backup()
    size = full.record["size"]
    assert full.record["change"]["method"] == "full"
    assert full.read_in_guest >= size // 2  # holes of the filesystem are read to be found

    same = setup.backup()
    assert (same.record["change"]["method"], same.record["change"]["base"]) == ("tracked", full.shown["id"])
    audited = same.record["change"]["audited"] * CHUNK
    slack = 16 * CHUNK  # superblock, journal and LVM's metadata
    assert same.record["bytes_read"] <= audited + slack
    assert same.read_in_guest <= audited + slack + 4 * CHUNK
    assert same.record["bytes_stored"] <= slack

    setup.dirty(8)
    some = setup.backup()
    assert 8 <= some.record["change"]["chunks"] <= 8 + 16
    assert some.record["bytes_read"] <= (some.record["change"]["chunks"] + some.record["change"]["audited"]) * CHUNK
    assert 8 * CHUNK <= some.record["bytes_stored"] <= 8 * CHUNK + slack
    assert some.read_in_guest <= some.record["bytes_read"] + 4 * CHUNK


def test_increments_under_load_restore_to_one_instant(setup: Setup) -> None:
    workload = Workload(setup.guest)
    workload.start(interval=0.02)
    try:
        for _ in range(2):
            before = workload.round()
            done = setup.backup()
            after = workload.round() + 1
        assert done.record["change"]["method"] == "tracked"
    finally:
        workload.stop()
    files = setup.service.restore_files(done.shown["id"], "increment", setup.directory / "restored")
    logs = oracle.judge(files, setup.directory / "raw")
    numbers = [log.last for log in logs.values()]
    assert before <= min(numbers) <= max(numbers) <= after


def test_a_full_backup_can_be_asked_for(setup: Setup) -> None:
    record = setup.backup("--full").record
    assert (record["change"]["method"], record["change"]["base"]) == ("full", None)
    assert "asked for" in record["change"]["reason"]


def test_without_a_tracker_the_guest_hashes_and_only_what_differs_travels(setup: Setup) -> None:
    setup.guest.exec("rm -rf /sys/fs/bpf/vmbackupd")
    setup.dirty(8)
    base = setup.done[-1].shown["id"]
    done = setup.backup()
    change = done.record["change"]
    assert (change["method"], change["base"]) == ("hashed", base) and change["reason"]
    assert 8 <= change["chunks"] <= 8 + 16
    assert done.record["bytes_read"] <= (change["chunks"] + change["audited"]) * CHUNK
    assert done.read_in_guest >= done.record["size"] - 4 * CHUNK  # it is the guest that reads everything
    assert setup.backup().record["change"]["method"] == "tracked"


WIPE = """
import os, sys
sys.path.insert(0, "/run/wipe.pyz")
from vmbackupd_guest_helper import bpf
for name in os.listdir("/sys/fs/bpf/vmbackupd"):
    path = "/sys/fs/bpf/vmbackupd/%s/marks" % name
    if os.path.exists(path):
        descriptor = bpf.get(path)
        info = bpf.map_info(descriptor)
        memory = bpf.map_memory(descriptor, info.value_size * info.entries)
        memory[4096:] = bytes(len(memory) - 4096)
"""


def test_the_audit_catches_a_tracker_that_misses_writes(setup: Setup) -> None:
    """64 of the chunks changed unseen; a sample of 20 % misses them all with probability 0.8 ** 64 = 6e-7."""
    setup.service.configure(changes='audit = "20 %"')
    setup.service.restart()
    try:
        setup.backup()
        setup.dirty(64)
        break_tracker(setup.guest)
        broken = setup.backup()
    finally:
        setup.service.configure()
        setup.service.restart()
    change = broken.record["change"]
    assert change["method"] == "full" and change["missed"] >= 1
    assert "not to be trusted" in change["reason"]
    assert setup.backup().record["change"]["method"] == "tracked"  # and from there on it counts again


def break_tracker(guest: Guest) -> None:
    """Wipe all marks behind the tracker's back, as if it had missed the writes."""
    guest.write_file("/run/wipe.pyz", build_zipapp())
    guest.write_file("/run/wipe.py", WIPE.encode())
    guest.exec("python3 /run/wipe.py; rm /run/wipe.py /run/wipe.pyz", timeout=120)
