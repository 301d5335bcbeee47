"""LUNs that a guest reaches over two paths each, joined by multipathd: one disk, at one instant with all others, also
when a path fails while it is copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration import oracle
from tests.integration.service import Pause, Service
from tests.lab import Lab, volumes
from tests.lab.guest import Guest
from tests.lab.iscsi import Lun
from tests.lab.services import until
from tests.lab.workload import Workload
from vmbackupd.units import MiB

pytestmark = [pytest.mark.lab, pytest.mark.extended]

SIZE = 48 * MiB
CONFIGURATION = """defaults {
    find_multipaths yes
    user_friendly_names no
}
devices {
    device {
        vendor VMBKLAB
        product lun
        uid_attribute ID_SCSI_SERIAL
    }
}
"""
"""The lab's target gives LUNs of two targets the same NAA."""
LAYOUT = """set -e
vgcreate -q -q vgmulti /dev/mapper/{lvm} && lvcreate -q -q -y -Wn -l 80%FREE -n multi vgmulti
mkfs.ext4 -q /dev/vgmulti/multi && mkdir -p /mnt/multi && mount /dev/vgmulti/multi /mnt/multi
kpartx -s -a /dev/mapper/{part} && udevadm settle
part=$(lsblk -nrpo NAME,TYPE /dev/mapper/{part} | awk '$2 == "part" {{ print $1 }}')
mkfs.ext4 -q "$part" && mkdir -p /mnt/part && mount "$part" /mnt/part
mkfs.ext4 -q /dev/mapper/{bare} && mkdir -p /mnt/bare && mount /dev/mapper/{bare} /mnt/bare
"""
LOGS = {name: f"/mnt/{name}/log" for name in ("multi", "part", "bare")}


@dataclass
class Joined:
    """A guest with three LUNs (``lvm``: a volume group, ``part``: a partition, ``bare``: a filesystem) over two paths
    each, and a daemon; ``ids`` of the LUNs, ``paths`` of all of them (``sdX``)."""

    guest: Guest
    service: Service
    ids: dict[str, str]
    paths: list[str]
    directory: Path

    def backup(self, pause: Pause | None = None) -> tuple[dict[str, Any], int, int]:
        """The manifest of a backup under the writer, which waits at ``pause`` while one path of each LUN fails; the
        writer's rounds before and after it."""
        workload = Workload(self.guest, more=LOGS)
        workload.start(interval=0.02)
        try:
            before = workload.round()
            command = self.service.begin("backup", self.guest.name)
            if pause is not None:
                pause.wait(command)
                self.second_paths("offline")
                pause.go()
            backup = self.service.end(command)["backup"]
            after = workload.round() + 1
        finally:
            workload.stop()
            self.second_paths("running")
        return self.service.ctl("show", backup), before, after

    def second_paths(self, state: str) -> None:
        """Let the last path of each LUN fail, or come back."""
        lines = [f"echo {state} > /sys/block/{path}/device/state" for path in self.paths[len(self.paths) // 2 :]]
        self.guest.exec("\n".join(lines))

    def judge(self, shown: dict[str, Any], before: int, after: int) -> None:
        files = self.service.restore_files(shown["id"], f"multi-{shown['id'][-6:]}", self.directory / shown["id"][-6:])
        partition = self.directory / "partition"
        partition.write_bytes(files[self.ids["part"]].read_bytes()[MiB:])
        logical = volumes.logical_volumes([files[self.ids["lvm"]]])["vgmulti/multi"].extract(self.directory / "multi")
        disks = files | {"logical": logical, "partition": partition}
        plain = {"multi": "logical", "part": "partition", "bare": self.ids["bare"]}
        numbers = [log.last for log in oracle.judge(disks, self.directory / "raw", plain).values()]
        assert before <= min(numbers) <= max(numbers) <= after


@pytest.fixture(scope="module")
def joined(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    directory = tmp_path_factory.mktemp("multipath")
    (directory / "table").write_bytes(volumes.partition_table(SIZE))
    sources = {"lvm": None, "part": directory / "table", "bare": None}
    luns = {
        name: lab.iscsi.create_lun(f"multi-{name}", size=SIZE, source=source, target="multi-paths")
        for name, source in sources.items()
    }
    guest = lab.start_guest("big", "multi")
    try:
        paths = connect(guest, luns, lab.iscsi.second_path(luns["lvm"]))
        guest.exec(LAYOUT.format_map(join(guest, dict(zip(luns, paths, strict=False)))), timeout=120)
        with Service(lab, directory / "service") as service:
            service.ctl("repository", "init")
            ids = {name: f"iscsi:{lun.iqn}/{lun.lun}" for name, lun in luns.items()}
            yield Joined(guest, service, ids, paths, directory)
    finally:
        guest.destroy()
        lab.iscsi.delete_target(luns["lvm"].iqn)


def connect(guest: Guest, luns: Mapping[str, Lun], second: Lun) -> list[str]:
    """Log in to the LUNs' target over its two portals; the paths (``sdX``), those over the second one last."""
    first = luns["lvm"]
    guest.login(first)
    guest.login(second)
    by_path = "/dev/disk/by-path/ip-{}-iscsi-{}-lun-{}"
    nodes = [by_path.format(side.portal_guest, lun.iqn, lun.lun) for side in (first, second) for lun in luns.values()]
    guest.exec(f"until {' && '.join(f'[ -e {node} ]' for node in nodes)}; do sleep 0.1; done; udevadm settle")
    return [guest.exec(f"basename $(readlink -f {node})").decode().strip() for node in nodes]


def join(guest: Guest, paths: Mapping[str, str]) -> dict[str, str]:
    """Have multipathd join every two paths; the maps' names by those of the LUNs."""
    guest.write_file("/etc/multipath.conf", CONFIGURATION.encode())
    guest.exec("modprobe -a dm_multipath dm_service_time; systemctl unmask multipathd.service multipathd.socket")
    guest.exec("systemctl start multipathd")
    found = {}
    for name, path in paths.items():
        shown = f"lsblk -nro NAME,TYPE /dev/{path} | grep -w mpath || true"
        until(partial(guest.exec, shown), 60, f"multipathd joins the paths of {name}", 0.2)
        found[name] = guest.exec(shown).decode().split()[0]
    return found


def test_joined_paths_are_one_disk(joined: Joined) -> None:
    found = joined.service.ctl("inspect", joined.guest.name)["coverage"]
    methods = {item["id"]: item["method"] for item in found if item["decision"] == "captured"}
    assert {name: methods[ident] for name, ident in joined.ids.items()} == {
        "lvm": "guest-snapshot", "part": "guest-snapshot", "bare": "pre-copy"}
    others = [item for item in found if item["device"] in joined.paths]
    assert len(others) == 3 and all(item["decision"] == "excluded" for item in others)
    assert all(item["reason"].startswith("a path of ") for item in others)


def test_all_logs_are_at_one_instant_and_then_only_what_changed_travels(joined: Joined) -> None:
    first, *between = joined.backup()
    joined.judge(first, *between)
    second, *between = joined.backup()
    changes = {volume["id"]: volume["change"] for volume in second["volumes"]}
    assert {changes[ident]["method"] for ident in joined.ids.values()} == {"tracked"}, changes
    joined.judge(second, *between)


def test_a_path_that_fails_while_a_lun_is_copied_is_made_up_for_by_the_other(joined: Joined, tmp_path: Path) -> None:
    pause = Pause(tmp_path, "passthrough-copy:begin")
    joined.service.restart(pause.fault)
    shown, *between = joined.backup(pause)
    joined.judge(shown, *between)
