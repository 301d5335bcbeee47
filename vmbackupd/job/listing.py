"""What jobs and listings answer, as JSON objects. Their keys are part of the ``--json`` interface."""

from __future__ import annotations

from dataclasses import asdict

from vmbackupd.hypervisor.base import DomainInfo
from vmbackupd.job.coverage import ALLOWED, UNCOVERED, Coverage
from vmbackupd.job.job import Result
from vmbackupd.repository.manifest import Manifest


def backup_result(manifest: Manifest, timeline: list[dict[str, object]], seconds: float) -> Result:
    """What a backup says when it is done; ``uncovered`` are the ids of volumes that were allowed to be missing."""
    return {
        "backup": manifest.id,
        "vm": manifest.vm.name,
        "t1": manifest.t1,
        "t2": manifest.t2,
        "freeze_ms": manifest.freeze_ms,
        "size": sum(volume.size for volume in manifest.volumes),
        "bytes_read": sum(volume.bytes_read for volume in manifest.volumes),
        "bytes_stored": sum(volume.bytes_stored for volume in manifest.volumes),
        "seconds": round(seconds, 3),
        "timeline": timeline,
        "uncovered": missing(manifest),
    }


def missing(manifest: Manifest) -> list[str]:
    """Ids of the volumes that are not in a backup because they were allowed to be missing."""
    return [item.id for item in manifest.coverage if item.decision == ALLOWED]


def inspection(domain: DomainInfo, coverage: Coverage) -> Result:
    """What a backup would do with each device. ``would_fail`` tells that it is refused as things are; ``uncovered``,
    which marks a backup that is not complete, is empty here."""
    return {
        "vm": domain.name,
        "uuid": domain.uuid,
        "would_fail": any(item.decision == UNCOVERED for item in coverage.items),
        "uncovered": [],
        "coverage": [asdict(item) for item in coverage.items],
    }


def shown(manifest: Manifest) -> Result:
    """A manifest with its proof."""
    return {**manifest.to_json(), "uncovered": missing(manifest)}
