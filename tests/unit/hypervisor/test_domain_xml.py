"""The domain XML as libvirt really writes it, and ``query-pci`` as QEMU really answers it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from vmbackupd.errors import HypervisorError, InvalidArgument
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor import hotplug, overlay, snapshot
from vmbackupd.hypervisor.base import DiskSource, GuestAddress

LIVE = """
<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>db1</name>
  <uuid>b59be621-39d8-4e72-ab1a-89a138718c39</uuid>
  <os firmware='efi'>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/db1_VARS.fd</nvram>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/images/db1.snap1' index='4'/>
      <backingStore type='file' index='3'>
        <format type='qcow2'/>
        <source file='/images/db1.qcow2'/>
        <backingStore type='file' index='1'>
          <format type='raw'/>
          <source file='/images/golden.img'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>root</serial>
      <boot order='1'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' io='native'/>
      <source dev='/dev/vg0/db1' index='2'/>
      <backingStore/>
      <target dev='vdb' bus='virtio'/>
      <shareable/>
      <wwn>5000c50015ea71ac</wwn>
      <alias name='ua-data'/>
      <address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>
    </disk>
    <disk type='network' device='lun'>
      <driver name='qemu' type='raw'/>
      <source protocol='iscsi' name='iqn.2025-01.org.lab:t1/2' index='6'>
        <host name='127.0.0.1' port='3260'/>
        <initiator><iqn name='iqn.2025-01.org.lab:host'/></initiator>
      </source>
      <target dev='sda' bus='scsi'/>
      <alias name='scsi0-0-0-3'/>
      <address type='drive' controller='0' bus='0' target='0' unit='3'/>
    </disk>
    <disk type='block' device='lun' sgio='unfiltered'>
      <driver name='qemu' type='raw'/>
      <source dev='/dev/disk/by-id/wwn-0x600a0b80' index='7'><reservations managed='yes'/></source>
      <target dev='sdb' bus='scsi'/>
      <alias name='scsi0-0-2-1'/>
      <address type='drive' controller='0' bus='0' target='2' unit='1'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu'/>
      <target dev='sdc' bus='sata'/>
      <readonly/>
      <alias name='sata0-0-2'/>
      <address type='drive' controller='0' bus='0' target='0' unit='2'/>
    </disk>
    <disk type='file' device='floppy'>
      <driver name='qemu' type='raw'/>
      <target dev='fda' bus='fdc'/>
      <alias name='fdc0-0-0'/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <auth username='libvirt'><secret type='ceph' uuid='e8ad2e0e-7b1d-4f6b-8d2a-4e4b1a9cc2c1'/></auth>
      <source protocol='rbd' name='pool/image' index='8'><host name='mon1' port='6789'/><host name='mon2'/></source>
      <target dev='vdc' bus='virtio'/>
      <transient/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source protocol='nbd' name='export'><host transport='unix' socket='/run/nbd.sock'/></source>
      <target dev='vdd' bus='virtio'/>
    </disk>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source pool='default' volume='db1-data.qcow2' index='9'/>
      <target dev='vde' bus='virtio'/>
    </disk>
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw'/>
      <source type='unix' path='/run/spdk.sock' index='10'><reconnect enabled='yes' timeout='10'/></source>
      <target dev='vdf' bus='virtio'/>
    </disk>
    <disk type='nvme' device='disk'>
      <driver name='qemu' type='raw'/>
      <source type='pci' managed='yes' namespace='1'>
        <address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
      </source>
      <target dev='vdg' bus='virtio'/>
    </disk>
    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='qcow2'/>
      <source file='/images/m.j1' index='12'/>
      <backingStore type='file' index='11'>
        <format type='raw'/><source file='/images/m.raw'/><backingStore/>
      </backingStore>
      <mirror type='file' job='active-commit' ready='yes'>
        <format type='raw'/>
        <source file='/images/m.raw' index='11'/>
      </mirror>
      <target dev='vdh' bus='virtio'/>
    </disk>
    <controller type='scsi' index='0' model='virtio-scsi'>
      <alias name='scsi0'/>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
    </controller>
    <controller type='sata' index='0'>
      <alias name='ide'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x1f' function='0x2'/>
    </controller>
    <channel type='unix'>
      <source mode='bind' path='/run/libvirt/qemu/channel/7-db1/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/>
      <alias name='channel0'/>
    </channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <driver name='vfio'/>
      <source><address domain='0x0000' bus='0x3b' slot='0x00' function='0x1'/></source>
      <alias name='hostdev0'/>
    </hostdev>
    <hostdev mode='subsystem' type='usb' managed='no'>
      <source><vendor id='0x0951'/><product id='0x1666'/><address bus='1' device='4'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='usb'><source><address bus='1' device='4'/></source></hostdev>
    <hostdev mode='subsystem' type='scsi' managed='no' sgio='unfiltered'>
      <source><adapter name='scsi_host2'/><address bus='0' target='0' unit='1'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='scsi'>
      <source protocol='iscsi' name='iqn.2025-01.org.lab:t9/1'><host name='10.0.0.1'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='mdev' model='vfio-pci'>
      <source><address uuid='c2177883-f1bb-47f0-914d-32a22e3a8804'/></source>
    </hostdev>
    <hostdev mode='subsystem' type='scsi_host'><source protocol='vhost' wwpn='naa.5123456789abcde0'/></hostdev>
    <hostdev mode='capabilities' type='storage'><source><block>/dev/sdx</block></source></hostdev>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/><alias name='tpm0'/></tpm>
  </devices>
</domain>
"""


@pytest.fixture(scope="module")
def root() -> ET.Element:
    return dx.parse(LIVE)


def test_every_disk_is_listed_in_order(root: ET.Element) -> None:
    disks = dx.parse_disks(root)
    assert [(d.target, d.device, d.bus) for d in disks] == [
        ("vda", "disk", "virtio"), ("vdb", "disk", "virtio"), ("sda", "lun", "scsi"), ("sdb", "lun", "scsi"),
        ("sdc", "cdrom", "sata"), ("fda", "floppy", "fdc"), ("vdc", "disk", "virtio"), ("vdd", "disk", "virtio"),
        ("vde", "disk", "virtio"), ("vdf", "disk", "virtio"), ("vdg", "disk", "virtio"), ("vdh", "disk", "virtio")]


@pytest.mark.parametrize(("target", "source"), [
    ("vda", DiskSource("file", "qcow2", path="/images/db1.snap1")),
    ("vdb", DiskSource("block", "raw", path="/dev/vg0/db1")),
    ("sda", DiskSource("network", "raw", protocol="iscsi", name="iqn.2025-01.org.lab:t1/2", host="127.0.0.1",
                       port=3260)),
    ("sdb", DiskSource("block", "raw", path="/dev/disk/by-id/wwn-0x600a0b80")),
    ("sdc", None),
    ("fda", None),
    ("vdc", DiskSource("network", "raw", protocol="rbd", name="pool/image", host="mon1", port=6789)),
    ("vdd", DiskSource("network", "qcow2", path="/run/nbd.sock", protocol="nbd", name="export")),
    ("vde", DiskSource("volume", "qcow2", name="default/db1-data.qcow2")),
    ("vdf", DiskSource("vhostuser", "raw", path="/run/spdk.sock")),
    ("vdg", DiskSource("nvme", "raw")),
])
def test_where_a_disk_comes_from(root: ET.Element, target: str, source: DiskSource | None) -> None:
    assert {d.target: d.source for d in dx.parse_disks(root)}[target] == source


def test_flags_and_names_of_a_disk(root: ET.Element) -> None:
    disks = {d.target: d for d in dx.parse_disks(root)}
    assert (disks["vda"].serial, disks["vda"].alias, disks["vda"].wwn) == ("root", "virtio-disk0", None)
    assert (disks["vdb"].wwn, disks["vdb"].alias, disks["vdb"].shareable) == ("5000c50015ea71ac", "ua-data", True)
    assert [d.target for d in disks.values() if d.read_only] == ["sdc"]
    assert [d.target for d in disks.values() if d.transient] == ["vdc"]
    assert [d.target for d in disks.values() if d.shareable] == ["vdb"]


def test_the_chain_is_top_first_with_libvirts_numbers(root: ET.Element) -> None:
    disks = {d.target: d for d in dx.parse_disks(root)}
    assert disks["vda"].chain == ("/images/db1.snap1", "/images/db1.qcow2", "/images/golden.img")
    assert disks["vdb"].chain == ("/dev/vg0/db1",)
    assert disks["sda"].chain == disks["sdc"].chain == disks["vdc"].chain == ()
    element = dx.disk_element(root, "vda")
    assert element is not None
    links = dx.chain_of(element)
    assert [(link.index, link.source.format) for link in links] == [(4, "qcow2"), (3, "qcow2"), (1, "raw")]


def test_a_running_commit_is_seen(root: ET.Element) -> None:
    element = dx.disk_element(root, "vdh")
    assert element is not None
    assert dx.mirror_of(element) == dx.Mirror("active-commit", "/images/m.raw", True)
    other = dx.disk_element(root, "vda")
    assert other is not None and dx.mirror_of(other) is None


def test_hostdevs_are_readable(root: ET.Element) -> None:
    assert dx.hostdevs(root) == [
        "pci 0000:3b:00.1", "usb 0951:1666", "usb bus 1 device 4", "scsi scsi_host2 0:0:1",
        "scsi iscsi iqn.2025-01.org.lab:t9/1",
        "mdev c2177883-f1bb-47f0-914d-32a22e3a8804",
        "scsi_host protocol=vhost wwpn=naa.5123456789abcde0", "storage"]


def test_firmware_and_tpm_state(root: ET.Element) -> None:
    assert dx.nvram_path(root) == "/var/lib/libvirt/qemu/nvram/db1_VARS.fd"
    assert dx.tpm_state(root, "/swtpm") == "/swtpm/b59be621-39d8-4e72-ab1a-89a138718c39/tpm2"


@pytest.mark.parametrize(("os", "path"), [
    ("<type>hvm</type>", None),
    ("<nvram/>", None),
    ("<nvram type='file'><source file='/n/vars.fd'/></nvram>", "/n/vars.fd"),
    ("<nvram type='block'><source dev='/dev/vg/vars'/></nvram>", "/dev/vg/vars"),
    ("<nvram>\n /n/vars.fd\n</nvram>", "/n/vars.fd"),
])
def test_nvram_in_all_its_spellings(os: str, path: str | None) -> None:
    assert dx.nvram_path(dx.parse(f"<domain><os>{os}</os></domain>")) == path


@pytest.mark.parametrize(("tpm", "path"), [
    ("", None),
    ("<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>", None),
    ("<tpm><backend type='emulator' version='1.2'/></tpm>", "/s/u/tpm1.2"),
    ("<tpm><backend type='emulator'/></tpm>", "/s/u/tpm2"),
    ("<tpm><backend type='emulator' version='2.0'><source type='dir' path='/my/tpm'/></backend></tpm>", "/my/tpm"),
])
def test_tpms_in_all_their_kinds(tpm: str, path: str | None) -> None:
    assert dx.tpm_state(dx.parse(f"<domain><uuid>u</uuid><devices>{tpm}</devices></domain>"), "/s") == path


def test_channels(root: ET.Element) -> None:
    assert dx.has_agent(root)
    assert dx.channel(root, "org.vmbackupd.j1.c") is None
    assert not dx.has_agent(dx.parse("<domain><devices/></domain>"))


def test_what_libvirt_leaves_out_has_a_default() -> None:
    root = dx.parse("<domain><devices><disk><source file='/x'/><target dev='hda'/></disk><disk type='file'/></devices>"
                    "</domain>")
    (only,) = dx.parse_disks(root)
    assert (only.device, only.bus, only.source) == ("disk", "", DiskSource("file", "raw", path="/x"))


@pytest.mark.parametrize("text", ["", "<domain>", "<network/>", "no xml"])
def test_what_is_no_domain_is_an_error(text: str) -> None:
    with pytest.raises(HypervisorError, match="domain XML"):
        dx.parse(text)


def device(bus: int, slot: int, id: str, function: int = 0, **more: object) -> dict[str, object]:
    return {"bus": bus, "slot": slot, "function": function, "qdev_id": id, **more}


def bridge(bus: int, slot: int, id: str, secondary: int, *devices: object, function: int = 0) -> dict[str, object]:
    numbers = {"number": bus, "secondary": secondary}
    return device(bus, slot, id, function, pci_bridge={"bus": numbers, "devices": list(devices)})


PCI = [{"bus": 0, "devices": [
    device(0, 0, ""),
    bridge(0, 1, "pci.1", 1, device(1, 0, "virtio-serial0")),
    bridge(0, 1, "pci.2", 2, device(2, 0, "scsi0"), function=1),
    # the firmware numbered these the other way round than libvirt
    bridge(0, 1, "pci.4", 6, device(6, 0, "virtio-disk0"), function=2),
    bridge(0, 2, "pci.7", 7, bridge(7, 0, "pci.8", 8, device(8, 3, "ua-data", 1))),
    bridge(0, 3, "pci.9", 0, device(0, 0, "no-address-yet")),
    device(0, 31, "", 2),
]}]


def test_pci_addresses_are_the_guests() -> None:
    places = dx.pci_places(PCI)
    assert places["virtio-disk0"] == "0000:06:00.0"
    assert places["ua-data"] == "0000:08:03.1"
    assert places["pci.8"] == "0000:07:00.0"
    assert "no-address-yet" not in places and "" not in places


@pytest.mark.parametrize("reply", [None, {}, [{"bus": 0}], [{"devices": [{"bus": 0}]}], [{"devices": 3}]])
def test_another_answer_is_an_error(reply: object) -> None:
    with pytest.raises(HypervisorError, match="query-pci"):
        dx.pci_places(reply)


@pytest.mark.parametrize(("target", "address"), [
    ("vda", GuestAddress("0000:06:00.0")),
    ("vdb", GuestAddress("0000:08:03.1")),
    ("sda", GuestAddress("0000:02:00.0", 0, 3)),
    ("sdb", GuestAddress("0000:02:00.0", 2, 1)),
    ("sdc", GuestAddress("0000:00:1f.2", 0, 2)),  # the machine's own AHCI has no id in QEMU
    ("fda", None),
    ("vdc", None),
])
def test_where_the_guest_finds_a_disk(root: ET.Element, target: str, address: GuestAddress | None) -> None:
    element = dx.disk_element(root, target)
    assert element is not None
    assert dx.guest_address(element, root, dx.pci_places(PCI)) == address


def test_an_lsi_controller_has_one_unit_a_target() -> None:
    root = dx.parse("""<domain><devices>
      <disk><source file='/x'/><target dev='sda' bus='scsi'/><alias name='scsi0-0-4'/>
        <address type='drive' controller='0' bus='0' target='0' unit='4'/></disk>
      <disk><source file='/y'/><target dev='hdc' bus='ide'/><alias name='ide0-1-0'/>
        <address type='drive' controller='0' bus='1' target='0' unit='0'/></disk>
      <disk><source file='/z'/><target dev='sdz' bus='usb'/><address type='usb' bus='0' port='1'/></disk>
      <controller type='scsi' index='0' model='lsilogic'><alias name='scsi0'/></controller>
      <controller type='ide' index='0'><alias name='ide'/>
        <address type='pci' domain='0x0000' bus='0x00' slot='0x01' function='0x1'/></controller>
    </devices></domain>""")
    places = {"scsi0": "0000:00:05.0"}
    found = {target: dx.guest_address(element, root, places) for target, element in dx.disk_elements(root)}
    assert found == {"sda": GuestAddress("0000:00:05.0", 4, 0), "hdc": GuestAddress("0000:00:01.1", 1, 0), "sdz": None}


def test_a_snapshot_names_every_disk_and_the_others_with_no(root: ET.Element) -> None:
    made = ET.fromstring(snapshot.snapshot_xml(root, {"vda": "/images/a&b.j1", "vdb": "/scratch/b.j1"}))
    listed = {disk.get("name"): disk.get("snapshot") for disk in made.iter("disk")}
    assert listed == {target: "external" if target in ("vda", "vdb") else "no" for target, _ in dx.disk_elements(root)}
    assert [source.get("file") for source in made.iter("source")] == ["/images/a&b.j1", "/scratch/b.j1"]
    assert {driver.get("type") for driver in made.iter("driver")} == {"qcow2"}


@pytest.mark.parametrize(("target", "words"), [
    ("sda", "disk sda is a lun and is never snapshotted"), ("sdb", "disk sdb is a lun"), ("sdc", "sdc is a cdrom"),
    ("fda", "fda is a floppy"), ("xxx", "has no disk xxx")])
def test_a_lun_is_never_snapshotted(root: ET.Element, target: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"VM db1.*{words}"):
        snapshot.snapshot_xml(root, {"vda": "/a", target: "/b"})


def test_a_snapshot_of_nothing_is_refused(root: ET.Element) -> None:
    with pytest.raises(InvalidArgument, match="no disk"):
        snapshot.snapshot_xml(root, {})


def test_users_of_a_path(root: ET.Element) -> None:
    assert overlay.uses(root, "/images/golden.img") and overlay.uses(root, "/images/../images/db1.snap1")
    assert not overlay.uses(root, "/images/other")


def test_the_scratch_disks_xml_is_escaped() -> None:
    made = ET.fromstring(hotplug.disk_xml("/a&b/<x>.qcow2", "vmbk-j1", "vdz", "virtio"))
    source, serial = made.find("source"), made.find("serial")
    assert source is not None and source.get("file") == "/a&b/<x>.qcow2"
    assert serial is not None and serial.text == "vmbk-j1"


def test_the_next_free_target() -> None:
    letters = [f"vd{chr(code)}" for code in range(ord("a"), ord("z") + 1)]
    assert hotplug.free_target(set(), "vd") == "vda"
    assert hotplug.free_target({"vda", "vdc"}, "vd") == "vdb"
    assert hotplug.free_target(set(letters), "vd") == "vdaa"
    assert hotplug.free_target({*letters, "vdaa"}, "vd") == "vdab"
