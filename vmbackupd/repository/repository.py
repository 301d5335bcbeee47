"""A repository: backups that are published, and the way to their images."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import BackupError, InvalidArgument, NotEncrypted, NotFound, RepositoryCorrupt
from vmbackupd.repository import envelope, sessions, settle
from vmbackupd.repository.catalog import Catalog, PackStorage
from vmbackupd.repository.condemned import Verdicts, manifests_in, packs_in
from vmbackupd.repository.forget import ForgetResult, forget, protect, protected_names
from vmbackupd.repository.gc import SLACK, THRESHOLD, Collector, GcResult, Progress
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header
from vmbackupd.repository.keys import (
    KeySource,
    SlotInfo,
    add_slot,
    list_slots,
    new_master_key,
    revoke_slot,
    slot_name,
    unlock,
)
from vmbackupd.repository.manifest import BACKUP_ID, MAX_BYTES, BackupSummary, Manifest
from vmbackupd.repository.retention import Decision, KeepPolicy, decide
from vmbackupd.repository.sessions import Session
from vmbackupd.repository.settle import MANIFESTS
from vmbackupd.repository.storage import Storage
from vmbackupd.typed import parse_object

if TYPE_CHECKING:
    from vmbackupd.repository.writer import RepositoryWriter

log = logging.getLogger(__name__)

MANIFEST_MAGIC = b"VMBKMANI"

CHUNK_SIZE = 64 * 1024
FANOUT = 128
LARGEST_BLOB = 256 * 2**20
VERDICT = 2**16  # packs that one verdict is about


@dataclass(frozen=True, slots=True)
class Settings:
    """How a writer works: nothing of it is part of the format.

    ``level``: zstd's; ``workers``: threads that hash and compress, 0 for one a processor, at most 8; ``pack_size``:
    bytes of a pack; ``segment_entries``: chunks new to the repository that are kept in memory before they are sorted
    into a file; ``cipher``: id of the one to write an encrypted repository with, 0 for the faster one of this host.
    """

    level: int = 1
    workers: int = 0
    pack_size: int = 16 * 2**20
    segment_entries: int = 2**19
    cipher: int = 0

    @property
    def threads(self) -> int:
        return self.workers or min(len(os.sched_getaffinity(0)), 8)


class Repository:
    """A repository that is open. Any number of threads at once."""

    def __init__(self, storage: Storage, header: Header, settings: Settings) -> None:
        """Use ``open`` or ``create``."""
        self.storage = storage
        self.header = header
        self.settings = settings
        self.catalog = Catalog(storage, header)
        self.verdicts = Verdicts(storage, header, self.catalog.give_up_one)
        self._lock = threading.Lock()
        self._reader: ChunkReader | None = None

    @classmethod
    def create(
        cls,
        storage: Storage,
        *,
        chunk_size: int = CHUNK_SIZE,
        settings: Settings | None = None,
        keys: Sequence[KeySource] = (),
    ) -> Repository:
        """Make a repository, encrypted if there are ``keys``: each of them opens it from then on.

        InvalidArgument if there is one or a key will not do, KeyRequired, StorageError, RepositoryFull. A local
        directory must exist: ``LocalStorage.create`` makes it.
        """
        if keys and storage.stat(HEADER_NAME) is not None:
            raise InvalidArgument(f"there is a repository at {storage.place} already")
        header = Header.new(chunk_size=chunk_size, fanout=FANOUT, master=new_master_key() if keys else None)
        # the slots come first: a header without them would be a repository that nobody can open
        slots = [add_slot(storage, header, header.master or b"", source, source.kind) for source in keys]
        if not storage.put_if_absent(HEADER_NAME, [header.encode()]):
            for slot in slots:
                storage.delete(slot_name(slot.id))
            raise InvalidArgument(f"there is a repository at {storage.place} already")
        return cls._opened(storage, header, settings)

    @classmethod
    def open(cls, storage: Storage, *, settings: Settings | None = None, keys: Sequence[KeySource] = ()) -> Repository:
        """Open a repository. With ``keys`` it has to be an encrypted one, which one of them opens.

        RepositoryMissing, KeyRequired, WrongKey, NotEncrypted, RepositoryCorrupt, StorageError.
        """
        header = Header.load(storage)
        if header.encrypted:
            header = header.unlocked(unlock(storage, header, keys))
        elif keys:
            raise NotEncrypted(
                f"the repository at {storage.place} is not encrypted, but a key is configured for it: if that is meant "
                "so, take the key out of the configuration; if not, somebody put another repository in its place"
            )
        return cls._opened(storage, header, settings)

    @classmethod
    def _opened(cls, storage: Storage, header: Header, settings: Settings | None) -> Repository:
        repository = cls(storage, header, settings or Settings())
        repository.catalog.refresh()
        if repository.catalog.damaged:
            repository.rebuild_index()
        return repository

    def close(self) -> None:
        """Give up descriptors; images that are open keep theirs."""
        with self._lock:
            reader, self._reader = self._reader, None
        self.catalog.close()
        if reader is not None:
            reader.close()
        self.storage.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The repository's id, 32 hexadecimal digits."""
        return self.header.id.hex()

    # ---- backups

    def backups(self) -> list[BackupSummary]:
        """All backups, oldest first. One whose manifest is damaged is listed with the reason, it hides no other."""
        found = [BackupSummary.of(item) if isinstance(item, Manifest) else item for item in self.manifests()]
        return sorted(found, key=lambda summary: (summary.t1, summary.id))

    def manifests(self) -> Iterator[Manifest | BackupSummary]:
        """The manifest of every backup, in no order; in place of one that is damaged a summary with the reason."""
        forgotten = manifests_in(self.verdicts.listed(lenient=True))
        for name in self.manifest_names() - forgotten:
            try:
                yield self.read_manifest(name)
            except FileNotFoundError:
                continue  # deleted since the listing
            except (RepositoryCorrupt, InvalidArgument) as reason:
                yield BackupSummary(name, error=str(reason))

    def manifest_object(self, backup_id: str) -> str:
        """The object that holds a backup's manifest."""
        return settle.manifest_object(self.header, backup_id)

    def manifest(self, backup_id: str) -> Manifest:
        """The manifest of a backup. NotFound, InvalidArgument, RepositoryCorrupt, StorageError."""
        if not BACKUP_ID.fullmatch(backup_id):
            raise InvalidArgument(f"{backup_id!r} is no backup id")
        name = self.header.manifest_name(backup_id)
        # Verdicts first, then the manifest: one that is read and not forgotten stays for a session claimed before.
        if name in manifests_in(self.verdicts.listed(lenient=True)):
            raise NotFound(f"backup {backup_id} in the repository at {self.storage.place} was forgotten")
        try:
            return self.read_manifest(name)
        except FileNotFoundError:
            raise NotFound(f"there is no backup {backup_id} in the repository at {self.storage.place}") from None

    def manifest_names(self) -> set[str]:
        """The last parts of the names of all manifests, also of forgotten backups, but not of what stands in the place
        of a manifest that was never published."""
        void = len(settle.void(self.header, ""))  # shorter than any manifest
        return {
            info.name.removeprefix(f"{MANIFESTS}/")
            for info in self.storage.list(f"{MANIFESTS}/")
            if info.size != void and BACKUP_ID.fullmatch(info.name.removeprefix(f"{MANIFESTS}/"))
        }

    def read_manifest(self, name: str) -> Manifest:
        """The manifest whose object's name ends with ``name``. FileNotFoundError, RepositoryCorrupt, StorageError."""
        what = f"manifest of backup {name}"
        data = self.storage.get(f"{MANIFESTS}/{name}", 0, MAX_BYTES + 2**16)
        if settle.is_void(self.header, name, data):
            raise FileNotFoundError(name)
        content = envelope.unseal(MANIFEST_MAGIC, self.header, data, what)
        fields = parse_object(content, what=what, max_length=MAX_BYTES, error=RepositoryCorrupt)
        manifest = Manifest.from_json(fields, at=what)
        if self.header.manifest_name(manifest.id) != name:
            raise RepositoryCorrupt(f"{what} is that of {manifest.id}: an object was swapped")
        return manifest

    @contextlib.contextmanager
    def reading(self, backup_id: str) -> Iterator[Manifest]:
        """The manifest of a backup that stays, with all it refers to, as long as the context lasts, even if the backup
        is forgotten meanwhile. NotFound, InvalidArgument, RepositoryCorrupt, StorageError.

        Where the repository cannot be written to, nothing holds the backup.
        """
        try:
            session = Session(self.storage, self.header, "reader", backup_id)
        except BackupError as reason:
            log.warning("%s: backup %s is read without a session: %s", self.storage.place, backup_id, reason)
            yield self.manifest(backup_id)
            return
        try:
            manifest = self.manifest(backup_id)
            self.catalog.refresh()
            yield manifest
        finally:
            session.end()

    # ---- content

    def image(self, tree: str) -> ImageSource:
        """The image of a published tree. InvalidArgument, RepositoryCorrupt, StorageError.

        The source is for one thread; open one for each.
        """
        return ImageSource(self._shared_reader(), tree)

    def blob(self, tree: str) -> bytes:
        """What ``RepositoryWriter.blob`` stored. InvalidArgument, RepositoryCorrupt, StorageError."""
        image = self.image(tree)
        if image.size > LARGEST_BLOB:
            raise RepositoryCorrupt(f"blob {tree} has {image.size} bytes, at most {LARGEST_BLOB} can be one")
        return image.read(0, image.size)

    def _shared_reader(self) -> ChunkReader:
        with self._lock:
            if self._reader is None or not self._reader.searches(self.catalog.current):
                self._reader = self.reader(self.catalog.current)
            return self._reader

    def reader(self, index: IndexSet, session: ChunkStore | None = None) -> ChunkReader:
        """What reads chunks by name; ``session`` is the writer's store whose unpublished chunks are to be seen too."""
        keys = self.header.keys
        return ChunkReader(
            index,
            chunk_key=keys.chunk,
            node_key=keys.node,
            storage=PackStorage(self.storage),
            recover=self._recover,
            session=session,
            largest=self.header.largest,
            content_key=self.header.content_key,
        )

    def _recover(self, name: bytes, searched: IndexSet) -> IndexSet | None:
        """``searched`` leads to no sound copy of this chunk. Perhaps there are newer indexes, perhaps one is lost.

        None: nothing new."""
        current = self.catalog.refresh()
        if current is searched or current.lookup(name) is None:
            self.rebuild_index()
            current = self.catalog.current
        return current if current is not searched else None

    # ---- writing

    def writer(self, backup_id: str) -> RepositoryWriter:
        """Begin a backup; an id is never used twice. Any number of writers may work at once, here and on other hosts.

        InvalidArgument if the id is taken or none, RepositoryFull, StorageError.
        """
        from vmbackupd.repository.writer import RepositoryWriter  # it imports this module

        return RepositoryWriter(self, backup_id)

    def reliable_index(self, without: Collection[bytes] = ()) -> IndexSet:
        """What a session that was claimed before may rely on: records in packs that exist and are not condemned, nor
        among ``without``. RepositoryCorrupt, StorageError."""
        condemned = packs_in(self.verdicts.listed())
        present = self.catalog.pack_ids()
        return self.catalog.for_writer(present, condemned.union(without))

    # ---- keys

    def key_slots(self) -> list[SlotInfo]:
        """The secrets that open this repository. StorageError."""
        return list_slots(self.storage, self.header)

    def add_key(self, source: KeySource, label: str) -> SlotInfo:
        """One more secret that opens it. InvalidArgument, KeyRequired, StorageError."""
        if self.header.master is None:
            raise InvalidArgument(f"the repository at {self.storage.place} is not encrypted")
        return add_slot(self.storage, self.header, self.header.master, source, label)

    def revoke_key(self, slot_id: str) -> None:
        """A secret opens it no more. NotFound, InvalidArgument for the last one, StorageError."""
        revoke_slot(self.storage, self.header, slot_id)

    # ---- care

    def condemn(self, packs: Iterable[bytes], *, manifests: Iterable[str] = (), reason: str) -> None:
        """From now on nobody new relies on these packs (ids); ``gc`` removes them when nobody is left who did, and what
        is needed of them is stored elsewhere. ``manifests``: last parts of names. StorageError, RepositoryFull."""
        ids = sorted(packs)
        names = frozenset(manifests)
        if names:
            self.verdicts.add((), names, reason)
        for first in range(0, len(ids), VERDICT):
            self.verdicts.add(ids[first : first + VERDICT], (), reason)

    def forget(self, backup_ids: Iterable[str]) -> ForgetResult:
        """Forget these backups, all or none: they are gone at once, their space after the next ``gc``.

        NotFound, Protected, InvalidArgument, StorageError, RepositoryFull.
        """
        return forget(self, backup_ids)

    def protect(self, backup_id: str, wanted: bool) -> None:
        """Protect a backup from being forgotten, or take that away. NotFound, InvalidArgument, StorageError."""
        protect(self, backup_id, wanted)

    def protected(self, backup_ids: Iterable[str] | None = None) -> set[str]:
        """Which of these backups are protected, or of all: ids. StorageError."""
        names = protected_names(self)
        ids = backup_ids if backup_ids is not None else [summary.id for summary in self.backups()]
        return {backup_id for backup_id in ids if self.header.manifest_name(backup_id) in names}

    def prune(
        self, policy: KeepPolicy, *, vm: str | None = None, dry_run: bool = False, zone: tzinfo | None = None
    ) -> list[Decision]:
        """Forget the backups (of the VM with this name or UUID) that ``policy`` does not keep; what was decided on
        each, oldest first. ``zone``: time zone of the periods, the host's if None. StorageError, RepositoryFull."""
        backups = [item for item in self.backups() if vm is None or vm in (item.vm_name, item.vm_uuid)]
        decisions = decide(backups, policy, zone=zone, protected=self.protected(item.id for item in backups))
        if not dry_run:
            forget(self, [item.backup.id for item in decisions if not item.keep])
        return decisions

    def gc(
        self,
        *,
        dry_run: bool = False,
        threshold: float = THRESHOLD,
        slack: float = SLACK,
        progress: Progress | None = None,
    ) -> GcResult:
        """Free the space that no backup needs. Safe beside anything else, here and on other hosts.

        ``threshold``: the wasted share above which a pack is repacked; ``slack``: more are until no more than this
        share of all packs is wasted; ``progress(step, done, total)`` is called now and then, and ends it by raising.
        RepositoryCorrupt naming the backup where what a backup needs is missing: nothing is removed then. StorageError,
        RepositoryFull.
        """
        return Collector(self, threshold=threshold, slack=slack, progress=progress).run(dry_run=dry_run)

    def rebuild_index(self) -> int:
        """Make an index of the packs that none covers, but not of those that only their session relies on; how many.

        Needs nothing but packs. Done by itself when an index is damaged or a chunk is not found.
        """
        return self.catalog.rebuild(self._private())

    def _private(self) -> Iterator[bytes]:
        """Ids of sessions whose packs are nobody else's: they are at work, or died before they had an index."""
        for info in sessions.listed(self.storage, self.header, details=False).values():
            if not (info.covered and self.storage.abandoned(sessions.session_name(info.id))):
                yield info.id

    def clean_up(self) -> int:
        """End sessions whose owners died; remove temporary files, and packs that nobody else can rely on. The bytes.

        Leaves who is at work alone, on this host and on others.
        """
        return settle.clean_up(self.storage, self.header)

    def info(self) -> dict[str, object]:
        """Figures of the repository for ``repository info``; sizes in bytes."""
        packs = self.catalog.list_packs()
        return {
            "id": self.id,
            "place": self.storage.place,
            "created": self.header.created,
            "hash": "blake3-keyed",
            "encrypted": self.header.encrypted,
            "chunk_size": self.header.chunk_size,
            "fanout": self.header.fanout,
            "backups": len(self.manifest_names() - manifests_in(self.verdicts.listed(lenient=True))),
            "packs": len(packs),
            "pack_bytes": sum(packs.values()),
            "chunks": len(self.catalog.refresh()),
            "free_bytes": self.storage.free_bytes(),
        }
