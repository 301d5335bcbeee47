"""The main job on a guest that no libvirt runs: one instant over virtual disks and pass-through volumes, increments by
QEMU's bitmaps, recovery, and a restore that can be started from its command."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration import oracle
from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.iscsi import Lun
from tests.lab.qemu import PlainGuest, monitor
from tests.lab.workload import Workload

pytestmark = pytest.mark.lab

VIRTUAL = ("vda", "vdb", "vdc")


@pytest.fixture(scope="module")
def service(lab: Lab, unmanaged_guest: PlainGuest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    machine = {f"machines.{unmanaged_guest.name}": f'qmp = "{unmanaged_guest.qemu.qmp}"'}
    with Service(lab, tmp_path_factory.mktemp("unmanaged"), hypervisor='uri = "qmp:"', **machine) as running:
        running.ctl("repository", "init")
        yield running


def written(guest: PlainGuest, service: Service, *options: str) -> tuple[dict[str, Any], range]:
    """A backup while the guest's writer writes, and the records that the restored logs may end with."""
    backup, window = service.backup_under(Workload(guest), *options)
    return service.ctl("show", backup), window


def restored(service: Service, shown: dict[str, Any], to: Path) -> dict[str, Path]:
    """All volumes restored to files: volume id -> file."""
    ids = {kind: [volume["id"] for volume in shown["volumes"] if volume["kind"] == kind]
           for kind in ("virtual", "pass-through")}
    files = {ident: to / f"{number}.raw" for number, ident in enumerate(ids["pass-through"])}
    words = [word for ident, path in files.items() for word in ("--volume", f"{ident}={path}")]
    service.ctl("restore", shown["id"], "--to", str(to), *words)
    return files | {ident: to / f"{ident}.qcow2" for ident in ids["virtual"]}


def judge(service: Service, shown: dict[str, Any], records: range, directory: Path) -> None:
    logs = oracle.judge(restored(service, shown, directory / "restored"), directory / "raw")
    assert all(log.last in records for log in logs.values())


def nothing_left(guest: PlainGuest, service: Service) -> None:
    assert guest.agent("guest-fsfreeze-status", timeout=60) == "thawed"
    with monitor(guest.qemu.own) as own:
        nodes = own.execute("query-named-block-nodes")
        assert not [node["node-name"] for node in nodes if node["node-name"].startswith("vmbk")]
        assert own.execute("query-jobs") == [] and own.execute("query-block-exports") == []
        channels = [item["label"] for item in own.execute("query-chardev")]
        assert not [label for label in channels if label.startswith("org.vmbackupd.j")]
        files = {node["file"] for node in nodes if node["drv"] == "qcow2"}
    assert files == {str(guest.disks[target]) for target in VIRTUAL}
    assert not [path for path in guest.lab.dir.iterdir() if ".j" in path.name or path.name.startswith("org.vmbackupd")]
    assert not list(service.scratch.iterdir()) and not list((service.state / "journal").iterdir())
    assert guest.exec("ls /run | grep vmbackupd || true").decode().strip() == ""


def test_a_backup_is_one_instant_and_leaves_nothing(
    unmanaged_guest: PlainGuest, service: Service, tmp_path: Path
) -> None:
    machines = service.ctl("machines")
    assert [(each["name"], each["uuid"]) for each in machines] == [(unmanaged_guest.name, unmanaged_guest.uuid)]
    tables = unmanaged_guest.exec("dmsetup table")
    shown, records = written(unmanaged_guest, service)
    print(f"frozen for {shown['freeze_ms']} ms")
    methods = {volume["id"]: (volume["kind"], volume["method"]) for volume in shown["volumes"]}
    assert methods["vda"] == ("virtual", "freeze-window") and methods["vdb"] == ("virtual", "guest-snapshot")
    assert methods["sda"] == ("pass-through", "guest-snapshot")
    judge(service, shown, records, tmp_path)
    assert unmanaged_guest.exec("dmsetup table") == tables
    nothing_left(unmanaged_guest, service)


@pytest.mark.parametrize("t2", ["external", "fleece"])
def test_the_next_backup_reads_what_changed(
    unmanaged_guest: PlainGuest, service: Service, tmp_path: Path, t2: str
) -> None:
    service.ctl("backup", unmanaged_guest.name)
    shown, records = written(unmanaged_guest, service, f"--t2={t2}")
    for volume in shown["volumes"]:
        if volume["id"] in VIRTUAL:
            assert volume["change"]["method"] == "bitmap", volume["change"]
            assert volume["bytes_read"] < volume["size"]
    judge(service, shown, records, tmp_path)
    nothing_left(unmanaged_guest, service)


@pytest.mark.parametrize("point", ["t1-snapshot:snapped", "t2-snapshot:taken", "vdisk-backup:one"])
def test_a_daemon_that_dies_cleans_up_when_it_is_back(
    unmanaged_guest: PlainGuest, service: Service, point: str
) -> None:
    service.restart(f"{point}=kill")
    service.killed_in("backup", unmanaged_guest.name)
    service.start()
    nothing_left(unmanaged_guest, service)


def test_the_restored_machine_starts_from_its_command(
    unmanaged_guest: PlainGuest, service: Service, tmp_path: Path
) -> None:
    """As a person would: the LUNs that the command cannot know, and what two machines cannot share, changed by hand."""
    guest, lab = unmanaged_guest, unmanaged_guest.lab
    shown, records = written(guest, service)
    luns = {
        volume["id"]: lab.iscsi.create_lun(
            f"unmanaged-r{number}", size=volume["size"],
            target=f"unmanaged-restored{'' if volume['id'].startswith('iscsi') else '-lun'}")
        for number, volume in enumerate(sorted(shown["volumes"], key=lambda volume: str(volume["id"])))
        if volume["kind"] == "pass-through"
    }
    words = [word for ident, lun in luns.items() for word in ("--volume", f"{ident}={lun.uri}")]
    plan = service.ctl("restore", shown["id"], "--name", "copy", "--to", str(tmp_path / "copy"), *words)
    assert plan["domain"] is None and plan["command"]["path"] == str(tmp_path / "copy/copy.start")
    assert any("volume sda: put iscsi://" in note for note in plan["notes"])
    script = Path(plan["command"]["path"]).read_text()
    copy = Copy(guest, script, luns, tmp_path / "copy")
    try:
        copy.wait_agent()
        logs = Workload(guest).check(copy)
        assert len(logs) == 5 and all(log.last in records for log in logs.values())
    finally:
        copy.destroy()


class Copy(PlainGuest):
    """The machine that a restored command starts."""

    def __init__(self, original: PlainGuest, script: str, luns: dict[str, Lun], directory: Path) -> None:
        self.lab, self.name, self.uuid = original.lab, "copy", str(uuid.uuid4())
        self.console_path, self.disks, self.luns = self.lab.dir / "copy.console", {}, luns
        self._agent = None
        text = script.partition("exec ")[2].replace("\\\n", "")
        text = text.replace(original.uuid, self.uuid)
        text = text.replace(f"{self.lab.dir}/{original.name}.", f"{self.lab.dir}/copy.")
        inside = next(lun.iqn for ident, lun in luns.items() if ident.startswith("iscsi"))
        text = text.replace(original.luns["iscsi"].iqn, inside)
        old = original.luns["lun"]
        text = text.replace(f"file.target={old.iqn},file.lun={old.lun}",
                            f"file.target={luns['sda'].iqn},file.lun={luns['sda'].lun}")
        self.qemu = original.qemu.copy("copy", shlex.split(text))
        for target in VIRTUAL:
            assert f"{directory}/{target}.qcow2" in text
        self.qemu.start()
