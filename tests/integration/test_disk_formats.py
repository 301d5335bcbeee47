"""Guests whose virtual disks are no qcow2: raw, VMDK and VHD images, and a disk on the network, which QEMU serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from tests.integration import oracle
from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.workload import Workload

pytestmark = pytest.mark.lab


@pytest.fixture
def service(lab: Lab, tmp_path: Path) -> Iterator[Service]:
    with Service(lab, tmp_path) as running:
        running.ctl("repository", "init")
        yield running


def test_raw_vmdk_and_vhd_images_are_captured_and_restored_like_qcow2(
    lab: Lab, service: Service, tmp_path: Path
) -> None:
    formats = {"vda": "raw", "vdb": "vmdk", "vdc": "vpc"}
    guest = lab.start_guest("plain", "formats", formats=formats)
    try:
        images = {target: path.name for target, path in guest.disks.items()}
        backup, _ = service.backup_under(Workload(guest))
        shown = {volume["id"]: volume for volume in service.ctl("show", backup)["volumes"]}
        for target, form in formats.items():
            assert shown[target]["details"]["format"] == form and shown[target]["details"]["t2"] == "external"
            assert shown[target]["change"]["reason"] == f"its image is {form}, which keeps no dirty bitmap"
        restored = service.restore_files(backup, "formats-again", tmp_path / "restored")
        oracle.judge(restored, tmp_path / "raw")
        root = ElementTree.fromstring(
            lab.connection.lookupByName("formats-again").XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        drivers = {disk.find("target").get("dev"): disk.find("driver").get("type")  # type: ignore[union-attr]
                   for disk in root.iterfind("devices/disk")}
        assert [drivers[target] for target in formats] == ["qcow2"] * 3
        live = ElementTree.fromstring(guest.domain_xml)
        for target, form in formats.items():  # the guest runs on its own images again
            disk = live.find(f"devices/disk/target[@dev='{target}']/..")
            assert disk is not None and disk.find("driver").get("type") == form  # type: ignore[union-attr]
            assert disk.find("source").get("file", "").endswith(images[target])  # type: ignore[union-attr]
    finally:
        guest.destroy()


def test_a_disk_that_qemu_reaches_over_the_network_is_served_with_its_group(
    lab: Lab, service: Service, tmp_path: Path
) -> None:
    """vdb has no file to put an overlay beside, so vdc and the COW stores are cut with it by QEMU's backup job."""
    guest = lab.start_guest("plain", "network", formats={"vdb": "iscsi"})
    try:
        assert "uncovered" in str(service.fails("backup", guest.name, "--t2=external"))
        backup, _ = service.backup_under(Workload(guest))
        shown = {volume["id"]: volume for volume in service.ctl("show", backup)["volumes"]}
        assert {target: shown[target]["details"]["t2"] for target in ("vda", "vdb", "vdc")} == {
            "vda": "external", "vdb": "fleece", "vdc": "fleece"}
        assert shown["vdb"]["change"]["reason"] == "its image is raw, which keeps no dirty bitmap"
        oracle.judge(service.restore_files(backup, "network-again", tmp_path / "restored"), tmp_path / "raw")
        assert "vmbk-" not in guest.domain_xml and not list(service.scratch.iterdir())
    finally:
        guest.destroy()
