"""A plain filesystem on a partition of a LUN is enrolled: from its next mount on it can be snapshotted, it can be
mounted whatever fails, and unenrolled everything is as it was. Each test goes on where the one before it ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import oracle
from tests.integration.installed import helper_installed
from tests.integration.service import Service
from tests.lab import Lab, volumes
from tests.lab.guest import CommandFailed, Guest
from tests.lab.iscsi import Lun
from tests.lab.services import until
from tests.lab.workload import Workload
from vmbackupd.units import MiB

pytestmark = [pytest.mark.lab, pytest.mark.extended]

MOUNT = "/mnt/enrolled"
UNIT = "mnt-enrolled.mount"
UUID = "5a1f0e4c-7d0b-4f5e-9d3a-2c6b8e9f1a07"
DEVICE = f"/dev/mapper/vmbackupd-{UUID}"


@dataclass
class Plain:
    """A guest with a filesystem on the first partition of ``lun``; ``fstab`` and ``links`` as they were at first."""

    guest: Guest
    lun: Lun
    fstab: bytes = b""
    links: bytes = b""

    @property
    def part(self) -> str:
        return f"/dev/disk/by-path/ip-{self.lun.portal_guest}-iscsi-{self.lun.iqn}-lun-{self.lun.lun}-part1"

    @property
    def node(self) -> str:
        return f"iscsiadm -m node -T {self.lun.iqn} -p {self.lun.portal_guest}"

    def lower(self) -> str:
        """The partition's present name."""
        return self.guest.exec(["readlink", "-f", self.part]).decode().strip()

    def source(self) -> str:
        """What the filesystem is mounted from."""
        return self.guest.exec(f"findmnt -n -o SOURCE {MOUNT} || true").decode().strip()

    def show_links(self) -> bytes:
        return self.guest.exec("cd /dev/disk && ls by-id by-label by-partuuid by-path by-uuid")


@pytest.fixture(scope="module")
def plain(lab: Lab, plain_guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """Mounted by a line of fstab, in a guest with the helper installed."""
    image, size, guest = tmp_path_factory.mktemp("enroll") / "lun", 48 * MiB, plain_guest
    with open(image, "wb") as file:
        file.write(volumes.partition_table(size))
        file.truncate(size)
    found = Plain(guest, lab.iscsi.create_lun("enrolled", source=image))
    device = guest.login(found.lun)
    found.fstab = f"# the data\n{found.part} {MOUNT}\text4 _netdev,nofail 0 2".encode()
    guest.write_file("/etc/fstab", found.fstab)
    guest.exec(f"mkfs.ext4 -q -U {UUID} -L enrolled {device}1; udevadm settle; systemctl daemon-reload; mkdir {MOUNT}")
    found.links = found.show_links()
    guest.exec(f"mount {MOUNT} && echo kept > {MOUNT}/file")
    with helper_installed(guest):
        yield found
    guest.exec(f"umount {MOUNT}; rmdir {MOUNT}; : > /etc/fstab; systemctl daemon-reload")
    guest.logout(found.lun)


def test_enrolling_does_not_touch_the_running_mount(plain: Plain) -> None:
    guest, lower = plain.guest, plain.lower()
    guest.exec(f"vmbackup-guest enroll --dry-run {lower}")
    assert guest.read_file("/etc/fstab") == plain.fstab
    said = guest.exec(f"vmbackup-guest enroll {lower}").decode()
    assert f"umount {MOUNT} && systemctl start {UNIT}" in said
    assert plain.source() == lower
    guest.exec(f"umount {MOUNT} && mount {MOUNT}")  # by hand: as before
    assert plain.source() == lower


def test_from_its_next_mount_on_it_lies_on_its_device(plain: Plain) -> None:
    guest = plain.guest
    guest.exec(f"umount {MOUNT} && systemctl start {UNIT}")
    assert plain.source() == DEVICE
    with pytest.raises(CommandFailed, match=f"mounted at {MOUNT}"):
        guest.exec(f"vmbackup-guest unenroll {plain.lower()}")


def test_a_disk_that_appears_gets_its_device_first(plain: Plain) -> None:
    """The LUN comes as at a boot."""
    guest = plain.guest
    guest.exec(f"umount {MOUNT}; dmsetup remove {DEVICE}; {plain.node} --logout; {plain.node} --login")
    until(lambda: guest.exec(f"[ ! -e {plain.part} ] || systemctl start {UNIT}") or plain.source(), 60, "it is mounted")
    assert plain.source() == DEVICE
    shown = guest.exec(f"udevadm info -q symlink {plain.lower()}; echo; udevadm info -q symlink {DEVICE}").decode()
    lower, device = shown.split("\n\n")
    assert "by-uuid" in device and "by-label" in device
    assert "by-uuid" not in lower and "by-label" not in lower and "by-path" in lower and "by-id" in lower


def test_a_backup_snapshots_it_at_one_instant_with_all_others(lab: Lab, plain: Plain, tmp_path: Path) -> None:
    guest, ident = plain.guest, f"iscsi:{plain.lun.iqn}/{plain.lun.lun}"
    workload = Workload(guest, more={"enrolled": f"{MOUNT}/log"})
    with Service(lab, tmp_path / "service") as service:
        service.ctl("repository", "init")
        coverage = {item["id"]: item for item in service.ctl("inspect", guest.name)["coverage"]}
        assert coverage[ident]["method"] == "guest-snapshot"
        backup, window = service.backup_under(workload)
        files = service.restore_files(backup, "enrolled-again", tmp_path / "restored")
    partition = tmp_path / "partition"
    partition.write_bytes(files[ident].read_bytes()[MiB:])
    logs = oracle.judge(files | {"partition": partition}, tmp_path / "raw", {"enrolled": "partition"})
    numbers = [log.last for log in logs.values()]
    assert min(numbers) in window and max(numbers) in window
    assert plain.source() == DEVICE and b"vmbk" not in guest.exec("dmsetup ls")


def test_without_the_device_it_is_mounted_as_before_and_somebody_is_told(plain: Plain) -> None:
    guest = plain.guest
    guest.exec(f"umount {MOUNT}; dmsetup remove {DEVICE}; mv /usr/sbin/dmsetup /usr/sbin/dmsetup.away")
    try:
        guest.exec(f"{plain.node} --logout; {plain.node} --login; until [ -e {plain.part} ]; do sleep 0.2; done")
        guest.exec(f"systemctl start {UNIT}", timeout=100)
        assert plain.source() == plain.lower()
        assert b"vmbackupd-linear-" in guest.exec("systemctl --failed --no-legend")
    finally:
        guest.exec("mv /usr/sbin/dmsetup.away /usr/sbin/dmsetup")
    guest.exec(f"umount {MOUNT}; systemctl start {UNIT}")
    assert plain.source() == DEVICE and guest.read_file(f"{MOUNT}/file") == b"kept\n"
    assert not guest.exec("systemctl --failed --no-legend")


def test_unenrolled_everything_is_as_it_was(plain: Plain) -> None:
    guest = plain.guest
    assert DEVICE in guest.exec("vmbackup-guest enroll --list").decode()
    guest.exec(f"umount {MOUNT}; vmbackup-guest unenroll {plain.lower()}")
    assert guest.read_file("/etc/fstab") == plain.fstab
    left = "find /etc /run/udev/rules.d /run/vmbackupd-guest -name '*vmbackupd-*' -o -name '*vmbackupd.conf'"
    assert not guest.exec(f"{left} | grep -v -e /vmbackupd-guest@ -e 90-vmbackupd-guest || true")
    assert b"vmbackupd" not in guest.exec("dmsetup ls")
    assert plain.show_links() == plain.links
    assert guest.exec(f"readlink -f /dev/disk/by-uuid/{UUID}").decode().strip() == plain.lower()
    guest.exec(f"mount {MOUNT}")
    assert plain.source() == plain.lower()
