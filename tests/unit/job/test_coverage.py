"""Which device is captured how: the decisions, on guests as administrators build them."""

from __future__ import annotations

from typing import Any

import pytest

from vmbackupd.guest.report import GuestReport, parse_report
from vmbackupd.host.udev import HostDevice
from vmbackupd.hypervisor.base import DiskSource, DomainDisk, DomainInfo, GuestAddress
from vmbackupd.job import coverage
from vmbackupd.model import T2, Method, VolumeKind

GiB = 1 << 30
ROOT = [{"path": "/", "fstype": "ext4", "options": "rw"}]
DATA = [{"path": "/srv", "fstype": "ext4", "options": "rw"}]


def device(name: str, devno: str, **more: object) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": name, "devno": devno, "type": "disk", "size": GiB, "logical_block": 512, "read_only": False,
        "removable": False, "transport": "virtio", "slaves": [], "holders": [], "mounts": [], "swap": False,
    }  # fmt: skip
    return base | more


def volume(name: str, devno: str, on: list[str], rows: list[list[object]], **more: object) -> dict[str, Any]:
    size = sum(int(str(row[1])) for row in rows) * 512
    dm = {"name": name, "uuid": f"LVM-{name}", "table": rows}
    return device(name, devno, type="dm", size=size, slaves=on, transport="other", dm=dm, **more)


def report(*devices: dict[str, Any], untracked: str | None = None) -> GuestReport:
    head = {"boot_id": "b", "kernel": "6.1", "hostname": "web1", "untracked": untracked}
    return parse_report({**head, "devices": list(devices)})


def disk(target: str, pci: str, **more: object) -> DomainDisk:
    base: dict[str, Any] = {
        "target": target, "device": "disk", "bus": "virtio", "read_only": False, "shareable": False, "serial": None,
        "wwn": None, "alias": None, "size": GiB, "address": GuestAddress(pci),
        "source": DiskSource("file", "qcow2", f"/images/{target}.qcow2"),
    }  # fmt: skip
    return DomainDisk(**(base | more))


def domain(*disks: DomainDisk) -> DomainInfo:
    return DomainInfo("web1", "u", True, True, True, {}, disks, (), None, None)


PLAIN_ROOT = device("vda", "254:0", pci="0000:01:00.0", mounts=ROOT)
DATA_DISK = device("vdb", "254:16", pci="0000:02:00.0", holders=["253:0"])
DATA_LV = volume("vg-data", "253:0", ["254:16"], [[0, 2048, "linear", "254:16 2048"]], mounts=DATA)
LUN = device(
    "sdb", "8:16", transport="iscsi", iscsi={"iqn": "iqn.2001-04.com.example:db", "portal": "192.0.2.7:3260", "lun": 1}
)


def items(found: coverage.Coverage) -> dict[str, tuple[str, Method | None]]:
    return {item.id: (item.decision, item.method) for item in found.items}


def test_a_plain_root_takes_the_freeze_window_and_lvm_the_guest_snapshot() -> None:
    found = coverage.decide(
        domain(disk("vda", "0000:01:00.0"), disk("vdb", "0000:02:00.0")), report(PLAIN_ROOT, DATA_DISK, DATA_LV)
    )
    assert items(found) == {"vda": ("captured", Method.FREEZE_WINDOW), "vdb": ("captured", Method.GUEST_SNAPSHOT)}
    assert [item.name for item in found.volumes] == ["vg-data"]


def test_boot_beside_a_pv_takes_the_freeze_window_for_the_whole_disk() -> None:
    boot = device("vdb1", "254:17", type="part", parent="254:16", start=1 << 20, size=1 << 28, mounts=ROOT)
    pv = device("vdb2", "254:18", type="part", parent="254:16", start=1 << 29, size=1 << 29, holders=["253:0"])
    lv = volume("vg-data", "253:0", ["254:18"], [[0, 2048, "linear", "254:18 2048"]], mounts=DATA)
    found = coverage.decide(domain(disk("vdb", "0000:02:00.0")), report(DATA_DISK | {"holders": []}, boot, pv, lv))
    assert items(found) == {"vdb": ("captured", Method.FREEZE_WINDOW)}
    assert not found.volumes


def test_a_lun_of_the_guests_own_initiator_is_pass_through_under_its_iqn() -> None:
    lv = volume("vg-db", "253:1", ["8:16"], [[0, 2048, "linear", "8:16 2048"]], mounts=DATA)
    found = coverage.decide(domain(), report(LUN | {"holders": ["253:1"]}, lv))
    ident = "iscsi:iqn.2001-04.com.example:db/1"
    assert items(found) == {ident: ("captured", Method.GUEST_SNAPSHOT)}
    assert found.pass_through[0].devno == "8:16"


@pytest.mark.parametrize(("more", "reason"), [({"mounts": DATA}, "/srv"), ({}, "nothing on it is in use")])
def test_a_pass_through_disk_without_volumes_is_copied_beforehand(more: dict[str, Any], reason: str) -> None:
    found = coverage.decide(domain(), report(LUN | more))
    assert items(found) == {"iscsi:iqn.2001-04.com.example:db/1": ("captured", Method.PRE_COPY)}
    assert reason in found.items[0].reason
    assert found.pre_copied == found.pass_through and not found.volumes


@pytest.mark.parametrize(("more", "reason"), [({"mounts": DATA}, "/srv"), ({}, "nothing on it is in use")])
def test_where_the_kernel_cannot_track_it_is_uncovered_and_can_be_allowed(more: dict[str, Any], reason: str) -> None:
    found = coverage.decide(domain(), report(LUN | more, untracked="no pinnable perf links (Linux 5.15)"))
    assert [item.decision for item in found.items] == ["uncovered"]
    for words in (reason, "/dev/sdb", "no pinnable perf links", "enroll"):
        assert words in found.items[0].reason
    assert not found.plans
    by_name = coverage.allow(found, ["sdb"])
    by_id = coverage.allow(found, ["iscsi:iqn.2001-04.com.example:db/1"])
    assert by_name == by_id and by_name.items[0].decision == "allowed"
    assert coverage.allow(found, ["sdz"]).items[0].decision == "uncovered"


def test_a_disk_that_the_kernel_does_not_track_is_uncovered_only_where_it_has_to_be() -> None:
    lv = volume("vg-db", "253:1", ["8:32"], [[0, 2048, "linear", "8:32 2048"]], mounts=DATA)
    other = LUN | {"name": "sdc", "devno": "8:32", "holders": ["253:1"], "iscsi": None, "serial": "x"}
    why = {"8:16": "no room for its marks", "8:32": "no room for its marks"}
    found = coverage.decide(domain(), report(LUN, other, lv), untracked=why)
    assert {item.id: item.decision for item in found.items} == {
        "iscsi:iqn.2001-04.com.example:db/1": "uncovered", "serial:x": "captured",
    }  # fmt: skip


def test_device_lun_is_pass_through_although_the_domain_names_it() -> None:
    address = GuestAddress("0000:03:00.0", 0, 0)
    lun = disk("sda", "", device="lun", bus="scsi", address=address, source=DiskSource("block", "raw", "/dev/sdx"))
    guest = device(
        "sda", "8:0", transport="scsi", pci="0000:03:00.0", target=0, unit=0, holders=["253:0"], wwn="0x600a0b80"
    )
    lv = volume("vg-lun", "253:0", ["8:0"], [[0, 2048, "linear", "8:0 2048"]], mounts=DATA)
    host = HostDevice("sdx", "/dev/sdx", "8:112", "disk", GiB, False, "600a0b80", None, None, None, "fc", ())
    found = coverage.decide(domain(lun), report(guest, lv), [host])
    assert [(plan.id, plan.kind) for plan in found.plans] == [("sda", VolumeKind.PASS_THROUGH)]
    assert not found.virtual
    assert found.plans[0].details["host_device"] == "/dev/sdx"


def test_a_volume_of_another_kind_of_target_is_copied_beforehand() -> None:
    thin = volume("vg-thin", "253:0", ["8:16"], [[0, 2048, "thin", "253:9 1"]], mounts=DATA)
    found = coverage.decide(domain(), report(LUN | {"holders": ["253:0"]}, thin))
    assert [item.method for item in found.items] == [Method.PRE_COPY]


MPATH_TABLE: list[list[object]] = [[0, GiB // 512, "multipath", "0 0 1 1 service-time 0 2 2 8:16 1 1 8:32 1 1"]]


def paths() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Two paths to one LUN, and what multipathd makes of them."""
    one, two = LUN | {"holders": ["253:0"]}, LUN | {"name": "sdc", "devno": "8:32", "holders": ["253:0"]}
    return one, two, volume("mpatha", "253:0", ["8:16", "8:32"], MPATH_TABLE)


def test_a_lun_with_two_paths_is_one_disk_read_through_both() -> None:
    one, two, head = paths()
    lv = volume("vg-db", "253:1", ["253:0"], [[0, 2048, "linear", "253:0 2048"]], mounts=DATA)
    found = coverage.decide(domain(), report(one, two, head | {"holders": ["253:1"]}, lv))
    ident = "iscsi:iqn.2001-04.com.example:db/1"
    assert items(found) == {ident: ("captured", Method.GUEST_SNAPSHOT), "sdc": ("excluded", None)}
    assert [(plan.id, plan.devno, plan.details["guest_name"]) for plan in found.plans] == [(ident, "253:0", "mpatha")]
    assert [item.name for item in found.volumes] == ["vg-db"]
    assert "a path of mpatha" in found.items[1].reason


def test_a_filesystem_on_a_multipath_device_lies_on_no_volume_that_can_be_snapshotted() -> None:
    one, two, head = paths()
    found = coverage.decide(domain(), report(one, two, head | {"mounts": DATA}))
    assert "/srv (mpatha)" in found.items[0].reason and not found.volumes
    assert found.items[1].decision == "excluded"


def test_a_lun_seen_twice_without_multipath_is_uncovered_the_second_time() -> None:
    lv = volume("vg-db", "253:1", ["8:16"], [[0, 2048, "linear", "8:16 2048"]], mounts=DATA)
    found = coverage.decide(domain(), report(LUN | {"holders": ["253:1"]}, LUN | {"name": "sdc", "devno": "8:32"}, lv))
    assert [(item.id, item.decision) for item in found.items][1] == ("sdc", "uncovered")
    assert "sdb again" in found.items[1].reason and "multipathd" in found.items[1].reason


def test_swap_is_not_snapshotted_and_needs_no_instant() -> None:
    pv = device("vdb", "254:16", pci="0000:02:00.0", holders=["253:0", "253:1"])
    swap = volume("vg-swap", "253:1", ["254:16"], [[0, 64, "linear", "254:16 4096"]], swap=True)
    found = coverage.decide(
        domain(disk("vdb", "0000:02:00.0")), report(pv, DATA_LV, swap, LUN | {"swap": True}), untracked={"8:16": "old"}
    )
    assert [item.method for item in found.items] == [Method.GUEST_SNAPSHOT, Method.GUEST_SNAPSHOT]
    assert [item.name for item in found.volumes] == ["vg-data"]
    assert "swap" in found.items[1].reason


def test_reasons_name_the_volumes_and_what_hides_the_bytes() -> None:
    pv = device("vdb", "254:16", pci="0000:02:00.0", holders=["253:0"])
    legs = [
        volume(
            f"vg-r_{leg}", f"253:{number}", ["254:16"], [[0, 64, "linear", f"254:16 {64 * number}"]], holders=["253:9"]
        )
        for number, leg in enumerate(("rmeta_0", "rimage_0"), 2)
    ]
    raid = volume("vg-r", "253:9", ["253:2", "253:3"], [[0, 64, "raid", "raid1 1 0 1 253:2 253:3"]], mounts=DATA)
    crypt = volume("secret", "253:8", ["8:16"], [[0, 64, "crypt", "aes - 0 8:16 0"]], mounts=DATA)
    found = coverage.decide(
        domain(disk("vdb", "0000:02:00.0")),
        report(pv | {"holders": ["253:2", "253:3"]}, *legs, raid, LUN | {"holders": ["253:8"]}, crypt),
    )
    assert found.items[0].reason.endswith("vg-r_rimage_0, vg-r_rmeta_0")
    assert [item.name for item in found.volumes] == ["vg-r_rmeta_0", "vg-r_rimage_0"]
    assert "secret has a device-mapper target crypt" in found.items[1].reason


def test_what_needs_no_capture_is_excluded_with_its_reason() -> None:
    cdrom = disk("sdc", "0000:09:00.0", device="cdrom", bus="sata")
    ram = device("zram0", "252:0", type="zram", transport="other")
    found = coverage.decide(domain(cdrom), report(ram))
    assert {item.id: item.decision for item in found.items} == {"sdc": "excluded", "zram0": "excluded"}


@pytest.mark.parametrize(("change", "reason"), [
    ({"read_only": True}, "read-only"),
    ({"shareable": True}, "shared"),
    ({"size": 2 * GiB}, "rescan"),
])  # fmt: skip
def test_a_virtual_disk_that_cannot_be_snapshotted_is_uncovered(change: dict[str, Any], reason: str) -> None:
    found = coverage.decide(domain(disk("vda", "0000:01:00.0", **change)), report(PLAIN_ROOT))
    assert found.items[0].decision == "uncovered" and reason in found.items[0].reason


RBD = DiskSource("network", "raw", protocol="rbd", name="pool/x")


def kinds(wish: T2, root: DiskSource | None = None, data: DiskSource | None = None) -> dict[str, tuple[object, ...]]:
    """Of a plain root and a disk with LVM, on files or elsewhere: when each is captured, and how."""
    changed = [{} if source is None else {"source": source} for source in (root, data)]
    found = coverage.decide(
        domain(disk("vda", "0000:01:00.0", **changed[0]), disk("vdb", "0000:02:00.0", **changed[1])),
        report(PLAIN_ROOT, DATA_DISK, DATA_LV),
        t2=wish,
    )
    assert {item.id: item.method for item in found.items} == {plan.id: plan.method for plan in found.plans}
    told = {item.id for item in found.items if item.reason.endswith("; served by QEMU")}
    assert told == {plan.id for plan in found.plans if plan.t2 is T2.FLEECE}
    assert {plan.details["t2"] for plan in found.plans} == {plan.t2 for plan in found.plans}
    return {plan.id: (plan.method, plan.t2) for plan in found.plans}


WINDOW, LATER = Method.FREEZE_WINDOW, Method.GUEST_SNAPSHOT


def test_files_get_overlays() -> None:
    for wish in (T2.AUTO, T2.EXTERNAL):
        assert kinds(wish) == {"vda": (WINDOW, T2.EXTERNAL), "vdb": (LATER, T2.EXTERNAL)}


def test_a_disk_without_a_file_that_is_captured_at_t2_takes_its_group_along() -> None:
    assert kinds(T2.AUTO, data=RBD) == {"vda": (WINDOW, T2.EXTERNAL), "vdb": (LATER, T2.FLEECE)}


def test_one_that_is_served_inside_the_freeze_leaves_no_snapshot_for_later() -> None:
    assert kinds(T2.AUTO, root=RBD) == {"vda": (WINDOW, T2.FLEECE), "vdb": (WINDOW, T2.FLEECE)}


def test_fleece_is_for_what_is_cut_last() -> None:
    """libvirt makes no snapshot while its backup job runs."""
    assert kinds(T2.FLEECE) == {"vda": (WINDOW, T2.EXTERNAL), "vdb": (LATER, T2.FLEECE)}
    alone = coverage.decide(domain(disk("vda", "0000:01:00.0")), report(PLAIN_ROOT), t2=T2.FLEECE)
    assert [plan.t2 for plan in alone.plans] == [T2.FLEECE]


def test_who_insists_on_overlays_cannot_have_a_disk_without_a_file() -> None:
    found = coverage.decide(domain(disk("vda", "0000:01:00.0", source=RBD)), report(PLAIN_ROOT), t2=T2.EXTERNAL)
    assert found.items[0].decision == "uncovered" and "--t2=fleece" in found.items[0].reason


def test_changes_between_two_looks_are_told_and_our_own_devices_are_none() -> None:
    vm = domain(disk("vda", "0000:01:00.0"))
    before = coverage.decide(vm, report(PLAIN_ROOT))
    own = device("vdz", "254:240", pci="0000:0a:00.0", serial="vmbk-j00000001")
    with_own = domain(disk("vda", "0000:01:00.0"), disk("vdz", "0000:0a:00.0", serial="vmbk-j00000001"))
    assert coverage.difference(before, coverage.decide(with_own, report(PLAIN_ROOT, own), own="j00000001")) is None
    appeared = coverage.difference(before, coverage.decide(vm, report(PLAIN_ROOT, LUN)))
    assert appeared is not None and "iqn.2001-04.com.example:db" in appeared and "appeared" in appeared
    gone = coverage.difference(coverage.decide(vm, report(PLAIN_ROOT, LUN)), before)
    assert gone is not None and "went away" in gone
