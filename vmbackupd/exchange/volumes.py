"""Which volume of which backup is meant."""

from __future__ import annotations

from vmbackupd.errors import NotFound
from vmbackupd.model import VolumeRecord
from vmbackupd.repository.manifest import Manifest


def find_volume(manifest: Manifest, volume: str) -> VolumeRecord:
    """The volume of this id. Raises ``NotFound`` with those there are."""
    for record in manifest.volumes:
        if record.id == volume:
            return record
    there = ", ".join(record.id for record in manifest.volumes)
    raise NotFound(f"backup {manifest.id} of VM {manifest.vm.name} has no volume {volume!r}: it has {there or 'none'}")
