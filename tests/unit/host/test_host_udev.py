"""The host's block devices: the real ones of this machine, whatever they are, and a sysfs tree made for the purpose."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vmbackupd.host import udev
from vmbackupd.host.udev import HostEvent, UdevWatch, host_luns, identify, normalise_wwn

SYS = Path("/sys/class/block")
NO_DISK = ("loop", "ram", "zram", "sr", "fd", "dm-")
DISKS = sorted(path.name for path in SYS.iterdir()
               if not (path / "partition").exists() and not path.name.startswith(NO_DISK))


@pytest.mark.parametrize("text", ["0x600A0B80", "naa.600a0b80", " 600a0b80\n", "NAA.600A0B80"])
def test_a_wwn_has_one_spelling(text: str) -> None:
    assert normalise_wwn(text) == "600a0b80"


def test_other_designators_keep_their_text() -> None:
    assert normalise_wwn("t10.ATA     QEMU") == "t10.ata     qemu"
    assert normalise_wwn("eui.0025385b") == "0025385b"


def test_the_hosts_disks_are_all_there() -> None:
    found = {lun.name: lun for lun in host_luns()}
    assert set(DISKS) <= set(found)
    for name in DISKS:
        assert found[name].size == int((SYS / name / "size").read_text()) * 512
        assert found[name].devno == (SYS / name / "dev").read_text().strip()
        assert found[name].devnode == f"/dev/{name}"
    assert not [name for name in found if name.startswith(("loop", "ram", "zram"))]


@pytest.mark.skipif(not DISKS, reason="this machine has no disk")
def test_a_device_is_identified_through_links(tmp_path: Path) -> None:
    name = DISKS[0]
    if not Path(f"/dev/{name}").exists():
        pytest.skip(f"no node /dev/{name} here")
    link = tmp_path / "by-name"
    link.symlink_to(f"/dev/{name}")
    assert identify(str(link)) == identify(f"/dev/{name}")
    device = identify(str(link))
    assert device is not None and device.name == name and device.kind == "disk"


def test_what_is_no_block_device_has_no_identity(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert identify(str(tmp_path / "file")) is None
    assert identify(str(tmp_path / "nothing")) is None
    assert identify("/dev/null") is None


def test_scsi_serials_come_from_the_vital_product_data(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    (tmp_path / "device/vpd_pg80").write_bytes(b"\x00\x80\x00\x0abeaf11    ")
    assert udev._unit_serial(tmp_path) == "beaf11"
    assert udev._unit_serial(tmp_path / "device") is None


@pytest.mark.parametrize(("path", "bus"), [
    ("devices/pci0000:00/0000:00:02.0/virtio1/block/vda", "virtio"),
    ("devices/platform/host2/session1/target2:0:0/2:0:0:1/block/sda", "iscsi"),
    ("devices/pci0000:00/0000:00:1f.2/ata3/host2/target2:0:0/2:0:0:0/block/sdb", "ata"),
    ("devices/pci0000:00/0000:03:00.0/host7/rport-7:0-1/target7:0:0/7:0:0:0/block/sdc", "fc"),
    ("devices/pci0000:00/0000:04:00.0/nvme/nvme0/nvme0n1", "nvme"),
    ("devices/pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0/block/sdd", "usb"),
    ("devices/pci0000:00/0000:00:05.0/host0/target0:2:0/0:2:0:0/block/sda", "scsi"),
    ("devices/virtual/block/dm-0", None),
])
def test_the_bus_is_read_from_the_place_in_sysfs(tmp_path: Path, path: str, bus: str | None) -> None:
    assert udev._bus(tmp_path / path) == bus


def test_events_arrive_in_the_event_loop() -> None:
    trigger = next((path / "uevent" for path in SYS.iterdir() if path.name.startswith("loop")), None)
    if trigger is None or os.geteuid() != 0 or udev.UDEV_CONTROL.exists():
        pytest.skip("needs root, a loop device to make an event of, and no udevd that may swallow it")

    async def main() -> tuple[list[HostEvent], list[HostEvent]]:
        called: list[HostEvent] = []
        async with UdevWatch(called.append) as watch:
            with pytest.raises(TimeoutError):
                await watch.next(0.05)
            trigger.write_text("change")
            return await watch.next(10), called

    events, called = asyncio.run(main())
    assert HostEvent("change", trigger.parent.name, f"/dev/{trigger.parent.name}") in events
    assert called == events
