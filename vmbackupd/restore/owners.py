"""Whether a target belongs to a domain, or is the very LUN the VM of the backup works on."""

from __future__ import annotations

from vmbackupd.host.udev import normalise_wwn
from vmbackupd.model import VolumeKind, VolumeRecord
from vmbackupd.repository.manifest import Manifest
from vmbackupd.restore.address import Target
from vmbackupd.restore.inuse import DomainDiskUse, file_key, users_of_lun, users_of_path
from vmbackupd.restore.plan import Found


def target_users(target: Target, found: Found, uses: list[DomainDiskUse], manifest: Manifest, running: bool,
                 ) -> list[str]:
    """Uses by running domains that forbid writing to ``target``. ``running`` is whether the VM of the backup runs.

    Disks of domains that are off count as data, not as use: restoring over them is what ``--force`` is for.
    """
    if target.iscsi is not None:
        disks = users_of_lun(target.iscsi.iqn, target.iscsi.lun, uses)
    else:
        disks = users_of_path(target.file, uses)
    users = [str(use) for use in disks if use.running]
    if running and not users:
        users = [f"the running VM {manifest.vm.name} reaches it by its own means (its volume {record.id})"
                 for record in manifest.volumes
                 if record.kind is VolumeKind.PASS_THROUGH and is_origin(record, target, found)]
    return users


def is_origin(record: VolumeRecord, target: Target, found: Found) -> bool:
    """Whether ``target`` is the LUN that ``record`` was captured from, as far as its identity tells."""
    iscsi = record.details.get("iscsi")
    if target.iscsi is not None:
        return isinstance(iscsi, dict) and (iscsi.get("iqn"), iscsi.get("lun")) == (target.iscsi.iqn, target.iscsi.lun)
    host_device = record.details.get("host_device")
    if isinstance(host_device, str) and file_key(host_device) == file_key(target.file):
        return True
    identity = dict(found.identity)
    wwn = record.details.get("wwn")
    if isinstance(wwn, str) and "wwn" in identity:
        return normalise_wwn(wwn) == identity["wwn"]
    serial = record.details.get("serial")
    return isinstance(serial, str) and bool(serial) and serial == identity.get("serial")

