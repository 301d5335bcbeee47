"""Verifying a repository: is everything there that its backups need, and is it what was written?

The structure alone (manifests, trees, indexes, packs present and long enough) costs reading the trees' nodes. With
``data`` every byte of every pack is read and checked against its name. What is damaged is told by backup, volume and
byte range; packs that are damaged are condemned, so that later backups store what they held again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmbackupd.engine.progress import Progress
from vmbackupd.engine.verify import PackVerifier, TreeChecker
from vmbackupd.errors import InvalidArgument, NotFound, RepositoryCorrupt, RepositoryFull, StorageError
from vmbackupd.repository.catalog import PackStorage, object_id
from vmbackupd.repository.condemned import packs_in
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.repository import Repository
from vmbackupd.typed import get_int, get_object, get_str, parse_object

log = logging.getLogger(__name__)

SAVE_EVERY = 64  # packs between two writings of the state
STATE_VERSION = 1
DAMAGED = "damaged"  # the reason of a verdict on packs that a verification found damaged
MISSING = "missing"  # the reason of a pack that is gone, as the engine tells it


@dataclass(frozen=True, slots=True)
class Damage:
    """A byte range of an image that cannot be read any more. ``volume`` is the volume's id, with ``@t2`` for its image
    at T2; ``scratch`` for the image of the COW stores; or the name of a file of the configuration."""

    backup: str
    volume: str
    tree: str
    offset: int
    length: int
    reason: str
    pack: str | None

    def as_dict(self) -> dict[str, object]:
        return {
            "backup": self.backup,
            "volume": self.volume,
            "tree": self.tree,
            "offset": self.offset,
            "length": self.length,
            "reason": self.reason,
            "pack": self.pack,
        }


@dataclass(slots=True)
class VerifyReport:
    """What a verification found. Sizes in bytes; ``damaged_packs`` from id to what is wrong, ``unreadable`` from backup
    to what is wrong with its manifest. A damaged pack without ``damage`` holds nothing that a verified backup needs, or
    nothing that another pack does not hold as well. ``condemned`` are the damaged packs that later backups do not rely
    on; ``not_condemned`` tells why there are none where the repository cannot be written.
    """

    data: bool
    backups: list[str] = field(default_factory=list)
    nodes: int = 0
    chunks: int = 0
    packs: int = 0
    bytes_read: int = 0
    damaged_packs: dict[str, str] = field(default_factory=dict)
    damaged_indexes: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    damage: list[Damage] = field(default_factory=list)
    condemned: list[str] = field(default_factory=list)
    not_condemned: str | None = None
    resumed: bool = False

    @property
    def sound(self) -> bool:
        """Is every backup whole, and nothing else damaged either?"""
        return not (self.damaged_packs or self.damaged_indexes or self.unreadable or self.damage)

    def as_dict(self) -> dict[str, object]:
        """What ``verify --json`` prints."""
        return {
            "sound": self.sound,
            "data": self.data,
            "backups": self.backups,
            "nodes": self.nodes,
            "chunks": self.chunks,
            "packs": self.packs,
            "bytes_read": self.bytes_read,
            "damaged_packs": self.damaged_packs,
            "damaged_indexes": self.damaged_indexes,
            "unreadable": self.unreadable,
            "damage": [item.as_dict() for item in self.damage],
            "condemned": self.condemned,
            "not_condemned": self.not_condemned,
            "resumed": self.resumed,
        }


def verify(
    repository: Repository,
    *,
    backups: Sequence[str] | None = None,
    data: bool = False,
    rate: float | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check backups (all: None) and, with ``data``, every byte of the packs they lie in (all packs: None).

    ``rate`` limits reading packs, in bytes a second. ``state`` is a file that remembers which packs were read: after a
    cancellation, an error or a crash the next call with the same file goes on there; it is removed at the end.
    ``progress`` counts bytes of packs, or of images where only the structure is checked; its ``cancel`` raises
    Cancelled. Damage is no error but in the report. Blocking. Errors: NotFound, InvalidArgument, Cancelled,
    StorageError (the storage itself fails: nothing is condemned).
    """
    if rate is not None and not rate > 0:
        raise InvalidArgument(f"the rate of a verification must be above zero bytes a second, not {rate}")
    return _Verification(repository, backups, data, rate or 0.0, state, progress or Progress()).run()


class _Verification:
    def __init__(
        self,
        repository: Repository,
        backups: Sequence[str] | None,
        data: bool,
        rate: float,
        state: Path | None,
        progress: Progress,
    ) -> None:
        self.repository = repository
        self.wanted = backups
        self.rate = rate
        self.state = _State(state, repository.id, backups) if state is not None and data else None
        self.progress = progress
        self.report = VerifyReport(data)
        self.suspect: set[bytes] = set()

    def run(self) -> VerifyReport:
        manifests = self._manifests()
        self.repository.rebuild_index()  # of packs that lost theirs: no damage then
        packs = self.repository.catalog.list_packs()
        if self.report.data:
            self._read_packs(self._packs_of(manifests, packs) if self.wanted is not None else packs)
        self._check_trees(manifests, packs)
        self._condemn()
        if self.state is not None:
            self.state.remove()
        return self.report

    # ---- manifests

    def _manifests(self) -> list[Manifest]:
        found = []
        for backup in self.wanted if self.wanted is not None else self._ids():
            try:
                found.append(self.repository.manifest(backup))
            except RepositoryCorrupt as reason:
                self.report.unreadable[backup] = str(reason)
            except NotFound:
                if self.wanted is not None:
                    raise
                continue  # forgotten since the listing
            self.report.backups.append(backup)
        return found

    def _ids(self) -> Iterator[str]:
        for summary in self.repository.backups():
            if summary.error is not None:
                self.report.unreadable[summary.id] = summary.error
            else:
                yield summary.id

    # ---- trees

    def _checker(self, packs: dict[bytes, int], *, counts: bool = False) -> TreeChecker:
        index = self.repository.catalog.current
        reader = self.repository.reader(index)
        return TreeChecker(reader, index, packs, suspect=self.suspect, progress=self.progress, counts=counts)

    def _packs_of(self, manifests: list[Manifest], packs: dict[bytes, int]) -> dict[bytes, int]:
        """Those of ``packs`` that hold what these backups need."""
        checker = self._checker(packs)
        for manifest in manifests:
            for tree in dict.fromkeys(manifest.trees()):
                with suppress(RepositoryCorrupt):  # told when the trees are checked
                    checker.check(tree)
        return {pack_id: packs[pack_id] for pack_id in checker.used()}

    def _check_trees(self, manifests: list[Manifest], packs: dict[bytes, int]) -> None:
        if not self.report.data:
            images = {tree: size for manifest in manifests for _, tree, size in _trees(manifest)}
            self.progress.bytes_total += sum(images.values())
        damage, checker = self._damage(manifests, self._checker(packs, counts=not self.report.data))
        self._note_indexes()
        while damage:
            # A damaged block of an index counts as empty, and gc may have moved what was there: believed is only what
            # is still so with all that can be known now.
            index, before = self.repository.catalog.current, packs
            self.repository.rebuild_index()
            packs = self.repository.catalog.list_packs()
            if self.repository.catalog.current is index and packs == before:
                break
            manifests = [manifest for manifest in manifests if self._still_there(manifest.id)]
            damage, checker = self._damage(manifests, self._checker(packs))
            self._note_indexes()
        if self.report.damaged_indexes:
            self.repository.rebuild_index()
        self.report.damaged_indexes = sorted({*self.report.damaged_indexes, *self.repository.catalog.damaged})
        self.report.nodes, self.report.chunks = checker.nodes, checker.chunks
        self.report.damage = damage
        for item in damage:
            if item.pack is not None:
                there = bytes.fromhex(item.pack) in packs
                self.report.damaged_packs.setdefault(item.pack, item.reason if there else MISSING)
        for pack in [pack for pack, why in self.report.damaged_packs.items() if why != MISSING]:
            if bytes.fromhex(pack) not in packs:
                del self.report.damaged_packs[pack]  # gc has removed it

    def _note_indexes(self) -> None:
        found = [str(file.label) for file in self.repository.catalog.current.files if file.damaged]
        self.report.damaged_indexes += [name for name in found if name not in self.report.damaged_indexes]

    @staticmethod
    def _damage(manifests: list[Manifest], checker: TreeChecker) -> tuple[list[Damage], TreeChecker]:
        known: dict[str, list[tuple[int, int, str, str | None]]] = {}
        damage: list[Damage] = []
        for manifest in manifests:
            for volume, tree, size in _trees(manifest):
                if tree not in known:
                    known[tree] = _ranges(checker, tree, size)
                damage += [Damage(manifest.id, volume, tree, *found) for found in known[tree]]
        return damage, checker

    def _still_there(self, backup: str) -> bool:
        """A backup that was forgotten meanwhile may lose its packs."""
        try:
            self.repository.manifest(backup)
        except NotFound:
            return False
        except RepositoryCorrupt:
            return True
        return True

    # ---- packs

    def _read_packs(self, packs: dict[bytes, int]) -> None:
        report, state = self.report, self.state
        todo = sorted(packs.items())
        if state is not None and state.load():
            report.resumed = True
            report.damaged_packs.update(
                {pack: why for pack, why in state.damaged.items() if bytes.fromhex(pack) in packs}
            )
            todo = [(pack_id, size) for pack_id, size in todo if pack_id > state.after]
        self.progress.bytes_total += sum(packs.values())
        self.progress.bytes_done += sum(packs.values()) - sum(size for _, size in todo)
        report.packs = len(packs) - len(todo)
        before = self.progress.bytes_read
        done: set[bytes] = set()

        def sink(pack_id: bytes, size: int, reason: str | None, records: int, bad: list[tuple[bytes, int]]) -> None:
            if reason is not None and reason != MISSING:
                report.damaged_packs[pack_id.hex()] = reason
                log.warning("%s: %s", self.repository.storage.place, reason)
            # a pack that is gone was removed by somebody, or is missed when the trees are checked
            report.packs += 1
            done.add(pack_id)
            if state is not None and report.packs % SAVE_EVERY == 0:
                state.save(_reached(todo, done, state.after), report.damaged_packs)

        verifier = PackVerifier(
            self.repository.reader(self.repository.catalog.current),
            PackStorage(self.repository.storage),
            seal_key=self.repository.header.keys.seal,
            repository=self.repository.header.id,
            progress=self.progress,
            rate=self.rate,
        )
        try:
            verifier.run(todo, sink)
        finally:
            report.bytes_read = self.progress.bytes_read - before
            if state is not None:
                state.save(_reached(todo, done, state.after), report.damaged_packs)
        self.suspect = {bytes.fromhex(pack) for pack in report.damaged_packs}

    def _condemn(self) -> None:
        """From now on writers store again what damaged packs hold; gc removes them when nothing is left in them."""
        damaged = {bytes.fromhex(pack) for pack, why in self.report.damaged_packs.items() if why != MISSING}
        if not damaged:
            return
        try:
            new = damaged - packs_in(self.repository.verdicts.listed(lenient=True))
            if new:
                self.repository.condemn(new, reason=DAMAGED)
        except (StorageError, RepositoryFull) as reason:  # a repository that is mounted read-only
            self.report.not_condemned = str(reason)
            log.warning("%s: damaged packs are not condemned: %s", self.repository.storage.place, reason)
            return
        self.report.condemned = sorted(pack_id.hex() for pack_id in damaged)


def is_sound(repository: Repository, tree: str) -> bool:
    """Whether the image ``tree`` can be built on. It is looked at as a whole only while there are packs that a
    verification found damaged. Blocking. Raises ``StorageError``."""
    verdicts = repository.verdicts.listed(lenient=True)
    suspect = packs_in([verdict for verdict in verdicts if verdict.reason == DAMAGED])
    if not suspect:
        return True
    index = repository.catalog.current
    packs = repository.catalog.list_packs()
    checker = TreeChecker(repository.reader(index), index, packs, suspect=suspect, counts=False)
    try:
        return not checker.check(tree)[1]
    except RepositoryCorrupt:
        return False


def _trees(manifest: Manifest) -> Iterator[tuple[str, str, int]]:
    """(what it is to a person, tree, bytes) of everything a backup consists of; 0 bytes: the manifest does not tell."""
    for volume in manifest.volumes:
        if volume.tree is not None:
            yield volume.id, volume.tree, volume.size
        if volume.t2_tree is not None:
            yield f"{volume.id}@t2", volume.t2_tree, volume.size
    if manifest.store is not None:
        yield "scratch", manifest.store.tree, manifest.store.size
    for name, tree in manifest.config.items():
        yield name, tree, 0


def _ranges(checker: TreeChecker, tree: str, size: int) -> list[tuple[int, int, str, str | None]]:
    """(offset, length, reason, pack) of what is damaged in a tree, neighbours with the same reason together."""
    try:
        known, found = checker.check(tree)
    except RepositoryCorrupt as error:
        return [(0, size, str(error), None)]
    merged: list[tuple[int, int, str, str | None]] = []
    for offset, length, reason, _, pack in found:
        where = pack.hex() or None
        if known == 0:  # not even its root can be read
            length = size
        if merged and merged[-1][0] + merged[-1][1] == offset and merged[-1][2:] == (reason, where):
            merged[-1] = (merged[-1][0], merged[-1][1] + length, reason, where)
        else:
            merged.append((offset, length, reason, where))
    return merged


def _reached(todo: list[tuple[bytes, int]], done: set[bytes], after: bytes) -> bytes:
    """The last pack before which all are done."""
    for pack_id, _ in todo:
        if pack_id not in done:
            break
        after = pack_id
    return after


class _State:
    """The file that remembers how far a verification came."""

    def __init__(self, path: Path, repository: str, backups: Sequence[str] | None) -> None:
        self.path = path
        self.after = b""
        self.damaged: dict[str, str] = {}
        self._scope = {"repository": repository, "backups": sorted(backups) if backups is not None else None}

    def load(self) -> bool:
        """Is there something to go on from? A file of another verification, or one that is damaged, is none."""
        try:
            fields = parse_object(self.path.read_bytes(), what=str(self.path), error=RepositoryCorrupt)
            if get_int(fields, "version") != STATE_VERSION or fields.get("scope") != self._scope:
                return False
            after = get_str(fields, "after", max_length=32, error=RepositoryCorrupt)
            damaged = get_object(fields, "damaged", error=RepositoryCorrupt)
            if object_id(after) is None or not all(
                object_id(pack) and isinstance(why, str) for pack, why in damaged.items()
            ):
                return False
        except FileNotFoundError:
            return False
        except OSError as reason:
            raise StorageError(f"the state of the verification, {self.path}: {reason.strerror}") from reason
        except (RepositoryCorrupt, ValueError) as reason:
            log.warning("the verification begins anew: %s", reason)
            return False
        self.after, self.damaged = bytes.fromhex(after), damaged
        return True

    def save(self, after: bytes, damaged: dict[str, str]) -> None:
        """Remember that all packs up to ``after`` were read."""
        if not after:
            return
        fields = {"version": STATE_VERSION, "scope": self._scope, "after": after.hex(), "damaged": damaged}
        beside = self.path.with_name(self.path.name + ".new")
        try:
            with beside.open("w") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as reason:
            raise StorageError(f"the state of the verification, {self.path}: {reason.strerror}") from reason

    def remove(self) -> None:
        """The verification is complete."""
        with suppress(FileNotFoundError):
            self.path.unlink()
