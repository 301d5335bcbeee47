"""Packs and manifests that are to go: nobody new relies on them, and they go when nobody is left who did before."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from vmbackupd.errors import RepositoryCorrupt, RepositoryFull
from vmbackupd.repository import envelope, sessions
from vmbackupd.repository.catalog import PACK_ID, object_id
from vmbackupd.repository.header import Header
from vmbackupd.repository.storage import Storage
from vmbackupd.typed import JsonObject, get_str, get_strs, parse_object

log = logging.getLogger(__name__)

CONDEMNED = "condemned"
WAITS = "waits"
MAGIC = b"VMBKCOND"
WAITS_MAGIC = b"VMBKWAIT"
LARGEST = 64 * 2**20
MOST = 2**20  # packs, manifests or sessions in one object


@dataclass(frozen=True, slots=True)
class Condemned:
    """One verdict: ``packs`` (ids) and ``manifests`` (last parts of their names), and why."""

    id: str
    packs: frozenset[bytes]
    manifests: frozenset[str]
    reason: str


class Verdicts:
    """The verdicts that stand in a repository. Objects that were read once are not read again."""

    def __init__(self, storage: Storage, header: Header, make_room: Callable[[], bool]) -> None:
        """``make_room`` is asked where the storage has no room for a verdict, without which nothing can ever be freed:
        true if it gave something up."""
        self._storage = storage
        self._header = header
        self._make_room = make_room
        self._known: dict[str, Condemned] = {}

    def add(self, packs: Iterable[bytes], manifests: Iterable[str], reason: str) -> Condemned:
        """Condemn, for good. StorageError, RepositoryFull: the verdict may stand or not."""
        verdict = Condemned(secrets.token_hex(PACK_ID), frozenset(packs), frozenset(manifests), reason)
        content: dict[str, object] = {
            "id": verdict.id,
            "packs": sorted(pack.hex() for pack in verdict.packs),
            "manifests": sorted(verdict.manifests),
            "reason": reason,
        }
        self._put(f"{CONDEMNED}/{verdict.id}", MAGIC, content)
        self._known[verdict.id] = verdict
        return verdict

    def listed(self, *, lenient: bool = False) -> list[Condemned]:
        """Every verdict that stands. RepositoryCorrupt if one cannot be read, unless ``lenient``."""
        found = []
        for name in sorted(_ids(self._storage, CONDEMNED)):
            try:
                found.append(self._known.get(name) or self._read(name))
            except FileNotFoundError:
                continue  # carried out since the listing
            except RepositoryCorrupt as reason:
                if not lenient:
                    raise
                log.warning("%s: %s", self._storage.place, reason)
        self._known = {verdict.id: verdict for verdict in found}
        return found

    def _read(self, name: str) -> Condemned:
        what = f"{CONDEMNED}/{name}"
        try:
            content = envelope.unseal(MAGIC, self._header, self._storage.get(what, 0, LARGEST), what)
            fields = parse_object(content, what=what, max_length=LARGEST, error=RepositoryCorrupt)
            _check_id(fields, what)
            names = get_strs(fields, "packs", max_length=MOST, at=what, error=RepositoryCorrupt)
            packs = [object_id(pack) for pack in names]
            if None in packs:
                raise RepositoryCorrupt(f"{what}: what it condemns is no pack")
            return Condemned(
                name,
                frozenset(pack for pack in packs if pack is not None),
                frozenset(get_strs(fields, "manifests", max_length=MOST, at=what, error=RepositoryCorrupt)),
                get_str(fields, "reason", at=what, error=RepositoryCorrupt),
            )
        except RepositoryCorrupt as reason:
            raise RepositoryCorrupt(
                f"{reason}; make sure that nothing works on the repository at {self._storage.place} anywhere, then "
                f"delete the object {what}"
            ) from reason

    def outlived(self, verdict: Condemned) -> frozenset[bytes]:
        """The sessions that must end before it is carried out. The first to ask writes down which those are."""
        name = f"{WAITS}/{verdict.id}"
        alive = {info.id for info in sessions.listed(self._storage, self._header).values() if info.holds}
        try:
            return self._awaited(name) & alive
        except FileNotFoundError:
            pass
        except RepositoryCorrupt as reason:
            log.warning("%s: %s; it is made again", self._storage.place, reason)
            self._storage.delete(name)
        if alive:
            self._put(name, WAITS_MAGIC, {"id": verdict.id, "sessions": sorted(session.hex() for session in alive)})
        return frozenset(alive)

    def holders(self, verdict: Condemned) -> list[str]:
        """Those sessions, for people."""
        waited = self.outlived(verdict)
        return [
            str(info) for session, info in sessions.listed(self._storage, self._header).items() if session in waited
        ]

    def _awaited(self, name: str) -> frozenset[bytes]:
        content = envelope.unseal(WAITS_MAGIC, self._header, self._storage.get(name, 0, LARGEST), name)
        fields = parse_object(content, what=name, max_length=LARGEST, error=RepositoryCorrupt)
        _check_id(fields, name)
        return frozenset(
            bytes.fromhex(session)
            for session in get_strs(fields, "sessions", max_length=MOST, at=name, error=RepositoryCorrupt)
        )

    def carried_out(self, verdict: Condemned) -> None:
        """Remove a verdict of whose packs and manifests nothing is left."""
        self._storage.delete(f"{CONDEMNED}/{verdict.id}")
        self._storage.delete(f"{WAITS}/{verdict.id}")
        self._known.pop(verdict.id, None)

    def remove_orphans(self) -> None:
        """Remove lists of sessions that no verdict waits for any more."""
        waits = _ids(self._storage, WAITS)  # before the verdicts: their verdict stood when they were made
        for name in waits - _ids(self._storage, CONDEMNED):
            self._storage.delete(f"{WAITS}/{name}")

    def _put(self, name: str, magic: bytes, content: dict[str, object]) -> None:
        data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        while True:
            try:
                self._storage.put_if_absent(name, [envelope.seal(magic, self._header, data)])
                return
            except RepositoryFull:
                if not self._make_room():
                    raise


def packs_in(verdicts: Collection[Condemned]) -> set[bytes]:
    """All condemned packs."""
    return {pack for verdict in verdicts for pack in verdict.packs}


def manifests_in(verdicts: Collection[Condemned]) -> set[str]:
    """All condemned manifests, by the last part of their names."""
    return {name for verdict in verdicts for name in verdict.manifests}


def _check_id(fields: JsonObject, what: str) -> None:
    if get_str(fields, "id", at=what, error=RepositoryCorrupt) != what.rpartition("/")[2]:
        raise RepositoryCorrupt(f"{what} carries another id: an object was swapped")


def _ids(storage: Storage, prefix: str) -> set[str]:
    return {info.name.removeprefix(f"{prefix}/") for info in storage.list(f"{prefix}/") if object_id(info.name)}
