"""Who uses a target."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmbackupd.host.imagelocks import lock_users
from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.restore.inuse import DomainDiskUse, block_users, lun_of_name, users_of_lun, users_of_path


def use(path: str | None = None, *, name: str | None = None, chain: tuple[str, ...] = ()) -> DomainDiskUse:
    source = DiskSource("network", "raw", protocol="iscsi", name=name) if name else DiskSource("file", "raw", path=path)
    return DomainDiskUse("web1", "uuid", True, "vda", source, ((path,) if path else ()) + chain)


def test_a_disk_is_found_under_every_name(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.touch()
    os.link(image, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(image)
    uses = [use(str(image))]
    for name in ("a.img", "hard", "soft", "x/../a.img"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert users_of_path(str(tmp_path / name), uses) == uses
    assert users_of_path(str(tmp_path / "other"), uses) == []


def test_backing_files_are_in_use_too(tmp_path: Path) -> None:
    uses = [use("/nowhere/top.qcow2", chain=("/nowhere/base.qcow2",))]
    assert users_of_path("/nowhere/base.qcow2", uses) == uses


def test_a_logical_unit_is_the_same_through_every_portal() -> None:
    uses = [use(name="iqn.x:y/3")]
    assert users_of_lun("iqn.x:y", 3, uses) == uses and users_of_lun("iqn.x:y", 4, uses) == []
    assert lun_of_name("iqn.x:y") == ("iqn.x:y", 0) and lun_of_name("iqn.x:y/a") is None


def test_a_lock_of_qemu_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    fd, other = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    try:
        assert lock_users(fd) == []
        for byte in (100, 103, 201):  # shared locks on single bytes, as QEMU takes them
            fcntl.fcntl(other, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))  # F_OFD_SETLK
            assert len(lock_users(fd)) == 1
            fcntl.fcntl(other, 37, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, byte, 1, 0))
        assert lock_users(fd) == []
    finally:
        os.close(fd)
        os.close(other)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    made = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_free_device_has_no_users(loop: str) -> None:
    assert block_users(loop) == []


def test_a_mounted_device_is_in_use(loop: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", loop], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", loop, str(tmp_path / "mnt")], check=True)
    try:
        assert block_users(loop) == [f"{os.path.basename(loop)} is mounted at {tmp_path}/mnt"]
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


def test_a_swap_area_is_in_use(loop: str) -> None:
    subprocess.run(["mkswap", loop], check=True, capture_output=True)
    on = subprocess.run(["swapon", loop], capture_output=True, text=True, check=False)
    if on.returncode != 0:
        pytest.skip(f"no swap here: {on.stderr}")
    try:
        assert block_users(loop) == [f"{os.path.basename(loop)} is a swap area"]
    finally:
        subprocess.run(["swapoff", loop], check=True)


def test_what_only_the_kernel_knows_counts(loop: str) -> None:
    fd = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        assert block_users(loop) == ["the kernel says it is in use"]
    finally:
        os.close(fd)


def test_holders_and_partitions_are_looked_at(tmp_path: Path) -> None:
    """A disk with two partitions, one part of a dm device, one mounted: what sysfs and procfs show of them."""
    number = os.stat("/dev/loop0").st_rdev if os.path.exists("/dev/loop0") else None
    if number is None:
        pytest.skip("needs some block device node")
    disk = tmp_path / "sys/devices/sdq"
    for name, devno, holder in (("sdq1", "8:241", "dm-3"), ("sdq2", "8:242", None)):
        (disk / name / "holders").mkdir(parents=True)
        (disk / name / "partition").write_text("1\n")
        (disk / name / "dev").write_text(f"{devno}\n")
        if holder:
            (disk / name / "holders" / holder).touch()
    (disk / "holders").mkdir()
    (disk / "dev").write_text("8:240\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("36 35 8:242 / /srv rw,noatime - ext4 /dev/sdq2 rw\n")
    (tmp_path / "proc/swaps").write_text("Filename Type Size Used Priority\n")
    assert block_users("/dev/loop0", sys=tmp_path / "sys", proc=tmp_path / "proc") == [
        "sdq1 is part of dm-3", "sdq2 is mounted at /srv"]
