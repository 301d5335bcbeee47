"""Backups that are not wanted any more, and those that must stay.

Forgetting condemns the manifest: from that instant the backup is gone for everybody who looks. The object itself goes
when no session is left that could have looked before, so that what a reader or writer found stays while it works.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmbackupd.errors import InvalidArgument, NotFound, ObjectLocked, Protected
from vmbackupd.repository import envelope, settle
from vmbackupd.repository.condemned import Condemned, manifests_in
from vmbackupd.repository.manifest import BACKUP_ID
from vmbackupd.repository.settle import MANIFESTS

if TYPE_CHECKING:
    from vmbackupd.repository.repository import Repository

log = logging.getLogger(__name__)

PROTECTED = "protected"
PROTECTED_MAGIC = b"VMBKPROT"
REASON = "forgotten"


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """``forgotten``: ids. ``waiting``: sessions, for people, that may still use some of them: the first ``gc`` after
    these have ended frees the space. ``locked_until``: seconds since 1970 until which the store keeps some of them from
    being removed, None if it does not; they are forgotten all the same."""

    forgotten: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    locked_until: float | None = None


def forget(repository: Repository, backup_ids: Iterable[str]) -> ForgetResult:
    """Forget these backups, all or none. NotFound, Protected, InvalidArgument, StorageError, RepositoryFull."""
    ids = list(dict.fromkeys(backup_ids))
    gone = manifests_in(repository.verdicts.listed())
    kept = protected_names(repository)
    names = []
    for backup_id in ids:
        name = _name(repository, backup_id)
        if name is None or name in gone:
            raise NotFound(f"there is no backup {backup_id} in the repository at {repository.storage.place}")
        if name in kept:
            raise Protected(f"backup {backup_id} is protected: take that away with `vmbackupctl unprotect {backup_id}`")
        names.append(name)
    if not names:
        return ForgetResult()
    verdict = repository.verdicts.add((), names, REASON)
    log.info("%s: forgot %s", repository.storage.place, ", ".join(ids))
    try:
        waiting = [] if remove_manifests(repository, verdict) else repository.verdicts.holders(verdict)
    except ObjectLocked as reason:  # the verdict stands: the first gc that may removes them
        log.info("%s", reason)
        return ForgetResult(ids, locked_until=reason.until)
    return ForgetResult(ids, waiting)


def _name(repository: Repository, backup_id: str) -> str | None:
    """The last part of the name of a backup's manifest; None if there is none. A manifest that cannot be read is listed
    under that part itself, and can be forgotten by it."""
    if not BACKUP_ID.fullmatch(backup_id):
        raise InvalidArgument(f"{backup_id!r} is no backup id")
    void = len(settle.void(repository.header, ""))
    for name in (repository.header.manifest_name(backup_id), backup_id):
        found = repository.storage.stat(f"{MANIFESTS}/{name}")
        if found is not None and found.size != void:
            return name
    return None


def remove_manifests(repository: Repository, verdict: Condemned) -> bool:
    """Remove the manifests of a verdict if no session is left that could use them; False if there is. ObjectLocked."""
    if repository.verdicts.outlived(verdict):
        return False
    for name in sorted(verdict.manifests):
        _remove_manifest(repository, name)
    if not verdict.packs:
        repository.verdicts.carried_out(verdict)
    return True


def _remove_manifest(repository: Repository, name: str) -> None:
    storage, header = repository.storage, repository.header
    place = f"{MANIFESTS}/{name}"
    if storage.certain_ends:
        storage.delete(place)
        return
    # A request of a writer that is long gone could still be on its way and bring the manifest back: a tombstone, once
    # it stands, keeps it out.
    void = settle.void(header, name)
    while True:
        found = storage.stat(place)
        if found is not None and found.size == len(void):
            return
        storage.delete(place)
        if storage.put_if_absent(place, [void]):
            return


def protected_names(repository: Repository) -> set[str]:
    """The last parts of the names of protected backups' manifests."""
    return {info.name.removeprefix(f"{PROTECTED}/") for info in repository.storage.list(f"{PROTECTED}/")}


def protect(repository: Repository, backup_id: str, wanted: bool) -> None:
    """Protect a backup from being forgotten, or take that away. NotFound, InvalidArgument, StorageError."""
    manifest = repository.manifest(backup_id)
    name = f"{PROTECTED}/{repository.header.manifest_name(manifest.id)}"
    if not wanted:
        repository.storage.delete(name)
        return
    content = json.dumps({"backup": manifest.id}, separators=(",", ":")).encode()
    repository.storage.put_if_absent(name, [envelope.seal(PROTECTED_MAGIC, repository.header, content)])
