"""The restored domain's definition: new where two domains would collide, the same where the guest can see it."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import libvirt
import pytest

from tests.unit.restore.definitions import ACTIVE, INACTIVE
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.model import Consistency, Method, VolumeKind, VolumeRecord
from vmbackupd.restore.address import IscsiTarget, Target, TargetKind
from vmbackupd.restore.disks import PlacedVolume
from vmbackupd.restore.domain import Rewritten, nvram_of, rewrite, tpm_of

UUID = "0f0e0d0c-0b0a-4909-8807-060504030201"
LUN = Target(TargetKind.ISCSI, iscsi=IscsiTarget("192.0.2.9", 3261, "iqn.2024-01.org.example:new:1", 5))


def volume(name: str, place: Target | None, kind: VolumeKind = VolumeKind.VIRTUAL, **details: object) -> PlacedVolume:
    return PlacedVolume(VolumeRecord(name, kind, Method.GUEST_SNAPSHOT, Consistency.FILESYSTEM, 1 << 30, "tree",
                                     details=details), place)


def place(lun: Target | None = LUN) -> list[PlacedVolume]:
    return [volume("vda", Target(TargetKind.QCOW2, "/new/vda.qcow2")),
            volume("vdb", Target(TargetKind.RAW, "/new/vdb.raw")),
            volume("sda", lun, VolumeKind.PASS_THROUGH, target="sda"),
            volume("iscsi:iqn.x:in-guest/1", Target(TargetKind.RAW, "/new/lun.raw"), VolumeKind.PASS_THROUGH)]


def rewritten(xml: str = INACTIVE, volumes: list[PlacedVolume] | None = None,
              nvram: str | None = "/new/web2_VARS.fd") -> tuple[Element, Rewritten]:
    result = rewrite(xml, name="web2", uuid=UUID, volumes=place() if volumes is None else volumes, nvram=nvram)
    return ElementTree.fromstring(result.xml), result


def disk(root: Element, dev: str) -> Element:
    found = [item for item in root.iterfind("devices/disk") if item.find(f"target[@dev='{dev}']") is not None]
    assert len(found) == 1
    return found[0]


def attributes(element: Element, path: str) -> dict[str, str]:
    found = element.find(path)
    assert found is not None
    return found.attrib


def test_nothing_of_the_original_is_shared() -> None:
    root, result = rewritten()
    text = ElementTree.tostring(root, encoding="unicode")
    for old in ("6c5bbd4c", "43dc0cf8", "52:54:00:aa", "/srv/", "/run/web1", "/var/log", "web1_VARS", "web1-lan",
                "domain-web1", "vmbk-", "org.vmbackupd", "5905", "0x3b", "golden", "seclabel", "'42'", '"42"'):
        assert old not in text, old
    assert root.findtext("name") == "web2" and root.findtext("uuid") == UUID
    assert root.findtext("sysinfo/system/entry") == UUID
    assert root.find("genid") is not None and not (root.findtext("genid") or "").strip()
    assert result.attached == {"vda", "vdb", "sda"}


def test_what_the_guest_sees_stays() -> None:
    root, _ = rewritten()
    vda = disk(root, "vda")
    assert attributes(vda, "address")["bus"] == "0x04" and vda.findtext("serial") == "system"
    assert attributes(vda, "boot") == {"order": "1"}
    assert attributes(vda, "driver") == {"name": "qemu", "type": "qcow2", "cache": "none", "discard": "unmap"}
    assert attributes(disk(root, "sda"), "address")["type"] == "drive"
    assert root.findtext("title") == "Web server" and b"debian.org/debian/12" in ElementTree.tostring(root)
    assert len(root.findall("devices/interface")) == 2
    assert attributes(root, "devices/interface/address")["bus"] == "0x01"


def test_each_disk_points_to_its_target() -> None:
    root, _ = rewritten()
    assert disk(root, "vda").get("type") == "file"
    assert attributes(disk(root, "vda"), "source") == {"file": "/new/vda.qcow2"}
    vdb = disk(root, "vdb")  # was a block device
    assert vdb.get("type") == "file" and attributes(vdb, "driver")["type"] == "raw"
    lun = disk(root, "sda")
    assert (lun.get("type"), lun.get("device")) == ("network", "lun")
    assert attributes(lun, "source") == {"protocol": "iscsi", "name": "iqn.2024-01.org.example:new:1/5"}
    assert attributes(lun, "source/host") == {"name": "192.0.2.9", "port": "3261"}
    assert attributes(lun, "source/initiator/iqn")["name"] == "iqn.2024-01.org.example:host"


def test_a_lun_on_a_block_device_stays_a_lun() -> None:
    root, _ = rewritten(volumes=place(Target(TargetKind.BLOCK, "/dev/disk/by-id/wwn-0x5")))
    lun = disk(root, "sda")
    assert (lun.get("type"), lun.get("device")) == ("block", "lun")
    assert attributes(lun, "source") == {"dev": "/dev/disk/by-id/wwn-0x5"}


def test_a_lun_on_a_file_becomes_a_disk() -> None:
    root, result = rewritten(volumes=place(Target(TargetKind.RAW, "/new/sda.raw")))
    assert (disk(root, "sda").get("type"), disk(root, "sda").get("device")) == ("file", "disk")
    assert any("ordinary disk" in note for note in result.notes)


@pytest.mark.parametrize("record", [
    volume("iscsi:iqn.2024-01.org.example:d/2", LUN, VolumeKind.PASS_THROUGH),
    volume("wwn:6001405abc", LUN, VolumeKind.PASS_THROUGH, target="sda"),
])
def test_a_lun_is_found_by_its_target_or_its_identity(record: PlacedVolume) -> None:
    _, result = rewritten(volumes=[record])
    assert result.attached == {record.record.id}


def test_a_guest_device_that_happens_to_have_a_disks_name_is_not_that_disk() -> None:
    _, result = rewritten(volumes=[volume("sda", LUN, VolumeKind.PASS_THROUGH, target=None)])
    assert not result.attached


def test_what_was_not_restored_is_not_there() -> None:
    volumes = place(None)
    root, result = rewritten(volumes=volumes)
    devs = [attributes(item, "target")["dev"] for item in root.iterfind("devices/disk")]
    assert devs == ["vda", "vdb", "sdb"]
    assert any("sda" in note and "left out" in note for note in result.notes)
    assert any("vdc" in note and "not in the backup" in note for note in result.notes)
    assert disk(root, "sdb").find("source") is None and any("debian.iso" in note for note in result.notes)


def test_each_interface_gets_its_own_new_address() -> None:
    root, result = rewritten()
    new = [item.get("address", "") for item in root.iterfind("devices/interface/mac")]
    assert len(set(new)) == 2 and all(mac.startswith("52:54:00:") for mac in new)
    assert result.macs == (("52:54:00:aa:bb:cc", new[0]), ("52:54:00:aa:bb:cd", new[1]))
    same = iter(["52:54:00:00:00:01", "52:54:00:00:00:01", "52:54:00:00:00:02"])
    assert [pair[1] for pair in rewrite(INACTIVE, name="n", uuid=UUID, volumes=place(), nvram=None,
                                        mac=lambda: next(same)).macs] == ["52:54:00:00:00:01", "52:54:00:00:00:02"]


def test_ports_and_sockets_are_automatic() -> None:
    root, result = rewritten()
    serial, console = root.find("devices/serial"), root.find("devices/console")
    assert serial is not None and console is not None
    assert serial.get("type") == console.get("type") == "pty"
    assert [attributes(item, "target").get("name") for item in root.iterfind("devices/channel")] == [
        "org.qemu.guest_agent.0", "com.redhat.spice.0"]
    agent = root.find("devices/channel")
    assert agent is not None and agent.get("type") == "unix" and agent.find("source") is None
    assert attributes(root, "devices/graphics")["autoport"] == "yes"
    assert attributes(root, "devices/vsock/cid") == {"auto": "yes"}
    for words in ("/run/web1.serial", "5905", "host device", "apparmor", "qemu:commandline"):
        assert any(words in note for note in result.notes), words


def test_arguments_for_qemu_are_kept() -> None:
    root, result = rewritten()
    args = root.findall("{http://libvirt.org/schemas/domain/qemu/1.0}commandline/*")
    assert [item.get("value") for item in args] == ["-name", "guest=x"]
    assert "<qemu:commandline>" in result.xml and "<libosinfo:os " in result.xml


def test_the_variable_store_is_the_domains_own() -> None:
    root, _ = rewritten()
    assert root.findtext("os/nvram") == "/new/web2_VARS.fd"
    assert attributes(root, "os/nvram")["template"] == "/usr/share/OVMF/OVMF_VARS_4M.fd"
    root, result = rewritten(nvram=None)
    assert root.find("os/nvram") is None and any("UEFI" in note for note in result.notes)
    assert nvram_of(INACTIVE) == (True, "/var/lib/libvirt/qemu/nvram/web1_VARS.fd")
    assert nvram_of(ACTIVE) == (True, None) and tpm_of(INACTIVE) == "2.0" and tpm_of(ACTIVE) is None


def test_a_running_domains_definition_serves_too() -> None:
    root, result = rewritten(ACTIVE, nvram="/new/web2_VARS.fd")
    text = ElementTree.tostring(root, encoding="unicode")
    for old in ("j1a2b3c4d", "mirror", "backingStore", "virtio-disk0", "vnet3", "/dev/pts", "seclabel", "5901",
                "index="):
        assert old not in text, old
    assert root.get("id") is None and root.findtext("os/nvram") == "/new/web2_VARS.fd"
    assert attributes(root, "devices/interface/alias")["name"] == "ua-lan"  # a name users chose
    assert result.attached == {"vda"}


def test_a_shareable_disk_on_qcow2_is_shareable_no_more() -> None:
    xml = INACTIVE.replace("<target dev='vdb' bus='virtio'/>", "<target dev='vdb' bus='virtio'/><shareable/>")
    root, result = rewritten(xml, [volume("vdb", Target(TargetKind.QCOW2, "/new/vdb.qcow2"))])
    assert disk(root, "vdb").find("shareable") is None and any("shareable" in note for note in result.notes)
    root, _ = rewritten(xml)
    assert disk(root, "vdb").find("shareable") is not None


@pytest.mark.parametrize("xml", ["", "<domain/>", "<network><devices/></network>", "<domain><devices></domain>"])
def test_what_is_no_definition_is_refused(xml: str) -> None:
    with pytest.raises(RepositoryCorrupt, match="domain"):
        rewritten(xml)


@pytest.mark.parametrize("xml", [INACTIVE, ACTIVE], ids=["inactive", "active"])
@pytest.mark.parametrize("target", [LUN, Target(TargetKind.BLOCK, "/dev/sdq"), Target(TargetKind.RAW, "/x.raw"), None],
                         ids=lambda value: "none" if value is None else value.kind.value)
def test_libvirt_takes_the_definition(xml: str, target: Target | None) -> None:
    """libvirt's own parser and schema, through its test driver (which has no type but its own and no UEFI)."""
    nvram = "/new/web2_VARS.fd" if xml is INACTIVE else None
    result = rewrite(xml, name="web2", uuid=UUID, volumes=place(target), nvram=nvram)
    text = result.xml.replace("type=\"kvm\"", "type=\"test\"", 1).replace("type=\"qemu\"", "type=\"test\"", 1)
    text = text.replace(" firmware=\"efi\"", "")
    connection = libvirt.open("test:///default")
    try:
        domain = connection.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        assert domain.UUIDString() == UUID and domain.name() == "web2"
    finally:
        connection.close()
