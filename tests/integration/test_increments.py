"""Backups that build on the one before: of virtual disks, what QEMU's dirty bitmaps mark is read, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.integration import oracle
from tests.integration.service import Pause, Service
from tests.lab import Lab, volumes
from tests.lab.guest import Guest
from tests.lab.workload import Workload
from vmbackupd.units import KiB

pytestmark = pytest.mark.lab

VIRTUAL = ("vda", "vdb", "vdc")


@pytest.fixture
def service(lab: Lab, tmp_path: Path) -> Iterator[Service]:
    with Service(lab, tmp_path) as running:
        running.ctl("repository", "init")
        yield running


def changes(service: Service, backup: str) -> dict[str, dict[str, Any]]:
    """Volume id -> its ``change`` with ``bytes_read`` and ``bytes_stored``."""
    return {
        volume["id"]: {**volume["change"], "read": volume["bytes_read"], "stored": volume["bytes_stored"]}
        for volume in service.ctl("show", backup)["volumes"]
    }


def checkpoints(guest: Guest) -> set[str]:
    return {each.getName() for each in guest.domain.listAllCheckpoints()}


def exported(service: Service, backup: str, to: Path, *ids: str) -> dict[str, Path]:
    """Disks of a backup as raw files: volume id -> file; all if none is named."""
    to.mkdir()
    wanted = ids or [volume["id"] for volume in service.ctl("show", backup)["volumes"]]
    files = {ident: to / f"{number}.raw" for number, ident in enumerate(wanted)}
    for ident, path in files.items():
        service.ctl("export", backup, ident, str(path))
    return files


def data_file(service: Service, backup: str, name: str, scratch: Path) -> bytes:
    """A file of the volume on vdb, as a backup holds it."""
    raw = exported(service, backup, scratch / backup, "vdb")["vdb"]
    return volumes.read_file(volumes.logical_volumes([raw])["vgdata/data"].extract(raw.with_suffix(".ext4")), name)


def test_cost_follows_change(service: Service, lvm_guest: Guest, tmp_path: Path) -> None:
    """None, and 1 % of the disks: what is read and stored of virtual disks."""
    name = lvm_guest.name
    first = changes(service, service.ctl("backup", name)["backup"])
    for target in VIRTUAL:
        assert first[target]["method"] == "full" and first[target]["token"]
        assert first[target]["reason"] == "no earlier backup recorded what changes on it"
    total = sum(lvm_guest_size(lvm_guest, target) for target in VIRTUAL)
    idle = changes(service, service.ctl("backup", name)["backup"])
    idle_read, idle_stored = (sum(idle[target][key] for target in VIRTUAL) for key in ("read", "stored"))
    assert {idle[target]["method"] for target in VIRTUAL} == {"bitmap"}
    changed = total // 100
    lvm_guest.exec(f"dd if=/dev/urandom of=/mnt/data/fresh bs=64k count={changed >> 16} conv=fsync")
    backup = service.ctl("backup", name)["backup"]
    some = changes(service, backup)
    some_read, some_stored = (sum(some[target][key] for target in VIRTUAL) for key in ("read", "stored"))
    print(f"of {total} bytes: unchanged {idle_read} read, {idle_stored} stored; "
          f"{changed} changed: {some_read} read, {some_stored} stored")
    assert all(change["missed"] == 0 and change["audited"] > 0 for change in some.values() if change["base"])
    assert idle_read < total * 0.05 and idle_stored < total * 0.03
    assert changed <= some_read < idle_read + 3 * changed
    assert changed <= some_stored < idle_stored + 2 * changed
    assert {point.rpartition(".")[0] for point in checkpoints(lvm_guest)} == {some["vdb"]["token"]}
    full = service.ctl("backup", name, "--full")["backup"]
    assert changes(service, full)["vdb"]["reason"] == "a full backup was asked for"
    lvm_guest.exec("rm /mnt/data/fresh")
    one, other = (data_file(service, each, "/fresh", tmp_path) for each in (backup, full))
    assert one == other and len(one) == changed >> 16 << 16


def lvm_guest_size(guest: Guest, target: str) -> int:
    return int(guest.domain.blockInfo(target)[0])


def test_what_changes_between_t1_and_t2_is_changed_again_for_the_next_backup(
    service: Service, lvm_guest: Guest, tmp_path: Path
) -> None:
    """The backup holds the old content, set back from the COW store; the disk holds the new. A bitmap that begins at T2
    knows nothing of it, and the next backup would keep the old content for good."""
    name, path = lvm_guest.name, "/mnt/data/between"
    lvm_guest.exec(f"head -c {256 * KiB} /dev/zero | tr '\\0' a > {path}; sync")
    service.ctl("backup", name)
    pause = Pause(tmp_path, "t2-snapshot:begin")
    taken = Pause(tmp_path, "t2-snapshot:taken")
    service.restart(f"{pause.fault},{taken.fault}")
    command = service.begin("backup", name)
    pause.wait()
    lvm_guest.exec(f"head -c {256 * KiB} /dev/zero | tr '\\0' b | dd of={path} conv=notrunc,fsync bs=64k")
    pause.go()
    taken.wait()
    late = lvm_guest.domain.checkpointCreateXML(
        "<domaincheckpoint><name>late</name><disks><disk name='vdb' checkpoint='bitmap'/></disks>"
        "</domaincheckpoint>", 0)
    taken.go()
    between = service.end(command)["backup"]
    try:
        after = service.ctl("backup", name)["backup"]
        assert changes(service, after)["vdb"]["method"] == "bitmap"
        first, second = (data_file(service, each, "/between", tmp_path) for each in (between, after))
        assert set(first) == set(b"a") and set(second) == set(b"b")
        assert "late" in checkpoints(lvm_guest)  # somebody else's, and newer than one of ours that went
    finally:
        late.delete(0)
        lvm_guest.exec(f"rm {path}")


def test_a_backup_that_fails_leaves_the_earlier_record(service: Service, lvm_guest: Guest, tmp_path: Path) -> None:
    name = lvm_guest.name
    backup = service.ctl("backup", name)["backup"]
    before = checkpoints(lvm_guest)
    service.restart("vdisk-backup:one=error")
    service.fails("backup", name)
    assert checkpoints(lvm_guest) == before
    service.restart("vdisk-backup:one=kill")
    killed = service.begin("backup", name)
    service.wait_killed()
    killed.communicate()
    assert len(checkpoints(lvm_guest)) == 2 * len(before)
    service.start()
    assert checkpoints(lvm_guest) == before
    assert {c["base"] for c in changes(service, service.ctl("backup", name)["backup"]).values()} >= {backup}


def test_a_disk_whose_bitmap_is_lost_is_read_whole_and_the_others_are_not(service: Service, lvm_guest: Guest) -> None:
    name = lvm_guest.name
    service.ctl("backup", name)
    lost = next(each for each in lvm_guest.domain.listAllCheckpoints() if each.getName().endswith(".vdc"))
    lost.delete(0)
    found = changes(service, service.ctl("backup", name)["backup"])
    assert {target: found[target]["method"] for target in VIRTUAL} == {"vda": "bitmap", "vdb": "bitmap", "vdc": "full"}
    assert found["vdc"]["reason"] == "its dirty bitmap is missing" and found["vdc"]["token"]
    again = changes(service, service.ctl("backup", name)["backup"])
    assert again["vdc"]["method"] == "bitmap"


@pytest.mark.parametrize("kind", ["plain", "lvm"])
def test_increments_served_by_qemu_are_at_one_instant(
    request: pytest.FixtureRequest, service: Service, tmp_path: Path, kind: str
) -> None:
    guest: Guest = request.getfixturevalue(f"{kind}_guest")
    workload = Workload(guest)
    workload.start(interval=0.02)
    try:
        service.ctl("backup", guest.name, "--t2=fleece")
        backup = service.ctl("backup", guest.name, "--t2=fleece")["backup"]
    finally:
        workload.stop()
    found = changes(service, backup)
    assert {target: found[target]["method"] for target in VIRTUAL} == dict.fromkeys(VIRTUAL, "bitmap")
    shown = {volume["id"]: volume["details"].get("t2") for volume in service.ctl("show", backup)["volumes"]}
    assert shown["vdb"] == shown["vdc"] == "fleece" and shown["vda"] == ("external" if kind == "plain" else "fleece")
    oracle.judge(exported(service, backup, tmp_path / "exported"), tmp_path / "raw")
    assert "vmbk-" not in guest.domain_xml
    assert not list(service.scratch.iterdir())
    with pytest.raises(libvirt.libvirtError, match="no domain backup job"):
        guest.domain.backupGetXMLDesc(0)
