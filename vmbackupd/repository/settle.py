"""What becomes of sessions that died: whether they have published is decided for good, and their leftovers go."""

from __future__ import annotations

import logging

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository import envelope, sessions
from vmbackupd.repository.catalog import object_id, pack_name
from vmbackupd.repository.header import Header
from vmbackupd.repository.sessions import SessionInfo, session_name
from vmbackupd.repository.storage import Storage

log = logging.getLogger(__name__)

MANIFESTS = "manifests"
VOID_MAGIC = b"VMBKVOID"


def manifest_object(header: Header, backup_id: str) -> str:
    """The object that holds this backup's manifest."""
    return f"{MANIFESTS}/{header.manifest_name(backup_id)}"


def void(header: Header, name: str) -> bytes:
    """The tombstone that stands where the manifest ``name`` can never be put any more. All have the same size."""
    return envelope.seal(VOID_MAGIC, header, keyed_hash(header.keys.seal, f"{MANIFESTS}/{name}".encode()))


def is_void(header: Header, name: str, data: bytes) -> bool:
    """Is this a tombstone? RepositoryCorrupt if it is not that of ``name``."""
    if not data.startswith(VOID_MAGIC):
        return False
    what = f"tombstone {MANIFESTS}/{name}"
    if envelope.unseal(VOID_MAGIC, header, data, what) != keyed_hash(header.keys.seal, f"{MANIFESTS}/{name}".encode()):
        raise RepositoryCorrupt(f"{what} is that of another backup: an object was swapped")
    return True


def fence(storage: Storage, header: Header, backup_id: str) -> bool:
    """Decide whether this backup is published: True if it was, or was fenced, before. StorageError: undecided."""
    name = header.manifest_name(backup_id)
    return not storage.put_if_absent(f"{MANIFESTS}/{name}", [void(header, name)])


def clean_up(storage: Storage, header: Header) -> int:
    """End the sessions whose owners died, and remove what nobody can rely on; the bytes that were freed.

    Leaves who is at work alone, on this host and on others. Needs no room. Packs that somebody may rely on are left to
    ``gc``.
    """
    storage.remove_temporaries()
    freed = 0
    for info in sessions.listed(storage, header).values():
        if storage.abandoned(session_name(info.id)):
            freed += _settle(storage, header, info)
    sessions.remove_orphans(storage)
    if freed:
        log.info("%s: removed %d bytes that killed writers left", storage.place, freed)
    return freed


def _settle(storage: Storage, header: Header, info: SessionInfo) -> int:
    """End one abandoned session; the bytes that were freed."""
    freed = 0
    if storage.certain_ends:
        # Asked now that its owner is known to be dead, not when the session was listed.
        if sessions.is_private(storage, info.id):
            freed = remove_packs(storage, info.id)
    elif info.kind == "writer":
        fence(storage, header, info.backup)
    elif not info.kind:
        log.warning(
            "%s: %s cannot be ended: it may be a backup that still runs; if none does, delete the object %s",
            storage.place,
            info,
            session_name(info.id),
        )
        return 0
    sessions.forget_session(storage, info.id)
    return freed


def remove_packs(storage: Storage, session: bytes) -> int:
    """Remove a session's packs, which nobody else can rely on; their bytes."""
    freed = 0
    for pack in list(storage.list(packs_of(session))):
        if object_id(pack.name) is not None and storage.delete(pack.name):
            freed += pack.size
    return freed


def packs_of(session: bytes) -> str:
    """What the names of a session's packs begin with."""
    return pack_name(session + bytes(4))[:-8]
