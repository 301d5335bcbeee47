"""Backups that build on the one before: of virtual disks, what QEMU's dirty bitmaps mark is read, and nothing else."""

from __future__ import annotations

import hashlib
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


@pytest.fixture(scope="module")
def service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One repository for all: what a test finds there is the base it builds on."""
    with Service(lab, tmp_path_factory.mktemp("increments")) as running:
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


def sizes(guest: Guest) -> int:
    """Bytes of the guest's virtual disks."""
    return sum(int(guest.domain.blockInfo(target)[0]) for target in VIRTUAL)


def test_cost_follows_change(service: Service, lvm_guest: Guest, tmp_path: Path) -> None:
    """None, and 1 % of the disks: what is read and stored of virtual disks."""
    name, total = lvm_guest.name, sizes(lvm_guest)
    first = changes(service, service.ctl("backup", name)["backup"])
    for target in VIRTUAL:
        assert first[target]["method"] == "full" and first[target]["token"]
        assert first[target]["reason"] == "no earlier backup recorded what changes on it"
    idle = changes(service, service.ctl("backup", name)["backup"])
    idle_read, idle_stored = (sum(idle[target][key] for target in VIRTUAL) for key in ("read", "stored"))
    assert {idle[target]["method"] for target in VIRTUAL} == {"bitmap"}
    changed = (total // 100) >> 16 << 16
    lvm_guest.exec(f"dd if=/dev/urandom of=/mnt/data/fresh bs=64k count={changed >> 16} conv=fsync")
    backup = service.ctl("backup", name)["backup"]
    some = changes(service, backup)
    some_read, some_stored = (sum(some[target][key] for target in VIRTUAL) for key in ("read", "stored"))
    print(f"of {total} bytes: unchanged {idle_read} read, {idle_stored} stored; "
          f"{changed} changed: {some_read} read, {some_stored} stored")
    assert all(some[target]["missed"] == 0 and some[target]["audited"] > 0 for target in VIRTUAL)
    assert idle_read < total * 0.05 and idle_stored < total * 0.03
    assert changed <= some_read < idle_read + 3 * changed
    assert changed <= some_stored < idle_stored + 2 * changed
    assert {point.rpartition(".")[0] for point in checkpoints(lvm_guest)} == {some["vdb"]["token"]}
    held = data_file(service, backup, "/fresh", tmp_path)
    assert hashlib.sha256(held).hexdigest() == lvm_guest.exec("sha256sum /mnt/data/fresh").decode().split()[0]
    lvm_guest.exec("rm /mnt/data/fresh")


def test_what_changes_between_t1_and_t2_is_changed_again_for_the_next_backup(
    service: Service, lvm_guest: Guest, tmp_path: Path
) -> None:
    """The backup holds the old content, set back from the COW store; the disk holds the new. A bitmap that begins at T2
    knows nothing of it, and the next backup would keep the old content for good."""
    name, path = lvm_guest.name, "/mnt/data/between"
    lvm_guest.exec(f"head -c {256 * KiB} /dev/zero | tr '\\0' a > {path}; sync")
    pause, taken = Pause(tmp_path, "t2-snapshot:begin"), Pause(tmp_path, "t2-snapshot:taken")
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
    service.restart()
    try:
        after = service.ctl("backup", name)["backup"]
        assert changes(service, after)["vdb"]["method"] == "bitmap"
        first, second = (data_file(service, each, "/between", tmp_path) for each in (between, after))
        assert set(first) == set(b"a") and set(second) == set(b"b")
        assert "late" in checkpoints(lvm_guest)  # somebody else's, and newer than one of ours that went
    finally:
        late.delete(0)
        lvm_guest.exec(f"rm {path}")


def test_a_backup_that_fails_leaves_the_earlier_record_and_a_lost_bitmap_costs_one_disk(
    service: Service, lvm_guest: Guest
) -> None:
    name = lvm_guest.name
    before = checkpoints(lvm_guest)
    service.restart("vdisk-backup:one=error")
    service.fails("backup", name)
    assert checkpoints(lvm_guest) == before
    service.restart("vdisk-backup:one=kill")
    service.killed_in("backup", name)
    assert len(checkpoints(lvm_guest)) == 2 * len(before)
    service.start()
    assert checkpoints(lvm_guest) == before
    lost = next(each for each in lvm_guest.domain.listAllCheckpoints() if each.getName().endswith(".vdc"))
    lost.delete(0)
    found = changes(service, service.ctl("backup", name)["backup"])
    assert {target: found[target]["method"] for target in VIRTUAL} == {"vda": "bitmap", "vdb": "bitmap", "vdc": "full"}
    assert found["vdc"]["reason"] == "its dirty bitmap is missing" and found["vdc"]["token"]


@pytest.mark.parametrize("kind", ["lvm", "plain"])
def test_increments_served_by_qemu_are_at_one_instant(
    request: pytest.FixtureRequest, service: Service, tmp_path: Path, kind: str
) -> None:
    guest: Guest = request.getfixturevalue(f"{kind}_guest")
    workload = Workload(guest)
    workload.start(interval=0.02)
    try:
        full = changes(service, service.ctl("backup", guest.name, "--full")["backup"])
        backup = service.ctl("backup", guest.name, "--t2=fleece")["backup"]
    finally:
        workload.stop()
    assert {full[target]["reason"] for target in VIRTUAL} == {"a full backup was asked for"}
    found = changes(service, backup)
    assert {target: found[target]["method"] for target in VIRTUAL} == dict.fromkeys(VIRTUAL, "bitmap")
    shown = {volume["id"]: volume["details"].get("t2") for volume in service.ctl("show", backup)["volumes"]}
    assert shown["vdb"] == shown["vdc"] == "fleece" and shown["vda"] == ("external" if kind == "plain" else "fleece")
    oracle.judge(exported(service, backup, tmp_path / "exported"), tmp_path / "raw")
    assert "vmbk-" not in guest.domain_xml
    assert not list(service.scratch.iterdir())
    with pytest.raises(libvirt.libvirtError, match="no domain backup job"):
        guest.domain.backupGetXMLDesc(0)
