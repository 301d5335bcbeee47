"""Enrolling a filesystem changes the first field of its lines in fstab and nothing else; unenrolling gives back the
bytes."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from vmbackupd.guest_helper import devices, enrollment, files, fstab, linear, mounts, mountunit
from vmbackupd.guest_helper.failures import HelperError
from vmbackupd.guest_helper.fstab import Filesystem

UUID = "3f1c2f3e-8a52-4c3d-9d5e-1c6f0b2a7e11"
DATA = Filesystem("8:17", UUID, "my data", "11223344-01", "Data")
NODES = {
    "/dev/sdb1": "8:17",
    "/dev/disk/by-id/scsi-1-part1": "8:17",
    "/dev/disk/by-path/ip-1.2.3.4:3260-lun-1-part1": "8:17",
    f"/dev/disk/by-uuid/{UUID}": "8:17",
    "/dev/disk/by-label/my data": "8:17",
    "/dev/vda1": "254:1",
    "/dev/mapper/vg-root": "253:0",
    "/dev/sdc1": "8:33",
}

OURS = [
    "/dev/sdb1", "/dev/disk/by-id/scsi-1-part1", "/dev/disk/by-path/ip-1.2.3.4:3260-lun-1-part1", f"UUID={UUID}",
    f'UUID="{UUID}"', f"UUID={UUID.upper()}", f"/dev/disk/by-uuid/{UUID}", "LABEL=my\\040data",
    "/dev/disk/by-label/my\\040data", "PARTUUID=11223344-01", "PARTLABEL=Data", "PARTLABEL='Data'", "ID=scsi-1-part1",
]  # fmt: skip
OTHERS = [
    "/dev/vda1", "/dev/sdc1", "/dev/sdz9", "/dev/mapper/vg-root", "UUID=3f1c2f3e-8a52-4c3d-9d5e-1c6f0b2a7e12", "UUID=",
    "LABEL=data", "LABEL=", "PARTUUID=11223344-02", "PARTLABEL=data", "tmpfs", "proc", "none", "10.0.0.1:/export",
    "//server/share", "overlay", "swapfile", "/swapfile", "ID=nothing",
]  # fmt: skip

DEBIAN = """\
# /etc/fstab: static file system information.
#
# Use 'blkid' to print the universally unique identifier for a
# device; this may be used with UUID= as a more robust way to name devices
# that works even if disks are added and removed. See fstab(5).
#
# systemd generates mount units based on this file, see systemd.mount(5).
# Please run 'systemctl daemon-reload' after making changes here.
#
# <file system> <mount point>   <type>  <options>       <dump>  <pass>
# / was on /dev/vda1 during installation
UUID=c0ffee00-0000-4000-8000-000000000001 /               ext4    errors=remount-ro 0       1
# swap was on /dev/vda5 during installation
UUID=c0ffee00-0000-4000-8000-000000000005 none            swap    sw              0       0
/dev/sr0        /media/cdrom0   udf,iso9660 user,noauto     0       0
@               /srv/data       ext4    defaults,_netdev,nofail  0       2
"""
RHEL = """\

#
# /etc/fstab
# Created by anaconda on Tue May  7 10:12:31 2024
#
# Accessible filesystems, by reference, are maintained under '/dev/disk/'.
# See man pages fstab(5), findfs(8), mount(8) and/or blkid(8) for more info.
/dev/mapper/rhel-root   /                       xfs     defaults        0 0
UUID=c0ffee00-0000-4000-8000-000000000002 /boot xfs     defaults        0 0
UUID=7B77-95E7          /boot/efi               vfat    umask=0077,shortname=winnt 0 2
/dev/mapper/rhel-swap   none                    swap    defaults        0 0
@\t/data\txfs\tdefaults,noatime,x-systemd.automount\t0 0
"""
CLOUD = (
    "LABEL=cloudimg-rootfs\t/\t ext4\tdiscard,errors=remount-ro\t0 1\nLABEL=UEFI\t/boot/efi\tvfat\tumask=0077\t0 1\n"
    "@ /mnt auto defaults,nofail,x-systemd.requires=cloud-init.service,comment=cloudconfig 0 2"
)
SUBVOLUMES = "".join(f"@  {path}  btrfs  subvol=/@{path}  0 0\n" for path in ("/srv", "/opt", "/home", "/var/log"))
ODD = (
    "  @ /with\\040blank   ext4\n\t@\t/with\\040blank ext3 noauto\n#@ /x ext4\n@\n\n   \n@ /srv xfs ro 0\n"
    "tmpfs /tmp tmpfs\r\n@ none"
)


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "devno_of_node", NODES.get)


@pytest.mark.parametrize("spec", OURS)
def test_every_spelling_means_the_filesystem(spec: str) -> None:
    assert fstab.means(spec, DATA)


@pytest.mark.parametrize("spec", OTHERS)
def test_other_things_do_not(spec: str) -> None:
    assert not fstab.means(spec, DATA)
    assert not fstab.means(spec, Filesystem("8:99", "", "", "", ""))


def test_names_as_udev_writes_them() -> None:
    known = {"ID_FS_UUID_ENC": UUID, "ID_FS_LABEL_ENC": "my\\x20data", "ID_PART_ENTRY_UUID": "11223344-01",
             "ID_PART_ENTRY_NAME": "Data"}  # fmt: skip
    assert fstab.of_udev(known, "8:17") == DATA
    assert fstab.of_udev({}, "8:17") == Filesystem("8:17", "", "", "", "")


@pytest.mark.parametrize("text", [DEBIAN, RHEL, CLOUD, SUBVOLUMES, ODD])
@pytest.mark.parametrize("spec", OURS)
def test_enroll_and_back_in_files_as_they_are_found(text: str, spec: str) -> None:
    round_trip(text.replace("@", spec))


def test_enroll_and_back_in_random_files() -> None:
    for seed in range(2000):
        round_trip(random_fstab(random.Random(seed)))


def random_fstab(dice: random.Random) -> str:
    """Lines of ours and of others with any blanks, comments between, and any end."""

    def blank(least: int) -> str:
        return "".join(dice.choices(" \t", k=dice.randint(least, 5)))

    lines = []
    for _ in range(dice.randint(0, 12)):
        spec = dice.choice(OURS if dice.random() < 0.4 else OTHERS)
        fields = [
            spec,
            dice.choice(["/srv", "/srv/é", "/a\\040b", "none", "/mnt/\udcff"]),
            "ext4",
            "rw,nofail",
            "0",
            "2",
        ]
        line = blank(0) + blank(1).join(fields[: dice.randint(1, 6)]) + blank(0)
        lines.append(dice.choice(["", "# a comment " + spec, line, line, line]))
    return "\n".join(lines) + dice.choice(["", "\n", "\n\n"])


def round_trip(text: str) -> None:
    """What ``apply`` and ``withdraw`` do to fstab."""
    lines = [line for line in fstab.entries(text) if fstab.means(line.spec, DATA)]
    old = {line.key: line.spec for line in lines if not fstab.by_uuid(line.spec)}
    new = linear.Linear(UUID).spec
    enrolled = enrollment.edited(text, {key: (spec, new) for key, spec in old.items()})
    for one, two in zip(text.split("\n"), enrolled.split("\n"), strict=True):
        if one != two:
            spec = one.split()[0]
            assert fstab.means(spec, DATA) and two == one.replace(spec, new, 1)
    assert all(fstab.by_uuid(line.spec) for line in fstab.entries(enrolled) if fstab.means(line.spec, DATA))
    assert enrollment.edited(enrolled, {key: (new, spec) for key, spec in old.items()}) == text


def test_bytes_that_are_no_text_come_through(tmp_path: Path) -> None:
    path = tmp_path / "fstab"
    path.write_bytes(b"/dev/sdb1 /srv/\xff\xe9 ext4\r\n# \x85\x0b\x1c\n/dev/x /y ext4")
    before = path.read_bytes()
    files.write(str(path), files.read(str(path)))
    assert path.read_bytes() == before
    assert len(fstab.entries(files.read(str(path)))) == 2


class System:
    """A guest's tree below a directory, and what was asked of its programs."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.commands = root, []  # type: Path, list[tuple[str, ...]]
        self.device: dict[str, Any] = {"name": "sdb1", "devno": "8:17", "type": "part", "holders": [], "swap": False,
                                       "fsuuid": UUID}  # fmt: skip
        self.others: list[dict[str, Any]] = []
        self.known = {"ID_FS_UUID": UUID, "ID_FS_UUID_ENC": UUID, "ID_FS_TYPE": "ext4", "ID_FS_USAGE": "filesystem"}
        monkeypatch.setattr(devices, "probe", lambda dm: {"devices": [self.device, *self.others]})
        monkeypatch.setattr(devices, "properties", lambda devno: self.known if devno == "8:17" else {})
        monkeypatch.setattr(enrollment, "command", lambda *words: self.commands.append(words))
        monkeypatch.setattr(enrollment, "_look_again", lambda uuid: self.commands.append(("look again", uuid)))

    def put(self, path: str, text: str) -> None:
        files.write(str(self.root / path), text)

    def tree(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


def test_a_line_of_fstab(system: System) -> None:
    system.put("etc/fstab", DEBIAN.replace("@", "/dev/sdb1"))
    (system.root / "etc/fstab").chmod(0o640)
    before = system.tree()
    plan = enrollment.look("/dev/sdb1", str(system.root))
    assert system.tree() == before
    enrollment.apply(plan, str(system.root))
    names, after = plan.names, system.tree()
    assert f"UUID={UUID}" in after["etc/fstab"].decode() and after["etc/fstab.vmbackupd"] == before["etc/fstab"]
    assert (system.root / "etc/fstab").stat().st_mode & 0o777 == 0o640
    assert plan.units == ["srv-data.mount"]
    drop_in = after["etc/systemd/system/srv-data.mount.d/50-vmbackupd.conf"].decode()
    assert f"After={names.unit}" in drop_in and f"Wants={names.unit}" in drop_in and "[Mount]" not in drop_in
    assert names.unit_path in after and names.rules_path in after and names.mark_path in after
    assert system.commands[0] == ("systemctl", "daemon-reload") and system.commands[-1] == ("look again", UUID)
    with pytest.raises(HelperError, match="already"):
        enrollment.look("/dev/sdb1", str(system.root))
    enrollment.withdraw(names, plan.old, plan.units, str(system.root))
    assert system.tree() == before
    assert not (system.root / "etc/vmbackupd-guest").exists()
    assert not (system.root / "etc/systemd/system/srv-data.mount.d").exists()


def test_a_mount_unit(system: System) -> None:
    system.put(
        "etc/systemd/system/srv-db.mount",
        "[Unit]\n[Mount]\n# What=/dev/x\nWhat = /dev/sdb1\nWhere=/srv/db\nOptions=ro,_netdev\n",
    )
    system.put("usr/lib/systemd/system/srv-db.mount", "[Mount]\nWhat=/dev/sdc1\nWhere=/srv/db\n")  # hidden by the other
    before = system.tree()
    plan = enrollment.look("/dev/sdb1", str(system.root))
    assert (plan.units, plan.where, plan.old) == (["srv-db.mount"], ["/srv/db"], {})
    enrollment.apply(plan, str(system.root))
    drop_in = system.tree()["etc/systemd/system/srv-db.mount.d/50-vmbackupd.conf"].decode()
    assert f"[Mount]\nWhat=/dev/disk/by-uuid/{UUID}\n" in drop_in
    enrollment.withdraw(plan.names, plan.old, plan.units, str(system.root))
    assert system.tree() == before


def test_a_drop_in_of_the_administrators_stays(system: System) -> None:
    system.put("etc/fstab", f"UUID={UUID} /srv ext4 defaults 0 2\n")
    system.put("etc/systemd/system/srv.mount.d/own.conf", "[Mount]\nTimeoutSec=7\n")
    before = system.tree()
    plan = enrollment.look("/dev/sdb1", str(system.root))
    enrollment.apply(plan, str(system.root))
    assert system.tree()["etc/fstab"] == before["etc/fstab"]
    enrollment.withdraw(plan.names, plan.old, plan.units, str(system.root))
    assert system.tree() == before


def test_what_an_administrator_changed_meanwhile_stays(system: System) -> None:
    system.put("etc/fstab", "LABEL=my\\040data /srv ext4 defaults 0 2\nPARTUUID=11223344-01 /opt ext4 ro 0 2\n")
    system.known["ID_FS_LABEL_ENC"], system.known["ID_PART_ENTRY_UUID"] = "my\\x20data", "11223344-01"
    plan = enrollment.look("/dev/sdb1", str(system.root))
    enrollment.apply(plan, str(system.root))
    system.put("etc/fstab", f"/dev/vdz /new ext4\n/dev/sdc1 /opt ext4 ro 0 2\nUUID={UUID} /srv ext4 noatime 0 2\n")
    enrollment.withdraw(plan.names, plan.old, plan.units, str(system.root))
    assert system.tree()["etc/fstab"].decode() == (
        "/dev/vdz /new ext4\n/dev/sdc1 /opt ext4 ro 0 2\nLABEL=my\\040data /srv ext4 noatime 0 2\n"
    )


def test_a_name_that_is_another_disk_now_is_not_put_back(
    system: System, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system.put("etc/fstab", "/dev/sdb1 /srv ext4 defaults 0 2\n")
    plan = enrollment.look("/dev/sdb1", str(system.root))
    enrollment.apply(plan, str(system.root))
    monkeypatch.setattr(mounts, "devno_of_node", {"/dev/sdb1": "8:33"}.get)
    enrollment.withdraw(plan.names, plan.old, plan.units, str(system.root))
    assert system.tree()["etc/fstab"] == f"UUID={UUID} /srv ext4 defaults 0 2\n".encode()
    assert "another device" in capsys.readouterr().out


def test_two_enrolled_filesystems_share_the_script(system: System) -> None:
    system.put("etc/fstab", "/dev/sdb1 /srv ext4 defaults 0 2\n")
    system.put("etc/vmbackupd-guest/ABCD-0123.json", "{}\n")
    plan = enrollment.look("/dev/sdb1", str(system.root))
    enrollment.apply(plan, str(system.root))
    enrollment.withdraw(plan.names, plan.old, plan.units, str(system.root))
    assert linear.SCRIPT in system.tree() and "etc/vmbackupd-guest/ABCD-0123.json" in system.tree()


@pytest.mark.parametrize(
    ("device", "known", "words"),
    [
        ({"type": "dm"}, {}, "as it is"),
        ({"type": "loop"}, {}, "neither a disk nor a partition"),
        ({"holders": ["253:0"]}, {}, "used by another device"),
        ({"swap": True}, {}, "no filesystem"),
        ({}, {"ID_FS_USAGE": "raid", "ID_FS_TYPE": "LVM2_member"}, "holds LVM2_member"),
        ({}, {"ID_FS_USAGE": "other", "ID_FS_TYPE": "swap"}, "holds swap"),
        ({}, {"ID_FS_UUID": ""}, "without a UUID"),
        ({}, {"ID_FS_UUID": "../../etc"}, "without a UUID"),
        ({"devno": "8:99"}, {}, "no block device"),
    ],
)
def test_what_is_no_plain_filesystem_is_refused(
    system: System, device: dict[str, Any], known: dict[str, str], words: str
) -> None:
    system.put("etc/fstab", "/dev/sdb1 /srv ext4 defaults 0 2\n")
    system.device.update(device)
    system.known.update(known)
    with pytest.raises(HelperError, match=words):
        enrollment.look("/dev/sdb1", str(system.root))


@pytest.mark.parametrize("path", ["/", "/usr", "/boot", "/boot/efi", "/etc"])
def test_what_is_mounted_before_units_run_is_refused(system: System, path: str) -> None:
    system.put("etc/fstab", f"/dev/sdb1 {path} ext4 defaults 0 2\n")
    with pytest.raises(HelperError, match="before or without"):
        enrollment.look("/dev/sdb1", str(system.root))


def test_other_reasons_to_refuse(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HelperError, match="neither /etc/fstab nor a mount unit"):
        enrollment.look("/dev/sdb1", str(system.root))
    system.put("etc/fstab", "/dev/sdb1 /srv ext4 x-initrd.mount 0 2\n")
    with pytest.raises(HelperError, match="initrd"):
        enrollment.look("/dev/sdb1", str(system.root))
    system.put("etc/fstab", "/dev/sdb1 /srv ext4 defaults 0 2\n")
    system.others.append({"name": "sdc1", "devno": "8:33", "fsuuid": UUID})
    with pytest.raises(HelperError, match="sdc1"):
        enrollment.look("/dev/sdb1", str(system.root))
    system.known["ID_FS_TYPE"] = "btrfs"
    monkeypatch.setattr(enrollment, "_btrfs_devices", lambda node: 2)
    with pytest.raises(HelperError, match="btrfs"):
        enrollment.look("/dev/sdb1", str(system.root))


def test_devices_of_a_btrfs(tmp_path: Path) -> None:
    require("mkfs.btrfs", shutil.which("mkfs.btrfs") is not None)
    paths = [tmp_path / "one", tmp_path / "two"]
    for count in (1, 2):
        for path in paths:
            path.write_bytes(b"")
            with open(path, "r+b") as file:
                file.truncate(128 << 20)
        subprocess.run(["mkfs.btrfs", "-q", "-f", *paths[:count]], check=True)
        assert enrollment._btrfs_devices(str(paths[0])) == count


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="no systemd on this machine")
def test_unit_names_are_systemds() -> None:
    paths = ["/", "/srv", "/srv/a-b", "/with blank/é", "/.hidden/x", "/srv//x/", "/mnt/.x", "/a_b:c.d", "/x@y/z\\q"]
    said = subprocess.run(["systemd-escape", "--path", *paths], capture_output=True, text=True, check=True)
    assert [mountunit.escape(path) for path in paths] == said.stdout.split()


def test_the_files_are_in_order(tmp_path: Path) -> None:
    names = linear.Linear(UUID)
    written = names.files(["srv.mount"], [])
    (tmp_path / "linear").write_text(written[linear.SCRIPT])
    subprocess.run(["sh", "-n", tmp_path / "linear"], check=True)
    (tmp_path / names.unit).write_text(written[names.unit_path].replace("/" + linear.SCRIPT, str(tmp_path / "linear")))
    if shutil.which("systemd-analyze"):
        words = ["systemd-analyze", "verify", "--man=no", tmp_path / names.unit]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert not [line for line in done.stderr.splitlines() if names.unit in line]
    assert "VMBK-" not in "".join(written.values()) + names.rules()  # such devices go with the next release
