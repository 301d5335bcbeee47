"""What a person has to do for volumes the guest attaches by itself: no domain definition can give them to it."""

from __future__ import annotations

from collections.abc import Sequence

from vmbackupd.model import VolumeKind, VolumeRecord
from vmbackupd.repository.manifest import Manifest
from vmbackupd.restore.address import Target
from vmbackupd.restore.plan import Presentation

_FACTS = ("iscsi", "guest_name", "transport", "serial", "wwn")


def presentations(manifest: Manifest, volumes: Sequence[tuple[VolumeRecord, Target]], attached: frozenset[str],
                  ) -> tuple[Presentation, ...]:
    """One for each restored pass-through volume that is no disk of the restored domain."""
    return tuple(_presentation(manifest, record, target) for record, target in volumes
                 if record.kind is VolumeKind.PASS_THROUGH and record.id not in attached)


def _presentation(manifest: Manifest, record: VolumeRecord, target: Target) -> Presentation:
    facts = {key: record.details[key] for key in _FACTS if record.details.get(key) is not None}
    initiator = manifest.guest.get("initiator")
    if initiator is not None:
        facts["initiator"] = initiator
    return Presentation(record.id, str(target), _sentence(record, target, initiator), facts)


def _sentence(record: VolumeRecord, target: Target, initiator: object) -> str:
    iscsi = record.details.get("iscsi")
    known = f" (the guest's initiator is {initiator})" if isinstance(initiator, str) else ""
    if not isinstance(iscsi, dict):
        return f"give {target} to the guest in place of its device {record.details.get('guest_name', record.id)}"
    was = f"LUN {iscsi.get('lun')} of {iscsi.get('iqn')} at {iscsi.get('portal')}"
    if target.iscsi is None:
        return f"present {target} to the guest as {was}{known}"
    new = target.iscsi
    if (new.iqn, new.lun) == (iscsi.get("iqn"), iscsi.get("lun")):
        return f"the guest logs in to {was}{known}: let it reach that LUN, now on {new.portal}, not the original"
    return (f"the guest logs in to {was}{known}: either present {target} to it under that name, or let the guest log in"
            f" to {new.iqn} at {new.portal} and find LUN {new.lun} there")
