"""Who is at work on a repository: sessions, what they promise each other, and the end of those that died.

A session is claimed before its owner looks at anything. docs/format.md, "Sessions", says what follows from that.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Literal

from vmbackupd.errors import BackupError, RepositoryCorrupt, SessionLost
from vmbackupd.repository import envelope
from vmbackupd.repository.header import Header
from vmbackupd.repository.storage import Claim, Storage
from vmbackupd.typed import get_str, parse_object

log = logging.getLogger(__name__)

SESSIONS = "sessions"
COVERED = ".covered"
SESSION_ID = 12
MAGIC = b"VMBKSESS"
LARGEST = 64 * 1024

Kind = Literal["writer", "reader", "gc"]
KINDS: tuple[Kind, ...] = ("writer", "reader", "gc")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as others see it. ``kind`` is empty where its object cannot be read: it could be anything.

    ``covered``: indexes of its packs may be visible, so that anybody may rely on them.
    """

    id: bytes
    kind: Kind | Literal[""] = ""
    backup: str = ""
    host: str = ""
    pid: str = ""
    covered: bool = False

    @property
    def holds(self) -> bool:
        """Must what is condemned now outlast this session? Not if it only collects garbage itself."""
        return self.kind != "gc"

    def __str__(self) -> str:
        return f"{self.kind or 'unreadable'} session {self.id.hex()} of {self.host or 'an unknown host'}"


class Session:
    """Being at work on a repository, from the claim to ``release``."""

    def __init__(self, storage: Storage, header: Header, kind: Kind, backup: str = "") -> None:
        """Claim it. ``backup``: the id of the backup that it will publish, or that it reads. StorageError."""
        self.id = secrets.token_bytes(SESSION_ID)
        self.kind = kind
        self.backup = backup
        self._storage = storage
        self._covered = False
        content = {
            "id": self.id.hex(),
            "kind": kind,
            "backup": backup,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "started": round(time.time(), 3),
        }
        data = envelope.seal(MAGIC, header, json.dumps(content, sort_keys=True).encode())
        self._claim: Claim | None = storage.claim(session_name(self.id), data)

    def check(self) -> None:
        """SessionLost if others may count this session as ended."""
        if self._claim is None or self._claim.lost:
            raise SessionLost(
                f"session {self.id.hex()} on {self._storage.place} is lost: the repository could not be reached for "
                "too long; begin again"
            )

    def cover(self) -> None:
        """Before the first index of this session's packs can be visible. StorageError, RepositoryFull."""
        self._covered = True
        self._storage.put_if_absent(_covered_name(self.id), [b"1"])

    def release(self) -> None:
        """End in good order. Safe to call twice. StorageError; the session then counts as abandoned soon."""
        claim, self._claim = self._claim, None
        if claim is None:
            return
        claim.release()
        if self._covered:
            self._storage.delete(_covered_name(self.id))

    def end(self) -> None:
        """Release the session; where that fails, others find out that it has ended."""
        try:
            self.release()
        except BackupError as reason:
            log.warning("ending session %s on %s: %s", self.id.hex(), self._storage.place, reason)

    def drop(self) -> None:
        """End without a word, as if killed: others find out what became of it."""
        self._claim = None


def session_name(session: bytes) -> str:
    """The object that tells that this session is at work."""
    return f"{SESSIONS}/{session.hex()}"


def _covered_name(session: bytes) -> str:
    return session_name(session) + COVERED


def listed(storage: Storage, header: Header, *, details: bool = True) -> dict[bytes, SessionInfo]:
    """The sessions that have not ended in good order, by id. Without ``details`` their objects are not read."""
    found: dict[bytes, SessionInfo] = {}
    names = {info.name for info in storage.list(f"{SESSIONS}/")}
    for name in names:
        session = session_id(name)
        if session is None:
            continue
        info = SessionInfo(session, covered=name + COVERED in names)
        if details:
            try:
                info = _read(storage, header, info)
            except FileNotFoundError:
                continue  # ended since the listing
        found[session] = info
    return found


def session_id(name: str) -> bytes | None:
    """The id in the name of a session's object; None if it is something else."""
    last = name.removeprefix(f"{SESSIONS}/")
    try:
        session = bytes.fromhex(last)
    except ValueError:
        return None
    return session if len(session) == SESSION_ID and session.hex() == last else None


def _read(storage: Storage, header: Header, info: SessionInfo) -> SessionInfo:
    name = session_name(info.id)
    error = RepositoryCorrupt
    try:
        content = envelope.unseal(MAGIC, header, storage.get(name, 0, LARGEST), name)
        fields = parse_object(content, what=name, max_length=LARGEST, error=error)
        kind = get_str(fields, "kind", at=name, error=error)
        if get_str(fields, "id", at=name, error=error) != info.id.hex():
            raise RepositoryCorrupt(f"{name} is another session's: an object was swapped")
        known = next((item for item in KINDS if item == kind), None)
        if known is None:
            raise RepositoryCorrupt(f"{name}: session of unknown kind {kind!r}")
        return SessionInfo(
            info.id,
            known,
            get_str(fields, "backup", max_length=256, at=name, error=error),
            get_str(fields, "host", max_length=1024, at=name, error=error),
            get_str(fields, "pid", max_length=32, at=name, error=error),
            info.covered,
        )
    except RepositoryCorrupt as reason:
        log.warning("%s: %s", storage.place, reason)
        return info


def forget_session(storage: Storage, session: bytes) -> None:
    """Remove the objects of a session whose end is settled."""
    storage.delete(session_name(session))
    storage.delete(_covered_name(session))


def remove_orphans(storage: Storage) -> None:
    """Remove marks of sessions that have ended."""
    for info in list(storage.list(f"{SESSIONS}/")):
        name = info.name.removesuffix(COVERED)
        if name != info.name and session_id(name) is not None and storage.stat(name) is None:
            storage.delete(info.name)


def is_private(storage: Storage, session: bytes) -> bool:
    """Are the packs of this session, whose owner ended, nobody else's? False if it is gone.

    The order matters: its mark is removed after its object. So if the object is there after the mark was looked for, a
    mark that was not found was never put; if it is not, the session ended in good order meanwhile.
    """
    return storage.stat(_covered_name(session)) is None and storage.stat(session_name(session)) is not None
