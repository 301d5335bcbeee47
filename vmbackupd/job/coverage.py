"""Coverage: every block device the guest has, and how each is captured, excluded, or why it cannot be.

The hypervisor says which disks go through QEMU's block layer, the guest what disks it has and what lives on them. A
disk of both is virtual; ``device='lun'`` and every disk only the guest knows are pass-through. What the two say is
matched by where the guest finds the device (PCI address, SCSI target and unit), which the guest cannot rename.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vmbackupd.guest import topology
from vmbackupd.guest.report import GuestDevice, GuestReport
from vmbackupd.host.udev import HostDevice, normalise_wwn
from vmbackupd.hypervisor.base import DiskSource, DomainDisk, DomainInfo
from vmbackupd.job import second_snapshot
from vmbackupd.model import T2, CoverageRecord, Method, VolumeKind

CAPTURED, EXCLUDED, UNCOVERED, ALLOWED = "captured", "excluded", "uncovered", "allowed"

VOLATILE = {
    "ram": "memory of the guest",
    "zram": "memory of the guest",
    "rom": "removable medium",
    "loop": "a file of another volume",
}
SNAPSHOT_FORMATS = ("qcow2", "raw", "vmdk", "vpc", "vdi", "vhdx")


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """A disk that is captured. ``devno`` is the guest's number of it, ``target`` libvirt's name where it has one,
    ``t2`` (never ``AUTO``) how the hypervisor holds a virtual disk still."""

    id: str
    kind: VolumeKind
    method: Method
    size: int
    devno: str | None
    target: str | None
    source: DiskSource | None
    details: dict[str, object] = field(default_factory=dict, hash=False)
    t2: T2 = T2.EXTERNAL


@dataclass(frozen=True, slots=True)
class SnapshotVolume:
    """A device-mapper volume of the guest that is snapshotted at T1."""

    devno: str
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """The decisions, and the plan that follows from them."""

    items: tuple[CoverageRecord, ...]
    plans: tuple[DiskPlan, ...]
    volumes: tuple[SnapshotVolume, ...]

    @property
    def virtual(self) -> tuple[DiskPlan, ...]:
        return tuple(plan for plan in self.plans if plan.kind is VolumeKind.VIRTUAL)

    @property
    def pass_through(self) -> tuple[DiskPlan, ...]:
        return tuple(plan for plan in self.plans if plan.kind is VolumeKind.PASS_THROUGH)

    @property
    def pass_through_devnos(self) -> dict[str, str]:
        """The guest's numbers of the pass-through disks, by id."""
        return {plan.id: plan.devno for plan in self.pass_through if plan.devno is not None}

    @property
    def pre_copied(self) -> tuple[DiskPlan, ...]:
        return tuple(plan for plan in self.plans if plan.method is Method.PRE_COPY)


def decide(
    domain: DomainInfo,
    report: GuestReport,
    luns: Sequence[HostDevice] = (),
    own: str | None = None,
    t2: T2 = T2.AUTO,
    untracked: Mapping[str, str] | None = None,
) -> Coverage:
    """Decide for every disk of ``domain`` and of its guest; ``own`` is a job whose devices are to be passed over,
    ``t2`` the kind of hypervisor snapshot that is wished for, ``untracked`` why the guest's kernel does not track a
    disk (by its device number)."""
    disks = [device for device in report.devices if device.type == "disk" and not _ours(device, own)]
    matched = _match(
        [
            disk
            for disk in domain.disks
            if disk.device in ("disk", "lun") and not (own and disk.serial == f"vmbk-{own}")
        ],
        disks,
    )
    items: list[CoverageRecord] = []
    plans: list[DiskPlan] = []
    found: list[tuple[GuestDevice | None, DomainDisk | None]] = [
        (matched.get(disk.target), disk) for disk in domain.disks if not (own and disk.serial == f"vmbk-{own}")
    ]
    known = {device.devno for device, _ in found if device is not None}
    found += [(device, None) for device in disks if device.devno not in known]
    joined: set[str] = set()
    for device, disk in found:
        head = topology.multipath_of(report, device.devno) if device is not None else None
        if device is not None and head is not None and head.dm is not None:
            if head.devno in joined:
                items.append(_another_path(device, disk, EXCLUDED, f"a path of {head.dm.name}"))
                continue
            joined.add(head.devno)
            device = replace(device, name=head.dm.name, devno=head.devno)  # read through all of its paths
        item, plan = _decide_one(report, device, disk, luns, plans, t2, untracked or {})
        items.append(item)
        plans += [plan] if plan else []
    items += [
        CoverageRecord(
            device.name, device.name, VolumeKind.PASS_THROUGH, device.size, None, EXCLUDED, VOLATILE[device.type]
        )
        for device in report.devices
        if device.type in VOLATILE and device.size and not device.parent
    ]
    items, plans = second_snapshot.settle(items, plans, t2)
    return Coverage(tuple(items), tuple(plans), _volumes(report, plans))


def _decide_one(
    report: GuestReport,
    device: GuestDevice | None,
    disk: DomainDisk | None,
    luns: Sequence[HostDevice],
    plans: Sequence[DiskPlan],
    t2: T2,
    untracked: Mapping[str, str],
) -> tuple[CoverageRecord, DiskPlan | None]:
    """A disk of the guest, of the domain, or of both; ``plans`` are those of the disks before it."""
    if device is None or (disk is not None and disk.device != "lun"):
        assert disk is not None
        return _virtual(report, device, disk, t2)
    twin = next((plan for plan in plans if disk is None and plan.id == _identity(device)), None)
    if twin is not None:
        reason = f"it is {twin.details['guest_name']} again, over another path: let multipathd join them, or log out"
        return _another_path(device, disk, UNCOVERED, reason), None
    return _pass_through(report, device, disk, luns, untracked)


def _another_path(device: GuestDevice, disk: DomainDisk | None, decision: str, reason: str) -> CoverageRecord:
    ident = disk.target if disk is not None else device.name
    kind = VolumeKind.VIRTUAL if disk is not None and disk.device != "lun" else VolumeKind.PASS_THROUGH
    return CoverageRecord(ident, device.name, kind, device.size, None, decision, reason)


def allow(coverage: Coverage, allowed: Collection[str]) -> Coverage:
    """``coverage`` with the uncovered devices of these ids or names allowed to be missing."""
    return replace(
        coverage,
        items=tuple(
            replace(item, decision=ALLOWED)
            if item.decision == UNCOVERED and {item.id, item.device} & set(allowed)
            else item
            for item in coverage.items
        ),
    )


def difference(before: Coverage, now: Coverage) -> str | None:
    """What changed between two decisions, in words; None when nothing did."""
    was, is_now = (
        {(item.id, item.size, item.method, item.decision): item for item in cover.items} for cover in (before, now)
    )
    for key in was.keys() - is_now.keys():
        return f"{was[key].device} ({was[key].id}) went away or changed"
    for key in is_now.keys() - was.keys():
        return f"{is_now[key].device} ({is_now[key].id}) appeared or changed"
    if before.volumes != now.volumes:
        names = {volume.name for volume in before.volumes} ^ {volume.name for volume in now.volumes}
        return f"the guest's volumes changed ({', '.join(sorted(names)) or 'size'})"
    return None


def _ours(device: GuestDevice, own: str | None) -> bool:
    return own is not None and device.serial == f"vmbk-{own}"


def _match(disks: Iterable[DomainDisk], devices: Sequence[GuestDevice]) -> dict[str, GuestDevice]:
    """libvirt target -> guest device: by place, else by a serial number that only one disk has."""
    by_place = {(device.pci, device.target, device.unit): device for device in devices if device.pci}
    by_serial: dict[str, list[GuestDevice]] = {}
    for device in devices:
        if device.serial:
            by_serial.setdefault(device.serial, []).append(device)
    found: dict[str, GuestDevice] = {}
    for disk in disks:
        place = (disk.address.pci, disk.address.target, disk.address.unit) if disk.address else None
        if place in by_place:
            found[disk.target] = by_place[place]
        elif disk.serial and len(by_serial.get(disk.serial, ())) == 1:
            found[disk.target] = by_serial[disk.serial][0]
    return found


def _virtual(
    report: GuestReport, device: GuestDevice | None, disk: DomainDisk, t2: T2
) -> tuple[CoverageRecord, DiskPlan | None]:
    """A disk of QEMU's block layer (or a ``lun`` the guest has not attached, which nobody can read)."""
    name = f"{disk.target}{f' = {device.name}' if device else ''}"
    size = disk.size or (device.size if device else 0)

    def item(decision: str, method: Method | None, reason: str) -> CoverageRecord:
        kind = VolumeKind.PASS_THROUGH if disk.device == "lun" else VolumeKind.VIRTUAL
        return CoverageRecord(disk.target, name, kind, size, method, decision, reason)

    if disk.device in ("cdrom", "floppy"):
        return item(EXCLUDED, None, "removable medium"), None
    if disk.device == "lun":
        return item(
            UNCOVERED,
            None,
            "the guest does not see this SCSI LUN, so it cannot be snapshotted there; load its driver or detach it",
        ), None
    why_not = _why_no_hypervisor_snapshot(disk, t2)
    if why_not:
        return item(UNCOVERED, None, why_not), None
    if device is not None and disk.size is not None and device.size != disk.size:
        return item(
            UNCOVERED, None, f"the guest sees {device.size} bytes, the host {disk.size}: let the guest rescan it"
        ), None
    method, reason = _virtual_method(report, device)
    details: dict[str, object] = {
        "target": disk.target,
        "format": disk.source.format if disk.source else None,
        "serial": disk.serial,
        "guest_name": device.name if device else None,
    }
    return item(CAPTURED, method, reason), DiskPlan(
        disk.target,
        VolumeKind.VIRTUAL,
        method,
        size,
        device.devno if device else None,
        disk.target,
        disk.source,
        details,
    )


def _why_no_hypervisor_snapshot(disk: DomainDisk, t2: T2) -> str | None:
    source = disk.source
    if source is None:
        return "the disk has no source"
    if t2 is T2.EXTERNAL and not second_snapshot.overlay_fits(source):
        return (
            f"its source is {source.kind} ({source.protocol or 'no path'}), where no overlay file can lie: let QEMU "
            "serve it (--t2=fleece)"
        )
    if source.format not in SNAPSHOT_FORMATS:
        return f"its format {source.format} cannot be snapshotted by QEMU"
    if disk.read_only:
        return "it is read-only to the guest: libvirt makes no snapshot of such a disk; copy its image once"
    if disk.shareable:
        return "it is shared with other VMs: a snapshot in one guest does not hold the others' writes"
    return None


def _virtual_method(report: GuestReport, device: GuestDevice | None) -> tuple[Method, str]:
    if device is None:
        return Method.FREEZE_WINDOW, "the guest does not use it"
    live = _users(report, device.devno)
    plain = [user for user in live if user.volume is None]
    if plain:
        return Method.FREEZE_WINDOW, topology.why_not_held(report, plain[0])
    if not live:
        return Method.FREEZE_WINDOW, "nothing on it is in use"
    return Method.GUEST_SNAPSHOT, f"snapshots in the guest hold all that lives on it: {topology.held_by(report, live)}"


def _pass_through(
    report: GuestReport,
    device: GuestDevice,
    disk: DomainDisk | None,
    luns: Sequence[HostDevice],
    untracked: Mapping[str, str],
) -> tuple[CoverageRecord, DiskPlan | None]:
    """A disk that only the guest can read."""
    ident = disk.target if disk is not None else _identity(device)
    name = f"{disk.target} = {device.name}" if disk is not None else device.name
    live = _users(report, device.devno)
    plain = [user for user in live if user.volume is None]

    def item(decision: str, method: Method | None, reason: str) -> CoverageRecord:
        return CoverageRecord(ident, name, VolumeKind.PASS_THROUGH, device.size, method, decision, reason)

    method, reason = Method.GUEST_SNAPSHOT, f"read from snapshots in the guest: {topology.held_by(report, live)}"
    if not live and topology.live_users(report, device.devno):
        reason = "nothing but swap is on it: it is read as it is, what it holds ends with the boot"
    elif plain or not live:
        what = topology.why_not_held(report, plain[0]) if plain else "nothing on it is in use"
        why = report.untracked or untracked.get(device.devno)
        if why:
            return item(
                UNCOVERED,
                None,
                f"/dev/{device.name} bypasses the hypervisor, and {what}; it could be copied while the guest writes, "
                f"but the guest's kernel cannot track writes: {why}. Put what is on it on a device-mapper volume "
                "(vmbackup-guest enroll DEVICE in the guest, or LVM)",
            ), None
        method, reason = Method.PRE_COPY, f"{what}: copied beforehand, the rest captured in the freeze"
    host = _host_lun(disk, device, luns)
    details: dict[str, object] = {
        "target": disk.target if disk is not None else None,
        "guest_name": device.name,
        "transport": device.transport,
        "serial": device.serial,
        "wwn": device.wwn,
        "vendor": device.vendor,
        "model": device.model,
        "iscsi": None
        if device.iscsi is None
        else {"iqn": device.iscsi.iqn, "portal": device.iscsi.portal, "lun": device.iscsi.lun},
        "host_device": host,
    }
    plan = DiskPlan(
        ident,
        VolumeKind.PASS_THROUGH,
        method,
        device.size,
        device.devno,
        disk.target if disk is not None else None,
        disk.source if disk is not None else None,
        details,
    )
    return item(CAPTURED, method, reason), plan


def _users(report: GuestReport, devno: str) -> list[topology.LiveUser]:
    """Who uses a disk, but for swap: what it holds ends with the boot."""
    return [user for user in topology.live_users(report, devno) if user.kind != "swap"]


def _identity(device: GuestDevice) -> str:
    """A name that stays when the guest numbers its disks anew."""
    if device.iscsi is not None:
        return f"iscsi:{device.iscsi.iqn}/{device.iscsi.lun}"
    if device.wwn:
        return f"wwn:{device.wwn}"
    if device.serial:
        return f"serial:{device.serial}"
    return device.name


def _host_lun(disk: DomainDisk | None, device: GuestDevice, luns: Sequence[HostDevice]) -> str | None:
    """The host's own device of the same LUN, if the host sees it: by WWN as the guest reports it, else by the disk's
    source."""
    path = disk.source.path if disk is not None and disk.source is not None else None
    wwn = normalise_wwn(device.wwn) if device.wwn else None
    for lun in luns:
        if (wwn and lun.wwn == wwn) or (path is not None and path in (lun.devnode, *lun.links)):
            return lun.devnode
    return None


def _volumes(report: GuestReport, plans: Sequence[DiskPlan]) -> tuple[SnapshotVolume, ...]:
    """The volumes to snapshot: every one that lies at least partly on a disk captured by guest snapshot, or on one that
    is copied beforehand, where what a snapshot holds need not be captured in the freeze."""
    methods = (Method.GUEST_SNAPSHOT, Method.PRE_COPY)
    wanted = {plan.devno for plan in plans if plan.method in methods and plan.devno is not None}
    found: dict[str, SnapshotVolume] = {}
    for devno in wanted:
        for user in _users(report, devno):
            if user.volume is not None:
                volume = report.by_devno(user.volume)
                assert volume is not None and volume.dm is not None
                found[user.volume] = SnapshotVolume(user.volume, volume.dm.name, volume.size)
    return tuple(sorted(found.values(), key=lambda volume: volume.devno))
