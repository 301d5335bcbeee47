"""What earlier backups of a VM offer to build on.

An image may begin as that of an earlier backup if all that changed since is known. The proof is a *token*: each backup
notes what recorded the changes from its own T1 on (a tracker's generation, a checkpoint's name), and only a record that
began with that very backup makes it a base.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from vmbackupd.errors import InvalidArgument, NotFound, RepositoryCorrupt
from vmbackupd.model import VolumeRecord
from vmbackupd.repository import Repository, RepositoryWriter
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.verify import is_sound

log = logging.getLogger("job.bases")

LOOKED_AT = 64  # backups, newest first: an older one is no base for anybody


@dataclass(frozen=True, slots=True)
class Base:
    """An image to begin with: ``tree`` of the backup ``backup``, as it left the disk that ``token`` recorded since;
    ``moment`` is that of thin pools below it."""

    backup: str
    tree: str
    token: str | None
    moment: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """What the image of a disk begins as: that of an earlier backup, or (None) nothing, and ``reason`` says why."""

    base: Base | None
    reason: str = ""


class Bases:
    """The newest backups of one VM, for one writer. Blocking: for a thread."""

    def __init__(self, repository: Repository, writer: RepositoryWriter, vm_uuid: str) -> None:
        """Raises ``StorageError``."""
        self._repository = repository
        self._writer = writer
        self._manifests = _newest(repository, vm_uuid)

    def latest(self, volume: str, size: int) -> Base | None:
        """The newest image of this size of a volume, whatever changed since. Raises ``StorageError``."""
        return self._first(volume, size, None)

    def recorded_by(self, token: str, volume: str, size: int) -> Base | None:
        """The image of a volume from which on ``token`` recorded the changes. Raises ``StorageError``."""
        return self._first(volume, size, token)

    def tokens(self, volume: str) -> list[str]:
        """What earlier backups of the volume were recorded by from then on, newest first."""
        records = (_record(manifest, volume) for manifest in self._manifests)
        return [record.change.token for record in records if record is not None and record.change.token is not None]

    def _first(self, volume: str, size: int, token: str | None) -> Base | None:
        for manifest in self._manifests:
            record = _record(manifest, volume)
            if record is None or record.size != size or token not in (None, record.change.token):
                continue
            # What was recorded began before T1, so that it holds what changed since T2 as well.
            tree = record.tree or record.t2_tree
            if tree is None:
                continue
            if not is_sound(self._repository, tree):
                log.warning("backup %s is no base: its image of %s is damaged", manifest.id, volume)
                continue
            try:
                self._writer.base(manifest.id)
            except (NotFound, InvalidArgument, RepositoryCorrupt) as error:
                log.info("backup %s is no base: %s", manifest.id, error)
                continue
            return Base(manifest.id, tree, record.change.token, record.change.moment)
        return None


def _record(manifest: Manifest, volume: str) -> VolumeRecord | None:
    return next((record for record in manifest.volumes if record.id == volume), None)


def _newest(repository: Repository, vm_uuid: str) -> list[Manifest]:
    """The VM's newest backups that can be read, newest first."""
    found = [item for item in repository.manifests() if isinstance(item, Manifest) and item.vm.uuid == vm_uuid]
    return sorted(found, key=lambda manifest: (manifest.t1, manifest.id), reverse=True)[:LOOKED_AT]
