"""Between backups disks of both kinds are attached, grow, and are detached: each is an event of that disk alone, and
the others are read as far as they changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.integration.service import Service
from tests.lab import Lab, volumes
from tests.lab.guest import Guest
from vmbackupd.units import MiB

pytestmark = pytest.mark.lab

TARGET, SERIAL = "vdh", "comes-and-goes"
DEVICE = f"/dev/disk/by-id/virtio-{SERIAL}"
DISK = f"""<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='%s'/>
    <target dev='{TARGET}' bus='virtio'/><serial>{SERIAL}</serial></disk>"""
LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


@pytest.fixture
def service(lab: Lab, tmp_path: Path) -> Iterator[Service]:
    with Service(lab, tmp_path / "service") as running:
        running.ctl("repository", "init")
        yield running


def backed_up(service: Service, guest: Guest) -> tuple[str, dict[str, dict[str, Any]]]:
    """A backup, and the records of its volumes by id."""
    backup = service.ctl("backup", guest.name)["backup"]
    return backup, {volume["id"]: volume for volume in service.ctl("show", backup)["volumes"]}


def test_disks_that_come_grow_and_go(lab: Lab, service: Service, plain_guest: Guest, tmp_path: Path) -> None:
    guest, image = plain_guest, lab.dir / "comes.qcow2"
    lun = lab.iscsi.create_lun("comes", size=48 * MiB)
    ident = f"iscsi:{lun.iqn}/{lun.lun}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(32 * MiB)], check=True)
    _, first = backed_up(service, guest)
    others = first.keys()

    def require_increments(found: dict[str, dict[str, Any]]) -> None:
        for other in others:
            change = found[other]["change"]
            assert change["method"] in ("bitmap", "tracked") and change["missed"] == 0, change

    def require_content(backup: str) -> None:
        """The disk that nobody writes to now, and a file of the filesystem on the LUN, are as they are in the guest."""
        now = tmp_path / f"{backup}.now"
        subprocess.run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, now], check=True)
        for volume in (TARGET, ident):
            service.ctl("export", backup, volume, str(tmp_path / f"{backup}.{volume[:3]}"))
        assert (tmp_path / f"{backup}.{TARGET}").read_bytes() == now.read_bytes()
        held = volumes.read_file(tmp_path / f"{backup}.{ident[:3]}", "/file")
        assert held == guest.read_file("/mnt/comes/file")

    guest.domain.attachDeviceFlags(DISK % image, LIVE)
    device = guest.login(lun)
    guest.exec(f"mkfs.ext4 -q -J size=4 {device} && mkdir -p /mnt/comes && mount {device} /mnt/comes")
    try:
        guest.exec(f"until [ -e {DEVICE} ]; do sleep 0.1; done")
        guest.exec(f"dd if=/dev/urandom of={DEVICE} bs=1M count=8 conv=fsync")
        guest.exec("dd if=/dev/urandom of=/mnt/comes/file bs=64k count=32 conv=fsync")
        backup, found = backed_up(service, guest)
        assert found.keys() == others | {TARGET, ident}
        assert {found[new]["change"]["method"] for new in (TARGET, ident)} == {"full"}
        require_increments(found)
        require_content(backup)

        guest.domain.blockResize(TARGET, 40 * MiB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        guest.exec(f"dd if=/dev/urandom of={DEVICE} bs=1M seek=33 count=2 conv=fsync")
        guest.exec("dd if=/dev/urandom of=/mnt/comes/file bs=64k count=2 seek=5 conv=notrunc,fsync")
        backup, found = backed_up(service, guest)
        assert (found[TARGET]["size"], found[ident]["change"]["method"]) == (40 * MiB, "tracked")
        require_increments(found)
        require_content(backup)
    finally:
        guest.exec("umount /mnt/comes && rmdir /mnt/comes")
        guest.logout(lun)
        lab.iscsi.delete_target(lun.iqn)
        guest.domain.detachDeviceFlags(DISK % image, LIVE)
        guest.exec(f"while [ -e {DEVICE} ]; do sleep 0.1; done")
    _, found = backed_up(service, guest)
    assert found.keys() == others
    require_increments(found)
